"""Compiled blocks: the same run and the same files; refused in words where they cannot be."""

from types import SimpleNamespace

import pytest
import torch
from tiny import draw, tiny_policy, tiny_sampler
from tiny_runs import make_folder, tiny_config

import chunk_grpo_nb.training.state as state
from chunk_grpo_nb.models.policy import check_replay, load_policy
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.training.backends import FullySharded
from chunk_grpo_nb.training.checkpoints import list_checkpoints, load_checkpoint
from chunk_grpo_nb.training.trainer import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("compile"))


@pytest.fixture
def traced(monkeypatch):
    """`compile: true` with a backend that generates no code; the backends that were asked for."""
    asked = []

    def loaded(*args, compile_backend=None, **options):
        asked.append(compile_backend)
        return load_policy(*args, compile_backend=compile_backend and "eager", **options)

    monkeypatch.setattr(state, "load_policy", loaded)
    return asked


@pytest.mark.parametrize("settings", [{}, pytest.param({"lora_rank": 2}, marks=pytest.mark.slow)])
def test_a_compiled_run_is_that_without_and_resumes(settings, folder, tmp_path, traced):
    extra = {"kl_weight": 0.1, "ema_decay": 0.5, "validate_every": 1} | settings
    plain = train(tiny_config(folder, **extra), tmp_path / "plain")
    first = tiny_config(folder, **extra, iterations=1, compile=True)
    run = train(first, tmp_path / "run")
    run = train(tiny_config(folder, **extra, compile=True), tmp_path / "run", resume=True)
    assert traced == [None, "inductor", "inductor"]
    metrics = "metrics.jsonl"
    assert (run.path / metrics).read_text() == (plain.path / metrics).read_text()
    one, two = (load_checkpoint(list_checkpoints(r)[-1])["model"] for r in (plain, run))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    files = [
        sorted(f.name for f in (r.path / "policy").rglob("*.safetensors")) for r in (plain, run)
    ]
    assert files[0] == files[1] != []
    for file in (plain.path / "policy").rglob("*.safetensors"):
        same = run.path / file.relative_to(plain.path)
        assert same.read_bytes() == file.read_bytes()


def test_all_blocks_are_compiled_and_keep_their_names():
    policy = tiny_policy("flux", compile_backend="eager")
    blocks = [*policy.transformer.transformer_blocks, *policy.transformer.single_transformer_blocks]
    assert all(block._compiled_call_impl is not None for block in blocks)
    plain = tiny_policy("flux")
    assert policy.transformer.state_dict().keys() == plain.transformer.state_dict().keys()


def test_a_missing_compiler_is_named_before_a_model_is_loaded(monkeypatch):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with fresh_cache(), pytest.raises(ValueError, match="C.. compiler.*leave compile out"):
        load_policy("no such folder", compile_backend="inductor")


def test_quantised_weights_and_other_models_are_refused(monkeypatch):
    pipe = tiny_pipeline("flux")
    pipe.transformer.hf_quantizer = SimpleNamespace()
    with pytest.raises(ValueError, match="quantised weights are not compiled"):
        load_policy(pipe, compile_backend="eager")
    pipe = tiny_pipeline("flux")
    monkeypatch.setattr(pipe.transformer, "children", lambda: iter(()))
    with pytest.raises(ValueError, match="has no list of blocks"):
        load_policy(pipe, compile_backend="eager")


def test_sharded_weights_are_refused(folder):
    config = tiny_config(folder, compile=True)
    with pytest.raises(ValueError, match="compile = true was never tried with sharded"):
        FullySharded(config, SimpleNamespace(num_processes=1))


@pytest.mark.slow
def test_generated_code_computes_the_same(folder):
    sampler = tiny_sampler()
    policies = [tiny_policy("flux", compile_backend=backend) for backend in (None, "inductor")]
    plain, compiled = (draw(policy, sampler) for policy in policies)
    torch.testing.assert_close(plain.final, compiled.final, atol=1e-4, rtol=0)
    report = check_replay(policies[1], compiled)
    assert report["log_prob_error"] < 1e-5
    rows, steps = torch.tensor([0, 2]), torch.tensor([1, 3])
    gradients = []
    for policy in policies:
        policy.log_prob(plain, rows, steps)[0].mean().backward()
        found = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    one, two = gradients
    assert (one - two).norm() < 1e-3 * one.norm()
