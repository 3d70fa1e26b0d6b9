"""Repeats a reader's morning in JupyterLab: open notebooks in Chromium, run all cells, use widgets.

python ci/browser.py [--short] [--out FOLDER] [NOTEBOOK ...]

Fails on an error output, a cell that did not run, an error in the browser's console, a widget that
is dead, cut off, or used by no function of browser_uses.py. Screenshots stay in FOLDER, default
runs/browser. Needs Chromium (Debian: apt install chromium); Playwright drives it, and is installed
beside the environment, which is no dependency of the package. What is missing is said and skipped;
--short installs nothing.
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

import yaml
from browser_uses import USES

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRIVER = "playwright==1.65.2"
BESIDE = Path(sys.prefix) / "browser"  # where the driver lies
SHORT = ("nbs/analysis/19_explorer.ipynb",)
WIDGETS = ("nbs/analysis/10_live.ipynb", *SHORT, "nbs/analysis/2[01]_*.ipynb")
LONG = ("nbs/index.ipynb", "nbs/tutorials/*.ipynb", *WIDGETS)
MINUTES = 15  # for the cells of one notebook
WIDTH, HEIGHT, TALLEST = 1280, 900, 12_000  # of the window; of a screenshot
SETTINGS = {  # of JupyterLab: every cell is on the page, and no question about news covers it
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
INTERACTIVE = ".widget-slider, .widget-dropdown, .widget-select, .widget-button, .ballot"
OPENED = """(path) => {
  const panel = window.jupyterapp?.shell.currentWidget;
  return panel?.context?.path === path && panel.context.isReady;
}"""
RUN_ALL = """async () => {
  const app = window.jupyterapp, panel = app.shell.currentWidget;
  await panel.sessionContext.ready;
  app.commands.execute("notebook:run-all-cells").then(() => { window.ranAll = true; });
}"""
CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"
BOXES = ".jp-NotebookPanel-notebook, .jp-NotebookPanel-notebook .jp-WindowedPanel-outer"
TALL = f"""() => Math.max(...[...document.querySelectorAll("{BOXES}")].map((node) => {{
  node.scrollTop = 0;
  return node.scrollHeight;
}}))"""
DRAWN = """() => ![...document.querySelectorAll(".jp-OutputArea-output")]
  .some((output) => output.textContent.includes("Loading widget"))"""
DEAD = """() => [...document.querySelectorAll('[data-mime-type*="widget-view"]')]
  .filter((output) => !output.querySelector(".jupyter-widgets")).map((o) => o.textContent)"""
CUT_OFF = """() => [...document.querySelectorAll(".jp-OutputArea-output .jupyter-widgets")]
  .filter((node) => {
    const right = node.getBoundingClientRect().right;
    for (let box = node.parentElement; box; box = box.parentElement) {
      const edge = box.getBoundingClientRect().right;
      const hides = getComputedStyle(box).overflowX !== "visible";
      if (hides && node.offsetWidth && right > edge + 1) return true;
      if (box.matches(".jp-OutputArea-output")) return false;
    }
  }).map((node) => node.className.replace("jupyter-widgets ", ""))"""


def with_parameters(path: Path, values: dict) -> None:
    """Put a cell with values below the parameters cell of a notebook, as papermill does."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    tags = [cell["metadata"].get("tags", []) for cell in notebook["cells"]]
    place = next(i for i, names in enumerate(tags) if "parameters" in names) + 1
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = {"cell_type": "code", "id": "small", "metadata": {}, "execution_count": None}
    notebook["cells"].insert(place, cell | {"outputs": [], "source": source})
    path.write_text(json.dumps(notebook), encoding="utf-8")


def copied(folder: Path) -> Path:
    """A copy of what the notebooks need, small as in ci/smoke.yaml; nothing changes here."""
    for name in ("nbs", "data", "chunk_grpo_nb"):
        shutil.copytree(ROOT / name, folder / name)
    small = yaml.safe_load((ROOT / "ci" / "smoke.yaml").read_text(encoding="utf-8"))
    for name, values in small.items():
        if values and name.startswith("tutorials/"):
            with_parameters(folder / "nbs" / name, values)
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return folder


@contextmanager
def jupyterlab(folder: Path):
    """JupyterLab on a free port, serving `folder`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    options += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    options += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    log = folder / "jupyterlab.log"
    command = [sys.executable, "-m", "jupyterlab", *options]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers; RuntimeError with its log where it ends, or takes two minutes."""
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


def end_kernels(address: str) -> None:
    """End every kernel of the server; no page looks on."""
    with urllib.request.urlopen(f"{address}/api/sessions", timeout=30) as answer:
        sessions = json.load(answer)
    for session in sessions:
        request = urllib.request.Request(f"{address}/api/sessions/{session['id']}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


def wrong_cells(cells: list[dict]) -> list[str]:
    """Code cells that did not run, and errors among the outputs."""
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"])]
    left = sum(cell["execution_count"] is None for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    errors = [output for output in outputs if output["output_type"] == "error"]
    found = [f"error output {error['ename']}: {error['evalue'][:200]}" for error in errors]
    return found + [f"{left} of {len(code)} cells did not run"] * bool(left)


def wrong_widgets(page, name: str, folder: Path) -> list[str]:
    """Widgets that are dead, cut off, or not used; and what went wrong when they were used."""
    from playwright.sync_api import Error

    page.wait_for_function(DRAWN, timeout=30_000)
    found = [f"a dead widget: {text[:200]}" for text in page.evaluate(DEAD)]
    if page.locator(INTERACTIVE).count() and name not in USES:
        found.append("a widget that no function of ci/browser_uses.py uses")
    if not found and name in USES:
        try:
            USES[name](page, folder)
        except (AssertionError, Error) as error:
            found.append(f"{USES[name].__name__}: {error}")
    return found + [f"cut off: {kind}" for kind in page.evaluate(CUT_OFF)]


def check(page, address: str, name: str, folder: Path, out: Path) -> list[str]:
    """Open a notebook, run all of its cells, use its widgets; what went wrong."""
    console: list[str] = []

    def remember(message) -> None:
        own = message.location.get("url", "").startswith(address)  # not a picture of another host
        if message.type == "error" and own:
            console.append(f"{message.text[:300]} ({message.location['url']})")

    page.on("console", remember)
    page.on("pageerror", lambda error: console.append(str(error)[:300]))
    page.goto(f"{address}/lab/tree/{name}?reset", wait_until="load")
    page.wait_for_function(OPENED, arg=name, timeout=120_000)
    page.locator(".jp-MarkdownCell h1").first.wait_for(timeout=120_000)
    page.screenshot(path=out / f"{Path(name).stem}_opened.png")
    page.evaluate(RUN_ALL)
    page.wait_for_function("() => window.ranAll", timeout=MINUTES * 60_000)
    found = wrong_cells(page.evaluate(CELLS))
    found += wrong_widgets(page, name, folder)
    page.screenshot(path=out / f"{Path(name).stem}_used.png")
    height = min(page.evaluate(TALL) + 150, TALLEST)
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.screenshot(path=out / f"{Path(name).stem}_run.png")
    return found + [f"console: {text}" for text in console]


def drive(patterns: list[str], out: Path) -> int:
    """Check the notebooks one after another; 1 if anything went wrong."""
    from playwright.sync_api import Error, expect, sync_playwright

    expect.set_options(timeout=30_000)
    executable = next(path for path in map(shutil.which, BROWSERS) if path)
    out.mkdir(parents=True, exist_ok=True)
    names = [p.relative_to(ROOT).as_posix() for word in patterns for p in sorted(ROOT.glob(word))]
    failed = 0
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder = copied(Path(place))
        with jupyterlab(folder) as address:
            options = {"executable_path": executable, "args": ["--no-sandbox"]}
            browser = playwright.chromium.launch(**options)
            for name in names:
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                start = time.monotonic()
                try:
                    found = check(page, address, name, folder, out)
                except Error as error:
                    found = [f"{type(error).__name__}: {error}"]
                page.close()
                end_kernels(address)
                failed += bool(found)
                verdict = "FAILED" if found else "passed"
                print(f"{verdict} {time.monotonic() - start:6.1f} s  {name}", *found, sep="\n    ")
            browser.close()
    print(f"screenshots: {out}")
    return int(failed > 0)


def install() -> None:
    """Install the driver beside the environment, without a browser."""
    options = ("--quiet", "--disable-pip-version-check", "--target", BESIDE)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, DRIVER], check=True)


def main() -> int:
    """Find what is needed, or say what is skipped."""
    parser = argparse.ArgumentParser(description="Drive JupyterLab by Chromium.")
    parser.add_argument("notebooks", nargs="*", help="default: index, tutorials, widgets")
    parser.add_argument("--short", action="store_true", help="one notebook with one widget")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "browser")
    arguments = parser.parse_args()
    if not any(map(shutil.which, BROWSERS)):
        print("skipped: no notebook was opened in a browser; there is no Chromium")
        print("(Debian: apt install chromium; then bash ci/full browser)")
        return 0
    if not (BESIDE / "playwright").exists():
        if arguments.short:
            print("skipped: no notebook was opened in a browser; bash ci/full browser installs")
            print(f"what drives it, {DRIVER}")
            return 0
        install()
    sys.path.append(str(BESIDE))
    usual = SHORT if arguments.short else LONG
    return drive(arguments.notebooks or list(usual), arguments.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
