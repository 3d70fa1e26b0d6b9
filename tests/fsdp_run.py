"""Gradients of a transformer sharded by `fully_shard` against the unsharded ones.

Run under `torch.distributed.run --nproc_per_node 2` on gloo.
"""

import faulthandler
import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
from tiny import disturb, tiny_policy, tiny_sampler
from torch.distributed.fsdp import fully_shard

from chunk_grpo_nb.prompts import Prompt
from chunk_grpo_nb.training.assignment import assign_credit
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.gradient import Differentiator, accumulate_gradient
from chunk_grpo_nb.training.rollout import draw_rollout
from chunk_grpo_nb.trust_regions import TrustRegion

REGION = TrustRegion(0.05, 0.05)
PROMPTS = [Prompt("a red circle"), Prompt("two blue square")]
CONFIG = make_config(
    num_steps=5,
    chunker="fixed:1,3",
    fraction=1.0,
    prompts_per_iteration=2,
    group_size=2,
    updates_per_iteration=1,
    rewards={"number": 1.0},
)


def score(images, prompts):
    return {
        "number": torch.tensor(
            [float(sum(i.resize((1, 1)).getpixel((0, 0)))) for i in images], dtype=torch.float64
        )
    }


def rollout_of(policy, share=(0, 1)):
    with torch.no_grad():
        return draw_rollout(
            policy,
            PROMPTS,
            tiny_sampler("flux"),
            score,
            iteration=0,
            seed=0,
            group_size=2,
            share=share,
        )


def policy_of(lora_rank: int):
    policy = tiny_policy("flux", lora_rank=lora_rank, gradient_checkpointing=True)
    policy.pipe.to(torch.float64)
    disturb(policy, 0.05, seed=1)
    return policy


def shard(policy):
    transformer = policy.transformer
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block)
    fully_shard(transformer)


class Sharded(Differentiator):
    """What holds for weights in parts on all processes."""

    equal_passes = True

    def __init__(self):
        self.loss_scale = float(dist.get_world_size())

    def agree_on_passes(self, passes: int) -> int:
        count = torch.tensor(passes)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return int(count)


def compare(lora_rank: int, members: list[int], **options) -> float:
    """Largest relative difference of the gradient over both processes to that of one alone."""
    rank = dist.get_rank()
    alone = policy_of(lora_rank)
    whole = rollout_of(alone)
    sigmas = whole.recordings[0].sigmas[:-1]
    credit = assign_credit(CONFIG, whole.rewards, whole.curves, 0, sigmas)
    on_policy = options.get("on_policy", False)
    if not on_policy:
        disturb(alone, 0.01, seed=2)
    accumulate_gradient(alone, whole, credit, members, REGION, **options)

    sharded = policy_of(lora_rank)
    shared = rollout_of(
        sharded, share=(rank, 2)
    )  # drawn before sharding: the same numbers in both arms
    if not on_policy:
        disturb(sharded, 0.01, seed=2)
    shard(sharded)
    mine = range(shared.samples[0], shared.samples[0] + len(shared.samples))
    accumulate_gradient(
        sharded,
        shared,
        credit,
        [i - mine.start for i in members if i in mine],
        REGION,
        num_samples=len(members),
        differentiator=Sharded(),
        **options,
    )
    difference, size, compared = 0.0, 0.0, 0
    pairs = zip(alone.trainable_parameters(), sharded.trainable_parameters(), strict=True)
    for p, q in pairs:
        found = torch.zeros_like(p) if q.grad is None else q.grad.full_tensor()
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        difference = max(difference, (found - wanted).abs().max().item())
        size = max(size, wanted.abs().max().item())
        compared += 1
    assert size > 0 and compared
    return difference / size


def main(out: str) -> None:
    faulthandler.dump_traceback_later(
        100, exit=True
    )  # a collective that waits for ever must not hang the tests
    dist.init_process_group("gloo")
    found = {
        "lora": compare(2, [0, 1, 2, 3], micro_batch=3),
        "full": compare(0, [0, 1, 2, 3], micro_batch=3),
        "first update": compare(2, [0, 1, 2, 3], on_policy=True),
        "uneven passes": compare(2, [0, 1, 2], micro_batch=1),
        "one process idle": compare(2, [0, 1], micro_batch=2),
        "kl, one process idle": compare(2, [0, 1], micro_batch=2, kl_weight=0.1),
    }
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    dist.barrier()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's threads may keep the process alive
