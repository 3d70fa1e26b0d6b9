"""Checks that committed notebooks are clean.

Stable ids, no stray metadata, short cells, links that lead somewhere; outputs where readers need
them and nowhere else, and none that only a live kernel could show.
"""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

import papermill

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 400_000  # of a notebook with its outputs
MAX_LINES = 50  # of a code cell
PATHS = re.compile(r"(/home/|/Users/|/root/|/work/|[A-Z]:\\\\Users|site-packages)")
PROGRESS_BAR = re.compile(r"\d+%\|")
WIDGET = "application/vnd.jupyter.widget-view+json"
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)")  # text and target
NUMBERED = re.compile(r"\d\d_\w+|^\d+$")  # a notebook's name, or its number alone
NEEDED = ("seed", "out_dir")  # parameters of every experiment
ANNOTATED = re.compile(r"^\w+\s*:\s*[^=]+=.*\S\s+#\s*\S|^\s*(#.*)?$")  # name: type = value  # help


def source_of(cell: dict) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def text_of(output: dict) -> str:
    """What an output shows as text."""
    data = output.get("data", {})
    shown = ["".join(value) for kind, value in data.items() if kind.startswith("text/")]
    return "".join([*output.get("text", []), *shown])


def check_output(output: dict) -> list[str]:
    """What is wrong with one output."""
    found = []
    text = text_of(output)
    if output["output_type"] == "error":
        found.append(f"error output {output['ename']}")
    if output.get("name") == "stderr":
        found.append("output on stderr")
    if WIDGET in output.get("data", {}):
        found.append("a widget that is dead without its kernel: drop it, or show a picture")
    if PROGRESS_BAR.search(text):
        found.append("a progress bar in the output: switch it off")
    if match := PATHS.search(text):
        found.append(f"machine path {match[0]!r} in an output")
    return found


def check_cell(cell: dict, room: str) -> list[str]:
    """What is wrong with one cell."""
    found, source = [], source_of(cell)
    if stray := set(cell["metadata"]) - {"tags"}:
        found.append(f"stray metadata {sorted(stray)}: run nbdev-clean")
    if match := PATHS.search(source):
        found.append(f"machine path {match[0]!r} in the source")
    if cell["cell_type"] != "code":
        return found
    lines = len(source.splitlines())
    if lines > MAX_LINES:
        found.append(f"{lines} lines, at most {MAX_LINES}: split it")
    if cell["execution_count"] is not None:
        found.append("execution count left: run nbdev-clean")
    if room == "experiments" and cell["outputs"]:
        found.append("output in an experiment's source: clear it")
    for output in cell["outputs"]:
        found += check_output(output)
    return found


def numbers_otherwise(shown: str, target: str) -> bool:
    """Whether the text of a link gives its notebook another number, or no name at all."""
    name = Path(target).stem
    return any(found.isdigit() or found not in name for found in NUMBERED.findall(shown))


def check_links(path: Path, cells: list[dict]) -> list[str]:
    """Links that lead nowhere, or that number a notebook otherwise than it is numbered now."""
    text = "\n".join(source_of(cell) for cell in cells if cell["cell_type"] == "markdown")
    found = []
    for shown, target in LINK.findall(text):
        if ":" in target:
            continue
        if not (path.parent / target).exists():
            found.append(f"dead link {target!r}")
        if target.endswith(".ipynb") and numbers_otherwise(shown, target):
            found.append(f"the link to {target!r} is called {shown!r}")
    return found


def check_parameters(path: Path, cells: list[dict], needed: bool) -> list[str]:
    """What is wrong with the `parameters` cell; experiments need one, tutorials may have one."""
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if not tagged and not needed:
        return []
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged 'parameters', one is needed"]
    source = source_of(tagged[0])
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    names = {node.target.id for node in assigned}
    if hidden := names - set(papermill.inspect_notebook(str(path))):
        return [
            f"papermill cannot read the parameters {sorted(hidden)}: "
            "one line each, a plain type, one '='"
        ]
    bare = [line for line in source.splitlines() if not ANNOTATED.search(line)]
    found = [f"parameter without annotation or comment: {line!r}" for line in bare]
    if needed:
        found += [f"no parameter {name!r}" for name in NEEDED if name not in names]
    return found


def check_metadata(path: Path, nb: dict) -> list[str]:
    """What is wrong with a notebook apart from its cells."""
    found, metadata = [], nb["metadata"]
    if (nb["nbformat"], nb["nbformat_minor"]) < (4, 5):
        found.append("older than nbformat 4.5")
    if stray := set(metadata) - {"kernelspec", "language_info"}:
        found.append(f"stray notebook metadata {sorted(stray)}")
    if metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    if metadata.get("language_info", {}).get("name") != "python":
        found.append("language_info does not say python")
    ids = [cell.get("id") for cell in nb["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        found.append("cell ids missing or repeated")
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.stat().st_size // 1000} kB, at most {MAX_BYTES // 1000}")
    return found


def check_notebook(path: Path) -> list[str]:
    """What is wrong with the notebook at `path`; empty if it is clean."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    room, cells = path.parent.name, nb["cells"]
    found = check_metadata(path, nb)
    if "language_info does not say python" in found:
        return found  # papermill could not read it
    found += check_links(path, cells)
    if room in ("experiments", "tutorials"):
        found += check_parameters(path, cells, needed=room == "experiments")
    silent = room == "experiments" or any("default_exp __init__" in source_of(c) for c in cells)
    if not silent and not any(cell.get("outputs") for cell in cells):
        found.append("has no outputs: run it before committing")
    for number, cell in enumerate(cells):
        wrong = check_cell(cell, room)
        found += [f"cell {number} ({cell.get('id')}): {what}" for what in wrong]
    return found


def cell_lengths(paths: list[Path]) -> list[int]:
    """Lines of every code cell of the notebooks."""
    cells = [cell for path in paths for cell in json.loads(path.read_text())["cells"]]
    return [len(source_of(cell).splitlines()) for cell in cells if cell["cell_type"] == "code"]


def main(paths: list[Path]) -> int:
    """Check the notebooks at `paths` and print what was found; 1 if anything was."""
    unclean = 0
    for path in paths:
        found = check_notebook(path)
        unclean += bool(found)
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for what in found:
            print(f"{name}: {what}")
    print(f"{len(paths) - unclean} of {len(paths)} notebooks are clean")
    if lengths := cell_lengths(paths):
        median = statistics.median(lengths)
        print(f"{len(lengths)} code cells: {median:.0f} lines in the median, {max(lengths)} most")
    return int(unclean > 0)


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:]]
    everything = sorted((ROOT / "nbs").rglob("*.ipynb"))
    committed = [path for path in everything if ".ipynb_checkpoints" not in path.parts]
    sys.exit(main(given or committed))
