"""Whatever a user may write or a disk may hold: read right, or refused in words; never a traceback.

FUZZ_EXAMPLES cases for each reader (100 unless set; `ci/full` takes thousands).
"""

import os
import string
import unicodedata

import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chunk_grpo_nb.analysis.sweep import load_sweep
from chunk_grpo_nb.chunking import make_chunker
from chunk_grpo_nb.prompts import load_prompts
from chunk_grpo_nb.rewards.combined import parse_weights
from chunk_grpo_nb.rewards.judges import read_rating
from chunk_grpo_nb.shapes.scenes import parse_caption
from chunk_grpo_nb.training.checkpoints import load_checkpoint, save_checkpoint
from chunk_grpo_nb.training.config import flat, load_config, make_config
from chunk_grpo_nb.training.records import RunFolder

REFUSALS = (ValueError, TypeError, FileNotFoundError)
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = sorted(flat(make_config({})))
SPECS = ("step", "sequence", "fixed", "uniform", "adaptive", "segment", "online", "only", "chunk")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
specs = st.builds(
    "{}{}{}".format,
    st.sampled_from(SPECS),
    st.sampled_from(["", ":", ",", "::", " "]),
    st.text(alphabet=string.digits + ",.-:ea²", max_size=8) | st.sampled_from(SPECS),
)


def refused_in_words(call, *arguments) -> bool:
    """True if the call is refused in words, False if it succeeds; anything else is raised."""
    try:
        call(*arguments)
    except REFUSALS as error:
        words = str(error)
        assert words.strip(), f"{type(error).__name__} without words"
        assert len(words) < 2_000, f"a message of {len(words)} characters"
        controls = {c for c in words if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
        assert not controls, f"control characters {controls}"
        return True
    return False


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), values, max_size=3))
@example({"num_steps": int(1e18)})
def test_settings(chosen):
    refused_in_words(make_config, chosen)


@fuzz
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]")
def test_config_files(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    refused_in_words(load_config, path)


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=2))
def test_config_files_with_known_names(tmp_path, chosen):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(chosen, allow_unicode=True), encoding="utf-8")
    refused_in_words(load_config, path)


@fuzz
@given(
    st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet"]),
    st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
)
def test_prompt_files(tmp_path, suffix, content):
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(content)
    refused_in_words(load_prompts, path)


@fuzz
@given(specs | st.text(max_size=12), st.integers(1, 12))
@example("segment:²", 4)
def test_chunker_specs(spec, steps):
    curve = torch.linspace(1, 0.1, steps)
    refused_in_words(lambda: make_chunker(spec)(curve))


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["experiment", "fixed", "arms", "grid", "seeds"]) | st.text(max_size=5),
        values,
        max_size=4,
    )
)
def test_sweep_files(tmp_path, content):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    refused_in_words(load_sweep, path)


@fuzz
@given(st.text(max_size=80), st.text(alphabet=string.digits + ".-+ /", max_size=10))
def test_ratings(words, number):
    read_rating(f"{words} final score: {number}")


@fuzz
@given(st.text(max_size=30))
def test_weights_of_rewards(text):
    refused_in_words(parse_weights, text)


@fuzz
@given(st.text(max_size=40))
def test_captions(text):
    refused_in_words(parse_caption, text)


@fuzz
@given(data=st.data())
def test_damaged_checkpoints(tmp_path, data):
    folder = tmp_path / "run"
    known = folder.exists()
    run = RunFolder(folder) if known else RunFolder.create(folder, make_config({}), {})
    path = save_checkpoint(run, 1, {"weights": torch.arange(64.0), "done": 1})
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    flipped = data.draw(st.integers(0, max(0, cut - 1)))
    damaged = bytearray(content[:cut])
    if damaged:
        damaged[flipped] ^= 0xFF
    path.write_bytes(bytes(damaged))
    refused_in_words(load_checkpoint, path)
