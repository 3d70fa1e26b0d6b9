"""Write what README.md, the index and the result pages take from records and notebooks.

python ci/readme.py          rewrite README.md, nbs/index.ipynb and data/results/ablation/README.md
python ci/readme.py --check  exit 1 if one of them is out of date
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
ABLATION_PAGE = RESULTS / "ablation" / "README.md"
PAIRS = ("step − base", "chunk − base", "chunk − step")


def read_json(path: Path) -> dict:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def interval(change: dict | None) -> str:
    """`+0.123 [+0.100, +0.146]`; a dash where there is none."""
    if change is None:
        return "–"
    return f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def headline_rows(record: dict) -> list[list[str]]:
    """Base, step and chunk, and both intervals of their difference, for every measure."""
    rows = []
    for measure, pairs in record["changes"].items():
        step, chunk, between = (pairs[pair] for pair in PAIRS)
        role = {record["reward"]: " (trained)", record["gold"]: " (gold)"}.get(measure, "")
        values = [step["this_pair"]["before"], step["this_pair"]["after"]]
        values.append(chunk["this_pair"]["after"])
        changes = [pair["over_seeds"] or pair["this_pair"] for pair in (step, chunk, between)]
        rows.append([f"`{measure}`{role}", *(f"{v:.3f}" for v in values), *map(interval, changes)])
    return rows


def headline_words(record: dict) -> str:
    """Which measures each arm moved, by the intervals over seeds where there are some."""
    parts = []
    for pair in PAIRS:
        moved = {"rise": [], "fall": []}
        for measure, pairs in record["changes"].items():
            change = pairs[pair]["over_seeds"] or pairs[pair]["this_pair"]
            if change["low"] > 0:
                moved["rise"].append(f"`{measure}`")
            if change["high"] < 0:
                moved["fall"].append(f"`{measure}`")
        words = [f"{', '.join(names) or 'none'} {word}" for word, names in moved.items()]
        parts.append(f"- {pair}: {'; '.join(words)}")
    return "\n".join(["Resolved, by those intervals:", "", *parts])


def headline_results() -> str:
    """Table and pictures of the committed headline run, from its summary."""
    file = RESULTS / "headline" / "summary.json"
    if not file.exists():
        return "No run of the headline experiment is committed yet."
    record = read_json(file)
    over_seeds = record["changes"][record["reward"]][PAIRS[2]]["over_seeds"]
    if over_seeds is None:
        over = "over prompts, of this pair of runs"
    else:
        over = f"over {over_seeds['seeds']:.0f} seeds"
    header = ["measure", "base", "step", "chunk", *PAIRS]
    return "\n\n".join(
        [
            f"What the quickstart shows: one pair of runs, {record['prompts']} held-out prompts × "
            f"{record['images']} images; differences with 95 % intervals {over}.",
            markdown_table(header, headline_rows(record)),
            headline_words(record),
            "![Learning curves of both arms against the base model]"
            "(data/results/headline/learning.png)",
            "![Spread of the ratios and clipped shares, by step and by chunk]"
            "(data/results/headline/ratios.png)",
            "The executed notebook, its records, the tuning and the runs on all seeds are in "
            "[`data/results/headline`](data/results/headline).",
        ]
    )


def ablation_summary() -> str:
    """The committed ablation in a sentence and a picture."""
    record = read_json(RESULTS / "ablation" / "verdicts.json")
    verdicts = [v for v in record["verdicts"] if v["measure"] == record["reward"]]
    resolved = [v for v in verdicts if v["verdict"] != "not resolved"]
    chunks = [v for v in resolved if v["arm"].startswith("chunks")]
    said = "none of them is about chunks" if not chunks else f"{len(chunks)} of them about chunks"
    return "\n\n".join(
        [
            "With one use of every rollout and a wide clip range, where chunks act by weighting "
            f"alone, {len(record['gains'])} method variants on "
            f"{len(record['gains'][0]['seeds'])} seeds differ little: {len(resolved)} of "
            f"{len(verdicts)} planned comparisons in "
            f"`{record['reward']}` is resolved, and {said} "
            "([tables and verdicts](data/results/ablation/README.md)).",
            "![The runs of all variants, and their differences to step-level GRPO]"
            "(data/results/ablation/comparison.png)",
        ]
    )


def gain_rows(record: dict) -> list[list[str]]:
    """A row per method variant of the ablation: cost, gains over prompts, gain over seeds."""
    measures = (record["reward"], record["gold"], record["strict"])
    rows = []
    for gain in record["gains"]:
        over_seeds = gain["over_seeds"]
        seeds = interval({"mean": over_seeds["difference"], **over_seeds})
        cost = f"{gain['evaluations'] / 1000:.0f} k"
        rows.append([gain["arm"], cost, *(interval(gain[m]) for m in measures), seeds])
    return rows


def ablation_intro(record: dict, manifest: dict) -> str:
    """How much was run, and how large an effect it can show."""
    floor = next(n for n in record["noise_floor"]["rows"] if n["measure"] == record["reward"])
    seeds = record["gains"][0]["seeds"]
    minutes = math.ceil(manifest["trial_seconds"]["largest"] / 60)
    return (
        f"Does chunking help, and what about it? {len(record['gains'])} method variants on the "
        f"same {len(seeds)} seeds, each run at most {minutes} minutes on one core. Two runs of "
        f"`{record['noise_floor']['arm']}` that differ in their seed alone lie up to "
        f"{floor['highest'] - floor['lowest']:.3f} apart ({floor['runs']} runs, standard deviation "
        f"{floor['sd']:.4f}). With one variance pooled over all variants, three seeds find a true "
        f"difference of {floor['pooled, 3 seeds']:.3f} four times in five, eight seeds one of "
        f"{floor['pooled, 8 seeds']:.3f}. Over all its {floor['runs']} seeds, "
        f"`{record['noise_floor']['arm']}` changes by {interval(floor['change'])}."
    )


def ablation_page() -> str:
    """The page of the committed ablation: what was run, gains, verdicts."""
    record = read_json(RESULTS / "ablation" / "verdicts.json")
    manifest = read_json(RESULTS / "ablation" / "manifest.json")
    reward, gold, strict = (f"`{record[k]}`" for k in ("reward", "gold", "strict"))
    header = ["variant", "network evaluations", f"{reward} (trained)", f"{gold} (gold)"]
    header += [f"{strict} (gold, yes or no)", f"{reward}, interval over seeds"]
    verdicts = [v for v in record["verdicts"] if v["measure"] == record["reward"]]
    lines = [
        f"- {v['question'][0].upper()}{v['question'][1:]} {v['arm']} − {v['against']}: "
        f"{v['difference']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]: **{v['verdict']}**"
        for v in verdicts
    ]
    resolved, together = (
        sum(v[name] != "not resolved" for v in verdicts) for name in ("verdict", "all at once")
    )
    parts = [
        "# The first ablation",
        "Written by `ci/readme.py` from the records in this folder; the executed notebook is "
        "[03_comparison.ipynb](03_comparison.ipynb).",
        ablation_intro(record, manifest),
        "![The runs of all variants, and their differences to step-level GRPO](comparison.png)",
        f"Change against the model before training. The first three intervals are over "
        f"{record['gains'][0][record['reward']]['n']} test prompts and hold for these runs; "
        "the last is over the runs (Student's t):",
        markdown_table(header, gain_rows(record)),
        "The planned comparisons in the trained reward, paired by seed, 95 % intervals with the "
        f"pooled variance ({resolved} of {len(verdicts)} resolved one by one, {together} at once):",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


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
        "results": headline_results(),
        "ablation": ablation_summary(),
        "support": text_of("support.md"),
        "map": readme_map(),
    }
    text = README.read_text(encoding="utf-8")
    for name, content in parts.items():
        text = filled(text, name, content)
    return text


def rendered_index() -> str:
    """The index notebook with its map made anew."""
    notebook = read_json(INDEX)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "<!-- map:" in source:
            cell["source"] = filled(source, "map", f"\n{index_map()}\n").splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the files, or check them."""
    if forgotten := unlisted():
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in forgotten)
        sys.exit(f"not in the reading order: {names}; add them to ci/reading_order.py")
    texts = {
        README: rendered_readme(),
        INDEX: rendered_index(),
        ABLATION_PAGE: ablation_page(),
    }
    for file, text in texts.items():
        current = file.read_text(encoding="utf-8") if file.exists() else None
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
        elif text != current:
            sys.exit(f"{file.relative_to(ROOT)} is out of date: run python ci/readme.py")


if __name__ == "__main__":
    main()
