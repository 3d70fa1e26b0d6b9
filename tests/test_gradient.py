"""The streamed gradient equals the whole one, whatever the chunks, the passes and the KL."""

from dataclasses import replace

import pytest
import torch
from tiny import disturb
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.chunking import chunk_ids_from_sizes, chunk_mask
from chunk_grpo_nb.models.policy import load_policy
from chunk_grpo_nb.models.sampler import Sampler
from chunk_grpo_nb.objective import chunk_mean, chunk_ratio, clipped_objective, kl_to_reference
from chunk_grpo_nb.prompts import Prompt
from chunk_grpo_nb.rewards.registry import make_reward
from chunk_grpo_nb.training import gradient as gradient_module
from chunk_grpo_nb.training.assignment import Assignment, assign_credit, transition_stds
from chunk_grpo_nb.training.gradient import Differentiator, accumulate_gradient, plan_passes
from chunk_grpo_nb.training.rollout import draw_rollout, scorer
from chunk_grpo_nb.trust_regions import TrustRegion

PLAIN = TrustRegion(0.2, 0.2)
NOTHING = TrustRegion(0.0, 0.0)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A policy that has moved since its rollout of two groups, and the assignment."""
    folder = make_folder(tmp_path_factory.mktemp("gradient"))
    config = tiny_config(folder)
    policy = load_policy(str(folder / "flux"), keep_reference=True)
    with torch.no_grad():
        rollout = draw_rollout(
            policy,
            [Prompt("red circle"), Prompt("blue square")],
            Sampler(6, height=16, width=16),
            scorer({"redness": make_reward("redness")}),
            iteration=0,
            seed=0,
            group_size=4,
        )
    sigmas = rollout.recordings[0].sigmas[:-1]
    assignment = assign_credit(config, rollout.rewards, rollout.curves, 0, sigmas)
    disturb(policy, 3e-2, seed=1)
    return policy, rollout, assignment


def gradient(policy, rollout, assignment, samples=range(8), region=PLAIN, **options):
    """The gradient as one vector, and what else is known."""
    policy.transformer.zero_grad()
    found = accumulate_gradient(policy, rollout, assignment, samples, region, **options)
    parts = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
    return torch.cat(parts) if parts else None, found


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_streamed_equals_whole(state, kl_weight):
    whole, _ = gradient(*state, kl_weight=kl_weight)
    for micro_batch in (1, 3, 7):
        streamed, found = gradient(*state, kl_weight=kl_weight, micro_batch=micro_batch)
        assert_same(whole, streamed)
        assert found.evaluations_trained == 40
        assert found.evaluations_ratio == (40 if micro_batch < 5 else 0)


REGIONS = {
    "length": TrustRegion(0.01, 0.01, spread=torch.ones(5)),
    "spread": TrustRegion(0.01, 0.01, spread=torch.linspace(0.5, 1.5, 5)),
    "guard": TrustRegion(0.01, 0.01, normalised=True),
    "dppo": TrustRegion(0.2, 0.2, max_divergence=1e-3),
}


@pytest.mark.parametrize("name", REGIONS)
def test_streamed_equals_whole_in_every_trust_region(state, name):
    whole, found = gradient(*state, region=REGIONS[name])
    assert not found.is_zero
    assert (whole - gradient(*state)[0]).norm() > 1e-3 * whole.norm()  # the region matters
    for micro_batch in (1, 7):
        assert_same(whole, gradient(*state, region=REGIONS[name], micro_batch=micro_batch)[0])


def as_written(state, region):
    """The gradient of the objective by autograd, all transitions at once."""
    policy, rollout, assignment = state
    rows, steps = torch.cartesian_prod(torch.arange(8), torch.arange(5)).unbind(1)
    where = rollout.recordings[0], rows, steps
    log_prob, mean, std = policy.log_prob(*where)
    divergence = kl_to_reference(mean, policy.sampled(*where).mean, std).reshape(8, 5)
    log_ratio = log_prob.reshape(8, 5) - rollout.log_probs
    weights = None
    ids, advantages = assignment.chunk_ids, assignment.advantages
    if region.normalised:
        log_ratio = (log_ratio + divergence) * std.reshape(8, 5)
    ratio = chunk_ratio(log_ratio, torch.zeros(8, 5), ids)
    if region.max_divergence:
        far = chunk_mean(divergence, ids) > region.max_divergence
        weights = (~(far & ((ratio - 1) * advantages > 0))).float()
        assert 0 < weights.mean() < 1
    policy.transformer.zero_grad()
    bounds = region.clip_range(ids)
    clipped_objective(ratio, advantages, bounds, weights=weights).backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])


@pytest.mark.parametrize("name", ["guard", "dppo"])
def test_regions_with_divergence_are_as_the_papers_write_them(state, name):
    assert_same(as_written(state, REGIONS[name]), gradient(*state, region=REGIONS[name])[0])


def test_on_policy_the_normalised_ratio_scales_each_step_by_its_std(state):
    policy, rollout, assignment = state
    std = transition_stds(rollout.recordings[0].sigmas[:-1], 0.7, "flow")
    steps = Assignment(
        assignment.advantages[:, :1].expand(8, 5),
        torch.arange(5).expand(8, 5),
        torch.ones(8, 5, dtype=torch.bool),
        None,
        assignment.drawn_ids,
    )
    scaled = replace(steps, weights=std.expand(8, 5))
    with policy.reference():  # the weights that sampled
        guard, _ = gradient(policy, rollout, steps, region=REGIONS["guard"], on_policy=True)
        plain, _ = gradient(policy, rollout, scaled, on_policy=True)
    assert_same(plain, guard)


def test_trajectories_that_are_chunked_differently(state):
    policy, rollout, assignment = state
    sizes = [[2, 3], [1, 1, 3], [5], [2, 2, 1], [1, 1, 1, 1, 1], [2, 3], [3, 2], [1, 4]]
    ids = chunk_ids_from_sizes(sizes)
    advantages = assignment.advantages[:, :1].expand(8, 5)
    mixed = Assignment(advantages, ids, chunk_mask(ids), None, ids)
    whole, _ = gradient(policy, rollout, mixed)
    for micro_batch in (1, 4, 7):
        assert_same(whole, gradient(policy, rollout, mixed, micro_batch=micro_batch)[0])


def test_a_wrong_coefficient_would_show(state, monkeypatch):
    whole, _ = gradient(*state)
    right = gradient_module.step_coefficients

    def without_ratio(new, old, *rest):
        return right(old, old, *rest)

    monkeypatch.setattr(gradient_module, "step_coefficients", without_ratio)
    assert (whole - gradient(*state)[0]).norm() > 1e-3 * whole.norm()


def test_nothing_to_step_along_is_said(state):
    policy, rollout, assignment = state
    zero = Assignment(
        torch.zeros_like(assignment.advantages),
        assignment.chunk_ids,
        assignment.mask,
        None,
        assignment.drawn_ids,
    )
    assert gradient(policy, rollout, zero)[1].is_zero
    assert not gradient(policy, rollout, zero, kl_weight=0.1)[1].is_zero
    assert not gradient(*state)[1].is_zero


def test_every_ratio_clipped_is_nothing_to_step_along(state):
    policy, rollout, assignment = state
    policy.transformer.zero_grad()
    found = accumulate_gradient(policy, rollout, assignment, range(8), NOTHING, micro_batch=1)
    outward = found.change.log_ratios.mean(1) * assignment.advantages[:, 0] > 0
    clipped = [i for i in range(8) if outward[i]]
    assert clipped
    one_chunk = Assignment(
        assignment.advantages[:, :1],
        torch.zeros(8, 5, dtype=torch.long),
        torch.ones(8, 1, dtype=torch.bool),
        None,
        torch.zeros(8, 5, dtype=torch.long),
    )
    found = accumulate_gradient(policy, rollout, one_chunk, clipped, NOTHING)
    assert found.is_zero


def test_passes_are_as_large_as_allowed_and_never_split_a_whole_sample(state):
    _, rollout, assignment = state
    split = plan_passes(rollout, assignment.trained, range(8), micro_batch=7)
    assert [len(p) for p in split] == [7, 7, 7, 7, 7, 5]
    whole = plan_passes(rollout, assignment.trained, range(8), micro_batch=7, whole=True)
    assert [len(p) for p in whole] == [5] * 8
    assert all(len(p.samples.unique()) == 1 for p in whole)
    assert len(plan_passes(rollout, assignment.trained, range(8))) == 1


def test_equal_passes_add_nothing(state):
    class Three(Differentiator):
        equal_passes = True

        def agree_on_passes(self, passes):
            return passes + 3

    alone, _ = gradient(*state, samples=[0, 1], num_samples=8, kl_weight=0.1)
    padded, _ = gradient(
        *state, samples=[0, 1], num_samples=8, kl_weight=0.1, differentiator=Three()
    )
    assert_same(alone, padded)
