"""Render the table of settings in README.md from the docstring of `UniqueConfig`; `--write` puts it there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from unique_attention import settings

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- settings: docs/settings_table.py --write -->", "<!-- end of settings -->"
ARGUMENT = re.compile(r"^ {8}(\w+) \((.+?)\): (.+?)(?=^ {8}\w+ \(|^ {4}\w)", re.MULTILINE | re.DOTALL)


def render() -> str:
    """The table in Markdown, one row per setting, in the order of the docstring.

    Returns:
        `str`: The table, without a trailing newline.
    """
    rows = ["| setting | type, default | meaning |", "|---|---|---|"]
    for name, kind, text in ARGUMENT.findall(settings.UniqueConfig.__doc__ or ""):
        text = " ".join(text.split())
        # a name of a list of choices is no help to a reader; print the choices
        for constant in re.findall(r"`([A-Z_]+)`", text):
            choices = ", ".join(f"`{choice}`" for choice in getattr(settings, constant))
            text = text.replace(f"`{constant}`", choices)
        kind = kind.replace("`", "").replace("*optional*, defaults to ", "").replace("*optional*", "None")
        rows.append(f"| `{name}` | {kind} | {text} |")
    return "\n".join(rows)


def insert(readme: str) -> str:
    """README text with the table between its two markers replaced.

    Args:
        readme (`str`): The current text.

    Returns:
        `str`: The new text.

    Raises:
        ValueError: A marker is missing.
    """
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"expected the markers {START!r} and {END!r} in {README.name}, found only part of them")
    return f"{before}{START}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    if parser.parse_args().write:
        README.write_text(insert(README.read_text()))
    else:
        print(render())
