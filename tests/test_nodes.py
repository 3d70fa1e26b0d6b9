"""Two nodes with a disk each, as two groups of gloo processes: killed, resumed, and refused."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import make_folder, tiny_config

from chunk_grpo_nb.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from chunk_grpo_nb.training.nodes import alone_or_later, common_checkpoint
from chunk_grpo_nb.training.records import RunFolder

SCRIPT = Path(__file__).with_name("node_run.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(node: int, port: int, folder: Path, words: list[str], per_node: int) -> subprocess.Popen:
    """The launcher of one node."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    place = ["--nnodes", "2", "--nproc_per_node", str(per_node), "--node_rank", str(node)]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *place, *address, str(SCRIPT)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(folder), *words], env=env, **pipes)


def launch(
    folder: Path, name: str, resume: bool = False, kill: int = 0, per_node: int = 1
) -> list[tuple[int, str]]:
    """Exit code and last words of both nodes; none survives the test."""
    port, words = free_port(), [name, str(int(resume)), str(kill)]
    nodes = [start(node, port, folder, words, per_node) for node in (0, 1)]
    try:
        ends = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, words) for node, words in zip(nodes, ends, strict=True)]


def run_of(folder: Path, node: int, name: str) -> RunFolder:
    return RunFolder.open(folder / f"disk_{node}" / name)


def last_state(run: RunFolder) -> dict:
    return load_checkpoint(list_checkpoints(run)[-1])


def assert_same(one: dict, two: dict) -> None:
    assert one["done"] == two["done"]
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name


def assert_ended_well(ends: list[tuple[int, str]]) -> None:
    assert [code for code, _ in ends] == [0, 0], "\n".join(words[-3000:] for _, words in ends)


@pytest.mark.slow
def test_two_nodes_killed_and_resumed_from_their_own_disks(tmp_path):
    folder = make_folder(tmp_path)
    assert_ended_well(launch(folder, "whole", per_node=2))
    ends = launch(folder, "cut", kill=2, per_node=2)
    assert all(code for code, _ in ends)
    for node in (0, 1):  # each wrote its own, and only node 0 has rows
        cut = run_of(folder, node, "cut")
        assert [path.name for path in list_checkpoints(cut)][-1] == "iteration_000002.pt"
        assert (cut.path / "metrics.jsonl").exists() == (node == 0)
    assert_ended_well(launch(folder, "cut", resume=True, per_node=2))
    whole = run_of(folder, 0, "whole")
    for node in (0, 1):
        assert_same(last_state(whole), last_state(run_of(folder, node, "cut")))
    rows = [run_of(folder, 0, name).path / "metrics.jsonl" for name in ("whole", "cut")]
    assert rows[0].read_text() == rows[1].read_text()


@pytest.mark.slow
def test_a_node_whose_part_is_old_or_missing(tmp_path):
    folder = make_folder(tmp_path)
    assert_ended_well(launch(folder, "run"))
    whole = last_state(run_of(folder, 0, "run"))

    # a checkpoint behind: both go on from the older one, to the same bits
    (run_of(folder, 1, "run").path / "checkpoints" / "iteration_000003.pt").unlink()
    assert_ended_well(launch(folder, "run", resume=True))
    for node in (0, 1):
        assert_same(whole, last_state(run_of(folder, node, "run")))

    # without its part: refused on both, in words; with a copy of the other's it goes on
    shutil.rmtree(folder / "disk_1" / "run")
    ends = launch(folder, "run", resume=True)
    assert all(code for code, _ in ends)
    assert "node 1: " in ends[1][1] and "Its part of the run is missing" in ends[1][1]
    assert "stopped, and the others with it" in ends[0][1]
    shutil.copytree(folder / "disk_0" / "run", folder / "disk_1" / "run")
    assert_ended_well(launch(folder, "run", resume=True))


def processes(done: list[int], monkeypatch, others: tuple[str, ...] = ("", "")):
    """This process beside one other, which has other checkpoints or an error."""
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, *others[1:]])
    return SimpleNamespace(num_processes=2, gather=lambda mine: torch.tensor([int(mine), *done]))


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run with checkpoints after one and two iterations."""
    run = RunFolder.create(tmp_path / "run", tiny_config(tmp_path), {})
    for iteration in (1, 2):
        save_checkpoint(run, iteration, {"done": iteration})
    return run


def test_all_go_on_from_the_newest_checkpoint_that_everyone_has(run, monkeypatch):
    for other, expected in ((2, 2), (1, 1)):
        found = common_checkpoint(processes([other], monkeypatch), run, True, ("done",))
        assert found.iteration == found.state["done"] == expected


def test_a_process_without_checkpoints_is_named(run, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"processes \[1\] have no checkpoint.*after 2 iter"
    ):
        common_checkpoint(processes([0], monkeypatch), run, True, ("done",))


def test_an_error_of_another_process_stops_this_one(run, monkeypatch):
    others = processes([2], monkeypatch, ("", "ValueError: it is damaged"))
    with pytest.raises(RuntimeError, match="process 1 stopped.*ValueError: it is damaged"):
        common_checkpoint(others, run, True, ("done",))


def test_a_missing_run_is_kept_for_later_only_where_others_wait(monkeypatch):
    def check():
        raise FileNotFoundError("no run")

    with pytest.raises(FileNotFoundError, match="^no run$"):
        alone_or_later(check)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert str(alone_or_later(check)) == "no run"
    monkeypatch.setenv("GROUP_RANK", "1")
    assert "node 1: no run. Its part of the run is missing" in str(alone_or_later(check))
    assert alone_or_later(lambda: None) is None
