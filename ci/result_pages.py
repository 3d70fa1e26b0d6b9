"""Pages and tables of the committed results, made from their records."""

import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
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


def tuning_rows() -> list[list[str]]:
    """A row per tuning run: its settings, and what changed on the validation prompts."""
    text = (RESULTS / "headline" / "tuning.jsonl").read_text(encoding="utf-8")
    rows = []
    for run in map(json.loads, text.splitlines()):
        changes = [f"{run[name]:+.3f}" for name in TUNING_CHANGES]
        rows.append([run["arm"], f"{run['learning_rate']:g}", f"{run['clip']:g}", str(run["seed"])])
        rows[-1] += changes
    return rows


TUNING_CHANGES = ("shapes_pick", "shapes_utility", "shapes_early", "shapes_late", "shapes_dense")
HEADLINE_FILES = """| file | what it is |
|---|---|
| `01_headline.ipynb` | the executed notebook, of the pair of runs with seed 10 |
| `records.parquet` | all runs, a number a row: arm, seed, part, measure, value |
| `manifest.json` | commits, versions, hashes of weights and prompts, seconds |
| `pictures/` | test images of the first seed of each arm, one strip each |
| `step.yaml`, `chunk.yaml` | the settings of the two arms |
| `tuning.jsonl` | a tuning run a row |
| `summary.json` | what the README shows |"""


def headline_page() -> str:
    """The page of the committed headline runs: files, tuning."""
    manifest = read_json(RESULTS / "headline" / "manifest.json")
    hours = manifest["trial_seconds"]["sum"] / 3600
    header = ["arm", "learning rate", "clip", "seed", *(f"`{name}`" for name in TUNING_CHANGES)]
    parts = [
        "# Records of the headline experiment",
        "Written by `ci/readme.py` from the records in this folder. "
        f"{manifest['trials']} runs, {hours:.1f} hours of one core; made again by "
        "`chunk-grpo sweep data/sweeps/paper/confirmatory.yaml`. What follows from them stands in "
        "[the README](../../../README.md) and, claim by claim, in "
        "[the executed notebook of the claims](../paper/06_claims.ipynb).",
        HEADLINE_FILES,
        "## Tuning",
        "Learning rate and clip range of each arm were chosen by the mean change of the trained "
        "reward on 96 validation prompts (25 ODE steps), on seeds that are not reported: four "
        "settings on seed 0, the two best of each arm on seed 1. Everything else is as in "
        "`step.yaml` and `chunk.yaml`, which were frozen before the reported seeds were run.",
        markdown_table(header, tuning_rows()),
    ]
    return "\n\n".join(parts) + "\n"


def claims_table() -> str:
    """The paper's claims with their verdicts, from the record of the claims notebook."""
    file = RESULTS / "paper" / "claims.json"
    if not file.exists():
        return "No record of the claims is committed yet."
    record = read_json(file)
    header = ["", "claim of the paper", "measured here", "seeds", "verdict"]
    rows = [
        [str(c["claim"]), c["text"], c["measured"], str(c["seeds"]), f"**{c['verdict']}**"]
        for c in record["claims"]
    ]
    hours = sum(record["hours"].values())
    return "\n\n".join(
        [
            f"On the embedded model, with a learned preference as the reward; {hours:.1f} hours of "
            "one core in all. Differences are on held-out prompts, with 95 % intervals over seeds; "
            f"a difference inside ±{record['margin']} of the trained reward counts as none. "
            "[The executed notebook](data/results/paper/06_claims.ipynb) has the planned "
            "comparison, Holm's correction and everything else that was measured.",
            markdown_table(header, rows),
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
