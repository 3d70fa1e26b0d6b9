"""Noise schedules: ends, order, the shift's algebra, and agreement with diffusers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_grpo_nb.schedules import shift_sigmas, sigma_schedule, snap_sigmas


@settings(max_examples=50, deadline=None)
@given(num_steps=st.integers(1, 200), shift=st.floats(0.05, 50))
def test_falls_strictly_from_one_to_zero(num_steps, shift):
    sigmas = sigma_schedule(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_known_values():
    torch.testing.assert_close(sigma_schedule(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    torch.testing.assert_close(sigma_schedule(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    assert sigma_schedule(4, dtype=torch.float64).dtype == torch.float64


@settings(max_examples=50, deadline=None)
@given(first=st.floats(0.1, 10), second=st.floats(0.1, 10))
def test_shifts_multiply(first, second):
    sigmas = sigma_schedule(17, dtype=torch.float64)
    torch.testing.assert_close(
        shift_sigmas(shift_sigmas(sigmas, first), second), shift_sigmas(sigmas, first * second)
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_agrees_with_the_scheduler_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 17, 17).tolist())
    torch.testing.assert_close(sigma_schedule(17, shift), scheduler.sigmas)


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, True])
def test_bad_step_counts_are_named(num_steps):
    with pytest.raises(ValueError, match="num_steps="):
        sigma_schedule(num_steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_shifts_are_named(shift):
    with pytest.raises(ValueError, match="shift="):
        sigma_schedule(17, shift)


TWO_DIGIT_SHIFTS = [i / 100 for i in range(1, 1297)]


def test_ends_stay_exact_at_every_shift_and_precision():
    for shift in TWO_DIGIT_SHIFTS:
        for dtype in (torch.float32, torch.float64):
            ends = shift_sigmas(torch.tensor([1.0, 0.0], dtype=dtype), shift)
            assert ends.tolist() == [1, 0], shift
        sigmas = sigma_schedule(17, shift, dtype=torch.float64)
        assert sigmas[0] == 1 and sigmas[-1] == 0


def test_snapping_moves_rounding_only():
    eps = torch.finfo(torch.float32).eps
    near = torch.tensor([1 + 4 * eps, 1 - 4 * eps, 4 * eps, -4 * eps])
    assert snap_sigmas(near).tolist() == [1, 1, 0, 0]
    away = torch.tensor([0.99999, 1.00001, 1e-5, -1e-5, 0.5])
    assert torch.equal(snap_sigmas(away), away)


@pytest.mark.parametrize("num_steps", [1e18, None, "17", [17], float("nan")])
def test_absurd_step_counts_are_named(num_steps):
    with pytest.raises(ValueError, match="num_steps="):
        sigma_schedule(num_steps)
