"""Rows that several programs attend to: their slices, and the merge of their partial results.

The last program of a row to finish merges, in a fixed order. May import triton and `_common`.
"""

import triton
import triton.language as tl

from ._common import CHOSEN, COUNTERS, MERGED

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _write_row(
    acc, m_i, l_i, offs_g, out_ptr, stride_oh, sinks_ptr, first_head,
    DV: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Adds the sinks, normalises, writes heads `offs_g` of a group."""
    offs_v = tl.arange(0, BDV)
    mask_g = offs_g < G
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + first_head + offs_g, mask=mask_g, other=float("-inf")).to(tl.float32) * LOG2E
        m_new = tl.maximum(m_i, sink)
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp2(m_i - m_ref)
        acc = acc * decay[:, None]
        l_i = l_i * decay + tl.exp2(sink - m_ref)
    out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    tl.store(
        out_ptr + (first_head + offs_g)[:, None] * stride_oh + offs_v[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_g[:, None] & (offs_v < DV)[None, :],
    )


@triton.jit
def finish_row(
    acc, m_i, l_i, out_ptr, stride_oh, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, row, first_head, split,
    DV: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr, HAS_SINKS: tl.constexpr, AWAIT: tl.constexpr,
):  # fmt: skip
    """Writes the output of a row, after merging the partial results if there are several; its counters end at zero."""
    row_counters = counter_ptr + row * COUNTERS
    offs_g = tl.arange(0, GP)
    offs_v = tl.arange(0, BDV)
    if SPLITS == 1:
        if AWAIT:
            tl.store(row_counters + CHOSEN, 0)
        _write_row(acc, m_i, l_i, offs_g, out_ptr, stride_oh, sinks_ptr, first_head, DV, BDV, G, HAS_SINKS)
    else:
        mask_g = offs_g < G
        part = (row * SPLITS + split) * GM + offs_g
        tl.store(acc_ptr + part[:, None] * BDV + offs_v[None, :], acc, mask=mask_g[:, None] & (offs_v < DV)[None, :])
        tl.store(ml_ptr + part * 2, m_i, mask=mask_g)
        tl.store(ml_ptr + part * 2 + 1, l_i, mask=mask_g)
        tl.debug_barrier()
        last = tl.atomic_add(row_counters + MERGED, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            # ready for the next call
            tl.store(row_counters + MERGED, 0)
            if AWAIT:
                tl.store(row_counters + CHOSEN, 0)
            # without the heads that pad a tile
            offs_m = tl.arange(0, GM)
            mask_m = offs_m < G
            inside = mask_m[None, :, None] & (offs_v < DV)[None, None, :]
            # as many at a time as fit in registers; the first do not wait for the maxima
            some = (row * SPLITS + tl.arange(0, AT_ONCE)[:, None]) * GM + offs_m[None, :]  # [AT_ONCE, GM]
            partial = tl.load(acc_ptr + some[:, :, None] * BDV + offs_v[None, None, :], mask=inside, other=0.0)
            m_some = tl.load(ml_ptr + some * 2, mask=mask_m[None, :], other=float("-inf"))
            parts = (row * SPLITS + tl.arange(0, SPLITS)[:, None]) * GM + offs_m[None, :]
            extent = tl.load(ml_ptr + parts * 2, mask=mask_m[None, :], other=float("-inf"))  # [SPLITS, GM]
            l_parts = tl.load(ml_ptr + parts * 2 + 1, mask=mask_m[None, :], other=0.0)
            m_all = tl.max(extent, axis=0)
            m_ref = tl.where(m_all == float("-inf"), 0.0, m_all)
            l_all = tl.sum(l_parts * tl.exp2(extent - m_ref[None, :]), axis=0)
            total = tl.sum(partial * tl.exp2(m_some - m_ref[None, :])[:, :, None], axis=0)
            for first in tl.static_range(AT_ONCE, SPLITS, AT_ONCE):
                m_some = tl.load(ml_ptr + (some + first * GM) * 2, mask=mask_m[None, :], other=float("-inf"))
                partial = tl.load(
                    acc_ptr + (some + first * GM)[:, :, None] * BDV + offs_v[None, None, :], mask=inside, other=0.0
                )
                total += tl.sum(partial * tl.exp2(m_some - m_ref[None, :])[:, :, None], axis=0)
            _write_row(total, m_all, l_all, offs_m, out_ptr, stride_oh, sinks_ptr, first_head, DV, BDV, G, HAS_SINKS)


@triton.jit
def split_of(listed, split, SPLITS: tl.constexpr, PAGES_PER_TILE: tl.constexpr):
    """The slice of a list of pages that a split takes: whole tiles, so that only the last one is ragged."""
    share = tl.cdiv(tl.cdiv(listed, PAGES_PER_TILE), SPLITS) * PAGES_PER_TILE
    first = tl.minimum(split * share, listed)
    return first, tl.minimum(first + share, listed)
