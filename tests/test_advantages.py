"""Advantages: one reward, several rewards, a weighting for each chunk, and refused rewards."""

import pytest
import torch

from chunk_grpo_nb.advantages import (
    combined_advantages,
    finite_groups,
    group_advantages,
    zero_variance_share,
)

REWARDS = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def random_rewards(seed=0, n=12):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    assert group_advantages(REWARDS, GROUPS, eps=0).tolist() == [-1, 0, 1, -1, 0, 1]
    assert group_advantages(REWARDS, GROUPS, std="none", clip=None).tolist() == [
        -1,
        0,
        1,
        -10,
        0,
        10,
    ]
    by_all = group_advantages(REWARDS, GROUPS, std="global", eps=0)
    torch.testing.assert_close(by_all, torch.tensor([-1.0, 0, 1, -10, 0, 10]) / REWARDS.std())
    torch.testing.assert_close(
        group_advantages(REWARDS, GROUPS, eps=1.0)[:3], torch.tensor([-0.5, 0, 0.5])
    )


def test_clip():
    rewards = torch.tensor([0.0] * 99 + [1.0])
    group = torch.zeros(100)
    assert (
        group_advantages(rewards, group).max() == 5
        and group_advantages(rewards, group, clip=None).max() > 9
    )


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_groups_do_not_mix_and_order_does_not_matter(std):
    rewards, groups = random_rewards(), torch.arange(12) % 3
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    expected = group_advantages(rewards, groups, std)
    torch.testing.assert_close(
        group_advantages(rewards[shuffle], groups[shuffle], std),
        expected[shuffle],
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        group_advantages(rewards, 100 - 7 * groups, std), expected, rtol=1e-12, atol=1e-12
    )
    if std != "global":
        for g in range(3):
            alone = group_advantages(rewards[groups == g], groups[groups == g], std)
            torch.testing.assert_close(alone, expected[groups == g], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_groups_without_spread_and_of_one_sample_get_zero(std):
    third = 1 / 3
    advantages = group_advantages(
        torch.tensor([third, third, third, 0.1, 5.0, 6.0]), torch.tensor([0, 0, 0, 1, 2, 2]), std
    )
    assert (
        advantages[:4].tolist() == [0, 0, 0, 0]
        and torch.isfinite(advantages).all()
        and advantages[4] < 0 < advantages[5]
    )
    assert group_advantages(torch.tensor([0.7]), torch.tensor([4]), std).tolist() == [0]


def test_float64_inside():
    small = group_advantages(torch.tensor([1e8, 1e8 + 8, 1e8 + 16]), torch.zeros(3), eps=0)
    assert small.dtype == torch.float32 and small.tolist() == [-1, 0, 1]
    assert group_advantages(REWARDS.double(), GROUPS).dtype == torch.float64
    assert group_advantages(torch.tensor([1, 2, 3]), torch.zeros(3), eps=0).tolist() == [-1, 0, 1]


def test_zero_variance_share_and_failed_groups():
    assert zero_variance_share(
        torch.tensor([1.0, 1, 2, 3, 5]), torch.tensor([0, 0, 7, 7, 9])
    ) == pytest.approx(2 / 3)
    failed = torch.tensor([1.0, float("nan"), 2, 3])
    assert finite_groups(failed, torch.tensor([0, 0, 1, 1])).tolist() == [False, False, True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_are_refused_by_name(bad):
    rewards = REWARDS.clone()
    rewards[4] = bad
    with pytest.raises(ValueError, match=r"reward 4 \(group 1, 'a red cube'\) is -?(nan|inf)"):
        group_advantages(rewards, GROUPS, names=["a blue ball"] * 4 + ["a red cube"] * 2)
    with pytest.raises(ValueError, match=r"reward 'clip' 4 \(group 1\)"):
        combined_advantages({"pick": REWARDS, "clip": rewards}, GROUPS, {"pick": 1, "clip": 1})
    with pytest.raises(ValueError, match="reward 4"):
        zero_variance_share(rewards, GROUPS)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: group_advantages(REWARDS, GROUPS, std="batch"),
            "'batch'; allowed: group, global, none",
        ),
        (lambda: group_advantages(REWARDS, GROUPS[:3]), r"\(6,\).*\(3,\)"),
        (lambda: group_advantages(REWARDS[None], GROUPS), r"\(1, 6\)"),
        (lambda: group_advantages(REWARDS, GROUPS, clip=0), "clip"),
        (
            lambda: combined_advantages({"a": REWARDS}, GROUPS, {"a": 1}, how="max"),
            "'max'; allowed: sum, gdpo",
        ),
        (lambda: combined_advantages({"a": REWARDS}, GROUPS, {"b": 1}), r"\['a'\] and \['b'\]"),
        (lambda: combined_advantages({}, GROUPS, {}), "at least one"),
        (
            lambda: combined_advantages(
                {"a": REWARDS, "b": REWARDS}, GROUPS, {"a": [1, 2], "b": [1, 2, 3]}
            ),
            "one K for all rewards",
        ),
        (lambda: combined_advantages({"a": REWARDS}, GROUPS, {"a": float("nan")}), "finite"),
        (
            lambda: combined_advantages({"a": REWARDS, "b": REWARDS[:5]}, GROUPS, {"a": 1, "b": 1}),
            r"\(5,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Several rewards


def test_sum_is_the_advantage_of_the_weighted_sum():
    a, b, groups = random_rewards(0), random_rewards(1), torch.arange(12) // 4
    both = combined_advantages({"a": a, "b": b}, groups, {"a": 1.0, "b": 0.3})
    torch.testing.assert_close(both, group_advantages(a + 0.3 * b, groups))
    torch.testing.assert_close(
        combined_advantages({"a": a}, groups, {"a": 2.0}, eps=0), group_advantages(a, groups, eps=0)
    )


def test_gdpo_ignores_the_scale_of_a_reward_and_sum_does_not():
    a, b, groups = random_rewards(0), random_rewards(1), torch.arange(12) // 4

    def combine(how, scale):
        rewards, weights = {"a": a, "b": scale * b}, {"a": 1.0, "b": 1.0}
        return combined_advantages(rewards, groups, weights, how, eps=0)

    torch.testing.assert_close(combine("gdpo", 1.0), combine("gdpo", 1000.0))
    assert (combine("sum", 1.0) - combine("sum", 1000.0)).abs().max() > 0.3


def test_gdpo_by_hand():
    gdpo = combined_advantages(
        {"a": torch.tensor([0.0, 2, 4]), "b": torch.tensor([3.0, 1, 2])},
        torch.zeros(3),
        {"a": 1, "b": 1},
        "gdpo",
        eps=0,
    )
    per_reward = torch.tensor([-1.0, 0, 1]) + torch.tensor([1.0, -1, 0])
    torch.testing.assert_close(gdpo, (per_reward - per_reward.mean()) / per_reward.std())


@pytest.mark.parametrize("how", ["sum", "gdpo"])
def test_another_weighting_for_each_chunk(how):
    a, b, groups = random_rewards(0), random_rewards(1), torch.arange(12) // 4
    advantages = combined_advantages(
        {"a": a, "b": b}, groups, {"a": [1.0, 0.5, 0.0], "b": [0.0, 0.5, 1.0]}, how
    )
    assert advantages.shape == (12, 3)
    for chunk, (wa, wb) in enumerate([(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]):
        torch.testing.assert_close(
            advantages[:, chunk],
            combined_advantages({"a": a, "b": b}, groups, {"a": wa, "b": wb}, how),
        )
    rows = torch.tensor([[1.0, 0.5, 0.0]]).expand(
        12, 3
    )  # the same, given per sample and chunk, beside a plain number
    mixed = combined_advantages({"a": a, "b": b}, groups, {"a": rows, "b": 1.0}, how)
    torch.testing.assert_close(
        mixed[:, 2], combined_advantages({"a": a, "b": b}, groups, {"a": 0.0, "b": 1.0}, how)
    )


def test_a_chunk_without_any_reward_is_not_trained():
    advantages = combined_advantages(
        {"a": random_rewards()}, torch.arange(12) // 4, {"a": [1.0, 0.0]}
    )
    assert (advantages[:, 1] == 0).all() and (advantages[:, 0] != 0).any()
