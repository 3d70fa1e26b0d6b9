"""`train` under DeepSpeed, on gloo.

`torch.distributed.run --nproc_per_node 2 deepspeed_train.py FOLDER NAME STAGE`.

accelerate turns DeepSpeed on a CPU into DDP without a word, so the kind of distribution is set by
hand; everything after that is its own code, and DeepSpeed's.
"""

import json
import os
import sys
from pathlib import Path

import accelerate
from accelerate.utils import DeepSpeedPlugin, DistributedType
from distributed_run import config

from chunk_grpo_nb.training.config import make_config

ROOT = Path(__file__).resolve().parent.parent


class Deep(accelerate.Accelerator):
    def __init__(self, **options):
        file = json.loads((ROOT / f"data/launch/deepspeed_zero{sys.argv[3]}.json").read_text())
        super().__init__(**options)
        os.environ |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }  # as accelerate launch does
        plugin = DeepSpeedPlugin(hf_ds_config=file)
        plugin.select(_from_accelerator_state=True)
        self.state.distributed_type, self.state.deepspeed_plugins, self.deepspeed_engine_wrapped = (
            DistributedType.DEEPSPEED,
            {"default": plugin},
            None,
        )


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        accelerate.Accelerator = Deep
    from chunk_grpo_nb.training.trainer import train

    c = make_config(
        base=config(folder),
        lora_rank=2 * (name.startswith("lora")),
        mixed_precision="bf16" if "bf16" in name else "no",
        micro_batch=2,
        updates_per_iteration=2,
        iterations=2,
        checkpoint_every=1,
    )
    train(c, folder / name)
    train(make_config(base=c, iterations=3), folder / name, resume=True)
