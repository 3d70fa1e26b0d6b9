"""From results folders to verdicts: what is collected and refused, what the intervals mean."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from chunk_grpo_nb.analysis.collect import (
    COLUMNS,
    collect_sweeps,
    load_records,
    save_records,
)
from chunk_grpo_nb.analysis.statistics import (
    compare_over_prompts,
    paired_by_seed,
    seed_means,
    smallest_effect,
)
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.records import RunFolder, log_row, save_table


def make_trial(folder, arm, seed, gain, key=None, prompts=5, hashes="abc", status="done"):
    """A finished trial of the arm notebook, in miniature: two images of each prompt."""
    place = folder / "trials" / f"{arm}-seed={seed}"
    run = RunFolder.create(
        place / "run",
        make_config(iterations=2, updates_per_iteration=2, seed=seed),
        {"hashes": {"model": hashes}, "versions": {"torch": "2"}, "git_commit": "0123"},
    )
    (place / "parameters.yaml").write_text(yaml.safe_dump({"arm": arm, "seed": seed}))
    (place / "result.json").write_text(
        json.dumps({"status": status, "seconds": 30.0 + seed, "key": key or f"{arm}{seed}"})
    )
    for i in range(4):
        log_row(
            run,
            {
                "iteration": i // 2,
                "update": i % 2,
                "reward_r": 0.1 * i,
                "grad_norm": 1.0,
                "evaluations_sampled": 10 * (1 + i // 2),
                "evaluations_trained": 3 * (i + 1),
            },
        )
    for i in (0, 2):
        log_row(run, {"iteration": i, "r": 0.5 + gain * i}, "validation")
    before = pd.DataFrame(
        {
            "prompt_index": np.arange(2 * prompts) // 2,
            "image": np.arange(2 * prompts) % 2,
            "prompt": "p",
            "kind": ["a", "a", "b", "b", "b"] * (2 * prompts // 5),
            "r": 0.5,
        }
    )
    before["kind"] = np.where(before["prompt_index"] < 2, "a", "b")
    save_table(run, "before", before)
    save_table(
        run, "after", before.assign(r=0.5 + gain + 0.01 * seed + 0.001 * before["prompt_index"])
    )
    (run.path / "summary.json").write_text(
        json.dumps({"seconds": {"train": 20.0}, "shown_prompts": ["p"]})
    )
    for name in ("before", "after"):
        Image.new("RGB", (8, 8), "red" if name == "after" else "blue").save(
            run.path / f"{name}.png"
        )
    return place


def make_sweep(folder, arms=(("steps", 0.0), ("chunks", 0.2)), seeds=(0, 1, 2)):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"sweep": folder.name, "experiment": "02_arm"}))
    for arm, gain in arms:
        for seed in seeds:
            make_trial(folder, arm, seed, gain)
    return folder


def test_every_number_of_a_sweep_is_in_the_table(tmp_path):
    records = collect_sweeps([make_sweep(tmp_path / "one")])
    rows = records.rows
    assert (
        list(rows.columns) == list(COLUMNS)
        and records.manifest["trials"] == 6
        and set(records.pictures) == {"base", "steps", "chunks"}
    )
    one = rows[(rows.arm == "chunks") & (rows.seed == 1)]
    assert one[(one.part == "training") & (one.measure == "reward_r")][
        ["update", "evaluations", "value"]
    ].values.tolist() == pytest.approx(
        np.array([[1, 13, 0], [2, 16, 0.1], [3, 29, 0.2], [4, 32, 0.3]])
    )
    assert one[one.part == "validation"][
        ["iteration", "update", "evaluations", "value"]
    ].values.tolist() == pytest.approx(np.array([[0, 0, 0, 0.5], [2, 4, 32, 0.9]]))
    test = one[(one.part == "test") & (one.measure == "r")]
    assert test.kind.tolist() == ["a", "a", "b", "b", "b"] and test.value.tolist() == pytest.approx(
        [0.71 + 0.001 * i for i in range(5)]
    )
    assert set(one[one.part == "cost"].measure) == {
        "whole_seconds",
        "train_seconds",
        "evaluations_sampled",
        "evaluations_trained",
    }


def test_records_survive_the_disk_and_the_runs(tmp_path):
    sweeps = tmp_path / "sweeps"
    make_sweep(sweeps / "one")
    make_sweep(sweeps / "two", arms=[("other", 0.1)])
    records = load_records(sweeps)
    assert records.manifest["sweeps"] == ["one", "two"] and records.manifest["trials"] == 9
    kept = load_records(save_records(records, tmp_path / "kept"))
    pd.testing.assert_frame_equal(kept.rows, records.rows, check_dtype=False)
    assert kept.manifest == records.manifest and all(
        p.parent == tmp_path / "kept" / "pictures" for p in kept.pictures.values()
    )
    save_records(kept, tmp_path / "kept")  # onto itself
    assert set(load_records(tmp_path / "kept").pictures) == {"base", "steps", "chunks", "other"}
    own = tmp_path / "kept" / "pictures" / "holiday.png"
    own.write_bytes(b"mine")
    save_records(
        collect_sweeps([sweeps / "one"]), tmp_path / "kept"
    )  # no picture of an arm that is gone is read, and none is deleted
    assert (
        set(load_records(tmp_path / "kept").pictures) == {"base", "steps", "chunks"}
        and own.read_bytes() == b"mine"
    )
    assert records.manifest["git_commits"] == {
        "0123": {"arms": ["chunks", "other", "steps"], "dirty": False}
    }


def test_unfinished_and_failed_trials_are_left_out(tmp_path):
    folder = make_sweep(tmp_path / "one")
    (folder / "trials" / "steps-seed=0" / "result.json").unlink()
    failed = folder / "trials" / "steps-seed=1" / "result.json"
    failed.write_text(json.dumps({"status": "failed", "seconds": 1, "key": "x", "error": "no"}))
    assert sorted(seed_means(collect_sweeps([folder]).rows, "r").value_counts("arm").items()) == [
        ("chunks", 3),
        ("steps", 1),
    ]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: make_trial(f, "zeta", 0, 0, hashes="xyz"), "hashes of model is xyz, but abc"),
        (lambda f: make_trial(f, "zeta", 0, 0, prompts=10), "answered different questions"),
        (
            lambda f: (
                make_trial(f, "x", 7, 0),
                (f / "trials/x-seed=7").rename(f / "trials/y"),
                make_trial(f, "x", 7, 0, key="other"),
            ),
            "with different parameters; rename one",
        ),
    ],
)
def test_trials_that_cannot_be_compared_are_refused(tmp_path, spoil, message):
    folder = make_sweep(tmp_path / "one")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        collect_sweeps([folder])


def test_another_base_model_is_refused(tmp_path):
    folder = make_sweep(tmp_path / "one")
    table = folder / "trials" / "steps-seed=2" / "run" / "before.parquet"
    pd.read_parquet(table).assign(r=0.6).to_parquet(table, index=False)
    with pytest.raises(ValueError, match="before training scores differently by up to 0.1"):
        collect_sweeps([folder])


def test_folders_that_hold_nothing(tmp_path):
    folder = make_sweep(tmp_path / "deep" / "other")
    (folder / "trials" / "steps-seed=0" / "run" / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="trials of the experiment 02_arm"):
        collect_sweeps([folder])
    with pytest.raises(FileNotFoundError, match="neither records"):
        load_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a results folder"):
        collect_sweeps([tmp_path])
    with pytest.raises(ValueError, match="no finished trial"):
        collect_sweeps([make_sweep(tmp_path / "empty", arms=[])])


def test_a_trial_of_two_sweeps_is_kept_once_and_compared(tmp_path):
    first, second = (
        make_sweep(tmp_path / "one"),
        make_sweep(tmp_path / "two", arms=[("steps", 0.0)], seeds=[0]),
    )
    table = second / "trials" / "steps-seed=0" / "run" / "after.parquet"
    pd.read_parquet(table).assign(r=lambda t: t.r + 1e-3).to_parquet(table, index=False)
    records = collect_sweeps([first, second])
    assert records.manifest["repeated_trials"] == [
        {"arm": "steps", "seed": 0, "largest_difference": pytest.approx(1e-3)}
    ]
    assert len(seed_means(records.rows, "r")) == 6


def test_verdicts_over_prompts_and_over_seeds(tmp_path):
    rows = collect_sweeps([make_sweep(tmp_path / "one")]).rows
    assert compare_over_prompts(rows, "r", "chunks", "base").mean == pytest.approx(
        0.2 + 0.01 + 0.002
    )
    assert compare_over_prompts(rows, "r", "chunks", "steps").mean == pytest.approx(0.2)
    assert paired_by_seed(seed_means(rows, "r"), "r", "steps").verdict.item() == "rises"
    with pytest.raises(KeyError, match="there are arms"):
        compare_over_prompts(rows, "r", "chunk", "base")
    with pytest.raises(
        ValueError, match=r"no seed in common: 'steps' has \[0, 1, 2\], 'late' has \[9\]"
    ):
        compare_over_prompts(
            pd.concat(
                [rows, rows[(rows.arm == "chunks") & (rows.seed == 0)].assign(arm="late", seed=9)]
            ),
            "r",
            "steps",
            "late",
        )
    with pytest.raises(KeyError, match="no test rows of 'q'"):
        seed_means(rows, "q")


def test_pairing_by_seed():
    table = pd.DataFrame(
        {"arm": ["a", "b"] * 3, "seed": [0, 0, 1, 1, 2, 2], "r": [1.0, 2.0, 5.0, 6.1, 9.0, 9.9]}
    )
    row = paired_by_seed(table, "r", "a").iloc[0]
    assert (
        row.verdict == "rises"
        and row.difference == pytest.approx(1)
        and row.low == pytest.approx(1 - 0.2484, abs=1e-4)
    )
    assert paired_by_seed(table, "r", "b").iloc[0].verdict == "falls"
    assert paired_by_seed(table.iloc[:2], "r", "a").iloc[0].verdict == "not resolved"
    with pytest.raises(KeyError, match="no arm 'c'"):
        paired_by_seed(table, "r", "c")


def test_pooled_intervals_are_those_of_a_two_way_analysis():
    """Against least squares on the design with arm and seed effects."""
    y = np.random.default_rng(0).standard_normal((3, 4))
    table = pd.DataFrame(
        [{"arm": f"arm{a}", "seed": s, "y": y[s, a]} for s in range(3) for a in range(4)]
    )
    design = np.array(
        [[a == j for j in range(4)] + [s == k for k in (1, 2)] for s in range(3) for a in range(4)],
        dtype=float,
    )
    rest = np.linalg.lstsq(design, y.ravel(), rcond=None)[1].item() / (12 - 6)
    found = paired_by_seed(table, "y", "arm0", pooled=True)
    from scipy import stats

    half = stats.t.ppf(0.975, 6) * np.sqrt(2 * rest / 3)
    assert found.high.sub(found.difference).tolist() == pytest.approx([half] * 3)
    assert found.difference.tolist() == pytest.approx((y[:, 1:] - y[:, :1]).mean(0))
    wide = paired_by_seed(table, "y", "arm0", pooled=True, comparisons=3)
    assert wide.high.sub(wide.difference).iloc[0] == pytest.approx(
        half * stats.t.ppf(1 - 0.025 / 3, 6) / stats.t.ppf(0.975, 6)
    )
    more = pd.concat(
        [table, pd.DataFrame([{"arm": "arm0", "seed": 9, "y": 100.0}])]
    )  # a seed that only one arm has
    pd.testing.assert_frame_equal(paired_by_seed(more, "y", "arm0", pooled=True), found)


@pytest.mark.parametrize("pairs, degrees", [(5, None), (8, None), (3, 12)])
def test_smallest_effect_has_the_power_it_says(pairs, degrees):
    from scipy import stats

    df = degrees or pairs - 1
    shift = smallest_effect(2.0, pairs, degrees=degrees) / 2 * np.sqrt(pairs)
    limit = stats.t.ppf(0.975, df)
    assert stats.nct.sf(limit, df, shift) + stats.nct.cdf(-limit, df, shift) == pytest.approx(
        0.8, abs=2e-3
    )


def test_pooling_needs_a_seed_that_all_arms_have():
    table = pd.DataFrame(
        {"arm": ["a", "a", "b", "b", "c"], "seed": [0, 1, 0, 1, 9], "r": [1.0, 2.0, 1.5, 2.6, 3.0]}
    )
    with pytest.raises(ValueError, match=r"no seed that all arms have .*'c': \[9\]"):
        paired_by_seed(table, "r", "a", pooled=True)
    assert paired_by_seed(table, "r", "a").pairs.tolist() == [2, 0]
    one = paired_by_seed(table[table.seed == 0], "r", "a", pooled=True).iloc[0]
    assert one.verdict == "not resolved" and one.high == float("inf")
    with pytest.raises(ValueError, match="comparisons = 0"):
        paired_by_seed(table, "r", "a", comparisons=0)


def test_an_interval_that_ends_at_zero_up_to_rounding_is_not_resolved():
    from chunk_grpo_nb.analysis.statistics import Interval

    assert (
        Interval(-0.1, -0.2, -1e-17, 10).verdict == "not resolved"
        and Interval(-0.1, -0.2, -1e-3, 10).verdict == "falls"
    )


def test_smallest_effect_at_its_edges():
    assert smallest_effect(1.0, 2, level=1e-4) > smallest_effect(1.0, 2) > 10
    with pytest.raises(ValueError, match="power = 1.0"):
        smallest_effect(1.0, 3, power=1.0)
    assert smallest_effect(1.0, 1) == float("inf") and smallest_effect(0.0, 3) == 0
    with pytest.raises(ValueError, match="sd = -1"):
        smallest_effect(-1, 3)


@pytest.mark.slow
def test_from_a_grid_to_verdicts(tmp_path):
    """A small grid through the arm notebook, the runner and the comparison notebook."""
    from pathlib import Path

    from chunk_grpo_nb.analysis.notebooks import run_notebook
    from chunk_grpo_nb.analysis.runner import run_sweep
    from chunk_grpo_nb.analysis.sweep import load_sweep

    experiments = Path(__file__).resolve().parent.parent / "nbs" / "experiments"
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "experiments").symlink_to(experiments)
    (tmp_path / "small.yaml").write_text(
        "experiment: 02_arm\n"
        "fixed: {iterations: 2, prompts_per_iteration: 2, group_size: 4, num_steps: 9, "
        "micro_batch: 8, validation_images: 6, evaluation_prompts: 12, evaluation_images: 1, "
        "evaluation_steps: 6}\n"
        "arms:\n"
        "  step-flow: {chunker: step}\n"
        "  chunks-adaptive: {chunker: adaptive, selection: weighted}\n"
        "grid: {seed: [0, 1]}\n"
    )
    status = run_sweep(
        load_sweep(tmp_path / "small.yaml"),
        tmp_path / "sweeps" / "small",
        jobs=2,
        report=lambda text: None,
    )
    assert set(status.status) == {"done"}, status.error.tolist()
    run_notebook(
        experiments / "03_comparison.ipynb",
        tmp_path / "comparison.ipynb",
        {"records_dir": str(tmp_path / "sweeps"), "out_dir": str(tmp_path / "out")},
    )
    found = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    assert {v["arm"] for v in found["verdicts"]} == {"chunks-adaptive"} and len(found["gains"]) == 2
    assert {p.name for p in (tmp_path / "out" / "pictures").iterdir()} == {
        "base.png",
        "step-flow.png",
        "chunks-adaptive.png",
    }
