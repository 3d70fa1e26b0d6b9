"""Write an executed notebook as a web page whose pictures have alternative texts.

python ci/web_page.py NOTEBOOK.ipynb   writes NOTEBOOK.html beside it

A picture's text is the `alt` in the metadata of its output:
`display(figure, metadata={"image/png": {"alt": "..."}})`.
"""

import html
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

NO_TEXT = "No description has been provided for this image"  # what nbconvert writes


def alternative_texts(notebook) -> list[str]:
    """The text of every PNG output, in order; the fallback where an output has none."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return [p["metadata"].get("image/png", {}).get("alt", "a figure") for p in pictures]


def web_page(path: Path) -> str:
    """The notebook at `path` as HTML."""
    notebook = nbformat.read(path, as_version=4)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    texts = iter(alternative_texts(notebook))
    return re.sub(f'alt="{NO_TEXT}"', lambda _: f'alt="{html.escape(next(texts))}"', page)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".html").write_text(web_page(source), encoding="utf-8")
