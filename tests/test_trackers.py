"""Trackers through accelerate: settings, numbers and pictures arrive in a local backend."""

import importlib.util

import pytest
from tiny_runs import make_folder, tiny_config

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


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_write_to_this_machine(name, pipes, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = train(tiny_config(pipes, track=name, validate_every=1, iterations=1), tmp_path / "run")
    written = {"wandb": run.path / "wandb", "trackio": tmp_path / "trackio"}[name]
    files = [path for path in written.rglob("*") if path.is_file()]
    assert any(path.suffix == ".png" for path in files), "no picture arrived"
    if name == "wandb":
        assert list(written.glob("offline-run-*"))


def test_a_tracker_that_is_not_installed_is_refused(pipes, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "swanlab" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ImportError, match="track = 'swanlab' needs swanlab: pip install swanlab"):
        train(tiny_config(pipes, track="swanlab"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
