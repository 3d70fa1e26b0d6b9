"""Builds the wheel and installs it into a folder of its own: the data must travel with it."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import importlib.metadata
import pathlib
import chunk_grpo_nb

assert chunk_grpo_nb.__version__ == importlib.metadata.version("chunk_grpo_nb")
home = pathlib.Path(chunk_grpo_nb.__file__).parent
assert str(home).startswith({folder!r}), home
files = [path for path in home.rglob("*") if path.is_file()]
print("installed", chunk_grpo_nb.__version__, "with", len(files), "files")
there = {{path.relative_to(home).as_posix() for path in files}}
missing = sorted(set({wanted!r}) - there)
assert not missing, f"not in the wheel: {{missing}}"
"""
PIP = ("-m", "pip", "install", "--no-input", "-q", "--disable-pip-version-check", "--no-deps")


def wanted_files() -> list[str]:
    """What must be inside the installed package, apart from modules."""
    data = ROOT / "data"
    folders = (data / "shapes", data / "prompts")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return ["py.typed", *(f"data/{path.relative_to(data).as_posix()}" for path in files)]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *PIP, "--target", folder, str(ROOT)], check=True)
        probe = PROBE.format(folder=folder, wanted=wanted_files())
        command = [sys.executable, "-c", probe]
        return subprocess.run(command, cwd=folder, env={"PYTHONPATH": folder}).returncode


if __name__ == "__main__":
    sys.exit(main())
