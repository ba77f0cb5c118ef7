"""Forward of soft-mask attention over the open tiles (Eq. 6). May import torch, triton, `_common` and `soft_mask_*`.

One program holds BLOCK_T queries of all G heads of a kv head: row `r` of its tile is query `r // G`, head `r % G`, so
the gate is computed once for the group and spread over heads and tokens. A tile of BLOCK_S keys is cut into chunks of
CHUNK tokens (a page, or a part of one), and a chunk has one gate per query.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# what varies from call to call must not make the compiler specialise on it
LENGTHS = ["T", "N", "NQB", "NKB", "HK", "stride_start_b", "stride_start_t", "stride_valid"]
RUNTIME = [*LENGTHS, "sink_pages", "recent_pages"]


@triton.jit
def log2_of_1_plus(e):
    """log2(1 + e) of `e` in [0, 1] within 2e-7: a polynomial takes a third of the instructions of `tl.log2`."""
    y = tl.fma(e, -0.009309018, 0.052058425)
    y = tl.fma(e, y, -0.13752043)
    y = tl.fma(e, y, 0.24186401)
    y = tl.fma(e, y, -0.34730074)
    y = tl.fma(e, y, 0.47868362)
    y = tl.fma(e, y, -0.72116578)
    return e * tl.fma(e, y, 1.4426899)


@triton.jit
def page_gate(score, theta, page, first_page, own_page, sink_pages, recent_pages, inv_temperature):
    """log2 g (-inf for pages the query does not see), and 1 - g where the gate is soft, else 0 (Eq. 6)."""
    soft = (page >= first_page + sink_pages) & (page <= own_page - recent_pages) & (theta > float("-inf"))
    x = tl.maximum((score - theta) * (inv_temperature * LOG2E), -1e30)
    log_gate = tl.minimum(x, 0.0) - log2_of_1_plus(tl.exp2(-tl.abs(x)))
    # sigmoid(-x) = sigmoid(x) / exp(x)
    slack = tl.where(soft, tl.exp2(log_gate - x), 0.0)
    log_gate = tl.where(soft, log_gate, 0.0)
    return tl.where((page >= first_page) & (page <= own_page), log_gate, float("-inf")), slack


@triton.jit
def capped_logits(dots, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in units of log 2, and the slope of the softcap."""
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(dots * (scale / softcap * 2.0 * LOG2E)))
        return tanh * (softcap * LOG2E), 1.0 - tanh * tanh
    else:
        return dots * (scale * LOG2E), 1.0


@triton.jit
def load_keys(
    k_ptr, v_ptr, valid_ptr,
    stride_ks, stride_vs,
    tile, S,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile, and which of its slots count; `[BLOCK_S, *]`."""
    offs = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    start = tile * BLOCK_S
    valid = tl.full([BLOCK_S], True, tl.int1)
    if ON_EDGE:
        valid = start + offs < S
    if HAS_MASK:
        valid = valid & (tl.load(valid_ptr + start + offs, mask=start + offs < S, other=0) != 0)
    k_ptr += start.to(tl.int64) * stride_ks
    v_ptr += start.to(tl.int64) * stride_vs
    if HAS_MASK or ON_EDGE or D < BLOCK_D:
        mask = valid[:, None] & (offs_d < D)[None, :]
        k = tl.load(k_ptr + offs[:, None] * stride_ks + offs_d[None, :], mask=mask, other=0.0)
    else:
        k = tl.load(k_ptr + offs[:, None] * stride_ks + offs_d[None, :])
    if HAS_MASK or ON_EDGE or DV < BLOCK_DV:
        mask = valid[:, None] & (offs_dv < DV)[None, :]
        v = tl.load(v_ptr + offs[:, None] * stride_vs + offs_dv[None, :], mask=mask, other=0.0)
    else:
        v = tl.load(v_ptr + offs[:, None] * stride_vs + offs_dv[None, :])
    return k, v, valid


@triton.jit
def row_gate(
    fq, nq,
    fp_ptr, fs_ptr,
    theta, first_page, own_page, tile, N, sink_pages, recent_pages, inv_temperature,
    PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gate of the chunks of a tile for each query: log2 g and 1 - g `[BLOCK_T, NC]`; features of the chunks."""
    pages = (tile * BLOCK_S + tl.arange(0, BLOCK_S // CHUNK) * CHUNK) // PAGE_SIZE
    offs_f = tl.arange(0, NUM_FEATURES)
    here = pages < N
    fp = tl.load(fp_ptr + pages[:, None] * NUM_FEATURES + offs_f[None, :], mask=here[:, None], other=0.0)
    score = tl.dot(fq, tl.trans(fp), input_precision=PRECISION)
    fs = tl.zeros([BLOCK_S // CHUNK], tl.float32)
    if HAS_SCALAR:
        fs = tl.load(fs_ptr + pages, mask=here, other=0.0)
        # a plain sum would become the accumulator of the dot, where the compiler does not prefetch what it reads
        score = tl.fma(nq[:, None], fs[None, :], score)
    log_gate, slack = page_gate(
        score, theta[:, None], pages[None, :], first_page[:, None], own_page[:, None],
        sink_pages, recent_pages, inv_temperature,
    )  # fmt: skip
    return log_gate, slack, fp, fs


@triton.jit
def spread(x, A: tl.constexpr, REPEAT_A: tl.constexpr, C: tl.constexpr, REPEAT_C: tl.constexpr):
    """`[A, C]` to `[A * REPEAT_A, C * REPEAT_C]`, each number repeated in both directions."""
    x = tl.broadcast_to(x[:, None, :, None], (A, REPEAT_A, C, REPEAT_C))
    return tl.reshape(x, (A * REPEAT_A, C * REPEAT_C))


@triton.jit
def packed_rows(pid_bh, first_t, T, GROUP_POW2: tl.constexpr, ROUND_T: tl.constexpr):
    """Where the rows of a tile begin in `[B * HK, T rounded up, GROUP_POW2]`: they are neighbours and need no mask."""
    return (pid_bh * ((T + ROUND_T - 1) // ROUND_T * ROUND_T) + first_t) * GROUP_POW2


@triton.jit
def _attend_tile(
    m_i, l_i, acc, q, fq, nq, theta, first_page, own_page, t_of_row,
    k_ptr, v_ptr, valid_ptr, fp_ptr, fs_ptr,
    stride_ks, stride_vs,
    tile, T, N, sink_pages, recent_pages, scale, softcap, inv_temperature,
    GROUP_POW2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    k, v, valid = load_keys(
        k_ptr, v_ptr, valid_ptr, stride_ks, stride_vs, tile, T, D, DV, BLOCK_D, BLOCK_DV, BLOCK_S, HAS_MASK, ON_EDGE
    )
    log_gate, _, _, _ = row_gate(
        fq, nq, fp_ptr, fs_ptr, theta, first_page, own_page, tile, N, sink_pages, recent_pages, inv_temperature,
        PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, PRECISION, BLOCK_S, CHUNK,
    )  # fmt: skip
    s, _ = capped_logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, HAS_SOFTCAP)
    s += spread(log_gate, BLOCK_T, GROUP_POW2, BLOCK_S // CHUNK, CHUNK)  # [M, BLOCK_S]
    if ON_EDGE:
        s = tl.where((tile * BLOCK_S + tl.arange(0, BLOCK_S))[None, :] <= t_of_row[:, None], s, float("-inf"))
    if HAS_MASK:
        s = tl.where(valid[None, :], s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, axis=1))
    # rows that have seen nothing yet keep m = -inf, and -inf - -inf is NaN
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_i, acc


@triton.jit(do_not_specialize=RUNTIME)
def _soft_mask_fwd_attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, fq_ptr, nq_ptr, fp_ptr, fs_ptr, theta_ptr, start_ptr, valid_ptr, sink_ptr,
    list_ptr, count_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ob,
    stride_oh, stride_ot, stride_start_b, stride_start_t, stride_valid,
    T, N, NQB, NKB, HK, sink_pages, recent_pages, scale, softcap, inv_temperature,
    GROUP: tl.constexpr, GROUP_POW2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr,
    ROUND_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (block of queries from the last, b * HK) writes out and log-sum-exp (base 2, +inf if empty): Eq. 6."""
    pid_t = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    b = pid_bh // HK
    first_t = (pid_t * BLOCK_T).to(tl.int32)
    offs_m = tl.arange(0, BLOCK_T * GROUP_POW2)
    offs_d = tl.arange(0, BLOCK_D)
    t_of_row = first_t + offs_m // GROUP_POW2
    g_of_row = offs_m % GROUP_POW2
    mask_m = (t_of_row < T) & (g_of_row < GROUP)
    heads = (pid_bh % HK) * GROUP + g_of_row
    q_rows = q_ptr + b * stride_qb + heads[:, None] * stride_qh + t_of_row.to(tl.int64)[:, None] * stride_qt
    q = tl.load(q_rows + offs_d[None, :], mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)  # [M, BLOCK_D]

    offs_t = first_t + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    row = pid_bh * T + offs_t
    offs_f = tl.arange(0, NUM_FEATURES)
    fq = tl.load(fq_ptr + row[:, None] * NUM_FEATURES + offs_f[None, :], mask=mask_t[:, None], other=0.0)
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
    m_i = tl.full([BLOCK_T * GROUP_POW2], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_T * GROUP_POW2], tl.float32)
    if HAS_SINKS:
        m_i = tl.load(sink_ptr + heads, mask=g_of_row < GROUP, other=0.0).to(tl.float32) * LOG2E
        l_i += 1.0
    acc = tl.zeros([BLOCK_T * GROUP_POW2, BLOCK_DV], tl.float32)
    # the tiles on the diagonal are always listed, and last
    last_t = tl.minimum(first_t + BLOCK_T, T) - 1
    num_tiles = tl.load(count_ptr + pid_bh * NQB + pid_t)
    num_inner = num_tiles - (last_t // BLOCK_S - first_t // BLOCK_S + 1)
    # read one step ahead: copies whose address is read in the same step are not issued early
    tile = tl.load(list_ptr)
    for j in range(num_inner):
        following = tl.load(list_ptr + j + 1)
        m_i, l_i, acc = _attend_tile(
            m_i, l_i, acc, q, fq, nq, theta, first_page, own_page, t_of_row,
            k_ptr, v_ptr, valid_ptr, fp_ptr, fs_ptr, stride_ks, stride_vs, tile, T, N,
            sink_pages, recent_pages, scale, softcap, inv_temperature,
            GROUP_POW2, D, DV, BLOCK_D, BLOCK_DV, PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, HAS_SOFTCAP, HAS_MASK,
            PRECISION, BLOCK_T, BLOCK_S, CHUNK, False,
        )  # fmt: skip
        tile = following
    for j in range(num_inner, num_tiles):
        following = tl.load(list_ptr + tl.minimum(j + 1, num_tiles - 1))
        m_i, l_i, acc = _attend_tile(
            m_i, l_i, acc, q, fq, nq, theta, first_page, own_page, t_of_row,
            k_ptr, v_ptr, valid_ptr, fp_ptr, fs_ptr, stride_ks, stride_vs, tile, T, N,
            sink_pages, recent_pages, scale, softcap, inv_temperature,
            GROUP_POW2, D, DV, BLOCK_D, BLOCK_DV, PAGE_SIZE, NUM_FEATURES, HAS_SCALAR, HAS_SOFTCAP, HAS_MASK,
            PRECISION, BLOCK_T, BLOCK_S, CHUNK, True,
        )  # fmt: skip
        tile = following

    empty = l_i == 0.0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = tl.where(empty, float("inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_out = mask_m[:, None] & (offs_dv < DV)[None, :]
    out_rows = out_ptr + b * stride_ob + heads[:, None] * stride_oh + t_of_row.to(tl.int64)[:, None] * stride_ot
    tl.store(out_rows + offs_dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask_out)
    tl.store(lse_ptr + packed_rows(pid_bh, first_t, T, GROUP_POW2, ROUND_T) + offs_m, lse)
