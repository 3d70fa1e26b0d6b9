"""The trainer on tiny random pipelines: options, resume, gradients, bad input."""

import json

import numpy as np
import pytest
import torch

from chunk_grpo_nb.chunking import chunk_ids_from_sizes, chunk_mask
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.prompts import PromptError
from chunk_grpo_nb.rewards.registry import RewardError, register_reward
from chunk_grpo_nb.training import trainer as trainer_module
from chunk_grpo_nb.training.assignment import Credit, assign_credit
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.records import RunFolder, list_checkpoints, load_checkpoint, read_rows
from chunk_grpo_nb.training.rollout import draw_rollout
from chunk_grpo_nb.training.trainer import Trainer, accumulate_gradient, train

BROKEN = {"mode": "fine"}


@register_reward("redness")
def redness():
    return lambda images, prompts, metadata: [
        float(np.asarray(i)[..., 0].mean() / 255) for i in images
    ]


@register_reward("greenness")
def greenness():
    return lambda images, prompts, metadata: [
        float(np.asarray(i)[..., 1].mean() / 255) for i in images
    ]


@register_reward("breakable")
def breakable():
    def score(images, prompts, metadata):
        if BROKEN["mode"] == "raise":
            raise RuntimeError("out of order")
        if BROKEN["mode"] == "short":
            return [0.0]
        return [
            float("nan")
            if BROKEN["mode"] == "nan" and "blue" in p
            else float(np.asarray(i)[..., 0].mean())
            for i, p in zip(images, prompts)
        ]

    return score


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipes")
    for name in ("flux", "sd3"):
        tiny_pipeline(name).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("red circle\nblue square\ntwo circle\n")
    return folder


@pytest.fixture
def config(pipes):
    return make_config(
        model=str(pipes / "flux"),
        train_prompts=str(pipes / "prompts.txt"),
        validation_prompts=str(pipes / "prompts.txt"),
        rewards={"redness": 1.0},
        prompts_per_iteration=2,
        group_size=4,
        num_steps=6,
        chunker="fixed:2,3",
        fraction=1.0,
        height=16,
        width=16,
        iterations=2,
        learning_rate=1e-3,
        validation_images=2,
        validate_every=2,
        checkpoint_every=1,
        device="cpu",
        clip_low=0.1,
        clip_high=0.1,
    )


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
    run = train(make_config(VARIANTS[name], config), tmp_path / "run")
    rows = read_rows(run)
    assert (
        len(rows)
        == 4
        * config.optimisation.iterations
        // 2
        * make_config(VARIANTS[name], config).optimisation.inner_epochs
    )
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


def test_resume_gives_the_same_bits(config, tmp_path):
    config = make_config(
        base=config,
        iterations=3,
        ema_decay=0.9,
        chunker="online:adaptive",
        lr_schedule="linear",
        selection="weighted",
        fraction=0.5,
    )
    whole = train(config, tmp_path / "whole")
    train(make_config(base=config, iterations=3, checkpoint_every=1), tmp_path / "cut")
    cut = RunFolder.open(tmp_path / "cut")
    list_checkpoints(cut)[-1].unlink()  # as if killed before the last checkpoint
    with open(cut.path / "metrics.jsonl", "a") as f:
        f.write('{"iteration": 3, "half a li')
    resumed = train(config, cut.path, resume=True)
    for name in ("metrics", "validation", "dynamics"):
        assert (whole.path / f"{name}.jsonl").read_text() == (
            resumed.path / f"{name}.jsonl"
        ).read_text()
    a, b = (load_checkpoint(list_checkpoints(r)[-1]) for r in (whole, resumed))
    assert json.dumps(a, default=lambda t: t.tolist()) == json.dumps(
        b, default=lambda t: t.tolist()
    )


def test_resume_from_any_checkpoint(config, tmp_path):
    config = make_config(base=config, iterations=3)
    whole = train(config, tmp_path / "run")
    metrics, last = (
        (whole.path / "metrics.jsonl").read_text(),
        load_checkpoint(list_checkpoints(whole)[-1])["model"],
    )
    again = train(config, whole.path, resume=list_checkpoints(whole)[0])
    assert (again.path / "metrics.jsonl").read_text() == metrics
    assert all(
        torch.equal(last[k], v)
        for k, v in load_checkpoint(list_checkpoints(again)[-1])["model"].items()
    )


def test_resume_refuses_other_settings(config, tmp_path):
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="learning_rate was 0.001, now 0.1"):
        Trainer(make_config(base=config, learning_rate=0.1), tmp_path / "run", resume=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        Trainer(config, tmp_path, resume=True)


def moved_trainer(config, folder):
    trainer = Trainer(config, folder)
    with torch.no_grad():
        rollout = draw_rollout(
            trainer.policy,
            trainer.prompts[:2],
            trainer.sampler,
            trainer.score,
            iteration=0,
            seed=0,
            group_size=4,
        )
    credit = assign_credit(
        config, rollout.rewards, rollout.curves, 0, torch.ones(config.sampling.num_steps - 1)
    )
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(
                3e-2
                * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
            )
    return trainer, rollout, credit


def gradient(trainer, rollout, credit, **options):
    trainer.optimizer.zero_grad()
    accumulate_gradient(trainer.policy, rollout, credit, range(8), (0.2, 0.2), **options)
    return torch.cat([p.grad.flatten() for p in trainer.parameters])


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_streamed_gradient_equals_whole(config, tmp_path, kl_weight):
    state = moved_trainer(make_config(base=config, kl_weight=kl_weight), tmp_path / "run")
    whole = gradient(*state, kl_weight=kl_weight)
    for micro_batch in (1, 3, 7):
        streamed = gradient(*state, kl_weight=kl_weight, micro_batch=micro_batch)
        assert (whole - streamed).norm() < 1e-4 * whole.norm()


def test_streaming_trajectories_that_are_chunked_differently(config, tmp_path):
    trainer, rollout, credit = moved_trainer(config, tmp_path / "run")
    ids = chunk_ids_from_sizes(
        [[2, 3], [1, 1, 3], [5], [2, 2, 1], [1, 1, 1, 1, 1], [2, 3], [3, 2], [1, 4]]
    )
    credit = Credit(credit.advantages[:, :1].expand(8, 5), ids, chunk_mask(ids), None, ids)
    whole = gradient(trainer, rollout, credit)
    for micro_batch in (1, 4):
        assert (
            whole - gradient(trainer, rollout, credit, micro_batch=micro_batch)
        ).norm() < 1e-4 * whole.norm()
    assert (gradient(trainer, rollout, credit, micro_batch=7) - whole).norm() < 1e-4 * whole.norm()


def test_a_wrong_coefficient_would_show(config, tmp_path, monkeypatch):
    state = moved_trainer(config, tmp_path / "run")
    whole, right = gradient(*state), trainer_module.step_coefficients
    monkeypatch.setattr(
        trainer_module, "step_coefficients", lambda new, old, *rest: right(old, old, *rest)
    )  # forgets the ratio
    assert (whole - gradient(*state)).norm() > 1e-3 * whole.norm()


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


# -- bad input ----------------------------------------------------------------------------------------------------------
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
