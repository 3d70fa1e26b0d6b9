"""Launch and parameter files are accepted; sharded gradients equal unsharded ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_folder

from chunk_grpo_nb.analysis.memory import card_bytes
from chunk_grpo_nb.training.config import load_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))
from launch_table import deciding_settings, planned  # noqa: E402

LAUNCH = ROOT / "data/launch"
PARAMETERS = [p for p in sorted(LAUNCH.glob("*.yaml")) if "model" in yaml.safe_load(p.read_text())]
CONFIGS = sorted(set(LAUNCH.glob("*.yaml")) - set(PARAMETERS))
PLANS = json.loads((LAUNCH / "plans.json").read_text())


def test_every_kind_of_launch_has_a_file():
    kinds = [yaml.safe_load(p.read_text())["distributed_type"] for p in CONFIGS]
    assert sorted(kinds) == ["DEEPSPEED", "DEEPSPEED", "FSDP", "FSDP", "MULTI_GPU", "NO"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_accelerate_accepts_the_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes == (1 if path.stem == "one_gpu" else 8 * config.num_machines)
    assert config.mixed_precision in (None, "no"), "precision belongs to the parameter file"


def plugin_of(path: Path, monkeypatch):
    """The FSDP plugin that `accelerate launch` would make of a configuration.

    Its words become the environment through accelerate's own code.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    )
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    return FullyShardedDataParallelPlugin()


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_two_nodes"])
def test_fsdp_words_reach_the_plugin(name, monkeypatch):
    plugin = plugin_of(LAUNCH / f"{name}.yaml", monkeypatch)
    assert (
        plugin.fsdp_version == 2
        and plugin.reshard_after_forward is True
        and not plugin.cpu_ram_efficient_loading
    )
    assert plugin.auto_wrap_policy is not None and not plugin.activation_checkpointing


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_are_complete(stage):
    """What the trainer sets itself (batch size, clipping, accumulation) is not in the file.

    There it could contradict the parameter file.
    """
    yaml_file = yaml.safe_load((LAUNCH / f"deepspeed_zero{stage}.yaml").read_text())
    file = json.loads((ROOT / yaml_file["deepspeed_config"]["deepspeed_config_file"]).read_text())
    assert file["zero_optimization"]["stage"] == stage and "gradient_clipping" not in file
    assert yaml_file["deepspeed_config"]["zero3_init_flag"] is False, (
        "the trainer loads whole models, then shards one"
    )


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda p: p.stem)
def test_parameter_files_load_and_fit_as_planned(path):
    """Each makes a configuration; the record of its plan is of this file, below its card."""
    config, plan = load_config(path), PLANS[path.stem]
    assert (config.sampling.num_steps, config.sampling.noise_level) == (17, 0.7)
    assert config.objective.chunker == "fixed:2,3,4,7"
    assert deciding_settings(path.stem).items() <= plan.items(), "run python ci/launch_table.py"
    assert 0 < plan["peak_gb"] * 1e9 <= card_bytes(plan["card"]) * (1 - plan["kept_free"])
    assert plan["card"].replace("GB", " GB") in path.read_text().splitlines()[0]
    assert LAUNCH / plan["launch"] in CONFIGS


def test_every_plan_is_of_a_file():
    assert set(PLANS) == {p.stem for p in PARAMETERS}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_the_record_is_what_the_planner_says(name):
    """Planned anew; half a minute or more each."""
    assert planned(name) == PLANS[name]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("flux_*.yaml")), ids=lambda p: p.stem)
def test_files_of_the_papers_model_have_its_schedule_and_groups(path):
    config = load_config(path)
    assert (config.sampling.shift, config.data.group_size) == (3.0, 12)


def test_the_papers_settings():
    c = load_config(LAUNCH / "flux_dev_paper.yaml")
    assert (
        c.policy.model == "black-forest-labs/FLUX.1-dev"
        and c.objective.rewards == {"hpsv3": 1.0}
        and c.policy.lora_rank == 0
    )
    assert (
        c.optimisation.learning_rate,
        c.optimisation.weight_decay,
        c.optimisation.max_grad_norm,
    ) == (1e-5, 1e-4, 0.01)
    assert (
        c.sampling.height,
        c.sampling.width,
        c.sampling.guidance_scale,
        c.data.same_noise,
        c.objective.fraction,
    ) == (
        720,
        720,
        3.5,
        True,
        0.5,
    )
    assert (
        c.objective.clip_low,
        c.objective.clip_high,
        c.objective.advantage_clip,
        c.objective.kl_weight,
    ) == (5e-5, 5e-5, 5.0, 0.0)
    assert (
        c.data.prompts_per_iteration
        == 2 * yaml.safe_load((LAUNCH / "fsdp2.yaml").read_text())["num_processes"]
    )
    assert c.optimisation.iterations * c.optimisation.updates_per_iteration == 150


def test_sharded_gradients_equal_unsharded_ones(tmp_path):
    """`fully_shard` on two gloo processes, in float64.

    LoRA and all weights, first and later updates, uneven and idle processes.
    """
    out = tmp_path / "found.json"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "tests/fsdp_run.py"),
        str(out),
    ]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert set(found) == {
        "lora",
        "full",
        "first update",
        "uneven passes",
        "one process idle",
        "kl, one process idle",
    }
    assert max(found.values()) < 1e-10, found


def both_trainings(script: str, mode: str, folder: Path, *words: str):
    """Train, resume and finish on one process and on two; the two runs."""
    from chunk_grpo_nb.training.records import RunFolder

    make_folder(folder)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    for name, head in (
        (f"{mode}_one", []),
        (f"{mode}_two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        command = [sys.executable, *head, str(ROOT / "tests" / script), str(folder), name, *words]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=400, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (RunFolder.open(folder / f"{mode}_{n}") for n in ("one", "two"))
    assert two.manifest["processes"] == 2
    return one, two


def assert_same_training(one, two, rtol: float, atol: float) -> None:
    """The same gradient norms in every update, and the same final weights."""
    import torch
    from safetensors.torch import load_file

    from chunk_grpo_nb.training.records import read_rows

    a, b = (torch.tensor(read_rows(r)["grad_norm"]) for r in (one, two))
    torch.testing.assert_close(a, b, rtol=rtol, atol=0)
    x, y = (load_file(next((r.path / "policy").rglob("*.safetensors"))) for r in (one, two))
    assert (
        x.keys() == y.keys()
        and max((x[k].float() - y[k].float()).abs().max().item() for k in x) < atol
    )


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_with_sharded_weights_is_the_same_training(tmp_path, mode):
    """FSDP2 on two gloo processes against one process.

    Rollout, replay check, two-pass updates, checkpoints, resume and final weights.
    """
    assert_same_training(*both_trainings("fsdp_train.py", mode, tmp_path), rtol=1e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("mode", ["lora", "full", "full_bf16"])
def test_training_under_deepspeed_is_the_same_training(tmp_path, mode, stage):
    """The same under DeepSpeed ZeRO-2 and ZeRO-3.

    With the engine's own reduction, clipping, step and checkpoints.
    """
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is not installed: pip install deepspeed, or run ci/full"
    )
    one, two = both_trainings("deepspeed_train.py", mode, tmp_path, stage)
    assert_same_training(
        one,
        two,
        **({"rtol": 0.05, "atol": 1e-2} if "bf16" in mode else {"rtol": 1e-5, "atol": 1e-6}),
    )
    assert sorted(p.name for p in (two.path / "checkpoints").glob("[di]*_0*")) == [
        "deepspeed_000002",
        "deepspeed_000003",
        "iteration_000002.pt",
        "iteration_000003.pt",
    ]


def test_the_gpu_benchmark_runs_small(tmp_path):
    """Every stage of the LoRA arm on a tiny transformer, so that it is ready for a GPU."""
    out = tmp_path / "found.json"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "ci/gpu_benchmark.py"),
            str(out),
            "--size",
            "tiny",
            "--arms",
            "lora",
        ],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    arm = found["lora"]
    assert "failed" not in arm, arm
    assert {
        "sample_and_decode",
        "gradient_on_policy",
        "optimizer_step",
        "whole_chunks",
        "streamed_4",
        "streamed_1",
        "precision_by_micro_batch",
        "iteration_seconds",
    } <= set(arm)
    assert (
        arm["latents_finite"]
        and arm["streamed_gradient_relative_difference"] < 1e-3
        and found["size"] == "tiny"
    )
