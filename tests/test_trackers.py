"""Trackers through accelerate: settings, numbers and pictures arrive in a local backend."""

import importlib.util

import pytest
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.training.callbacks import tracker_options
from chunk_grpo_nb.training.records import read_rows
from chunk_grpo_nb.training.trainer import train


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pipes"))


def test_tensorboard_has_numbers_pictures_and_settings(pipes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tiny_config(pipes, track="tensorboard", validate_every=1), tmp_path / "run")
    place = next(run.path.rglob("events.out.tfevents*")).parent
    events = EventAccumulator(str(place), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    metrics, validation = read_rows(run), read_rows(run, "validation")
    found = [event.value for event in events.Scalars("reward_redness")]
    assert found == pytest.approx(metrics["reward_redness"].tolist())
    found = [event.value for event in events.Scalars("validation_redness")]
    assert found == pytest.approx(validation["redness"].tolist())
    pictures = events.Images("validation")
    assert len(pictures) == len(validation) == 3  # before training, and after two iterations
    grids = sorted((run.path / "samples").glob("*.png"))
    from PIL import Image

    assert (pictures[0].width, pictures[0].height) == Image.open(grids[0]).size
    settings = next(run.path.rglob("hparams.yml")).read_text()
    assert "clip_low: 0.1" in settings


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_other_trackers_write_to_this_machine(name, pipes, tmp_path, monkeypatch):
    for variable in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    run = train(tiny_config(pipes, track=name, validate_every=1, iterations=1), tmp_path / "run")
    places = {"wandb": "run/wandb", "trackio": "trackio", "swanlab": "run"}
    written = tmp_path / places[name]
    files = [path for path in written.rglob("*") if path.is_file()]
    files = [path for path in files if path.parent != run.path / "samples"]  # the run's own
    assert any(path.suffix == ".png" for path in files), "no picture arrived"
    if name == "wandb":
        assert list(written.glob("offline-run-*"))


def test_swanlab_without_its_dashboard_writes_files_only(monkeypatch, tmp_path):
    """Its mode "local" wants a package of its own; without it the mode is "offline"."""
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    for there, mode in ((None, "offline"), (object(), "local")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=there: found)
        options = tracker_options("swanlab", tmp_path)
        assert options == {"swanlab": {"logdir": str(tmp_path), "mode": mode}}


def test_a_tracker_that_is_not_installed_is_refused(pipes, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "swanlab" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ImportError, match="track = 'swanlab' needs swanlab: pip install swanlab"):
        train(tiny_config(pipes, track="swanlab"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
