"""One GPU, a transformer of FLUX.1-dev's exact size with random weights: time, memory and precision of Chunk-GRPO's iteration.

    python ci/gpu_benchmark.py OUT.json [--size flux|tiny] [--arms lora full]

Setting: 720x720 pixels, group of 12, 17 steps, chunks 2-3-4-7, half the chunks trained, bf16, gradient checkpointing.
Measured: seconds per stage, images per second, peak memory, share of the card's own measured bf16 matrix peak,
|Δ log_prob| and chunk ratios of replay at several micro-batches, whole chunks against streamed ones; as LoRA of rank 64,
and as a full fine-tune with 8-bit AdamW states and stochastic rounding (torchao). `--size tiny` runs the same code on a CPU.
"""

import argparse
import gc
import json
import platform
import time
from pathlib import Path

import torch

from chunk_grpo_nb.models.policy import Sampler, load_policy
from chunk_grpo_nb.objective import chunk_ratio
from chunk_grpo_nb.prompts import Prompt
from chunk_grpo_nb.training.assignment import assign_credit
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.rollout import draw_rollout
from chunk_grpo_nb.training.trainer import accumulate_gradient

FLUX_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
FLUX_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
TINY_TRANSFORMER = {
    **FLUX_TRANSFORMER,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 4, 8),
}
SIZES = {
    "flux": (FLUX_TRANSFORMER, FLUX_VAE, 720, 12, 512),
    "tiny": (TINY_TRANSFORMER, {**FLUX_VAE, "block_out_channels": (32,) * 4}, 64, 4, 16),
}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stage:
    "Seconds and peak memory of a block."

    def __init__(self, report: dict, name: str):
        self.report, self.name = report, name

    def __enter__(self):
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def __exit__(self, *_):
        synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        self.report[self.name] = {"seconds": time.perf_counter() - self.start, "peak_gib": peak}
        print(self.name, self.report[self.name], flush=True)


def matrix_peak(device: str, n: int = 8192, repeats: int = 20) -> float:
    "Measured bf16 matrix product rate in FLOP/s on random data, median of repeats."
    n = n if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / sorted(times)[repeats // 2]


def build_pipeline(size: str, device: str):
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    transformer, vae, *_ = SIZES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        parts = FluxTransformer2DModel(**transformer), AutoencoderKL(**vae)
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
        vae=parts[1],
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=parts[0],
    )


def flops_per_image_step(transformer, tokens: int) -> float:
    "Of one forward pass: two per weight that multiplies tokens, plus attention; modulation layers act once per image and are left out."
    modulation = sum(
        p.numel() for n, p in transformer.named_parameters() if ".norm" in n and "linear" in n
    )
    weights = (
        sum(p.numel() for n, p in transformer.named_parameters() if "lora_" not in n) - modulation
    )
    c = transformer.config
    blocks, width = c.num_layers + c.num_single_layers, c.attention_head_dim * c.num_attention_heads
    return 2 * weights * tokens + 4 * blocks * tokens**2 * width


def update(policy, rollout, credit, members, **options):
    new, facts = accumulate_gradient(policy, rollout, credit, members, (5e-5, 5e-5), **options)
    return new, facts["trained"], facts["ratio"]


def precision(policy, rollout, credit, members, micro_batches) -> dict:
    "|Δ log_prob| of replaying the rollout with unchanged weights, and the spread of chunk ratios, per micro-batch."
    rows = {}
    for size in micro_batches:
        new = rollout.log_probs.clone()
        pairs = [(i, t) for i in members for t in range(new.shape[1])]
        with torch.no_grad():
            for start in range(0, len(pairs), size):
                i, t = (torch.tensor(x) for x in zip(*pairs[start : start + size]))
                new[i.to(new.device), t.to(new.device)] = policy.log_prob(
                    rollout.recordings[0], i, t
                )[0].to(new)
        chosen = torch.tensor(members)
        shift, ratio = (
            (new - rollout.log_probs).abs()[chosen],
            chunk_ratio(
                new[chosen], rollout.log_probs[chosen], credit.chunk_ids[chosen].to(new.device)
            ),
        )
        rows[str(size)] = {
            "log_prob_shift_mean": shift.mean().item(),
            "log_prob_shift_max": shift.max().item(),
            "per_step": shift.mean(0).tolist(),
            "ratio_std_per_chunk": ratio.std(0).tolist(),
            "ratio_max_deviation": (ratio - 1).abs().max().item(),
        }
        print("precision", size, rows[str(size)]["log_prob_shift_max"], flush=True)
    return rows


def optimizer_of(policy, full: bool):
    if not full:
        return torch.optim.AdamW(policy.trainable_parameters(), lr=1e-5)
    from torchao.optim import AdamW8bit

    return AdamW8bit(policy.trainable_parameters(), lr=1e-5, bf16_stochastic_round=True)


def run_arm(size: str, device: str, full: bool, peak: float) -> dict:
    _, _, pixels, group, words = SIZES[size]
    report: dict = {
        "trains": "all weights, bf16, AdamW8bit with stochastic rounding"
        if full
        else "LoRA rank 64, float32 adapters on bf16"
    }
    with Stage(report, "build"):
        policy = load_policy(
            build_pipeline(size, device),
            device=device,
            dtype="bfloat16",
            lora_rank=0 if full else 64,
            gradient_checkpointing=True,
        )
    c = policy.transformer.config
    text = {
        "prompt_embeds": torch.randn(words, c.joint_attention_dim, dtype=torch.bfloat16),
        "pooled_prompt_embeds": torch.randn(c.pooled_projection_dim, dtype=torch.bfloat16),
    }
    policy.set_embeddings("a prompt", text)
    config = make_config(
        num_steps=17,
        chunker="fixed:2,3,4,7",
        prompts_per_iteration=1,
        group_size=group,
        updates_per_iteration=1,
        rewards={"noise": 1.0},
        clip_low=5e-5,
        clip_high=5e-5,
    )
    sampler = Sampler(17, "flow", 0.7, 3.0, 3.5, pixels, pixels)
    seconds = {"decode": 0.0}

    def score(images, prompts):
        return {
            "noise": torch.randn(len(images), generator=torch.Generator().manual_seed(0)).double()
        }

    decode = policy.decode

    def timed_decode(recording):
        synchronize()
        start = time.perf_counter()
        images = decode(recording, batch=4)
        synchronize()
        seconds["decode"] = time.perf_counter() - start
        return images

    policy.decode = timed_decode
    with Stage(report, "sample_and_decode"), torch.no_grad():
        rollout = draw_rollout(
            policy, [Prompt("a prompt")], sampler, score, iteration=0, seed=0, group_size=group
        )
    report["decode_seconds"] = seconds["decode"]
    credit = assign_credit(config, rollout.rewards, rollout.curves, 0, torch.ones(16))
    report["dynamics_curve"] = rollout.curves.mean(0).tolist()
    report["latents_finite"] = bool(torch.isfinite(rollout.recordings[0].latents).all())
    optimizer, members = optimizer_of(policy, full), list(range(group))
    tokens = words + (pixels // 16) ** 2
    forward = flops_per_image_step(policy.transformer, tokens)
    with Stage(report, "gradient_on_policy"):
        _, rows, _ = update(policy, rollout, credit, members, on_policy=True, micro_batch=4)
    with Stage(report, "optimizer_step"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    iteration = sum(
        report[k]["seconds"] for k in ("sample_and_decode", "gradient_on_policy", "optimizer_step")
    )
    sampling = report["sample_and_decode"]["seconds"] - seconds["decode"]
    report |= {
        "tokens": tokens,
        "forward_flops_per_image_step": forward,
        "rows_trained": rows,
        "iteration_seconds": iteration,
        "images_per_second_sampled": group / sampling,
        "images_per_second_iteration": group / iteration,
        "sampling_share_of_peak": group * 17 * forward / sampling / peak,
        # forward, recomputed forward, gradient of activations; a full fine-tune adds the gradient of weights
        "training_share_of_peak": rows
        * (4 if full else 3)
        * forward
        / report["gradient_on_policy"]["seconds"]
        / peak,
    }
    if full:
        return report
    for p in policy.trainable_parameters():
        p.data.add_(1e-3 * torch.randn_like(p))  # as if updates had happened
    some, gradients = members[:4], {}
    for name, micro_batch in (("whole_chunks", 0), ("streamed_4", 4), ("streamed_1", 1)):
        with Stage(report, name):
            _, rows, ratio_rows = update(
                policy,
                rollout,
                credit,
                some[: 1 if micro_batch == 1 else 4],
                micro_batch=micro_batch or 16,
            )
        report[name] |= {
            "rows": rows,
            "ratio_rows": ratio_rows,
            "samples": 1 if micro_batch == 1 else 4,
        }
        gradients[name] = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()]).cpu()
        optimizer.zero_grad(set_to_none=True)
    report["streamed_gradient_relative_difference"] = (
        (gradients["whole_chunks"] - gradients["streamed_4"]).norm()
        / gradients["whole_chunks"].norm()
    ).item()
    for p in policy.trainable_parameters():
        p.data.zero_()
    report["precision_by_micro_batch"] = (
        precision(policy, rollout, credit, members[:4], [12, 4, 1]) if full is False else None
    )
    return report


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--size", choices=SIZES, default="flux")
    parser.add_argument("--arms", nargs="+", default=["lora", "full"])
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = matrix_peak(device)
    report = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "size": options.size,
        "matrix_peak_tflops": peak / 1e12,
        "setting": "720x720, group 12, 17 steps, eta 0.7, shift 3, chunks 2-3-4-7, half of them trained, bf16"
        if options.size == "flux"
        else "tiny",
    }
    for arm in options.arms:
        try:
            report[arm] = run_arm(options.size, device, arm == "full", peak)
        except Exception as error:
            report[arm] = {
                "failed": f"{type(error).__name__}: {error}"[:600]
            }  # one arm that does not fit must not lose the others
        print(arm, json.dumps(report[arm], default=str)[:1500], flush=True)
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
