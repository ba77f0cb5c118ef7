"""What ran: counters per attention module, kept in Python numbers, for `report` and `check`. Imports torch only."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..settings import UniqueConfig
from .modes import Mode


@dataclass
class Activity:
    """Counts of one attention module since the last reset.

    Args:
        sparse_rows (`int`): Decoded tokens (rows of a batch) that read fewer pages than there were.
        dense_rows (`int`): Decoded tokens that read everything, for whatever reason.
        prompt_rows (`int`): Tokens in calls of several new tokens without grad: exact attention.
        soft_rows (`int`): Tokens that went through the soft mask.
        pages_read (`int`): Pages read per kv head by the decoded tokens of layers with page statistics.
        pages_present (`int`): Pages there were for them.
        bytes_read (`int`): Bytes of keys, values and statistics read by decoded tokens; with super-pages the
            statistics of all super-pages, and of pages those in the super-pages kept.
        bytes_dense (`int`): Bytes of keys and values that dense attention would have read for them.
        reasons (`Counter`): Decoded tokens by reason of the mode.
    """

    sparse_rows: int = 0
    dense_rows: int = 0
    prompt_rows: int = 0
    soft_rows: int = 0
    pages_read: int = 0
    pages_present: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0
    reasons: Counter = field(default_factory=Counter)
    recall_sum: torch.Tensor | None = None
    recall_rows: int = 0


# by module, weakly: a model that goes away takes its counts along, and pickling or copying a model never sees them
ACTIVITY: weakref.WeakKeyDictionary[torch.nn.Module, Activity] = weakref.WeakKeyDictionary()
PROBE = threading.local()


def activity_of(module: torch.nn.Module) -> Activity:
    """The counters of a module, created on first use."""
    activity = ACTIVITY.get(module)
    if activity is None:
        activity = ACTIVITY.setdefault(module, Activity())
    return activity


@contextlib.contextmanager
def probing() -> Iterator[dict[torch.nn.Module, list[tuple[int, Mode]]]]:
    """Record the modes of this thread's calls, `(T, mode)` by module, and leave the counters alone meanwhile."""
    PROBE.log = log = {}
    try:
        yield log
    finally:
        PROBE.log = None


def is_probing() -> bool:
    """Whether this thread is inside `probing`."""
    return getattr(PROBE, "log", None) is not None


def note(module: torch.nn.Module, mode: Mode, query: torch.Tensor) -> Activity | None:
    """Count the rows of a call that is not sparse, or log it under `probing`.

    Args:
        module (`torch.nn.Module`): The attention module.
        mode (`Mode`): Its mode.
        query (`torch.Tensor`): `[B, H, T, D]`.
    Returns:
        `Activity` or `None`: Where the caller may count more; `None` while probing.
    """
    log = getattr(PROBE, "log", None)
    rows, tokens = query.shape[0], query.shape[2]
    if log is not None:
        log.setdefault(module, []).append((tokens, mode))
        return None
    activity = activity_of(module)
    if tokens > 1:
        if mode.kind == "soft":
            activity.soft_rows += rows * tokens
        else:
            activity.prompt_rows += rows * tokens
    else:
        activity.reasons[mode.reason] += rows
    return activity


def token_bytes(key: torch.Tensor, value: torch.Tensor) -> int:
    """Bytes of the keys and values of one token, all kv heads together."""
    return key.shape[1] * (key.shape[3] + value.shape[3]) * key.element_size()


def count_dense(activity: Activity, key: torch.Tensor, value: torch.Tensor) -> None:
    """Count one decode call that reads all of `key` and `value`."""
    read = key.shape[0] * key.shape[2] * token_bytes(key, value)
    activity.dense_rows += key.shape[0]
    activity.bytes_read += read
    activity.bytes_dense += read


def pages_of(length: int, start: int, page_size: int) -> int:
    """Pages of a row with tokens in slots `start .. length - 1`."""
    return -(-length // page_size) - start // page_size


def stats_bytes(settings: UniqueConfig, page_bytes: Sequence[int], length: int, start: int = 0) -> int:
    """Bytes of statistics that one decoded token of a row reads.

    Args:
        settings (`UniqueConfig`): Settings of the call.
        page_bytes (`Sequence`): Bytes of the statistics of one page, all kv heads together; then of a super-page.
        length (`int`): Slots in use.
        start (`int`, *optional*, defaults to 0): First valid slot.
    Returns:
        `int`: Those of all pages; with super-pages those of all super-pages and of the pages in the kept ones.
    """
    scored, upper = pages_of(length, start, settings.page_size), settings.upper
    if upper is None:
        return scored * page_bytes[0]
    ratio, present = upper.page_size // settings.page_size, pages_of(length, start, upper.page_size)
    # as with tokens below: the last super-page is always kept and may lack pages, of the others only the first can
    missing = -pages_of(length, 0, settings.page_size) % ratio
    scored = min(min(present, upper.num_kept) * ratio - missing, scored)
    return scored * page_bytes[0] + present * page_bytes[1]


def count_sparse(
    activity: Activity,
    settings: UniqueConfig,
    key: torch.Tensor,
    value: torch.Tensor,
    page_bytes: Sequence[int],
    length: int,
    starts: Sequence[int] | None,
) -> list[int]:
    """Count one decode call over pages.

    Args:
        activity (`Activity`): Where to count.
        settings (`UniqueConfig`): Settings of the call.
        key (`torch.Tensor`): `[B, HK, S, D]`.
        value (`torch.Tensor`): `[B, HK, S, DV]`.
        page_bytes (`Sequence`): Bytes of the statistics of one page, all kv heads together; then of a super-page.
        length (`int`): Slots in use.
        starts (`Sequence`, *optional*): First valid slot of each row.
    Returns:
        `list`: The rows that were sparse.
    """
    page_size, kept = settings.page_size, max(settings.num_kept, settings.dense_below // settings.page_size)
    per_token = token_bytes(key, value)
    sparse = []
    for row in range(key.shape[0]):
        start = starts[row] if starts else 0
        present = pages_of(length, start, page_size)
        read = min(present, kept)
        # the last page is always read and may be partial; of the others only the first can be
        tokens = min(read * page_size - (-length % page_size), length - start)
        activity.pages_read += read
        activity.pages_present += present
        activity.bytes_read += tokens * per_token + stats_bytes(settings, page_bytes, length, start)
        activity.bytes_dense += (length - start) * per_token
        if present > kept:
            sparse.append(row)
    activity.sparse_rows += len(sparse)
    activity.dense_rows += key.shape[0] - len(sparse)
    return sparse


def kept_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    page_ids: torch.Tensor,
    *,
    page_size: int,
    scaling: float,
    token_mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Share of the true attention mass on the kept pages, per row: the recall, averaged over heads.

    Equation: recall = sum_{p kept} sum_{t in p} softmax(s q.k)_t.

    Args:
        query (`torch.Tensor`): `[B, H, 1, D]`.
        key (`torch.Tensor`): `[B, HK, S, D]`, slots in use only.
        page_ids (`torch.Tensor`): `[B, HK, K]`, -1 padded.
        page_size (`int`): Tokens per page.
        scaling (`float`): Softmax scale.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool.
        softcap (`float`, *optional*): As in attention.
        sinks (`torch.Tensor`, *optional*): `[H]`; their share counts as kept.
    Returns:
        `torch.Tensor`: `[B]` fp32.

    Numerics: fp32; reads all keys, so it is a debug meter.
    """
    batch, kv_heads, length, _ = key.shape
    grouped = query.float().unflatten(1, (kv_heads, -1)).squeeze(3)  # [B, HK, G, D]
    logits = grouped @ key.float().transpose(-1, -2) * scaling  # [B, HK, G, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if token_mask is not None:
        logits = logits.masked_fill(~token_mask[:, None, None, :length], float("-inf"))
    if sinks is not None:
        extra = sinks.float().reshape(1, kv_heads, -1, 1).expand(batch, -1, -1, 1)
        logits = torch.cat([logits, extra], dim=-1)
    weights = logits.softmax(-1)
    spare = weights[..., length:].sum(-1)
    pages = -(-length // page_size)
    by_page = torch.nn.functional.pad(weights[..., :length], (0, pages * page_size - length))
    by_page = by_page.unflatten(-1, (pages, page_size)).sum(-1)  # [B, HK, G, N]
    valid = page_ids >= 0
    ids = page_ids.clamp(min=0).long()[:, :, None].expand(-1, -1, by_page.shape[2], -1)
    kept = (by_page.gather(-1, ids) * valid[:, :, None]).sum(-1)
    return (kept + spare).mean((1, 2))
