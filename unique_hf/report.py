"""What really ran, counted per layer. May import torch, Transformers and the kernel's adapter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .backend import adapter
from .table import render
from .tally import Tally, collect

COLUMNS = (
    "sparse_rows", "dense_rows", "prompt_rows", "soft_rows",
    "pages_read", "pages_present", "bytes_read", "bytes_dense",
)  # fmt: skip


@dataclass(frozen=True)
class LayerReport:
    """Counts of one attention module, or of all together.

    Args:
        name (`str`): Name of the module in the model.
        sparse_rows (`int`): Decoded tokens that read fewer pages than there were.
        dense_rows (`int`): Decoded tokens that read everything.
        prompt_rows (`int`): Tokens in calls of several new tokens (prefill, verification): exact attention.
        soft_rows (`int`): Tokens that went through the soft mask.
        pages_read (`int`): Pages that decoded tokens read, per kv head.
        pages_present (`int`): Pages there were.
        bytes_read (`int`): Bytes of keys, values and page statistics that decoded tokens read; with super-pages the
            statistics of all super-pages, and of pages those in the super-pages kept.
        bytes_dense (`int`): Bytes of keys and values that dense attention would have read.
        recall (`float`, *optional*): Mean share of the true attention mass on the kept pages, over sparse rows;
            measured only with `UniqueConfig.measure_recall`.
        reasons (`dict`): Decoded tokens by reason of their mode.
    """

    name: str
    sparse_rows: int
    dense_rows: int
    prompt_rows: int
    soft_rows: int
    pages_read: int
    pages_present: int
    bytes_read: int
    bytes_dense: int
    recall: float | None
    reasons: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What ran since the last reset; prints as a table and has the totals as attributes.

    Args:
        layers (`tuple[LayerReport]`): Modules that ran, in the order of the model.
        total (`LayerReport`): Their sum.
        capture (`Tally`): Generate calls that decoded through a captured step, and why others did not.
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport
    capture: Tally

    def __getattr__(self, name: str) -> Any:
        if name in COLUMNS or name in ("recall", "reasons"):
            return getattr(self.total, name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __str__(self) -> str:
        measured = self.total.recall is not None
        header = ("layer", *COLUMNS, *(("recall",) if measured else ()))
        rows = [
            (row.name, *(getattr(row, column) for column in COLUMNS), *((_or_dash(row.recall),) if measured else ()))
            for row in (*self.layers, self.total)
        ]
        lines = [render(header, rows)]
        lines += [f"{count:,} decoded rows: {reason}" for reason, count in sorted(self.total.reasons.items())]
        lines += self.capture.lines()
        return "\n".join(lines)

    __repr__ = __str__


def _or_dash(value: float | None) -> float | str:
    return "-" if value is None else value


def report(model: PreTrainedModel, reset: bool = False) -> Report:
    """Counts of what the attention layers of a model did since the last reset.

    Args:
        model (`PreTrainedModel`): The model.
        reset (`bool`, *optional*, defaults to `False`): Start counting anew after this report.
    Returns:
        `Report`: Counts per layer and in total. Steps inside `torch.compile` are not counted.

    Numerics: counting uses Python numbers and never waits for the device; the recall, where measured, is read here.
    """
    counters = adapter().activity.ACTIVITY
    layers, sums = [], []
    for name, module in model.named_modules():
        counts = counters.get(module)
        if counts is None:
            continue
        total = None if counts.recall_sum is None else float(counts.recall_sum)
        sums.append((total or 0.0, counts.recall_rows))
        recall = None if total is None else total / counts.recall_rows
        layers.append(_row(name, [counts], recall))
        if reset:
            del counters[module]
    rows = sum(count for _, count in sums)
    recall = sum(value for value, _ in sums) / rows if rows else None
    return Report(tuple(layers), _row("total", layers, recall), collect(model, reset))


def _row(name: str, parts: list[Any], recall: float | None) -> LayerReport:
    reasons = sum((Counter(part.reasons) for part in parts), Counter())
    counts = {column: sum(getattr(part, column) for part in parts) for column in COLUMNS}
    return LayerReport(name=name, **counts, recall=recall, reasons=dict(reasons))
