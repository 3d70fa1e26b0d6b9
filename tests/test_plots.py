"""Figures from records: that they show what they were given, and refuse what they cannot show."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chunk_grpo_nb.analysis.collect import metrics_table, ratio_table, smooth
from chunk_grpo_nb.analysis.curves import (
    plot_arms,
    plot_change,
    plot_intervals,
    plot_kinds,
    plot_learning,
    plot_training,
)
from chunk_grpo_nb.analysis.pages import run_figures
from chunk_grpo_nb.analysis.plots import (
    plot_dynamics,
    plot_images,
    plot_method,
    plot_ratios,
    plot_steps,
)
from chunk_grpo_nb.analysis.statistics import change_by_kind
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.records import RunFolder, log_row


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    assert not plt.get_fignums(), "a figure stayed open in pyplot"


def save(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 2000
    return figure


def test_dynamics_show_the_mean_and_the_boundaries(tmp_path):
    curves = np.linspace(1, 0.1, 16) + np.array([[-0.1], [0.1]])
    ax = save(plot_dynamics(curves, [2, 3, 4, 7]), tmp_path).axes[0]
    assert np.allclose(ax.lines[0].get_ydata(), curves.mean(0))
    assert [t.get_text() for t in ax.texts] == [f"chunk {k}" for k in range(4)]
    with pytest.raises(ValueError, match="sum to 9, the curve has 16"):
        plot_dynamics(curves, [2, 3, 4])


def test_training_curves_average_where_all_seeds_have_a_value(tmp_path):
    rows = [
        {"arm": "a", "seed": s, "step": t, "reward": s + t}
        for s in range(3)
        for t in range(4 if s else 6)
    ]
    ax = save(plot_training(pd.DataFrame(rows), "reward"), tmp_path).axes[0]
    thick = max(ax.lines, key=lambda line: line.get_linewidth())
    assert np.allclose(thick.get_xdata(), range(4)) and np.allclose(
        thick.get_ydata(), 1 + np.arange(4)
    )
    with pytest.raises(KeyError, match="no column 'rewrd'"):
        plot_training(pd.DataFrame(rows), "rewrd")


def test_training_curves_in_panels_beside_a_baseline(tmp_path):
    table = pd.DataFrame(
        [
            {"arm": a, "seed": s, "step": t, "reward": s + t + i}
            for i, a in enumerate("abcde")
            for s in range(2)
            for t in range(3)
        ]
    )
    figure = save(plot_training(table, "reward", baseline="b"), tmp_path)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title().split(",")[0] for ax in shown] == ["a", "c", "d", "e"]
    thick = [line.get_ydata()[0] for line in shown[1].lines if line.get_linewidth() > 2]
    assert thick == [1.5, 2.5]  # the baseline b, then c
    for wrong in ("z", "a"):
        with pytest.raises(KeyError, match="beside others"):
            plot_training(table[table.arm == "a"], "reward", baseline=wrong)


def test_changes_of_several_arms_by_kind(tmp_path):
    changes = pd.DataFrame(
        [
            {"arm": a, "kind": k, "change": c, "low": c - 0.1, "high": c + 0.1}
            for a, k, c in [
                ("x", "one", 0.3),
                ("x", "two", 0.05),
                ("y", "one", -0.2),
                ("y", "two", 0.0),
            ]
        ]
    )
    changes.loc[1, "low"] = 1e-17  # 0 up to rounding
    ax = save(plot_kinds(changes, "change"), tmp_path).axes[0]
    assert {t.get_text(): t.get_fontweight() for t in ax.texts} == {
        "+0.300": "bold",
        "+0.050": "normal",
        "-0.200": "bold",
        "+0.000": "normal",
    }


def test_smoothing_stays_inside_a_run():
    table = pd.DataFrame({"arm": "a", "seed": [0, 0, 1, 1], "r": [0.0, 2.0, 10.0, 20.0]})
    assert smooth(table, "r", 2).r.tolist() == [0, 1, 10, 15]


def test_arms_figure_with_one_and_three_seeds(tmp_path):
    table = pd.DataFrame(
        {"arm": ["a", "b"] * 3, "seed": [0, 0, 1, 1, 2, 2], "r": [1.0, 2.0, 5.0, 6.1, 9.0, 9.9]}
    )
    assert len(save(plot_arms(table, "r", "a"), tmp_path).axes) == 2
    save(plot_arms(table.iloc[:2], "r", "a"), tmp_path)


def evaluation(shift=0.0, prompts=12):
    return pd.DataFrame(
        [
            {
                "prompt_index": p,
                "image": g,
                "kind": "two" if p % 2 else "single",
                "r": p + g + shift * (p % 2),
            }
            for p in range(prompts)
            for g in range(2)
        ]
    )


def test_change_is_taken_over_prompts_and_by_kind(tmp_path):
    changes = change_by_kind(evaluation(), evaluation(0.5), "r").set_index("kind")
    assert changes.change.to_dict() == pytest.approx({"all": 0.25, "single": 0.0, "two": 0.5})
    assert changes.verdict.to_dict() == {"all": "rises", "single": "not resolved", "two": "rises"}
    assert changes.prompts.to_dict() == {"all": 12, "single": 6, "two": 6}
    save(plot_change(changes.reset_index()), tmp_path)
    with pytest.raises(ValueError, match="24 rows before, 20 after"):
        change_by_kind(evaluation(), evaluation(prompts=10), "r")
    with pytest.raises(KeyError, match="no column 'q'"):
        change_by_kind(evaluation(), evaluation(), "q")


def test_images_and_steps(tmp_path):
    row = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    assert len(save(plot_images({"before": row, "after": row}, ["one", "two"]), tmp_path).axes) == 4
    with pytest.raises(ValueError, match="same number of images"):
        plot_images({"before": row, "after": row[:1]})
    with pytest.raises(ValueError, match="1 titles for 2 columns"):
        plot_images({"before": row}, ["one"])
    save(plot_steps([[1.0, np.nan, 2.0]] * 3, "shift", chunk_sizes=[1, 2]), tmp_path)


def test_figures_of_a_run(tmp_path):
    run = RunFolder.create(tmp_path / "run", make_config(num_steps=5), {"hashes": {}})
    assert run_figures(run) == {}
    with pytest.raises(ValueError, match="has no metrics yet"):
        metrics_table({("a", 0): run})
    for i in range(3):
        for u in range(2):
            log_row(
                run,
                {
                    "iteration": i,
                    "update": u,
                    "reward_shapes_dense": 0.1 * i,
                    "grad_norm": 1.0,
                    "evaluations_sampled": 10,
                    "evaluations_trained": 5,
                    "log_prob_shift": [0.1, None, 0.3, 0.4],
                    "ratio_std": [0.1, 0.2],
                },
            )
        log_row(
            run,
            {
                "iteration": i,
                "mean": [0.9, 0.5, 0.3, 0.2],
                "std": [0.1] * 4,
                "chunk_sizes": [[2, 2]],
            },
            "dynamics",
        )
        log_row(run, {"iteration": i, "shapes_dense": 0.5}, "validation")
    table = metrics_table({("a", 0): run})
    assert table.step.tolist() == [1, 2, 3, 4, 5, 6] and set(table.evaluations) == {15}
    figures = run_figures(run)
    assert {
        "reward_shapes_dense",
        "grad_norm",
        "log_prob_shift",
        "dynamics",
        "validation_shapes_dense",
    } <= set(figures)
    for figure in figures.values():
        save(figure, tmp_path)
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])["iteration"] == 0


def boxes(figure):
    """Every visible text of a drawn figure with its box in pixels, slightly shrunk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = [ax for ax in figure.axes if not ax.get_visible()]
    beyond = {
        id(label)
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    found = []
    for text in figure.findobj(Text):
        shown = text.get_visible() and text.get_text().strip() and id(text) not in beyond
        shown = shown and text.axes not in hidden
        box = text.get_window_extent(renderer) if shown else None
        if box is not None and box.width > 1:
            found.append((text.get_text(), box.shrunk(0.9, 0.7)))
    return found


def check_looks(figure):
    """No text over another or outside the figure, no legend over the data."""
    texts, (width, height) = boxes(figure), figure.canvas.get_width_height()
    for words, box in texts:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{words!r} leaves the figure: {box}"
    for i, (words, box) in enumerate(texts):
        for others, other in texts[:i]:
            assert not box.overlaps(other), f"{words!r} lies over {others!r}"
    for ax in figure.axes:
        if ax.get_legend():
            legend = ax.get_legend().get_window_extent()
            assert not any(legend.overlaps(a.get_window_extent()) for a in figure.axes)


SEEDS = pd.DataFrame(
    [
        {"arm": a, "seed": s, "step": t, "reward": 0.5 + 0.01 * t * i + 0.01 * s}
        for i, a in enumerate(["step level", "chunks of 2, 3, 4, 7", "adaptive"])
        for s in range(12)
        for t in range(0, 41, 5)
    ]
)
RATIOS = pd.DataFrame(
    [
        {"arm": arm, "update": u, "index": i, "spread": u * 1e-4 * (i + 1)}
        | {"clip_low": 0.02 * i, "clip_high": 0.03 * i}
        for arm, units in {"step level": 16, "chunks": 4}.items()
        for u in range(4)
        for i in range(units)
    ]
)
PICTURE = Image.new("RGB", (32, 32), "red")
PROMPT = "two large orange triangles left of a small purple square"
FIGURES = {
    "dynamics": lambda: plot_dynamics(np.linspace(1, 0.1, 16) + np.zeros((9, 1)), [2, 3, 4, 7]),
    "many chunks": lambda: plot_dynamics(np.linspace(1, 0.1, 16), [1, 2] * 5 + [1]),
    "fifty steps": lambda: plot_dynamics(np.linspace(1, 0.1, 50), [5, 10, 15, 20]),
    "ratios": lambda: plot_ratios(RATIOS, {"step level": [1] * 16, "chunks": [2, 3, 4, 7]}),
    "training": lambda: plot_training(SEEDS, "reward", reference=0.5),
    "panels": lambda: plot_training(SEEDS, "reward", baseline="adaptive", reference=0.5),
    "learning": lambda: plot_learning(
        SEEDS.rename(columns={"step": "iteration", "reward": "value"}).assign(measure="m"),
        {"m": "preference model (trained)"},
    ),
    "arms": lambda: plot_arms(SEEDS[SEEDS.step == 40], "reward", "step level", reference=0.5),
    "intervals": lambda: plot_intervals(
        pd.DataFrame(
            {
                "measure": ["preference model", "verifier"] * 2,
                "unit": ["over 120 prompts"] * 2 + ["over 12 seeds"] * 2,
                "difference": 0.1,
                "low": [0.05, -0.1, -0.05, -np.inf],
                "high": [0.2, 0.3, 0.2, np.inf],
                "verdict": ["rises", "not resolved", "not resolved", "not resolved"],
            }
        )
    ),
    "change": lambda: plot_change(change_by_kind(evaluation(), evaluation(0.5), "r")),
    "steps": lambda: plot_steps(np.ones((24, 16)), "|Δ log-prob|", chunk_sizes=[2, 3, 4, 7]),
    "images": lambda: plot_images(
        {"before training": [PICTURE] * 6, "chunks": [PICTURE] * 6},
        [PROMPT] * 6,
        marks={"before training": [True] * 6, "chunks": [False] * 6},
    ),
    "method": lambda: plot_method([PICTURE] * 16, np.linspace(1, 0.1, 16), [2, 3, 4, 7], PROMPT),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_lies_over_something_else(name):
    check_looks(FIGURES[name]())


def test_ratios_come_from_the_metrics_of_each_update(tmp_path):
    row = {"arm": "chunks", "seed": 0, "iteration": 3, "update": 1}
    chunks = {
        "ratio_std": [1e-4, None],
        "clip_low_by_chunk": [0.1, 0],
        "clip_high_by_chunk": [0.2, 0],
    }
    table = ratio_table(pd.DataFrame([{**row, **chunks}]))
    assert table.to_dict("records") == [
        {**row, "place": "chunk", "index": 0, "spread": 1e-4, "clip_low": 0.1, "clip_high": 0.2}
    ]
    with pytest.raises(KeyError, match="no arm 'other'"):
        plot_ratios(table, {"other": [16]})
    with pytest.raises(KeyError, match="no column 'spread'"):
        plot_ratios(table.drop(columns="spread"), {"chunks": [16]})


def test_bands_of_few_seeds_are_students_t(tmp_path):
    from chunk_grpo_nb.analysis.statistics import t_interval

    table = SEEDS[(SEEDS.arm == "step level") & (SEEDS.seed < 3)]
    ax = plot_training(table, "reward").axes[0]
    top = max(path.vertices[:, 1].max() for path in ax.collections[0].get_paths())
    assert top == pytest.approx(t_interval(table[table.step == 0].reward).high)
