"""Repeats a reader's morning in JupyterLab: open notebooks in Chromium, run all cells, use widgets.

python ci/browser.py [--short] [--out FOLDER]

Fails on an error output, an error in the browser's console, or a dead widget; screenshots stay in
FOLDER. Without Chromium (Debian's package chromium) it says what it skipped. playwright is
installed into an environment of its own, .venv/browser, and downloads no browser.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHORT = ("nbs/index.ipynb", "nbs/tutorials/04_chunking_by_hand.ipynb")
LONG = (*SHORT, "nbs/tutorials/03_your_taste.ipynb")
SMALL = {"nbs/tutorials/03_your_taste.ipynb": {"votes": 40, "iterations": 1}}
SETTINGS = {"windowingMode": "none"}  # every cell is on the page, seen or not
MINUTES = 15  # for the cells of one notebook
HARMLESS = ("favicon", "/api/me", "lsp", "net::ERR_ABORTED", "workspaces")  # of JupyterLab itself

RUN_ALL = """async () => {
  const app = window.jupyterapp, panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await app.commands.execute("notebook:run-all-cells");
  return panel.content.model.toJSON().cells;
}"""
OPENED = """(path) => {
  const panel = window.jupyterapp?.shell.currentWidget;
  return panel?.context?.path === path && panel.context.isReady;
}"""


def playwright_python() -> Path:
    """The interpreter of the environment that holds playwright; made where it is missing."""
    folder = ROOT / ".venv" / "browser"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "playwright>=1.50"], check=True)
    return python


def with_parameters(path: Path, values: dict) -> None:
    """Put values into the parameters cell of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    lines = "".join(cell["source"]).rstrip("\n").split("\n")
    cell["source"] = "\n".join([*lines, *(f"{name} = {value!r}" for name, value in values.items())])
    path.write_text(json.dumps(notebook), encoding="utf-8")


def copied(folder: Path) -> Path:
    """A copy of what the notebooks need, so that running them changes nothing here."""
    for name in ("nbs", "data", "chunk_grpo_nb"):
        shutil.copytree(ROOT / name, folder / name)
    for name, values in SMALL.items():
        with_parameters(folder / name, values)
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps(SETTINGS))
    return folder


@contextmanager
def jupyterlab(folder: Path, jupyter: str):
    """JupyterLab on a free port, serving `folder`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.token="]
    options += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    options += ["--LabApp.news_url=", "--ServerApp.disable_check_xsrf=True"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    with open(folder / "jupyterlab.log", "w") as log:
        command = [jupyter, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, folder / "jupyterlab.log")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers."""
    for _ in range(240):
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended:\n{log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no answer from JupyterLab:\n{log.read_text()[-2000:]}")


def error_outputs(cells: list[dict]) -> list[str]:
    """Errors among the outputs of a notebook's cells."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    errors = [output for output in outputs if output["output_type"] == "error"]
    return [f"error output {error['ename']}: {error['evalue'][:200]}" for error in errors]


def use_ballot(page, folder: Path) -> list[str]:
    """Vote twice by clicking and once by a key, take one back; the votes are on disk."""
    box = page.locator(".ballot").first
    box.scroll_into_view_if_needed()
    before = box.locator(".ballot-count").text_content()
    for _ in range(2):
        box.locator("button[data-choice=left]").last.click()
        page.wait_for_timeout(700)
    box.press("ArrowRight")
    page.wait_for_timeout(700)
    voted = box.locator(".ballot-count").text_content()
    box.locator("button[data-choice=undo]").click()
    page.wait_for_timeout(700)
    undone = box.locator(".ballot-count").text_content()
    counts = [int(text.split()[0]) for text in (before, voted, undone)]
    if counts != [counts[0], counts[0] + 3, counts[0] + 2]:
        return [f"the ballot counted {counts}"]
    files = list(folder.rglob("votes.jsonl"))
    rows = [json.loads(line)["choice"] for line in files[0].read_text().splitlines()]
    return [] if rows == ["left", "left", "right", None] else [f"votes on disk: {rows}"]


def use_explorer(page, folder: Path) -> list[str]:
    """Choose another rule and move a slider: picture and words follow."""
    picture = page.locator(".jupyter-widgets.widget-image, img.widget-image").first
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")
    rule = page.locator(".widget-dropdown select").nth(1)
    rule.select_option(label="uniform")
    page.wait_for_timeout(2500)
    words = page.locator("code", has_text="chunker: fixed:4,4,4,4")
    found = [] if words.count() else ["the explorer's words did not follow the rule"]
    if picture.get_attribute("src") == before:
        found.append("the explorer's picture did not change")
    return found


USES = {
    "nbs/tutorials/03_your_taste.ipynb": use_ballot,
    "nbs/tutorials/04_chunking_by_hand.ipynb": use_explorer,
}


def check(page, address: str, name: str, folder: Path, out: Path) -> list[str]:
    """Open a notebook, run all of its cells, use its widgets; what went wrong."""
    console: list[str] = []
    page.on("console", lambda m: console.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.goto(f"{address}/lab/tree/{name}?reset", wait_until="load")
    page.wait_for_function(OPENED, arg=name, timeout=120_000)
    page.screenshot(path=out / f"{Path(name).stem}_opened.png")
    page.set_default_timeout(MINUTES * 60_000)
    found = error_outputs(page.evaluate(RUN_ALL))
    page.set_default_timeout(30_000)
    page.wait_for_timeout(2000)
    dead = page.locator("text=/Error (displaying|creating) widget|Loading widget/")
    found += ["a dead widget"] * dead.count()
    if not found and name in USES:
        found += USES[name](page, folder)
    page.screenshot(path=out / f"{Path(name).stem}_run.png")
    serious = [text for text in console if not any(word in text for word in HARMLESS)]
    return found + [f"console: {text[:300]}" for text in serious]


def drive(names: tuple[str, ...], out: Path, jupyter: str) -> int:
    """Check the notebooks one after another; 1 if anything went wrong."""
    from playwright.sync_api import sync_playwright

    executable = next(path for path in map(shutil.which, BROWSERS) if path)
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder = copied(Path(place))
        with jupyterlab(folder, jupyter) as address:
            options = {"executable_path": executable, "args": ["--no-sandbox"]}
            browser = playwright.chromium.launch(**options)
            for name in names:
                page = browser.new_page(viewport={"width": 1300, "height": 1000})
                start = time.monotonic()
                found = check(page, address, name, folder, out)
                page.close()
                failed += bool(found)
                verdict = "FAILED" if found else "passed"
                print(f"{verdict} {time.monotonic() - start:6.1f} s  {name}", *found, sep="\n    ")
            browser.close()
    print(f"screenshots: {out}")
    return int(failed > 0)


def main() -> int:
    """Find what is needed, or say what is skipped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="without the notebook that trains")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "browser")
    parser.add_argument("--jupyter", help="the Python that has JupyterLab; default: this one")
    arguments = parser.parse_args()
    if not any(map(shutil.which, BROWSERS)):
        print("skipped: no Chromium (Debian: apt install chromium)")
        return 0
    if arguments.jupyter:
        return drive(SHORT if arguments.short else LONG, arguments.out, arguments.jupyter)
    if arguments.short and not (ROOT / ".venv" / "browser").exists():
        print("skipped: no playwright; bash ci/full browser installs it")
        return 0
    command = [playwright_python(), __file__, "--jupyter", sys.executable, "--out", arguments.out]
    return subprocess.run([*command, *["--short"] * arguments.short]).returncode


if __name__ == "__main__":
    sys.exit(main())
