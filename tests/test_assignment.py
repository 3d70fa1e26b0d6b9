"""Credit assignment: pure, alike on all processes, honest about samples that are left out."""

import pytest
import torch

from chunk_grpo_nb.training.assignment import (
    assign_credit,
    chunking_report,
    transition_stds,
    update_batches,
)
from chunk_grpo_nb.training.config import make_config

CURVES = torch.linspace(1, 0.1, 16).expand(6, 16)
SIGMAS = torch.linspace(1, 0, 18)[:17]
REWARDS = {"r": torch.tensor([0, 1, 2, 0, 4, 5.0])}


def config(**settings):
    """Two groups of three, chunks of the paper."""
    defaults = {
        "rewards": {"r": 1.0},
        "chunker": "fixed:2,3,4,7",
        "prompts_per_iteration": 2,
        "group_size": 3,
        "updates_per_iteration": 1,
    }
    return make_config(defaults | settings)


def assign(rewards=REWARDS, iteration=0, **settings):
    return assign_credit(config(**settings), rewards, CURVES, iteration, SIGMAS)


def test_it_is_a_function_of_its_arguments():
    a, b, other = assign(), assign(), assign(iteration=1)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.advantages, b.advantages)
    assert not torch.equal(a.mask, other.mask)


@pytest.mark.parametrize("ratio", ["step", "step:chunk"])
def test_step_ratios_train_the_steps_of_the_drawn_chunks(ratio):
    chunks, steps = assign(), assign(ratio=ratio)
    assert torch.equal(steps.trained, chunks.trained)
    assert torch.equal(steps.drawn_ids, chunks.drawn_ids)
    assert (steps.weights is None) == (ratio == "step")


def test_step_weights_of_the_drawn_chunks_have_mean_one():
    found = assign(ratio="step:chunk")
    means = (found.weights * found.mask).sum(1) / found.mask.sum(1)
    torch.testing.assert_close(means, torch.ones(6))


@pytest.mark.parametrize("ratio", ["step:std", "step:fixed:2,3,4,7"])
def test_other_step_weights_do_not_depend_on_the_draw(ratio):
    weights = assign(ratio=ratio).weights
    assert (weights == weights[0]).all()
    torch.testing.assert_close(weights.mean(1), torch.ones(6))


def test_a_failed_reward_takes_its_group_out():
    found = assign({"r": torch.tensor([0, float("nan"), 2, 0, 4, 5.0])})
    assert found.used.tolist() == [False] * 3 + [True] * 3
    assert torch.isfinite(found.advantages).all()
    assert (found.advantages[:3] == 0).all()


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="every group of this iteration has a failed reward"):
        assign({"r": torch.full((6,), float("nan"))})


def test_rewards_per_chunk_need_as_many_chunks():
    with pytest.raises(ValueError, match="chunk_rewards"):
        assign(chunk_rewards=[{"r": 1.0}, {"r": 1.0}])


@pytest.mark.parametrize("selection", ["weighted", "anneal", "only:0,3"])
def test_selection_keeps_to_the_fraction(selection):
    found = assign(selection=selection)
    expected = 1 if selection.startswith("only") else 2
    assert (found.mask.sum(1) == expected).all()
    if selection.startswith("only"):
        assert not found.mask[:, 1:3].any()


def test_a_batch_of_which_nothing_is_left_is_no_update():
    two = config(updates_per_iteration=2, inner_epochs=2)
    used = torch.tensor([False] * 3 + [True] * 3)
    batches = update_batches(two, 0, used)
    assert [sorted(batch) for batch in batches] == [[3, 4, 5], [3, 4, 5]]


def test_batches_hold_every_sample_once_per_epoch():
    two = config(updates_per_iteration=2, inner_epochs=2)
    batches = update_batches(two, 0, torch.ones(6, dtype=torch.bool))
    assert len(batches) == 4
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(6))


def test_the_rows_of_an_assignment_are_its_samples():
    found = assign(ratio="step:std").rows(torch.tensor([4, 1]))
    whole = assign(ratio="step:std")
    for name in ("advantages", "mask", "weights"):
        assert torch.equal(getattr(found, name), getattr(whole, name)[[4, 1]])


def test_transition_stds_fall_where_the_noise_falls():
    stds = transition_stds(SIGMAS, 0.7, "flow")
    assert stds.shape == (16,) and torch.isfinite(stds).all() and (stds > 0).all()


def test_mixed_groups_are_counted():
    ids = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]])
    report = chunking_report(ids, 2)
    assert report["mixed_groups"] == 0.5
    assert report["chunk_sizes"] == [2, 1] and report["chunk_sizes_share"] == 0.75
