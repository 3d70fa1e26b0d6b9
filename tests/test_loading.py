"""Loading models prints nothing of its own, and leaves the user's settings as they were."""

import logging
import os
import subprocess
import sys

import diffusers.utils.logging as diffusers_logging
import pytest
import transformers.utils.logging as transformers_logging
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from chunk_grpo_nb.models.pipelines import quiet_loading

BARS = (diffusers_logging, transformers_logging)
NOTICES = logging.getLogger("transformers.utils.import_utils")


def test_loading_a_pipeline_and_a_reward_model_prints_nothing():
    code = (
        "from chunk_grpo_nb.models.pipelines import load_pipeline\n"
        "from chunk_grpo_nb.shapes.rewards import load_scorer\n"
        "load_pipeline('shapes')\n"
        "load_scorer('clip')\n"
    )
    quiet = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    own = {name: value for name, value in os.environ.items() if name not in quiet}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert run.returncode == 0, run.stderr
    assert run.stdout + run.stderr == ""


@pytest.fixture
def bars_on():
    before = [module.is_progress_bar_enabled() for module in BARS]
    hub = not are_progress_bars_disabled()
    for module in BARS:
        module.enable_progress_bar()
    yield
    for module, shown in zip(BARS, before):
        module.enable_progress_bar() if shown else module.disable_progress_bar()
    enable_progress_bars() if hub else disable_progress_bars()


def test_bars_are_off_while_loading_and_on_again_afterwards_even_after_an_error(bars_on):
    with pytest.raises(OSError), quiet_loading():
        assert not any(module.is_progress_bar_enabled() for module in BARS)
        assert not are_progress_bars_disabled(), "bars of downloads stay"
        raise OSError
    assert all(module.is_progress_bar_enabled() for module in BARS)
    assert not are_progress_bars_disabled()


def test_bars_that_were_off_stay_off(bars_on):
    for module in BARS:
        module.disable_progress_bar()
    with quiet_loading():
        pass
    assert not any(module.is_progress_bar_enabled() for module in BARS)
    assert are_progress_bars_disabled()


def test_only_the_notice_about_torchvision_is_left_out(monkeypatch):
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(NOTICES, "handlers", [listener])
    notice = "`CLIPImageProcessor` requires torchvision (not installed); falling back to `Pil`"
    with quiet_loading():
        NOTICES.error(notice)
        NOTICES.error("something else")
    NOTICES.error(notice)
    assert heard == ["something else", notice]
