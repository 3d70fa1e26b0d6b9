"""A run that was cut off and resumed is the run that was not, wherever it was cut."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from killed_train import KINDS
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.models.policy import load_policy
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.training.callbacks import Callback
from chunk_grpo_nb.training.checkpoints import list_checkpoints, load_checkpoint
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.records import RunFolder, read_rows
from chunk_grpo_nb.training.state import Trainer
from chunk_grpo_nb.training.trainer import Interrupted, train

RECORDS = ("metrics", "validation", "dynamics")


class Dies(Exception):
    """The power went out."""


class DieAt(Callback):
    """Stops without a word at a moment of an iteration."""

    def __init__(self, moment: str, iteration: int):
        self.iteration = iteration
        setattr(self, moment, self.die)

    def die(self, trainer, value=None):
        if trainer.done >= self.iteration:
            raise Dies


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("resume"))


def cut(config, path: Path, moment: str, iteration: int) -> None:
    """A run that dies."""
    with pytest.raises(Dies):
        train(config, path, callbacks=[DieAt(moment, iteration)])


def text(run: RunFolder, name: str) -> str:
    return (run.path / f"{name}.jsonl").read_text()


def final_state(run: RunFolder) -> str:
    """The last checkpoint, as text."""
    state = load_checkpoint(list_checkpoints(run)[-1])
    return json.dumps(state, default=lambda tensor: tensor.tolist())


def assert_same_run(one: RunFolder, two: RunFolder) -> None:
    """Rows and final state to the last bit; timings once per iteration."""
    for name in RECORDS:
        assert text(one, name) == text(two, name), name
    assert final_state(one) == final_state(two)
    iterations = range(one.config.optimisation.iterations)
    assert read_rows(two, "timings")["iteration"].tolist() == list(iterations)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted(folder, tmp_path, kind):
    config = tiny_config(folder, iterations=3, lr_schedule="linear", **KINDS[kind])
    whole = train(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", "on_update", 2)
    assert_same_run(whole, train(config, tmp_path / "cut", resume=True))


@pytest.mark.parametrize("moment", ["on_start", "on_rollout", "on_update", "on_iteration"])
def test_killed_before_the_first_checkpoint(folder, tmp_path, moment):
    """The first validation row is there once."""
    config = tiny_config(folder, iterations=1)
    whole = train(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", moment, 0)
    assert_same_run(whole, train(config, tmp_path / "cut", resume=True))


def test_a_parameter_without_gradient_changes_nothing(folder, tmp_path, monkeypatch):
    """As in the last block of Qwen-Image, whose text output is dropped."""
    original = load_policy

    def with_idle_parameter(*args, **options):
        policy = original(*args, **options)
        policy.transformer.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
        return policy

    monkeypatch.setattr("chunk_grpo_nb.training.state.load_policy", with_idle_parameter)
    config = tiny_config(folder, weight_decay=0.1)
    whole = train(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", "on_update", 1)
    assert_same_run(whole, train(config, tmp_path / "cut", resume=True))


def test_from_an_older_checkpoint_and_cut_again(folder, tmp_path):
    """The newer one, of the abandoned continuation, is not taken afterwards."""
    config = tiny_config(folder, iterations=3, keep_checkpoints=3)
    whole = train(config, tmp_path / "whole")
    run = train(config, tmp_path / "again")
    first = list_checkpoints(run)[0]
    with pytest.raises(Dies):
        train(config, run.path, resume=first, callbacks=[DieAt("on_rollout", 1)])
    assert list_checkpoints(run) == [first]
    assert_same_run(whole, train(config, run.path, resume=True))


def test_half_a_row_is_dropped(folder, tmp_path):
    config = tiny_config(folder)
    whole = train(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", "on_update", 1)
    with open(tmp_path / "cut/metrics.jsonl", "a") as file:
        file.write('{"iteration": 1, "half a li')
    assert_same_run(whole, train(config, tmp_path / "cut", resume=True))


def test_other_settings_are_refused(folder, tmp_path):
    config = tiny_config(folder)
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="learning_rate was 0.001, now 0.1"):
        train(tiny_config(folder, learning_rate=0.1), tmp_path / "run", resume=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        train(config, tmp_path, resume=True)


@pytest.mark.parametrize(
    "setting", [{"lr_schedule": "cosine"}, {"selection": "anneal", "fraction": 0.5}]
)
def test_more_iterations_under_a_schedule_are_refused(folder, tmp_path, setting):
    train(tiny_config(folder, **setting), tmp_path / "run")
    with pytest.raises(ValueError, match="iterations was 2, now 3"):
        train(tiny_config(folder, iterations=3, **setting), tmp_path / "run", resume=True)


def test_more_iterations_are_written_to_the_config(folder, tmp_path):
    train(tiny_config(folder), tmp_path / "run")
    longer = tiny_config(folder, iterations=3)
    run = train(longer, tmp_path / "run", resume=True)
    assert run.config == longer
    assert read_rows(run, "timings")["iteration"].tolist() == [0, 1, 2]


def test_other_prompts_in_the_same_file_are_refused(tmp_path):
    folder = make_folder(tmp_path)
    config = tiny_config(folder)
    train(config, tmp_path / "run")
    (folder / "prompts.txt").write_text("green square\nblue square\ntwo circle\n")
    with pytest.raises(ValueError, match="train_prompts had hash"):
        train(config, tmp_path / "run", resume=True)
    longer = make_config(base=config, iterations=3)
    run = train(longer, tmp_path / "run", resume=True, allow_changed_inputs=True)
    assert read_rows(run, "timings")["iteration"].tolist() == [0, 1, 2]
    assert set(run.manifest["resumed"][-1]["inputs"]) == {"train_prompts", "validation_prompts"}
    train(longer, tmp_path / "run", resume=True)


def test_other_base_weights_are_refused_or_allowed(tmp_path):
    folder = make_folder(tmp_path)
    config = tiny_config(folder)
    train(config, tmp_path / "run")
    pipe = tiny_pipeline("flux")
    next(pipe.transformer.parameters()).data.add_(0.01)
    pipe.save_pretrained(folder / "flux")
    with pytest.raises(ValueError, match="model had hash"):
        train(config, tmp_path / "run", resume=True)
    run = train(config, tmp_path / "run", resume=True, allow_changed_inputs=True)
    assert set(run.manifest["resumed"][-1]["inputs"]) == {"model"}


def test_changed_inputs_are_seen_before_the_model_is_loaded(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    config = tiny_config(folder)
    train(config, tmp_path / "run")
    (folder / "prompts.txt").write_text("green square\n")
    monkeypatch.setattr("chunk_grpo_nb.training.state.load_policy", None)
    with pytest.raises(ValueError, match="train_prompts had hash"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="is for a resume"):
        train(config, tmp_path / "new", allow_changed_inputs=True)
    assert not (tmp_path / "new").exists()


def test_two_processes_cannot_write_to_one_run(folder, tmp_path):
    config = tiny_config(folder)
    trainer = Trainer(config, tmp_path / "run")
    with pytest.raises(BlockingIOError, match="another process"):
        train(config, tmp_path / "run", resume=True)
    trainer.close()
    train(config, tmp_path / "run", resume=True)


def test_a_run_of_an_older_version_is_refused_and_stays(folder, tmp_path):
    """Its checkpoints have no index; starting over would throw them away."""
    config = tiny_config(folder)
    run = train(config, tmp_path / "run")
    (run.path / "checkpoints/index.json").unlink()
    before = {p: p.stat().st_size for p in run.path.rglob("*") if p.is_file()}
    for _ in range(2):  # the first refusal lets go of the folder
        with pytest.raises(ValueError, match="no index.json"):
            train(config, run.path, resume=True)
    assert before == {p: p.stat().st_size for p in run.path.rglob("*") if p.is_file()}


# -- signals ---------------------------------------------------------------------------------------
class Raise(Callback):
    """Sends this process a signal in the middle of an iteration."""

    def __init__(self, number: int, times: int = 1):
        self.number, self.times = number, times

    def on_rollout(self, trainer, rollout):
        if trainer.done == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_iteration_and_saves(folder, tmp_path, number):
    config = tiny_config(folder, iterations=3, checkpoint_every=0)
    whole = train(config, tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="saved up to 2 iterations.*resume") as caught:
        train(config, tmp_path / "run", callbacks=[Raise(number)])
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert_same_run(whole, train(config, tmp_path / "run", resume=True))


def test_a_second_signal_stops_at_once(folder, tmp_path):
    config = tiny_config(folder, iterations=3)
    with pytest.raises(Interrupted, match="saved up to 1 iterations"):
        train(config, tmp_path / "run", callbacks=[Raise(signal.SIGINT, times=2)])
    whole = train(config, tmp_path / "whole")
    assert_same_run(whole, train(config, tmp_path / "run", resume=True))
