"""A LoRA to start from, one that stays, a merge at the end; resume and warm start told apart."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from tiny import quiet, tiny_policy, tiny_sampler
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.analysis.cli import main
from chunk_grpo_nb.models.adapters import LORA_FILE
from chunk_grpo_nb.models.pipelines import flow_scheduler, scheduled
from chunk_grpo_nb.models.policy import load_policy
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.trainer import train

quiet()
PROMPT, SEED = ["a red circle"], {"init_seeds": [1], "noise_seeds": [2]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two LoRAs that change the model, of rank 2 (alpha 4) and 3 (alpha 3)."""
    home = make_folder(tmp_path_factory.mktemp("adapters"))
    for name, seed, size in (("start", 1, (2, 4)), ("style", 2, (3, 3))):
        policy = load_policy(str(home / "flux"), lora_rank=size[0], lora_alpha=size[1])
        generator = torch.Generator().manual_seed(seed)
        for p in policy.trainable_parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
        policy.save(home / name)
    return home


def final(policy) -> torch.Tensor:
    return policy.sample(PROMPT, tiny_sampler(kind="ode"), **SEED).final


def stock(home, *loras, folder="flux") -> torch.Tensor:
    """What stock diffusers draws with these LoRAs, each at full strength."""
    pipe = FluxPipeline.from_pretrained(home / folder)
    pipe.set_progress_bar_config(disable=True)
    for name in loras:
        pipe.load_lora_weights(home / name, weight_name=LORA_FILE, adapter_name=name)
    if loras:
        pipe.set_adapters(list(loras))
    options = {"height": 8, "width": 8, "num_inference_steps": 5, "output_type": "latent"}
    with scheduled(pipe, flow_scheduler(pipe)):
        generator = torch.Generator().manual_seed(1)
        return pipe(PROMPT[0], generator=generator, max_sequence_length=16, **options).images


def policy_of(home, **options):
    return load_policy(str(home / "flux"), **options)


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-3, atol=1e-3)


def test_training_starts_from_the_weights_of_a_file(home):
    plain = policy_of(home, lora_rank=2)
    for source in (home / "start", home / "start" / LORA_FILE):
        policy = policy_of(home, lora_rank=2, lora_alpha=4, start_lora=source)
        assert close(final(policy), final_of_saved(home)) and not close(final(policy), final(plain))
        assert all(p.requires_grad for p in policy.trainable_parameters())
        with policy.reference():
            assert torch.equal(final(policy), final(plain))  # the base model, without the LoRA


def final_of_saved(home) -> torch.Tensor:
    policy = policy_of(home, lora_rank=2)
    policy.load_weights(home / "start")
    return final(policy)


def test_a_frozen_adapter_stays_beside_the_trained_one(home):
    policy = policy_of(home, lora_rank=2, start_lora=home / "start", frozen_lora=home / "style")
    alone = policy_of(home, lora_rank=2, start_lora=home / "start")
    style = policy_of(home, lora_rank=2, frozen_lora=home / "style")
    assert len(policy.trainable_parameters()) == len(alone.trainable_parameters())
    assert not close(final(policy), final(alone)) and not close(final(policy), final(style))
    before = final(policy)
    with policy.reference():
        assert torch.equal(final(policy), final(style))
    assert torch.equal(final(policy), before)
    assert len(policy.trainable_parameters()) == len(alone.trainable_parameters())


def test_saving_writes_the_trained_adapter_alone(home, tmp_path):
    policy = policy_of(home, lora_rank=2, start_lora=home / "start", frozen_lora=home / "style")
    policy.save(tmp_path / "saved")
    saved, start = (path / LORA_FILE for path in (tmp_path / "saved", home / "start"))
    assert saved.read_bytes() == start.read_bytes()


@pytest.mark.parametrize("frozen", [None, "style"])
def test_a_merged_model_draws_the_same_in_stock_diffusers(home, tmp_path, frozen):
    options = {"frozen_lora": home / frozen} if frozen else {}
    policy = policy_of(home, lora_rank=2, start_lora=home / "start", **options)
    before = final(policy)
    policy.merge(tmp_path / "merged")
    assert close(final(policy), before)
    assert close(final(load_policy(str(tmp_path / "merged"))), before)
    loras = ["start", *([frozen] if frozen else [])]
    merged, loaded = stock(tmp_path, folder="merged"), stock(home, *loras)
    assert close(merged, loaded) and not close(merged, stock(home))
    names = [
        name
        for name, _ in FluxPipeline.from_pretrained(
            tmp_path / "merged"
        ).transformer.named_parameters()
    ]
    assert not any("lora" in name for name in names)


def test_files_that_do_not_fit_are_refused_before_the_model_is_loaded(home, tmp_path):
    nowhere = {"model": str(tmp_path / "no_model"), "start_lora": home / "start"}
    with pytest.raises(
        ValueError, match="has lora_rank=2, lora_alpha=4, this policy has lora_rank=8"
    ):
        load_policy(**nowhere, lora_rank=8)
    with pytest.raises(ValueError, match="needs a LoRA to start; set lora_rank"):
        load_policy(**nowhere)
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        load_policy(**nowhere | {"start_lora": tmp_path}, lora_rank=2)
    with pytest.raises(ValueError, match="start_lora = .*has no meaning with lora_rank = 0"):
        make_config(start_lora="x")
    with pytest.raises(ValueError, match="frozen_lora = .*has no meaning with lora_rank = 0"):
        make_config(frozen_lora="x")


def test_other_target_modules_are_named(home, tmp_path):
    narrow = policy_of(home, lora_rank=2, lora_targets=["to_q"])
    narrow.save(tmp_path / "narrow")
    with pytest.raises(ValueError, match="target modules are in this policy alone, such as .*to_k"):
        policy_of(home, lora_rank=2, start_lora=tmp_path / "narrow")
    other = tiny_policy("sd3", lora_rank=2)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="is of another model"):
        policy_of(home, lora_rank=2, frozen_lora=tmp_path / "other")


def quick(home, **settings):
    defaults = {"lora_rank": 2, "validate_every": 0, "iterations": 1}
    return tiny_config(home, **defaults | settings)


def test_a_run_starts_warm_trains_and_is_merged(home, tmp_path, capsys):
    settings = {"start_lora": str(home / "start"), "frozen_lora": str(home / "style")}
    run = train(quick(home, **settings), tmp_path / "run")
    assert {"start_lora", "frozen_lora"} <= set(run.manifest["hashes"])
    assert (run.path / "policy" / LORA_FILE).read_bytes() != (
        home / "start" / LORA_FILE
    ).read_bytes()
    assert main(["merge", str(run.path), "--out", str(tmp_path / "merged")]) == 0
    policy = policy_of(
        home, lora_rank=2, start_lora=run.path / "policy", frozen_lora=home / "style"
    )
    assert close(final(load_policy(str(tmp_path / "merged"))), final(policy))
    assert main(["merge", str(run.path), "--out", str(tmp_path / "merged")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    changed = quick(home, **settings | {"frozen_lora": str(home / "start")})
    with pytest.raises(ValueError, match="cannot resume with other settings: frozen_lora"):
        train(changed, run.path, resume=True)


def test_resume_and_warm_start_refuse_each_others_folders(home, tmp_path):
    run = train(quick(home), tmp_path / "run")
    with pytest.raises(ValueError, match="is a run, which is resumed .*--resume.*warm start"):
        train(quick(home, start_lora=str(run.path)), tmp_path / "next")
    with pytest.raises(FileNotFoundError, match="holds a LoRA.*warm start: start_lora = "):
        train(quick(home), run.path / "policy", resume=True)
    again = train(quick(home, start_lora=str(run.path / "policy")), tmp_path / "next")
    assert again.path.is_dir()


def test_pictures_of_the_command_are_those_of_the_run_with_its_frozen_adapter(home, tmp_path):
    run = train(quick(home, frozen_lora=str(home / "style")), tmp_path / "run")
    pictures = []
    for folder in (run.path, home / "flux"):
        out = tmp_path / f"{folder.name}.png"
        words = [
            "sample",
            str(folder),
            "a red circle",
            "--images",
            "1",
            "--out",
            str(out),
            "--base",
        ]
        assert main([*words, "--steps", "4"]) == 0
        pictures.append(np.frombuffer(out.read_bytes(), np.uint8).tobytes())
    assert pictures[0] != pictures[1]
