"""Rollouts: names instead of global randomness, scoring beside sampling, failures at once."""

import time

import pytest
import torch
from stub_policy import StubPolicy

from chunk_grpo_nb.models.sampler import Sampler
from chunk_grpo_nb.prompts import Prompt
from chunk_grpo_nb.rewards.registry import RewardError
from chunk_grpo_nb.training.rollout import (
    BackgroundScorer,
    derive_seed,
    draw_rollout,
    group_seeds,
    scorer,
)

PROMPTS = [Prompt(text, {}) for text in ("red", "green", "blue")]


def brightness(images, prompts, metadata):
    return [sum(image.resize((1, 1)).getpixel((0, 0))) for image in images]


def rollout(policy=None, score=None, **options):
    score = score or scorer({"brightness": brightness})
    options = {"iteration": 3, "seed": 1, "group_size": 4} | options
    return draw_rollout(policy or StubPolicy(), PROMPTS, Sampler(4), score, **options)


def test_seeds_depend_on_every_part_of_the_name():
    names = [(0, 1, 2, "init"), (0, 1, 2, "sde"), (0, 2, 1, "init"), (1, 1, 2, "init"), (0, 12)]
    assert len({derive_seed(*name) for name in names}) == len(names)


def test_same_noise_is_shared_within_a_group_only():
    seeds = group_seeds(0, 1, [0, 0, 1, 1], [0, 1, 0, 1], same_noise=True)
    assert seeds.initial[0] == seeds.initial[1] and seeds.initial[2] == seeds.initial[3]
    assert seeds.initial[0] != seeds.initial[2] and len(set(seeds.noise)) == 4


@pytest.mark.parametrize("batch", [1, 3, 5, 12, 100])
def test_batches_change_nothing(batch):
    policy = StubPolicy()
    whole, parts = rollout(), rollout(policy, batch=batch)
    assert max(map(len, policy.batches)) <= batch
    assert torch.equal(whole.log_probs, parts.log_probs)
    assert torch.equal(whole.curves, parts.curves)
    assert torch.equal(whole.rewards["brightness"], parts.rewards["brightness"])
    assert [parts.recordings[p.recording].latents[p.row, 0, 0, 0, 0] for p in places(parts)] == [
        whole.recordings[p.recording].latents[p.row, 0, 0, 0, 0] for p in places(whole)
    ]


def places(drawn):
    return [drawn.locate(i) for i in drawn.samples]


def test_processes_share_the_same_samples():
    whole = rollout()
    parts = [rollout(share=(process, 3)) for process in range(3)]
    assert torch.equal(whole.log_probs, torch.cat([part.log_probs for part in parts]))
    assert sum((part.samples for part in parts), []) == whole.samples
    with pytest.raises(ValueError, match="12 samples cannot be shared equally by 5"):
        rollout(share=(0, 5))


def test_the_first_failure_stops_the_drawing():
    policy = StubPolicy()

    def broken(images, prompts, metadata):
        raise OSError("no weights")

    with pytest.raises(RewardError, match="no weights"):
        rollout(policy, scorer({"broken": broken}), batch=1)
    assert len(policy.batches) <= 3  # of 12


def test_batches_that_wait_are_dropped_after_a_failure():
    scored = []

    def slow(images, prompts):
        scored.append(images)
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        with BackgroundScorer(slow) as background:
            for batch in range(2):
                background.submit([batch], [None])
            raise KeyboardInterrupt
    assert len(scored) <= 1


def test_scoring_falls_one_batch_behind_and_no_more():
    drawn, scored, ahead = 0, 0, []

    def slow(images, prompts):
        nonlocal scored
        time.sleep(0.01)
        scored += 1
        return {"r": torch.zeros(1)}

    with BackgroundScorer(slow) as background:
        for _ in range(6):
            drawn += 1
            background.submit([None], [None])
            ahead.append(drawn - scored)
        assert len(background.scores()["r"]) == 6
    assert max(ahead) <= 2


def test_rewards_run_without_gradients():
    weight = torch.nn.Parameter(torch.ones(1))
    seen = []

    def reward(images, prompts, metadata):
        seen.append((weight * 2).requires_grad)
        return [1.0] * len(images)

    with torch.no_grad():
        rollout(score=scorer({"r": reward}))
    rollout(score=scorer({"r": reward}), batch=4)
    assert seen == [False] * 4


def win_share(images, prompts, metadata):
    """A reward of whole groups: the share of the group that an image is at least as bright as."""
    values = brightness(images, prompts, metadata)
    return [sum(v >= other for other in values) / len(values) for v in values]


win_share.whole_group = True


@pytest.mark.parametrize("batch", [1, 3, 5, 12])
def test_rewards_of_whole_groups_see_whole_groups(batch):
    score = scorer({"wins": win_share, "brightness": brightness})
    whole, parts = rollout(score=score), rollout(score=score, batch=batch)
    assert torch.equal(whole.rewards["wins"], parts.rewards["wins"])
    assert torch.equal(whole.rewards["brightness"], parts.rewards["brightness"])
    values = whole.rewards["brightness"].reshape(3, 4)
    expected = (values[:, :, None] >= values[:, None]).double().mean(2).flatten()
    assert torch.equal(whole.rewards["wins"], expected)


def test_two_slots_of_one_prompt_are_two_groups():
    score = scorer({"wins": win_share})
    options = {"iteration": 0, "seed": 1, "group_size": 4}
    twice = draw_rollout(StubPolicy(), [PROMPTS[0]] * 2, Sampler(4), score, **options)
    assert (twice.rewards["wins"].reshape(2, 4).max(1).values == 1).all()


def test_processes_do_not_split_the_groups_of_such_a_reward():
    with pytest.raises(ValueError, match="make prompts_per_iteration a multiple of 2"):
        rollout(score=scorer({"wins": win_share}), share=(0, 2))
    rollout(score=scorer({"brightness": brightness}), share=(0, 2))
