"""Checks that committed notebooks are clean: stable ids, no stray metadata, outputs where readers need them and nowhere else."""

import ast
import json
import re
import sys
from pathlib import Path

import papermill

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 400_000  # of a notebook with its outputs
MAX_LINES = 130  # of a code cell
PATHS = re.compile(r"(/home/|/Users/|/root/|/work/|[A-Z]:\\\\Users|site-packages)")
ANNOTATED = re.compile(
    r"^\w+\s*:\s*[^=]+=.*\S\s+#\s*\S|^\s*(#.*)?$"
)  # name: type = value  # comment


def text_of(output: dict) -> str:
    """What an output shows as text."""
    data = output.get("data", {})
    return "".join(output.get("text", [])) + "".join(
        "".join(v) for k, v in data.items() if k.startswith("text/")
    )


def check_cell(cell: dict, room: str) -> list[str]:
    """What is wrong with one cell."""
    found, source, meta = [], "".join(cell["source"]), cell["metadata"]
    if stray := set(meta) - {"tags"}:
        found.append(f"stray metadata {sorted(stray)}: run nbdev-clean")
    if match := PATHS.search(source):
        found.append(f"machine path {match[0]!r} in the source")
    if cell["cell_type"] != "code":
        return found
    if source.count("\n") >= MAX_LINES:
        found.append(f"{source.count(chr(10)) + 1} lines, at most {MAX_LINES}: split it")
    if cell["execution_count"] is not None:
        found.append("execution count left: run nbdev-clean")
    for output in cell["outputs"]:
        if room == "experiments":
            found.append("output in an experiment's source: clear it")
        if output["output_type"] == "error":
            found.append(f"error output {output['ename']}")
        if output.get("name") == "stderr":
            found.append("output on stderr")
        if match := PATHS.search(text_of(output)):
            found.append(f"machine path {match[0]!r} in an output")
    return found


def check_parameters(path: Path, cells: list[dict], needed: bool) -> list[str]:
    """What is wrong with the `parameters` cell, which an experiment needs and a tutorial may have."""
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        return (
            [f"{len(tagged)} cells are tagged 'parameters', one is needed"]
            if tagged or needed
            else []
        )
    names = {
        node.target.id
        for node in ast.parse("".join(tagged[0]["source"])).body
        if isinstance(node, ast.AnnAssign)
    }
    if hidden := names - set(papermill.inspect_notebook(str(path))):
        return [
            f"papermill cannot read the parameters {sorted(hidden)}: one line each, a plain type, one '='"
        ]
    lines = "".join(tagged[0]["source"]).splitlines()
    found = [
        f"parameter without annotation or comment: {line!r}"
        for line in lines
        if not ANNOTATED.search(line)
    ]
    if not needed:
        return found
    return found + [
        f"no parameter {name!r}"
        for name in ("seed", "out_dir")
        if not any(re.match(rf"{name}\s*:", line) for line in lines)
    ]


def check_notebook(path: Path) -> list[str]:
    """What is wrong with the notebook at `path`; empty if it is clean."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    room, cells = path.parent.name, nb["cells"]
    found = []
    if (nb["nbformat"], nb["nbformat_minor"]) < (4, 5):
        found.append("older than nbformat 4.5")
    if stray := set(nb["metadata"]) - {"kernelspec", "language_info"}:
        found.append(f"stray notebook metadata {sorted(stray)}")
    if nb["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    if nb["metadata"].get("language_info", {}).get("name") != "python":
        return [*found, "language_info does not say python"]
    ids = [cell.get("id") for cell in cells]
    if None in ids or len(set(ids)) < len(ids):
        found.append("cell ids missing or repeated")
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.stat().st_size // 1000} kB, at most {MAX_BYTES // 1000}")
    if room == "experiments":
        found += check_parameters(path, cells, needed=True)
    elif room == "tutorials":
        found += check_parameters(path, cells, needed=False)
    if room != "experiments" and not any(
        cell.get("outputs") or "default_exp __init__" in "".join(cell["source"]) for cell in cells
    ):
        found.append("has no outputs: run it before committing")
    for number, cell in enumerate(cells):
        found += [f"cell {number} ({cell.get('id')}): {what}" for what in check_cell(cell, room)]
    return found


def main(paths: list[Path]) -> int:
    """Check the notebooks at `paths` and print what was found; 1 if anything was."""
    problems = {path: found for path in paths if (found := check_notebook(path))}
    for path, found in problems.items():
        print(
            *(
                f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: {what}"
                for what in found
            ),
            sep="\n",
        )
    print(f"{len(paths) - len(problems)} of {len(paths)} notebooks are clean")
    return int(bool(problems))


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:]]
    sys.exit(
        main(
            given
            or sorted(
                p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
            )
        )
    )
