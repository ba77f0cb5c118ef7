"""Decode attention over listed pages (Eq. 5), split over several programs a row.

May import torch, triton and the other kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._checks import ROW_COUNTERS
from ._common import (
    CHOSEN,
    COUNTERS,
    await_row,
    end_in_order,
    physical_page,
    row_extent,
    stride_of,
    target_of,
    token_strides,
)
from .page_stats import write_token
from .split_rows import LOG2E, finish_row, split_of

# which rows attend to pages that are not listed
NO_ROWS, SOME_ROWS, ALL_ROWS = (tl.constexpr(i) for i in range(3))


@triton.jit
def load_query(
    q_ptr, stride_qh, stride_qd, first_head, dtype: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """The queries of a group as a tile `[GP, BD]`; past the first cache, for nothing has been waited for yet."""
    offs_g = tl.arange(0, GP)
    offs_d = tl.arange(0, BD)
    q = tl.load(
        q_ptr + (first_head + offs_g)[:, None] * stride_qh + offs_d[None, :] * stride_qd,
        mask=(offs_g < G)[:, None] & (offs_d < D)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    return q.to(dtype)


@triton.jit
def load_token(
    k_new_ptr, v_new_ptr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr
):  # fmt: skip
    """A row's new key and value."""
    offs_d = tl.arange(0, BD)
    offs_v = tl.arange(0, BDV)
    key = tl.load(k_new_ptr + offs_d, mask=offs_d < D, cache_modifier=".cg")
    return key, tl.load(v_new_ptr + offs_v, mask=offs_v < DV, cache_modifier=".cg")


@triton.jit
def attend_pages(
    q, k_ptr, v_ptr, ids_ptr, mask_ptr, table_ptr, stride_table,
    stride_kp, stride_kt, stride_vp, stride_vt,
    b, start, end, base_page, first_pos, last_pos, dense, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    GP: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, DENSE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Eq. 5 over positions `first_pos .. last_pos - 1` of a page list, or from `base_page` on in a dense row.

    Returns the unnormalised output `[GP, BDV]`, the maximum logit (base 2) and the sum of exponentials `[GP]`.
    """
    # compilers that embed this kernel pass Python floats as float64
    scale = tl.full((), scale, tl.float32)
    softcap = tl.full((), softcap, tl.float32)
    offs_d = tl.arange(0, BD)
    offs_v = tl.arange(0, BDV)
    offs_t = tl.arange(0, BLOCK_T)
    m_i = tl.full((GP,), float("-inf"), tl.float32)
    l_i = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, BDV), tl.float32)
    for begin in tl.range(first_pos * P, last_pos * P, BLOCK_T, num_stages=STAGES):
        pos = begin // P + offs_t // P
        offs_in = begin % P + offs_t % min(P, BLOCK_T)
        if DENSE == ALL_ROWS:
            page = base_page + pos
            valid = pos < last_pos
        else:
            inside = pos < last_pos
            page = tl.load(ids_ptr + pos, mask=(inside & (not dense)) if DENSE == SOME_ROWS else inside, other=-1)
            if DENSE == SOME_ROWS:
                page = tl.where(dense & inside, base_page + pos, page)
            valid = page >= 0
        slot = page * P + offs_in
        valid = valid & (slot >= start) & (slot < end)
        if HAS_MASK:
            valid &= tl.load(mask_ptr + slot, mask=valid, other=0)
        tile_k = k_ptr
        tile_v = v_ptr
        if HAS_TABLE:
            physical = physical_page(table_ptr, stride_table, b, page, valid, True)
            offs_k = physical * stride_kp + offs_in * stride_kt
            offs_kv = physical * stride_vp + offs_in * stride_vt
        elif DENSE == ALL_ROWS:
            # 32 bits are enough from the first slot of the tile on
            first_slot = tl.cast(base_page * P + begin, tl.int64)
            tile_k += first_slot * stride_kt
            tile_v += first_slot * stride_vt
            offs_k = offs_t * stride_kt
            offs_kv = offs_t * stride_vt
        else:
            offs_k = slot.to(tl.int64) * stride_kt
            offs_kv = slot.to(tl.int64) * stride_vt
        # values first: the keys change their layout as soon as they are there, and later loads would wait for that
        v = tl.load(
            tile_v + offs_kv[:, None] + offs_v[None, :], mask=valid[:, None] & (offs_v < DV)[None, :], other=0.0
        )  # [BLOCK_T, BDV]
        k = tl.load(
            tile_k + offs_k[:, None] + offs_d[None, :], mask=valid[:, None] & (offs_d < D)[None, :], other=0.0
        )  # [BLOCK_T, BD]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [GP, BLOCK_T]
        if HAS_SOFTCAP:
            logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
        logits = tl.where(valid[None, :], logits * LOG2E, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(logits, axis=1))
        # a row without a valid token yet keeps a finite reference point
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(logits - m_ref[:, None])
        decay = tl.exp2(m_i - m_ref)
        l_i = l_i * decay + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        m_i = m_new
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["capacity", "dense_pages", "stride_mask", "stride_table"])
def _sparse_decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, len_ptr, start_ptr, mask_ptr, table_ptr,
    ids_ptr, k_new_ptr, v_new_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_vb, stride_vh, stride_vp, stride_vt, stride_ob, stride_oh,
    stride_len, stride_start, stride_mask, stride_table, stride_ib, stride_ih,
    stride_nb, stride_nh, stride_wb, stride_wh,
    capacity, dense_pages, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DENSE: tl.constexpr, HAS_NEW: tl.constexpr, AWAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 5. Program `(split, kv head, row)` attends to its slice of the listed pages.

    A row of at most `dense_pages` pages attends to all of them: those listed, or (`DENSE`) whatever the list says.
    `AWAIT`: the ids come from a launch that is still running. The last token of a row may be `HAS_NEW`, not in the
    cache yet.
    """
    if PDL:
        if not AWAIT:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    row = pid_b * tl.num_programs(1) + pid_h
    # what waits for nothing is asked for first
    q = load_query(q_ptr + pid_b * stride_qb, stride_qh, stride_qd, pid_h * G, k_ptr.dtype.element_ty, D, BD, G, GP)
    if HAS_NEW:
        key, value = load_token(
            k_new_ptr + pid_b * stride_nb + pid_h * stride_nh, v_new_ptr + pid_b * stride_wb + pid_h * stride_wh,
            D, DV, BD, BDV,
        )  # fmt: skip
    length, start, end, first_page, last_page = row_extent(
        len_ptr, start_ptr, stride_len, stride_start, pid_b, capacity, P, HAS_LENS, HAS_STARTS
    )
    row_k = k_ptr + pid_b * stride_kb + pid_h * stride_kh
    row_v = v_ptr + pid_b * stride_vb + pid_h * stride_vh
    row_mask = mask_ptr
    if HAS_MASK:
        row_mask += pid_b * stride_mask
    count = last_page - first_page
    dense = count <= dense_pages
    row_ids = ids_ptr + pid_b * stride_ib + pid_h * stride_ih
    listed = tl.where(dense, count, K)
    first_pos, last_pos = split_of(listed, split, SPLITS, 1 if P > BLOCK_T else BLOCK_T // P)
    if HAS_NEW:
        # the program of the last pages writes the new token, which it reads, as the launch that appends does
        if (first_pos < listed) & (last_pos == listed) & (length <= capacity):
            write_token(
                key, value, row_k, row_v, table_ptr, stride_table, stride_kp, stride_kt, stride_vp, stride_vt,
                pid_b, length - 1, P, D, DV, BD, BDV, HAS_TABLE,
            )  # fmt: skip
            tl.debug_barrier()
    if AWAIT:
        await_row(counter_ptr + row * COUNTERS + CHOSEN, 1)
    acc, m_i, l_i = attend_pages(
        q, row_k, row_v, row_ids, row_mask, table_ptr, stride_table, stride_kp, stride_kt, stride_vp, stride_vt,
        pid_b, start, end, first_page, first_pos, last_pos, dense, scale, softcap,
        P, D, DV, BD, BDV, GP, BLOCK_T, STAGES, DENSE, HAS_MASK, HAS_TABLE, HAS_SOFTCAP,
    )  # fmt: skip
    finish_row(
        acc, m_i, l_i, out_ptr + pid_b * stride_ob, stride_oh, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, row, pid_h * G,
        split, DV, BDV, G, GP, GM, SPLITS, AT_ONCE, HAS_SINKS, AWAIT,
    )  # fmt: skip
    if PDL and AWAIT:
        end_in_order(split + row)


class Launch(NamedTuple):
    """Tile, pipeline depth, warps and programs per row of a decode call."""

    block_t: int
    stages: int
    num_warps: int
    splits: int


# by the number of rows and whether pages are listed, if not by how many tokens there may be; splits are at most the
# next power of two of the tiles. Of the stages for listed pages the first one goes to their ids. Measured on an H200
LAUNCH = {
    "many": Launch(32, 4, 2, 1),
    "more": Launch(64, 2, 2, 4),
    "some": Launch(64, 1, 2, 8),
    "few": Launch(32, 1, 2, 32),
    "dense": Launch(16, 3, 1, 8),
    "short dense": Launch(64, 3, 4, 1),
    "few dense": Launch(32, 3, 2, 16),
    "few short dense": Launch(64, 1, 2, 16),
}


def launch_decode(rows: int, tokens: int, row_bytes: int, num_sms: int, dense: bool = False) -> Launch:
    """Launch settings for `rows` rows of `tokens` tokens whose keys (or values) take `row_bytes` each.

    Many rows fill the device alone, others are split until they do. `dense`: no pages are listed.
    """
    if rows >= 2 * num_sms:
        launch = LAUNCH["many"]
    elif not dense:
        launch = LAUNCH["few" if 3 * rows <= num_sms else "some" if 4 * rows < 3 * num_sms else "more"]
    elif 8 * rows <= num_sms:
        launch = LAUNCH["few short dense" if tokens <= 1024 else "few dense"]
    else:
        launch = LAUNCH["short dense" if 3 * rows > num_sms and tokens <= 256 else "dense"]
    if row_bytes > 256:
        launch = launch._replace(block_t=max(16, launch.block_t * 256 // row_bytes))
    tiles = triton.cdiv(tokens, launch.block_t)
    # partial results are merged in tiles of a power of two
    return launch._replace(splits=min(launch.splits, 1 << (tiles - 1).bit_length()))


class Attending(NamedTuple):
    """What every kernel that attends takes: tensors, strides, scalars and compile-time constants."""

    tensors: tuple
    strides: tuple
    constants: dict


def plan_attention(
    q, k, v, out, launch, *, page_size, seq_lens, seq_starts, token_mask, page_table, softcap, sinks, counters
) -> Attending:
    """Scratch memory, strides and constants of a call whose rows are split `launch.splits` times."""
    paged = page_table is not None
    batch, num_heads = q.shape[:2]
    num_kv_heads, head_dim, value_dim = k.shape[1], k.shape[-1], v.shape[-1]
    group = num_heads // num_kv_heads
    group_rows = triton.next_power_of_2(group)
    block_dv = max(16, triton.next_power_of_2(value_dim))
    parts = batch * num_kv_heads * launch.splits * group_rows if launch.splits > 1 else 1
    partial = torch.empty((parts, block_dv), dtype=torch.float32, device=q.device)
    extent = torch.empty((parts, 2), dtype=torch.float32, device=q.device)
    if counters is None:
        counters = torch.zeros(batch * num_kv_heads * ROW_COUNTERS, dtype=torch.int32, device=q.device)
    return Attending(
        (q, k, v, out, partial, extent, counters, sinks, seq_lens, seq_starts, token_mask, page_table),
        (
            *(q.stride(0), q.stride(1), q.stride(-1)),
            *token_strides(k, paged, page_size), *token_strides(v, paged, page_size), *out.stride()[:2],
            *(stride_of(x) for x in (seq_lens, seq_starts, token_mask, page_table)),
        ),
        {
            "P": page_size, "D": head_dim, "DV": value_dim,
            "BD": max(16, triton.next_power_of_2(head_dim)), "BDV": block_dv, "G": group,
            "GP": max(16, group_rows), "GM": group_rows,
            "BLOCK_T": launch.block_t, "STAGES": launch.stages, "SPLITS": launch.splits,
            # as many partial results as take 128 registers
            "AT_ONCE": min(launch.splits, max(1, 4096 * launch.num_warps // (group_rows * block_dv))),
            "HAS_LENS": seq_lens is not None, "HAS_STARTS": seq_starts is not None, "HAS_MASK": token_mask is not None,
            "HAS_TABLE": paged, "HAS_SOFTCAP": softcap is not None, "HAS_SINKS": sinks is not None,
        },
    )  # fmt: skip


def new_strides(new) -> tuple[int, int, int, int]:
    """Strides (row, head) of new keys and of new values."""
    return (0,) * 4 if new is None else (*new[0].stride()[:2], *new[1].stride()[:2])


def row_bytes(k, v) -> int:
    """Bytes of the keys or values of one token and head, as the tiles hold them."""
    return max(16, triton.next_power_of_2(max(k.shape[-1], v.shape[-1]))) * k.element_size()


def capacity_of(k, page_table, page_size: int) -> int:
    """Slots that a row can have."""
    return k.shape[2] if page_table is None else page_table.shape[1] * page_size


def launch_attend(
    call: Attending, page_ids, launch: Launch, *, capacity, softmax_scale, softcap, dense_pages=-1, new=None,
    waits=False, pdl=False,
):  # fmt: skip
    """One attention pass over listed pages, into the `out` of the call.

    Rows of at most `dense_pages` pages are dense. A token in `new` keys and values is the last one of its row. With
    `waits` the page ids come row by row from the launch before.
    """
    batch, num_kv_heads, num_kept = page_ids.shape
    _sparse_decode_fwd_kernel[(launch.splits, num_kv_heads, batch)](
        *call.tensors, page_ids, *(new or (None, None)), *call.strides, *page_ids.stride()[:2], *new_strides(new),
        capacity, dense_pages, softmax_scale, softcap or 0.0,
        K=num_kept, **call.constants, DENSE=(SOME_ROWS if dense_pages > num_kept else NO_ROWS).value,
        HAS_NEW=new is not None, AWAIT=waits, PDL=pdl,
        num_warps=launch.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def sparse_decode(q, k, v, page_ids, out, *, page_size, softmax_scale, softcap, page_table, **lengths):
    """Fills `out [B, H, 1, DV]`."""
    rows, num_kept = q.shape[0] * k.shape[1], page_ids.shape[-1]
    launch = launch_decode(rows, num_kept * page_size, row_bytes(k, v), target_of(q.device).num_sms)
    call = plan_attention(
        q, k, v, out, launch, page_size=page_size, softcap=softcap, page_table=page_table, counters=None, **lengths
    )
    capacity = capacity_of(k, page_table, page_size)
    launch_attend(call, page_ids, launch, capacity=capacity, softmax_scale=softmax_scale, softcap=softcap)
    return out
