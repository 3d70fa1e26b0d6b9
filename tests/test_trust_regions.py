"""Trust regions: hand values, limits, and the algebra that each paper claims."""

import math

import pytest
import torch

from chunk_grpo_nb.chunking import chunk_ids_from_sizes
from chunk_grpo_nb.objective import (
    chunk_mean,
    chunk_ratio,
    clipped_objective,
    diagnose,
    kl_to_reference,
    step_coefficients,
)
from chunk_grpo_nb.schedules import sigma_schedule
from chunk_grpo_nb.sde import sde_step
from chunk_grpo_nb.trust_regions import (
    UNCLIPPED,
    divergence_weights,
    inverse_stride_weights,
    length_clip_range,
    normalised_log_ratio,
    spread_clip_range,
)


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.5, 0.44), (0.2, 0.16)])
def test_normalised_log_ratio_is_the_noise_times_the_change(gen, kind, sigma, sigma_next):
    x, v, change, noise = torch.randn(4, 5, 32, dtype=torch.float64, generator=gen)
    old = sde_step(v, x, sigma, sigma_next, 0.7, kind)
    new = sde_step(v + 0.1 * change, x, sigma, sigma_next, 0.7, kind)
    there = old.sample(noise)
    divergence = kl_to_reference(new.mean, old.mean, old.std)[:, None]
    found = normalised_log_ratio(
        new.log_prob(there)[:, None], old.log_prob(there)[:, None], divergence, old.std
    )
    torch.testing.assert_close(found[:, 0], (noise * (new.mean - old.mean)).mean(1))


def test_normalised_log_ratio_as_the_release_writes_it():
    # exp((log_prob - old_log_prob + |mean - old_mean|^2 / (2 (sigma sqrt(dt))^2)) * sigma sqrt(dt))
    log_prob, old, drift, sigma, sqrt_dt = -1.3, -1.1, 0.04, 0.9, 0.25
    scale = sigma * sqrt_dt
    expected = math.exp((log_prob - old + drift / (2 * scale**2)) * scale)
    value = normalised_log_ratio(
        torch.tensor([[log_prob]]),
        torch.tensor([[old]]),
        kl_to_reference(torch.tensor([[drift**0.5]]), torch.zeros(1, 1), scale)[:, None],
        torch.tensor([scale]),
    )
    assert value.exp().item() == pytest.approx(expected, rel=1e-5)


def test_inverse_stride_weights():
    uniform = inverse_stride_weights(sigma_schedule(10))
    torch.testing.assert_close(uniform, torch.ones(10), rtol=1e-5, atol=1e-5)
    sigmas = sigma_schedule(17, 3.0)[:-1]
    weights = inverse_stride_weights(sigmas)
    torch.testing.assert_close(weights * -sigmas.diff(), (weights * -sigmas.diff())[:1].expand(16))
    assert weights.mean() == pytest.approx(1)
    with pytest.raises(ValueError, match="fall at every step"):
        inverse_stride_weights(torch.tensor([1.0, 0.5, 0.5]))


def test_normalised_chunks_stream(gen):
    ids = chunk_ids_from_sizes([[2, 3, 1], [1, 1, 4]])
    values = torch.randn(2, 6, dtype=torch.float64, generator=gen).mul(0.1).requires_grad_()
    zeros, advantages = torch.zeros(2, 6).double(), torch.tensor([1.0, -0.5]).double()
    weights = chunk_mean(torch.rand(1, 6, generator=gen).expand(2, 6), ids)
    loss = clipped_objective(chunk_ratio(values, zeros, ids), advantages, 0.05, weights=weights)
    loss.backward()
    streamed = step_coefficients(values.detach(), zeros, ids, advantages, 0.05, weights=weights)
    torch.testing.assert_close(streamed, values.grad)


def test_length_clip_range_is_fspo_on_the_sum():
    ids = chunk_ids_from_sizes([1, 4, 9])
    low, high = length_clip_range(ids, 0.06)
    assert torch.equal(low, high)
    sizes = torch.tensor([[1.0, 4.0, 9.0]])
    torch.testing.assert_close(high * sizes, 0.06 * sizes.sqrt())  # c sqrt(L) on the summed ratio


def test_spread_clip_range_by_hand_and_by_row():
    ids = chunk_ids_from_sizes([[2, 1], [1, 2]])
    _, high = spread_clip_range(torch.tensor([3.0, 4.0, 2.0]), ids, 0.01)
    expected = torch.tensor([[0.025, 0.02], [0.03, 0.01 * math.sqrt(20) / 2]])
    torch.testing.assert_close(high, expected)
    low, high = spread_clip_range(torch.tensor([300.0]), torch.zeros(1).long())
    assert low.item() == 1 and high.item() == 300
    _, per_sample = spread_clip_range(torch.ones(2, 3), torch.zeros(3).long())
    assert per_sample.shape == (2, 1)


def test_equal_bands_are_the_one_number(gen):
    ratio = (0.2 * torch.randn(5, 3, generator=gen)).exp()
    advantages = torch.randn(5, generator=gen)
    number = clipped_objective(ratio, advantages, (0.1, 0.2))
    for shape in ((3,), (1, 3), (5, 3)):
        band = torch.full(shape, 0.1), torch.full(shape, 0.2)
        torch.testing.assert_close(clipped_objective(ratio, advantages, band), number)
    torch.testing.assert_close(
        clipped_objective(ratio, advantages, (0.1, torch.full((3,), 0.2))), number
    )


def test_bands_per_chunk_clip_each_chunk_by_its_own():
    ratio = torch.tensor([[1.15, 1.15]], requires_grad=True)
    band = torch.tensor([0.1, 0.2])
    clipped_objective(ratio, torch.ones(1), band).backward()
    assert ratio.grad.tolist() == [[0, -0.5]]
    log_probs, ids = torch.tensor([[1.15, 1.15]]).log(), torch.arange(2)
    found = step_coefficients(log_probs, torch.zeros(1, 2), ids, torch.ones(1), band)
    torch.testing.assert_close(found, torch.tensor([[0, -0.575]]))
    seen = diagnose(log_probs, torch.zeros(1, 2), ids, torch.ones(1), band)
    assert seen.clip_high == 0.5


@pytest.mark.parametrize(
    "band", [torch.tensor([0.1, -0.1]), torch.ones(4), (torch.tensor(1.5), 0.1), float("nan")]
)
def test_bad_bands_are_named(band):
    with pytest.raises(ValueError, match="clip_range"):
        clipped_objective(torch.ones(2, 2), torch.ones(2), band)


def test_divergence_mask_table():
    ratio = torch.tensor([[1.1], [0.9], [1.1], [0.9], [1.0]])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    far, near = torch.full((5, 1), 0.2), torch.full((5, 1), 0.01)
    kept = divergence_weights(ratio, advantages, far, 0.1)
    assert kept.flatten().tolist() == [0, 1, 1, 0, 1]
    assert divergence_weights(ratio, advantages, near, 0.1).all()
    per_chunk = divergence_weights(
        torch.full((1, 2), 1.1), torch.ones(1), torch.full((1, 2), 0.2), torch.tensor([0.1, 0.3])
    )
    assert per_chunk.tolist() == [[0, 1]]


def test_masked_objective_is_the_mean_of_what_is_kept(gen):
    ratio = (0.2 * torch.randn(6, 4, generator=gen)).exp()
    advantages = torch.randn(6, generator=gen)
    divergence = torch.rand(6, 4, generator=gen)
    keep = divergence_weights(ratio, advantages, divergence, 0.5)
    expected = -(keep * ratio * advantages[:, None]).mean()
    found = clipped_objective(ratio, advantages, UNCLIPPED, weights=keep)
    torch.testing.assert_close(found, expected)


def test_refusals_name_the_value():
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        normalised_log_ratio(good, good, good[:1], torch.ones(3))
    with pytest.raises(ValueError, match="std must be positive"):
        normalised_log_ratio(good, good, good, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="threshold"):
        divergence_weights(good, torch.ones(2), good, -1.0)
    with pytest.raises(ValueError, match="not negative"):
        spread_clip_range(-torch.ones(3), torch.arange(3))
