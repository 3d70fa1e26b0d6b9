"""The 2-D toy of the tutorial.

GRPO at every level learns it, and mistakes made on purpose do not pass the checks.
"""

import pytest
import torch
from toy import load_toy

from chunk_grpo_nb.advantages import group_advantages
from chunk_grpo_nb.chunking import adaptive_chunks, chunk_mask, make_chunker, select_chunks
from chunk_grpo_nb.dynamics import relative_distance
from chunk_grpo_nb.objective import chunk_ratio, clipped_objective, step_coefficients

toy = load_toy()


@pytest.fixture(scope="module")
def rolled():
    """Rolled out by one policy, updated for another; adaptive chunks, half of them selected."""
    generator, prompts = torch.Generator().manual_seed(0), torch.arange(4).repeat_interleave(8)
    old_policy, policy = toy.make_policy(0), toy.make_policy(1)
    torch.nn.init.normal_(policy[-1].weight, std=0.3)  # far enough that some chunks are clipped
    states, base = toy.rollout(old_policy, prompts, generator)
    old = toy.log_probs(old_policy, states, base, prompts).detach()
    chunk_ids = adaptive_chunks(relative_distance(states[:, :-1]))
    selected = select_chunks(None, chunk_ids, 0.5, generator)
    advantages = group_advantages(toy.reward(states[:, -1], prompts), prompts)
    return policy, (states, base, prompts, old), chunk_ids, advantages, selected


# What a mistake looks like: the loss of the tutorial with one thing wrong.


def wrong_sign(policy, rolled, chunk_ids, advantages, selected, weights=None):
    return toy.update_loss(policy, rolled, chunk_ids, -advantages, selected, weights)


def dropped_selection(policy, rolled, chunk_ids, advantages, selected, weights=None):
    return toy.update_loss(policy, rolled, chunk_ids, advantages, chunk_mask(chunk_ids), weights)


def dropped_padding_mask(policy, rolled, chunk_ids, advantages, selected, weights=None):
    return toy.update_loss(
        policy, rolled, chunk_ids, advantages, torch.ones_like(selected), weights
    )


def sum_over_chunks(policy, rolled, chunk_ids, advantages, selected, weights=None):
    return toy.update_loss(
        policy,
        rolled,
        chunk_ids,
        advantages,
        selected,
        selected.sum(1, keepdim=True).float().expand(selected.shape),
    )


def mean_over_all_chunks(policy, rolled, chunk_ids, advantages, selected, weights=None):
    share = selected.sum(1, keepdim=True) / chunk_mask(chunk_ids).sum(1, keepdim=True)
    return toy.update_loss(
        policy, rolled, chunk_ids, advantages, selected, share.expand(selected.shape)
    )


def sum_inside_the_chunk(policy, rolled, chunk_ids, advantages, selected, weights=None):
    states, base, prompts, old = rolled
    lengths = chunk_mask(chunk_ids) * (chunk_ids[..., None] == torch.arange(selected.shape[1])).sum(
        1
    )
    ratio = chunk_ratio(toy.log_probs(policy, states, base, prompts), old, chunk_ids) ** lengths
    return clipped_objective(ratio, advantages, 0.1, mask=selected)


def never_clipped(policy, rolled, chunk_ids, advantages, selected, weights=None):
    states, base, prompts, old = rolled
    ratio = chunk_ratio(toy.log_probs(policy, states, base, prompts), old, chunk_ids)
    return clipped_objective(ratio, advantages, (1.0, 1e9), mask=selected)


MISTAKES = [
    wrong_sign,
    dropped_selection,
    dropped_padding_mask,
    sum_over_chunks,
    mean_over_all_chunks,
    sum_inside_the_chunk,
    never_clipped,
]


# The checks


def reference_loss(policy, rolled, chunk_ids, advantages, selected):
    """The objective of the paper, sample by sample and chunk by chunk, without the library."""
    states, base, prompts, old = rolled
    difference, total = toy.log_probs(policy, states, base, prompts) - old, 0.0
    for i in range(len(states)):
        terms = []
        for j in range(int(chunk_ids[i].max()) + 1):
            if selected[i, j]:
                ratio = torch.exp(
                    torch.stack(
                        [difference[i, t] for t in range(16) if chunk_ids[i, t] == j]
                    ).mean()
                )
                terms.append(min(ratio * advantages[i], min(max(ratio, 0.9), 1.1) * advantages[i]))
        total = total - sum(terms) / len(terms) / len(states)
    return total


def check_gradient(loss, case):
    """The gradient of the loss is that of the paper's objective."""
    policy = case[0]
    found, expected = (
        torch.autograd.grad(f(*case), list(policy.parameters())) for f in (loss, reference_loss)
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def check_learns(chunker, seed, loss=toy.update_loss, **options):
    """Training reaches 90 % of the possible gain."""
    policy, rewards = toy.train(chunker, seed, iterations=36, group_size=24, loss=loss, **options)
    start, end = rewards[0], sum(rewards[-4:]) / 4
    assert (end - start) / (1 - start) >= 0.9, f"{chunker}: from {start:.2f} to {end:.2f}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("chunker", ["step", "fixed:2,3,4,7", "adaptive", "sequence"])
def test_every_level_reaches_ninety_percent_of_the_gain(chunker, seed):
    check_learns(chunker, seed)


def test_the_weighted_step_control_learns_too():
    check_learns("step", 0, implied_by="fixed:2,3,4,7")


def test_the_gradient_is_that_of_the_papers_objective(rolled):
    check_gradient(toy.update_loss, rolled)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_fail_the_gradient_check(mistake, rolled):
    with pytest.raises(AssertionError, match="not close"):
        check_gradient(mistake, rolled)


def test_a_wrong_sign_fails_the_learning_check():
    with pytest.raises(AssertionError, match="adaptive: from"):
        check_learns("adaptive", 0, loss=wrong_sign)


def test_mistakes_that_training_forgives_need_the_gradient_check():
    check_learns(
        "adaptive", 0, loss=dropped_padding_mask
    )  # Adam does not mind: why a rising reward proves so little


def test_ratios_are_one_before_the_first_update():
    prompts, policy = torch.arange(4), toy.make_policy(0)
    states, base = toy.rollout(policy, prompts, torch.Generator().manual_seed(0))
    log_probs = toy.log_probs(policy, states, base, prompts)
    assert (
        chunk_ratio(log_probs, log_probs.detach(), make_chunker("fixed:2,3,4,7")(log_probs)) == 1
    ).all()


def test_streamed_training_gradient(rolled):
    policy, (states, base, prompts, old), chunk_ids, advantages, selected = rolled
    whole = torch.autograd.grad(toy.update_loss(*rolled), list(policy.parameters()))
    log_probs = toy.log_probs(policy, states, base, prompts)
    coefficients = step_coefficients(log_probs, old, chunk_ids, advantages, 0.1, selected)
    streamed = torch.autograd.grad((coefficients * log_probs).sum(), list(policy.parameters()))
    for a, b in zip(streamed, whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_value_maps_predict_the_reward():
    generator, prompts = torch.Generator().manual_seed(0), torch.zeros(2000, dtype=torch.long)
    policy = toy.make_policy(0)
    states, _ = toy.rollout(policy, prompts, generator)
    maps = toy.value_maps(policy, prompt=0)
    for step in (0, 6, 12):
        expected = toy.lookup(maps[step], states[:, step, None] / 6)[:, 0]
        error = (toy.reward(states[:, -1], prompts) - expected).double()
        assert (
            abs(error.mean()) < 3 * error.std() / 2000**0.5 + 0.005
        )  # unbiased, up to noise and grid
