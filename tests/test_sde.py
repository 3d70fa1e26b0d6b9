"""The SDE step: formulas, marginals, precision, singular ends, and refusals."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_grpo_nb.schedules import sigma_schedule
from chunk_grpo_nb.sde import (
    SDE_KINDS,
    GaussianMixture,
    Transition,
    register_sde,
    sample_trajectory,
    sde_step,
)

KINDS = ("flow", "dance", "cps", "ode")
NOISY = ("flow", "dance", "cps")


@pytest.fixture
def gen():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pair(gen):
    """Velocity and latents, (3, 4, 5, 5) in float64."""
    return torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=gen)


def literal(velocity, x, a, b, eta, kind, sigma_1=None):
    """Mean and std as the papers print them."""
    dt, x0, x1 = b - a, x - a * velocity, x + (1 - a) * velocity
    if kind == "flow":
        s = eta * math.sqrt(a / (1 - (sigma_1 if a == 1 else a)))
        return x * (1 + s**2 / (2 * a) * dt) + velocity * (
            1 + s**2 * (1 - a) / (2 * a)
        ) * dt, s * math.sqrt(-dt)
    if kind == "dance":
        score = -(x - (1 - a) * x0) / a**2
        return x + velocity * dt - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)
    std = b * math.sin(eta * math.pi / 2)
    return (1 - b) * x0 + math.sqrt(b**2 - std**2) * x1, std


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("a,b", [(1.0, 0.9), (0.95, 0.9), (0.5, 0.1), (0.2, 0.16)])
def test_matches_the_printed_formulas(pair, kind, a, b):
    velocity, x = pair
    mean, std = literal(velocity, x, a, b, 0.7, kind, sigma_1=b)
    step = sde_step(velocity, x, a, b, 0.7, kind)
    torch.testing.assert_close(step.mean, mean)
    assert float(step.std) == pytest.approx(std, rel=1e-12)
    torch.testing.assert_close(step.pred_original, x - a * velocity)


@settings(max_examples=60, deadline=None)
@given(
    a=st.floats(0.01, 1 - 1e-5) | st.just(1.0),  # closer to 1 acts as 1
    part=st.floats(0, 0.99),
    eta=st.floats(0, 1),
    kind=st.sampled_from(NOISY),
)
def test_matches_the_printed_formulas_anywhere(a, part, eta, kind):
    gen = torch.Generator().manual_seed(1)
    velocity, x = torch.randn(2, 2, 3, dtype=torch.float64, generator=gen)
    b = a * (0.005 + part * 0.995)
    mean, std = literal(velocity, x, a, b, eta, kind, sigma_1=b)
    step = sde_step(velocity, x, a, b, eta, kind)
    torch.testing.assert_close(step.mean, mean, rtol=1e-8, atol=1e-8)
    assert float(step.std) == pytest.approx(std, rel=1e-9, abs=1e-12)


# Precision


@pytest.mark.parametrize("kind", KINDS)
def test_float32_inside_whatever_comes_in(pair, kind):
    low = [tensor.bfloat16() for tensor in pair]
    step, upcast = (
        sde_step(*low, 0.9, 0.8, 0.7, kind),
        sde_step(*(tensor.float() for tensor in low), 0.9, 0.8, 0.7, kind),
    )
    assert step.mean.dtype == step.std.dtype == step.pred_original.dtype == torch.float32
    assert torch.equal(step.mean, upcast.mean)
    assert (
        sde_step(pair[0].bfloat16(), pair[1].float(), 0.9, 0.8, 0.7, kind).mean.dtype
        == torch.float32
    )


def test_float64_is_kept(pair):
    for inputs in (pair, (pair[0].float(), pair[1]), (pair[0], pair[1].bfloat16())):
        step = sde_step(*inputs, 0.9, 0.8)
        assert step.mean.dtype == step.std.dtype == step.log_prob(pair[1]).dtype == torch.float64


def test_rounding_stored_latents_to_bfloat16_breaks_the_log_prob(gen):
    velocity, x = torch.randn(2, 8, 4096, generator=gen)
    step = sde_step(velocity, x, 0.3, 0.25)
    there = step.sample(gen)
    assert torch.equal(
        step.log_prob(there), sde_step(velocity, x, 0.3, 0.25).log_prob(there)
    )  # ratio exactly 1
    assert (
        step.log_prob(there.bfloat16()) - step.log_prob(there)
    ).abs().max() > 5e-6  # a tenth of the clip range


# Singular ends


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1e-6, 0.3, 1.0, 3.0, 1e4, 1e9])
@pytest.mark.parametrize("num_steps", [1, 2, 17, 1000])
def test_finite_along_any_schedule(kind, shift, num_steps, gen):
    velocity, x = torch.randn(2, 1, 4, generator=gen)
    sigmas = sigma_schedule(num_steps, shift)
    for i in {0, 1, num_steps // 2, num_steps - 1} & set(range(num_steps)):
        step = sde_step(velocity, x, sigmas[i], sigmas[i + 1], 0.7, kind)
        assert step.mean.isfinite().all() and step.std.isfinite() and step.std >= 0


def test_first_flow_step_has_std_of_the_noise_level(pair):
    for sigma_1 in (0.999999, 0.9, 0.01):
        assert float(sde_step(*pair, 1.0, sigma_1).std) == pytest.approx(0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_into_sigma_zero_and_no_log_prob_there(pair, kind, gen):
    step = sde_step(*pair, 0.16, 0.0, 0.7, kind)
    assert step.std == 0 and torch.equal(step.sample(gen), step.pred_original)
    with pytest.raises(ValueError, match="std is 0 for every sample"):
        step.log_prob(pair[1])
    at_the_end = sde_step(*pair, 0.0, 0.0, 0.7, kind)
    assert torch.equal(at_the_end.mean, pair[1])


def test_log_prob_names_the_samples_without_noise(pair):
    step = sde_step(*pair, torch.tensor([0.5, 0.16, 0.5]), torch.tensor([0.4, 0.0, 0.4]))
    with pytest.raises(ValueError, match="std is 0 for sample 1:"):
        step.log_prob(pair[1])


# Noise level 0 is the pipeline's own ODE


@pytest.mark.parametrize("kind", KINDS)
def test_noise_level_zero_is_the_ode_bit_for_bit(pair, kind):
    velocity, x = (tensor.float() for tensor in pair)
    for a, b in ((1.0, 0.9), (0.5, 0.4), (0.1, 0.0)):
        step, ode = sde_step(velocity, x, a, b, 0.0, kind), sde_step(velocity, x, a, b, 0.7, "ode")
        assert torch.equal(step.mean, ode.mean) and step.std == ode.std == 0
        assert torch.equal(step.sample(), ode.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_level_zero_reproduces_the_scheduler_of_diffusers(kind, gen):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 17, 17).tolist())
    mixture = GaussianMixture(torch.randn(3, 8, generator=gen), std=0.3)
    theirs = start = torch.randn(5, 8, generator=gen)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        theirs = scheduler.step(
            mixture.velocity(theirs, sigma), timestep, theirs, return_dict=False
        )[0]
    ours = sample_trajectory(mixture.velocity, start, scheduler.sigmas, 0.0, kind)[:, -1]
    assert torch.equal(ours, theirs)


# Shapes, sampling, log-probs


@pytest.mark.parametrize("kind", KINDS)
def test_levels_per_sample_equal_one_call_per_sample(pair, kind):
    velocity, x = pair
    sigma, sigma_next, noise_level = torch.tensor(
        [[1.0, 0.6, 0.2], [0.9, 0.5, 0.0], [0.7, 0.3, 0.7]]
    )
    step = sde_step(velocity, x, sigma, sigma_next, noise_level, kind)
    for i in range(3):
        alone = sde_step(
            velocity[i : i + 1], x[i : i + 1], sigma[i], sigma_next[i], noise_level[i], kind
        )
        torch.testing.assert_close(step.mean[i : i + 1], alone.mean)
        torch.testing.assert_close(step.std[i].squeeze(), alone.std)


@pytest.mark.parametrize("kind", NOISY)
def test_log_prob_is_the_mean_of_normals(pair, kind, gen):
    for a, b in ((0.8, 0.7), (torch.tensor([1.0, 0.6, 0.2]), torch.tensor([0.9, 0.5, 0.1]))):
        step = sde_step(*pair, a, b, 0.7, kind)
        there = step.sample(gen)
        expected = (
            torch.distributions.Normal(step.mean, step.std).log_prob(there).flatten(1).mean(1)
        )
        torch.testing.assert_close(step.log_prob(there), expected)
        assert step.log_prob(there).shape == (3,)


def test_sample_takes_noise_or_a_generator(pair, gen):
    step = sde_step(*pair, 0.8, 0.7)
    noise = torch.randn(
        step.mean.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    expected = step.mean + step.std * noise
    for drawn in (
        step.sample(noise),
        step.sample(noise=noise),
        step.sample(torch.Generator().manual_seed(5)),
        step.sample(generator=torch.Generator().manual_seed(5)),
    ):
        assert torch.equal(drawn, expected)
    with pytest.raises(ValueError, match="needs `noise` or a `generator`"):
        step.sample()
    with pytest.raises(ValueError, match="noise has shape"):
        step.sample(noise[:1])
    with pytest.raises(ValueError, match="next_latents has shape"):
        step.log_prob(noise[:1])


def test_transition_is_frozen(pair):
    step = sde_step(*pair, 0.8, 0.7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.std = torch.tensor(1.0)
    assert [field.name for field in dataclasses.fields(Transition)] == [
        "mean",
        "std",
        "pred_original",
    ]


@pytest.mark.parametrize("kind", NOISY)
def test_gradients_equal_finite_differences(kind, gen):
    velocity, x = torch.randn(2, 2, 3, dtype=torch.float64, generator=gen)
    there = sde_step(velocity, x, 0.8, 0.7, 0.7, kind).sample(gen)
    inputs = (velocity.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda v, x: sde_step(v, x, 0.8, 0.7, 0.7, kind).log_prob(there), inputs
    )


def test_one_batch_may_mix_trained_and_silent_rows_and_still_has_gradients(gen):
    velocity, x = torch.randn(2, 2, 3, generator=gen)
    velocity.requires_grad_()
    step = sde_step(velocity, x, torch.tensor([1.0, 0.1]), torch.tensor([0.9, 0.0]))
    step.mean.sum().backward()
    assert velocity.grad.isfinite().all()


# What each kind preserves


def final_spread(kind, steps, std=0.5):
    """Spread of the final samples over the true one, exactly.

    For Gaussian data every step is linear.
    """
    data, x, variance = (
        GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), std),
        torch.ones(1, 1, dtype=torch.float64),
        1.0,
    )
    sigmas = sigma_schedule(steps, dtype=torch.float64)
    for a, b in itertools.pairwise(sigmas):
        step = sde_step(data.velocity(x, a), x, a, b, 0.7, kind)
        variance = step.mean.item() ** 2 * variance + step.std.item() ** 2
    return math.sqrt(variance) / std


@pytest.mark.parametrize("kind", ["ode", "flow", "dance"])
def test_marginals_are_kept_as_steps_get_short(kind):
    errors = [abs(final_spread(kind, steps) - 1) for steps in (20, 200)]
    assert errors[1] < 0.01 and errors[1] < errors[0] / 5


def test_a_flipped_score_would_be_noticed():
    @register_sde("flipped")
    def flipped(sigma, sigma_next, noise_level):
        removed, std = SDE_KINDS["dance"](sigma, sigma_next, noise_level)
        return -removed, std

    try:
        assert abs(final_spread("flipped", 200) - 1) > 0.5
    finally:
        del SDE_KINDS["flipped"]


@settings(max_examples=50, deadline=None)
@given(b=st.floats(0.001, 1), eta=st.floats(0, 1))
def test_cps_keeps_the_noise_level(b, eta):
    b, eta = torch.tensor(b, dtype=torch.float64), torch.tensor(eta, dtype=torch.float64)
    removed, std = SDE_KINDS["cps"](torch.ones_like(b), b, eta)
    torch.testing.assert_close((b - removed) ** 2 + std**2, b**2)


def test_mixture_velocity_is_the_conditional_mean(gen):
    mixture = GaussianMixture(torch.tensor([[-1.0], [2.0]]), std=0.4)
    data, noise = mixture.sample(200_000, gen), torch.randn(200_000, 1, generator=gen)
    x, sigma = 0.4 * data + 0.6 * noise, 0.6
    near = (x[:, 0] - 0.5).abs() < 0.05
    torch.testing.assert_close(
        (noise - data)[near].mean(),
        mixture.velocity(torch.tensor([[0.5]]), sigma)[0, 0],
        atol=0.05,
        rtol=0,
    )


# Refusals


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "vp"}, "kind='vp' is unknown: choose one of 'flow', 'dance', 'cps', 'ode'"),
        ({"sigma": 1.1}, r"sigma=1.1: must lie in \[0, 1\]"),
        ({"sigma": 900.0, "sigma_next": 800.0}, "sigma=900"),
        ({"sigma_next": -0.1}, "sigma_next=-0.1"),
        ({"sigma_next": 0.95}, "sigma_next=0.95 above sigma=0.9"),
        ({"sigma": float("nan")}, "sigma=nan: must be finite"),
        ({"sigma": torch.tensor([0.9, 0.9])}, r"sigma has shape \(2,\)"),
        ({"noise_level": -0.1}, "noise_level=-0.1"),
        ({"noise_level": 1.2, "kind": "cps"}, "noise_level=1.2 with kind='cps'"),
        (
            {"velocity": torch.zeros(2, 4, 5, 5)},
            r"velocity has shape \(2, 4, 5, 5\), latents have \(3, 4, 5, 5\)",
        ),
    ],
)
def test_bad_input_is_named(pair, change, message):
    good = {"velocity": pair[0], "latents": pair[1], "sigma": 0.9, "sigma_next": 0.8}
    sde_step(**good)
    with pytest.raises(ValueError, match=message):
        sde_step(**{**good, **change})


# Levels within rounding of 1 or 0


def stock_sigmas(shift, num_steps=17):
    """The levels of diffusers' scheduler, as FLUX's pipeline asks for them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)])
    return scheduler.sigmas


def test_every_two_digit_shift_of_the_stock_scheduler_starts_like_an_exact_one():
    x, v = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    inexact = 0
    for shift in (i / 100 for i in range(1, 1297)):
        sigmas = stock_sigmas(shift)
        inexact += bool(sigmas[0] != 1)
        for kind in NOISY:
            first = sde_step(v, x, sigmas[0], sigmas[1], 0.7, kind)
            exact = sde_step(v, x, 1.0, sigmas[1], 0.7, kind)
            assert torch.equal(first.std, exact.std), (shift, kind)
            torch.testing.assert_close(first.mean, exact.mean)
        steps = sde_step(v.expand(16, 8), x.expand(16, 8), sigmas[:-2], sigmas[1:-1], 0.7, "flow")
        assert steps.std.max() < 1.5, shift
    assert inexact > 10  # else the test shows nothing


@pytest.mark.parametrize("kind", NOISY)
def test_a_level_that_is_almost_zero_acts_as_zero(pair, kind):
    velocity, x = pair
    last = sde_step(velocity, x, 0.1, 3e-7, 0.7, kind)
    assert last.std == 0
    nowhere = sde_step(velocity, x, 4e-7, -1e-7, 0.7, kind)
    assert nowhere.std == 0 and nowhere.mean.isfinite().all()


@pytest.mark.parametrize("sigma", [1.00001, -0.00001, 1000.0])
def test_levels_clearly_outside_are_still_refused(pair, sigma):
    velocity, x = pair
    with pytest.raises(ValueError, match="must lie in"):
        sde_step(velocity, x, sigma, min(sigma, 0.5))
