"""Explorer, viewer, run browser, live view: their callbacks driven without a browser."""

import subprocess
import sys
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.analysis.explorer import chunking_explorer, figure_png, plot_chunking
from chunk_grpo_nb.analysis.live import grid_of, plot_progress, read_progress, watch_run
from chunk_grpo_nb.analysis.run_browser import (
    find_runs,
    plot_pictures,
    plot_runs,
    run_browser,
    runs_table,
    shared_measures,
)
from chunk_grpo_nb.analysis.viewer import (
    plot_step,
    plot_trajectory,
    read_trajectory,
    trajectory_viewer,
)
from chunk_grpo_nb.models.policy import Sampler, load_policy
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.training.records import RunFolder, read_rows
from chunk_grpo_nb.training.trainer import train

CURVE = torch.tensor([0.8, 0.8, 0.5, 0.4, 0.4, 0.3, 0.3, 0.3])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two tiny runs that validate, and one beside them that watched other prompts."""
    folder = make_folder(tmp_path_factory.mktemp("runs"))
    out = folder / "all"
    train(tiny_config(folder, validate_every=1), out / "chunk" / "a")
    train(tiny_config(folder, validate_every=1, chunker="step", seed=1), out / "step")
    train(tiny_config(folder, validate_every=2, validation_images=1, iterations=2), out / "other")
    return out


@pytest.fixture(scope="module")
def recording():
    """A policy, and two images of it on their way."""
    policy = load_policy(tiny_pipeline("flux"), keep_reference=False)
    sampler = Sampler(6, "flow", 0.7, 3.0, height=16, width=16)
    return policy, policy.sample(["red circle", "blue square"], sampler, [1, 2], [3, 4])


def named(widget) -> dict:
    """Everything in a widget that has a description, by that description."""
    found = {}
    for child in getattr(widget, "children", ()):
        found |= named(child)
        if getattr(child, "description", ""):
            found[child.description] = child
    return found


def all_of(widget, kind: type) -> list:
    """Every widget of a kind inside a widget, in order."""
    inside = [w for child in getattr(widget, "children", ()) for w in all_of(child, kind)]
    return [widget] * isinstance(widget, kind) + inside


def test_explorer_follows_rule_and_slider_and_refuses_in_words():
    widget = chunking_explorer({"a": CURVE[None], "b": CURVE.flip(0)[None]})
    controls, (picture,) = named(widget), all_of(widget, ipywidgets.Image)
    (words,) = all_of(widget, ipywidgets.HTML)
    controls["rule"].value = "uniform"
    controls["pieces"].value = 2
    assert "fixed:4,4<" in words.value
    assert picture.value == figure_png(plot_chunking(CURVE[None], [4, 4], "a"))
    controls["curve"].value = "b"
    assert picture.value == figure_png(plot_chunking(CURVE.flip(0)[None], [4, 4], "b"))
    controls["rule"].value = "segment"
    controls["pieces"].value, controls["min. size"].value = 4, 4
    assert "fixed" not in words.value and "4" in words.value


def test_widgets_shrink_and_wrap_on_narrow_pages():
    widget = chunking_explorer({"a": CURVE[None]})
    assert widget.layout.flex_flow == "row wrap"
    assert all(image.layout.max_width == "100%" for image in all_of(widget, ipywidgets.Image))
    assert all(c.layout.max_width == "100%" for c in named(widget).values())


def test_guesses_come_from_state_and_velocity(recording):
    policy, taken = recording
    found = read_trajectory(policy, taken, 1)
    assert found.prompt == "blue square" and found.label == "SDE rollout"
    assert len(found.states) == len(found.guesses) == len(found.curve) == 5
    for t in (0, 3):
        guess = taken.latents[1, t] - taken.sigmas[t] * taken.velocities[1, t]
        (picture,) = policy.decode(guess[None], height=16, width=16)
        assert picture.tobytes() == found.guesses[t].tobytes()
    assert found.final.tobytes() == policy.decode(taken)[1].tobytes()
    moved = (taken.latents[1, 1] - taken.latents[1, 0]).abs().sum() / taken.latents[
        1, 0
    ].abs().sum()
    np.testing.assert_allclose(found.curve[0], float(moved), rtol=1e-5)


def test_viewer_refuses_what_is_not_there(recording):
    policy, taken = recording
    with pytest.raises(IndexError, match="image 2: the recording has 2"):
        read_trajectory(policy, taken, 2)
    found = read_trajectory(policy, taken)
    with pytest.raises(IndexError, match="step 5: trained steps are 0 to 4"):
        plot_step(found, [2, 3], 5)
    with pytest.raises(ValueError, match="sum to 4, the curve has 5"):
        plot_trajectory(found, [2, 2])
    bare = policy.sample(["red circle"], taken.sampler, [1], [2], keep_calls=False)
    if bare.velocities is None:
        with pytest.raises(ValueError, match="keep_calls=True"):
            read_trajectory(policy, bare)


def test_viewer_follows_step_and_image(recording):
    policy, taken = recording
    widget = trajectory_viewer(policy, taken, [2, 3])
    controls, (picture,) = named(widget), all_of(widget, ipywidgets.Image)
    first, second = (read_trajectory(policy, taken, row) for row in (0, 1))
    assert picture.value == figure_png(plot_step(first, [2, 3], 0))
    controls["step"].value = 3
    assert picture.value == figure_png(plot_step(first, [2, 3], 3))
    controls["image"].value = 1
    assert picture.value == figure_png(plot_step(second, [2, 3], 3))


def test_without_ipywidgets_the_figure_or_table_is_returned(recording, runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    strip = trajectory_viewer(*recording, [2, 3])
    assert strip.axes[0].get_title() == "red circle (SDE rollout)"
    assert list(run_browser(runs).index) == ["chunk/a", "other", "step"]
    assert len(chunking_explorer({"a": CURVE[None]}).axes) == 2


def test_the_table_says_how_far_runs_are(runs):
    table = runs_table(find_runs(runs))
    assert table.loc["chunk/a", "iterations"] == "2 of 2"
    held_out = read_rows(RunFolder.open(runs / "chunk/a"), "validation")["redness"]
    assert table.loc["chunk/a", "base"] == held_out.iloc[0]
    assert table.loc["chunk/a", "now"] == held_out.iloc[-1]
    assert table.loc["step", "seed"] == 1 and table.loc["step", "chunker"] == "step"


def test_no_folder_and_no_run_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        find_runs(tmp_path)


def test_curves_lie_over_the_base_line_and_pictures_below_each_other(runs):
    found = find_runs(runs)
    pair = {name: found[name] for name in ("chunk/a", "step")}
    assert shared_measures(pair)[0] == "redness"
    (axis,) = plot_runs(pair).axes
    lines = {line.get_label(): line for line in axis.lines}
    held_out = read_rows(pair["step"], "validation")
    assert list(lines["step (1 seed)"].get_ydata()) == list(held_out["redness"])
    bases = [read_rows(run, "validation")["redness"].iloc[0] for run in pair.values()]
    assert lines["before training"].get_ydata()[0] == pytest.approx(np.mean(bases))
    figure = plot_pictures(pair, shown=2)
    rows = [axis.get_ylabel().replace("\n", " ") for axis in figure.axes[::2]]
    assert rows == ["before training", "chunk/a, iteration 2", "step, iteration 2"]
    shown = np.asarray(figure.axes[2].images[0].get_array())
    assert (shown == np.asarray(grid_of(pair["chunk/a"], 2)[1][0])).all()


def test_runs_that_cannot_be_compared_are_refused(runs):
    found = find_runs(runs)
    pair = {name: found[name] for name in ("chunk/a", "other")}
    for draw in (plot_runs, plot_pictures):
        with pytest.raises(ValueError, match="other watched .* choose runs with the same"):
            draw(pair)
        with pytest.raises(ValueError, match="mark at least one"):
            draw({})
    with pytest.raises(ValueError, match="no shared held-out measure 'rednes'; did you mean"):
        plot_runs({"other": found["other"]}, "rednes")
    with pytest.raises(FileNotFoundError, match=r"of iteration 7; it has some of \[0, 1, 2\]"):
        grid_of(found["step"], 7)


def test_run_browser_follows_marks_and_writes_a_report(runs):
    widget = run_browser(runs)
    controls, (curves, pictures) = named(widget), all_of(widget, ipywidgets.Image)
    table, words, page = all_of(widget, ipywidgets.HTML)
    assert "chunk/a" in table.value and "other watched" in words.value and curves.value == b""
    controls["runs"].value = ("step",)
    found = find_runs(runs)
    assert curves.value == figure_png(plot_runs({"step": found["step"]}, "redness"))
    assert pictures.value == figure_png(plot_pictures({"step": found["step"]})) and not words.value
    before = curves.value
    controls["measure"].value = "colour_entropy"
    assert curves.value != before
    controls["report of the first"].click()
    assert "report.html" in page.value and "<iframe" in page.value
    assert (runs / "step" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    controls["runs"].value = ()
    controls["report of the first"].click()
    assert page.value == "" and "mark at least one" in words.value


def test_a_half_written_picture_is_passed_over(runs, tmp_path):
    run = RunFolder.open(runs / "step")
    whole = run.path / "samples/iteration_0002.png"
    half = run.path / "samples/iteration_0009.png"
    half.write_bytes(whole.read_bytes()[:200])
    try:
        number, pictures = grid_of(run)
    finally:
        half.unlink()
    assert number == 2 and len(pictures) == 2


WRITER = """
import json, shutil, sys, time
from pathlib import Path
source, target = Path(sys.argv[1]), Path(sys.argv[2])
rows = shutil.ignore_patterns("*.jsonl", "*.parquet")
shutil.copytree(source, target.with_name("half"), ignore=rows)
target.with_name("half").rename(target)
for name in ("validation", "metrics", "timings"):
    for line in (source / f"{name}.jsonl").read_text().splitlines(True):
        with open(target / f"{name}.jsonl", "a") as file:
            file.write(line[:9])
            file.flush()
            time.sleep(0.05)
            file.write(line[9:])
    while not target.with_name("seen").exists():
        time.sleep(0.01)
shutil.copy(source / "metrics.parquet", target)
"""


def test_a_run_of_another_process_is_watched_to_its_end(runs, tmp_path, monkeypatch):
    """The folder appears while it is watched, rows come in halves, and nothing is missed."""
    seen = []

    def show(figure, handle=None) -> str:
        seen.append(figure)
        (tmp_path / "seen").touch()  # only now does the writer go on
        return "handle"

    monkeypatch.setattr("chunk_grpo_nb.analysis.live.show_in_place", show)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, runs / "step", tmp_path / "run"])
    run = watch_run(tmp_path / "run", seconds=0.01, patience=300)
    assert writer.wait(60) == 0
    assert repr(run) == f"RunFolder('{tmp_path / 'run'}')" and len(seen) > 1
    left, right, *pictures = [axis for axis in seen[-1].axes]
    held_out = read_rows(RunFolder.open(runs / "step"), "validation")
    assert list(left.lines[1].get_ydata()) == list(held_out["redness"])
    assert len(right.lines[0].get_xdata()) == len(read_rows(run)) and len(pictures) == 4


def test_watching_ends_without_news_and_says_so(tmp_path, capsys):
    assert watch_run(tmp_path / "nothing", seconds=0.01, patience=0.05) is None
    assert "no news of" in capsys.readouterr().out


def test_a_run_that_never_validates_shows_its_rollouts(runs, tmp_path):
    folder = runs.parent
    run = train(tiny_config(folder, validate_every=0), tmp_path / "run")
    progress = read_progress(run)
    metrics = read_rows(run)
    means = metrics.groupby("iteration")["reward_redness"].mean()
    assert progress.curve == list(means.items()) and "new prompts each" in progress.label
    assert progress.pictures == {} and len(plot_progress(progress).axes) == 2


def test_tiles_come_out_of_a_grid_as_they_went_in():
    from chunk_grpo_nb.training.records import grid_tiles, image_grid

    images = [Image.new("RGB", (96, 96), (value, 10, 10)) for value in range(0, 250, 50)]
    tiles = grid_tiles(image_grid(images, columns=3))
    assert [tile.tobytes() for tile in tiles] == [image.tobytes() for image in images]
