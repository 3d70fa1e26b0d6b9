"""Badges that open index and tutorials in Colab, and the cell that installs the library there.

Both are written by ci/readme.py from `repository` in settings.ini, and taken out while it is empty.
"""

import configparser
import copy
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"\n\n\[!\[Open in Colab\]\([^\n]*", re.M)
CELL_ID = "c01ab001"
INSTALL = """import os
import subprocess
import sys

if "google.colab" in sys.modules:  # elsewhere nothing is installed
    place = "/content/{name}"
    clone = ["git", "clone", "-q", "--depth", "1", "{address}", place]
    install = [sys.executable, "-m", "pip", "install", "-q", f"{{place}}[notebooks]"]
    for command in (clone, install) if not os.path.exists(place) else ():
        subprocess.run(command, check=True)
    os.chdir(f"{{place}}/{folder}")"""


def settings() -> configparser.SectionProxy:
    """What settings.ini says."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def colab_notebooks() -> list[Path]:
    """The notebooks that can be opened in Colab."""
    return [ROOT / "nbs" / "index.ipynb", *sorted(ROOT.glob("nbs/tutorials/*.ipynb"))]


def badge(path: Path, address: str) -> str:
    """The badge of a notebook, as Markdown."""
    place = address.removeprefix("https://github.com/").removesuffix(".git")
    link = f"{COLAB}/github/{place}/blob/main/{path.relative_to(ROOT).as_posix()}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def with_colab(notebook: dict, path: Path, address: str) -> dict:
    """A notebook with badge and installing cell; without both where there is no address."""
    made = copy.deepcopy(notebook)
    cells = made["cells"] = [cell for cell in made["cells"] if cell["id"] != CELL_ID]
    title = BADGE.sub("", "".join(cells[0]["source"]))
    if address:
        head, quote, rest = re.match(r"(.*?)(^> [^\n]*)(.*)", title, re.M | re.S).groups()
        title = f"{head}{quote}\n\n{badge(path, address)}{rest}"
        folder = path.parent.relative_to(ROOT).as_posix()
        source = INSTALL.format(name=settings()["lib_name"], address=address, folder=folder)
        cell = {"cell_type": "code", "execution_count": None, "id": CELL_ID, "metadata": {}}
        cells.insert(1, cell | {"outputs": [], "source": source.splitlines(keepends=True)})
    cells[0]["source"] = title.splitlines(keepends=True)
    return made
