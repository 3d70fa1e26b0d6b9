"""The README's table of speed, from the committed record."""

from result_pages import RESULTS, markdown_table, read_json

WHAT = {
    "images_per_second": ("images per second of a whole iteration", "{:.2f}"),
    "overhead": ("sampling and updating over the bare transformer calls", "{:.3f}"),
    "release": ("seconds per image of the release's loop over ours", "{:.1f}"),
    "share_of_peak": ("share of the machine's matrix peak, whole iteration", "{:.0%}"),
    "calls_share_of_peak": ("the same, bare transformer calls", "{:.0%}"),
}


def shown(figure: dict, style: str) -> str:
    """Median, with the least and the most in brackets."""
    low, high = (style.format(figure[name]) for name in ("low", "high"))
    return f"{style.format(figure['median'])} [{low}, {high}]"


def stages_row(found: dict) -> str:
    """The stages that take a hundredth or more, the largest first."""
    whole = sum(found["stages"].values())
    shares = sorted(((s / whole, n) for n, s in found["stages"].items()), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.01)


def gain_sentence(record: dict) -> str:
    """Network evaluations until half of the headline's gain, by arm; what is None is never."""
    found = record["time_to_gain"]
    parts = []
    for arm in found["arms"]:
        names = ("evaluations", "evaluations_low", "evaluations_high")
        median, low, high = ("never" if arm[n] is None else f"{arm[n]:,.0f}" for n in names)
        runs = f"{arm['reached']} of {arm['runs']} runs"
        parts.append(f"{arm['arm']} {median} [{low}, {high}] ({runs})")
    return (
        f"Transitions through the network until the held-out `{found['reward']}` has risen by "
        f"{found['gain']:.2f}, median over seeds with its 95 % interval: {'; '.join(parts)}."
    )


def memory_sentence(record: dict) -> str:
    """Peak memory of a long streamed chunk against a single step, where it was measured."""
    ratio = record.get("chunk_over_step_memory")
    if ratio is None:
        return ""
    return (
        "Peak memory of an update beyond the model, the seven steps of an image as one streamed "
        f"chunk over a single step: {ratio:.2f}. "
    )


def elementwise(record: dict) -> str:
    """The three dearest operators that are no matrix products, with their share of the time."""
    rows = [row for row in record["operators"] if row["limit"] == "memory"][:3]
    return ", ".join(f"`{row['operator']}` {row['share']:.0%}" for row in rows)


def speed_table() -> str:
    """Hardware, the figures of every size, the reason for what is missed, time to a gain."""
    file = RESULTS / "speed" / "speed.json"
    if not file.exists():
        return "No record of the speed is committed yet."
    record = read_json(file)
    sizes, machine = record["sizes"], record["hardware"]
    names = [f"{n}, {f['parameters'] / 1e6:.1f} M parameters" for n, f in sizes.items()]
    rows = [
        [text, *(shown(found[name], style) for found in sizes.values())]
        for name, (text, style) in WHAT.items()
    ]
    if all("peak_bytes" in found for found in sizes.values()):
        peaks = [f"{found['peak_bytes'] / 1e6:,.0f} MB" for found in sizes.values()]
        rows.append(["peak memory of an iteration beyond the model", *peaks])
    rows.append(["where the seconds go", *map(stages_row, sizes.values())])
    products = record["products"]
    return "\n\n".join(
        [
            f"On {machine['gpu'] or machine['cpu']} ({machine['simd']}), {machine['threads']} of "
            f"{machine['cores']} cores, PyTorch {machine['torch']}; medians with the least and the "
            "most, all taken in turns in one run:",
            markdown_table(["", *names], rows),
            f"Of an update of the embedded model, matrix products take {products['share']:.0%} "
            f"and run at {products['of_limit']:.0%} of the best product; the rest works "
            f"element by element, {elementwise(record)}. "
            f"{memory_sentence(record)}{gain_sentence(record)} "
            "[The executed notebook](data/results/speed/07_speed.ipynb) has the operators.",
            "![Stages of an iteration; limit, bare calls, iteration and the release's loop]"
            "(data/results/speed/speed.png)",
        ]
    )
