"""Regenerates the package from the notebooks, from nothing, in a copy, and shows every difference from what the tree holds."""

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
    files = [
        *sorted((root / PACKAGE).rglob("*.py")),
        root / "nbs" / "llms.txt",
        root / "pyproject.toml",
    ]
    return {
        file.relative_to(root).as_posix(): file.read_text(encoding="utf-8")
        for file in files
        if file.is_file()
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        shutil.copytree(
            ROOT / "nbs",
            copy / "nbs",
            ignore=shutil.ignore_patterns(".ipynb_checkpoints", "llms.txt"),
        )
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / PACKAGE).mkdir()
        run = subprocess.run(["nbdev-export"], cwd=copy, capture_output=True, text=True)
        if run.returncode:
            print(run.stdout, run.stderr, "nbdev-export failed", sep="\n")
            return 1
        committed, fresh = generated(ROOT), generated(copy)
    stale = 0
    for name in sorted(committed | fresh):
        old, new = committed.get(name), fresh.get(name)
        if old != new:
            stale += 1
            what = (
                "no notebook exports it" if new is None else "missing" if old is None else "stale"
            )
            print(f"{name}: {what}")
            if old is not None and new is not None:
                print(
                    *list(
                        difflib.unified_diff(
                            old.splitlines(),
                            new.splitlines(),
                            "in the tree",
                            "from the notebooks",
                            "",
                            "",
                            1,
                            "",
                        )
                    )[:12],
                    sep="\n",
                )
    print(
        f"{stale} of {len(committed | fresh)} generated files differ"
        + (": run nbdev-export and commit" if stale else "")
    )
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
