"""Put what a script renders between its two markers in README.md."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def insert(text: str, start: str, end: str, content: str) -> str:
    """A text with what is between two markers replaced.

    Args:
        text (`str`): The current text.
        start (`str`): The marker before, a line of its own.
        end (`str`): The marker after.
        content (`str`): What goes between, without a trailing newline.
    Returns:
        `str`: The new text.
    Raises:
        ValueError: A marker is missing.
    """
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"expected the markers {start!r} and {end!r} in {README.name}, found only part of them")
    return f"{before}{start}\n{content}\n{end}{after}"


def main(description: str, start: str, end: str, render: Callable[[], str]) -> None:
    """Command line of a script: print what it renders, or put it into README.md.

    Args:
        description (`str`): For `--help`.
        start (`str`): The marker before.
        end (`str`): The marker after.
        render (`Callable`): Gives the content.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help=f"replace it in {README.name}")
    if parser.parse_args().write:
        README.write_text(insert(README.read_text(), start, end, render()))
    else:
        print(render())
