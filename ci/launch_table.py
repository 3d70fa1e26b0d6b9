"""Plan the memory of the parameter files in data/launch; the README's table of the plans.

python ci/launch_table.py                plan every file, write data/launch/plans.json
python ci/launch_table.py NAME [NAME ..] plan these alone, keep the others (a minute or more each)
"""

import json
import sys

from result_pages import ROOT, markdown_table, read_json

LAUNCH = ROOT / "data" / "launch"
RECORD = LAUNCH / "plans.json"
FLUX = "black-forest-labs/FLUX.1-dev"
SANA = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
RUNS = {  # parameter file -> arguments of the planner, and a shape where the model's name has none
    "flux_dev_paper": {"gpu": "80GB", "processes": 8, "sharded": True},
    "flux_dev_lora_80gb": {"gpu": "80GB"},
    "flux_dev_lora_48gb": {"gpu": "48GB"},
    "flux_dev_lora_24gb": {"gpu": "24GB", "bits": 4, "shape": FLUX},
    "flux2_klein_lora_24gb": {"gpu": "24GB"},
    "qwen_image_lora_80gb": {"gpu": "80GB"},
    "z_image_lora_48gb": {"gpu": "48GB"},
    "sd35_medium_lora_24gb": {"gpu": "24GB"},
    "sana_lora_24gb": {"gpu": "24GB", "shape": SANA},
}

DECIDING = (  # settings that decide memory
    "height",
    "width",
    "prompts_per_iteration",
    "group_size",
    "num_steps",
    "fraction",
    "updates_per_iteration",
    "rollout_batch",
    "micro_batch",
    "validation_images",
    "lora_rank",
    "dtype",
    "mixed_precision",
    "gradient_checkpointing",
    "offload_text",
    "vae_tiling",
    "store_on",
    "optimizer",
    "ema_decay",
    "kl_weight",
)


def trains(policy, bits: int | None) -> str:
    """What is trained, and what lies under it."""
    if policy.lora_rank:
        under = f"{bits}-bit weights" if bits else "bf16"
        return f"LoRA of rank {policy.lora_rank} on {under}"
    return "all weights: float32 masters, bf16 products, sharded"


def deciding_settings(name: str) -> dict:
    """What a plan is made from: cards, model and the settings that decide memory."""
    from chunk_grpo_nb.training.config import flat, load_config

    options, config = RUNS[name], load_config(LAUNCH / f"{name}.yaml")
    settings = flat(config)
    return {
        "file": f"{name}.yaml",
        "model": config.policy.model,
        "cards": options.get("processes", 1),
        "card": options["gpu"],
        "launch": "fsdp2.yaml" if options.get("sharded") else "one_gpu.yaml",
        "trains": trains(config.policy, options.get("bits")),
        "rewards": list(config.objective.rewards),
        "settings": {setting: settings[setting] for setting in DECIDING},
    }


def planned(name: str) -> dict:
    """The record of one parameter file: its deciding settings and what it asks of a card."""
    from chunk_grpo_nb.analysis.memory import pipeline_shape, plan_memory
    from chunk_grpo_nb.training.config import load_config

    options = dict(RUNS[name])
    config = load_config(LAUNCH / f"{name}.yaml")
    shape = pipeline_shape(options.pop("shape", config.policy.model))
    plan = plan_memory(config, shape=shape, **options)
    print(f"{name}\n{plan.table()}", flush=True)
    peak, free = round(plan.peak / 1e9, 1), plan.reserve
    return deciding_settings(name) | {
        "peak_gb": peak,
        "kept_free": free,
        "not_counted": list(plan.notes),
    }


REWARDS = {"hpsv3": "HPSv3", "pickscore": "PickScore"}


def row(found: dict) -> list[str]:
    """One line of the README's table."""
    cards, settings = found["cards"], found["settings"]
    rewards = ", ".join(REWARDS.get(name, name) for name in found["rewards"])
    notes = "".join(f" ({note})" for note in found["not_counted"])
    return [
        f"{cards} × {found['card'].replace('GB', ' GB')}",
        found["model"].rpartition("/")[2],
        f"`{found['file']}`, {settings['width']} × {settings['height']}",
        f"{settings['prompts_per_iteration']} × {settings['group_size']}",
        found["trains"],
        f"{rewards}, one copy per card" if cards > 1 else rewards,
        f"`{found['launch']}`",
        f"{found['peak_gb']:.1f} GB{notes}",
    ]


HEADER = [
    "Cards",
    "Model",
    "Parameter file, pixels",
    "Prompts × group",
    "Trains",
    "Reward",
    "Launch configuration",
    "Planned peak per card",
]


def launch_table() -> str:
    """The README's table of cards and parameter files, from the record."""
    return markdown_table(HEADER, [row(found) for found in read_json(RECORD).values()])


def main() -> None:
    """Plan the named files, or all, and write each into the record as soon as it is there."""
    names = sys.argv[1:] or list(RUNS)
    if unknown := set(names) - set(RUNS):
        sys.exit(f"not in ci/launch_table.py: {', '.join(sorted(unknown))}")
    for name in names:
        found = planned(name)
        record = read_json(RECORD) if RECORD.exists() else {}
        record = record | {name: found}
        ordered = {n: record[n] for n in RUNS if n in record}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
