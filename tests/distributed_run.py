"""Train the tiny pipeline, under one process or several: what test_distributed.py compares.

`python distributed_run.py FOLDER NAME SETTINGS`, with the settings as JSON.
"""

import json
import sys
from pathlib import Path

from tiny_runs import tiny_config

from chunk_grpo_nb.training.config import Config
from chunk_grpo_nb.training.trainer import train


def config(folder: Path, **settings) -> Config:
    """Three iterations of three prompts, one update each."""
    defaults = {
        "prompts_per_iteration": 3,
        "num_steps": 5,
        "chunker": "fixed:2,2",
        "iterations": 3,
        "updates_per_iteration": 1,
        "validate_every": 3,
        "checkpoint_every": 3,
        "clip_low": 1e-3,
        "clip_high": 1e-3,
    }
    return tiny_config(folder, **defaults | settings)


if __name__ == "__main__":
    folder, name, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    train(config(folder, **settings), folder / name)
