"""Runs that take seconds: a tiny random pipeline, three prompts, rewards that look at colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.rewards.registry import register_reward
from chunk_grpo_nb.training.config import Config, make_config


def mean_of_channel(channel: int):
    """A reward: the mean of a colour, in [0, 1]."""

    def score(images, prompts, metadata):
        return [float(np.asarray(image)[..., channel].mean() / 255) for image in images]

    return score


@register_reward("redness")
def redness():
    return mean_of_channel(0)


@register_reward("greenness")
def greenness():
    return mean_of_channel(1)


@register_reward("red_then_constant")
def red_then_constant():
    """Redness in the first call, the same for all images after."""
    red, calls = mean_of_channel(0), []

    def score(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) > 1:
            return [0.5] * len(images)
        return red(images, prompts, metadata)

    return score


def make_folder(folder: Path, *families: str) -> Path:
    """Pipelines and prompts in a folder."""
    for name in families or ("flux",):
        tiny_pipeline(name).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("red circle\nblue square\ntwo circle\n")
    return folder


def tiny_config(folder: Path, **settings) -> Config:
    """Two iterations of two updates on two prompts with four images each."""
    defaults = {
        "model": str(folder / "flux"),
        "train_prompts": str(folder / "prompts.txt"),
        "validation_prompts": str(folder / "prompts.txt"),
        "rewards": {"redness": 1.0},
        "prompts_per_iteration": 2,
        "group_size": 4,
        "num_steps": 6,
        "chunker": "fixed:2,3",
        "fraction": 1.0,
        "height": 16,
        "width": 16,
        "iterations": 2,
        "learning_rate": 1e-3,
        "validation_images": 2,
        "validate_every": 2,
        "checkpoint_every": 1,
        "device": "cpu",
        "clip_low": 0.1,
        "clip_high": 0.1,
    }
    return make_config(defaults | settings)
