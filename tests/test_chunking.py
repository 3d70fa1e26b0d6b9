"""Chunkings: representation, adaptive rule, least squares, online chunker, weighted draws."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_grpo_nb.chunking import (
    OnlineChunker,
    adaptive_chunks,
    chunk_ids_from_sizes,
    chunk_lengths,
    chunk_mask,
    chunk_sizes_from_ids,
    chunk_sum,
    chunk_to_steps,
    chunk_weights,
    make_chunker,
    segment_chunks,
    select_chunks,
)

MEASURED = [
    0.748,
    0.774,
    0.533,
    0.451,
    0.403,
    0.377,
    0.359,
    0.351,
    0.345,
    0.346,
    0.350,
    0.356,
    0.371,
    0.383,
    0.392,
    0.404,
]
PAPER = chunk_ids_from_sizes([2, 3, 4, 7])
RAGGED = chunk_ids_from_sizes([[2, 2, 1], [1, 4], [5]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Representation


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_sizes_and_ids_are_inverses(sizes):
    assert chunk_sizes_from_ids(chunk_ids_from_sizes(sizes)) == sizes


def test_rows_of_sizes_and_their_mask():
    assert chunk_sizes_from_ids(RAGGED) == [[2, 2, 1], [1, 4], [5]]
    assert chunk_mask(RAGGED).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
    ]
    assert chunk_mask(PAPER, 6).tolist() == [[True] * 4 + [False] * 2]
    assert chunk_lengths(RAGGED).tolist() == [[2, 2, 1], [1, 4, 0], [5, 0, 0]]


def test_sums_per_chunk_and_back_to_steps():
    values = torch.arange(15.0).reshape(3, 5)
    sums = chunk_sum(values, RAGGED)
    assert sums.tolist() == [[1, 5, 4], [5, 30, 0], [60, 0, 0]]
    assert chunk_to_steps(sums, RAGGED).tolist() == [[1, 1, 5, 5, 4], [5, 30, 30, 30, 30], [60] * 5]
    assert torch.equal(
        chunk_sum(values, RAGGED[0]),
        torch.stack([chunk_sum(row[None], RAGGED[0])[0] for row in values]),
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: chunk_ids_from_sizes([2, 3], steps=16), r"sum to 5.* 16"),
        (lambda: chunk_ids_from_sizes([2, 0, 3]), "at least 1"),
        (lambda: chunk_ids_from_sizes([]), "at least 1"),
        (lambda: chunk_ids_from_sizes([[2, 2], [1, 1]]), "sum to 2.* 4"),
        (lambda: chunk_mask(torch.tensor([0, 2])), "rise by 0 or 1"),
        (lambda: chunk_mask(torch.tensor([0, 1, 0])), "rise by 0 or 1"),
        (lambda: chunk_mask(torch.tensor([1, 1])), "start at 0"),
        (lambda: chunk_mask(torch.tensor([0.0, 1.0])), "integer"),
        (lambda: chunk_mask(PAPER, 3), "num_chunks is 3.*4 chunks"),
        (lambda: chunk_sum(torch.zeros(2, 15), PAPER), r"\(2, 15\).*\(16,\)"),
        (lambda: chunk_to_steps(torch.zeros(2, 3), PAPER), r"\(2, 3\)"),
    ],
)
def test_bad_chunkings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The adaptive rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaptive_on_the_measured_curve(dtype):
    assert chunk_sizes_from_ids(adaptive_chunks(torch.tensor(MEASURED, dtype=dtype))) == [
        2,
        3,
        4,
        4,
        3,
    ]


@pytest.mark.parametrize(
    "curve, options, sizes",
    [
        (torch.ones(16), {}, [4, 4, 4, 4]),  # constant: halved until small enough
        (
            torch.linspace(1, 0.2, 16),
            {},
            [4, 4, 4, 4],
        ),  # a straight line has no second difference beyond rounding
        (torch.linspace(1, 0.2, 16), {"max_size": 16}, [16]),  # nothing to cut
        (torch.linspace(1, 0.2, 17), {}, [4, 4, 4, 5]),  # the midpoint of n is n // 2
        (torch.tensor([1.0, 2, 3, 2, 1, 0]), {"max_size": 3}, [3, 3]),  # up, then down
        (
            torch.tensor([1.0, 2, 3, 2.95, 4, 5, 6, 7]),
            {"max_size": 4},
            [4, 4],
        ),  # a run of one joins its left neighbour
        (torch.tensor([1.0, 2, 3, 2.95, 4, 5, 6, 7]), {"max_size": 4, "tolerance": 0.1}, [4, 4]),
        (
            torch.tensor([1.0, 2, 1, 2, 1, 2]),
            {"max_size": 2},
            [3, 3],
        ),  # zigzag: all runs too short, so the midpoint; 3 < 2 * min_size
        (torch.tensor([3.0]), {}, [1]),
        (torch.tensor([3.0, 1.0, 2.0]), {"max_size": 1}, [3]),
        (torch.tensor([3.0, 1.0, 2.0]), {"max_size": 1, "min_size": 1}, [1, 1, 1]),
    ],
)
def test_adaptive_by_hand(curve, options, sizes):
    assert chunk_sizes_from_ids(adaptive_chunks(curve, **options)) == sizes


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(0, 2, width=32), min_size=1, max_size=24),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 8)),
    st.floats(0, 0.5),
)
def test_adaptive_covers_every_step_once_in_order(values, min_size, max_size, tolerance):
    ids = adaptive_chunks(torch.tensor(values), min_size, max_size, tolerance)
    sizes, limit = chunk_sizes_from_ids(ids), max_size or -(-len(values) // 3)
    assert sum(sizes) == len(values) and ids[0] == 0 and set(ids.diff().tolist()) <= {0, 1}
    assert min(sizes) >= min(min_size, len(values))  # no cut leaves a part below min_size
    assert max(sizes) <= max(limit, 2 * min_size - 1)  # what could be cut was cut


@settings(max_examples=50, deadline=None)
@given(st.integers(6, 24), st.sampled_from([1.0, -1.0]), st.integers(0, 1000))
def test_adaptive_does_not_depend_on_scale_offset_or_company(n, sign, seed):
    curve = 1 + torch.rand(n, generator=generator(seed), dtype=torch.float64)
    alone = adaptive_chunks(curve)
    assert torch.equal(alone, adaptive_chunks(8 * curve))  # powers of two are exact
    assert torch.equal(alone, adaptive_chunks(torch.stack([curve.flip(0), curve]))[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["adaptive", "adaptive:mean", "segment:4", "online"])
def test_curves_that_are_not_finite_are_refused(bad, spec):
    curve = torch.tensor([MEASURED, MEASURED])
    curve[1, 3] = bad
    with pytest.raises(ValueError, match=r"at index \[1, 3\]"):
        make_chunker(spec)(curve)


@pytest.mark.parametrize("options", [{"min_size": 0}, {"max_size": 0}, {"tolerance": -0.1}])
def test_adaptive_refuses_bad_options(options):
    with pytest.raises(ValueError, match="at least"):
        adaptive_chunks(torch.tensor(MEASURED), **options)


# Least squares


@pytest.mark.parametrize("min_size", [1, 2])
def test_segments_are_the_best_of_all_cuts(min_size):
    curve, k = torch.rand(9, generator=generator(), dtype=torch.float64), 3

    def cost(sizes):
        return sum((part - part.mean()).square().sum() for part in curve.split(sizes))

    every = [[a, b - a, 9 - b] for a, b in itertools.combinations(range(1, 9), 2)]
    best = min((sizes for sizes in every if min(sizes) >= min_size), key=cost)
    assert chunk_sizes_from_ids(segment_chunks(curve, k, min_size)) == best


def test_segments_find_the_steps_of_a_staircase():
    curve = torch.tensor([3.0, 3, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    noisy = curve + 0.1 * torch.randn(8, 16, generator=generator())
    assert chunk_sizes_from_ids(segment_chunks(noisy, 4)) == [2, 3, 4, 7]


@pytest.mark.parametrize("count, min_size", [(0, 1), (17, 1), (6, 3)])
def test_impossible_segments_are_refused(count, min_size):
    with pytest.raises(ValueError, match="16 steps cannot be cut"):
        segment_chunks(torch.tensor(MEASURED), count, min_size)


# By name


@pytest.mark.parametrize(
    "spec, sizes",
    [
        ("step", [1] * 16),
        ("sequence", [16]),
        ("fixed:2,3,4,7", [2, 3, 4, 7]),
        ("uniform:4", [4] * 4),
        ("uniform:3", [5, 5, 6]),
        ("adaptive", [2, 3, 4, 4, 3]),
        ("adaptive:mean", [2, 3, 4, 4, 3]),
        ("segment:2", [2, 14]),
        ("online", [2, 3, 4, 4, 3]),
        ("online:segment:2", [2, 14]),
    ],
)
def test_every_chunker_by_name(spec, sizes):
    assert chunk_sizes_from_ids(make_chunker(spec)(torch.tensor(MEASURED))) == sizes


def test_adaptive_per_trajectory_group_or_iteration():
    curve = torch.tensor(MEASURED) * (1 + 0.05 * torch.randn(12, 16, generator=generator()))
    groups = torch.tensor([0, 1] * 6)
    own, grouped, mean = (
        make_chunker(f"adaptive:{over}")(curve, group_ids=groups)
        for over in ("trajectory", "group", "mean")
    )
    assert torch.equal(own, adaptive_chunks(curve)) and len(own.unique(dim=0)) > 2
    assert torch.equal(grouped[0], adaptive_chunks(curve[::2].mean(0))) and torch.equal(
        grouped[1], adaptive_chunks(curve[1::2].mean(0))
    )
    assert len(grouped[::2].unique(dim=0)) == 1
    assert torch.equal(mean, adaptive_chunks(curve.mean(0)))


@pytest.mark.parametrize(
    "spec, options, message",
    [
        (
            "adaptative",
            {},
            "adaptative.*allowed: adaptive, fixed, online, segment, sequence, step, uniform",
        ),
        ("fixed:2,x", {}, "whole number.*'x'"),
        ("fixed", {}, "whole number"),
        ("uniform", {}, "whole number"),
        ("segment:0", {}, "at least 1"),
        ("step:2", {}, "no argument"),
        ("adaptive:prompt", {}, "per trajectory, group or mean"),
        ("step", {"min_size": 2}, "min_size"),
    ],
)
def test_unknown_chunkers_are_refused(spec, options, message):
    with pytest.raises(ValueError, match=message):
        make_chunker(spec, **options)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("fixed:2,3,4", "sum to 9, but there are 16"),
        ("uniform:17", "more chunks than there are steps"),
        ("adaptive:group", "group_ids"),
    ],
)
def test_chunkers_that_do_not_fit_the_curve_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_chunker(spec)(torch.tensor([MEASURED]))


# Online


def rollout_curves(shape, seed, count=96, noise=0.02):
    return torch.tensor(shape) * (
        1 + noise * torch.randn(count, len(shape), generator=generator(seed))
    )


def test_online_running_mean_is_the_mean_without_forgetting():
    online, seen = (
        make_chunker("online", decay=1.0),
        [rollout_curves(MEASURED, seed, count=5 + seed) for seed in range(4)],
    )
    for curves in seen:
        online(curves)
    everything = torch.cat(seen).double()
    torch.testing.assert_close(online.estimate.mean, everything.mean(0))
    torch.testing.assert_close(online.estimate.scatter / (len(everything) - 1), everything.T.cov())


def test_online_holds_still_under_noise_and_moves_when_the_curve_does():
    step = [1.0] * 4 + [0.5] * 12
    online = make_chunker("online:segment:2")
    chunkings = [chunk_sizes_from_ids(online(rollout_curves(step, seed))) for seed in range(10)]
    assert chunkings == [[4, 12]] * 10
    later = [1.0] * 8 + [0.5] * 8
    chunkings = [
        chunk_sizes_from_ids(online(rollout_curves(later, 10 + seed))) for seed in range(20)
    ]
    assert chunkings[0] == [4, 12] and chunkings[-1] == [
        8,
        8,
    ]  # one iteration is not enough, twenty are
    assert sum(a != b for a, b in itertools.pairwise(chunkings)) == 1  # and it moves once


def test_online_does_not_move_on_disagreement():
    flat = [1.0] * 16  # any cut is as good as any other
    online = make_chunker("online:segment:2")
    first = online(rollout_curves(flat, 0))
    for seed in range(1, 10):
        assert torch.equal(online(rollout_curves(flat, seed)), first) and online.agreement < 0.8


def test_online_continues_from_its_state():
    one, two = make_chunker("online"), make_chunker("online")
    for seed in range(3):
        one(rollout_curves(MEASURED, seed))
    two.load_state_dict(one.state_dict())
    for seed in range(3, 6):
        assert torch.equal(one(rollout_curves(MEASURED, seed)), two(rollout_curves(MEASURED, seed)))
    assert torch.equal(one.estimate.mean, two.estimate.mean) and one.agreement == two.agreement


def test_online_refuses_what_does_not_fit():
    online = make_chunker("online")
    online(rollout_curves(MEASURED, 0))
    with pytest.raises(ValueError, match="16 steps, now one of 10"):
        online(torch.rand(3, 10))
    with pytest.raises(ValueError, match="missing or unexpected: agreement"):
        online.load_state_dict({k: v for k, v in online.state_dict().items() if k != "agreement"})
    with pytest.raises(ValueError, match="confidence"):
        OnlineChunker(adaptive_chunks, confidence=0.3)


# Weighted draws


def test_weights_by_hand():
    weights = chunk_weights(
        torch.tensor([[4.0, 2.0, 1.0, 0.0]] * 2), torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    )
    torch.testing.assert_close(weights, torch.tensor([[3 / 3.5, 0.5 / 3.5], [1.0, 0.0]]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_weights_sum_to_one_and_leave_padding_alone(seed, share):
    curve = torch.rand(6, 16, generator=generator(seed)) + 0.01
    ids = adaptive_chunks(curve)
    weights = chunk_weights(curve, ids, uniform_share=share)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert (weights[~chunk_mask(ids)] == 0).all() and (weights >= 0).all()


def test_annealing_ends_at_uniform():
    curve = torch.tensor([MEASURED])
    torch.testing.assert_close(
        chunk_weights(curve, PAPER, uniform_share=1.0), torch.full((1, 4), 0.25)
    )
    halfway = chunk_weights(curve, PAPER, uniform_share=0.5)
    torch.testing.assert_close(halfway, (chunk_weights(curve, PAPER) + 0.25) / 2)


@pytest.mark.parametrize(
    "fraction, counts", [(0.5, [1, 1, 1]), (2 / 3, [2, 1, 1]), (1.0, [3, 2, 1]), (0.01, [1, 1, 1])]
)
def test_select_counts_per_row_never_padding(fraction, counts):
    selected = select_chunks(None, RAGGED, fraction, generator())
    assert selected.sum(1).tolist() == counts and not (selected & ~chunk_mask(RAGGED)).any()


def test_select_for_one_chunking_of_all():
    assert select_chunks(None, PAPER, 0.5, generator()).shape == (1, 4)
    selected = select_chunks(None, PAPER, 0.5, generator(), batch_size=7)
    assert selected.shape == (7, 4) and (selected.sum(1) == 2).all()
    assert select_chunks(torch.rand(5, 4), PAPER, 0.5, generator()).shape == (5, 4)


def test_select_frequencies_are_the_weights():
    weights = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(20_000, -1)
    first = select_chunks(weights, PAPER, 0.25, generator()).double().mean(0)
    torch.testing.assert_close(first, weights[0].double(), atol=0.012, rtol=0)
    pairs = select_chunks(weights, PAPER, 0.5, generator()).double().mean(0)
    inclusion = [
        sum(w[i] * (1 if k == i else w[k] / (1 - w[i])) for i in range(3))
        for w in [[0.5, 0.3, 0.2]]
        for k in range(3)
    ]
    torch.testing.assert_close(pairs[:3], torch.tensor(inclusion).double(), atol=0.012, rtol=0)


def test_select_is_reproducible_and_row_generators_make_rows_independent():
    curve = torch.rand(4, 16, generator=generator())
    ids = adaptive_chunks(curve)
    weights = chunk_weights(curve, ids)
    assert torch.equal(
        select_chunks(weights, ids, 0.5, generator(1)),
        select_chunks(weights, ids, 0.5, generator(1)),
    )
    together = select_chunks(weights, ids, 0.5, [generator(row) for row in range(4)])
    for row in range(4):
        count = int(ids[row].max()) + 1
        alone = select_chunks(
            weights[row : row + 1, :count], ids[row : row + 1], 0.5, generator(row)
        )
        assert torch.equal(alone[0], together[row, :count])


def test_select_specific_chunks_only():
    assert (
        select_chunks(None, PAPER, 1.0, generator(), batch_size=3, only=[0]).tolist()
        == [[True, False, False, False]] * 3
    )
    assert not select_chunks(None, PAPER, 0.5, generator(), batch_size=50, only=[1, 3])[
        :, [0, 2]
    ].any()
    with pytest.raises(ValueError, match=r"row 1 has none of the chunks \[2\]"):
        select_chunks(None, RAGGED, 1.0, generator(), only=[2])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: select_chunks(None, PAPER, 0.0, generator()), "fraction.*got 0"),
        (lambda: select_chunks(None, PAPER, 1.5, generator()), "fraction.*got 1.5"),
        (
            lambda: select_chunks(None, RAGGED, 0.5, generator(), batch_size=4),
            "batch sizes disagree",
        ),
        (
            lambda: select_chunks(torch.rand(3, 4), PAPER, 0.5, generator(), batch_size=4),
            "batch sizes disagree",
        ),
        (lambda: select_chunks(torch.rand(3, 5), PAPER, 0.5, generator()), r"shape \(3, 4\)"),
        (
            lambda: select_chunks(torch.tensor([[1.0, -1, 1, 1]]), PAPER, 0.5, generator()),
            "non-negative",
        ),
        (
            lambda: select_chunks(torch.tensor([[1.0, 0, 0, 0]]), PAPER, 0.5, generator()),
            "row 0 has to draw 2 chunks",
        ),
        (lambda: select_chunks(None, PAPER, 0.5, [generator()], batch_size=2), "1 for 2 rows"),
        (lambda: chunk_weights(torch.zeros(2, 16), PAPER), "row 0"),
        (lambda: chunk_weights(-torch.ones(2, 16), PAPER), "non-negative"),
        (lambda: chunk_weights(torch.ones(2, 16), PAPER, uniform_share=2), "uniform_share"),
    ],
)
def test_bad_draws_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("spec", [None, ["step"], 4, "", "uniform:²", "fixed:2,٣", "uniform:1e3"])
def test_odd_specs_are_refused_in_words(spec):
    with pytest.raises(ValueError, match="chunker"):
        make_chunker(spec)


def test_empty_curves_are_refused():
    with pytest.raises(ValueError, match="curve"):
        adaptive_chunks(torch.zeros(0))


def test_chunking_hands_on_the_names_of_the_modules_below():
    from chunk_grpo_nb import boundaries, chunking, chunks, online, selection

    assert chunking.chunk_ids_from_sizes is chunks.chunk_ids_from_sizes
    assert chunking.chunk_weights is selection.chunk_weights
    assert chunking.select_chunks is selection.select_chunks
    for module in (boundaries, chunks, online, selection):
        handed_on = set(module.__all__) - {"check_chunk_ids", "check_curve", "describe_value"}
        assert handed_on <= set(chunking.__all__)
