"""Two gloo processes against one: groups split over processes give the single-process result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunk_grpo_nb.training.records import RunFolder, list_checkpoints, load_checkpoint, read_rows

SCRIPT = Path(__file__).with_name("distributed_run.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from chunk_grpo_nb.models.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("two")
    tiny_pipeline("flux").save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("red circle\nblue square\ntwo circle\n")
    return folder


def launch(folder, dtype, name, processes):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    head = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    )
    done = subprocess.run(
        [*head, str(SCRIPT), str(folder), dtype, name],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunFolder.open(folder / name)
    return run, load_checkpoint(list_checkpoints(run)[-1])["model"]


@pytest.mark.parametrize(
    "dtype, weights, gradients", [("float64", 1e-9, 1e-12), ("float32", 1e-5, 1e-5)]
)
def test_two_processes_equal_one(folder, dtype, weights, gradients):
    (one, a), (two, b) = (
        launch(folder, dtype, f"one_{dtype}", 1),
        launch(folder, dtype, f"two_{dtype}", 2),
    )
    assert two.manifest["processes"] == 2 and one.manifest["processes"] == 1
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= weights
    x, y = read_rows(one), read_rows(two)
    assert x["evaluations_trained"].tolist() == y["evaluations_trained"].tolist()
    for column in ("reward_redness", "advantage_size", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor(x[column]), torch.tensor(y[column]), rtol=max(gradients, 2e-9), atol=0
        )  # rows are rounded to 9 digits
