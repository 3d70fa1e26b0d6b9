"""The one reading order of all notebooks: the map of the index and of the README."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"


@dataclass(frozen=True)
class Part:
    """A stretch of the reading order: notebooks of one folder, in the order of their names."""

    title: str
    pattern: str  # below `nbs/`
    about: str
    optional: bool = False  # nothing later needs it


PARTS = (
    Part("Start here", "0*.ipynb", "the method in forty lines"),
    Part("Tutorials", "tutorials/*.ipynb", "the method seen: first in the plane, then in images"),
    Part("Headline", "experiments/01_*.ipynb", "what training does, with intervals and pictures"),
    Part("Maths", "maths/*.ipynb", "the contract: pure functions, torch alone"),
    Part("Data", "data/*.ipynb", "prompts, and where packaged files lie"),
    Part("Models", "models/*.ipynb", "any diffusers flow pipeline as a policy: record and replay"),
    Part("Training", "training/*.ipynb", "the loop and what it needs"),
    Part(
        "Rewards", "rewards/*.ipynb", "from images to numbers: local, remote, human", optional=True
    ),
    Part("Shapes", "shapes/*.ipynb", "the embedded model and its exact verifier", optional=True),
    Part(
        "Analysis", "analysis/*.ipynb", "sweeps, statistics, figures, command line", optional=True
    ),
    Part(
        "More experiments",
        "experiments/0[2-9]_*.ipynb",
        "one run, many compared, credit, dynamics, the paper's claims, speed, hybrid inference",
        optional=True,
    ),
    Part(
        "How the shapes models were made",
        "experiments/shapes_*.ipynb",
        "from random weights to what `data/shapes` ships",
        optional=True,
    ),
    Part("Promises", "promises.ipynb", "what is guaranteed, each with its test", optional=True),
)


@dataclass(frozen=True)
class Entry:
    """A notebook in the reading order."""

    path: Path
    title: str
    sentence: str  # the quote under the title
    minutes: int  # to read


def entry_of(path: Path) -> Entry:
    """Title, sentence and reading time of the notebook at `path`.

    A minute takes 200 words or 30 lines of code; rounded up to five minutes.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    head = "".join(cells[0]["source"])
    title = re.search(r"^# (.+)$", head, re.M)[1]
    sentence = re.search(r"^> (.+)$", head, re.M)[1].rstrip(".")
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    words = sum(len(text.split()) for text in texts)
    lines = sum(len(source.splitlines()) for source in code)
    return Entry(path, title, sentence, 5 * math.ceil((words / 200 + lines / 30) / 5))


def reading_order() -> list[tuple[Part, list[Entry]]]:
    """Every part that has notebooks, with their entries in order."""
    found = [(part, sorted(NOTEBOOKS.glob(part.pattern))) for part in PARTS]
    return [(part, [entry_of(path) for path in paths]) for part, paths in found if paths]


def unlisted() -> list[Path]:
    """Notebooks that the reading order forgets; the index itself is where it stands."""
    listed = {entry.path for _, entries in reading_order() for entry in entries}
    everything = {
        path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
    }
    return sorted(everything - listed - {NOTEBOOKS / "index.ipynb"})


def index_map() -> str:
    """The whole order as Markdown for `nbs/index.ipynb`: one table a part."""
    lines, number = [], 0
    for part, entries in reading_order():
        minutes = sum(entry.minutes for entry in entries)
        optional = ", optional" if part.optional else ""
        lines += [f"**{part.title}**: {part.about} ({minutes} minutes to read{optional})", ""]
        lines += ["| | notebook | about | minutes |", "|---|---|---|---|"]
        for entry in entries:
            number += 1
            link = f"[{entry.path.stem}]({entry.path.relative_to(NOTEBOOKS).as_posix()})"
            lines.append(f"| {number} | {link} | {entry.sentence} | {entry.minutes} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def readme_map() -> str:
    """The same order as one table for `README.md`: a row a part."""
    lines = ["| | part | notebooks | what it is | minutes to read |", "|---|---|---|---|---|"]
    for number, (part, entries) in enumerate(reading_order(), 1):
        first = entries[0].path.relative_to(ROOT).as_posix()
        count = f"{len(entries)} notebook{'s' * (len(entries) > 1)}"
        title = f"{part.title} (optional)" if part.optional else part.title
        minutes = sum(entry.minutes for entry in entries)
        lines.append(f"| {number} | [{title}]({first}) | {count} | {part.about} | {minutes} |")
    return "\n".join(lines)
