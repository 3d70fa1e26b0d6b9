#!/usr/bin/env python
"""Run the family checks on tiny random pipelines and print the README's support table in Markdown.

    python ci/support_table.py [flux sd3 ...]    # all families by default

The exit status is 1 if any check failed. The checks are those of tests/test_families.py (defined in
tests/tiny.py). A cell shows what the check measured, or what failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

GUIDANCE = {
    "plain": "distilled, one call",
    "uncond_first": "`u + g(c − u)`, one batch",
    "uncond_first_float": "`u + g(c − u)` in float32, one batch",
    "cond_first": "`u + g(c − u)`, two calls",
    "rescaled": "`u + g(c − u)`, two calls, norm of `c` restored",
    "rescaled_negated": "`u + g(c − u)`, two calls, norm of `c` restored, negated",
    "extrapolated_negated": "`c + g(c − u)`, one batch, negated",
}


def run(name: str, check) -> tuple[bool, str]:
    """Whether the check passed, and what the table says about it."""
    try:
        return True, f"✓ {check(name)}"
    except Exception as error:  # a family that fails is a row of the table, not the end of it
        return False, f"✗ {type(error).__name__}"


def main(names: list[str]) -> int:
    import diffusers
    import torch
    from tiny import CHECKS, FAMILIES, quiet, tiny_policy

    quiet()
    torch.set_num_threads(1)
    unknown = set(names) - set(FAMILIES)
    if unknown:
        sys.exit(f"unknown tiny pipelines {sorted(unknown)}: choose from {', '.join(FAMILIES)}")
    columns = ["family", "tiny pipeline", "pipeline, transformer", "guidance", *CHECKS]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    passed = True
    for name in names or FAMILIES:
        policy = tiny_policy(name)
        results = [run(name, check) for check in CHECKS.values()]
        passed &= all(ok for ok, _ in results)
        classes = f"`{type(policy.pipe).__name__}`, `{type(policy.transformer).__name__}`"
        row = [
            policy.family.name,
            f"`{name}`",
            classes,
            GUIDANCE[policy.family.combine.__name__],
            *(text for _, text in results),
        ]
        print(f"| {' | '.join(row)} |", flush=True)
    print(
        "\nOn tiny random pipelines, CPU, float32, torch "
        f"{torch.__version__.split('+')[0]}, diffusers {diffusers.__version__}. Numbers: relative "
        "error of the velocity in shuffled (image, step) pairs; relative error of the gradient "
        "against finite differences of the stock loop; largest |Δ log-prob| in shuffled pairs (in "
        "the rollout's own batch shape both are exactly 0); largest change of a latent after one "
        "LoRA update."
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
