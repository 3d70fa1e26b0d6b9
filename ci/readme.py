"""Write what README.md and the index take from records and notebooks.

python ci/readme.py          rewrite README.md and the map in nbs/index.ipynb
python ci/readme.py --check  exit 1 if either is out of date
"""

import json
import math
import sys
from pathlib import Path

from reading_order import index_map, readme_map, unlisted

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
README = ROOT / "README.md"
INDEX = ROOT / "nbs" / "index.ipynb"


def interval(change: dict) -> str:
    return f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"


def strict_row() -> tuple:
    """The share of images on which every condition holds, before and after, from the committed table of images."""
    import pandas as pd

    from chunk_grpo_nb.analysis.statistics import paired_difference

    table = pd.read_parquet(RESULTS / "main" / "evaluation.parquet")
    before, after = (table[table["model"] == name] for name in ("before", "after"))
    change = paired_difference(before, after, "shapes_strict")
    return (
        "`shapes_strict` (gold, all conditions at once)",
        f"{before['shapes_strict'].mean():.3f}",
        f"{after['shapes_strict'].mean():.3f}",
        interval(vars(change)),
        change.verdict,
    )


def main_results() -> str:
    """Table and pictures of the committed main run, from its summary."""
    file = RESULTS / "main" / "summary.json"
    if not file.exists():
        return "No run of the main experiment is committed yet."
    r = json.loads(file.read_text())
    rows = [
        ("reward", "before", "after", "change, 95 % interval over prompts", ""),
        (
            f"`{r['reward']}` (trained)",
            f"{r['before']:.3f}",
            f"{r['after']:.3f}",
            interval(r["change"]),
            r["change"]["verdict"],
        ),
        (
            f"`{r['gold']}` (gold verifier, never trained on)",
            f"{r['gold_before']:.3f}",
            f"{r['gold_after']:.3f}",
            interval(r["gold_change"]),
            r["gold_change"]["verdict"],
        ),
        strict_row(),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ("---",) * 5, *rows[1:]])
    invariance = r["invariance"]["flow"]
    return "\n\n".join(
        [
            f"What the quickstart shows (one run, seed 0, {r['prompts']} held-out prompts × {r['images']} images, paired by seed):",
            table,
            "![Before and after, same prompts and seeds](data/results/main/before_after.png)",
            f"The step explains {invariance['step_share']:.1%} of the variance of the dynamics (interval {invariance['interval'][0]:.1%} to {invariance['interval'][1]:.1%}); "
            f"the adaptive rule cut the {sum(r['chunk_sizes'])} trained steps into {r['chunk_sizes']}. "
            f"An iteration costs {r['speed']['ratio']:.2f} times the bare transformer calls it makes. "
            "The executed notebook is in [`data/results/main`](data/results/main).",
        ]
    )


def ablation_results() -> str:
    """Picture, table and verdicts of the committed ablation, from what its comparison notebook wrote."""
    file = RESULTS / "ablation" / "verdicts.json"
    if not file.exists():
        return "No ablation is committed yet."
    r, facts = (
        json.loads(file.read_text()),
        json.loads((RESULTS / "ablation" / "facts.json").read_text()),
    )
    seeds = r["gains"][0]["seeds"]
    rows = [
        (
            "arm",
            "network evaluations",
            f"`{r['reward']}` (trained)",
            f"`{r['gold']}` (gold)",
            f"`{r['strict']}` (gold, yes or no)",
            f"`{r['reward']}`, interval over seeds",
        )
    ]
    rows += [
        (
            g["arm"],
            f"{g['evaluations'] / 1000:.0f} k",
            *(interval(g[m]) for m in (r["reward"], r["gold"], r["strict"])),
            interval({"mean": g["over_seeds"]["difference"], **g["over_seeds"]}),
        )
        for g in r["gains"]
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ("---",) * 6, *rows[1:]])
    floor = next(n for n in r["noise_floor"]["rows"] if n["measure"] == r["reward"])
    verdicts = [v for v in r["verdicts"] if v["measure"] == r["reward"]]
    count = {
        name: sum(v[name] != "not resolved" for v in verdicts)
        for name in ("verdict", "all at once")
    }
    lines = [
        f"- {v['question'][0].upper() + v['question'][1:]} {v['arm']} − {v['against']}: {v['difference']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]: **{v['verdict']}**"
        for v in verdicts
    ]
    return "\n\n".join(
        [
            f"Does chunking help, and what about it? {len(r['gains'])} arms on the same {len(seeds)} seeds, each run at most {math.ceil(facts['cell_seconds']['largest'] / 60)} minutes on one core. "
            f"Two runs of `{r['noise_floor']['arm']}` that differ in their seed alone lie up to {floor['highest'] - floor['lowest']:.3f} apart ({floor['runs']} runs, standard deviation {floor['sd']:.4f}). "
            f"With one variance pooled over all arms, three seeds find a true difference of {floor['pooled, 3 seeds']:.3f} four times in five, eight seeds one of {floor['pooled, 8 seeds']:.3f}.",
            f"![The runs of all arms on seeds {', '.join(map(str, seeds))}, and their differences to step-level GRPO](data/results/ablation/comparison.png)",
            f"Change against the model before training. The first three intervals are over {r['gains'][0][r['reward']]['n']} test prompts and hold for these {len(seeds)} runs of an arm; the last is over the runs (Student's t):",
            table,
            f"Three runs are few: over all its {floor['runs']} seeds, `{r['noise_floor']['arm']}` changes by {interval(floor['change'])} in the trained reward.",
            f"The planned comparisons in the trained reward, paired by seed, 95 % intervals with the pooled variance ({count['verdict']} of {len(verdicts)} resolved one by one, {count['all at once']} all at once):",
            "\n".join(lines),
            "So at this budget nothing can be said for chunks against steps, either way."
            if not any(
                v["verdict"] != "not resolved" for v in verdicts if v["arm"].startswith("chunks")
            )
            else "",
            "Curves, kinds of prompt, images and the same verdicts in the gold rewards: [the executed comparison](../nbs/experiments/03_comparison.ipynb).",
        ]
    ).replace("\n\n\n\n", "\n\n")


def text_of(name: str) -> str:
    """A committed text of the results folder, or nothing."""
    file = RESULTS / name
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def filled(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of the part called `name`."""
    start = text.index("-->", text.index(f"<!-- {name}")) + len("-->")
    end = text.index(f"<!-- end of {name} -->")
    return f"{text[:start]}\n{content}\n{text[end:]}"


def rendered_readme() -> str:
    """README.md with every generated part made anew."""
    parts = {
        "results": main_results(),
        "ablation": ablation_results(),
        "support": text_of("support.md"),
        "map": readme_map(),
    }
    text = README.read_text(encoding="utf-8")
    for name, content in parts.items():
        text = filled(text, name, content)
    return text


def rendered_index() -> str:
    """The index notebook with its map made anew."""
    notebook = json.loads(INDEX.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "<!-- map:" in source:
            cell["source"] = filled(source, "map", f"\n{index_map()}\n").splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write both files, or check them."""
    if forgotten := unlisted():
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in forgotten)
        sys.exit(f"not in the reading order: {names}; add them to ci/reading_order.py")
    for file, text in ((README, rendered_readme()), (INDEX, rendered_index())):
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
        elif text != file.read_text(encoding="utf-8"):
            sys.exit(f"{file.name} is out of date: run python ci/readme.py")


if __name__ == "__main__":
    main()
