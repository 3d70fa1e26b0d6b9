"""Two gloo processes against one: groups split over processes give the single-process result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import make_folder

from chunk_grpo_nb.training.checkpoints import list_checkpoints, load_checkpoint
from chunk_grpo_nb.training.records import RunFolder, read_rows

SCRIPT = Path(__file__).with_name("distributed_run.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("two"))


def launch(folder: Path, name: str, processes: int, **settings) -> RunFolder:
    """Train in one process or two; the run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    head = [sys.executable, *(TWO if processes == 2 else [])]
    command = [*head, str(SCRIPT), str(folder), name, json.dumps(settings)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunFolder.open(folder / name)
    assert run.manifest["processes"] == processes
    return run


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    """The trained weights at the end."""
    return load_checkpoint(list_checkpoints(run)[-1])["model"]


def largest_difference(one: RunFolder, two: RunFolder) -> float:
    """Of any weight."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(
    "dtype, tolerance, rtol", [("float64", 1e-9, 1e-12), ("float32", 1e-5, 1e-5)]
)
def test_two_processes_equal_one(folder, dtype, tolerance, rtol):
    one = launch(folder, f"one_{dtype}", 1, dtype=dtype)
    two = launch(folder, f"two_{dtype}", 2, dtype=dtype)
    assert largest_difference(one, two) <= tolerance
    x, y = read_rows(one), read_rows(two)
    assert x["evaluations_trained"].tolist() == y["evaluations_trained"].tolist()
    for column in ("reward_redness", "advantage_size", "grad_norm"):
        # rows are rounded to 9 digits
        expected, found = torch.tensor(x[column]), torch.tensor(y[column])
        torch.testing.assert_close(expected, found, rtol=max(rtol, 2e-9), atol=0)


def test_an_iteration_without_spread_makes_no_step_in_either(folder):
    """AdamW would move by its momentum in two processes, whose summed gradients are zeros."""
    rewards = {"red_then_constant": 1.0}
    settings = {"rewards": rewards, "dtype": "float64", "validate_every": 0}
    one = launch(folder, "one_constant", 1, **settings)
    two = launch(folder, "two_constant", 2, **settings)
    for run in (one, two):
        norms = read_rows(run)["grad_norm"].tolist()
        assert norms[0] > 0 and norms[1:] == [0.0, 0.0]
    assert largest_difference(one, two) <= 1e-9


def test_the_kl_of_all_processes_is_logged(folder):
    settings = {"kl_weight": 0.1, "dtype": "float64"}
    one = launch(folder, "one_kl", 1, **settings)
    two = launch(folder, "two_kl", 2, **settings)
    expected, found = (torch.tensor(read_rows(run)["kl"]) for run in (one, two))
    assert found[-1] > 0
    torch.testing.assert_close(expected, found, rtol=1e-6, atol=1e-15)
