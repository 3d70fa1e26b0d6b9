"""One GPU, a transformer of FLUX.1-dev's exact size with random weights: time, memory, precision.

    python ci/gpu_benchmark.py OUT.json [--size flux|tiny] [--arms lora full]

Setting: 720 x 720 pixels, group of 12, 17 steps, chunks 2-3-4-7, half the chunks trained, bf16,
gradient checkpointing. Measured for an iteration of Chunk-GRPO: seconds per stage, images per
second, peak memory, share of the card's own measured bf16 matrix peak; |change of the log-prob|
and chunk ratios of a replay at several micro-batches; whole chunks against streamed ones. Once as
LoRA of rank 64, once as a full fine-tune with 8-bit AdamW states and stochastic rounding (torchao).
`--size tiny` runs the same code on a CPU.
"""

import argparse
import gc
import json
import platform
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from chunk_grpo_nb.analysis.architectures import SHAPES
from chunk_grpo_nb.analysis.speed import matrix_peak
from chunk_grpo_nb.models.policy import Sampler, load_policy
from chunk_grpo_nb.objective import chunk_ratio
from chunk_grpo_nb.prompts import Prompt
from chunk_grpo_nb.training.assignment import assign_credit
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.gradient import accumulate_gradient
from chunk_grpo_nb.training.profiling import best_clock
from chunk_grpo_nb.training.rollout import draw_rollout
from chunk_grpo_nb.trust_regions import TrustRegion

FLUX = SHAPES["black-forest-labs/FLUX.1-dev"]
NUM_STEPS = 17
LORA_RANK = 64


@dataclass(frozen=True)
class Size:
    """What is measured: configurations of transformer and decoder, pixels, group size, tokens."""

    transformer: dict
    vae: dict
    pixels: int
    group: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Text and latent tokens of one image."""
        return self.text_tokens + (self.pixels // 16) ** 2


FLUX_VAE = {**FLUX.vae[1], "scaling_factor": 0.3611, "shift_factor": 0.1159}
TINY_TRANSFORMER = {
    **FLUX.transformer[1],
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 4, 8),
}
SIZES = {
    "flux": Size(FLUX.transformer[1], FLUX_VAE, 720, 12, 512),
    "tiny": Size(TINY_TRANSFORMER, {**FLUX_VAE, "block_out_channels": (32,) * 4}, 64, 4, 16),
}


@contextmanager
def stage(report: dict, name: str):
    """Put seconds and peak memory (GiB, None on a CPU) of a block into the report."""
    cuda = torch.cuda.is_available()
    clock = best_clock("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    yield
    seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    report[name] = {"seconds": seconds, "peak_gib": peak}
    print(name, report[name], flush=True)


def build_pipeline(size: Size, device: str):
    """A `FluxPipeline` with random bf16 weights and no text encoders."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = FluxTransformer2DModel(**size.transformer)
        vae = AutoencoderKL(**size.vae)
    torch.set_default_dtype(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=3.0,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def build_policy(size: Size, device: str, full: bool):
    """The policy of an arm, with random embeddings for its one prompt."""
    policy = load_policy(
        build_pipeline(size, device),
        device=device,
        dtype="bfloat16",
        lora_rank=0 if full else LORA_RANK,
        gradient_checkpointing=True,
    )
    config = policy.transformer.config
    sequence = torch.randn(size.text_tokens, config.joint_attention_dim, dtype=torch.bfloat16)
    pooled = torch.randn(config.pooled_projection_dim, dtype=torch.bfloat16)
    embeddings = {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}
    policy.set_embeddings("a prompt", embeddings)
    return policy


def build_optimizer(policy, full: bool):
    """AdamW for a LoRA, torchao's 8-bit AdamW with stochastic rounding for all weights."""
    if not full:
        return torch.optim.AdamW(policy.trainable_parameters(), lr=1e-5)
    from torchao.optim import AdamW8bit

    return AdamW8bit(policy.trainable_parameters(), lr=1e-5, bf16_stochastic_round=True)


def flops_per_image_step(transformer, tokens: int) -> float:
    """Of one forward pass: two per weight that multiplies tokens, and attention.

    Modulation layers act once per image and are left out.
    """
    weights = 0
    for name, parameter in transformer.named_parameters():
        modulation = ".norm" in name and "linear" in name
        if "lora_" not in name and not modulation:
            weights += parameter.numel()
    config = transformer.config
    blocks = config.num_layers + config.num_single_layers
    width = config.attention_head_dim * config.num_attention_heads
    return 2 * weights * tokens + 4 * blocks * tokens**2 * width


def sample(policy, size: Size, report: dict):
    """The rollout of one prompt's group under a reward of random numbers."""
    decode, clock = policy.decode, best_clock(policy.device)

    def timed_decode(recording):
        start = clock()
        images = decode(recording, batch=4)
        report["decode_seconds"] = clock() - start
        return images

    def score(images, prompts):
        generator = torch.Generator().manual_seed(0)
        return {"noise": torch.randn(len(images), generator=generator).double()}

    policy.decode = timed_decode
    sampler = Sampler(NUM_STEPS, "flow", 0.7, 3.0, 3.5, size.pixels, size.pixels)
    prompts = [Prompt("a prompt")]
    options = {"iteration": 0, "seed": 0, "group_size": size.group}
    with stage(report, "sample_and_decode"), torch.no_grad():
        rollout = draw_rollout(policy, prompts, sampler, score, **options)
    report["dynamics_curve"] = rollout.curves.mean(0).tolist()
    report["latents_finite"] = bool(torch.isfinite(rollout.recordings[0].latents).all())
    return rollout


def assign(size: Size, rollout):
    """Advantages and drawn chunks of the rollout."""
    config = make_config(
        {
            "num_steps": NUM_STEPS,
            "chunker": "fixed:2,3,4,7",
            "prompts_per_iteration": 1,
            "group_size": size.group,
            "updates_per_iteration": 1,
            "rewards": {"noise": 1.0},
            "clip_low": 5e-5,
            "clip_high": 5e-5,
        }
    )
    sigmas = rollout.recordings[0].sigmas[:-1]
    return assign_credit(config, rollout.rewards, rollout.curves, 0, sigmas)


def update(policy, rollout, credit, members, **options):
    found = accumulate_gradient(
        policy, rollout, credit, members, TrustRegion(5e-5, 5e-5), **options
    )
    return found.change.log_ratios, found.evaluations_trained, found.evaluations_ratio


def speed(report: dict, policy, size: Size, rows: int, full: bool, peak: float) -> dict:
    """Rates of the stages that the report holds, for `rows` trained transitions."""
    forward = flops_per_image_step(policy.transformer, size.tokens)
    stages = ("sample_and_decode", "gradient_on_policy", "optimizer_step")
    iteration = sum(report[name]["seconds"] for name in stages)
    sampling = report["sample_and_decode"]["seconds"] - report["decode_seconds"]
    training = report["gradient_on_policy"]["seconds"]
    # forward, recomputed forward, gradient of activations; a full fine-tune adds that of weights
    passes = 4 if full else 3
    return {
        "tokens": size.tokens,
        "forward_flops_per_image_step": forward,
        "rows_trained": rows,
        "iteration_seconds": iteration,
        "images_per_second_sampled": size.group / sampling,
        "images_per_second_iteration": size.group / iteration,
        "sampling_share_of_peak": size.group * NUM_STEPS * forward / sampling / peak,
        "training_share_of_peak": rows * passes * forward / training / peak,
    }


def compare_streaming(report: dict, policy, rollout, credit) -> None:
    """Gradients of whole chunks and of streamed ones, off policy: time, memory, difference."""
    for parameter in policy.trainable_parameters():
        parameter.data.add_(1e-3 * torch.randn_like(parameter))  # as if updates had happened
    gradients = {}
    for name, micro_batch, samples in (
        ("whole_chunks", 16, 4),
        ("streamed_4", 4, 4),
        ("streamed_1", 1, 1),
    ):
        chosen = list(range(samples))
        with stage(report, name):
            _, rows, ratio_rows = update(policy, rollout, credit, chosen, micro_batch=micro_batch)
        report[name] |= {"rows": rows, "ratio_rows": ratio_rows, "samples": samples}
        parameters = policy.trainable_parameters()
        gradients[name] = torch.cat([p.grad.flatten() for p in parameters]).cpu()
        for parameter in parameters:
            parameter.grad = None
    whole = gradients["whole_chunks"]
    difference = (whole - gradients["streamed_4"]).norm() / whole.norm()
    report["streamed_gradient_relative_difference"] = difference.item()


def replay_precision(policy, rollout, credit, samples: list[int], micro_batch: int) -> dict:
    """What replaying unchanged weights does to log-probs and chunk ratios, which should stay 1."""
    old, new = rollout.log_probs, rollout.log_probs.clone()
    pairs = torch.cartesian_prod(torch.tensor(samples), torch.arange(old.shape[1]))
    for rows, steps in (part.unbind(1) for part in pairs.split(micro_batch)):
        with torch.no_grad():
            log_probs = policy.log_prob(rollout.recordings[0], rows, steps)[0]
        new[rows.to(new.device), steps.to(new.device)] = log_probs.to(new)
    ids = credit.chunk_ids[samples].to(new.device)
    shift = (new - old).abs()[samples]
    ratio = chunk_ratio(new[samples], old[samples], ids)
    found = {
        "log_prob_shift_mean": shift.mean().item(),
        "log_prob_shift_max": shift.max().item(),
        "per_step": shift.mean(0).tolist(),
        "ratio_std_per_chunk": ratio.std(0).tolist(),
        "ratio_max_deviation": (ratio - 1).abs().max().item(),
    }
    print("precision", micro_batch, found["log_prob_shift_max"], flush=True)
    return found


def run_arm(size: Size, device: str, full: bool, peak: float) -> dict:
    """All measurements of one arm; `peak` is the card's measured rate in FLOP/s."""
    whole = "all weights, bf16, AdamW8bit with stochastic rounding"
    adapters = f"LoRA rank {LORA_RANK}, float32 adapters on bf16"
    report: dict = {"trains": whole if full else adapters}
    with stage(report, "build"):
        policy = build_policy(size, device, full)
    rollout = sample(policy, size, report)
    credit = assign(size, rollout)
    optimizer = build_optimizer(policy, full)
    everyone = list(range(size.group))
    with stage(report, "gradient_on_policy"):
        _, rows, _ = update(policy, rollout, credit, everyone, on_policy=True, micro_batch=4)
    with stage(report, "optimizer_step"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    report |= speed(report, policy, size, rows, full, peak)
    if full:
        return report
    compare_streaming(report, policy, rollout, credit)
    for parameter in policy.trainable_parameters():
        parameter.data.zero_()  # the adapters do nothing, as at the rollout
    report["precision_by_micro_batch"] = {
        str(micro_batch): replay_precision(policy, rollout, credit, everyone[:4], micro_batch)
        for micro_batch in (12, 4, 1)
    }
    return report


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="flux")
    parser.add_argument("--arms", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    sides = (4096, 8192) if cuda else (256,)
    peak = max(matrix_peak(device, torch.bfloat16, sides).values())
    report = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "size": options.size,
        "matrix_peak_tflops": peak / 1e12,
    }
    for arm in options.arms:
        try:
            report[arm] = run_arm(SIZES[options.size], device, arm == "full", peak)
        except Exception as error:  # an arm that does not fit must not lose the others
            report[arm] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        print(arm, json.dumps(report[arm], default=str)[:1500], flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
