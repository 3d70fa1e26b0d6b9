"""What a reader does with the widgets of a notebook in JupyterLab, and what must follow.

Each function gets Playwright's page and the folder that JupyterLab serves, and raises
AssertionError where a widget does not do what it should.
"""

import json
from pathlib import Path


def drag(page, slider, to: float) -> None:
    """Drag the handle of a slider to a place between 0, its left end, and 1, its right end."""
    slider.scroll_into_view_if_needed()
    track = slider.locator(".noUi-target").bounding_box()
    handle = slider.locator(".noUi-handle").bounding_box()
    middle = track["y"] + track["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(track["x"] + to * track["width"], middle, steps=8)
    page.mouse.up()


def slider(page, name: str):
    """The slider with a description, the first of those that are shown."""
    return page.locator(".widget-slider:visible", has_text=name).first


def choose(page, name: str, label: str) -> None:
    """Choose an entry of the dropdown with a description."""
    page.locator(".widget-dropdown", has_text=name).locator("select").select_option(label=label)


def picture_after(page, act) -> None:
    """Do something, and wait for the picture of the first widget to become another."""
    from playwright.sync_api import expect

    picture = page.locator(".jupyter-widgets.widget-image").first
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")
    act()
    expect(picture).not_to_have_attribute("src", before)


def use_ballot(page, folder: Path) -> None:
    """Vote twice by clicking and once by a key, take one back; the votes are on disk."""
    from playwright.sync_api import expect

    box = page.locator(".ballot").first
    box.scroll_into_view_if_needed()
    count = box.locator(".ballot-count")
    start = int(count.text_content().split()[0])
    for votes in (1, 2):
        box.locator("button[data-choice=left]").last.click()
        expect(count).to_have_text(f"{start + votes} of 40")
    box.press("ArrowRight")
    expect(count).to_have_text(f"{start + 3} of 40")
    box.locator("button[data-choice=undo]").click()
    expect(count).to_have_text(f"{start + 2} of 40")
    (file,) = folder.rglob("votes.jsonl")
    rows = [json.loads(line)["choice"] for line in file.read_text().splitlines()]
    assert rows == ["left", "left", "right", None], f"votes on disk: {rows}"


def use_explorer(page, folder: Path) -> None:
    """Choose another rule, then drag a slider: picture and words follow."""
    from playwright.sync_api import expect

    picture_after(page, lambda: choose(page, "rule", "uniform"))
    words = page.locator(".widget-html code", has_text="chunker: fixed:")
    expect(words).to_have_text("chunker: fixed:4,4,4,4")
    picture_after(page, lambda: drag(page, slider(page, "pieces"), 1.0))
    expect(words).to_have_text("chunker: fixed:2,2,2,2,2,2,2,2")


def use_viewer(page, folder: Path) -> None:
    """Drag the step, choose another image, let the steps play."""
    from playwright.sync_api import expect

    readout = slider(page, "step").locator(".widget-readout")
    picture_after(page, lambda: drag(page, slider(page, "step"), 0.6))
    expect(readout).to_have_text("9")
    picture_after(page, lambda: choose(page, "image", "2: a green triangle left of a red square"))
    picture_after(page, page.locator(".widget-play button").first.click)
    expect(readout).not_to_have_text("9")


def use_run_browser(page, folder: Path) -> None:
    """Mark one run of two, choose another measure, page through pictures, open a report."""
    from playwright.sync_api import expect

    runs = page.locator(".widget-select-multiple select")
    picture_after(page, lambda: runs.select_option(label="step"))
    picture_after(page, lambda: choose(page, "measure", "edge_density"))
    page.locator(".widget-button", has_text="report").click()
    frame = page.frame_locator("iframe[title=report]")
    expect(frame.locator("h1")).to_have_text("step")


USES = {
    "nbs/tutorials/03_your_taste.ipynb": use_ballot,
    "nbs/tutorials/04_chunking_by_hand.ipynb": use_explorer,
    "nbs/analysis/19_explorer.ipynb": use_explorer,
    "nbs/analysis/20_viewer.ipynb": use_viewer,
    "nbs/analysis/21_run_browser.ipynb": use_run_browser,
}
