"""Plain text tables for `check` and `report`. Imports the standard library only."""

from __future__ import annotations

from collections.abc import Sequence


def render(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned by width; numbers to the right.

    Args:
        header (`Sequence`): Column names.
        rows (`Sequence`): Cells, as many as columns in every row.
    Returns:
        `str`: Lines without a final newline.
    """
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *texts)]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = [list(header), ["-" * width for width in widths], *texts]
    pad = [str.rjust if flag else str.ljust for flag in right]
    return "\n".join("  ".join(p(c, w) for p, c, w in zip(pad, line, widths)).rstrip() for line in lines)


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
