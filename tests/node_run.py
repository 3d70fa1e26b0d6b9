"""Train the tiny pipeline as one of several nodes, each with a folder of its own as its disk.

`torchrun --nnodes 2 ... node_run.py FOLDER NAME RESUME KILL`: the run is FOLDER/disk_N/NAME on node
N; with KILL above 0, a process of node 1 is killed in that iteration.
"""

import os
import signal
import sys
from pathlib import Path

from distributed_run import config

from chunk_grpo_nb.training.callbacks import Callback
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.trainer import train


class PullThePlug(Callback):
    """Kills this process in the middle of an iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def on_update(self, trainer, update) -> None:
        if trainer.done == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, name, resume, kill = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1", sys.argv[4]
    node = os.environ.get("GROUP_RANK", "0")
    c = make_config(base=config(folder), dtype="float64", checkpoint_every=1, validate_every=0)
    plug = [PullThePlug(int(kill))] if node == "1" and int(kill) else []
    train(c, folder / f"disk_{node}" / name, resume=resume, callbacks=plug)
