"""The chunk objective: values by hand, gradients, streaming, KL, diagnostics.

And the identity with weighted step-level GRPO.
"""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_grpo_nb.chunking import (
    adaptive_chunks,
    chunk_ids_from_sizes,
    chunk_mask,
    chunk_to_steps,
    make_chunker,
    select_chunks,
)
from chunk_grpo_nb.objective import (
    chunk_mean,
    chunk_ratio,
    clip_shares,
    clipped_objective,
    diagnose,
    implied_step_weights,
    kl_to_reference,
    std_step_weights,
    step_coefficients,
)

RAGGED = chunk_ids_from_sizes([[2, 2, 1], [1, 4], [5], [1, 1, 1, 1, 1]])
STEP, SEQUENCE = torch.arange(5), torch.zeros(5, dtype=torch.long)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def step_level_loss(log_probs, old, advantages, clip, weights=1.0):
    """Step-level GRPO as the papers write it, without a line of the library."""
    ratio = (log_probs - old).exp()
    surrogate = torch.minimum(
        ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None]
    )
    return -(weights * surrogate).mean()


def gradient(loss, log_probs, *rest, **options):
    leaf = log_probs.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **options), leaf)[0]


def chunk_loss(log_probs, old, chunk_ids, advantages, clip, mask=None, **options):
    mask = chunk_mask(chunk_ids) if mask is None else mask
    return clipped_objective(
        chunk_ratio(log_probs, old, chunk_ids), advantages, clip, mask, **options
    )


# Values


def test_two_steps_by_hand():
    log_probs = torch.tensor([[0.1, 0.3], [-0.2, 0.0]], dtype=torch.float64, requires_grad=True)
    old, advantages, one_chunk = (
        torch.zeros(2, 2).double(),
        torch.tensor([1.0, -1.0]).double(),
        torch.zeros(2, dtype=torch.long),
    )
    ratio = chunk_ratio(log_probs, old, one_chunk)
    torch.testing.assert_close(
        ratio.detach()[:, 0], torch.tensor([math.exp(0.2), math.exp(-0.1)]).double()
    )  # means 0.2 and -0.1
    loss = clipped_objective(ratio, advantages, 0.15)
    assert loss.item() == pytest.approx(
        -(1.15 - math.exp(-0.1)) / 2
    )  # 1.2214 is held at 1.15; 0.9048 is inside
    loss.backward()
    expected = [
        [0, 0],
        [math.exp(-0.1) / 4] * 2,
    ]  # A = -1: loss term +ratio / 2, each of two steps moves the ratio by ratio / 2
    torch.testing.assert_close(log_probs.grad, torch.tensor(expected).double())


@pytest.mark.parametrize(
    "ratio, advantage, loss",
    [
        (1.5, 1.0, -1.2),
        (1.5, -1.0, 1.5),
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.9),
        (1.1, 1.0, -1.1),
        (0.95, -1.0, 0.95),
        (1.5, 0.0, 0.0),
    ],
)
def test_separate_low_and_high_ranges(ratio, advantage, loss):
    assert clipped_objective(
        torch.tensor([[ratio]]), torch.tensor([advantage]), (0.1, 0.2)
    ).item() == pytest.approx(loss)


def test_chunk_mean_and_ratio_pad_with_neutral_values():
    values = torch.arange(1.0, 21).reshape(4, 5)
    assert chunk_mean(values, RAGGED, 6).tolist() == [
        [1.5, 3.5, 5, 0, 0, 0],
        [6, 8.5, 0, 0, 0, 0],
        [13, 0, 0, 0, 0, 0],
        [16, 17, 18, 19, 20, 0],
    ]
    assert (chunk_ratio(values, 0 * values, RAGGED)[~chunk_mask(RAGGED)] == 1).all()


def test_ratio_is_one_before_the_first_update_and_equal_shifts_give_equal_ratios():
    log_probs = draw(4, 5).float()
    assert (chunk_ratio(log_probs, log_probs, RAGGED) == 1).all()
    shifted = chunk_ratio(log_probs.double() + 0.25, log_probs.double(), RAGGED)
    torch.testing.assert_close(
        shifted[chunk_mask(RAGGED)], torch.full((11,), math.exp(0.25)).double()
    )


def test_half_precision_is_lifted_before_the_difference():
    old = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    assert chunk_ratio(old, old, torch.zeros(2, dtype=torch.long)).dtype == torch.float32


# Limits


@pytest.mark.parametrize("clip", [0.05, 0.2, 10.0])
def test_chunks_of_one_step_are_step_level_grpo(clip):
    log_probs, old, advantages = (
        draw(6, 5, scale=0.2),
        draw(6, 5, seed=1, scale=0.2),
        draw(6, seed=2),
    )
    clip = min(clip, 1.0)
    torch.testing.assert_close(
        chunk_loss(log_probs, old, STEP, advantages, clip),
        step_level_loss(log_probs, old, advantages, clip),
    )
    torch.testing.assert_close(
        gradient(chunk_loss, log_probs, old, STEP, advantages, clip),
        gradient(step_level_loss, log_probs, old, advantages, clip),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0])
def test_one_chunk_is_sequence_level(clip):
    log_probs, old, advantages = (
        draw(6, 5, scale=0.2),
        draw(6, 5, seed=1, scale=0.2),
        draw(6, seed=2),
    )

    def sequence(values):
        means = values.mean(1, keepdim=True), old.mean(1, keepdim=True)
        return step_level_loss(*means, advantages, clip)

    torch.testing.assert_close(
        chunk_loss(log_probs, old, SEQUENCE, advantages, clip), sequence(log_probs)
    )
    torch.testing.assert_close(
        gradient(chunk_loss, log_probs, old, SEQUENCE, advantages, clip),
        gradient(sequence, log_probs),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("clip", [0.05, (0.02, 0.3)])
def test_gradient_equals_finite_differences(clip):
    log_probs, old, advantages = (
        draw(4, 5, scale=0.2).requires_grad_(),
        draw(4, 5, seed=1, scale=0.2),
        draw(4, seed=2),
    )
    assert torch.autograd.gradcheck(
        lambda lp: chunk_loss(lp, old, RAGGED, advantages, clip), log_probs
    )


def test_rows_together_equal_rows_alone():
    log_probs, old, advantages = (
        draw(4, 5, scale=0.2),
        draw(4, 5, seed=1, scale=0.2),
        draw(4, seed=2),
    )
    together = chunk_loss(log_probs, old, RAGGED, advantages, 0.1)
    alone = [
        chunk_loss(
            log_probs[i : i + 1], old[i : i + 1], RAGGED[i : i + 1], advantages[i : i + 1], 0.1
        )
        for i in range(4)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-12, atol=1e-14)
    partial = sum(
        chunk_loss(
            log_probs[i : i + 2],
            old[i : i + 2],
            RAGGED[i : i + 2],
            advantages[i : i + 2],
            0.1,
            num_samples=4,
        )
        for i in (0, 2)
    )
    torch.testing.assert_close(
        partial, together, rtol=1e-12, atol=1e-14
    )  # micro-batches or processes, normalised by the global count


def test_unselected_chunks_do_not_count_whatever_they_hold():
    log_probs, old, advantages = draw(2, 5), draw(2, 5, seed=1), draw(2, seed=2)
    ids, mask = chunk_ids_from_sizes([2, 3]), torch.tensor([[True, False], [False, True]])
    spoiled = log_probs.clone()
    spoiled[0, 3] = spoiled[1, 0] = 500.0  # their ratios are beyond 1e70
    torch.testing.assert_close(
        gradient(chunk_loss, spoiled, old, ids, advantages, 0.5, mask),
        gradient(chunk_loss, log_probs, old, ids, advantages, 0.5, mask),
    )


# The identity: at ratio 1 a chunking is a weighting of steps


def random_chunking(seed, rows=6, steps=16):
    return adaptive_chunks(1 + draw(rows, steps, seed=seed, scale=0.3).abs())


@pytest.mark.parametrize(
    "chunk_ids",
    [
        chunk_ids_from_sizes([2, 3, 4, 7]),
        random_chunking(0),
        make_chunker("uniform:4")(torch.zeros(16)),
    ],
)
def test_at_ratio_one_the_chunk_gradient_is_the_weighted_step_gradient(chunk_ids):
    log_probs, advantages = draw(6, 16), draw(6, seed=1)
    weights = implied_step_weights(chunk_ids)
    by_chunk = gradient(chunk_loss, log_probs, log_probs, chunk_ids, advantages, 0.1)
    by_step = gradient(step_level_loss, log_probs, log_probs, advantages, 0.1, weights)
    torch.testing.assert_close(by_step, by_chunk, rtol=1e-6, atol=1e-8)
    control = gradient(
        chunk_loss, log_probs, log_probs, torch.arange(16), advantages, 0.1, weights=weights
    )  # the same through the library
    torch.testing.assert_close(control, by_chunk, rtol=1e-6, atol=1e-8)


def test_away_from_ratio_one_they_differ():
    log_probs, old, advantages, ids = (
        draw(6, 16, scale=0.2),
        draw(6, 16, seed=1, scale=0.2),
        draw(6, seed=2),
        chunk_ids_from_sizes([2, 3, 4, 7]),
    )
    by_chunk = gradient(chunk_loss, log_probs, old, ids, advantages, 0.1)
    by_step = gradient(
        chunk_loss,
        log_probs,
        old,
        torch.arange(16),
        advantages,
        0.1,
        weights=implied_step_weights(ids),
    )
    assert (by_chunk - by_step).abs().max() > 0.1 * by_chunk.abs().max()


def test_identity_holds_with_selected_chunks():
    log_probs, advantages, ids = draw(6, 16), draw(6, seed=1), random_chunking(3)
    mask = select_chunks(None, ids, 0.5, torch.Generator().manual_seed(0))
    weights, steps = implied_step_weights(ids, mask), chunk_to_steps(mask, ids)
    by_chunk = gradient(chunk_loss, log_probs, log_probs, ids, advantages, 0.1, mask)
    by_step = gradient(
        chunk_loss, log_probs, log_probs, torch.arange(16), advantages, 0.1, steps, weights=weights
    )
    torch.testing.assert_close(by_step, by_chunk, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(weights.sum(1) / steps.sum(1), torch.ones(6))


def test_implied_weights_by_hand():
    weights = implied_step_weights(chunk_ids_from_sizes([2, 3, 4, 7]))
    torch.testing.assert_close(
        weights, torch.tensor([2.0] * 2 + [4 / 3] * 3 + [1.0] * 4 + [4 / 7] * 7)
    )
    assert weights[0] / weights[-1] == pytest.approx(3.5)
    assert (
        implied_step_weights(torch.arange(16)).tolist()
        == implied_step_weights(torch.zeros(16, dtype=torch.long)).tolist()
        == [1.0] * 16
    )


def test_std_step_weights():
    assert std_step_weights(torch.tensor([3.0, 2.0, 1.0])).tolist() == [1.5, 1.0, 0.5]
    with pytest.raises(ValueError, match="not all 0"):
        std_step_weights(torch.zeros(3))


# Streaming


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_streamed_coefficients_are_the_gradient(seed, per_chunk, masked, weighted, counted):
    ids = random_chunking(seed)
    shape = chunk_mask(ids).shape
    log_probs, old = (
        draw(6, 16, seed=seed, scale=0.2),
        draw(6, 16, seed=seed + 1, scale=0.2),
    )  # about half of the chunks are clipped
    advantages = draw(*(shape if per_chunk else (6,)), seed=seed + 2)
    mask = select_chunks(None, ids, 0.5, torch.Generator().manual_seed(seed)) if masked else None
    options = {"weights": draw(*shape, seed=seed + 3).abs()} if weighted else {}
    options |= {"num_samples": 17} if counted else {}
    clip = (0.03, 0.08)
    whole = gradient(chunk_loss, log_probs, old, ids, advantages, clip, mask, **options)
    streamed = step_coefficients(log_probs, old, ids, advantages, clip, mask, **options)
    torch.testing.assert_close(streamed, whole, rtol=1e-12, atol=1e-12)
    assert not streamed.requires_grad


def test_rows_of_a_batch_that_lack_its_last_chunk():
    """A micro-batch of differently chunked trajectories has the width of the whole batch."""
    log_probs, old, advantages, mask = (
        draw(4, 5, scale=0.01),
        draw(4, 5, seed=1, scale=0.01),
        draw(4, seed=2)[:, None].expand(4, 5),
        chunk_mask(RAGGED),
    )
    whole = step_coefficients(log_probs, old, RAGGED, advantages, 0.2, mask, num_samples=4)
    weights = implied_step_weights(RAGGED, mask)
    for rows in ([0], [1, 2], [3, 0], [2]):
        torch.testing.assert_close(
            step_coefficients(
                log_probs[rows],
                old[rows],
                RAGGED[rows],
                advantages[rows],
                0.2,
                mask[rows],
                num_samples=4,
            ),
            whole[rows],
            rtol=0,
            atol=0,
        )
        torch.testing.assert_close(
            implied_step_weights(RAGGED[rows], mask[rows]), weights[rows], rtol=0, atol=0
        )
    d = diagnose(log_probs[:2], old[:2], RAGGED[:2], advantages[:2], 0.2, mask[:2])
    assert (
        d.ratio_mean.shape == (5,)
        and d.ratio_mean[:3].isfinite().all()
        and d.ratio_mean[3:].isnan().all()
    )


def test_streaming_meets_clipped_chunks_on_every_side():
    ids, old = chunk_ids_from_sizes([2, 3]), torch.zeros(4, 5).double()
    log_probs = torch.tensor([0.3, -0.3, 0.3, -0.3]).double()[:, None].expand(4, 5)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    streamed = step_coefficients(log_probs, old, ids, advantages, 0.1)
    torch.testing.assert_close(
        streamed, gradient(chunk_loss, log_probs, old, ids, advantages, 0.1), rtol=1e-12, atol=1e-12
    )
    assert (streamed == 0).all(1).tolist() == [
        True,
        False,
        False,
        True,
    ]  # cut: above with A > 0, below with A < 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [1.0, 1.25, 0.75])
def test_streaming_on_the_edge_of_the_clip_range(ratio, advantage):
    ids, old = torch.zeros(1, dtype=torch.long), torch.zeros(1, 1).double()
    log_probs, advantages = (
        torch.tensor([[math.log(ratio)]]).double(),
        torch.tensor([advantage]).double(),
    )
    edge = abs(log_probs.exp().item() - 1)  # exactly on it
    whole = gradient(chunk_loss, log_probs, old, ids, advantages, edge)
    torch.testing.assert_close(
        step_coefficients(log_probs, old, ids, advantages, edge), whole, rtol=1e-12, atol=1e-12
    )


def test_streaming_a_network_one_step_at_a_time():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ).double()
    inputs, advantages, old = draw(6, 16, 3), draw(6, seed=1), draw(6, 16, seed=2, scale=0.1)
    ids = random_chunking(4)

    def log_probs(x):
        return 0.2 * network(x)[..., 0]

    whole = torch.autograd.grad(
        chunk_loss(log_probs(inputs), old, ids, advantages, 0.05), list(network.parameters())
    )
    coefficients = step_coefficients(log_probs(inputs).detach(), old, ids, advantages, 0.05)
    for step in range(16):  # the memory of one step
        (coefficients[:, step] * log_probs(inputs[:, step])).sum().backward()
    for parameter, expected in zip(network.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


# KL


def test_kl_equals_torch_distributions():
    mean, ref, std = draw(3, 4, 5), draw(3, 4, 5, seed=1), torch.tensor([0.5, 1.0, 2.0]).double()
    wide = std[:, None, None].expand_as(mean)
    expected = (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, wide), torch.distributions.Normal(ref, wide)
        )
        .flatten(1)
        .mean(1)
    )
    for shape in (std, std[:, None, None]):
        torch.testing.assert_close(kl_to_reference(mean, ref, shape), expected)
    torch.testing.assert_close(kl_to_reference(mean, ref, 0.5)[0], expected[0])


def test_kl_is_zero_at_the_reference_and_pulls_towards_it():
    mean = torch.tensor([[1.0, 0.0]], requires_grad=True)
    assert kl_to_reference(mean, mean.detach(), 0.5).item() == 0
    kl = kl_to_reference(mean, torch.zeros(1, 2), 0.5)
    kl.sum().backward()
    assert kl.item() == pytest.approx(1.0) and mean.grad.tolist() == [[2.0, 0.0]]


# Diagnostics


def test_diagnostics_by_hand():
    ids = chunk_ids_from_sizes([[1, 1], [2]])
    log_probs, old = torch.tensor([[0.2, -0.2], [0.2, 0.4]]), torch.zeros(2, 2)
    d = diagnose(
        log_probs,
        old,
        ids,
        torch.tensor([1.0, 1.0]),
        0.1,
        rewards=torch.tensor([1.0, 1, 2, 3]),
        group_ids=torch.tensor([0, 0, 1, 1]),
    )
    first = torch.tensor([math.exp(0.2), math.exp(0.3)])
    torch.testing.assert_close(d.ratio_mean, torch.tensor([first.mean(), math.exp(-0.2)]))
    torch.testing.assert_close(d.ratio_std, torch.tensor([first.std(correction=0), 0.0]))
    assert (d.clip_low, d.clip_high, d.zero_variance_share) == (0, pytest.approx(2 / 3), 0.5)
    torch.testing.assert_close(d.log_prob_shift, torch.tensor([0.2, 0.3]))


def test_clip_fractions_count_what_the_gradient_loses():
    ids, old = torch.zeros(3, dtype=torch.long), torch.zeros(200, 3).double()
    log_probs, advantages = draw(200, 3, scale=0.3), draw(200, seed=1)
    d = diagnose(log_probs, old, ids, advantages, 0.1)
    lost = (
        (step_coefficients(log_probs, old, ids, advantages, 0.1) == 0).all(1).double().mean().item()
    )
    assert d.clip_low + d.clip_high == pytest.approx(lost) and d.clip_low > 0 and d.clip_high > 0


def test_diagnostics_of_the_first_update():
    log_probs = draw(4, 5)
    d = diagnose(log_probs, log_probs, RAGGED, draw(4, seed=1), 1e-4)
    assert (
        (d.ratio_mean == 1).all()
        and (d.ratio_std == 0).all()
        and d.clip_low == d.clip_high == 0
        and (d.log_prob_shift == 0).all()
    )
    assert math.isnan(d.zero_variance_share)


# Bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: clipped_objective(
                torch.ones(2, 3), torch.ones(2), 0.1, torch.tensor([[True] * 3, [False] * 3])
            ),
            "row 1 .*selects no chunk",
        ),
        (lambda: clipped_objective(torch.ones(2, 3), torch.ones(3), 0.1), r"\(3,\)"),
        (lambda: clipped_objective(torch.ones(2, 3), torch.ones(2, 4), 0.1), r"\(2, 4\).*\(2, 3\)"),
        (lambda: clipped_objective(torch.ones(2, 3), torch.ones(2), -0.1), "clip_range.*-0.1"),
        (lambda: clipped_objective(torch.ones(2, 3), torch.ones(2), (1.5, 0.1)), "clip_range"),
        (
            lambda: clipped_objective(torch.ones(2, 3), torch.ones(2), 0.1, num_samples=0),
            "num_samples",
        ),
        (
            lambda: clipped_objective(torch.ones(2, 3), torch.ones(2), 0.1, weights=torch.ones(2)),
            r"weights has shape \(2,\)",
        ),
        (
            lambda: clipped_objective(
                torch.ones(2, 3), torch.ones(2), 0.1, torch.ones(2, 4).bool()
            ),
            r"mask has shape \(2, 4\)",
        ),
        (lambda: chunk_ratio(torch.ones(2, 5), torch.ones(2, 4), STEP), r"\(2, 5\) and \(2, 4\)"),
        (lambda: chunk_mean(torch.ones(2, 4), STEP), r"\(2, 4\) and \(5,\)"),
        (lambda: kl_to_reference(torch.ones(2, 3), torch.ones(2, 3), 0.0), "positive std"),
        (
            lambda: kl_to_reference(torch.ones(2, 3), torch.ones(2, 4), 1.0),
            r"\(2, 3\) and \(2, 4\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_maths_imports_torch_only():
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        heavy = 'diffusers transformers accelerate peft pandas matplotlib scipy'\n"
        "        if name.split('.')[0] in heavy.split():\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from chunk_grpo_nb import advantages, chunking, dynamics, objective, schedules, sde\n"
        "from chunk_grpo_nb import trust_regions\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_clip_shares_say_where_the_gradient_is_lost():
    ratio = torch.tensor([[0.8, 1.3, 1.3], [0.8, 0.8, 1.0]])
    advantages = torch.tensor([1.0, -1.0])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    shares = clip_shares(ratio, advantages, 0.1, 0.2, mask)
    assert shares.low.tolist() == [0.5, 0.5, 0.0]
    assert shares.high.tolist() == [0.0, 0.5, 0.0]
    leaf = ratio.clone().requires_grad_()
    clipped_objective(leaf, advantages, (0.1, 0.2), mask=mask).backward()
    lost = ((leaf.grad == 0) & mask).sum(0) / mask.sum(0)
    assert torch.equal(lost, shares.low + shares.high)


def test_clip_shares_are_unknown_where_nothing_is_trained():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert clip_shares(torch.ones(2, 3), torch.ones(2), 0.1, 0.1, nothing).low.isnan().all()
