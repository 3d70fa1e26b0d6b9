"""The release's loop gives our gradient; stages, FLOPs, growth and time to a gain by hand."""

import math
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny_runs import make_folder, tiny_config

import chunk_grpo_nb.training.trainer as loop
from chunk_grpo_nb.analysis.collect import load_records
from chunk_grpo_nb.analysis.release_loop import gradient_chunk_by_chunk, iterate_like_release
from chunk_grpo_nb.analysis.speed import (
    compare_checkouts,
    growth_exponent,
    median_times,
    time_to_gain,
)
from chunk_grpo_nb.training.assignment import make_trust_region, update_batches
from chunk_grpo_nb.training.config import save_config
from chunk_grpo_nb.training.gradient import accumulate_gradient
from chunk_grpo_nb.training.profiling import STAGES, Stages, count_flops, measure_iteration
from chunk_grpo_nb.training.state import Trainer
from chunk_grpo_nb.trust_regions import TrustRegion

RESULTS = Path(__file__).resolve().parent.parent / "data/results"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("speed"))
    settings = {"chunker": "fixed:2,3", "num_steps": 6, "inner_epochs": 2}
    trainer = Trainer(tiny_config(folder, **settings), folder / "run")
    yield trainer
    trainer.close()


def gradient_of(how, trainer, **options) -> tuple:
    """Gradient of one update of every image, moved weights, and what the function returned."""
    torch.manual_seed(1)
    rollout = loop.sample(trainer, 3)
    experience = loop.gather_experience(trainer, rollout)
    assignment = loop.assign(trainer, experience)
    parameters = trainer.policy.trainable_parameters()
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(1e-3 * torch.randn_like(p))  # ratios move away from 1
    region = make_trust_region(trainer.config, rollout.sigmas)
    batch = update_batches(trainer.config, 3, assignment.used)[0]
    trainer.optimizer.zero_grad()
    found = how(trainer.policy, rollout, assignment, batch, region, **options)
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
    trainer.optimizer.zero_grad()
    return gradient, found


def test_release_loop_has_our_gradient(trainer):
    ours, a = gradient_of(accumulate_gradient, trainer)
    theirs, b = gradient_of(gradient_chunk_by_chunk, trainer)
    assert ours.norm() > 0
    assert (ours - theirs).norm() < 1e-4 * ours.norm()
    assert a.change.log_ratios.abs().max() > 0
    torch.testing.assert_close(a.change.log_ratios, b.change.log_ratios, atol=1e-5, rtol=0)
    assert a.evaluations_trained == b.evaluations_trained


@pytest.mark.parametrize(
    ("region", "options"),
    [
        (TrustRegion(0.1, 0.1, normalised=True), {}),
        (TrustRegion(0.1, 0.1, max_divergence=1e-5), {}),
        (TrustRegion(0.1, 0.1), {"kl_weight": 0.1}),
    ],
)
def test_release_loop_refuses_what_it_lacks(region, options):
    with pytest.raises(ValueError, match="release"):
        gradient_chunk_by_chunk(None, None, SimpleNamespace(weights=None), [], region, **options)


def test_an_iteration_is_taken_apart(trainer):
    cost = measure_iteration(trainer, 1, flops=True)
    assert tuple(cost.stages) == STAGES
    assert all(seconds > 0 for seconds in cost.stages.values())
    assert cost.seconds == pytest.approx(sum(cost.stages.values()))
    images = trainer.config.data.prompts_per_iteration * trainer.config.data.group_size
    sampled = images * trainer.config.sampling.num_steps
    assert cost.evaluations > sampled
    assert not hasattr(trainer.policy.sample, "__wrapped__")  # nothing stays watched
    assert "log_prob" not in vars(trainer.policy)


def test_release_loop_samples_one_by_one(trainer):
    seen = []
    trainer.callbacks.append(
        SimpleNamespace(on_rollout=lambda _, r: seen.append(r), on_update=lambda *_: None)
    )
    before = trainer.config
    iterate_like_release(trainer, 1)
    trainer.callbacks.pop()
    assert all(len(recording) == 1 for recording in seen[0].recordings)
    assert trainer.config is before


def test_stages_of_threads_do_not_mix():
    times = {"main": iter([0.0, 10.0, 20.0]), "side": iter([5.0, 7.0])}
    stages = Stages(lambda: next(times[threading.current_thread().name]))
    threading.current_thread().name, kept = "main", threading.current_thread().name

    def beside():
        with stages.stage("scoring"):
            pass

    with stages.stage("sampling"):
        side = threading.Thread(target=beside, name="side")
        side.start()
        side.join()
    threading.current_thread().name = kept
    assert stages.seconds == {"sampling": 10.0, "scoring": 2.0}


def test_flops_of_a_layer_by_hand():
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7)
    assert count_flops(lambda: layer(x)) == 2 * 3 * 7 * 5
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 3 * 7 * 5


def records(curves: dict) -> pd.DataFrame:
    """Long rows as sweeps leave them, from (arm, seed) -> held-out values at 0, 5, 10."""
    rows = []
    for (arm, seed), values in curves.items():
        known = {"arm": arm, "seed": seed}
        for iteration, value in zip((0, 5, 10), values, strict=True):
            place = {"iteration": iteration, "evaluations": 100 * iteration}
            rows.append({**known, "part": "validation", "measure": "r", "value": value, **place})
        rows.append({**known, "part": "cost", "measure": "train_seconds", "value": 50.0})
    return pd.DataFrame(rows)


def test_time_to_gain_by_hand():
    rows = records({("a", 0): (1, 2, 3), ("a", 1): (5, 5, 7), ("a", 2): (0, 0, 0.5)})
    found = time_to_gain(rows, "r", 1.0).set_index("seed")
    assert found["seconds"].tolist() == [25.0, 37.5, math.inf]
    assert found["evaluations"].tolist() == [500.0, 750.0, math.inf]
    row = median_times(found.reset_index()).iloc[0]
    assert (row["runs"], row["reached"]) == (3, 2)
    assert row["seconds"] == 37.5
    assert row["seconds_low"] == 25.0
    assert row["seconds_high"] == math.inf
    with pytest.raises(ValueError, match="no validation of 'other'"):
        time_to_gain(rows, "other", 1.0)


def test_committed_headline_has_times_to_its_gain():
    rows = load_records(RESULTS / "headline").rows
    table = time_to_gain(rows, "shapes_pick", 0.2)
    trained = rows[rows["arm"] != "base"].groupby("arm")["seed"].nunique()
    assert table.groupby("arm").size().to_dict() == trained.to_dict()
    assert {"chunk", "step"} <= set(trained.index)
    assert (table["seconds"] > 0).all()


def test_growth_needs_two_sizes():
    with pytest.raises(ValueError, match="give two sizes"):
        growth_exponent([4, 4], [1.0, 2.0])


def test_versions_are_timed_in_turns(tmp_path):
    folder = make_folder(tmp_path)
    rewards = {"jpeg_compressibility": 1.0}
    save_config(tiny_config(folder, rewards=rewards), folder / "config.yaml")
    here = RESULTS.parent.parent
    versions = {"a": (here, {}), "b": (here, {"seed": 5})}
    table = compare_checkouts(versions, folder / "config.yaml", repeats=1)
    assert table["version"].tolist() == ["a", "b"] * 2
    assert (table["seconds"] > 0).all()
    assert table["weights"].nunique() == 4  # another seed, and weights that move


def test_the_readme_shows_the_committed_record(monkeypatch):
    monkeypatch.syspath_prepend(str(RESULTS.parent.parent / "ci"))
    from speed_page import gain_sentence, memory_sentence, shown, speed_table

    assert shown({"median": 0.5, "low": 0.4, "high": 0.61}, "{:.0%}") == "50% [40%, 61%]"
    arm = {"arm": "a", "reached": 2, "runs": 3, "evaluations": 10, "evaluations_low": 5}
    record = {"reward": "r", "gain": 0.5}
    known, never = arm | {"evaluations_high": 20}, arm | {"arm": "b", "evaluations_high": None}
    text = gain_sentence({"time_to_gain": record | {"arms": [known, never]}})
    assert "a 10 [5, 20] (2 of 3 runs); b 10 [5, never] (2 of 3 runs)" in text
    assert "over a single step: 1.07" in memory_sentence({"chunk_over_step_memory": 1.066})
    assert memory_sentence({}) == ""
    assert "| embedded, " in speed_table()
