"""Write the parts of README.md that come from records: results of the main experiment, and the support table.

    python ci/readme.py          rewrite README.md
    python ci/readme.py --check  exit 1 if it is out of date
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"


def interval(change: dict) -> str:
    return f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"


def strict_row() -> tuple:
    """The share of images on which every condition holds, before and after, from the committed table of images."""
    import pandas as pd

    from chunk_grpo_nb.evaluation import paired_difference
    table = pd.read_parquet(RESULTS / "main" / "evaluation.parquet")
    before, after = (table[table["model"] == name] for name in ("before", "after"))
    change = paired_difference(before, after, "shapes_strict")
    return "`shapes_strict` (gold, all conditions at once)", f"{before['shapes_strict'].mean():.3f}", f"{after['shapes_strict'].mean():.3f}", interval(vars(change)), change.verdict


def main_results() -> str:
    """Table and pictures of the committed main run, from its summary."""
    file = RESULTS / "main" / "summary.json"
    if not file.exists(): return "No run of the main experiment is committed yet."
    r = json.loads(file.read_text())
    rows = [("reward", "before", "after", "change, 95 % interval over prompts", ""),
            (f"`{r['reward']}` (trained)", f"{r['before']:.3f}", f"{r['after']:.3f}", interval(r["change"]), r["change"]["verdict"]),
            (f"`{r['gold']}` (gold verifier, never trained on)", f"{r['gold_before']:.3f}", f"{r['gold_after']:.3f}", interval(r["gold_change"]), r["gold_change"]["verdict"]),
            strict_row()]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ("---",) * 5, *rows[1:]])
    invariance = r["invariance"]["flow"]
    return "\n\n".join([
        f"What the quickstart shows (one run, seed 0, {r['prompts']} held-out prompts × {r['images']} images, paired by seed):", table,
        "![Before and after, same prompts and seeds](data/results/main/before_after.png)",
        f"The step explains {invariance['step_share']:.1%} of the variance of the dynamics (interval {invariance['interval'][0]:.1%} to {invariance['interval'][1]:.1%}); "
        f"the adaptive rule cut the {sum(r['chunk_sizes'])} trained steps into {r['chunk_sizes']}. "
        f"An iteration costs {r['speed']['ratio']:.2f} times the bare transformer calls it makes. "
        "The executed notebook is in [`data/results/main`](data/results/main)."])


def text_of(name: str) -> str:
    file = RESULTS / name
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def rendered() -> str:
    """README.md with every generated part made anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = {"results": main_results(), "support": text_of("support.md")}
    for name, content in parts.items():
        start = text.index("-->", text.index(f"<!-- {name}")) + 3
        end = text.index(f"<!-- end of {name} -->")
        text = text[:start] + "\n" + content + "\n" * bool(content) + text[end:]
    return text


if __name__ == "__main__":
    new, file = rendered(), ROOT / "README.md"
    if "--check" in sys.argv:
        if new != file.read_text(encoding="utf-8"): sys.exit("README.md is out of date: run python ci/readme.py")
    else: file.write_text(new, encoding="utf-8")
