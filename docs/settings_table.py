"""Render the table of settings in README.md from the docstring of `UniqueConfig`; `--write` puts it there."""

from __future__ import annotations

import re

import readme

from unique_attention import settings

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


if __name__ == "__main__":
    readme.main(__doc__ or "", START, END, render)
