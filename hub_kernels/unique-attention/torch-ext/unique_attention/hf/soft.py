"""The training path: what the mask means for the soft mask, and the call. Imports torch and `..ops`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import ops
from ..settings import UniqueConfig
from . import activity
from .masks import MaskFacts, is_lower_right, matches
from .modes import DENSE, Mode


@contextlib.contextmanager
def observing(see: Callable[..., None]) -> Iterator[None]:
    """Show this thread's soft-mask calls to a meter: `see(settings, query, key, **where)` before each of them.

    Args:
        see (`Callable`): Gets the settings, `query [B, H, T, D]`, `key [B, HK, T, D]`, and by name `token_mask`,
            `bounds`, `scaling`, `softcap` and `sinks`.
    """
    activity.PROBE.see = see
    try:
        yield
    finally:
        activity.PROBE.see = None


def read_mask(
    mode: Mode, query: torch.Tensor, mask: torch.Tensor | None, facts: MaskFacts | None, kwargs: dict[str, Any]
) -> tuple[Mode, dict[str, Any]]:
    """Turn a mask into padding and documents, which is all that the soft mask knows beside causality.

    Args:
        mode (`Mode`): The soft mode.
        query (`torch.Tensor`): `[B, H, T, D]`.
        mask (`torch.Tensor`, *optional*): `[B, 1, T, T]` bool.
        facts (`MaskFacts`, *optional*): Its facts.
        kwargs (`dict`): Keywords of the call; `cu_seq_lens_q` or `position_ids` tell where documents begin.
    Returns:
        `tuple`: The mode, dense where the mask is something else, and `token_mask` and `bounds` for `soft_attention`.

    Numerics: one device sync per forward for masks that `unique_mask` did not make; the answer stays on the mask.
    """
    if mask is None or facts is None:
        if is_lower_right(mask):
            return _dense(), {}
        bounds = kwargs.get("cu_seq_lens_q")
        return mode, {"token_mask": None, "bounds": bounds}
    if facts.plain is None:
        facts.plain = matches(mask, facts.token_mask)
    if facts.plain:
        return mode, {"token_mask": facts.token_mask, "bounds": None}
    if facts.bounds is None:
        facts.bounds = _bounds(query, mask, kwargs)
    if facts.bounds.numel() == 0:
        return _dense(), {}
    return mode, {"token_mask": None, "bounds": facts.bounds}


def _dense() -> Mode:
    return Mode(DENSE, "a mask that is not causal, padding and documents", fallback=True)


def _bounds(query: torch.Tensor, mask: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Document boundaries over the flattened batch, `[documents + 1]`; empty where they do not explain the mask."""
    batch, length = query.shape[0], query.shape[2]
    given, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    begins = torch.zeros(batch, length, dtype=torch.bool, device=query.device)
    begins[:, 0] = True
    if given is not None:
        begins.view(-1)[given[:-1].to(query.device, torch.int64)] = True
    elif position_ids is not None and position_ids.dim() == 2:
        rows = position_ids.expand(batch, -1)
        begins[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
    documents = begins.cumsum(-1)
    if not matches(mask, torch.ones_like(begins), documents):
        return begins.new_empty(0, dtype=torch.int32)
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([batch * length])]).to(torch.int32)


def soft_attention(
    settings: UniqueConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    token_mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Soft-mask attention over a batch that may be padded or packed (Eq. 6).

    Args:
        settings (`UniqueConfig`): Settings of the model.
        query (`torch.Tensor`): `[B, H, T, D]`.
        key (`torch.Tensor`): `[B, HK, T, D]`.
        value (`torch.Tensor`): `[B, HK, T, DV]`.
        token_mask (`torch.Tensor`, *optional*): `[B, T]` bool.
        bounds (`torch.Tensor`, *optional*): `[documents + 1]`, boundaries over the flattened batch.
        scaling (`float`): Softmax scale.
        dropout (`float`): 0; calls with dropout never come here.
        softcap (`float`, *optional*): Bound of the logits.
        s_aux (`torch.Tensor`, *optional*): `[H]`, sink logits.
    Returns:
        `torch.Tensor`: `[B, T, H, DV]`.
    """
    batch, length = query.shape[0], query.shape[2]
    if torch.is_autocast_enabled(query.device.type):
        # as autocast does for sdpa; norms and rotary embeddings in fp32 would otherwise meet values in 16 bits
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    see = None if torch.compiler.is_compiling() else getattr(activity.PROBE, "see", None)
    if see is not None:
        where = {"token_mask": token_mask, "bounds": bounds, "scaling": scaling}
        see(settings, query, key, **where, softcap=softcap, sinks=s_aux)
    flat = bounds is not None and batch > 1
    if flat:
        # the op packs one row: the documents of all rows one after the other
        query, key, value = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (query, key, value))
    out = ops.soft_mask_attention(
        query,
        key,
        value,
        page_size=settings.page_size,
        num_kept=settings.num_kept,
        sink_pages=settings.sink_pages,
        recent_pages=settings.recent_pages,
        temperature=settings.temperature,
        score=settings.score,
        score_weight=settings.score_weight,
        group_reduce=settings.group_reduce,
        softmax_scale=scaling,
        token_mask=token_mask,
        cu_seq_lens=bounds,
        softcap=softcap,
        sinks=s_aux,
        threshold_grad=settings.threshold_grad,
    )
    if flat:
        out = out[0].unflatten(1, (batch, length)).transpose(0, 1)
    return out.transpose(1, 2).contiguous()
