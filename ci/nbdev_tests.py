"""Runs nbdev-test on every library notebook and compares what it shows with what is committed.

    python ci/nbdev_tests.py [--strict] [NOTEBOOK ...]

Each notebook runs in a process of its own, two at a time, so that none can lean on another or stop
it. It runs in a copy of nbs/, which gets the new outputs. Where their text is not that of the
committed ones (numbers within one per cent, white space aside), both are shown; with --strict that
fails too, since other machines and terminals print other digits and widths. A cell tagged `varies`
(times, hardware) is not compared.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds for one notebook
TOLERANCE = 0.01  # relative, of numbers in outputs
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
TAG = re.compile(r"<style.*?</style>|<[^>]*>", re.DOTALL)
CLOCK = re.compile(r"perf_counter|process_time|monotonic|time\(\)|timeit|seconds")
EXCEPTIONS = {"experiments", "tutorials", ".ipynb_checkpoints"}


@dataclass
class Result:
    """How one notebook fared: `error` and `changes` are empty if all is well."""

    notebook: Path
    seconds: float
    error: str
    changes: list[str]


def run(notebook: Path) -> str:
    """Run nbdev-test on a notebook, which keeps its outputs; what it printed if it failed."""
    process = subprocess.Popen(
        ["nbdev-test", str(notebook), "--n-workers", "0", "--save"],
        cwd=notebook.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # makes it say where every thread stands
        printed = process.communicate()[0] + f"\nstopped after {LIMIT} s"
    if process.returncode == 0:
        return ""
    return printed[-6000:] or f"exit status {process.returncode}"


def value_text(data: dict) -> str:
    """The text of a shown value; of a table its cells, since its plain text depends on a width."""
    if any(kind.startswith("image/") for kind in data):
        return ""
    if "text/html" in data:
        return TAG.sub(" ", "".join(data["text/html"]))
    return "".join(data.get("text/plain", []))


def shown_text(cell: dict) -> str:
    """The text that a cell shows: its prints and its values, without pictures and warnings."""
    parts = []
    for output in cell["outputs"]:
        if output.get("name") != "stderr":
            parts += output.get("text", [])
        parts += [value_text(output.get("data", {})), "\n"]
    return "".join(parts)


def same_text(old: str, new: str) -> bool:
    """True if two texts agree in words exactly and in numbers within TOLERANCE."""
    old, new = (" ".join(text.split()) for text in (old, new))
    if NUMBER.split(old) != NUMBER.split(new):
        return False
    numbers = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    return all(
        math.isclose(float(a), float(b), rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in numbers
    )


def is_stable(cell: dict) -> bool:
    """True if a code cell should show the same text on every machine."""
    source = "".join(cell["source"])
    return "varies" not in cell["metadata"].get("tags", []) and not CLOCK.search(source)


def changed_outputs(committed: Path, fresh: Path) -> list[str]:
    """The cells whose text is no longer what is committed, with both texts."""
    old, new = (
        json.loads(path.read_text(encoding="utf-8"))["cells"] for path in (committed, fresh)
    )
    found = []
    for before, after in zip(old, new, strict=True):
        if before["cell_type"] != "code" or not is_stable(before):
            continue
        texts = shown_text(before), shown_text(after)
        if not same_text(*texts):
            found.append("cell {}:\n- {!r}\n+ {!r}".format(before["id"], *(t[:300] for t in texts)))
    return found


def check(notebook: Path, folder: Path) -> Result:
    """Run the copy of a notebook that lies in `folder`, and compare."""
    start = time.monotonic()
    copy = folder / notebook.relative_to(ROOT)
    error = run(copy)
    changes = [] if error else changed_outputs(notebook, copy)
    return Result(notebook, time.monotonic() - start, error, changes)


def library_notebooks() -> list[Path]:
    """Every notebook that exports a module, and the index."""
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in found if not EXCEPTIONS & set(path.parts)]


def main(notebooks: list[Path], strict: bool = False) -> int:
    """Print a line per notebook as it ends; 1 if any failed or, if strict, shows something else."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "nbs", folder / "nbs")
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "data").symlink_to(ROOT / "data")
        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            for result in pool.map(lambda path: check(path, folder), notebooks):
                failed += bool(result.error or (strict and result.changes))
                verdict = "FAILED" if result.error else "CHANGED" if result.changes else "passed"
                print(f"{verdict:7} {result.seconds:6.1f} s  {result.notebook.name}", flush=True)
                for text in (result.error, *result.changes):
                    print(text, end="\n" * bool(text), flush=True)
    print(f"{len(notebooks) - failed} of {len(notebooks)} library notebooks pass")
    return int(failed > 0)


if __name__ == "__main__":
    named = [Path(name).resolve() for name in sys.argv[1:] if name != "--strict"]
    sys.exit(main(named or library_notebooks(), strict="--strict" in sys.argv))
