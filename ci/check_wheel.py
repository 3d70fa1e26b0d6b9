"""Builds the wheel and installs it into an environment of its own: `pip install .` works, and the data travel with it."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import chunk_grpo_nb, importlib.metadata, pathlib
assert chunk_grpo_nb.__version__ == importlib.metadata.version("chunk_grpo_nb")
home = pathlib.Path(chunk_grpo_nb.__file__).parent
assert str(home).startswith({folder!r}), home
print("installed", chunk_grpo_nb.__version__, "with", sum(1 for p in home.rglob("*") if p.is_file()), "files")
data = {{p.relative_to({data!r}).as_posix() for d in ("shapes", "prompts") for p in pathlib.Path({data!r}, d).rglob("*") if p.is_file()}}
missing = [name for name in sorted(data) if not (home / "data" / name).is_file()]
assert not missing, f"not in the wheel: {{missing}}"
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-input",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            folder,
        ]
        subprocess.run([*pip, str(ROOT)], check=True)
        probe = PROBE.format(folder=folder, data=str(ROOT / "data"))
        return subprocess.run(
            [sys.executable, "-c", probe], cwd=folder, env={"PYTHONPATH": folder}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
