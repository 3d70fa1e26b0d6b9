"""The scripts of ci/: what they refuse, and that they cover what is there."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from test_kills import TOUCHES

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which("bash")


def load(name: str):
    """A script of ci/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path):
    """A checkout without an environment; `bare(PYTHON=...)` runs its ci/setup."""
    (tmp_path / "repo").mkdir()
    shutil.copytree(ROOT / "ci", tmp_path / "repo/ci")
    for name in ("settings.ini", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / "repo")
    tools = tmp_path / "tools"
    tools.mkdir()

    def setup(**variables):
        clean = {
            k: v for k, v in os.environ.items() if k not in ("PYTHON", "TORCH_INDEX", "VIRTUAL_ENV")
        }
        env = {**clean, "PATH": f"{tools}:{os.environ['PATH']}", **variables}
        return subprocess.run(
            [BASH, "-c", f"source {tmp_path}/repo/ci/setup; echo went on"],
            capture_output=True,
            text=True,
            env=env,
            cwd="/",
        )

    setup.tools, setup.root = tools, tmp_path / "repo"
    return setup


def test_a_python_that_is_too_old_or_missing_gets_one_line(bare):
    old = executable(bare.tools / "old", 'echo "3.9.2 old venv"')
    for variables, message in (
        ({"PYTHON": str(old)}, "is Python 3.9.2, too old: 3.11 or newer is needed"),
        ({"PYTHON": "/no/such"}, "does not run"),
    ):
        run = bare(**variables)
        assert run.returncode == 1 and "went on" not in run.stdout
        assert message in run.stderr and len(run.stderr.splitlines()) == 1
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        executable(bare.tools / name, 'echo "3.10.1 old venv"')
    run = bare()
    assert (
        run.returncode == 1
        and "3.10.1, too old" in run.stderr
        and len(run.stderr.splitlines()) == 1
    )


def test_a_full_disk_gets_one_line(bare):
    executable(bare.tools / "df", 'echo header; echo "/dev/disk 100 99 2048000 99% /"')
    run = bare(PYTHON=sys.executable)
    assert (
        run.returncode == 1
        and "the disk is full: 2000 MB free" in run.stderr
        and len(run.stderr.splitlines()) == 1
    )
    assert not (bare.root / ".venv").exists()


def test_a_linked_environment_is_not_cleared(bare, tmp_path):
    (tmp_path / "other").mkdir()
    kept = tmp_path / "other" / "kept"
    kept.touch()
    (bare.root / ".venv").symlink_to(tmp_path / "other")
    run = bare(PYTHON=sys.executable)
    assert run.returncode == 1 and "is a link" in run.stderr
    assert kept.exists()


@pytest.mark.slow
def test_a_failed_download_gets_one_line_and_is_tried_again(bare):
    for _ in range(2):
        run = bare(
            PYTHON=sys.executable, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null"
        )
        assert (
            run.returncode == 1
            and "could not be downloaded or installed: ERROR" in run.stderr
            and len(run.stderr.splitlines()) == 1
        )
        assert not (bare.root / ".venv/stamp").exists()


def test_the_table_counts_parts_and_goes_on_after_a_failure(tmp_path):
    script = (
        "fail() { echo $* >&2; exit 1; }\n"
        "part_a() { true; }\npart_b() { false; }\npart_c() { true; }\nparts=(a b c)\n"
        + (ROOT / "ci/parts").read_text()
    )
    run = subprocess.run([BASH, "-c", script, "test"], capture_output=True, text=True)
    assert run.returncode == 1 and "2 of 3 parts passed, 1 failed" in run.stdout.splitlines()[-1]
    assert re.search(r"^b +FAILED", run.stdout, re.M) and re.search(r"^c +passed", run.stdout, re.M)
    assert (
        subprocess.run([BASH, "-c", script, "test", "a", "c"], capture_output=True).returncode == 0
    )
    run = subprocess.run([BASH, "-c", script, "test", "d"], capture_output=True, text=True)
    assert run.returncode == 1 and "there is no part 'd'; there are: a b c" in run.stderr


def test_the_entry_points_are_executable_and_parse():
    for name in ("ci/test", "ci/full", "ci/quickstart", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
        subprocess.run([BASH, "-n", ROOT / name], check=True)


def test_the_short_entry_point_runs_ci_test(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / "ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    executable(tmp_path / "ci" / "test", "echo the tests ran")
    run = subprocess.run([BASH, tmp_path / ".ci" / "run"], capture_output=True, text=True, cwd="/")
    assert run.stdout == "the tests ran\n"


def test_the_workflow_runs_the_scripts_that_anyone_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    assert {"bash ci/test", "bash ci/quickstart"} <= {step.get("run") for step in steps}


def test_the_quickstart_runs_a_notebook_that_is_there(tmp_path):
    """The script with stubs for what it starts: papermill says which notebook it was given."""
    (tmp_path / "ci").mkdir()
    shutil.copy(ROOT / "ci" / "quickstart", tmp_path / "ci")
    (tmp_path / "ci" / "setup").write_text('root="$PWD"\n')
    shutil.copytree(ROOT / "nbs" / "experiments", tmp_path / "nbs" / "experiments")
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "papermill", 'printf "%s\\n" "$@"; exit 7')
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [BASH, "ci/quickstart", "-p", "seed", "1"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    words = run.stdout.splitlines()
    notebook = next(word for word in words if word.startswith("nbs/") and word.endswith(".ipynb"))
    assert run.returncode == 7 and (ROOT / notebook).is_file()
    assert "out_dir" in words and words[-3:] == ["-p", "seed", "1"]


def test_smoke_names_every_notebook_with_parameters_that_it_has():
    from chunk_grpo_nb.analysis.notebooks import check_parameters

    notebooks = ROOT / "nbs"
    table = yaml.safe_load((ROOT / "ci/smoke.yaml").read_text(encoding="utf-8"))
    for name, parameters in table.items():
        check_parameters(notebooks / name, parameters or {})
    rooms = [notebooks / "experiments", notebooks / "tutorials"]
    paths = [path for room in rooms for path in room.glob("*.ipynb")]
    assert {path.relative_to(notebooks).as_posix() for path in paths} == set(table)


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("loss 0.5000 after 3", "loss 0.5001 after 3", True),
        ("loss 0.50", "loss 0.52", False),
        ("tensor([1., -2e-3])", "tensor([1., -2.001e-3])", True),
        ("all right", "all wrong", False),
        ("1 2", "1 2 3", False),
    ],
)
def test_texts_are_the_same_up_to_rounding(old, new, same):
    assert load("nbdev_tests").same_text(old, new) is same


def test_changed_outputs_are_shown_unless_they_may_vary(tmp_path):
    def write(name: str, text: str) -> Path:
        cells = [nbformat.v4.new_code_cell("f()", id="a"), nbformat.v4.new_code_cell("f()", id="b")]
        cells[1].metadata["tags"] = ["varies"]
        for cell in cells:
            cell.outputs = [nbformat.v4.new_output("stream", text=text)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / name)
        return tmp_path / name

    changed_outputs = load("nbdev_tests").changed_outputs
    old, new = write("old.ipynb", "3 chunks"), write("new.ipynb", "4 chunks")
    assert changed_outputs(old, old) == []
    (change,) = changed_outputs(old, new)
    assert change.startswith("cell a") and "3 chunks" in change and "4 chunks" in change


def test_a_table_is_compared_by_its_cells():
    value_text = load("nbdev_tests").value_text
    html = ["<style>td {}</style>", "<table><td>step</td>", "<td>1.0</td></table>"]
    wide, narrow = ({"text/html": html, "text/plain": [text]} for text in ("step 1.0", "step ..."))
    assert value_text(wide) == value_text(narrow)
    assert value_text(wide).split() == ["step", "1.0"]
    assert value_text({"image/png": "x", "text/plain": ["<Figure>"]}) == ""


@pytest.mark.parametrize("grows", [None, "memory_mb", "handles", "cpu_seconds"])
def test_growth_over_a_long_run_is_found(grows):
    pandas = pytest.importorskip("pandas")
    count = 500
    flat = {"memory_mb": 500.0, "handles": 3, "threads": 4, "disk_mb_without_rows": 1.0}
    samples = pandas.DataFrame({"iteration": range(1, count + 1), **flat})
    samples["cpu_seconds"] = 0.1 * samples["iteration"]
    if grows == "cpu_seconds":
        samples["cpu_seconds"] += 1e-4 * samples["iteration"] ** 2
    elif grows:
        samples[grows] += samples["iteration"] / 10
    verdicts = load("long_run").judge(samples)
    growing = {"cpu_seconds": "seconds_per_iteration"}.get(grows, grows)
    assert {name for name, v in verdicts.items() if not v["flat"]} == {growing} - {None}


def test_every_promised_test_exists():
    """Tests that the page of promises names as `tests/test_file.py::test_name`."""
    cells = json.loads((ROOT / "nbs/promises.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    promised = set(re.findall(r"(tests/test_\w+\.py)::(test_\w+)", text))
    assert len(promised) > 20
    for path, name in promised:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"


def test_the_committed_kills_are_many_and_came_out_the_same():
    """At least 20 in time, in training of every kind, in a sweep and of a reward server."""
    path = ROOT / "data/results/trust/kills.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(line.get("killed", False) for line in lines) >= 20
    assert {line["place"] for line in lines if "place" in line} == {"clock", *TOUCHES}
    same = {line["kind"] for line in lines if "kind" in line and "same_bits" in line}
    assert same >= {"adamw", "sgd", "moving average", "lora", "online chunker"}
    assert all(line.get("same_bits", True) and line.get("done_once", True) for line in lines)
    assert {line["what"] for line in lines} == {"training", "sweep", "server"}


@pytest.fixture
def notebook(tmp_path):
    """Writes a notebook of a room after `change(nb)` and returns what the check found."""
    check = load("check_notebooks")

    def found(
        change=lambda nb: None,
        room="experiments",
        parameters='seed: int = 0  # s\nout_dir: str = "x"  # where',
    ):
        nb = nbformat.v4.new_notebook(
            metadata={
                "kernelspec": {"name": "python3", "display_name": "python3"},
                "language_info": {"name": "python"},
            }
        )
        cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        nb.cells = [nbformat.v4.new_markdown_cell("# title"), cell, nbformat.v4.new_code_cell("1")]
        if room != "experiments":
            nb.cells[2].outputs = [nbformat.v4.new_output("stream", text="1")]
        change(nb)
        path = tmp_path / room / "n.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(nb))
        return check.check_notebook(path)

    return found


def test_clean_notebooks_pass(notebook):
    assert notebook() == [] and notebook(room="nbs") == [] and notebook(room="tutorials") == []


def set_output(kind="stream", **fields):
    def change(nb):
        nb.cells[2].outputs = [nbformat.v4.new_output(kind, **fields)]

    return change


@pytest.mark.parametrize(
    "room, change, message",
    [
        ("experiments", set_output(text="1"), "output in an experiment's source"),
        ("nbs", lambda nb: nb.cells[2].update(outputs=[]), "has no outputs"),
        (
            "nbs",
            set_output("error", ename="ValueError", evalue="x", traceback=[]),
            "error output ValueError",
        ),
        ("nbs", set_output(name="stderr", text="warning"), "stderr"),
        ("nbs", set_output(text="Loading:  50%|#####     | 1/2"), "a progress bar"),
        (
            "nbs",
            set_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}),
            "dead without its kernel",
        ),
        (
            "nbs",
            lambda nb: nb.cells[0].update(source="[07_index](index.ipynb) [07](index.ipynb)"),
            "is called '07_index'",
        ),
        (
            "nbs",
            lambda nb: nb.cells[0].update(source="[x](gone.ipynb) [y](https://a.b)"),
            "dead link 'gone.ipynb'",
        ),
        ("nbs", set_output(text="/home/me/x"), "machine path '/home/'"),
        ("nbs", set_output(text="x" * 500_000), "at most 400"),
        ("nbs", lambda nb: nb.cells[0].update(source="see /Users/me"), "machine path"),
        ("nbs", lambda nb: nb.cells[0].update(id=nb.cells[1]["id"]), "ids missing or repeated"),
        ("nbs", lambda nb: nb.cells[1].metadata.update(collapsed=True), "stray metadata"),
        ("nbs", lambda nb: nb.metadata.update(widgets={}), "stray notebook metadata"),
        ("nbs", lambda nb: nb.cells[2].update(execution_count=3), "execution count"),
        ("nbs", lambda nb: nb.cells[2].update(source="x = 1\n" * 60), "split it"),
        (
            "experiments",
            lambda nb: nb.cells[1].update(metadata={}),
            "0 cells are tagged 'parameters'",
        ),
        (
            "experiments",
            lambda nb: nb.cells[1].update(source="seed: int = 0  # s"),
            "no parameter 'out_dir'",
        ),
        (
            "experiments",
            lambda nb: nb.cells[1].update(source="seed = 0"),
            "without annotation or comment",
        ),
        (
            "experiments",
            lambda nb: nb.cells[1].update(
                source='seed: int | None = None  # s\nout_dir: str = "x"  # w'
            ),
            "papermill cannot read the parameters ['seed']",
        ),
    ],
)
def test_unclean_notebooks_are_named(notebook, room, change, message):
    assert any(message in line for line in notebook(change, room)), notebook(change, room)


def test_the_browser_part_says_what_it_skips_and_passes(tmp_path, monkeypatch, capsys):
    """Without Chromium, and with one but without what drives it."""
    command = [sys.executable, ROOT / "ci/browser.py", "--short"]
    run = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("skipped: no notebook was opened")
    assert "apt install chromium" in run.stdout
    monkeypatch.syspath_prepend(ROOT / "ci")
    browser = load("browser")
    executable(tmp_path / "chromium", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "BESIDE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["browser.py", "--short"])
    assert browser.main() == 0
    assert "bash ci/full browser installs" in capsys.readouterr().out


def test_the_browser_part_sees_errors_and_cells_that_did_not_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "ci")
    wrong_cells = load("browser").wrong_cells
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no"}
    fine = {"cell_type": "code", "source": "1", "execution_count": 1, "outputs": []}
    left = {**fine, "execution_count": None}
    assert wrong_cells([fine, {"cell_type": "markdown", "source": "text"}]) == []
    assert wrong_cells([{**fine, "outputs": [error]}, left, left]) == [
        "error output ValueError: no",
        "2 of 3 cells did not run",
    ]


def test_widgets_that_are_used_in_the_browser_are_in_notebooks_that_it_opens(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "ci")
    browser = load("browser")
    opened = {p.relative_to(ROOT).as_posix() for word in browser.LONG for p in ROOT.glob(word)}
    assert set(browser.USES) <= opened and set(browser.SHORT) <= set(browser.USES)
    tutorials = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/tutorials/*.ipynb")}
    assert tutorials <= opened and "nbs/index.ipynb" in opened


ADDRESS = "https://github.com/someone/somewhere"


def test_badges_for_colab_come_from_the_address_and_go_with_it(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "ci")
    colab = load("colab")
    for path in colab.colab_notebooks():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        made = colab.with_colab(notebook, path, ADDRESS)
        title = "".join(made["cells"][0]["source"]).split("\n\n")
        inside = f"someone/somewhere/blob/main/{path.relative_to(ROOT).as_posix()})"
        assert title[0].startswith("# ") and title[1].startswith("> ")
        assert title[2].startswith("[![Open in Colab](") and title[2].endswith(inside)
        nbformat.validate(nbformat.from_dict(made))
        assert colab.with_colab(made, path, ADDRESS) == made
        plain = colab.with_colab(made, path, "")
        assert plain == colab.with_colab(notebook, path, "")
        address = colab.settings()["repository"]
        assert notebook == colab.with_colab(notebook, path, address), "run python ci/readme.py"


def test_the_installing_cell_acts_in_colab_and_nowhere_else(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "ci")
    colab = load("colab")
    path = ROOT / "nbs/tutorials/08_sweep.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    source = "".join(colab.with_colab(notebook, path, ADDRESS)["cells"][1]["source"])
    done = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: done.append(command))
    monkeypatch.setattr(os, "chdir", done.append)
    exec(source, {})
    assert done == []
    monkeypatch.setitem(sys.modules, "google.colab", object())
    exec(source, {})
    clone, install, folder = done
    assert clone[:2] == ["git", "clone"] and clone[-2:] == [ADDRESS, "/content/chunk_grpo_nb"]
    assert install[1:4] == ["-m", "pip", "install"] and install[-1] == f"{clone[-1]}[notebooks]"
    assert folder == "/content/chunk_grpo_nb/nbs/tutorials"
    assert len(source.splitlines()) <= 12 and "%" not in source


def test_the_containers_name_what_is_there():
    """Files, extras and scripts; and nothing heavy or private goes into the image."""
    import configparser

    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.M)[1].split(",")
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    assert all(f"{extra}_requirements" in parser["DEFAULT"] for extra in extras)
    for file in re.findall(r"(?:data|ci)/[\w./]+\.(?:yaml|txt)", text):
        assert (ROOT / file).is_file(), file
    least = re.search(r"^FROM python:3\.(\d+)-", text, re.M)[1]
    assert parser["DEFAULT"]["min_python"] == f"3.{least}"
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept_out_of_git = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {name.removeprefix("**/") for name in left_out} >= set(kept_out_of_git)
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert f"python:3.{least}" in container["image"]
    script, part = container["postCreateCommand"].removeprefix("bash ").split()
    assert f"part_{part}()" in (ROOT / script).read_text(encoding="utf-8")
    assert "chromium" in container["onCreateCommand"]
