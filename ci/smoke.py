"""Runs every experiment and tutorial notebook by papermill, with the small parameters of ci/smoke.yaml, two at a time."""

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
    table = yaml.safe_load((ROOT / "ci" / "smoke.yaml").read_text(encoding="utf-8")) or {}
    found = {
        p.relative_to(NOTEBOOKS).as_posix()
        for room in ("experiments", "tutorials")
        for p in (NOTEBOOKS / room).glob("*.ipynb")
    }
    missing, unknown = sorted(found - set(table)), sorted(set(table) - found)
    with tempfile.TemporaryDirectory() as folder:
        jobs = (
            delayed(run)(name, table[name] or {}, Path(folder))
            for name in sorted(found & set(table))
        )
        results = Parallel(n_jobs=2)(jobs)
    for name, seconds, error in results:
        print(
            f"{'FAILED' if error else 'passed'} {seconds:6.1f} s  {name}"
            + f"\n{error}" * bool(error)
        )
    print(
        *(f"FAILED  {name}: no line in ci/smoke.yaml" for name in missing),
        *(f"FAILED  {name}: in ci/smoke.yaml, not in nbs" for name in unknown),
        sep="\n",
    )
    return int(bool(missing or unknown or any(error for *_, error in results)))


if __name__ == "__main__":
    sys.exit(main())
