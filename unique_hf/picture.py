"""The picture of the demo: page scores beside true attention mass. Imports torch and, when drawing, matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .recording import Recording, by_page, kept_pages, page_scores, token_mass

COLUMNS = 256  # of the picture; each shows the largest value of its pages


@dataclass(frozen=True)
class PageView:
    """What one kv head saw and what its page scores said, one row per query.

    Args:
        layer (`int`): Layer index.
        head (`int`): kv head.
        scores (`torch.Tensor`): `[Q, N]`, page scores.
        mass (`torch.Tensor`): `[Q, N]`, true attention mass, averaged over the query heads.
        kept (`torch.Tensor`): `[Q, N]` bool, pages that unique attention keeps.
    """

    layer: int
    head: int
    scores: torch.Tensor
    mass: torch.Tensor
    kept: torch.Tensor

    @property
    def recall(self) -> float:
        """Share of the mass on the kept pages, averaged over the queries."""
        return float((self.mass * self.kept).sum(-1).mean())


def sharpest_view(recordings: Sequence[tuple[Recording, Sequence[int]]], cache: Any, settings: Any) -> PageView:
    """The view of the kv head that looks most sharply at pages other than the first and last ones.

    Args:
        recordings (`Sequence`): Pairs of a recording and, for each of its rows, the step of the query to show.
        cache (`DynamicCache`): The context, one row.
        settings (`UniqueConfig`): Settings of the page scores.
    Returns:
        `PageView`: One row per query, in the order of the recordings.
    Raises:
        ValueError: No layer was recorded.
    """
    best, best_peak = None, -1.0
    for layer in sorted(recordings[0][0].queries):
        keys = cache.layers[layer].keys
        scaling = recordings[0][0].scaling[layer]
        query = torch.cat([recording.at(layer, steps) for recording, steps in recordings])
        mass = by_page(token_mass(query, keys, scaling), settings.page_size)
        peaks = mass[..., settings.sink_pages : -settings.recent_pages].amax(-1).mean(0)  # [HK]
        if float(peaks.max()) > best_peak:
            best, best_peak = (layer, int(peaks.argmax()), query, mass), float(peaks.max())
    if best is None:
        raise ValueError("expected recorded decode steps, got none: run questions inside `recorded(model)`")
    layer, head, query, mass = best
    keys = cache.layers[layer].keys
    scores, kept = (find(query, keys, settings, recordings[0][0].scaling[layer]) for find in (page_scores, kept_pages))
    return PageView(layer, head, scores[:, head].cpu(), mass[:, head].cpu(), kept[:, head].cpu())


def columns_of(values: torch.Tensor, columns: int = COLUMNS) -> torch.Tensor:
    """The largest value of every `ceil(N / columns)` neighbouring pages: `[Q, N]` to `[Q, at most columns]`."""
    width = -(-values.shape[1] // columns)
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % width), value=float("-inf"))
    return padded.unflatten(1, (-1, width)).amax(2)


def draw(view: PageView, path: str | Path, page_size: int) -> None:
    """Write two heat maps, page score and true attention mass: a row per query, pages from left to right.

    Args:
        view (`PageView`): What to draw.
        path (`str` or `Path`): The picture; its ending gives the format.
        page_size (`int`): Tokens per page, for the axis.
    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("the picture needs matplotlib: pip install 'unique-hf[demo]'") from error
    finite = view.scores.masked_fill(view.scores.isneginf(), float("nan"))
    middle, spread = finite.nanmean(1, keepdim=True), finite.nan_to_num().std(1, keepdim=True)
    panels = (
        ("page score (standard deviations above the row's mean)", columns_of((view.scores - middle) / spread), None),
        ("true attention mass (log10, dense attention)", columns_of(view.mass).clamp(min=1e-6).log10(), (-4.0, 0.0)),
    )
    queries, pages = view.mass.shape
    figure = Figure(figsize=(12, 1.6 + 0.16 * queries), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, values, limits) in zip(figure.subplots(1, 2, sharey=True), panels):
        low, high = limits or (float(values.median()), float(values.max()))
        extent = (0, pages * page_size, queries, 0)
        image = axis.imshow(
            values.numpy(), aspect="auto", interpolation="nearest", cmap="magma", vmin=low, vmax=high, extent=extent
        )
        axis.set(title=title, xlabel=f"position in the context (tokens; pages of {page_size})")
        axis.set_yticks([])
        figure.colorbar(image, ax=axis, pad=0.01)
    figure.axes[0].set_ylabel("queries, by depth of their fact")
    share = int(view.kept.sum(1).max()) / pages
    figure.suptitle(
        f"layer {view.layer}, kv head {view.head}: the kept pages ({share:.1%} of all) hold {view.recall:.1%} of the "
        "attention mass"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
