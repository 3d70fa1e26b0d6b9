"""Installs DeepSpeed beside the environment and runs the tests that need it, on two processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = "deepspeed==0.19.8"
REQUIREMENTS = ("hjson", "ninja", "msgpack", "py-cpuinfo", "einops")  # of those, what we lack
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
TESTS = ("-m", "pytest", "-m", "slow", "tests/test_launch.py", "-k", "deepspeed")


def python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run this interpreter in the repository with further environment variables."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, env={**os.environ, **variables})


def main() -> int:
    """Install, test; pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--no-build-isolation", "--target", folder)
        python(*PIP, *options, DEEPSPEED, *REQUIREMENTS, DS_BUILD_OPS="0").check_returncode()
        beside = {"PYTHONPATH": folder, "DS_ACCELERATOR": "cpu"}
        python("-c", "import deepspeed", **beside).check_returncode()  # else its tests are skipped
        return python(*TESTS, **beside).returncode


if __name__ == "__main__":
    sys.exit(main())
