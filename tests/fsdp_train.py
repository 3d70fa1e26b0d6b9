"""`train` with weights sharded by accelerate's FSDP2, on gloo.

`torch.distributed.run --nproc_per_node 2 fsdp_train.py FOLDER NAME`.

accelerate turns FSDP on a CPU into DDP without a word, so the kind of distribution is set by
hand; everything after that is its own code.
"""

import os
import sys
from pathlib import Path

import accelerate
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_run import config

from chunk_grpo_nb.training.config import make_config

PLUGIN = {
    "fsdp_version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "transformer_based_wrap",
    "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT",
}


class Sharded(accelerate.Accelerator):
    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type, self.state.fsdp_plugin = (
            DistributedType.FSDP,
            FullyShardedDataParallelPlugin(**PLUGIN),
        )


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        accelerate.Accelerator = Sharded
    from chunk_grpo_nb.training.trainer import train

    c = make_config(
        base=config(folder),
        lora_rank=2 * (name.startswith("lora")),
        micro_batch=2,
        updates_per_iteration=2,
        iterations=2,
        checkpoint_every=1,
    )
    train(c, folder / name)
    train(make_config(base=c, iterations=3), folder / name, resume=True)
