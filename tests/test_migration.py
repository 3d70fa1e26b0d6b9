"""Settings of other trainers: a row of data/migration.yaml is accepted, trains, means the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.advantages import combined_advantages, group_advantages
from chunk_grpo_nb.chunking import chunk_ids_from_sizes, chunk_weights, make_chunker, select_chunks
from chunk_grpo_nb.objective import chunk_ratio, clipped_objective, kl_to_reference
from chunk_grpo_nb.schedules import sigma_schedule
from chunk_grpo_nb.sde import sde_step
from chunk_grpo_nb.training.config import flat, make_config, read_yaml
from chunk_grpo_nb.training.records import read_rows
from chunk_grpo_nb.training.trainer import train
from chunk_grpo_nb.trust_regions import divergence_weights

PEERS = read_yaml(Path(__file__).resolve().parent.parent / "data" / "migration.yaml")
ROWS = [(peer, row) for peer, content in PEERS.items() for row in content["rows"]]
CHECKED = [(peer, row) for peer, row in ROWS if "check" in row]
NAMES = [f"{peer} {row['flag']}" for peer, row in ROWS]


def settings(peer: str) -> dict:
    """All settings here that a peer's example stands for."""
    return {name: value for row in PEERS[peer]["rows"] for name, value in row["ours"].items()}


@pytest.mark.parametrize("peer, row", ROWS, ids=NAMES)
def test_a_row_is_accepted_beside_the_others(peer, row):
    found = flat(make_config(settings(peer)))
    assert {name: found[name] for name in row["ours"]} == row["ours"]
    assert row["ours"] or row["differs"], "a row without a counterpart says so"
    assert set(row) <= {"flag", "value", "ours", "differs", "check"}


@pytest.mark.parametrize("peer", PEERS)
def test_no_flag_stands_twice(peer):
    flags = [row["flag"] for row in PEERS[peer]["rows"]]
    assert len(flags) == len(set(flags))
    assert len(PEERS[peer]["commit"]) == 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("migration"))


@pytest.mark.parametrize("peer", PEERS)
def test_an_iteration_with_all_settings_of_a_peer(folder, peer):
    """As in their example, but for the model, its size, prompts, rewards and numbers of images."""
    theirs = settings(peer)
    rewards = dict(zip(("redness", "greenness"), theirs["rewards"].values()))
    small = {"model": str(folder / "flux"), "height": 16, "width": 16, "dtype": "float32"}
    small |= {"validation_height": None, "validation_width": None, "track": None}
    small |= {"prompts_per_iteration": 2, "group_size": 6, "rewards": rewards, "iterations": 1}
    small |= {"mixed_precision": "no", "validate_every": 0, "micro_batch": 0}
    run = train(tiny_config(folder, **theirs | small), folder / peer)
    rows = read_rows(run)
    assert len(rows) == theirs["updates_per_iteration"]
    assert rows["grad_norm"].gt(0).all() and rows["evaluations_trained"].gt(0).all()


CHECKS = {}


def check(function):
    """A test of what a row means, by its name."""
    CHECKS[function.__name__] = function
    return function


@pytest.mark.parametrize(
    "peer, row", CHECKED, ids=[f"{p} {r['check']} {r['flag']}" for p, r in CHECKED]
)
def test_a_row_means_the_same(peer, row):
    CHECKS[row["check"]](row["value"], make_config(settings(peer)), peer)


def test_every_check_is_used():
    assert {row["check"] for _, row in CHECKED} == set(CHECKS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VELOCITY, LATENTS = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
GROUPS = torch.arange(24) // 6


@check
def flow_step(value, config, peer):
    """The transition of Flow-GRPO's step, written out."""
    s = config.sampling
    for sigma, after in ((0.8, 0.7), (0.3, 0.2)):
        spread = (sigma / (1 - sigma)) ** 0.5 * s.noise_level
        mean = LATENTS * (1 + spread**2 / (2 * sigma) * (after - sigma))
        mean = mean + VELOCITY * (1 + spread**2 * (1 - sigma) / (2 * sigma)) * (after - sigma)
        found = sde_step(VELOCITY, LATENTS, sigma, after, s.noise_level, s.sde)
        torch.testing.assert_close(found.mean, mean)
        assert float(found.std.reshape(-1)[0]) == pytest.approx(spread * (sigma - after) ** 0.5)


@check
def dance_step(value, config, peer):
    """The transition of DanceGRPO's step, written out; `eta` is the noise level."""
    s, sigma, after = config.sampling, 0.8, 0.7
    clean = LATENTS - sigma * VELOCITY
    score = -(LATENTS - clean * (1 - sigma)) / sigma**2
    mean = LATENTS + (after - sigma) * (VELOCITY - 0.5 * value**2 * score)
    found = sde_step(VELOCITY, LATENTS, sigma, after, s.noise_level, s.sde)
    torch.testing.assert_close(found.mean, mean)
    assert float(found.std.reshape(-1)[0]) == pytest.approx(value * (sigma - after) ** 0.5)


@check
def cps_log_prob(value, config, peer):
    """Their log-ratio under CPS is ours times 2 std^2."""
    old, new = (sde_step(v, LATENTS, 0.8, 0.7, 0.7, "cps") for v in (VELOCITY, VELOCITY + 0.1))
    state = old.mean + old.std * normal(3, 4, 5, seed=3)
    theirs = [-(state - found.mean).square().mean((1, 2)) for found in (old, new)]
    ours = [found.log_prob(state) for found in (old, new)]
    doubled = 2 * old.std.square().reshape(-1)
    torch.testing.assert_close(
        (ours[1] - ours[0]) * doubled, theirs[1] - theirs[0], check_dtype=False
    )


@check
def shifted_schedule(value, config, peer):
    even = torch.linspace(1, 0, config.sampling.num_steps + 1)
    theirs = value * even / (1 + (value - 1) * even)
    ours = sigma_schedule(config.sampling.num_steps, config.sampling.shift)
    torch.testing.assert_close(ours.float(), theirs)


@check
def clipped_loss(value, config, peer):
    """The mean over samples and trained steps of the larger of two losses."""
    low, high = config.objective.clip_low, config.objective.clip_high
    assert value in (low, high)
    ratio, advantages = (normal(6, 4) * 2 * value).exp(), normal(6, seed=4)
    theirs = torch.maximum(
        -advantages[:, None] * ratio, -advantages[:, None] * ratio.clamp(1 - low, 1 + high)
    ).mean()
    torch.testing.assert_close(clipped_objective(ratio, advantages, (low, high)), theirs)


@check
def advantage_clip(value, config, peer):
    rewards = torch.zeros(24, dtype=torch.float64)
    rewards[0] = 1.0
    assert config.objective.advantage_clip == value
    wild = group_advantages(rewards, torch.zeros(24), std="none", clip=None) * 100
    found = group_advantages(rewards * 100, torch.zeros(24), std="none", clip=value)
    torch.testing.assert_close(found, wild.clamp(-value, value))


def advantages_of(rewards: torch.Tensor, config) -> torch.Tensor:
    return group_advantages(rewards, GROUPS, config.objective.advantage_std, clip=None)


def centred(rewards: torch.Tensor) -> torch.Tensor:
    return (rewards.view(4, 6) - rewards.view(4, 6).mean(1, keepdim=True)).reshape(-1)


@check
def population_std(value, config, peer):
    """Their std divides by n: ours are sqrt((n - 1) / n) of their advantages."""
    rewards = normal(24, seed=5)
    n = 24 if value else 6
    spread = np.std(rewards.numpy()) if value else np.std(rewards.view(4, 6).numpy(), 1)
    theirs = centred(rewards) / torch.as_tensor(spread).repeat_interleave(24 // np.size(spread))
    factor = ((n - 1) / n) ** 0.5
    torch.testing.assert_close(advantages_of(rewards, config), theirs * factor, rtol=2e-3, atol=0)


@check
def global_std(value, config, peer):
    rewards = normal(24, seed=5)
    theirs = centred(rewards) / (rewards.std() + 1e-4)
    torch.testing.assert_close(advantages_of(rewards, config), theirs)


@check
def group_std(value, config, peer):
    rewards = normal(24, seed=5)
    theirs = centred(rewards) / (rewards.view(4, 6).std(1).repeat_interleave(6) + 1e-8)
    torch.testing.assert_close(advantages_of(rewards, config), theirs, rtol=1e-3, atol=0)


@check
def no_std(value, config, peer):
    rewards = normal(24, seed=5)
    plain = make_config(advantage_std="none")
    torch.testing.assert_close(advantages_of(rewards, plain), centred(rewards))


def sum_of_advantages(rewards: dict, ddof: int) -> torch.Tensor:
    """Each reward normalised in its groups, then added."""
    parts = []
    for values in rewards.values():
        spread = values.view(4, 6).std(1, correction=ddof).repeat_interleave(6)
        parts.append(centred(values) / spread)
    return torch.stack(parts).sum(0)


@check
def mix_rewards(value, config, peer):
    """Ours are theirs, divided once more by the std over the batch."""
    rewards = {"a": normal(24, seed=6), "b": 100 * normal(24, seed=7)}
    theirs = sum_of_advantages(rewards, ddof=1)
    ours = combined_advantages(
        rewards, GROUPS, {"a": 1.0, "b": 1.0}, how=config.objective.reward_mix, clip=None
    )
    torch.testing.assert_close(ours * theirs.std(), theirs, rtol=2e-3, atol=1e-3)


@check
def gdpo(value, config, peer):
    """The same up to the n of the stds."""
    rewards = {"a": normal(24, seed=6), "b": 100 * normal(24, seed=7)}
    total = sum_of_advantages(rewards, ddof=0)
    theirs = (total - total.mean()) / total.std(correction=0)
    ours = combined_advantages(rewards, GROUPS, {"a": 1.0, "b": 1.0}, how=value, clip=None)
    assert config.objective.reward_mix == value
    torch.testing.assert_close(ours, theirs * (23 / 24) ** 0.5, rtol=2e-3, atol=1e-3)


@check
def flow_kl(value, config, peer):
    """Their KL is ours times the stride of the step; strides have the mean 1 / num_steps."""
    steps = config.sampling.num_steps
    assert config.objective.kl_weight == pytest.approx(value / steps)
    strides = -sigma_schedule(steps, 3.0).diff()
    assert float(strides.mean()) == pytest.approx(1 / steps)
    mean, other, spread = normal(3, 4, 5, seed=8), normal(3, 4, 5, seed=9), 0.9
    for stride in strides[:3].tolist():
        theirs = (mean - other).square().mean((1, 2)) / (2 * spread**2)
        std = torch.full((3, 1, 1), spread * stride**0.5, dtype=torch.float64)
        torch.testing.assert_close(kl_to_reference(mean, other, std) * stride, theirs)


@check
def factory_kl(value, config, peer):
    """Their distance of means is ours times 2 std^2."""
    assert config.objective.kl_weight == value == 0
    mean, other, std = normal(3, 4, 5), normal(3, 4, 5, seed=9), 0.3
    theirs = (mean - other).square().mean((1, 2))
    wide = torch.full((3, 1, 1), std, dtype=torch.float64)
    torch.testing.assert_close(kl_to_reference(mean, other, wide) * 2 * std**2, theirs)


@check
def dppo_mask(value, config, peer):
    changed = {"clip_low": 1e-3, "clip_high": 1e-3, "trust_region": f"dppo:{value}"}
    region = make_config(changed, config).objective
    assert region.max_divergence == value
    ratio, advantages = (normal(6, 4) / 10).exp(), normal(6, seed=4)[:, None]
    divergence = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double() * 2 * value
    far = divergence >= value
    dropped = far & (ratio > 1) & (advantages > 0) | far & (ratio < 1) & (advantages < 0)
    assert dropped.any()
    kept = divergence_weights(ratio, advantages, divergence, region.max_divergence)
    assert torch.equal(kept == 0, dropped)


@check
def flow_prompts(value, config, peer):
    assert 32 * 9 * value / config.data.group_size == config.data.prompts_per_iteration


@check
def flow_updates(value, config, peer):
    assert 4 / value == config.optimisation.updates_per_iteration


@check
def flow_timesteps(value, config, peer):
    trained = list(range(int(config.sampling.num_steps * value)))
    assert trained == list(range(config.sampling.trained_steps))
    assert drawn_steps(config, config.sampling.trained_steps).all()


def drawn_steps(config, steps: int) -> torch.Tensor:
    """bool (b, chunks): what the setting `fraction` draws."""
    ids = make_chunker(config.objective.chunker)(torch.ones(1, steps), torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    return select_chunks(None, ids.reshape(-1), config.objective.fraction, generator, batch_size=8)


@check
def dance_timesteps(value, config, peer):
    """Other steps for every image, int((T - 1) x fraction) of them."""
    drawn = drawn_steps(config, config.sampling.trained_steps)
    assert (drawn.sum(1) == int((config.sampling.num_steps - 1) * value)).all()
    assert len(drawn.unique(dim=0)) > 1


@check
def dance_updates(value, config, peer):
    assert config.data.group_size / value == config.optimisation.updates_per_iteration


@check
def verl_updates(value, config, peer):
    prompts = config.data.prompts_per_iteration
    assert prompts / value == config.optimisation.updates_per_iteration


@check
def gcpo_updates(value, config, peer):
    assert 2 * config.data.group_size / value == config.optimisation.updates_per_iteration


@check
def flow_ema(value, config, peer):
    assert config.optimisation.ema_decay**8 == pytest.approx(0.9, abs=1e-3)


@check
def factory_ema(value, config, peer):
    updates = 4 * config.optimisation.updates_per_iteration
    assert config.optimisation.ema_decay**updates == pytest.approx(value, abs=1e-3)


@check
def mix_window(value, config, peer):
    """Their windows, as long as they are whole: four steps, of which none is past T - 3."""
    s = config.sampling
    for iteration in range(0, 25 * 20, 25):
        start = iteration // s.window_every
        assert s.window_start(iteration) == s.window_start(iteration + 24) == start
        assert list(range(start, min(start + s.sde_window, s.num_steps - 2)))[-1] == start + 3
    assert s.window_start(25 * 20) == 0


@check
def random_window(value, config, peer):
    """Where a window of theirs may begin."""
    s = config.sampling
    theirs = {"Flow-Factory": {1, 2, 3}, "verl-omni": set(range(0, 5 - 2 + 1))}[peer]
    assert {s.window_start(iteration, seed=1) for iteration in range(200)} == theirs


@check
def gcpo_ratio(value, config, peer):
    """The exponential of the difference of the chunks' mean log-probs."""
    sizes = [2, 3, 4, 7]
    new, old = normal(5, 16) / 100, normal(5, 16, seed=1) / 100
    means = [torch.stack([c.mean(1) for c in x.split(sizes, 1)], 1) for x in (new, old)]
    ids = make_chunker(config.objective.chunker)(torch.ones(1, 16), torch.zeros(1)).reshape(-1)
    assert torch.equal(ids, chunk_ids_from_sizes(sizes)) and str(sizes) == value
    torch.testing.assert_close(chunk_ratio(new, old, ids), (means[0] - means[1]).exp())


@check
def gcpo_fraction(value, config, peer):
    assert (drawn_steps(config, 16).sum(1) == int(4 * value)).all()


@check
def gcpo_weights(value, config, peer):
    """The mean change of each chunk, divided by their sum."""
    sizes, curve = [2, 3, 4, 7], torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    means = torch.stack([part.mean(1) for part in curve.split(sizes, 1)], 1)
    theirs = torch.nn.functional.normalize(means, p=1, dim=1)
    torch.testing.assert_close(chunk_weights(curve, chunk_ids_from_sizes(sizes)), theirs)
