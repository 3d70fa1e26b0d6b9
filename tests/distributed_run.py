"""Train the tiny pipeline as `python distributed_run.py FOLDER DTYPE`, under one process or several: what tests/test_distributed.py compares."""

import sys
from pathlib import Path

import numpy as np

from chunk_grpo_nb.rewards.registry import register_reward
from chunk_grpo_nb.training.config import Config, make_config
from chunk_grpo_nb.training.trainer import train


@register_reward("redness")
def redness():
    return lambda images, prompts, metadata: [
        float(np.asarray(i)[..., 0].mean() / 255) for i in images
    ]


def config(folder: Path, dtype: str, **more) -> Config:
    return make_config(
        model=str(folder / "pipe"),
        train_prompts=str(folder / "prompts.txt"),
        validation_prompts=str(folder / "prompts.txt"),
        rewards={"redness": 1.0},
        prompts_per_iteration=3,
        group_size=4,
        num_steps=5,
        chunker="fixed:2,2",
        height=16,
        width=16,
        iterations=3,
        updates_per_iteration=1,
        learning_rate=1e-3,
        validation_images=2,
        validate_every=3,
        checkpoint_every=3,
        device="cpu",
        dtype=dtype,
        **more,
    )


if __name__ == "__main__":
    folder, dtype, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    train(config(folder, dtype), folder / name)
