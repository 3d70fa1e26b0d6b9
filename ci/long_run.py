"""Trains a tiny model for many iterations and watches memory, time, handles and disk from outside.

    python ci/long_run.py --iterations 2000 --out runs/long_run

Writes `samples.csv` (one row a second), `summary.json` with the verdicts and `long_run.png` into
--out; the exit status is 1 if anything grew. Growth is the difference of the medians over the last
and over the second fifth of the run: the first fifth is warm-up.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

LIMITS = {  # largest growth from the second to the last fifth of the run
    "memory_mb": 20.0,  # of resident memory
    "handles": 2.0,  # open files and sockets
    "threads": 2.0,
    "seconds_per_iteration": 0.25,  # relative: a quarter slower
    "disk_mb_without_rows": 2.0,  # checkpoints and pictures; the rows of the record grow by design
}


def child(folder: Path, iterations: int) -> None:
    """Train a random Flux pipeline of some ten thousand weights; runs in a process of its own."""
    import numpy as np

    from chunk_grpo_nb.models.tiny import tiny_pipeline
    from chunk_grpo_nb.rewards.registry import register_reward
    from chunk_grpo_nb.training.config import make_config
    from chunk_grpo_nb.training.trainer import train

    @register_reward("redness")
    def redness():
        return lambda images, prompts, metadata: [np.asarray(i)[..., 0].mean() for i in images]

    folder.mkdir(parents=True)
    tiny_pipeline("flux").save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("red circle\nblue square\ntwo circle\n")
    settings = {
        "model": str(folder / "model"),
        "train_prompts": str(folder / "prompts.txt"),
        "validation_prompts": str(folder / "prompts.txt"),
        "rewards": {"redness": 1.0},
        "prompts_per_iteration": 2,
        "group_size": 4,
        "num_steps": 6,
        "chunker": "fixed:2,3",
        "height": 16,
        "width": 16,
        "iterations": iterations,
        "lora_rank": 2,
        "ema_decay": 0.9,
        "kl_weight": 0.01,
        "validation_images": 3,
        "validate_every": 50,
        "checkpoint_every": 10,
        "device": "cpu",
    }
    train(make_config(settings), folder / "run")


def megabytes(files: list[Path]) -> float:
    """Size of those files that are still there."""
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # replaced while we looked
            continue
    return total / 1e6


def sample(process: psutil.Process, run: Path) -> dict:
    """One look at the process and at its run folder."""
    files = [path for path in run.rglob("*") if path.is_file()]
    timings = run / "timings.jsonl"
    done = timings.read_bytes().count(b"\n") if timings.exists() else 0
    return {
        "time": time.monotonic(),
        "iteration": done,
        "cpu_seconds": sum(process.cpu_times()[:2]),
        "memory_mb": process.memory_info().rss / 1e6,
        "handles": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": process.num_threads(),
        "disk_mb": megabytes(files),
        "disk_mb_without_rows": megabytes([f for f in files if f.suffix != ".jsonl"]),
    }


def watch(command: list[str], run: Path, log: Path, every: float) -> tuple[int, pd.DataFrame]:
    """Start the command, its output in `log`, and sample it until it ends: exit status, samples."""
    rows = []
    with open(log, "w", encoding="utf-8") as output:
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        process = psutil.Process(started.pid)
        while started.poll() is None:
            try:
                rows.append(sample(process, run))
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                pass  # it ended, or replaced a folder, between two looks
            time.sleep(every)
    return started.returncode, pd.DataFrame(rows)


def iteration_seconds(samples: pd.DataFrame) -> pd.DataFrame:
    """Processor seconds per iteration, between looks about a hundredth of the run apart.

    Processor time, so that other work on the machine does not count.
    """
    step = max(1, int(samples["iteration"].max()) // 100)
    seen = samples.groupby(samples["iteration"] // step).first()
    seconds = seen["cpu_seconds"].diff() / seen["iteration"].diff()
    return pd.DataFrame({"iteration": seen["iteration"], "seconds_per_iteration": seconds}).dropna()


def growth(iterations: pd.Series, values: pd.Series) -> tuple[float, float]:
    """Medians over the second and over the last fifth of the run."""
    last = iterations.max()
    early = values[(iterations > 0.2 * last) & (iterations <= 0.4 * last)]
    late = values[iterations > 0.8 * last]
    return float(early.median()), float(late.median())


def judge(samples: pd.DataFrame) -> dict:
    """Early and late median of everything watched, with whether the growth is within its limit."""
    samples = samples[samples["iteration"] > 0]
    speed = iteration_seconds(samples)
    verdicts = {}
    for name, limit in LIMITS.items():
        table = speed if name == "seconds_per_iteration" else samples
        early, late = growth(table["iteration"], table[name])
        change = late / early - 1 if name == "seconds_per_iteration" else late - early
        verdicts[name] = {
            "early": early,
            "late": late,
            "growth": change,
            "limit": limit,
            "flat": bool(change <= limit),
        }
    return verdicts


def draw(samples: pd.DataFrame, path: Path) -> None:
    """The picture of the run: one panel for each thing that must stay flat."""
    import matplotlib.pyplot as plt

    samples = samples[samples["iteration"] > 0]
    speed = iteration_seconds(samples)
    panels = [
        ("memory_mb", "resident memory (MB)", samples),
        ("seconds_per_iteration", "processor seconds per iteration", speed),
        ("handles", "open handles", samples),
        ("disk_mb_without_rows", "checkpoints and pictures (MB)", samples),
    ]
    fig, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    for ax, (name, label, table) in zip(axes.flat, panels, strict=True):
        ax.plot(table["iteration"], table[name], lw=1)
        ax.set(title=label, ylim=(0, 1.15 * table[name].max()))
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("iteration")
    fig.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/long_run"))
    parser.add_argument("--every", type=float, default=1.0, help="seconds between looks")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.out / "work"
    if options.child:
        child(work, options.iterations)
        return 0
    shutil.rmtree(work, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    words = ["--iterations", str(options.iterations), "--out", str(options.out), "--child"]
    command = [sys.executable, __file__, *words]
    log = options.out / "train.log"
    status, samples = watch(command, work / "run", log, options.every)
    samples.to_csv(options.out / "samples.csv", index=False, float_format="%.6g")
    done = int(samples["iteration"].max())
    report = {
        "iterations": done,
        "asked": options.iterations,
        "exit_status": status,
        "seconds": round(float(samples["time"].iloc[-1] - samples["time"].iloc[0]), 1),
        "median_look_seconds": statistics.median(samples["time"].diff().dropna()),
        "verdicts": judge(samples),
    }
    (options.out / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(samples, options.out / "long_run.png")
    print(json.dumps(report, indent=1))
    flat = all(verdict["flat"] for verdict in report["verdicts"].values())
    return int(status != 0 or not flat)


if __name__ == "__main__":
    sys.exit(main())
