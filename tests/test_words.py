"""One word for one thing: the glossary is used, home-made words and outside references are not."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
NOTEBOOKS = sorted(
    path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
SCRIPTS = [*sorted(ROOT.glob("ci/*.py")), *sorted(ROOT.glob("tests/*.py"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def cells_of(path: Path, kind: str | None = None) -> list[str]:
    """Sources of a notebook's cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if kind in (None, c["cell_type"])]


def text_of(path: Path) -> str:
    """What is written in a file, without outputs."""
    if path.suffix == ".ipynb":
        return "\n".join(cells_of(path))
    return path.read_text(encoding="utf-8")


def glossary() -> dict[str, str]:
    """Term -> meaning, of the table in the index; several terms of a row are separate."""
    table = next(cell for cell in cells_of(INDEX, "markdown") if cell.startswith("## Glossary"))
    rows = re.findall(r"^\| (?!word)(.+?) \| (.+) \|$", table, re.M)
    terms = [(term, meaning) for names, meaning in rows for term in plain(names).split(", ")]
    assert [term for term, count in Counter(term for term, _ in terms).items() if count > 1] == []
    return dict(terms)


def plain(names: str) -> str:
    """Terms without formulas, code marks and bracketed synonyms."""
    return re.sub(r"\s*(\$[^$]*\$|\([^)]*\))", "", names).replace("`", "")


@pytest.mark.parametrize("term", glossary())
def test_a_glossary_term_is_used_and_explained(term):
    assert len(glossary()[term].split()) > 3
    elsewhere = "\n".join(text_of(path) for path in NOTEBOOKS if path != INDEX).lower()
    assert elsewhere.count(term.lower()) >= 2, f"{term!r} is in the glossary and nowhere else"


HOME_MADE = {  # word -> what it is called here
    r"\bfacts?\b": "metrics, manifest, features or settings",
    r"\b_?CellRecord\b|\brun_cell\b": "trial",
    r"\bworld_facts\b": "shapes_settings",
}
OUTSIDE = r"\btrap \d|method notes|\bmethod\.md\b|\bdesign\.md\b|\becosystem\.md\b"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SCRIPTS, *PAGES], ids=lambda path: path.name)
def test_field_terms_instead_of_home_made_ones(path):
    text = "" if path == Path(__file__) else text_of(path)
    for word, instead in HOME_MADE.items():
        found = re.search(word, text, re.I)
        assert not found, f"{found[0]!r}: write {instead}"
    assert not re.search(OUTSIDE, text), "a reference to something that readers do not have"


AMERICAN = (
    r"\b(colors?|behaviors?|gray|favorite|center(?:ed)?|"
    r"(?:optimi|normali|summari|initiali|visuali|reali|generali)z\w+)\b"
)
NOT_PROSE = (
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|https?:\S+|\]\([^)]*\)"  # code, formulas, links
)
QUOTED = r"\*[^*\n]+\*|\"[^\"\n]+\""  # titles and what others wrote


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_sentences_are_in_british_spelling(path):
    text = "\n".join(cells_of(path, "markdown"))
    prose = re.sub(QUOTED, " ", re.sub(NOT_PROSE, " ", text, flags=re.S))
    assert re.findall(AMERICAN, prose, re.I) == []
