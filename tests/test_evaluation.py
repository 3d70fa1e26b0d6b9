"""Evaluations: the same images whatever the batch, warning signs, broken weights."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stub_policy import StubPolicy

from chunk_grpo_nb.prompts import Prompt
from chunk_grpo_nb.training.evaluation import (
    colour_entropy,
    edge_density,
    evaluate,
    group_diversity,
)
from chunk_grpo_nb.training.rollout import scorer

PROMPTS = [Prompt("red", {"kind": "single"}), Prompt("green", {}), Prompt("blue", {})]


def length(images, prompts, metadata):
    return [float(len(prompt)) for prompt in prompts]


def table(policy=None, **options):
    score = scorer({"length": length})
    return evaluate(policy or StubPolicy(), PROMPTS, score, None, **options)


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_batches_change_nothing(batch):
    policy = StubPolicy()
    pd.testing.assert_frame_equal(table(policy, batch=batch), table())
    assert max(map(len, policy.batches)) == batch


def test_a_row_per_image_with_scores_and_warning_signs():
    rows = table(images_per_prompt=2)
    assert rows["prompt_index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows["image"].tolist() == [0, 1] * 3
    assert rows["kind"].tolist() == ["single", "single", "", "", "", ""]
    assert rows["length"].tolist() == [3, 3, 5, 5, 4, 4]
    assert rows.groupby("prompt_index")["diversity"].nunique().eq(1).all()
    assert (rows["diversity"] > 0).all()


def test_seeds_belong_to_the_evaluation_not_to_the_number_of_images():
    few, many = table(images_per_prompt=1), table(images_per_prompt=3)
    first = many[many["image"] == 0].reset_index(drop=True)
    assert few["edge_density"].equals(first["edge_density"])
    assert few["diversity"].isna().all()
    assert not table(seed=1)["edge_density"].equals(table()["edge_density"])


def test_every_image_is_handed_on_once():
    kept = {}
    table(batch=5, keep=lambda images, start: kept.update(enumerate(images, start)))
    assert sorted(kept) == list(range(12))


@pytest.mark.parametrize("options", [{"images_per_prompt": -1}, {"batch": 0}])
def test_counts_below_one_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} = .*at least 1"):
        table(**options)
    with pytest.raises(ValueError, match="no prompts"):
        evaluate(StubPolicy(), [], scorer({"length": length}), None)


def test_warning_signs_of_known_pictures():
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (8, 4)))
    flat = Image.new("RGB", (8, 8), "gray")
    assert edge_density(stripes) == 0.5 and edge_density(flat) == 0
    assert colour_entropy(stripes) == 1 and colour_entropy(flat) == 0
    black, white = (Image.new("RGB", (8, 8), c) for c in ("black", "white"))
    assert group_diversity([black, white]) == 1 and group_diversity([black, black]) == 0


@pytest.mark.parametrize("batch", [1, 3, 4, 12])
def test_rewards_of_whole_groups_see_whole_prompts(batch):
    def rank(images, prompts, metadata):
        assert len(images) == 4 and len(set(prompts)) == 1
        return range(len(images))

    rank.whole_group = True
    table = evaluate(StubPolicy(), PROMPTS, scorer({"rank": rank}), None, batch=batch)
    assert table["rank"].tolist() == table["image"].tolist()
