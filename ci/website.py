"""Write the documentation site: every notebook as a page, with links, an index and a search.

python ci/website.py [FOLDER]      default _docs; open FOLDER/index.html, no server is needed
"""

import html
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import Highlight2HTML
from pygments.formatters import HtmlFormatter
from reading_order import ROOT, reading_order
from web_page import NO_TEXT, alternative_texts

NOTEBOOKS = ROOT / "nbs"
LINK = re.compile(r'(href|src)="([^"]+)"')
MATHJAX = "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { margin: 0; font: 16px/1.5 sans-serif; }
header { padding: .6em 1em; border-bottom: 1px solid var(--line); }
header a { margin-right: 1em; }
main { max-width: 52em; margin: auto; padding: 1em; overflow-wrap: anywhere; }
nav.turn { display: flex; justify-content: space-between; gap: 1em; margin: 2em 0; }
pre { overflow-x: auto; padding: .6em; border: 1px solid var(--line); border-radius: 4px; }
table { display: block; overflow-x: auto; border-collapse: collapse; }
td, th { padding: .2em .6em; border-bottom: 1px solid var(--line); text-align: left; }
img { max-width: 100%; height: auto; background: white; }
.anchor-link, .jp-InputPrompt, .jp-OutputPrompt, .prompt { display: none; }
#found li { margin: .3em 0; }
"""
SEARCH = """
const box = document.getElementById("search"), list = document.getElementById("found");
const root = box.dataset.root;
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\\s+/).filter((word) => word.length > 1);
  const score = (page) => words.reduce((sum, word) => {
    const inTitle = page.title.toLowerCase().includes(word) ? 100 : 0;
    const inText = page.text.split(word).length - 1;
    return inTitle || inText ? sum + inTitle + inText : -Infinity;
  }, 0);
  const hits = words.length ? PAGES.map((page) => [score(page), page]) : [];
  list.replaceChildren(...hits.filter(([s]) => s > 0).sort((a, b) => b[0] - a[0]).slice(0, 20)
    .map(([, page]) => {
      const item = document.createElement("li"), link = document.createElement("a");
      link.href = root + page.url;
      link.textContent = page.title;
      item.append(link, " " + page.about);
      return item;
    }));
});
"""


def site_pages() -> list[Path]:
    """All notebooks, the index first, then in reading order."""
    entries = [entry for _, part in reading_order() for entry in part]
    return [NOTEBOOKS / "index.ipynb", *(entry.path for entry in entries)]


def page_of(path: Path) -> Path:
    """The page of a notebook, below the site's folder."""
    return path.relative_to(NOTEBOOKS).with_suffix(".html")


def relinked(body: str, source: Path, folder: Path) -> str:
    """The body of a page with its links to notebooks leading to pages; other files are copied."""
    depth = "../" * (len(page_of(source).parts) - 1)

    def relink(match: re.Match) -> str:
        kind, link = match.groups()
        target = urlsplit(html.unescape(link))
        if target.scheme or target.netloc or not target.path:
            return match[0]
        file = (source.parent / unquote(target.path)).resolve()
        fragment = f"#{target.fragment}" if target.fragment else ""
        if file.suffix == ".ipynb" and file.is_relative_to(NOTEBOOKS):
            return f'{kind}="{depth}{page_of(file).as_posix()}{fragment}"'
        if file.is_file() and file.is_relative_to(ROOT):
            copy = folder / "files" / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
            return f'{kind}="{depth}{copy.relative_to(folder).as_posix()}{fragment}"'
        return match[0]

    return LINK.sub(relink, body)


def notebook_body(notebook, source: Path, folder: Path) -> str:
    """What a notebook shows, as HTML, with an alternative text for every picture."""
    exporter = HTMLExporter(template_name="basic")
    exporter.filters = {"highlight_code": Highlight2HTML(pygments_lexer="python")}
    body, _ = exporter.from_notebook_node(notebook)
    texts = iter(alternative_texts(notebook))
    body = re.sub(f'alt="{NO_TEXT}"', lambda _: f'alt="{html.escape(next(texts))}"', body)
    return relinked(body, source, folder)


def frame(title: str, body: str, depth: str, turn: str = "") -> str:
    """A whole page."""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="stylesheet" href="{depth}site.css">
<script src="{MATHJAX}" async></script></head><body>
<header><a href="{depth}index.html">chunk_grpo_nb</a><label>search <input id="search"
type="search" data-root="{depth}"></label><ol id="found"></ol></header>
<main>{body}{turn}</main>
<script src="{depth}pages.js"></script><script src="{depth}search.js"></script></body></html>"""


def turn_pages(pages: list[Path], number: int, depth: str) -> str:
    """Links to the page before and the page after."""
    links = []
    for place, arrow in ((number - 1, "← {}"), (number + 1, "{} →")):
        if 0 <= place < len(pages):
            text = arrow.format(pages[place].stem)
            links.append(f'<a href="{depth}{page_of(pages[place]).as_posix()}">{text}</a>')
        else:
            links.append("<span></span>")
    return f'<nav class="turn">{"".join(links)}</nav>'


def search_entry(notebook, source: Path) -> dict:
    """What the search knows of a page."""
    cells = [cell.source for cell in notebook.cells]
    title = re.search(r"^# (.+)$", cells[0], re.M)[1]
    about = re.search(r"^> (.+)$", cells[0], re.M)
    text = re.sub(r"\s+", " ", " ".join(cells)).lower()
    return {
        "title": f"{source.stem}: {title}",
        "about": about[1] if about else "",
        "url": page_of(source).as_posix(),
        "text": text,
    }


def write_site(folder: Path, pages: list[Path]) -> None:
    """The pages of some notebooks, with style, search and the files they link to."""
    folder.mkdir(parents=True, exist_ok=True)
    known = []
    for number, source in enumerate(pages):
        notebook = nbformat.read(source, as_version=4)
        known.append(search_entry(notebook, source))
        place = folder / page_of(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        depth = "../" * (len(page_of(source).parts) - 1)
        body = notebook_body(notebook, source, folder)
        turn = turn_pages(pages, number, depth)
        place.write_text(frame(known[-1]["title"], body, depth, turn), encoding="utf-8")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="monokai").get_style_defs(".highlight")
    style = f"{STYLE}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
    (folder / "site.css").write_text(style, encoding="utf-8")
    (folder / "pages.js").write_text(f"const PAGES = {json.dumps(known)};", encoding="utf-8")
    (folder / "search.js").write_text(SEARCH, encoding="utf-8")


class Anchors(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Remember what leads somewhere, and what can be led to."""
        named = dict(attrs)
        self.links += [named[key] for key in ("href", "src") if named.get(key)]
        self.anchors |= {named[key] for key in ("id", "name") if named.get(key)}


def dead_links(folder: Path) -> list[str]:
    """Links of the site's pages to files or anchors that are not there."""
    pages = {p.resolve(): Anchors(p.read_text("utf-8")) for p in folder.rglob("*.html")}
    dead = []
    for place, page in pages.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            path = unquote(target.path)
            file = (place.parent / path).resolve() if path else place
            anchor = unquote(target.fragment)
            missing = anchor and file in pages and anchor not in pages[file].anchors
            if not file.exists() or missing:
                dead.append(f"{place.relative_to(folder.resolve())}: {link}")
    return dead


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"
    write_site(target, site_pages())
    if dead := dead_links(target):
        sys.exit("dead links:\n" + "\n".join(dead))
    print(f"{len(site_pages())} pages: {target / 'index.html'}")
