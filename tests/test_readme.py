"""The README's snippets run, and its numbers come from records."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN, LOSS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)[
    :2
]  # what follows needs a GPU and downloads


def test_generated_parts_are_up_to_date():
    assert subprocess.run([sys.executable, ROOT / "ci" / "readme.py", "--check"]).returncode == 0


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert links and [x for x in links if not (ROOT / x).exists()] == []


def test_the_training_script_runs(tmp_path, monkeypatch):
    small = TRAIN.replace(
        "iterations=40",
        "iterations=1, prompts_per_iteration=2, group_size=2, num_steps=17, validation_images=2",
    )
    assert small != TRAIN
    monkeypatch.chdir(tmp_path)
    exec(small, {})
    assert (tmp_path / "runs" / "script" / "metrics.jsonl").exists()


def test_the_loss_in_a_loop_of_your_own_runs_without_heavy_libraries():
    block = "import sys\n"
    block += "sys.modules |= dict.fromkeys(('diffusers', 'transformers', 'accelerate'))\n"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            block + LOSS + "\nassert log_probs.grad is not None and log_probs.grad.abs().sum() > 0",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
