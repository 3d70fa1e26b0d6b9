"""What is saved can be used: model cards whose code runs, LoRA files that other programs read."""

import re

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import PROMPTS, SEEDS, disturb, draw, stock_images, tiny_policy, tiny_sampler
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.models.adapters import COMFYUI_FILE, LORA_FILE
from chunk_grpo_nb.models.policy import Sampler, load_policy
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.training.records import read_rows
from chunk_grpo_nb.training.trainer import train


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pipes"), "flux", "sd3")


AS_TRAINED = Sampler(6, "ode", shift=3.0, height=16, width=16)


def images_of(pipe, policy):
    """What the pipeline of a card draws for the prompts of `draw`, as the card calls it."""
    text = policy.text.batch(PROMPTS, guided=policy.family.is_guided(pipe, 1e3)).embeddings
    return pipe(
        **text,
        **policy.family.call_options,
        num_inference_steps=6,
        sigmas=torch.linspace(1, 1 / 6, 6).tolist(),
        height=16,
        width=16,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS["init_seeds"]],
    ).images


def largest_difference(a: list, b: list) -> int:
    """Of the levels of any pixel of two lists of images."""
    pairs = [(np.asarray(x, dtype=int), np.asarray(y, dtype=int)) for x, y in zip(a, b)]
    return max(int(np.abs(x - y).max()) for x, y in pairs)


def code_of(card: str) -> str:
    """The Python code in a card."""
    return re.search(r"```python\n(.*?)```", card, re.S)[1]


@pytest.mark.parametrize("family, rank", [("flux", 2), ("flux", 0), ("sd3", 2)])
def test_the_code_of_a_card_draws_with_the_trained_model(
    pipes, tmp_path, monkeypatch, family, rank
):
    model = str(pipes / family)
    settings = {"model": model, "lora_rank": rank, "iterations": 1, "learning_rate": 0.05}
    run = train(tiny_config(pipes, **settings), tmp_path / "run")
    folder = run.path / "policy"
    card = (folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(compile(code_of(card), "card", "exec"), found)
    found["pipe"].set_progress_bar_config(disable=True)
    assert (folder / "image.png").exists()
    assert found["image"].size == (16, 16)

    trained = load_policy(model, lora_rank=rank)
    trained.load_weights(folder)
    images = trained.decode(draw(trained, AS_TRAINED))
    theirs = images_of(found["pipe"], trained)
    assert largest_difference(theirs, images) <= 1
    base = load_policy(model, lora_rank=rank)
    assert largest_difference(base.decode(draw(base, AS_TRAINED)), images) > 1


def test_a_card_says_what_was_trained_and_what_came_of_it(pipes, tmp_path):
    run = train(tiny_config(pipes, lora_rank=2), tmp_path / "run")
    card = (run.path / "policy" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "diffusers" and "lora" in head["tags"]
    assert "base_model" not in head, "a folder of one's own is no model id"
    rows = read_rows(run, "validation")
    before, after = rows["redness"].iloc[0], rows["redness"].iloc[-1]
    assert f"| `redness` | {before:.4g} | {after:.4g} |" in card
    value = head["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == pytest.approx(after, abs=1e-6)
    for words in ("rank 2, alpha 4", "`fixed:2,3`", "| `learning_rate` | `0.001` |"):
        assert words in card


def test_a_run_without_validation_says_so(pipes, tmp_path):
    run = train(tiny_config(pipes, lora_rank=2, validate_every=0), tmp_path / "run")
    card = (run.path / "policy" / "README.md").read_text(encoding="utf-8")
    assert "was not validated" in card and "model-index" not in card


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_lora_keys_are_those_that_diffusers_converts_to(family, tmp_path):
    """Names as `save_lora_weights` of a stock pipeline with a stock adapter writes them."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    policy = tiny_policy(family, lora_rank=2)
    policy.save(tmp_path / "ours")
    stock = tiny_pipeline(family)
    targets = policy.transformer.peft_config["default"].target_modules
    stock.transformer.add_adapter(LoraConfig(r=2, target_modules=targets))
    layers = get_peft_model_state_dict(stock.transformer)
    stock.save_lora_weights(tmp_path / "stock", transformer_lora_layers=layers)
    keys = {name: set(load_file(tmp_path / name / LORA_FILE)) for name in ("ours", "stock")}
    assert keys["ours"] == keys["stock"]


def test_lora_keys_of_flux_are_those_of_the_converter_of_other_formats(tmp_path):
    """diffusers' own converter from kohya's names emits names that our files have."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    theirs = {}
    for branch in ("img", "txt"):
        module = f"lora_unet_double_blocks_0_{branch}_attn"
        theirs[f"{module}_qkv.lora_down.weight"] = torch.randn(2, 32)
        theirs[f"{module}_qkv.lora_up.weight"] = torch.randn(96, 2)
        theirs[f"{module}_qkv.alpha"] = torch.tensor(2.0)
        theirs[f"{module}_proj.lora_down.weight"] = torch.randn(2, 32)
        theirs[f"{module}_proj.lora_up.weight"] = torch.randn(32, 2)
        theirs[f"{module}_proj.alpha"] = torch.tensor(2.0)
    converted = set(_convert_kohya_flux_lora_to_diffusers(theirs))
    tiny_policy("flux", lora_rank=2).save(tmp_path)
    ours = {k for k in load_file(tmp_path / LORA_FILE) if k.startswith("transformer.transformer_b")}
    assert ours == converted


def comfyui_layers(path) -> dict[str, torch.Tensor]:
    """Layer -> change of its weight, as ComfyUI computes it.

    It looks for `transformer.LAYER.lora_A.weight`, `….lora_B.weight` and, for the strength,
    `….alpha`; the metadata of the file are not read.
    """
    weights = load_file(path)
    layers = {name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name}
    assert {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"} == set(weights)
    assert all(layer.startswith("transformer.") for layer in layers)
    return {x: weights[f"{x}.lora_B.weight"] @ weights[f"{x}.lora_A.weight"] for x in layers}


@pytest.mark.parametrize("alpha", [2, 3, 4])
def test_comfyui_draws_with_the_strength_that_was_trained(alpha, tmp_path):
    policy = tiny_policy("flux", lora_rank=2, lora_alpha=alpha)
    disturb(policy)
    policy.save(tmp_path)
    with safe_open(tmp_path / COMFYUI_FILE, "pt") as file:
        assert "lora_adapter_metadata" not in (file.metadata() or {})
    changes = comfyui_layers(tmp_path / COMFYUI_FILE)
    modules = dict(policy.transformer.named_modules())
    for layer, change in changes.items():
        module = modules[layer.removeprefix("transformer.")]
        assert torch.allclose(change, module.get_delta_weight("default"), atol=1e-6)


def test_the_copy_for_other_programs_loads_in_diffusers_too(tmp_path):
    policy = tiny_policy("flux", lora_rank=2, lora_alpha=3)
    disturb(policy)
    images = policy.decode(draw(policy, tiny_sampler("flux", kind="ode")))
    policy.save(tmp_path)
    stock = tiny_pipeline("flux")
    folder, _, name = COMFYUI_FILE.rpartition("/")
    stock.load_lora_weights(tmp_path / folder, weight_name=name)
    assert largest_difference(images, stock_images(policy, "flux", stock)) <= 1
