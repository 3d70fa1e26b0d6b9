"""Runs nbdev-test on every library notebook, each in a process of its own, two at a time: no notebook can lean on another, or stop it."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds for one notebook


def run(notebook: Path) -> tuple[Path, float, str]:
    """Test one notebook; its path, seconds, and what it printed if it failed ('' if it passed)."""
    start, words = time.monotonic(), ["nbdev-test", str(notebook), "--n-workers", "0"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
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
    error = (
        "" if process.returncode == 0 else printed[-6000:] or f"exit status {process.returncode}"
    )
    return notebook, time.monotonic() - start, error


def library_notebooks() -> list[Path]:
    """Every notebook that exports a module, and the index."""
    shown = {"experiments", "tutorials", ".ipynb_checkpoints"}
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not shown & set(p.parts))


def main(notebooks: list[Path]) -> int:
    """Print a line per notebook as it ends; 1 if any failed."""
    failed = 0
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for notebook, seconds, error in pool.map(run, notebooks):
            failed += bool(error)
            print(
                f"{'FAILED' if error else 'passed'} {seconds:6.1f} s  {notebook.name}"
                + f"\n{error}" * bool(error),
                flush=True,
            )
    print(f"{len(notebooks) - failed} of {len(notebooks)} library notebooks pass")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main([Path(name).resolve() for name in sys.argv[1:]] or library_notebooks()))
