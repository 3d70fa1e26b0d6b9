"""Write what README.md, the index and the result pages take from records and notebooks.

python ci/readme.py          rewrite README.md, nbs/index.ipynb and the pages in data/results;
                             badges and cells for Colab (see colab.py)
python ci/readme.py --check  exit 1 if one of them is out of date
"""

import json
import sys
from pathlib import Path

from colab import colab_notebooks, settings, with_colab
from launch_table import launch_table
from migration_page import PAGE as MIGRATION_PAGE
from migration_page import migration_page
from reading_order import index_map, readme_map, unlisted
from result_pages import (
    RESULTS,
    ROOT,
    ablation_page,
    ablation_summary,
    claims_table,
    headline_page,
    headline_results,
    read_json,
)
from speed_page import speed_table

README = ROOT / "README.md"
ABLATION_PAGE = RESULTS / "ablation" / "README.md"
HEADLINE_PAGE = RESULTS / "headline" / "README.md"


def text_of(name: str) -> str:
    """A committed text of the results folder, or nothing."""
    file = RESULTS / name
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def filled(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of the part called `name`."""
    start = text.index("-->", text.index(f"<!-- {name}")) + len("-->")
    end = text.index(f"<!-- end of {name} -->")
    return f"{text[:start]}\n{content}\n{text[end:]}"


def rendered_readme() -> str:
    """README.md with every generated part made anew."""
    parts = {
        "results": headline_results(),
        "claims": claims_table(),
        "ablation": ablation_summary(),
        "speed": speed_table(),
        "launch": launch_table(),
        "support": text_of("support.md"),
        "map": readme_map(),
    }
    text = README.read_text(encoding="utf-8")
    for name, content in parts.items():
        text = filled(text, name, content)
    return text


def rendered_notebook(path: Path) -> str:
    """Index or tutorial with the map made anew, and what Colab needs."""
    notebook = with_colab(read_json(path), path, settings()["repository"])
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "<!-- map:" in source:
            cell["source"] = filled(source, "map", f"\n{index_map()}\n").splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the files, or check them."""
    if forgotten := unlisted():
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in forgotten)
        sys.exit(f"not in the reading order: {names}; add them to ci/reading_order.py")
    texts = {
        README: rendered_readme(),
        **{path: rendered_notebook(path) for path in colab_notebooks()},
        ABLATION_PAGE: ablation_page(),
        HEADLINE_PAGE: headline_page(),
        MIGRATION_PAGE: migration_page(),
    }
    for file, text in texts.items():
        current = file.read_text(encoding="utf-8") if file.exists() else None
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
        elif text != current:
            sys.exit(f"{file.relative_to(ROOT)} is out of date: run python ci/readme.py")


if __name__ == "__main__":
    main()
