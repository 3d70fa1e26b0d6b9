"""The memory planner against PyTorch's own count of allocations, published sizes, and by hand."""

from dataclasses import replace

import pytest
import torch

from chunk_grpo_nb.analysis.architectures import SHAPES, pipeline_shape, transformer_parameters
from chunk_grpo_nb.analysis.memory import MemoryPlan, card_bytes, plan_memory
from chunk_grpo_nb.analysis.tracing import (
    LiveBytes,
    activation_bytes,
    decode_bytes,
    measured_peak,
    run_transformer,
)
from chunk_grpo_nb.training.config import Config, make_config

FLUX = "black-forest-labs/FLUX.1-dev"
BILLIONS = {  # as published by the makers of each model
    FLUX: 11.9,
    "black-forest-labs/FLUX.1-schnell": 11.9,
    "black-forest-labs/FLUX.2-dev": 32,
    "black-forest-labs/FLUX.2-klein-4B": 4,
    "black-forest-labs/FLUX.2-klein-9B": 9,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2,
    "stabilityai/stable-diffusion-3.5-medium": 2.5,
    "stabilityai/stable-diffusion-3.5-large": 8.1,
    "Qwen/Qwen-Image": 20,
    "Tongyi-MAI/Z-Image": 6,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1.6,
}
SMALL = {  # of each class of transformer: a configuration that a CPU runs in a moment
    FLUX: {
        "num_layers": 4,
        "num_single_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "black-forest-labs/FLUX.2-dev": {
        "in_channels": 64,
        "num_layers": 3,
        "num_single_layers": 5,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 8, 8, 8),
        "joint_attention_dim": 64,
    },
    "stabilityai/stable-diffusion-3.5-large": {
        "num_layers": 5,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "caption_projection_dim": 128,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "Qwen/Qwen-Image": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 5,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "joint_attention_dim": 64,
    },
    "Tongyi-MAI/Z-Image": {
        "dim": 128,
        "n_layers": 5,
        "n_heads": 4,
        "n_kv_heads": 4,
        "cap_feat_dim": 64,
        "axes_dims": (8, 12, 12),
    },
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 5,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 128,
        "caption_channels": 64,
    },
}


def small(name: str):
    shape = SHAPES[name]
    return replace(
        shape,
        transformer=(shape.transformer[0], shape.transformer[1] | SMALL[name]),
        text_tokens=24,
        compression=8,
    )


def test_live_bytes_counts_storages_once_and_forgets_them():
    weight = torch.zeros(100)
    with LiveBytes([weight]) as live:
        weight.mul_(2)
        kept = weight[:50] + 1
        view = kept[:10]
        (kept * 2).sum()
    assert (live.now, live.peak) == (200, 404)
    del kept, view
    assert live.now == 0


@pytest.mark.parametrize("name", BILLIONS)
def test_known_configurations_have_the_published_size(name):
    weights, trained, block = transformer_parameters(SHAPES[name])
    assert abs(weights / 1e9 / BILLIONS[name] - 1) < 0.12, weights
    assert trained == weights and block < weights / 10
    assert name != FLUX or weights == 11_901_408_320


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True, "lora_rank": 4}],
    ids=["all", "lora-checkpointing"],
)
def test_planned_activations_are_the_measured_ones(name, options):
    config = make_config(height=192, width=192, **options)
    planned = activation_bytes(small(name), config, rows=2)
    measured = measured_peak(run_transformer(small(name), config, rows=2)[1])
    # may err high: +11 % seen for Qwen-Image's LoRA with checkpointing, cause not found
    assert 0.95 < planned / measured < 1.15, (planned, measured)


def test_autocast_keeps_a_cast_copy_of_trained_weights():
    shape, plain = small(FLUX), make_config(height=64, width=64, gradient_checkpointing=True)
    weights, *_ = transformer_parameters(shape)
    cast, uncast = (
        activation_bytes(shape, c, rows=1, backward=False)
        for c in (make_config(base=plain, mixed_precision="bf16"), plain)
    )
    assert cast - uncast > 1.5 * weights, "bf16 copies, 2 bytes a weight"


def test_rows_and_checkpointing_move_the_plan_as_they_should():
    shape, config = small(FLUX), make_config(height=128, width=128)
    one, two, three = (activation_bytes(shape, config, rows=r) for r in (1, 2, 3))
    assert abs((three - two) / (two - one) - 1) < 0.02
    assert (
        activation_bytes(shape, make_config(base=config, gradient_checkpointing=True), rows=3)
        < 0.6 * three
    )


def test_decoding_is_the_measured_one():
    import diffusers

    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    shape = replace(small(FLUX), vae=("AutoencoderKL", vae), compression=2)
    model, latents = diffusers.AutoencoderKL(**vae).eval(), torch.zeros(2, 4, 48, 48)

    @torch.no_grad()
    def decode():
        model.decode(latents)

    assert (
        abs(decode_bytes(shape, make_config(height=96, width=96), 2) / measured_peak(decode) - 1)
        < 0.25
    )  # a CPU convolution keeps workspaces


def test_states_and_shards_by_hand():
    config = make_config(
        model=FLUX,
        lora_rank=0,
        dtype="float32",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        offload_text=True,
        ema_decay=0.9,
        height=64,
        width=64,
        prompts_per_iteration=8,
        group_size=2,
        rollout_batch=1,
        micro_batch=1,
        rewards={"hpsv3": 1.0},
    )
    whole, shard = plan_memory(config), plan_memory(config, processes=8, sharded=True)
    n = 11_901_408_320
    assert (
        whole.resident["transformer"]
        == whole.resident["gradients"]
        == whole.resident["moving average"]
        == 4 * n
    )
    assert (
        whole.resident["optimiser states"] == 8 * n
        and whole.resident["reward models"] == pytest.approx(16.6e9)
        and not whole.fits
    )
    for part in ("transformer", "gradients", "optimiser states", "moving average"):
        assert shard.resident[part] == whole.resident[part] / 8
    assert shard.resident["trajectories"] == 2 * 35 * 8 * 8 * 16 * 4
    assert "DOES NOT FIT" in whole.table() and "encode prompts" in whole.table()


def test_a_pipeline_folder_is_read_not_loaded():
    shape = pipeline_shape("shapes")
    plan = plan_memory(Config(), "4GB")  # 768 rows at once: 1.6 GB
    assert shape.pipeline == "FluxPipeline" and shape.size == 32 and 0 < shape.text_parameters < 1e8
    assert plan.fits and any("shapes_dense" in n for n in plan.notes)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: card_bytes("80 apples"), "80GB or 79GiB"),
        (lambda: pipeline_shape("someone/unknown"), "not known offline"),
        (lambda: card_bytes("0GB"), "80GB or 79GiB"),
        (lambda: card_bytes("٨GB"), "80GB or 79GiB"),
        (lambda: card_bytes(float("nan")), "80GB or 79GiB"),
        (lambda: plan_memory(Config(), bits=4), "lora_rank > 0"),
        (lambda: plan_memory(Config(), bits=3), "bits = 3: 4 or 8"),
        (lambda: plan_memory(Config(), processes=0), "processes = 0: from 1 to"),
        (lambda: plan_memory(Config(), processes=10**6), "images of an iteration"),
        (lambda: plan_memory(Config(), reserve=1.0), "reserve = 1.0"),
    ],
)
def test_refusals_name_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_validation_counts():
    """The images of a validation are planned as they are drawn: `rollout_batch` at a time."""
    shape = small(FLUX)
    options = {"height": 64, "width": 64, "prompts_per_iteration": 1, "group_size": 2}
    once = make_config(**options, validation_images=24)
    batched = make_config({"rollout_batch": 2}, once)
    never = make_config({"validate_every": 0}, once)
    stages = plan_memory(once, shape=shape).stages
    assert stages["validate 24 images"] > 8 * stages["sample 2 images"]
    assert stages["decode 24 images"] > 8 * stages["decode 2 images"]
    assert "validate 2 images" in plan_memory(batched, shape=shape).stages
    assert not any("validate" in name for name in plan_memory(never, shape=shape).stages)


def test_the_card_and_its_reserve():
    assert card_bytes("80GB") == 80e9 and card_bytes("1.5GiB") == 1.5 * 2**30 and card_bytes(7) == 7
    plan = MemoryPlan({"a": 70.0}, {"s": 20.0, "t": 5.0}, card=100.0, reserve=0.1, notes=())
    assert plan.peak == 90 and plan.fits and not replace(plan, reserve=0.11).fits
