"""Installs DeepSpeed beside the environment, not into it, and runs the tests that need it, on two gloo processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "deepspeed==0.19.8",
    "hjson",
    "ninja",
    "msgpack",
    "py-cpuinfo",
    "einops",
)  # what of its requirements the environment lacks


def main() -> int:
    """Install, test; pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            folder,
            *PACKAGES,
        ]
        subprocess.run(
            [sys.executable, *words], check=True, env={**os.environ, "DS_BUILD_OPS": "0"}
        )
        env = {**os.environ, "PYTHONPATH": folder, "DS_ACCELERATOR": "cpu"}
        subprocess.run(
            [sys.executable, "-c", "import deepspeed"], check=True, env=env
        )  # else its tests would only be skipped
        tests = ["-m", "pytest", "-m", "slow", "tests/test_launch.py", "-k", "deepspeed"]
        return subprocess.run([sys.executable, *tests], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
