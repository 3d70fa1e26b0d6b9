"""Runs every experiment and tutorial by papermill, small (see ci/smoke.yaml), two at a time."""

import sys
import tempfile
import time
from pathlib import Path

import yaml
from joblib import Parallel, delayed

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"


def run(name: str, parameters: dict, folder: Path) -> tuple[str, float, str]:
    """Run one notebook; its name, seconds, and the end of its error ('' if it ran)."""
    from chunk_grpo_nb.analysis.notebooks import notebook_parameters, run_notebook

    notebook, start = NOTEBOOKS / name, time.monotonic()
    try:
        if "out_dir" in notebook_parameters(notebook):
            parameters = {"out_dir": str(folder / notebook.stem / "run"), **parameters}
        run_notebook(notebook, folder / notebook.stem / notebook.name, parameters)
        error = ""
    except Exception as e:
        error = f"{type(e).__name__}: {e}"[-3000:]
    return name, time.monotonic() - start, error


def main() -> int:
    """Run all notebooks and print a line for each; 1 if any failed."""
    table = yaml.safe_load((ROOT / "ci" / "smoke.yaml").read_text(encoding="utf-8")) or {}
    rooms = (NOTEBOOKS / "experiments", NOTEBOOKS / "tutorials")
    paths = [path for room in rooms for path in room.glob("*.ipynb")]
    there = {path.relative_to(NOTEBOOKS).as_posix() for path in paths}
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(there & set(table))
        jobs = [delayed(run)(name, table[name] or {}, Path(folder)) for name in names]
        results = Parallel(n_jobs=2)(jobs)
    failed = 0
    for name, seconds, error in results:
        failed += bool(error)
        print(f"{'FAILED' if error else 'passed'} {seconds:6.1f} s  {name}")
        if error:
            print(error)
    for name in sorted(there ^ set(table)):
        failed += 1
        print(f"FAILED  {name}: must be both in ci/smoke.yaml and in nbs")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
