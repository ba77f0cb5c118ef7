"""Sparse decode (Eq. 5) and the whole step: dense when all pages are kept, otherwise exactly the kept tokens."""

import pytest
import torch
import torch.nn.functional as F

from tests.numerics import assert_close_to_oracle
from tests.reference import naive
from unique_attention import reference
from unique_attention.settings import GROUP_REDUCES, SCORES, STATS_DTYPES, UniqueConfig

F64 = torch.float64
SMALL = UniqueConfig(page_size=4, budget=24, stats_dtype="fp32")  # 6 pages


def inputs(batch=2, heads=4, kv_heads=2, slots=64, dim=8, value_dim=6, dtype=F64):
    q = torch.randn(batch, heads, 1, dim, dtype=dtype)
    k = torch.randn(batch, kv_heads, slots, dim, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, slots, value_dim, dtype=dtype)


def step(q, k, v, config=SMALL, **kwargs):
    rows = {name: kwargs[name] for name in ("seq_lens", "seq_starts", "token_mask", "page_table") if name in kwargs}
    stats = reference.page_stats(
        k, page_size=config.page_size, score=config.score, stats_dtype=config.stats_dtype, **rows
    )
    return reference.unique_decode(q, k, v, stats, config=config, **kwargs)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("group_reduce", GROUP_REDUCES)
def test_decode_equals_sdpa_when_all_pages_are_kept(score, group_reduce):
    q, k, v = inputs(slots=61)
    config = UniqueConfig(page_size=4, budget=64, score=score, group_reduce=group_reduce, stats_dtype="int4")
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(step(q, k, v, config), dense)
    # a capacity beyond the budget, but rows within it: the scores are computed and must not matter
    padded = [F.pad(x, (0, 0, 0, 39), value=float("nan")) for x in (k, v)]
    torch.testing.assert_close(step(q, *padded, config, seq_lens=torch.tensor([61, 61])), dense)


@pytest.mark.parametrize("budget_pages", [15, 16, 17])
def test_rows_are_dense_exactly_up_to_the_boundary(budget_pages):
    q, k, v = inputs(slots=64)  # 16 pages
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    out, ids = step(q, k, v, SMALL.replace(budget=4 * budget_pages), return_page_ids=True)
    assert ids.shape == (2, 2, budget_pages) and (ids >= 0).sum(-1).eq(min(16, budget_pages)).all()
    assert torch.allclose(out, dense, atol=1e-12) == (budget_pages >= 16)


@pytest.mark.parametrize("padded", [False, True])
def test_short_rows_are_dense_below_the_threshold(padded):
    q, k, v = inputs(batch=4, slots=64)
    lens = {"seq_lens": torch.tensor([22, 40, 45, 64])}  # 6, 10, 12 and 16 pages
    if padded:
        lens["seq_starts"] = torch.tensor([0, 3, 11, 20])  # 6, 10, 10 and 11 pages
    dense = step(q, k, v, SMALL.replace(budget=64), **lens)
    sparse, kept = step(q, k, v, **lens, return_page_ids=True)
    out, ids = step(q, k, v, **lens, return_page_ids=True, dense_below=43)  # 10 whole pages
    is_dense = [True, True, padded, False]
    for row, whole in enumerate(is_dense):
        torch.testing.assert_close(out[row], (dense if whole else sparse)[row])
        # a row of at most K pages has them all listed either way; the other dense ones have no selection
        assert torch.equal(ids[row], torch.full_like(kept[row], -1) if whole and row else kept[row])
    assert not torch.allclose(sparse[1:], dense[1:], atol=1e-3)
    # below the budget the threshold changes nothing
    torch.testing.assert_close(step(q, k, v, **lens, dense_below=20), sparse)
    # and beyond the capacity all rows are dense
    torch.testing.assert_close(step(q, k, v, **lens, dense_below=1000), dense)


def test_decode_differs_from_dense_when_pages_are_dropped():
    q, k, v = inputs()
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert ((step(q, k, v) - dense).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_sparse_decode_equals_attention_over_the_kept_tokens(softcap, with_sinks, with_mask):
    q, k, v = inputs(batch=3, heads=6)
    lens, starts = torch.tensor([64, 38, 21]), torch.tensor([0, 7, 2])
    pages = [[[0, 3, 9, 15], [1, 2, 14, 15]], [[1, 5, 9], [2, 8, 9]], [[0, 5], [0, 1, 2, 3, 4, 5]]]
    ids = torch.full((3, 2, 7), -1, dtype=torch.int32)
    for b, row in enumerate(pages):
        for h, kept in enumerate(row):
            ids[b, h, : len(kept)] = torch.tensor(kept)
    mask = (torch.rand(3, 64) < 0.7) if with_mask else None
    sinks = torch.randn(6, dtype=F64) if with_sinks else None
    kwargs = {"seq_lens": lens, "seq_starts": starts, "softcap": softcap, "sinks": sinks}
    got = reference.sparse_decode(q, k, v, ids, page_size=4, token_mask=mask, softmax_scale=0.7, **kwargs)
    expected = naive.decode(q, k, v, pages, 4, mask=mask, scale=0.7, **kwargs)
    torch.testing.assert_close(got, expected)


def test_slots_that_hold_no_token_may_hold_nan():
    q, k, v = inputs(slots=32)
    lens, starts = torch.tensor([30, 13]), torch.tensor([5, 0])
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[:, 9] = False
    slot = torch.arange(32)
    unused = ~((slot < lens[:, None]) & (slot >= starts[:, None]) & mask)[:, None, :, None]
    rows = {"seq_lens": lens, "seq_starts": starts, "token_mask": mask}
    clean = step(q, k, v, **rows)
    assert clean.isfinite().all()
    assert torch.equal(
        step(q, k.masked_fill(unused, float("nan")), v.masked_fill(unused, float("nan")), **rows), clean
    )


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_rows_without_tokens_give_zero(sinks):
    q, k, v = inputs(dtype=torch.float32)
    out = step(q, k, v, seq_lens=torch.tensor([0, 64]), sinks=sinks)
    assert (out[0] == 0).all() and (out[1] != 0).all()
    out = step(q, k, v, seq_lens=torch.tensor([33, 64]), seq_starts=torch.tensor([33, 0]), sinks=sinks)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("stats_dtype", ["fp32", "fp8"])
def test_ragged_rows_decode_as_they_do_alone(score, stats_dtype):
    q, k, v = inputs(batch=4, dtype=torch.float32)
    lens, starts = torch.tensor([64, 41, 9, 50]), torch.tensor([0, 10, 3, 0])
    config = SMALL.replace(score=score, stats_dtype=stats_dtype)
    out, ids = step(q, k, v, config, seq_lens=lens, seq_starts=starts, return_page_ids=True)
    for b in range(4):
        row = slice(b, b + 1)
        cut = (q[row], k[row, :, : lens[b]], v[row, :, : lens[b]])
        alone, alone_ids = step(*cut, config, seq_starts=starts[row], return_page_ids=True)
        assert torch.equal(ids[row], alone_ids)
        torch.testing.assert_close(out[row], alone)


def test_rows_do_not_depend_on_their_place_in_the_batch():
    q, k, v = inputs(batch=3)
    lens, order = torch.tensor([64, 41, 30]), [2, 0, 1]
    out = step(q, k, v, seq_lens=lens)
    torch.testing.assert_close(step(q[order], k[order], v[order], seq_lens=lens[order]), out[order])


def test_page_table_equals_contiguous_and_pages_may_be_shared():
    q, k, v = inputs(batch=2, slots=64)
    k[1, :, :32], v[1, :, :32] = k[0, :, :32], v[0, :, :32]  # a common prefix of eight pages
    table = torch.randperm(40)[:32].reshape(2, 16).int()
    table[1, :8] = table[0, :8]
    pools = []
    for x in (k, v):
        pool = torch.full((40, 2, 4, x.shape[-1]), float("nan"), dtype=F64)
        pool[table.long()] = x.unflatten(2, (16, 4)).transpose(1, 2)
        pools.append(pool)
    lens = torch.tensor([64, 50])
    flat, flat_ids = step(q, k, v, seq_lens=lens, return_page_ids=True)
    paged, ids = step(q, *pools, seq_lens=lens, page_table=table, return_page_ids=True)
    assert torch.equal(ids, flat_ids)
    torch.testing.assert_close(paged, flat)


def test_one_page_set_per_kv_head():
    q, k, v = inputs(batch=1, heads=4)
    out, ids = step(q, k, v, return_page_ids=True)
    assert ids.shape == (1, 2, 6)
    other = k.clone()
    other[:, 1] = torch.randn_like(k[:, 1])
    changed, changed_ids = step(q, other, v, return_page_ids=True)
    assert torch.equal(changed_ids[:, 0], ids[:, 0]) and torch.equal(changed[:, :2], out[:, :2])
    assert not torch.equal(changed_ids[:, 1], ids[:, 1])


def test_permuting_keys_inside_an_old_page_changes_nothing():
    q, k, v = inputs()
    order = torch.arange(64)
    order[8:12] = torch.tensor([10, 8, 11, 9])
    torch.testing.assert_close(step(q, k[:, :, order], v[:, :, order]), step(q, k, v))


@pytest.mark.parametrize("stats_dtype", STATS_DTYPES)
def test_token_by_token_equals_chunks_equals_all_at_once(stats_dtype):
    q, k, v = inputs(batch=1, slots=64, dtype=torch.float32)
    config = SMALL.replace(stats_dtype=stats_dtype)
    settings = {"page_size": 4, "score": "scalar", "stats_dtype": stats_dtype}
    queries = torch.randn(64, 1, 4, 1, 8)
    results = {}
    for chunk in (1, 7, 64):
        k_cache, v_cache = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
        stats = reference.empty_stats((1, 2, 16), 8, "scalar", stats_dtype, k)
        for i in range(0, 64, chunk):
            lens = torch.tensor([min(i + chunk, 64)])
            new = slice(i, i + chunk)
            reference.append_tokens(k_cache, v_cache, stats, k[:, :, new], v[:, :, new], lens, **settings)
            if lens.item() in (7, 14, 35, 56, 63, 64):
                out = reference.unique_decode(
                    queries[lens.item() - 1], k_cache, v_cache, stats, config=config, seq_lens=lens
                )
                assert torch.equal(results.setdefault(lens.item(), out), out)
    assert set(results) == {7, 14, 35, 56, 63, 64}


def test_past_steps_do_not_see_later_tokens():
    q, k, v = inputs()
    lens = torch.tensor([45, 30])
    later = torch.arange(64)[None, None, :, None] >= lens[:, None, None, None]
    changed = k + 5 * later, v - 3 * later
    assert torch.equal(step(q, *changed, seq_lens=lens), step(q, k, v, seq_lens=lens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_accumulate_in_fp32(dtype):
    q, k, v = (x.to(dtype) for x in inputs(slots=512, dim=64, value_dim=64, dtype=torch.float32))
    config = UniqueConfig(page_size=4, budget=256, stats_dtype="fp32")
    oracle, ids = step(q.double(), k.double(), v.double(), config, return_page_ids=True)
    out = reference.sparse_decode(q, k, v, ids, page_size=4)
    assert out.dtype == dtype
    assert_close_to_oracle(out, oracle, oracle.to(dtype), dtype)
    # nothing but the last rounding: a sum or softmax in the low precision would move most results
    assert (out == oracle.to(dtype)).float().mean() > 0.97


def test_strided_caches_give_the_same_output():
    q, k, v = inputs()
    strided = [torch.stack([x, x], -2).flatten(2, 3)[:, :, ::2] for x in (k, v)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(step(q, *strided), step(q, k, v))


def test_every_score_finds_a_page_that_outweighs_all_others():
    q, k, v = inputs(batch=1, heads=2, kv_heads=2)
    k = 0.1 * k
    k[0, :, 20:24] = 10 * F.normalize(q[0, :, 0], dim=-1)[:, None]
    for score in SCORES:
        _, ids = step(q, k, v, SMALL.replace(score=score, budget=16), return_page_ids=True)
        assert (ids == 5).any(-1).all(), score


def test_tolerance_rule_catches_nan_and_errors():
    oracle = torch.randn(10, dtype=F64)
    low = oracle.bfloat16()
    assert_close_to_oracle(low, oracle, low, torch.bfloat16)
    with pytest.raises(AssertionError, match="1 of 10 entries are not finite"):
        assert_close_to_oracle(low.index_fill(0, torch.tensor([3]), float("nan")), oracle, low, torch.bfloat16)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_oracle(low * 1.05, oracle, low, torch.bfloat16)
    infinite = oracle.clone()
    infinite[2] = -torch.inf
    with pytest.raises(AssertionError, match="infinite entries differ"):
        assert_close_to_oracle(low, infinite, low, torch.bfloat16)


@pytest.mark.usefixtures("poisoned_memory")
def test_poisoned_memory_shows_what_was_never_written():
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.float8_e4m3fn).float().isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all() and torch.ones(2).new_empty(3).isnan().all()
    q, k, v = inputs(dtype=torch.float32)
    assert step(q, k, v).isfinite().all()
