"""The launcher and the sweep runner, with trivial notebooks."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from chunk_grpo_nb.analysis.notebooks import check_parameters, notebook_parameters, run_notebook
from chunk_grpo_nb.analysis.runner import progress_text, run_sweep, run_trial
from chunk_grpo_nb.analysis.sweep import load_sweep, sweep_status

PARAMETERS = """seed: int = 0  # of everything random
lr: float = 1e-3  # learning rate
name: str = "a"  # of the run
fast: bool = True  # or slow
sizes: list[int] = [2, 2]  # chunk sizes
rewards: dict = {"x": 1.0}  # name -> weight
out_dir: str = "runs/x"  # where results go"""


def write(path: Path, code: str, parameters: str | None = PARAMETERS) -> Path:
    nb = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
        }
    )
    tags = {"tags": ["parameters"]} if parameters else {}
    nb.cells = [
        nbformat.v4.new_code_cell(parameters or "", metadata=tags),
        nbformat.v4.new_code_cell(code),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A folder with nbs/experiments and sweeps; `sweep(text)` writes a sweep file and loads it."""
    write(
        tmp_path / "nbs/experiments/toy.ipynb",
        "import os, time\n"
        "assert seed < 5, 'too large'\n"
        "if name == 'die': os._exit(1)\n"
        "time.sleep(lr)",
    )
    return tmp_path


def wait_for(condition, seconds=120):
    """Until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def sweep(checkout, text, name="grid"):
    (checkout / f"{name}.yaml").write_text(text)
    return load_sweep(checkout / f"{name}.yaml")


def test_parameters_are_read_with_type_default_and_help(checkout):
    known = notebook_parameters(checkout / "nbs/experiments/toy.ipynb")
    assert {p.name: p.type for p in known.values()}["sizes"] == "list[int]"
    assert known["rewards"].default == {"x": 1.0}
    assert known["fast"].help == "or slow"


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"sed": 1}, "no parameter 'sed'; did you mean 'seed'"),
        ({"zzz": 1}, "there are: .*seed"),
        ({"seed": 1.0}, "seed = 1.0 is a float, expected int"),
        ({"seed": True}, "expected int"),
        ({"lr": "1e-5"}, r"a float needs a dot"),
        ({"fast": 1}, "expected bool"),
        ({"name": 3}, "expected str"),
        ({"sizes": "[1, 2]"}, r"expected list\[int\]"),
        ({"sizes": [1, "2"]}, r"expected list\[int\]"),
        ({"rewards": [1]}, "expected dict"),
    ],
)
def test_wrong_parameters_are_refused_before_a_kernel_starts(checkout, parameters, message):
    notebook = checkout / "nbs/experiments/toy.ipynb"
    with pytest.raises((ValueError, TypeError), match=message):
        run_notebook(notebook, checkout / "out.ipynb", parameters)
    assert not (checkout / "out.ipynb").exists()


def test_right_parameters_pass_and_ints_become_floats(checkout):
    values = check_parameters(checkout / "nbs/experiments/toy.ipynb", {"lr": 1, "sizes": (3, 4)})
    assert (
        values["lr"] == 1.0
        and isinstance(values["lr"], float)
        and values["sizes"] == [3, 4]
        and values["seed"] == 0
    )


def test_notebooks_that_cannot_be_launched(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebook"):
        notebook_parameters(tmp_path / "none.ipynb")
    with pytest.raises(ValueError, match="no cell tagged"):
        notebook_parameters(write(tmp_path / "bare.ipynb", "1", None))
    with pytest.raises(ValueError, match="plain literals"):
        notebook_parameters(
            write(tmp_path / "code.ipynb", "1", "seed: int = len('abc')  # no literal")
        )


@pytest.mark.parametrize(
    "text, message",
    [
        ("experiment: tyo\ngrid: {seed: [0]}", "unknown experiment 'tyo'; did you mean 'toy'"),
        ("grid: {seed: [0]}", "needs 'experiment:'"),
        ("- a", "needs 'experiment:'"),
        ("experiment: [toy", "not readable as UTF-8 YAML"),
        ("experiment: toy\ngird: {seed: [0]}", "unknown section 'gird'; did you mean 'grid'"),
        ("experiment: toy\narms: [a, b]", "arms is a list"),
        ("experiment: toy\narms: {a: 3}", "arm 'a' is 3"),
        ("experiment: toy", "empty grid"),
        ("experiment: toy\ngrid: {seed: []}", "axis 'seed' is \\[\\]"),
        ("experiment: toy\ngrid: {seed: 3}", "axis 'seed' is 3"),
        ("experiment: toy\ngrid: {sed: [0]}", "no parameter 'sed'; did you mean 'seed'"),
        ("experiment: toy\narms: {a: {lr: 1e-3}}", "arm 'a'.*a float needs a dot"),
        ("experiment: toy\ngrid: {seed: [1, 1]}", "duplicate trial"),
        (
            "experiment: toy\narms: {a: {lr: 1}, b: {lr: 1.0}}",
            "duplicate trial: b-.* same parameters as a-",
        ),
        ("experiment: toy\narms: {a: {seed: 1}}\ngrid: {seed: [1]}", "'seed' is set by the grid"),
        (
            "experiment: toy\nfixed: {out_dir: x}\ngrid: {seed: [1]}",
            "'out_dir' is set by the sweep",
        ),
    ],
)
def test_bad_sweep_files_are_refused(checkout, text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sweep(checkout, text)


def test_a_missing_sweep_file_names_its_neighbour(checkout):
    (checkout / "noise.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match="did you mean 'noise'"):
        load_sweep(checkout / "noize.yaml")


def test_trial_keys_follow_the_parameters_and_the_defaults(checkout):
    text = "experiment: toy\narms: {a: {}, b: {lr: 0.5}}\ngrid: {seed: [0, 1]}"
    first, again = sweep(checkout, text), sweep(checkout, text)
    assert [c.key for c in first.trials] == [c.key for c in again.trials]
    assert [(c.arm, c.axes["seed"]) for c in first.trials] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]
    write(checkout / "nbs/experiments/toy.ipynb", "1", PARAMETERS.replace("1e-3", "2e-3"))
    changed = sweep(checkout, text)
    assert [c.key == d.key for c, d in zip(first.trials, changed.trials)] == [
        False,
        False,
        True,
        True,
    ]


def test_results_folders_that_are_not_one(checkout):
    grid = sweep(checkout, "experiment: toy\ngrid: {seed: [0]}")
    (checkout / "full").mkdir()
    (checkout / "full/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not a results folder"):
        run_sweep(grid, checkout / "full")
    with pytest.raises(ValueError, match="not a results folder"):
        run_sweep(grid, checkout / "full/thesis.tex")
    assert [p.name for p in (checkout / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="at least 1"):
        run_sweep(grid, checkout / "new", jobs=0)


def test_failures_are_listed_and_done_trials_are_not_run_again(checkout):
    grid = sweep(
        checkout, "experiment: toy\narms: {a: {}, dead: {name: die}}\ngrid: {seed: [0, 9]}"
    )
    grid = type(grid)(
        grid.name, grid.notebook, grid.trials[:3]
    )  # a-0 works, a-9 raises, dead-0 kills its kernel
    seen = []
    status = run_sweep(grid, checkout / "out", jobs=2, report=seen.append)
    assert status.status.tolist() == ["done", "failed", "failed"]
    assert "AssertionError: too large" in status.error[1] and "DeadKernelError" in status.error[2]
    assert "too large" in seen[-1] and "nothing left" in seen[-1]
    with pytest.raises(ValueError, match="holds the results of sweep 'grid'"):
        run_sweep(sweep(checkout, "experiment: toy\ngrid: {seed: [0]}", "other"), checkout / "out")
    executed = Path(status.folder[0], "toy.ipynb")
    stamp = executed.stat().st_mtime_ns
    assert (
        run_trial(grid, grid.trials[0], checkout / "out") == "done"
        and executed.stat().st_mtime_ns == stamp
    )
    assert run_trial(grid, grid.trials[1], checkout / "out") == "failed"
    assert [p.name for p in (checkout / "out/attempts").iterdir()] == [grid.trials[1].name + ".1"]


def test_a_kill_loses_the_running_trials_only(checkout):
    text = "experiment: toy\ngrid: {lr: [0.01, 600.0]}"
    grid = sweep(checkout, text)
    file, out = str(checkout / "grid.yaml"), str(checkout / "out")
    code = (
        "from chunk_grpo_nb.analysis.runner import run_sweep\n"
        "from chunk_grpo_nb.analysis.sweep import load_sweep\n"
        f"run_sweep(load_sweep({file!r}), {out!r}, jobs=1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while sweep_status(grid, checkout / "out").status.tolist() != ["done", "running"]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    assert run_trial(grid, grid.trials[1], checkout / "out") == "running", (
        "a second runner leaves it alone"
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while sweep_status(grid, checkout / "out").status.tolist() != ["done", "interrupted"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "interrupted" in progress_text(sweep_status(grid, checkout / "out"))
    write(grid.notebook, "import pathlib; pathlib.Path(out_dir).mkdir(parents=True)")
    with pytest.raises(ValueError, match=r"all-lr=0.01.*changed since: notebook"):
        run_sweep(grid, checkout / "out", jobs=1, report=lambda text: None)
    again = run_sweep(grid, checkout / "out", 1, report=lambda text: None, outdated="rerun")
    assert again.status.tolist() == ["done", "done"]
    assert Path(sweep_status(grid, checkout / "out").folder[1], "run").is_dir(), (
        "out_dir lies in the trial's folder"
    )
    assert len(list((checkout / "out/attempts").iterdir())) == 2


def test_nothing_is_overwritten_by_a_single_run(checkout):
    (checkout / "out.ipynb").write_text(json.dumps({"mine": 1}))
    with pytest.raises(FileExistsError, match="choose another output"):
        run_notebook(checkout / "nbs/experiments/toy.ipynb", checkout / "out.ipynb", {})
    assert json.loads((checkout / "out.ipynb").read_text()) == {"mine": 1}


def test_given_folders_are_seen_from_where_the_caller_is(checkout, monkeypatch):
    notebook = checkout / "nbs/experiments/toy.ipynb"
    write(notebook, "import pathlib; pathlib.Path(out_dir).mkdir(parents=True)")
    (checkout / "elsewhere").mkdir()
    monkeypatch.chdir(checkout / "elsewhere")
    run_notebook(notebook, "one.ipynb", {"out_dir": "runs/mine"})
    assert (checkout / "elsewhere/runs/mine").is_dir() and (
        checkout / "elsewhere/one.ipynb"
    ).is_file()


HARD = """seed: int = 0  # of everything = random
reward: str = "a=0.7,b=0.3"  # name=weight
colour: str | None = "#ff0000"  # of the curve
mode: Literal["fast", "exact"] = "fast"  # how
limit: Optional[int] = None  # all
out_dir: str = "runs/x"  # where results go"""


def test_parameters_that_papermill_does_not_see_are_checked_and_arrive(checkout):
    code = "from pathlib import Path; Path(out_dir).write_text(f'{reward} {colour} {mode} {limit}')"
    hard = HARD.replace('"exact"]', '"exact"]')
    notebook = write(checkout / "hard.ipynb", code, "from typing import *\n" + hard)
    known = notebook_parameters(notebook)
    assert list(known) == ["seed", "reward", "colour", "mode", "limit", "out_dir"]
    assert known["colour"].default == "#ff0000" and known["seed"].help == "of everything = random"
    for wrong in ({"mode": "slow"}, {"colour": 1}, {"limit": 1.5}):
        with pytest.raises(TypeError, match="expected"):
            check_parameters(notebook, wrong)
    given = {"reward": "c=1", "colour": None, "limit": 3, "out_dir": str(checkout / "seen")}
    run_notebook(notebook, checkout / "out.ipynb", given)
    assert (checkout / "seen").read_text() == "c=1 None fast 3"


@pytest.mark.parametrize("value", ["2026-01-31", "!!set {a, b}", "{x: 2026-01-31}", "{1: 2}"])
def test_values_that_are_no_literals_are_refused_by_name(checkout, value):
    name = "rewards" if value.startswith("{") else "seed"
    with pytest.raises(TypeError, match=f"{name}.*(date|set|no text)"):
        sweep(
            checkout,
            "experiment: toy\ngrid: {fast: [true]}\nfixed: {}\n"
            f"arms: {{a: {{{name}: {value}}}}}",
        )


def test_the_kernel_is_this_interpreter(checkout, monkeypatch):
    """A foreign kernel registered as python3 is not started."""
    spec = checkout / "share/jupyter/kernels/python3"
    spec.mkdir(parents=True)
    argv = ["/bin/false", "{connection_file}"]
    kernel = {"argv": argv, "display_name": "foreign", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(checkout / "share/jupyter"))
    notebook = checkout / "nbs/experiments/toy.ipynb"
    write(notebook, "import pathlib, sys; pathlib.Path(out_dir).write_text(sys.executable)")
    run_notebook(notebook, checkout / "one.ipynb", {"out_dir": str(checkout / "seen")})
    assert (checkout / "seen").read_text() == sys.executable


def test_ctrl_c_stops_workers_and_says_how_to_go_on(checkout):
    (checkout / "grid.yaml").write_text("experiment: toy\ngrid: {lr: [600.0, 601.0]}")
    words = ["-m", "chunk_grpo_nb.analysis.cli", "sweep", "grid.yaml", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=checkout,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    grid = load_sweep(checkout / "grid.yaml")
    wait_for(lambda: set(sweep_status(grid, checkout / "out").status) == {"running"})
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=300)
    (line,) = [line for line in err.splitlines() if line]
    assert process.returncode == 130, err
    assert "stopped with 0 of 2 trials done; the same command goes on" in line
    wait_for(lambda: set(sweep_status(grid, checkout / "out").status) == {"interrupted"}, 10)


def kill_when_running(started, pid):
    """SIGKILL for a worker as soon as two trials run."""
    wait_for(lambda: len(list(started.iterdir())) == 2, 400)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_cluster_loses_a_worker_and_the_sweep_ends(checkout):
    """Two Dask workers, one killed in the middle of a trial, which then runs again."""
    reason = "distributed is not installed: pip install chunk_grpo_nb[cluster]"
    distributed = pytest.importorskip("distributed", reason=reason)
    started = checkout / "started"
    started.mkdir()
    code = (
        f"import pathlib, time, uuid\npathlib.Path({str(started)!r}, f'{{uuid.uuid4()}}').touch()"
    )
    write(checkout / "nbs/experiments/toy.ipynb", f"{code}\ntime.sleep(lr)")
    grid = sweep(checkout, "experiment: toy\ngrid: {seed: [1, 2, 3], lr: [5.0]}")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        killed = cluster.workers[0].pid
        thread = threading.Thread(target=kill_when_running, args=(started, killed))
        thread.start()
        address = cluster.scheduler_address
        run_sweep(grid, checkout / "out", 2, report=str, backend="dask", scheduler=address)
        thread.join()
        assert killed not in {worker.pid for worker in cluster.workers.values()}
    assert (sweep_status(grid, checkout / "out").status == "done").all()
    assert len(list(started.iterdir())) == 4, "three trials, one of them twice"


def test_the_status_may_be_asked_by_many_threads_at_once(checkout):
    """`ast.parse` of Python 3.11 raises SystemError where threads change places inside it.

    They do where the garbage collector runs, which has them wait here.
    """
    write(checkout / "nbs/experiments/toy.ipynb", "\n".join(["x = [1, (2, {3: 4})]"] * 300))
    grid, faults = sweep(checkout, "experiment: toy\ngrid: {seed: [1]}"), []

    def ask():
        try:
            for _ in range(10):
                assert sweep_status(grid, checkout / "out").status.tolist() == ["waiting"]
        except BaseException as fault:
            faults.append(fault)

    def wait(phase, info):
        time.sleep(1e-6)

    before = gc.get_threshold()
    gc.callbacks.append(wait)
    gc.set_threshold(100)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(wait)
    assert not faults


def test_workers_end_with_a_killed_parent(checkout):
    (checkout / "grid.yaml").write_text("experiment: toy\ngrid: {lr: [600.0]}")
    words = ["-m", "chunk_grpo_nb.analysis.cli", "sweep", "grid.yaml", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=checkout,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    grid = load_sweep(checkout / "grid.yaml")
    wait_for(lambda: set(sweep_status(grid, checkout / "out").status) == {"running"})
    process.kill()  # the parent alone
    wait_for(lambda: set(sweep_status(grid, checkout / "out").status) == {"interrupted"}, 10)


def test_a_plan_is_its_sweeps_in_order_all_checked_first(checkout):
    from chunk_grpo_nb.analysis.sweep import load_sweeps

    sweep(checkout, "experiment: toy\ngrid: {seed: [0, 1]}", "first")
    sweep(checkout, "experiment: toy\ngrid: {seed: [2]}", "second")
    plan = checkout / "plan.yaml"
    plan.write_text("sweeps: [second.yaml, first.yaml]")
    assert [s.name for s in load_sweeps(plan)] == ["second", "first"]
    (checkout / "second.yaml").write_text("experiment: toy\ngrid: {sead: [2]}")
    with pytest.raises(ValueError, match="second.yaml.*did you mean 'seed'"):
        load_sweeps(plan)


@pytest.mark.parametrize(
    "text, message",
    [
        ("sweeps: []", "a list of sweep files"),
        ("sweeps: first.yaml", "a list of sweep files"),
        ("sweeps: [first.yaml]\ngrid: {seed: [0]}", "one section"),
        ("sweeps: [first.yaml, first.yaml]", "'first' is named twice"),
        ("sweeps: [fist.yaml]", "did you mean 'first'"),
        ("sweeps: [plan.yaml]", "unknown section 'sweeps'|needs 'experiment:'"),
    ],
)
def test_a_plan_that_says_nothing_or_too_much_is_refused(checkout, text, message):
    from chunk_grpo_nb.analysis.sweep import load_sweeps

    sweep(checkout, "experiment: toy\ngrid: {seed: [0, 1]}", "first")
    (checkout / "plan.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_sweeps(checkout / "plan.yaml")


def test_every_committed_sweep_file_can_be_read():
    from chunk_grpo_nb.analysis.sweep import load_sweeps

    folder = Path(__file__).parent.parent / "data" / "sweeps"
    plans = {path.name: load_sweeps(path) for path in sorted(folder.glob("*.yaml"))}
    named = {s.name for s in plans["paper.yaml"]}
    apart = {"planned"}  # no sweep: the questions to the records of `confirmatory`
    assert named == {path.stem for path in (folder / "paper").glob("*.yaml")} - apart
