"""Relative distances along sampling, and the variance they owe to the step and to the prompt."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_grpo_nb.dynamics import METRICS, dynamics_summary, register_metric, relative_distance


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(0)


def test_hand_values():
    walk = torch.tensor(
        [[[[3.0], [4.0]], [[0.0], [0.0]]], [[[1.0], [1.0]], [[1.0], [-1.0]]]]
    )  # (2, 2, 2, 1)
    torch.testing.assert_close(relative_distance(walk), torch.tensor([[1.0], [1.0]]))
    torch.testing.assert_close(relative_distance(walk, "l2"), torch.tensor([[1.0], [2.0 / 2**0.5]]))
    torch.testing.assert_close(relative_distance(walk[1:], "cosine"), torch.tensor([[1.0]]))


def test_references(gen):
    trajectory = torch.randn(3, 6, 4, 2, 2, dtype=torch.float64, generator=gen)
    x = trajectory.flatten(2)
    torch.testing.assert_close(
        relative_distance(trajectory),
        (x[:, :-1] - x[:, 1:]).norm(p=1, dim=-1) / x[:, :-1].norm(p=1, dim=-1),
    )
    torch.testing.assert_close(
        relative_distance(trajectory, "l2"),
        (x[:, :-1] - x[:, 1:]).norm(dim=-1) / x[:, :-1].norm(dim=-1),
    )
    torch.testing.assert_close(
        relative_distance(trajectory, "cosine"),
        1 - torch.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1),
    )
    assert relative_distance(trajectory[:, :-1]).shape == (3, 4)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_precision_scale_and_gradient(metric, gen):
    trajectory = torch.randn(2, 4, 5, dtype=torch.float64, generator=gen)
    assert relative_distance(trajectory, metric).dtype == torch.float64
    assert relative_distance(trajectory.bfloat16(), metric).dtype == torch.float32
    torch.testing.assert_close(
        relative_distance(trajectory * 7, metric), relative_distance(trajectory, metric)
    )
    assert torch.autograd.gradcheck(
        lambda x: relative_distance(x, metric), trajectory.requires_grad_()
    )


def test_small_angles_keep_their_digits():
    turn = 1e-4
    states = torch.tensor([[[1.0, 0.0], [1.0, turn]]])
    torch.testing.assert_close(
        relative_distance(states, "cosine"), torch.tensor([[turn**2 / 2]]), rtol=1e-3, atol=0
    )


def test_a_metric_is_one_function():
    @register_metric("max")
    def largest(before, after):
        return (before - after).abs().amax(-1) / before.abs().amax(-1)

    try:
        torch.testing.assert_close(
            relative_distance(torch.tensor([[[2.0, 1.0], [2.0, 0.0]]]), "max"),
            torch.tensor([[0.5]]),
        )
    finally:
        del METRICS["max"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_latents_are_placed(value, gen):
    trajectory = torch.randn(3, 5, 2, generator=gen)
    trajectory[1, 3, 0] = value
    with pytest.raises(ValueError, match="trajectory 1 has no l1 distance at step 2"):
        relative_distance(trajectory)


def test_zero_latents_and_bad_shapes_and_metrics_are_refused(gen):
    trajectory = torch.randn(3, 5, 2, generator=gen)
    with pytest.raises(ValueError, match="'l3' is unknown: choose one of 'l1', 'l2', 'cosine'"):
        relative_distance(trajectory, "l3")
    with pytest.raises(ValueError, match=r"shape \(3, 1, 2\)"):
        relative_distance(trajectory[:, :1])
    with pytest.raises(ValueError, match="entirely 0"):
        relative_distance(torch.zeros(1, 3, 2), "cosine")


# The summary


def by_loops(curves, groups):
    """The decomposition as written in the notebook, one sum at a time."""
    n, steps = curves.shape
    ids = groups.unique()
    total = ((curves - curves.mean()) ** 2).sum()
    step = n * ((curves.mean(0) - curves.mean()) ** 2).sum()
    means = {int(g): curves[groups == g].mean(0) for g in ids}
    between = sum(((means[int(g)] - curves.mean(0)) ** 2).sum() for g in groups)
    within = sum(
        ((curve - means[int(g)]) ** 2).sum() for curve, g in zip(curves, groups, strict=True)
    )
    torch.testing.assert_close(step + between + within, total)
    return float(step / total), float((between - (len(ids) - 1) * within / (n - len(ids))) / total)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(2, 8), offset=st.sampled_from([0.0, 1000.0]))
def test_shares_equal_the_long_sums_also_for_uneven_groups(seed, steps, offset):
    gen = torch.Generator().manual_seed(seed)
    groups = torch.tensor([4, 4, 4, 9, 9, 0, 0, 0, 0])
    curves = (
        torch.randn(9, steps, generator=gen, dtype=torch.float64)
        + torch.arange(steps)
        + groups[:, None] * 0.1
        + offset
    )
    found = dynamics_summary(curves, groups, num_resamples=10)
    step, group = by_loops(curves, groups)
    assert found.step_share == pytest.approx(step, abs=1e-9) and found.group_share == pytest.approx(
        group, abs=1e-9
    )
    assert 0 <= found.step_share <= 1


def test_mean_spread_counts_and_frozen(gen):
    curves = torch.rand(6, 4, generator=gen)
    found = dynamics_summary(curves, torch.tensor([0, 0, 1, 1, 2, 2]))
    torch.testing.assert_close(found.mean, curves.double().mean(0))
    torch.testing.assert_close(found.std, curves.double().std(0))
    assert (found.num_curves, found.num_groups) == (6, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.step_share = 1.0
    alone = dynamics_summary(curves)
    assert (
        alone.step_share == pytest.approx(found.step_share)
        and alone.group_share is alone.group_interval is alone.num_groups is None
    )


def test_intervals_contain_the_estimate_repeat_and_widen(gen):
    groups = torch.arange(10).repeat_interleave(6)
    curves = (
        torch.linspace(1, 0, 8)
        + 0.2 * torch.randn(60, 8, generator=gen)
        + 0.2 * torch.randn(10, 1, generator=gen)[groups]
    )
    found, again, wide = (
        dynamics_summary(curves, groups),
        dynamics_summary(curves, groups),
        dynamics_summary(curves, groups, confidence=0.99),
    )
    for low, value, high in (
        (*found.step_interval[:1], found.step_share, found.step_interval[1]),
        (found.group_interval[0], found.group_share, found.group_interval[1]),
    ):
        assert low < value < high
    assert (
        found.step_interval == again.step_interval and found.group_interval == again.group_interval
    )
    assert (
        wide.step_interval[0] < found.step_interval[0]
        and wide.step_interval[1] > found.step_interval[1]
    )


def test_prompts_without_effect_are_seldom_found():
    groups = torch.arange(12).repeat_interleave(8)
    covered = 0
    for seed in range(40):
        curves = torch.linspace(1, 0, 16) + 0.1 * torch.randn(
            96, 16, generator=torch.Generator().manual_seed(seed)
        )
        low, high = dynamics_summary(curves, groups, num_resamples=300).group_interval
        covered += low <= 0 <= high
    assert covered >= 30


@pytest.mark.parametrize(
    "curves,groups,message",
    [
        (torch.rand(5), None, r"shape \(5,\)"),
        (torch.rand(1, 5), None, r"shape \(1, 5\)"),
        (torch.rand(5, 1), None, r"shape \(5, 1\)"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), None, "curve 1 is nan at step 1"),
        (torch.ones(4, 3), None, "no variance to explain"),
        (torch.rand(4, 3), torch.arange(3), r"group_ids has shape \(3,\)"),
        (torch.rand(4, 3), torch.arange(4), r"4 prompt\(s\) for 4 curves"),
        (torch.rand(4, 3), torch.zeros(4), r"1 prompt\(s\) for 4 curves"),
    ],
)
def test_bad_curves_are_named(curves, groups, message):
    with pytest.raises(ValueError, match=message):
        dynamics_summary(curves, groups)


@pytest.mark.parametrize(
    "options", [{"confidence": 1.0}, {"confidence": 0.0}, {"num_resamples": 0}]
)
def test_bad_bootstrap_options_are_named(options):
    with pytest.raises(ValueError, match="confidence="):
        dynamics_summary(torch.rand(4, 3), **options)
