"""The trainer on tiny random pipelines: settings, callbacks, faults, bad input."""

import warnings

import numpy as np
import pytest
import torch
from tiny_runs import make_folder, mean_of_channel, tiny_config

from chunk_grpo_nb.chunking import chunk_ids_from_sizes
from chunk_grpo_nb.models.policy import Policy
from chunk_grpo_nb.prompts import PromptError
from chunk_grpo_nb.rewards.registry import RewardError, RewardUnavailable, register_reward
from chunk_grpo_nb.training.assignment import make_trust_region
from chunk_grpo_nb.training.callbacks import Callback, EachIteration, narrowest_clip
from chunk_grpo_nb.training.checkpoints import list_checkpoints, load_checkpoint
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.records import read_rows
from chunk_grpo_nb.training.state import Trainer
from chunk_grpo_nb.training.trainer import train

BROKEN = {"mode": "fine"}


DEVICES = []


@register_reward("constant")
def constant(device=None):
    """The same for all images; notes where it is asked to work."""
    DEVICES.append(device)
    return lambda images, prompts, metadata: [0.5] * len(images)


@register_reward("breakable")
def breakable():
    red = mean_of_channel(0)

    def score(images, prompts, metadata):
        if BROKEN["mode"] == "raise":
            raise RuntimeError("out of order")
        if BROKEN["mode"] == "short":
            return [0.0]
        values = red(images, prompts, metadata)
        if BROKEN["mode"] == "nan":
            return [
                float("nan") if "blue" in p else v for p, v in zip(prompts, values, strict=True)
            ]
        return values

    return score


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pipes"), "flux", "sd3")


@pytest.fixture
def config(pipes):
    return tiny_config(pipes)


VARIANTS = {
    "step": {"chunker": "step"},
    "sequence": {"chunker": "sequence"},
    "adaptive": {"chunker": "adaptive"},
    "online": {"chunker": "online:adaptive"},
    "weighted": {"selection": "weighted", "fraction": 0.5},
    "only": {"selection": "only:0"},
    "anneal": {"selection": "anneal", "fraction": 0.5},
    "adaptive in parts": {"chunker": "adaptive", "micro_batch": 6, "num_steps": 8},
    "adaptive weighted in parts": {
        "chunker": "adaptive",
        "selection": "weighted",
        "fraction": 0.5,
        "micro_batch": 6,
        "num_steps": 8,
    },
    "draw control": {"ratio": "step", "fraction": 0.5},
    "smoothing control": {"ratio": "step:chunk", "fraction": 0.5},
    "weight control": {"chunker": "step", "ratio": "step:fixed:2,3"},
    "tempflow": {"chunker": "step", "ratio": "step:std"},
    "dance": {"sde": "dance", "noise_level": 0.3},
    "cps": {"sde": "cps"},
    "lora": {"lora_rank": 2, "ema_decay": 0.5},
    "kl": {"kl_weight": 0.1},
    "kl of a lora": {"kl_weight": 0.1, "lora_rank": 2},
    "epochs": {"inner_epochs": 2, "lr_schedule": "cosine", "warmup_updates": 1},
    "same noise": {"same_noise": True},
    "batches": {"rollout_batch": 3, "micro_batch": 3},
    "sgd": {"optimizer": "sgd"},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16"},
    "rewards per chunk": {
        "rewards": {"redness": 1.0, "greenness": 1.0},
        "chunk_rewards": [{"redness": 1.0}, {"greenness": 1.0}],
    },
    "tensorboard": {"track": "tensorboard"},
    "gdpo": {"rewards": {"redness": 1.0, "greenness": 0.5}, "reward_mix": "gdpo"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:replayed log-probs")
def test_every_setting_trains(name, config, tmp_path):
    settings = make_config(VARIANTS[name], config)
    run = train(settings, tmp_path / "run")
    rows = read_rows(run)
    per_iteration = 2 * settings.optimisation.inner_epochs
    assert len(rows) == per_iteration * settings.optimisation.iterations
    assert np.isfinite(rows["grad_norm"]).all() and (rows["grad_norm"] > 0).all()
    if name.startswith("kl"):
        assert rows["kl"].iloc[0] == 0 and rows["kl"].iloc[-1] > 0
    if name == "only":
        assert rows["log_prob_shift"].iloc[-1][2:] == [None, None, None]


def test_sd3_with_guidance_trains(config, pipes, tmp_path):
    run = train(
        make_config(
            base=config, model=str(pipes / "sd3"), guidance_scale=3.0, height=None, width=None
        ),
        tmp_path / "run",
    )
    assert read_rows(run, "replay")["log_prob_error"].item() < 1e-5
    assert (read_rows(run)["grad_norm"] > 0).any()


class Watch(Callback):
    """Keeps the branches of every recorded call, and the pictures of evaluations."""

    def __init__(self):
        self.branches = set()

    def on_rollout(self, trainer, rollout):
        self.branches |= {call.branches for r in rollout.recordings for call in r.calls}
        self.size = rollout.images[0].size


def test_training_without_guidance_and_small_is_evaluated_with_it_and_large(
    config, pipes, tmp_path, monkeypatch
):
    drawn = []
    decode = Policy.decode

    def remember(self, what, *args, **options):
        images = decode(self, what, *args, **options)
        drawn.append((what.guidance, images[0].size))
        return images

    monkeypatch.setattr(Policy, "decode", remember)
    watch = Watch()
    model, size = {"model": str(pipes / "sd3"), "iterations": 1}, {"height": 16, "width": 16}
    large = {"validation_guidance": 3.0, "validation_height": 32, "validation_width": 32}
    changed = make_config(model | size | large, config, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="trained without guidance"):
        run = train(changed, tmp_path / "run", callbacks=[watch])
    assert watch.branches == {1}  # two with guidance
    assert drawn == [(3.0, (32, 32)), (1.0, (16, 16)), (3.0, (32, 32))]
    assert read_rows(run, "replay")["log_prob_error"].item() < 1e-5


def test_training_raises_the_reward_of_its_own_samples(config, tmp_path):
    run = train(
        make_config(
            base=config,
            iterations=30,
            learning_rate=3e-3,
            prompts_per_iteration=3,
            validate_every=0,
            checkpoint_every=0,
        ),
        tmp_path / "run",
    )
    reward = read_rows(run).groupby("iteration")["reward_redness"].first()
    assert reward.iloc[-8:].mean() > reward.iloc[:8].mean() + 2 * reward.iloc[:8].std()


# -- callbacks -------------------------------------------------------------------------------------
class Moments(Callback):
    """Notes every moment."""

    def __init__(self):
        self.seen = []

    def on_setup(self, trainer):
        self.seen.append("setup")

    def on_start(self, trainer):
        self.seen.append("start")

    def on_rollout(self, trainer, rollout):
        assert len(rollout.images) == 8
        self.seen.append("rollout")

    def on_update(self, trainer, update):
        assert update.grad_norm > 0
        self.seen.append(f"update {update.number}")

    def on_iteration(self, trainer, iteration):
        assert trainer.done == iteration + 1
        self.seen.append(f"iteration {iteration}")

    def on_end(self, trainer):
        self.seen.append("end")


def test_callbacks_hear_every_moment_in_order(config, tmp_path):
    moments, runs = Moments(), []
    each = EachIteration(lambda run, iteration: runs.append((run.path.name, iteration)))
    train(config, tmp_path / "run", callbacks=[moments, each])
    updates = ["rollout", "update 0", "update 1"]
    first, second = [*updates, "iteration 0"], [*updates, "iteration 1"]
    assert moments.seen == ["setup", "start", *first, *second, "end"]
    assert runs == [("run", 0), ("run", 1)]


def test_a_callback_in_five_lines(config, tmp_path, capsys):
    class PrintReward(Callback):
        def on_iteration(self, trainer, iteration):
            reward = trainer.metrics["reward_redness"]
            print(f"iteration {iteration}: redness {reward:.3f}")

    train(config, tmp_path / "run", callbacks=[PrintReward()])
    assert "iteration 1: redness 0." in capsys.readouterr().out


class Counter(Callback):
    """Remembers how many updates there were."""

    def __init__(self):
        self.count = 0

    def on_update(self, trainer, update):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_what_a_callback_remembers_is_in_the_checkpoint(config, tmp_path):
    train(config, tmp_path / "run", callbacks=[Counter()])
    counter = Counter()
    longer = make_config(base=config, iterations=3)
    train(longer, tmp_path / "run", resume=True, callbacks=[counter])
    assert counter.count == 6


# -- faults ----------------------------------------------------------------------------------------
class Break(Callback):
    """Spoils a weight after the first iteration."""

    def __init__(self, value: float):
        self.value = value

    def on_iteration(self, trainer, iteration):
        if iteration == 0:
            return
        weights = trainer.policy.trainable_parameters()[0]
        weights.data.fill_(self.value)


class SpoilGradient(Callback):
    """Makes the gradient of a parameter infinite in the second iteration."""

    def on_rollout(self, trainer, rollout):
        if rollout.iteration == 1:
            weights = trainer.policy.trainable_parameters()[0]
            weights.register_hook(lambda gradient: gradient * float("inf"))


def test_a_gradient_that_is_not_finite_stops_before_anything_is_saved(config, tmp_path):
    with pytest.raises(FloatingPointError, match="iteration 1, update 0.*Lower learning_rate"):
        train(config, tmp_path / "run", callbacks=[SpoilGradient()])
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("*.pt"))
    assert [path.name for path in checkpoints] == ["iteration_000001.pt"]
    weights = load_checkpoint(checkpoints[0])["model"].values()
    assert all(torch.isfinite(value).all() for value in weights)


@pytest.mark.filterwarnings("ignore:replayed log-probs")
def test_weights_that_are_not_finite_stop_before_anything_is_saved(config, tmp_path, monkeypatch):
    original = torch.optim.AdamW.step

    def step(self, *args, **options):
        original(self, *args, **options)
        self.param_groups[0]["params"][-1].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    words = "iteration 0, update 0: weights are not finite.*there is no checkpoint"
    with pytest.raises(FloatingPointError, match=words):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("*.pt"))
    assert not (tmp_path / "run/policy").exists()


@pytest.mark.parametrize(
    "name, setting", [("draw_rollout", "rollout_batch"), ("accumulate_gradient", "micro_batch")]
)
def test_out_of_memory_says_which_setting_to_lower(config, tmp_path, monkeypatch, name, setting):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"chunk_grpo_nb.training.trainer.{name}", full)
    with pytest.raises(MemoryError, match=f"lower {setting}"):
        train(make_config(base=config, validate_every=0), tmp_path / "run")


def test_an_update_of_which_every_reward_failed_is_left_out(config, tmp_path, monkeypatch):
    monkeypatch.setitem(BROKEN, "mode", "nan")
    settings = {"reward_failure": "drop", "validate_every": 0, "iterations": 3}
    dropped = make_config(base=config, rewards={"breakable": 1.0}, inner_epochs=2, **settings)
    rows = read_rows(train(dropped, tmp_path / "run"))
    assert {0, 4} >= set(rows["dropped_samples"]) and 4 in set(rows["dropped_samples"])
    assert (rows.groupby("iteration").size() <= 4).all()
    assert (rows[rows["dropped_samples"] == 4].groupby("iteration").size() == 2).all()


def test_an_iteration_without_spread_changes_no_weight(pipes, tmp_path):
    config = tiny_config(
        pipes, rewards={"red_then_constant": 1.0}, validate_every=0, keep_checkpoints=2
    )
    run = train(config, tmp_path / "run")
    first, second = (load_checkpoint(path)["model"] for path in list_checkpoints(run))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_rows(run)["grad_norm"].tolist()[2:] == [0.0, 0.0]


def test_a_run_without_any_step_keeps_its_learning_rate(pipes, tmp_path):
    """The schedule counts steps; torch warns where it moves before the optimiser."""
    config = tiny_config(pipes, rewards={"constant": 1.0}, lr_schedule="linear", validate_every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = read_rows(train(config, tmp_path / "run"))
    assert rows["grad_norm"].tolist() == [0.0] * 4
    assert rows["learning_rate"].nunique() == 1


# -- bad input -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mode, words", [("raise", "out of order"), ("short", "1"), ("nan", "blue square")]
)
def test_a_broken_reward_stops_the_run_and_names_the_prompt(
    config, tmp_path, mode, words, monkeypatch
):
    monkeypatch.setitem(BROKEN, "mode", mode)
    with pytest.raises(RewardError, match=words):
        train(
            make_config(
                base=config, rewards={"breakable": 1.0}, validate_every=0, prompts_per_iteration=3
            ),
            tmp_path / "run",
        )


def test_a_dropped_reward_takes_its_group_out(config, tmp_path, monkeypatch):
    monkeypatch.setitem(BROKEN, "mode", "nan")
    c = make_config(
        base=config,
        rewards={"breakable": 1.0},
        reward_failure="drop",
        validate_every=0,
        prompts_per_iteration=3,
        updates_per_iteration=1,
        iterations=1,
    )
    assert read_rows(train(c, tmp_path / "run"))["dropped_samples"].tolist() == [4]


def test_a_missing_or_broken_model_is_named(config, tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        Trainer(make_config(base=config, model=str(tmp_path / "nowhere")), tmp_path / "run")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    with pytest.raises((ValueError, OSError), match="broken"):
        Trainer(make_config(base=config, model=str(tmp_path / "broken")), tmp_path / "run")


@pytest.mark.parametrize("content, words", [(b"", "no prompts"), (b"\xff\xfe\x00red", "UTF-8")])
def test_bad_prompt_files_are_named(config, tmp_path, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(PromptError, match=words):
        Trainer(make_config(base=config, train_prompts=str(tmp_path / "bad.txt")), tmp_path / "run")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"train_prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"validation_prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"rewards": {"rednes": 1.0}}, "did you mean 'redness'"),
    ],
)
def test_what_is_known_from_the_config_is_refused_before_processes_meet(
    config, tmp_path, monkeypatch, settings, words
):
    monkeypatch.setattr("chunk_grpo_nb.training.state.make_backend", None)
    with pytest.raises(ValueError, match=words):
        Trainer(make_config(settings, config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/width", "http://127.0.0.1:9/width=1"])
def test_a_dead_reward_server_is_refused_before_the_model_is_loaded(
    config, tmp_path, monkeypatch, name
):
    monkeypatch.setattr("chunk_grpo_nb.training.state.load_policy", None)
    with pytest.raises(RewardUnavailable, match="127.0.0.1:9/health.*Is the server up"):
        train(make_config(base=config, rewards={name: 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "region, expected",
    [("clip", 0.1), ("clip:length", 0.1 / 5**0.5), ("clip:spread", None), ("dppo:1.0e-5", None)],
)
def test_the_replay_check_knows_the_narrowest_clip_range(region, expected):
    sigmas = torch.linspace(1, 0.1, 6)
    clip = {} if region.startswith("dppo") else {"clip_low": 0.1, "clip_high": 0.2}
    chunks = make_config(trust_region=region, chunker="sequence", **clip)
    steps = make_config(base=chunks, ratio="step")
    bound, of_a_step = narrowest_clip(chunks, sigmas), narrowest_clip(steps, sigmas)
    if expected is not None:
        assert bound == pytest.approx(expected) and of_a_step == pytest.approx(0.1)
    if region.startswith("dppo"):  # masks by divergence, and clips no ratio
        assert bound == of_a_step == float("inf")
        return
    for sizes in ([5], [1, 4], [2, 1, 2], [1] * 5):
        region = make_trust_region(chunks, sigmas)
        ends = region.clip_range(chunk_ids_from_sizes(sizes))
        assert bound <= min(float(torch.as_tensor(end).min()) for end in ends) + 1e-8


@pytest.mark.parametrize("name", ["constant", "constant=0.5,redness=0.5"])
def test_rewards_work_on_the_device_of_their_process(config, tmp_path, name):
    DEVICES.clear()
    trainer = Trainer(make_config(base=config, rewards={name: 1.0}), tmp_path / "run")
    trainer.close()
    assert DEVICES == [trainer.backend.device] == [torch.device("cpu")]


def test_long_prompts_are_counted_and_listed(config, pipes, tmp_path):
    (tmp_path / "long.txt").write_text("red circle\n" + "blue square and " * 60 + "\n")
    with pytest.warns(UserWarning, match="1 of 2 training prompts are longer"):
        trainer = Trainer(
            make_config(base=config, train_prompts=str(tmp_path / "long.txt")), tmp_path / "run"
        )
    assert len(trainer.run.manifest["truncated_prompts"]) == 1


def test_a_full_disk_keeps_the_previous_checkpoint(config, tmp_path, monkeypatch):
    run = train(config, tmp_path / "run")
    before = list_checkpoints(run)

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="untouched"):
        train(make_config(base=config, iterations=3), run.path, resume=True)
    assert list_checkpoints(run) == before and not list(run.path.rglob("*.tmp"))
