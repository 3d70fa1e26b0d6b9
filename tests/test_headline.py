"""The headline report: tables by hand, settings compared, pictures with texts, last lines."""

import base64
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from chunk_grpo_nb.analysis.headline import (
    change_table,
    clipping_words,
    different_settings,
    gold_words,
    result_lines,
    seed_table,
    standard_units,
)
from chunk_grpo_nb.training.config import make_config, save_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ci"))
from web_page import web_page  # noqa: E402


def evaluated(values: list[float]) -> pd.DataFrame:
    """A table of `evaluate` with one image per prompt."""
    index = range(len(values))
    return pd.DataFrame({"prompt_index": index, "image": 0, "prompt": "p", "score": values})


@pytest.fixture(scope="module")
def changes() -> pd.DataFrame:
    tables = {
        "base": evaluated([0.0, 1.0, 2.0]),
        "step": evaluated([1.0, 2.0, 3.0]),
        "chunk": evaluated([3.0, 4.0, 5.0]),
    }
    return change_table(tables, ["score"])


def test_differences_are_paired_by_prompt(changes):
    assert changes["pair"].tolist() == ["step − base", "chunk − base", "chunk − step"]
    assert changes["mean"].tolist() == [1.0, 3.0, 2.0]
    assert changes["low"].tolist() == changes["high"].tolist() == [1.0, 3.0, 2.0]
    assert changes["scale"].tolist() == [1.0, 1.0, 1.0]  # standard deviation of 0, 1, 2


def test_units_are_standard_deviations_of_the_base_images(changes):
    twice = changes.assign(scale=2.0)
    units = standard_units(twice, changes)
    assert units["unit"].tolist() == ["step − base", "chunk − base", "chunk − step"]
    assert units["difference"].tolist() == [0.5, 1.5, 1.0]


def test_differences_over_seeds_by_hand():
    rows = [(s, "base", 0.0) for s in (10, 11)]
    rows += [(10, "step", 1.0), (11, "step", 3.0), (10, "chunk", 2.0), (11, "chunk", 4.0)]
    runs = pd.DataFrame(rows, columns=["seed", "arm", "value"]).assign(measure="score")
    table = seed_table(runs, ["score"]).set_index("pair")
    assert table["mean"].tolist() == [2.0, 3.0, 1.0]
    step = table.loc["step − base"]  # Student's t with one degree of freedom: 12.706
    assert step["high"] - step["mean"] == pytest.approx(12.706 * 2**0.5 / 2**0.5, rel=1e-3)
    assert table.loc["chunk − step", "low"] == pytest.approx(1.0)
    assert table["seeds"].tolist() == [2, 2, 2]


def test_a_rise_with_a_fall_beside_it_is_said():
    rows = [("proxy", 1.0, "rises"), ("gold", -1.0, "falls")]
    table = pd.DataFrame(rows, columns=["measure", "mean", "verdict"])
    table = table.assign(pair="step − base", low=table["mean"], high=table["mean"])
    assert "they part: proxy rises, gold falls" in gold_words(table, "proxy", ["step"])[-1]


def test_settings_of_the_method_are_compared_and_cadence_is_not(tmp_path):
    file = tmp_path / "step.yaml"
    save_config(make_config({"learning_rate": 1e-3, "seed": 3, "validate_every": 5}), file)
    assert different_settings(make_config({"learning_rate": 1e-3}), file) == []
    other = make_config({"learning_rate": 1e-3, "clip_low": 1e-5, "rewards": {"shapes_clip": 1.0}})
    assert different_settings(other, file) == ["clip_low", "rewards"]
    assert different_settings(other, tmp_path / "chunk.yaml") == ["no chunk.yaml"]


def test_the_last_lines_name_both_intervals(changes):
    here = changes.iloc[0].to_dict()
    seeds = {"mean": 2.0, "low": 1.5, "high": 2.5, "seeds": 12.0}
    found = {"step − base": {"this_pair": here, "over_seeds": seeds}}
    record = {"reward": "score", "gold": "gold", "changes": {"score": found, "gold": found}}
    lines = result_lines(record)
    assert lines[0] == "score (trained)"
    assert "this pair of runs +1.000 [+1.000, +1.000]: rises" in lines[1]
    assert "over 12 seeds +2.000 [+1.500, +2.500]" in lines[1]


def test_a_web_page_carries_the_texts_of_its_pictures(tmp_path):
    picture = base64.b64encode(b"no real picture").decode()
    metadata = {"image/png": {"alt": 'a curve, "rising"'}}
    outputs = [
        nbformat.v4.new_output("display_data", {"image/png": picture}, metadata=metadata),
        nbformat.v4.new_output("display_data", {"image/png": picture}),
    ]
    cell = nbformat.v4.new_code_cell("show()", outputs=outputs)
    file = tmp_path / "report.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
    page = web_page(file)
    assert 'alt="a curve, &quot;rising&quot;"' in page
    assert 'alt="a figure"' in page


@pytest.mark.parametrize(
    "first, words",
    [(1e-5, "spreads 30 times as far as the first"), (0.0, "and the first does not")],
)
def test_ratios_in_words_where_the_first_has_not_moved(first, words):
    moved = {"arm": "chunk", "update": 1, "place": "chunk", "clip_low": 0.1, "clip_high": 0.3}
    table = pd.DataFrame(
        [moved | {"index": 0, "spread": first}, moved | {"index": 1, "spread": 3e-4}]
    )
    (sentence,) = clipping_words(table)
    assert words in sentence and "clipped low 10%, high 30%" in sentence
