"""A tiny run that can be killed at any moment, or kills itself at a file operation.

killed_train.py FOLDER OUT KIND [SETTINGS [PLACE COUNT]]: trains KIND in OUT, or resumes it. With
PLACE it sends itself `kill -9` when files of OUT whose path holds PLACE are touched the COUNT-th
time.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_runs import mean_of_channel, tiny_config

from chunk_grpo_nb.training.records import RunFolder
from chunk_grpo_nb.training.trainer import train

KINDS = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "moving average": {"ema_decay": 0.9},
    "lora": {"lora_rank": 2},
    "online chunker": {"chunker": "online:adaptive", "selection": "weighted", "fraction": 0.5},
    "gains": {"value_continuations": 1},
    "moving window": {"sde_window": 2, "chunker": "fixed:1,1"},
}
TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


redness = mean_of_channel(0)


def killed_config(folder: Path, kind: str, **settings):
    """Five iterations of a kind of training."""
    return tiny_config(folder, iterations=5, **KINDS[kind], **settings)


def kill_at(out: Path, place: str, count: int) -> None:
    """From now on, `kill -9` this process when the place is touched the `count`-th time."""
    left = count

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event not in TOUCHES:
            return
        _, inside, path = str(arguments[0]).partition(str(out))
        if inside and place in path:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def can_resume(out: Path) -> bool:
    """Whether the folder holds a run; one that was killed while it was made does not."""
    try:
        RunFolder.open(out)
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    settings = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    if len(sys.argv) > 5:
        kill_at(out, sys.argv[5], int(sys.argv[6]))
    train(killed_config(folder, kind, **settings), out, resume=can_resume(out))
