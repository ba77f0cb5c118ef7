"""Looking at true attention: the queries of exact decode steps, and the mass they put on every page. Imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backend import kernel_module


class Recording:
    """Queries of every decode step, by layer.

    Args:
        queries (`dict`): Layer index to a list of `[B, H, 1, D]`, one per step.
        scaling (`dict`): Layer index to its softmax scale.
    """

    def __init__(self):
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.scaling: dict[int, float] = {}

    def at(self, layer: int, steps: Sequence[int]) -> torch.Tensor:
        """The queries of one layer at one step per row: `[len(steps), H, 1, D]`; row `i` took step `steps[i]`."""
        taken = self.queries[layer]
        return torch.stack([taken[step][row] for row, step in enumerate(steps)])


@contextlib.contextmanager
def recorded(model: PreTrainedModel) -> Iterator[Recording]:
    """Run a model with sdpa and keep the queries of its decode steps.

    Args:
        model (`PreTrainedModel`): Switched to sdpa and, at the end, back to what it ran before. Blocks do not nest.
    Returns:
        `Recording`: Filled while the block runs.
    """
    recording, own = Recording(), set(model.modules())

    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] == 1 and module in own:
            recording.queries.setdefault(module.layer_idx, []).append(query.detach())
            scaling = kwargs.get("scaling")
            recording.scaling[module.layer_idx] = query.shape[-1] ** -0.5 if scaling is None else scaling
        return sdpa(module, query, key, *args, **kwargs)

    before: Any = model.config.get_text_config()._attn_implementation
    # under sdpa's own name: a name of our own would also need its masks, which Transformers looks up elsewhere
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        model.set_attn_implementation("sdpa")
        yield recording
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def token_mass(query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """True attention of queries over one row of keys, averaged over the query heads of each kv head.

    Equation: mean_g softmax_t(s q_g . k_t).

    Args:
        query (`torch.Tensor`): `[B, H, 1, D]`.
        keys (`torch.Tensor`): `[1, HK, S, D]`.
        scaling (`float`): s.
    Returns:
        `torch.Tensor`: `[B, HK, S]` fp32.
    """
    grouped = query[:, :, 0].float().unflatten(1, (keys.shape[1], -1))  # [B, HK, G, D]
    logits = torch.einsum("bhgd,hsd->bhgs", grouped, keys[0].float()) * scaling
    return logits.softmax(-1).mean(2)


def by_page(mass: torch.Tensor, page_size: int) -> torch.Tensor:
    """Sums over pages: `[..., S]` to `[..., ceil(S / P)]`."""
    spare = -mass.shape[-1] % page_size
    return torch.nn.functional.pad(mass, (0, spare)).unflatten(-1, (-1, page_size)).sum(-1)


def page_scores(query: torch.Tensor, keys: torch.Tensor, settings: Any, scaling: float) -> torch.Tensor:
    """The page scores that unique attention would rank for these queries (Eq. 1 to 3), whatever the super-pages.

    Args:
        query (`torch.Tensor`): `[B, H, 1, D]`.
        keys (`torch.Tensor`): `[1, HK, S, D]`.
        settings (`UniqueConfig`): Settings.
        scaling (`float`): s.
    Returns:
        `torch.Tensor`: `[B, HK, N]` fp32.
    """
    kernel = kernel_module()
    shared = {"page_size": settings.page_size, "score": settings.score, "stats_dtype": settings.stats_dtype}
    rows = query.shape[0]
    stats = kernel.page_stats(keys, **shared)
    stats = type(stats)(*(None if x is None else x.expand(rows, *x.shape[1:]).contiguous() for x in stats))
    return kernel.page_scores(
        query, stats, **shared, score_weight=settings.score_weight, group_reduce=settings.group_reduce,
        softmax_scale=scaling, k=keys.expand(rows, -1, -1, -1) if settings.score == "oracle" else None,
        seq_lens=torch.full((rows,), keys.shape[2], dtype=torch.int32, device=keys.device),
    )  # fmt: skip


def kept_pages(query: torch.Tensor, keys: torch.Tensor, settings: Any, scaling: float) -> torch.Tensor:
    """Which pages unique attention would keep for these queries (Eq. 4, of super-pages first where there are any).

    Args:
        query (`torch.Tensor`): `[B, H, 1, D]`.
        keys (`torch.Tensor`): `[1, HK, S, D]`.
        settings (`UniqueConfig`): Settings.
        scaling (`float`): s.
    Returns:
        `torch.Tensor`: `[B, HK, N]` bool.
    """
    lens = torch.full((query.shape[0],), keys.shape[2], dtype=torch.int32, device=keys.device)
    ids = select(lambda level: page_scores(query, keys, level, scaling), settings, seq_lens=lens)
    return as_mask(ids, -(-keys.shape[2] // settings.page_size))


def select(scores_of: Callable[[Any], torch.Tensor], settings: Any, **rows: torch.Tensor) -> torch.Tensor:
    """The pages that decoding keeps, from the scores of each level.

    Args:
        scores_of (`Callable`): Gives the scores `[B, HK, N]` of pages under the settings of a level.
        settings (`UniqueConfig`): Settings.
        **rows (`torch.Tensor`): `seq_lens` and `seq_starts`.
    Returns:
        `torch.Tensor`: `[B, HK, K]` int32, -1 padded.
    """
    scores, upper = scores_of(settings), settings.upper
    if upper is not None:
        # pages of super-pages that the first level drops do not compete
        ratio = upper.page_size // settings.page_size
        kept = as_mask(select(scores_of, upper, **rows), -(-scores.shape[2] // ratio)).repeat_interleave(ratio, 2)
        scores = scores.masked_fill(~kept[..., : scores.shape[2]], float("-inf"))
    return kernel_module().select_pages(
        scores, num_kept=settings.num_kept, sink_pages=settings.sink_pages, recent_pages=settings.recent_pages,
        page_size=settings.page_size, **rows,
    )  # fmt: skip


def as_mask(ids: torch.Tensor, num_pages: int) -> torch.Tensor:
    """Listed pages `[B, HK, K]`, -1 padded, as `[B, HK, N]` bool."""
    # -1 means no page and lands in a spare column
    kept = torch.zeros((*ids.shape[:2], num_pages + 1), dtype=torch.bool, device=ids.device)
    return kept.scatter_(2, torch.where(ids < 0, num_pages, ids).long(), True)[..., :-1]
