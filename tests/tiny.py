"""Policies on tiny random pipelines, and the checks that every family of pipelines must pass.

Tests and the support table share them.
"""

from __future__ import annotations

import tempfile
import warnings

import torch
from PIL import Image

from chunk_grpo_nb.models.pipelines import flow_scheduler, source_area
from chunk_grpo_nb.models.policy import Policy, Recording, Sampler, check_replay, load_policy
from chunk_grpo_nb.models.tiny import (
    TINY,
    TINY_SIZE,
    TINY_WORLD,
    tiny_embeddings,
    tiny_pipeline,
)
from chunk_grpo_nb.prompts import Prompt

PROMPTS = ["a red circle", "a red circle", "two blue square and a green circle"]
SEEDS = {"init_seeds": [1, 2, 3], "noise_seeds": [4, 5, 6]}
FAMILIES = list(TINY)


def tiny_policy(name: str = "flux", prompts=PROMPTS, pipe=None, **options) -> Policy:
    """A fresh policy on a tiny pipeline.

    Prompts get embeddings where the pipeline has no text encoder.
    """
    policy = load_policy(pipe or tiny_pipeline(name), **options)
    policy.world.update(TINY_WORLD.get(name, {}))
    if policy.pipe.tokenizer is None:
        dtype = policy.transformer.dtype
        for prompt in dict.fromkeys(prompts):
            values = tiny_embeddings(name, prompt)
            policy.set_embeddings(
                prompt, {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
            )
    return policy


def tiny_sampler(name: str = "flux", **options) -> Sampler:
    """Five steps at the smallest size of the family."""
    size = TINY_SIZE.get(name, 8)
    return Sampler(**{"num_steps": 5, "height": size, "width": size} | options)


def picture(colours: tuple = ("red", "blue"), size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture in two halves."""
    image = Image.new("RGB", size, colours[0])
    image.paste(colours[1], (0, 0, size[0] // 2, size[1]))
    return image


PICTURES = [picture(), picture(("white", "green")), picture(("black", "red"))]  # of PROMPTS


def asked(policy: Policy) -> tuple[list, dict[str, list[int]]]:
    """Prompts and seeds: three, with pictures for an editing model, or as many as it draws."""
    prompts = PROMPTS
    if policy.family.sources:
        pairs = zip(PROMPTS, PICTURES, strict=True)
        prompts = [Prompt(text, {"image": image}) for text, image in pairs]
    most = policy.family.most_images or len(prompts)
    return prompts[:most], {name: seeds[:most] for name, seeds in SEEDS.items()}


def draw(policy: Policy, sampler: Sampler, **options) -> Recording:
    prompts, seeds = asked(policy)
    return policy.sample(prompts, sampler, **seeds, **options)


def stock_images(policy: Policy, name: str, pipe=None, output_type: str = "pil", **options):
    """What the stock pipeline draws with a FlowMatchEuler scheduler.

    Same embeddings, same generators, no code of ours in its loop.
    """
    pipe, sampler = pipe or policy.pipe, tiny_sampler(name)
    stock, pipe.scheduler = pipe.scheduler, flow_scheduler(pipe)
    guidance = sampler.guidance(pipe)
    is_guided = policy.family.is_guided(pipe, guidance)
    seeds = asked(policy)[1]["init_seeds"]
    try:
        with source_area(pipe, policy.world.get("source_area")):
            return pipe(
                **stock_prompts(policy, is_guided, sampler),
                **{policy.family.guidance_arg: guidance},
                **policy.family.call_options,
                num_inference_steps=sampler.num_steps,
                height=sampler.height,
                width=sampler.width,
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                output_type=output_type,
                **options,
            ).images
    finally:
        pipe.scheduler = stock


def stock_prompts(policy: Policy, is_guided: bool, sampler: Sampler) -> dict:
    """What the stock pipeline is told: texts where it can read them, pictures as PIL images."""
    prompts, _ = asked(policy)
    if policy.family.sources is None:
        return policy.text.batch(prompts, is_guided).embeddings
    # of a shape that the pipeline itself would make of the pictures, so that ours are fitted to it
    pictures = policy.sources_of(prompts, sampler.height, sampler.width)
    texts = [prompt.text for prompt in prompts]
    embeddings = policy.text.batch(texts, is_guided, pictures).embeddings
    kontext = {"max_area": sampler.height * sampler.width, "_auto_resize": False}
    own = kontext if policy.family.name == "FLUX.1 Kontext" else {}
    return {**embeddings, "image": pictures, **own}


def same_images(a: list, b: list) -> bool:
    return [image.tobytes() for image in a] == [image.tobytes() for image in b]


def disturb(policy: Policy, scale: float = 0.05, seed: int = 0) -> None:
    """Move the trained weights by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable_parameters():
        p.data += scale * torch.randn(p.shape, generator=generator).to(p)


def all_pairs(recording: Recording) -> tuple[torch.Tensor, torch.Tensor]:
    """Every trained (row, step) pair, in a shuffled order."""
    pairs = torch.cartesian_prod(
        torch.arange(len(recording)), torch.arange(recording.num_steps - 1)
    )
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    return pairs[:, 0], pairs[:, 1]


# -- checks of a family: each raises AssertionError or returns a short note --


def check_noise_free_sampling(name: str) -> str:
    """With noise level 0, the recorder gives the stock pipeline's latents and images exactly."""
    policy = tiny_policy(name, lora_rank=2)
    stock = stock_images(policy, name)
    for options in ({"noise_level": 0.0}, {"kind": "ode"}):
        recording = draw(policy, tiny_sampler(name, **options))
        assert recording.log_probs.shape == (len(recording), 0)
        assert same_images(policy.decode(recording), stock), (
            f"{name}: images differ from the stock pipeline's"
        )
    if name != "flux2-klein":  # its "latent" output is already unpacked
        assert torch.equal(recording.final, stock_images(policy, name, output_type="latent")), (
            f"{name}: latents differ from the stock pipeline's"
        )
    return "bit-equal"


def check_replay_equals_recording(name: str) -> str:
    """Replay gives the recorded velocity exactly at the rollout's batch shape, and gradients.

    At other batch shapes up to rounding.
    """
    policy = tiny_policy(name, lora_rank=2)
    recording = draw(policy, tiny_sampler(name))
    report = check_replay(policy, recording)
    assert (
        report["velocity_error"] == 0
        and report["log_prob_error"] == 0
        and report["gradient_norm"] > 0
    ), report
    rows, steps = all_pairs(recording)
    velocity = policy.velocity(recording, rows, steps)
    error = (velocity - recording.velocities[rows, steps]).norm() / velocity.norm()
    assert velocity.requires_grad and error < 1e-5, (
        f"{name}: relative error {error:.2g} in shuffled rows"
    )
    return f"{error:.0e}"


def check_gradient(name: str) -> str:
    """The derivative of the replayed velocity is that of the pipeline's own.

    By finite differences of two rollouts.
    """
    policy = tiny_policy(name, lora_rank=2)
    disturb(policy)
    parameters, sampler = policy.trainable_parameters(), tiny_sampler(name)
    recording = draw(policy, sampler)
    rows = torch.arange(len(recording))
    weights = torch.randn(recording.final.shape, generator=torch.Generator().manual_seed(1))
    velocity = policy.velocity(recording, rows, torch.zeros_like(rows))
    found = torch.autograd.grad(
        (velocity * weights).sum(), parameters, allow_unused=True
    )  # Qwen-Image drops the last block's text output
    moving = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
    grads = [g for _, g in moving]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    moved = []
    for sign in (1, -1):
        for p, g in moving:
            p.data += sign * 5e-4 * g / norm
        moved.append((draw(policy, sampler).velocities[:, 0].double() * weights).sum())
        for p, g in moving:
            p.data -= sign * 5e-4 * g / norm
    slope = (moved[0] - moved[1]) / 1e-3  # a small step: Sana's attention has kinks (ReLU)
    error = abs(slope / norm - 1).item()
    assert error < 2e-2, f"{name}: slope {slope:.4g}, gradient {norm:.4g}"
    return f"{error:.0e}"


def check_ratio_is_one(name: str) -> str:
    """Before any update every ratio is 1, within 1e-5 for shuffled pairs.

    Exactly at the rollout's batch shape.
    """
    policy = tiny_policy(name, lora_rank=2)
    recording = draw(policy, tiny_sampler(name))
    everyone = torch.arange(len(recording))
    for step in range(recording.num_steps - 1):
        log_prob, _, _ = policy.log_prob(recording, everyone, torch.full_like(everyone, step))
        assert torch.equal(log_prob, recording.log_probs[:, step]), f"{name}: step {step}"
    rows, steps = all_pairs(recording)
    change = policy.log_prob(recording, rows, steps)[0] - recording.log_probs[rows, steps]
    assert change.abs().max() < 1e-5
    return f"{change.abs().max():.0e}"


def check_update_changes_image(name: str) -> str:
    """One LoRA update on a policy-gradient loss moves every image.

    The reference still draws the old ones, exactly.
    """
    policy = tiny_policy(name, lora_rank=2)
    plain, recording = tiny_sampler(name, kind="ode"), draw(policy, tiny_sampler(name))
    before = draw(policy, plain).final
    rows, steps = all_pairs(recording)
    optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=1.0)
    (
        policy.log_prob(recording, rows, steps)[0] * torch.tensor([1.0, -1.0, 0.5])[rows]
    ).mean().backward()
    optimizer.step()
    moved = (draw(policy, plain).final - before).flatten(1).abs().amax(1)
    assert (moved > 0).all(), f"{name}: {moved}"
    with policy.reference():
        assert torch.equal(draw(policy, plain).final, before), (
            f"{name}: the reference is not the base model"
        )
    return f"{moved.max():.0e}"


def check_lora_loads_in_stock(name: str) -> str:
    """The saved LoRA, loaded into a stock pipeline, draws the trained images."""
    policy = tiny_policy(name, lora_rank=2, lora_alpha=3)
    disturb(policy)
    images = policy.decode(draw(policy, tiny_sampler(name, kind="ode")))
    stock = tiny_pipeline(name)
    assert not same_images(stock_images(policy, name, stock), images)
    with tempfile.TemporaryDirectory() as folder:
        stock.load_lora_weights(policy.save(folder))
    assert same_images(stock_images(policy, name, stock), images), (
        f"{name}: the LoRA draws other images in the stock pipeline"
    )
    return "same images"


CHECKS = {  # column of the support table -> check
    "noise 0 = stock": check_noise_free_sampling,
    "replay = recording": check_replay_equals_recording,
    "gradient": check_gradient,
    "ratio 1": check_ratio_is_one,
    "update": check_update_changes_image,
    "LoRA in stock": check_lora_loads_in_stock,
}


def quiet() -> None:
    """Silence diffusers' notes about text-encoder LoRAs that are not there."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="peft")
