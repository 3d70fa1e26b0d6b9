"""Regenerates the package from the notebooks, in a copy, and shows what differs from the tree."""

import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "chunk_grpo_nb"


def generated(root: Path) -> dict[str, str]:
    """Text of every generated file under `root`, by its path."""
    modules = sorted((root / PACKAGE).rglob("*.py"))
    files = [*modules, root / "nbs" / "llms.txt", root / "pyproject.toml"]
    there = [file for file in files if file.is_file()]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in there}


def regenerate(copy: Path) -> subprocess.CompletedProcess:
    """Export the notebooks into an empty package under `copy`."""
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", "llms.txt")
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / PACKAGE).mkdir()
    return subprocess.run(["nbdev-export"], cwd=copy, capture_output=True, text=True)


def difference(old: str | None, new: str | None) -> list[str]:
    """How a generated file differs: a word, and the start of the diff where both are there."""
    if new is None:
        return ["no notebook exports it"]
    if old is None:
        return ["missing"]
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "in the tree", "from the notebooks", n=1, lineterm=""
    )
    return ["stale", *list(lines)[:12]]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        run = regenerate(copy)
        if run.returncode:
            print(run.stdout, run.stderr, "nbdev-export failed", sep="\n")
            return 1
        committed, fresh = generated(ROOT), generated(copy)
    names = sorted(committed | fresh)
    stale = [name for name in names if committed.get(name) != fresh.get(name)]
    for name in stale:
        word, *diff = difference(committed.get(name), fresh.get(name))
        print(f"{name}: {word}", *diff, sep="\n")
    print(f"{len(stale)} of {len(names)} generated files differ")
    if stale:
        print("Run nbdev-export and commit.")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
