"""Backward of soft-mask attention over the open tiles (Eq. 6). May import torch, triton, `_common` and `soft_mask_*`.

With z the logits, p = exp(z - lse), dz = p (do . v - delta): `d log g` of a page is the sum of dz over its tokens and
the G heads, and `d score = (1 - g) / temperature * d log g`. From there it flows into the features, `dfq = sum_p
dscore fp`, `dfp = sum_t dscore fq`, and, if asked for, into the threshold, `dtheta = -sum_p dscore`, half to each of
the pages that set it. dq and dfq come from one kernel (a program owns queries), dk, dv and dfp from another (a
program owns keys and walks the heads of its group too), so nothing is added atomically.
"""

import triton
import triton.language as tl

from .soft_mask_fwd import RUNTIME, capped_logits, load_keys, packed_rows, page_gate, row_gate, spread


@triton.jit
def _dq_tile(
    dq, dfq, dnq, dtheta, chunk_of, q, dout, lse, delta, fq, nq, theta, first_page, own_page, t_of_row,
    k_ptr, v_ptr, valid_ptr, fp_ptr, fs_ptr,
    stride_ks, stride_vs,
    tile, T, N, sink_pages, recent_pages, scale, softcap, inv_temperature,
    GROUP_POW2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_MASK: tl.constexpr, THRESHOLD_GRAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """What a tile adds to the gradients of its queries."""
    NC: tl.constexpr = BLOCK_S // CHUNK
    k, v, valid = load_keys(
        k_ptr, v_ptr, valid_ptr, stride_ks, stride_vs, tile, T, D, DV, BLOCK_D, BLOCK_DV, BLOCK_S, HAS_MASK, ON_EDGE
    )
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    log_gate, slack, fp, fs = row_gate(
        fq, nq, fp_ptr, fs_ptr, theta, first_page, own_page, tile, N, sink_pages, recent_pages, inv_temperature,
        PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, PRECISION, BLOCK_S, CHUNK,
    )  # fmt: skip
    offset = spread(log_gate, BLOCK_T, GROUP_POW2, NC, CHUNK) - lse[:, None]
    s, slope = capped_logits(dots, scale, softcap, HAS_SOFTCAP)
    p = tl.exp2(s + offset)  # [M, BLOCK_S]
    if ON_EDGE:
        p = tl.where((tile * BLOCK_S + tl.arange(0, BLOCK_S))[None, :] <= t_of_row[:, None], p, 0.0)
    if HAS_MASK:
        p = tl.where(valid[None, :], p, 0.0)
    dz = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    # a product with zeros and ones: sums across lanes take more time than the tensor cores here
    dchunk = tl.dot(dz.to(k.dtype), chunk_of, input_precision=PRECISION)  # [M, NC]
    dgate = tl.sum(tl.reshape(dchunk, (BLOCK_T, GROUP_POW2, NC)), axis=1) * slack
    dq = tl.dot((dz * slope).to(k.dtype), k, dq, input_precision=PRECISION)
    dfq = tl.dot(dgate.to(k.dtype), fp.to(k.dtype), dfq, input_precision=PRECISION)
    if HAS_SCALAR:
        dnq += dgate * fs[None, :]
    if THRESHOLD_GRAD:
        dtheta -= dgate
    return dq, dfq, dnq, dtheta


@triton.jit(do_not_specialize=RUNTIME)
def _soft_mask_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, fq_ptr, nq_ptr, fp_ptr, fs_ptr, theta_ptr, above_ptr, below_ptr,
    start_ptr, valid_ptr, list_ptr, count_ptr, dq_ptr, dfq_ptr, dnq_ptr, delta_ptr, dtheta_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ob,
    stride_oh, stride_ot, stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt, stride_start_b,
    stride_start_t, stride_valid,
    T, N, NQB, NKB, HK, sink_pages, recent_pages, scale, softcap, inv_temperature,
    GROUP: tl.constexpr, GROUP_POW2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    ROUND_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (block of queries from the last, b * HK) writes dfq, dnq, delta, dtheta, and dq but for the features."""
    pid_t = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    b = pid_bh // HK
    first_t = (pid_t * BLOCK_T).to(tl.int32)
    offs_m = tl.arange(0, BLOCK_T * GROUP_POW2)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    t_of_row = first_t + offs_m // GROUP_POW2
    g_of_row = offs_m % GROUP_POW2
    mask_m = (t_of_row < T) & (g_of_row < GROUP)
    heads = (pid_bh % HK) * GROUP + g_of_row
    t64 = t_of_row.to(tl.int64)[:, None]
    mask_d = mask_m[:, None] & (offs_d < D)
    mask_dv = mask_m[:, None] & (offs_dv < DV)
    q = tl.load(q_ptr + b * stride_qb + heads[:, None] * stride_qh + t64 * stride_qt + offs_d, mask=mask_d, other=0.0)
    out_rows = out_ptr + b * stride_ob + heads[:, None] * stride_oh + t64 * stride_ot
    dout_rows = dout_ptr + b * stride_dob + heads[:, None] * stride_doh + t64 * stride_dot
    dout = tl.load(dout_rows + offs_dv, mask=mask_dv, other=0.0)  # [M, BLOCK_DV]
    out = tl.load(out_rows + offs_dv, mask=mask_dv, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)  # [M]
    packed = packed_rows(pid_bh, first_t, T, GROUP_POW2, ROUND_T) + offs_m
    tl.store(delta_ptr + packed, delta)
    lse = tl.load(lse_ptr + packed)

    offs_t = first_t + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    row = pid_bh * T + offs_t
    offs_f = tl.arange(0, NUM_FEATURES)[None, :]
    fq = tl.load(fq_ptr + row[:, None] * NUM_FEATURES + offs_f, mask=mask_t[:, None], other=0.0)
    theta = tl.load(theta_ptr + row, mask=mask_t, other=float("-inf"))
    nq = tl.zeros([BLOCK_T], tl.float32)
    if HAS_SCALAR:
        nq = tl.load(nq_ptr + row, mask=mask_t, other=0.0)
    starts = start_ptr + b * stride_start_b + offs_t.to(tl.int64) * stride_start_t
    first_page = tl.load(starts, mask=mask_t, other=0).to(tl.int32) // PAGE_SIZE
    own_page = offs_t // PAGE_SIZE
    k_ptr += b * stride_kb + (pid_bh % HK) * stride_kh
    v_ptr += b * stride_vb + (pid_bh % HK) * stride_vh
    valid_ptr += b * stride_valid
    fp_ptr += pid_bh * N * NUM_FEATURES
    fs_ptr += pid_bh * N
    list_ptr += (pid_bh * NQB + pid_t) * NKB

    dq = tl.zeros([BLOCK_T * GROUP_POW2, BLOCK_D], tl.float32)
    dfq = tl.zeros([BLOCK_T, NUM_FEATURES], tl.float32)
    # summed over the chunks at the end
    NC: tl.constexpr = BLOCK_S // CHUNK
    dnq = tl.zeros([BLOCK_T, NC], tl.float32)
    dtheta = tl.zeros([BLOCK_T, NC], tl.float32)
    chunk_of = (tl.arange(0, BLOCK_S)[:, None] // CHUNK == tl.arange(0, NC)[None, :]).to(q.dtype)
    num_tiles = tl.load(count_ptr + pid_bh * NQB + pid_t)
    # the tiles on the diagonal are always listed, and last; they come first here, because the compiler makes every
    # product wait where the first loop of an accumulator may not run at all
    last_t = tl.minimum(first_t + BLOCK_T, T) - 1
    num_edge = tl.maximum(last_t // BLOCK_S - first_t // BLOCK_S + 1, 1)
    num_inner = num_tiles - num_edge
    tile = tl.load(list_ptr + num_inner)
    for j in range(num_edge):
        following = tl.load(list_ptr + tl.minimum(num_inner + j + 1, num_tiles - 1))
        dq, dfq, dnq, dtheta = _dq_tile(
            dq, dfq, dnq, dtheta, chunk_of, q, dout, lse, delta, fq, nq, theta, first_page, own_page, t_of_row,
            k_ptr, v_ptr, valid_ptr, fp_ptr, fs_ptr, stride_ks, stride_vs, tile, T, N,
            sink_pages, recent_pages, scale, softcap, inv_temperature,
            GROUP_POW2, D, DV, BLOCK_D, BLOCK_DV, PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, HAS_SOFTCAP, HAS_MASK,
            THRESHOLD_GRAD, PRECISION, BLOCK_T, BLOCK_S, CHUNK, True,
        )  # fmt: skip
        tile = following
    tile = tl.load(list_ptr)
    for j in range(num_inner):
        following = tl.load(list_ptr + j + 1)
        dq, dfq, dnq, dtheta = _dq_tile(
            dq, dfq, dnq, dtheta, chunk_of, q, dout, lse, delta, fq, nq, theta, first_page, own_page, t_of_row,
            k_ptr, v_ptr, valid_ptr, fp_ptr, fs_ptr, stride_ks, stride_vs, tile, T, N,
            sink_pages, recent_pages, scale, softcap, inv_temperature,
            GROUP_POW2, D, DV, BLOCK_D, BLOCK_DV, PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, HAS_SOFTCAP, HAS_MASK,
            THRESHOLD_GRAD, PRECISION, BLOCK_T, BLOCK_S, CHUNK, False,
        )  # fmt: skip
        tile = following

    dnq = tl.sum(dnq, axis=1)
    dtheta = tl.sum(dtheta, axis=1)
    if THRESHOLD_GRAD:
        above = tl.load(above_ptr + row, mask=mask_t, other=0)
        below = tl.load(below_ptr + row, mask=mask_t, other=0)
        fp_above = tl.load(fp_ptr + above.to(tl.int64)[:, None] * NUM_FEATURES + offs_f).to(tl.float32)
        fp_below = tl.load(fp_ptr + below.to(tl.int64)[:, None] * NUM_FEATURES + offs_f).to(tl.float32)
        dfq += 0.5 * dtheta[:, None] * (fp_above + fp_below)
        if HAS_SCALAR:
            dnq += 0.5 * dtheta * (tl.load(fs_ptr + above) + tl.load(fs_ptr + below))
        tl.store(dtheta_ptr + row, dtheta, mask=mask_t)
    # the temperature is applied in fp32 at the end: 1e-4 would take d score out of the range of fp16
    dfq_rows = dfq_ptr + row[:, None] * NUM_FEATURES + offs_f
    tl.store(dfq_rows, (dfq * inv_temperature).to(dfq_ptr.dtype.element_ty), mask=mask_t[:, None])
    if HAS_SCALAR:
        tl.store(dnq_ptr + row, dnq * inv_temperature, mask=mask_t)
    dq_rows = dq_ptr + b * stride_dqb + heads[:, None] * stride_dqh + t64 * stride_dqt
    tl.store(dq_rows + offs_d, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _dkv_step(
    dk, dv, dfp, dfs, k, v, fp, fs, valid, slots, pages, chunk_start, query_of, q_rows, dout_rows, row_start, first_t,
    lse_ptr, delta_ptr, fq_ptr, nq_ptr, theta_ptr, dtheta_ptr, above_ptr, below_ptr, start_ptr,
    stride_qt, stride_dot, stride_start_t,
    pid_bh, T, sink_pages, recent_pages, scale, softcap, inv_temperature,
    GROUP: tl.constexpr, GROUP_POW2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    STEP_T: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
    ON_EDGE: tl.constexpr,
):  # fmt: skip
    """What STEP_T queries add to the gradients of a tile of keys."""
    NC: tl.constexpr = BLOCK_S // CHUNK
    # a dot takes no fewer than 16 terms: with fewer queries a step, each stands there once for every part of its group
    PARTS: tl.constexpr = 16 // STEP_T if STEP_T < 16 else 1
    ROWS_T: tl.constexpr = STEP_T * PARTS
    ROWS_G: tl.constexpr = GROUP_POW2 // PARTS
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    offs_f = tl.arange(0, NUM_FEATURES)[None, :]
    offs_r = tl.arange(0, ROWS_T)
    offs_m = tl.arange(0, STEP_T * GROUP_POW2)
    g_of_row = offs_m % GROUP_POW2
    t_of_row = first_t + offs_m // GROUP_POW2
    mask_m = (t_of_row < T) & (g_of_row < GROUP)
    t64 = t_of_row.to(tl.int64)[:, None]
    q = tl.load(q_rows + t64 * stride_qt, mask=mask_m[:, None] & (offs_d < D), other=0.0)  # [M, BLOCK_D]
    dout = tl.load(dout_rows + t64 * stride_dot, mask=mask_m[:, None] & (offs_dv < DV), other=0.0)
    # rows without a query have dout = 0 and delta = 0, and add nothing
    lse = tl.load(lse_ptr + first_t * GROUP_POW2 + offs_m)
    delta = tl.load(delta_ptr + first_t * GROUP_POW2 + offs_m)
    offs_t = first_t + offs_r // PARTS
    mask_t = offs_t < T
    row = pid_bh * T + offs_t
    fq = tl.load(fq_ptr + row[:, None] * NUM_FEATURES + offs_f, mask=mask_t[:, None], other=0.0)
    theta = tl.load(theta_ptr + row, mask=mask_t, other=float("-inf"))
    if PACKED:
        start = tl.load(start_ptr + offs_t.to(tl.int64) * stride_start_t, mask=mask_t, other=0).to(tl.int32)
    else:
        start = tl.zeros([ROWS_T], tl.int32) + row_start
    score = tl.dot(fp, tl.trans(fq), input_precision=PRECISION)  # [NC, ROWS_T]
    if HAS_SCALAR:
        nq = tl.load(nq_ptr + row, mask=mask_t, other=0.0)
        score = tl.fma(fs[:, None], nq[None, :], score)
    log_gate, slack = page_gate(
        score, theta[None, :], pages[:, None], start[None, :] // PAGE_SIZE, (offs_t // PAGE_SIZE)[None, :],
        sink_pages, recent_pages, inv_temperature,
    )  # fmt: skip
    dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_S, M]
    s, slope = capped_logits(dots, scale, softcap, HAS_SOFTCAP)
    p = tl.exp2(s + (spread(log_gate, NC, CHUNK, ROWS_T, ROWS_G) - lse[None, :]))  # [BLOCK_S, M]
    if ON_EDGE:
        p = tl.where(slots[:, None] <= t_of_row[None, :], p, 0.0)
    if HAS_MASK:
        p = tl.where(valid[:, None], p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dz = p * (dp - delta[None, :])
    dquery = tl.dot(dz.to(q.dtype), query_of, input_precision=PRECISION)  # [BLOCK_S, ROWS_T]
    dgate = tl.sum(tl.reshape(dquery, (NC, CHUNK, ROWS_T)), axis=1) * slack
    dk = tl.dot((dz * slope).to(q.dtype), q, dk, input_precision=PRECISION)
    if THRESHOLD_GRAD:
        # both pages that set the threshold get half of its gradient, once each
        half = 0.5 * tl.load(dtheta_ptr + row, mask=mask_t & (offs_r % PARTS == 0), other=0.0)[None, :]
        page_once = tl.where(chunk_start % PAGE_SIZE == 0, pages, -1)[:, None]
        dgate += tl.where(page_once == tl.load(above_ptr + row, mask=mask_t, other=-1)[None, :], half, 0.0)
        dgate += tl.where(page_once == tl.load(below_ptr + row, mask=mask_t, other=-1)[None, :], half, 0.0)
    dfp = tl.dot(dgate.to(q.dtype), fq.to(q.dtype), dfp, input_precision=PRECISION)
    if HAS_SCALAR:
        dfs += dgate * nq[None, :]
    return dk, dv, dfp, dfs


@triton.jit(do_not_specialize=RUNTIME)
def _soft_mask_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, fq_ptr, nq_ptr, fp_ptr, fs_ptr, theta_ptr, dtheta_ptr,
    above_ptr, below_ptr, start_ptr, valid_ptr, list_ptr, count_ptr, dk_ptr, dv_ptr, dfp_ptr, dfs_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_dob,
    stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_start_b,
    stride_start_t, stride_valid,
    T, N, NQB, NKB, HK, sink_pages, recent_pages, scale, softcap, inv_temperature,
    GROUP: tl.constexpr, GROUP_POW2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, THRESHOLD_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    ROUND_T: tl.constexpr, BLOCK_T: tl.constexpr, STEP_T: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Program (b * HK, block of keys) writes dv, dfp and dfs of its pages, and dk but for the statistics."""
    # the blocks with most queries start first, of all heads: one of them at the end would run alone
    pid_bh = tl.program_id(0).to(tl.int64)
    pid_k = tl.program_id(1).to(tl.int64)
    b = pid_bh // HK
    tile = pid_k.to(tl.int32)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    k_ptr += b * stride_kb + (pid_bh % HK) * stride_kh
    v_ptr += b * stride_vb + (pid_bh % HK) * stride_vh
    valid_ptr += b * stride_valid
    k, v, valid = load_keys(
        k_ptr, v_ptr, valid_ptr, stride_ks, stride_vs, tile, T, D, DV, BLOCK_D, BLOCK_DV, BLOCK_S, HAS_MASK, True
    )
    NC: tl.constexpr = BLOCK_S // CHUNK
    slots = tile * BLOCK_S + offs_s
    chunk_start = tile * BLOCK_S + tl.arange(0, NC) * CHUNK
    pages = chunk_start // PAGE_SIZE
    offs_f = tl.arange(0, NUM_FEATURES)[None, :]
    mask_n = (pages < N)[:, None]
    fp = tl.load(fp_ptr + (pid_bh * N + pages)[:, None] * NUM_FEATURES + offs_f, mask=mask_n, other=0.0)
    fs = tl.zeros([NC], tl.float32)
    if HAS_SCALAR:
        fs = tl.load(fs_ptr + pid_bh * N + pages, mask=pages < N, other=0.0)

    # a dot takes no fewer than 16 terms: see the step
    ROWS_T: tl.constexpr = STEP_T * (16 // STEP_T if STEP_T < 16 else 1)
    offs_m = tl.arange(0, STEP_T * GROUP_POW2)
    heads = (pid_bh % HK) * GROUP + offs_m % GROUP_POW2
    q_rows = q_ptr + b * stride_qb + (heads * stride_qh)[:, None] + offs_d
    dout_rows = dout_ptr + b * stride_dob + (heads * stride_doh)[:, None] + offs_dv
    query_of = (offs_m[:, None] // (STEP_T * GROUP_POW2 // ROWS_T) == tl.arange(0, ROWS_T)[None, :]).to(k.dtype)
    packed = packed_rows(pid_bh, 0, T, GROUP_POW2, ROUND_T)
    lse_ptr += packed
    delta_ptr += packed
    start_ptr += b * stride_start_b
    row_start = tl.load(start_ptr).to(tl.int32)  # of all queries, unless documents are packed
    list_ptr += (pid_bh * NKB + pid_k) * NQB
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    dfp = tl.zeros([NC, NUM_FEATURES], tl.float32)
    dfs = tl.zeros([NC, ROWS_T], tl.float32)  # summed over the queries at the end
    # an open tile is walked in steps of STEP_T queries: dk and dv leave few registers
    STEPS: tl.constexpr = BLOCK_T // STEP_T
    # the tiles on the diagonal are always listed, and first; a loop that may run not once makes the products wait
    count = tl.maximum(tl.load(count_ptr + pid_bh * NKB + pid_k), 1)
    num_edge = (tile * BLOCK_S + BLOCK_S + BLOCK_T - 2) // BLOCK_T - tile * BLOCK_S // BLOCK_T
    num_edge = tl.maximum(tl.minimum(num_edge, count), 1) * STEPS
    num_steps = count * STEPS
    block = tl.load(list_ptr)
    for j in range(num_edge):
        following = tl.load(list_ptr + tl.minimum(j + 1, num_steps - 1) // STEPS)
        dk, dv, dfp, dfs = _dkv_step(
            dk, dv, dfp, dfs, k, v, fp, fs, valid, slots, pages, chunk_start, query_of, q_rows, dout_rows, row_start,
            block * BLOCK_T + j % STEPS * STEP_T, lse_ptr, delta_ptr, fq_ptr, nq_ptr, theta_ptr, dtheta_ptr,
            above_ptr, below_ptr, start_ptr, stride_qt, stride_dot, stride_start_t, pid_bh, T,
            sink_pages, recent_pages, scale, softcap, inv_temperature,
            GROUP, GROUP_POW2, D, DV, BLOCK_D, BLOCK_DV, PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, HAS_SOFTCAP, HAS_MASK,
            THRESHOLD_GRAD, PRECISION, STEP_T, BLOCK_S, CHUNK, PACKED, True,
        )  # fmt: skip
        block = following
    for j in range(num_edge, num_steps):
        following = tl.load(list_ptr + tl.minimum(j + 1, num_steps - 1) // STEPS)
        dk, dv, dfp, dfs = _dkv_step(
            dk, dv, dfp, dfs, k, v, fp, fs, valid, slots, pages, chunk_start, query_of, q_rows, dout_rows, row_start,
            block * BLOCK_T + j % STEPS * STEP_T, lse_ptr, delta_ptr, fq_ptr, nq_ptr, theta_ptr, dtheta_ptr,
            above_ptr, below_ptr, start_ptr, stride_qt, stride_dot, stride_start_t, pid_bh, T,
            sink_pages, recent_pages, scale, softcap, inv_temperature,
            GROUP, GROUP_POW2, D, DV, BLOCK_D, BLOCK_DV, PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, HAS_SOFTCAP, HAS_MASK,
            THRESHOLD_GRAD, PRECISION, STEP_T, BLOCK_S, CHUNK, PACKED, False,
        )  # fmt: skip
        block = following

    mask_s = (slots < T)[:, None]
    slot64 = slots.to(tl.int64)[:, None]
    dk_rows = dk_ptr + b * stride_dkb + (pid_bh % HK) * stride_dkh + slot64 * stride_dks
    dv_rows = dv_ptr + b * stride_dvb + (pid_bh % HK) * stride_dvh + slot64 * stride_dvs
    tl.store(dk_rows + offs_d, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_s & (offs_d < D))
    tl.store(dv_rows + offs_dv, dv.to(dv_ptr.dtype.element_ty), mask=mask_s & (offs_dv < DV))
    # chunks of one page are added up; pages larger than the tile are added up by the caller
    PAGES: tl.constexpr = BLOCK_S // PAGE_SIZE if PAGE_SIZE < BLOCK_S else 1
    dfp = tl.sum(tl.reshape(dfp, (PAGES, NC // PAGES, NUM_FEATURES)), axis=1) * inv_temperature
    dfs = tl.sum(tl.reshape(tl.sum(dfs, axis=1), (PAGES, NC // PAGES)), axis=1) * inv_temperature
    page_row = (pid_bh * NKB + pid_k) * PAGES + tl.arange(0, PAGES)
    tl.store(dfp_ptr + page_row[:, None] * NUM_FEATURES + offs_f, dfp)
    if HAS_SCALAR:
        tl.store(dfs_ptr + page_row, dfs)
