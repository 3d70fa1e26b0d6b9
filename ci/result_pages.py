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


MEANING = {
    "shapes_pick": "the preference model: trained",
    "shapes_utility": "gold: the annotator's utility, which the preference model stands for",
    "shapes_early": "gold: its early taste, hue and size",
    "shapes_late": "gold: its late taste, ink and outlines",
    "shapes_hue": "blueness of the ink where the prompt leaves the colour free",
    "shapes_size": "mean radius of the shapes asked for, pixels",
    "shapes_vivid": "depth of the ink",
    "shapes_crisp": "sharpness of the outlines",
    "shapes_dense": "share of the prompt's conditions that are met",
    "shapes_strict": "share of the pictures that meet all of them",
    "shapes_clip": "similarity by the embedded CLIP",
}


def seed_means(folder: Path):
    """Mean of every measure over test prompts and seeds: a table, measures by arms."""
    import pandas as pd

    rows = pd.read_parquet(folder / "records.parquet")
    rows = rows[(rows["part"] == "test") & rows["measure"].isin(MEANING)]
    means = rows.astype({"arm": str, "measure": str}).groupby(["measure", "arm"])["value"].mean()
    return means.unstack()


def headline_rows(record: dict) -> list[list[str]]:
    """Means of base, step and chunk over all seeds, and their differences, for every measure."""
    means = seed_means(RESULTS / "headline")
    rows = []
    for measure, meaning in MEANING.items():
        changes = (record["changes"][measure][pair]["over_seeds"] for pair in PAIRS)
        values = (f"{means.loc[measure, arm]:.3f}" for arm in ("base", "step", "chunk"))
        rows.append([f"`{measure}`", meaning, *values, *map(interval, changes)])
    return rows


def resolved(change: dict) -> str:
    """What a difference did, by its interval."""
    if change["low"] > 0:
        return "rises"
    return "falls" if change["high"] < 0 else "is not resolved"


def headline_words(record: dict) -> str:
    """The answers in sentences: the trained reward, what it stands for, and correctness."""
    changes = record["changes"]
    between = changes[record["reward"]][PAIRS[2]]["over_seeds"]
    lines = [
        f"- Between the arms, the trained reward {resolved(between)}: chunk − step "
        f"{interval(between)}."
    ]
    for measure, what in (
        (record["reward"], "the trained reward"),
        (record["gold"], "the utility that it stands for"),
        ("shapes_strict", "the share of pictures that keep their prompt"),
    ):
        words = " and ".join(
            f"{resolved(changes[measure][pair]['over_seeds'])} in the {pair.split()[0]} arm"
            for pair in PAIRS[:2]
        )
        lines.append(f"- Against the base model, {what} {words}.")
    return "\n".join(lines)


def hybrid_words(gold: str) -> str:
    """What the base model's last steps give back, in a sentence."""
    record = read_json(RESULTS / "paper" / "hybrid" / "summary.json")
    every_step = max(record["splits"])
    share = min(record["splits"], key=lambda n: abs(n / every_step - 0.6))  # the paper's 30 of 50
    changes = {
        r["first"]: interval({"mean": r["change"], **r})
        for r in record["changes"]
        if r["measure"] == gold
    }
    return (
        f"- Drawn with the trained model for the first {share} of {every_step} steps and with the "
        f"base model for the rest, the utility changes by {changes[share]}; with the trained model "
        f"throughout by {changes[every_step]} ({record['policies']} other trained models, interval "
        "over them; [hybrid inference](data/results/paper/hybrid/08_hybrid.ipynb))."
    )


def headline_results() -> str:
    """Table and pictures of the committed headline runs."""
    record = read_json(RESULTS / "headline" / "summary.json")
    seeds = record["changes"][record["reward"]][PAIRS[2]]["over_seeds"]["seeds"]
    header = ["measure", "what it is", "base", "step", "chunk", *PAIRS]
    return "\n\n".join(
        [
            f"The quickstart trains one pair of runs; here are {seeds:.0f} such pairs, the same "
            f"settings on {seeds:.0f} seeds:",
            f"{headline_words(record)}\n{hybrid_words(record['gold'])}",
            f"Means over {record['prompts']} held-out prompts, and differences with 95 % intervals "
            "over the seeds (Student's t, paired; not corrected for their number; the prompts are "
            "the same for all, so that the intervals do not speak about other prompts):",
            markdown_table(header, headline_rows(record)),
            "![Learning curves of both arms against the base model]"
            "(data/results/headline/learning.png)",
            "![Spread of the ratios and clipped shares, by step and by chunk]"
            "(data/results/headline/ratios.png)",
            "*Above*: how far ratios have moved from 1, for each step or chunk; *below*: the share "
            "that the clip range cuts. The executed notebook, its records, the tuning and the runs "
            "on all seeds are in [`data/results/headline`](data/results/headline).",
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
    arms = sorted({arm for commit in manifest["git_commits"].values() for arm in commit["arms"]})
    header = ["arm", "learning rate", "clip", "seed", *(f"`{name}`" for name in TUNING_CHANGES)]
    parts = [
        "# Records of the headline experiment",
        "Written by `ci/readme.py` from the records in this folder. "
        f"{manifest['trials']} runs, {hours:.1f} hours of one core: those arms of "
        "`data/sweeps/paper/confirmatory.yaml` that have been run, "
        f"{', '.join(arms)}; `chunk-grpo sweep` runs the file. What follows from them stands in "
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


def question_rows(record: dict) -> list[list[str]]:
    """A row per planned question: its answer in the trained reward."""
    rows = []
    for asked in record["questions"]:
        answer = ["", "", ""]
        if asked["seeds"]:
            answer = [interval(asked), f"{asked['seeds']:.0f}", f"{asked['p (Holm)']:.3f}"]
        pair = f"{asked['arm']} − {asked['against']}"
        rows.append([asked["question"], pair, *answer, f"**{asked['verdict']}**"])
    return rows


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
    arms = {q[side]: None for q in record["questions"] for side in ("arm", "against")}
    run = {q[side] for q in record["questions"] if q["seeds"] for side in ("arm", "against")}
    return "\n\n".join(
        [
            "On the embedded model, with a learned preference as the reward. So far "
            f"{len(run)} of the {len(arms)} planned arms have been run "
            f"({', '.join(sorted(run))}; {hours:.1f} hours of runs on one core each, some of it "
            "shared; 12 seeds are planned for each), and the experiments that train nothing. "
            "Differences are on held-out prompts, with 95 % intervals over seeds; "
            f"an interval wholly inside ±{record['margin']} of the trained reward would count as "
            "no difference. A *hint* is an interval that excludes zero and was not planned, or not "
            "corrected. [The executed notebook](data/results/paper/06_claims.ipynb) "
            "has the figures; what was found when, stands in a [log](data/results/findings.md).",
            markdown_table(header, rows),
            "What a chunking does, taken apart: the five questions that were written down before "
            "the runs, in the trained reward, with Holm's correction over all five.",
            markdown_table(
                ["question", "arms", "difference", "seeds", "p (Holm)", "answer"],
                question_rows(record),
            ),
            "![Runs of every arm, a point each, and the base model]"
            "(data/results/paper/shapes_pick.png)",
            "Hybrid inference: the trained model draws the first steps, the base model the rest "
            "([notebook](data/results/paper/hybrid/08_hybrid.ipynb)).",
            "![Change of each measure against the number of trained steps]"
            "(data/results/paper/hybrid/splits.png)",
        ]
    )


def ablation_summary() -> str:
    """The committed ablation in a sentence and a picture."""
    record = read_json(RESULTS / "ablation" / "verdicts.json")
    verdicts = [v for v in record["verdicts"] if v["measure"] == record["reward"]]
    found = [v for v in verdicts if v["verdict"] != "not resolved"]
    said = "; ".join(
        f"{v['arm']} − {v['against']} {v['difference']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]"
        for v in found
    )
    return "\n\n".join(
        [
            "With one use of every rollout and a wide clip range, where chunks act by weighting "
            f"alone, {len(record['gains'])} method variants on "
            f"{len(record['gains'][0]['seeds'])} seeds differ little: {len(found)} of "
            f"{len(verdicts)} planned comparisons in "
            f"`{record['reward']}` is resolved: {said} "
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
