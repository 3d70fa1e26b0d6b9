"""Real `kill -9` at random moments: what is resumed is, to the last bit, what was never killed.

Training of every kind is killed by the clock, and at the n-th touch of its rows, checkpoints and
policy; sweeps and reward servers by the clock. KILL_LOG names a file that gets a line per kill.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_train import KINDS, killed_config
from test_cli import wait_for_server
from test_resume import assert_same_run
from test_server import free_port
from test_sweep import write
from tiny_runs import make_folder

from chunk_grpo_nb.analysis.sweep import load_sweep, sweep_status
from chunk_grpo_nb.training.checkpoints import list_checkpoints
from chunk_grpo_nb.training.records import RunFolder
from chunk_grpo_nb.training.trainer import train

HERE = Path(__file__).resolve().parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
CHILD = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


TOUCHES = {"jsonl": 12, "checkpoints": 12, "policy": 4}  # of at least so many there are


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("kills"))


def log(**line) -> None:
    """A line of the record, if one is kept."""
    if "KILL_LOG" in os.environ:
        with open(os.environ["KILL_LOG"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def start(*words, **options) -> subprocess.Popen:
    """A Python program, its errors kept."""
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, env=CHILD, stderr=subprocess.PIPE, text=True, **options)


def state_of(out: Path) -> dict:
    """How far a run is: rows of its tables, and its checkpoints."""
    rows = sum(path.read_text().count("\n") for path in out.glob("*.jsonl"))
    saved = sorted(path.stem for path in (out / "checkpoints").glob("*.pt"))
    return {"rows": rows, "checkpoints": saved}


def kill_by_clock(process: subprocess.Popen, out: Path, rows: int, delay: float) -> None:
    """Kill -9 a moment after so many rows more are there."""
    goal = state_of(out)["rows"] + rows
    while process.poll() is None and state_of(out)["rows"] < goal:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()


def kill_once(folder: Path, out: Path, kind: str, place: str, moments: random.Random) -> bool:
    """Train, or go on, and be killed; whether it was before the end."""
    program = [HERE / "killed_train.py", folder, out, kind, "{}"]
    if place == "clock":
        moment = {"rows": moments.randint(0, 4), "delay": round(moments.random() * 0.3, 3)}
        process = start(*program)
        kill_by_clock(process, out, **moment)
    else:
        moment = {"touch": moments.randint(1, TOUCHES[place])}
        process = start(*program, place, moment["touch"])
    process.communicate(timeout=600)
    killed = process.returncode == -signal.SIGKILL
    log(what="training", kind=kind, place=place, moment=moment, killed=killed, left=state_of(out))
    return killed


def policy_of(run: RunFolder) -> dict[str, bytes]:
    """The saved policy, file by file."""
    files = sorted(path for path in (run.path / "policy").rglob("*") if path.is_file())
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def check_kills(folder: Path, tmp_path: Path, kind: str, places: list[str], seed: int) -> int:
    """Kill a run at these places, let it finish, compare; how many of the kills came in time."""
    whole = train(killed_config(folder, kind), tmp_path / "whole")
    moments, out = random.Random(seed), tmp_path / "killed"
    kills = sum(kill_once(folder, out, kind, place, moments) for place in places)
    last = start(HERE / "killed_train.py", folder, out, kind)
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors[-3000:]
    killed = RunFolder.open(out)
    assert_same_run(whole, killed)
    assert policy_of(whole) == policy_of(killed)
    names = [path.name for path in list_checkpoints(killed)]
    assert names == [path.name for path in list_checkpoints(whole)]
    assert not list(out.rglob("*.tmp"))
    log(what="training", kind=kind, kills=kills, same_bits=True)
    return kills


def test_a_killed_run_goes_on_to_the_same_bits(folder, tmp_path):
    assert check_kills(folder, tmp_path, "moving average", ["checkpoints", "policy"], seed=0) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_killed_at_many_moments_go_on_to_the_same_bits(folder, tmp_path, kind):
    places = ["clock", "jsonl", "checkpoints", "clock", "checkpoints", "policy"]
    assert check_kills(folder, tmp_path, kind, places, list(KINDS).index(kind)) >= 5


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_runs_each_trial_to_its_end_once(tmp_path):
    """The parent is killed at random; what was done stays as it was, the rest is run."""
    code = "import pathlib\npathlib.Path(out_dir).mkdir()\n"
    code += "pathlib.Path(out_dir, 'value').write_text(str(seed**2))"
    write(tmp_path / "nbs/experiments/toy.ipynb", code)
    (tmp_path / "grid.yaml").write_text("experiment: toy\ngrid: {seed: [1, 2, 3, 4, 5, 6]}")
    words = ["-m", "chunk_grpo_nb.analysis.cli", "sweep", "grid.yaml", "--out", "out"]
    grid, moments, finished = load_sweep(tmp_path / "grid.yaml"), random.Random(3), {}

    def results() -> dict[str, str]:
        paths = (tmp_path / "out/trials").glob("*/result.json")
        return {path.parent.name: path.read_text() for path in paths}

    for _ in range(4):
        more, delay = len(results()) + moments.randint(0, 1), moments.random() * 4
        process = start(*words, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while len(results()) < more and process.poll() is None:
            time.sleep(0.05)
        time.sleep(delay)
        process.kill()
        process.communicate(timeout=60)
        killed = process.returncode == -signal.SIGKILL
        log(what="sweep", moment={"trials": more, "delay": round(delay, 2)}, killed=killed)
        time.sleep(3)  # its workers follow it
        assert finished.items() <= results().items(), "what was done has stayed"
        finished = results()
    last = start(*words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors[-3000:]
    assert finished.items() <= results().items() and len(results()) == 6
    status = sweep_status(grid, tmp_path / "out")
    assert (status.status == "done").all()
    values = {row.seed: Path(row.folder, "run/value").read_text() for row in status.itertuples()}
    assert values == {seed: str(seed**2) for seed in range(1, 7)}
    log(what="sweep", trials=len(results()), done_once=True)


def serve(port: int) -> subprocess.Popen:
    """A reward server that answers."""
    words = ["-m", "chunk_grpo_nb.analysis.cli", "serve", "killed_train:redness", "--port", port]
    process = start(*words, stdout=subprocess.DEVNULL, cwd=HERE)
    wait_for_server(f"http://127.0.0.1:{port}/health")
    return process


@pytest.mark.slow
def test_a_run_whose_reward_server_is_killed_goes_on_to_the_same_bits(folder, tmp_path):
    """The run waits for a new server if one comes in time, else it stops and is resumed."""
    port, moments = free_port(), random.Random(5)
    reward = {f"http://127.0.0.1:{port}/redness": {"weight": 1.0, "retries": 2, "backoff": 0.2}}
    out, settings = tmp_path / "killed", json.dumps({"rewards": reward})
    server = serve(port)
    whole = train(killed_config(folder, "adamw", rewards=reward), tmp_path / "whole")
    returned = None
    for kill in range(8):
        run = start(HERE / "killed_train.py", folder, out, "adamw", settings)
        if kill < 4:
            kill_by_clock(server, out, moments.randint(1, 3), moments.random() * 0.1)
            server.communicate()
            server = serve(port)
        _, errors = run.communicate(timeout=600)
        returned = run.returncode
        assert returned == 0 or f"127.0.0.1:{port}" in errors, errors[-3000:]
        log(what="server", kill=kill, went_on=returned == 0, left=state_of(out))
        if returned == 0 and kill >= 3:
            break
    server.kill()
    server.communicate()
    assert returned == 0
    assert_same_run(whole, RunFolder.open(out))
    log(what="server", same_bits=True)
