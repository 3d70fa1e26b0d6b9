"""The page for those who come from another trainer, from data/migration.yaml."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "data" / "migration.yaml"
PAGE = ROOT / "data" / "migration.md"

HEAD = (
    "# Coming from another trainer\n\n"
    "<!-- written by ci/readme.py from data/migration.yaml -->\n"
    "Your flag, the value in your trainer's own example, and the settings that mean the same here; "
    "`chunk-grpo train -p NAME VALUE` sets one, a YAML file many. Where the third column is empty, "
    "the last says why.\n"
    "Each row is run by `tests/test_migration.py`: it is accepted beside the others of its "
    "trainer, all of them together train, and where a *formula* is behind it (✓) theirs is written "
    "out and compared.\n"
)


def cell(value: object) -> str:
    """Text of a table cell."""
    return str(value).replace("|", "\\|")


def shown(settings: dict) -> str:
    """Settings as YAML, in one cell."""
    return "<br>".join(f"`{name}: {written(value)}`" for name, value in settings.items())


def written(value: object) -> str:
    """A value as YAML writes it in a line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("\n...").strip()


def migration_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for peer, content in yaml.safe_load(SOURCE.read_text(encoding="utf-8")).items():
        link = f"[{content['source'].removeprefix('https://github.com/')}]({content['source']})"
        parts.append(f"## {peer}\n")
        parts.append(f"{link} at `{content['commit'][:7]}`: {content['example']}.\n")
        parts.append("| flag there | value | here | ✓ | what differs |\n|---|---|---|---|---|")
        for row in content["rows"]:
            cells = [f"`{row['flag']}`", f"`{cell(written(row['value']))}`", shown(row["ours"])]
            cells += ["✓" if "check" in row else "", cell(row.get("differs", ""))]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)
