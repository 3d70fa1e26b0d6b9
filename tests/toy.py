"""The definitions of the 2-D toy tutorial: the cells of its notebook tagged `definitions`."""

import json
from pathlib import Path
from types import SimpleNamespace

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "tutorials" / "01_toy_2d.ipynb"


def load_toy() -> SimpleNamespace:
    namespace = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if "definitions" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), namespace)
    return SimpleNamespace(**namespace)
