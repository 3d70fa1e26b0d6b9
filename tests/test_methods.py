"""Published methods as settings of the one loop: each run is compared with its limit case."""

import pytest
import torch
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.models.continuation import state_values
from chunk_grpo_nb.training.callbacks import Callback
from chunk_grpo_nb.training.checkpoints import list_checkpoints, load_checkpoint
from chunk_grpo_nb.training.records import RunFolder, read_rows
from chunk_grpo_nb.training.rollout import measure_gains
from chunk_grpo_nb.training.state import Trainer
from chunk_grpo_nb.training.trainer import chunk_gains, sample, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("methods"))


def run(folder, name: str, **settings) -> RunFolder:
    """One iteration of two inner epochs, so that ratios have moved, with a tight clip range."""
    defaults = {
        "iterations": 1,
        "inner_epochs": 2,
        "validate_every": 0,
        "learning_rate": 3e-3,
        "clip_low": 1e-3,
        "clip_high": 1e-3,
    }
    return train(tiny_config(folder, **defaults | settings), folder / name)


def weights(run: RunFolder) -> torch.Tensor:
    """The trained weights at the end, as one vector."""
    state = load_checkpoint(list_checkpoints(run)[-1])["model"]
    return torch.cat([value.flatten() for value in state.values()])


@pytest.fixture(scope="module")
def plain(folder):
    """Chunk-GRPO as it is."""
    return run(folder, "plain")


@pytest.fixture(scope="module")
def plain_steps(folder):
    """The same with chunks of one step."""
    return run(folder, "plain_steps", chunker="step")


def clipped(run: RunFolder) -> list[float]:
    """Share of the ratios whose gradient was cut, of every update."""
    rows = read_rows(run)
    return (rows["clip_low"] + rows["clip_high"]).tolist()


def test_the_limit_cases_do_clip(plain, plain_steps):
    assert clipped(plain)[0] == 0 and max(clipped(plain)) > 0
    assert max(clipped(plain_steps)) > 0


def test_length_fair_range_on_chunks_of_one_step_is_plain_clipping(folder, plain_steps):
    found = run(folder, "length_steps", chunker="step", trust_region="clip:length")
    assert torch.equal(weights(found), weights(plain_steps))


@pytest.mark.parametrize("rule", ["clip:length", "clip:spread"])
def test_a_range_that_follows_the_chunk_changes_what_is_clipped(folder, plain, rule):
    found = run(folder, rule.replace(":", "_"), trust_region=rule)
    columns = ["clip_low_by_chunk", "clip_high_by_chunk"]
    assert not read_rows(found)[columns].equals(read_rows(plain)[columns])
    assert not torch.equal(weights(found), weights(plain))


UNIT_STD = {"sde": "dance", "shift": 1.0, "noise_level": 6**0.5}  # of all six steps: every std is 1


def test_guard_is_plain_where_every_std_is_one_and_no_ratio_has_moved(folder):
    once = UNIT_STD | {"inner_epochs": 1, "updates_per_iteration": 1, "optimizer": "sgd"}
    guard = run(folder, "guard_limit", trust_region="guard", ratio="chunk:stride", **once)
    plain = run(folder, "guard_plain", **once)
    start = weights(run(folder, "guard_start", **once | {"learning_rate": 0.0}))
    moved = weights(plain) - start
    assert moved.norm() > 0
    assert (weights(guard) - weights(plain)).norm() < 1e-3 * moved.norm()


@pytest.mark.parametrize("ratio", ["chunk", "chunk:stride", "step:stride"])
def test_guard_trains_on_normalised_ratios(folder, plain, ratio):
    name = "guard_" + ratio.replace(":", "_")
    found = run(folder, name, trust_region="guard", ratio=ratio)
    assert not torch.equal(weights(found), weights(plain))
    last = read_rows(found).iloc[-1]
    assert all(d > 0 for d in last["divergence"]) and "dropped_chunks" not in last


def test_dppo_with_a_far_threshold_is_the_unclipped_objective(folder):
    wide = {"clip_low": 1.0, "clip_high": 1e9}
    far = run(folder, "dppo_far", trust_region="dppo:1.0e+9")
    assert torch.equal(weights(far), weights(run(folder, "unclipped", **wide)))
    assert read_rows(far)["dropped_chunks"].tolist() == [0.0] * len(read_rows(far))


def test_dppo_drops_chunks_that_have_gone_too_far(folder):
    found = run(folder, "dppo_near", trust_region="dppo:1.0e-9")
    rows = read_rows(found)
    assert rows["dropped_chunks"].iloc[0] == 0  # no ratio has moved yet
    assert 0 < rows["dropped_chunks"].iloc[-1] < 1
    assert clipped(found)[-1] == 0


def test_a_window_of_all_steps_is_the_plain_run(folder, plain):
    whole = run(folder, "whole_window", sde_window=5)
    assert torch.equal(weights(whole), weights(plain))
    rows = read_rows(whole)
    assert (rows.pop("first_step") == 0).all() and rows.equals(read_rows(plain))


WINDOW = {"sde_window": 2, "window_stride": 2, "chunker": "fixed:1,1", "iterations": 4}


def test_a_window_moves_and_saves_network_evaluations(folder, plain):
    moving = run(folder, "window", **WINDOW)
    rows = read_rows(moving).groupby("iteration").last()
    assert rows["first_step"].tolist() == [0, 2, 3, 0]
    assert rows["chunk_sizes"].tolist() == [[1, 1]] * 4
    first, whole = rows.iloc[0], read_rows(plain).iloc[-1]
    assert first["evaluations_trained"] * 5 == whole["evaluations_trained"] * 2
    assert first["evaluations_sampled"] == whole["evaluations_sampled"]


def test_a_window_is_drawn_in_its_range_from_the_seed(folder):
    drawn = WINDOW | {"window_stride": 1, "window_range": [1, 4], "window_order": "random"}
    firsts = []
    for seed in (0, 0, 1):
        found = run(folder, f"drawn_{len(firsts)}", **drawn | {"iterations": 6, "seed": seed})
        firsts.append(read_rows(found).groupby("iteration").last()["first_step"].tolist())
    assert firsts[0] == firsts[1] != firsts[2]
    assert set(firsts[0] + firsts[2]) == {1, 2}


class Watch(Callback):
    """Keeps what each iteration trains."""

    def __init__(self):
        self.rollouts = []

    def on_rollout(self, trainer, rollout):
        self.rollouts.append(rollout)


def test_outside_the_window_there_is_no_noise(folder):
    watch = Watch()
    config = tiny_config(folder, validate_every=0, **WINDOW)
    train(config, folder / "window_watched", callbacks=[watch])
    for rollout, first in zip(watch.rollouts, [0, 2, 3, 0], strict=True):
        recording = rollout.recordings[0]
        inside = torch.isin(torch.arange(5), torch.tensor([first, first + 1]))
        assert (recording.log_probs.isfinite().all(0) == inside).all()
        assert torch.equal(rollout.log_probs, recording.log_probs[:, inside])
        assert rollout.curves.shape == (8, 2)
        assert torch.equal(rollout.sigmas, recording.sigmas[first : first + 3])
        outside = recording.velocities * recording.sigmas.diff()[:, None, None]
        moved = recording.latents.diff(dim=1)
        torch.testing.assert_close(moved[:, :5][:, ~inside], outside[:, :5][:, ~inside])


GAINS = {"value_continuations": 2, "advantage_std": "none"}


def test_gains_of_an_image_add_up_and_are_measured(folder):
    watch = Watch()
    config = tiny_config(folder, validate_every=0, iterations=1, **GAINS)
    trainer = Trainer(config, folder / "gains", callbacks=[watch])
    rollout = sample(trainer, 0)
    gains = chunk_gains(trainer, rollout)["redness"]
    measured = state_values(
        trainer.policy,
        rollout.recordings[0],
        lambda images: trainer.score(images, rollout.prompts),
        continuations=64,
        steps=[0, 2],
    )["redness"]
    assert gains.shape == (8, 2)
    assert trainer.evaluations["sampled"] == 8 * 2 * (6 + 4)
    errors = gains[:, 1] - measured.gains[1]  # of the value before step 2
    allowed = measured.rewards[1].var(0) * (1 / 2 + 1 / 64)  # two futures against 64 others
    assert 0.05 < (errors.square() / allowed).mean() < 3
    again = measure_gains(trainer.policy, rollout, trainer.score, [0, 2], 2, config.run.seed)
    assert torch.equal(again["redness"], gains)
    trainer.close()


def test_training_by_gains_is_another_run(folder, plain):
    found = run(folder, "by_gains", **GAINS)
    assert not torch.equal(weights(found), weights(plain))


def test_branching_of_tempflow_is_a_window_of_one_step_on_shared_noise(folder):
    """All images of a group are one image up to the branch, so rewards judge that step alone."""
    watch = Watch()
    branch = {"sde_window": 1, "same_noise": True, "chunker": "step", "ratio": "step:std"}
    config = tiny_config(folder, validate_every=0, iterations=3, **branch)
    train(config, folder / "branching", callbacks=[watch])
    for number, rollout in enumerate(watch.rollouts):
        groups = rollout.recordings[0].latents.unflatten(0, (2, 4))
        same = (groups == groups[:, :1]).flatten(3).all(-1).all(1)  # (groups, states)
        assert same[:, : number + 1].all() and not same[:, number + 1 :].any()
