"""The documentation site: pages with links that lead somewhere, search, nothing dead."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))
from website import dead_links, page_of, site_pages, write_site  # noqa: E402


def test_pages_link_to_pages_files_and_anchors(tmp_path):
    """The index, which links to every notebook, and one notebook of each room."""
    everything = site_pages()
    rooms = {path.parent.name: path for path in reversed(everything)}
    written = [path for path in everything if path in (everything[0], *rooms.values())]
    write_site(tmp_path, written)
    others = {page_of(path).as_posix() for path in everything if path not in written}
    dead = [link for link in dead_links(tmp_path) if not link.endswith(tuple(others))]
    assert dead == []
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="maths/01_schedules.html"' in index and ".ipynb" not in index
    assert "01_toy_2d" in (tmp_path / "pages.js").read_text(encoding="utf-8")
    assert '<meta name="viewport"' in index


def test_a_dead_link_is_found(tmp_path):
    page = '<a href="gone.html">a</a><a href="#gone">b</a><h1 id="here"></h1><a href="#here">c</a>'
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert dead_links(tmp_path) == ["page.html: gone.html", "page.html: #gone"]


@pytest.mark.slow
def test_nothing_on_the_whole_site_is_dead(tmp_path):
    write_site(tmp_path, site_pages())
    assert dead_links(tmp_path) == []
