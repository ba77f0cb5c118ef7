"""Page scores (Eq. 2) and votes (Eq. 3) against the formulas in loops, and the symmetries they must have."""

import math

import pytest
import torch

from tests.reference import naive
from unique_attention import reference
from unique_attention.settings import GROUP_REDUCES, SCORES, STATS_DTYPES, resolve_score_weight

F64 = torch.float64


def score_pages(q, k, score="scalar", *, page_size=4, stats_dtype="fp32", **kwargs):
    rows = {name: kwargs[name] for name in ("seq_lens", "seq_starts", "token_mask", "page_table") if name in kwargs}
    stats = reference.page_stats(k, page_size=page_size, score=score, stats_dtype=stats_dtype, **rows)
    return reference.page_scores(q, stats, page_size=page_size, score=score, stats_dtype=stats_dtype, k=k, **kwargs)


@pytest.mark.parametrize("score", [s for s in SCORES if s != "principal"])
@pytest.mark.parametrize("group_reduce", GROUP_REDUCES)
@pytest.mark.parametrize("weight", [None, 1.3])
def test_page_scores_equal_the_formula(score, group_reduce, weight):
    q, k = torch.randn(2, 6, 1, 8, dtype=F64), torch.randn(2, 2, 30, 8, dtype=F64)
    lens, starts = torch.tensor([30, 22]), torch.tensor([0, 5])
    got = score_pages(
        q,
        k,
        score,
        seq_lens=lens,
        seq_starts=starts,
        score_weight=weight,
        group_reduce=group_reduce,
        softmax_scale=0.4,
    )
    expected = torch.full((2, 2, 8), -torch.inf, dtype=F64)
    for b, kv in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        start, end = naive.bounds(b, 30, lens, starts)
        pages = list(range(start // 4, -(-end // 4)))
        keys = [k[b, kv, naive.page_tokens(page, 4, start, end)] for page in pages]
        w = resolve_score_weight(score, weight)
        group = q[b, kv * 3 : kv * 3 + 3, 0]
        heads = torch.stack([torch.stack([naive.head_score(x, page, score, w, 0.4) for page in keys]) for x in group])
        expected[b, kv, pages] = naive.vote(heads, group_reduce, 0.4)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_principal_score_is_the_std_of_a_low_rank_page():
    # a page that spreads along one axis only: the offset is the exact standard deviation of q . k
    axis = torch.randn(8, dtype=F64)
    k = torch.randn(1, 1, 16, 1, dtype=F64) * axis + torch.randn(8, dtype=F64)
    q = torch.randn(1, 1, 1, 8, dtype=F64)
    logits = (k[0, 0] @ q[0, 0, 0]).unflatten(0, (2, 8))
    got = score_pages(q, k, "principal", page_size=8)[0, 0]
    torch.testing.assert_close(got, logits.mean(1) + 2 * logits.var(1, unbiased=False).sqrt())


def test_moment_score_estimates_the_mass_of_narrow_pages():
    q, k = torch.randn(1, 1, 1, 8, dtype=F64), 0.01 * torch.randn(1, 1, 64, 8, dtype=F64)
    mass = score_pages(q, k, "oracle", page_size=64, softmax_scale=1.0) - torch.tensor(64.0, dtype=F64).log()
    diagonal_only = torch.cov(k[0, 0].T, correction=0)
    exact = (k[0, 0] @ q[0, 0, 0]).mean() + 0.5 * (q[0, 0, 0] ** 2 * diagonal_only.diagonal()).sum()
    got = score_pages(q, k, "moment", page_size=64, score_weight=1.0, softmax_scale=1.0)
    torch.testing.assert_close(got.flatten()[0], exact)
    assert abs(got - mass) < 0.5 * abs(score_pages(q, k, "mean", page_size=64) - mass) + 1e-3


@pytest.mark.parametrize("score", SCORES)
def test_negating_query_and_keys_keeps_scores(score):
    q, k = torch.randn(1, 4, 1, 8, dtype=F64), torch.randn(1, 2, 32, 8, dtype=F64)
    torch.testing.assert_close(score_pages(-q, -k, score), score_pages(q, k, score))


@pytest.mark.parametrize("score", [s for s in SCORES if s not in ("mean",)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_wider_page_scores_higher_for_either_sign_of_the_query(score, sign):
    center, noise = torch.randn(8, dtype=F64), torch.randn(4, 8, dtype=F64)
    noise = noise - noise.mean(0)
    k = torch.cat([center + 0.1 * noise, center + noise])[None, None]
    q = sign * torch.randn(1, 1, 1, 8, dtype=F64).abs()
    narrow, wide = score_pages(q, k, score)[0, 0]
    assert wide > narrow


def test_minmax_score_bounds_every_logit():
    q, k = torch.randn(2, 2, 1, 16, dtype=F64), torch.randn(2, 2, 64, 16, dtype=F64)
    best = (k @ q.mT).unflatten(2, (8, 8)).amax((3, 4))
    assert (score_pages(q, k, "minmax", page_size=8) >= best).all()


def test_oracle_score_is_the_attention_mass():
    q, k = torch.randn(1, 4, 1, 8, dtype=F64), torch.randn(1, 2, 22, 8, dtype=F64)
    weights = torch.softmax(8**-0.5 * (q.reshape(1, 2, 2, 8) @ k.mT), -1).mean(2)
    mass = torch.nn.functional.pad(weights, (0, 2)).unflatten(-1, (6, 4)).sum(-1)
    torch.testing.assert_close(score_pages(q, k, "oracle", group_reduce="softmax_mean"), mass)


def test_oracle_score_leaves_masked_tokens_out():
    q, k = torch.randn(1, 2, 1, 8, dtype=F64), torch.randn(1, 2, 16, 8, dtype=F64)
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, 5] = False
    kept = score_pages(q, k[:, :, [4, 6, 7]], "oracle")[..., 0]
    torch.testing.assert_close(score_pages(q, k, "oracle", token_mask=mask)[..., 1], kept)


def test_votes_of_a_group_by_hand():
    scores = torch.tensor([[[[10.0, 0.0, 4.0], [0.0, 1.0, 9.0]]]])  # one kv head, two query heads, three pages
    candidates = torch.tensor([[[True, True, False]]])

    def vote(rule, scale=1.0):
        return reference.group_vote(scores, candidates, rule, scale)[0, 0].tolist()

    assert vote("mean") == [5.0, 0.5, -torch.inf]
    assert vote("max") == [10.0, 1.0, -torch.inf]
    assert vote("shifted_max") == [0.0, 0.0, -torch.inf]
    share = (1 / (1 + math.exp(-10)) + 1 / (1 + math.exp(1))) / 2
    assert vote("softmax_mean") == pytest.approx([share, 1 - share, -torch.inf])


def test_unknown_vote_is_refused():
    with pytest.raises(ValueError, match="`group_reduce` must be one of mean, max"):
        reference.group_vote(torch.randn(1, 1, 2, 3), torch.ones(1, 1, 3, dtype=torch.bool), "sum", 1.0)


def test_mean_vote_needs_one_query_per_kv_head():
    q, k = torch.randn(1, 8, 1, 16, dtype=F64), torch.randn(1, 2, 32, 16, dtype=F64)
    stats = reference.page_stats(k, page_size=4, stats_dtype="fp32")
    group = q.reshape(1, 2, 4, 16)
    linear = (group.mean(2, keepdim=True) @ stats.codes[..., 0, :].mT).squeeze(2)
    linear = linear + 0.5 * stats.spread * group.norm(dim=-1).mean(2, keepdim=True)
    torch.testing.assert_close(score_pages(q, k), linear)


@pytest.mark.parametrize("score", [s for s in SCORES if s not in ("mean", "minmax", "oracle")])
def test_weight_zero_is_the_mean_score(score):
    q, k = torch.randn(1, 4, 1, 8, dtype=F64), torch.randn(1, 2, 32, 8, dtype=F64)
    torch.testing.assert_close(score_pages(q, k, score, score_weight=0.0), score_pages(q, k, "mean"))


@pytest.mark.parametrize("score", [s for s in SCORES if s != "oracle"])
@pytest.mark.parametrize("stats_dtype", STATS_DTYPES)
def test_scores_are_those_of_the_dequantised_statistics(score, stats_dtype):
    q, k = torch.randn(2, 4, 1, 40), torch.randn(2, 2, 32, 40)
    stored = reference.page_stats(k, page_size=4, score=score, stats_dtype=stats_dtype)
    plain = reference.PageStats(reference.dequantize(stored, 40), None, stored.spread.float())
    got = reference.page_scores(q, stored, page_size=4, score=score, stats_dtype=stats_dtype)
    expected = reference.page_scores(q.double(), plain, page_size=4, score=score, stats_dtype="fp32")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stats_dtype", ["fp8", "int4"])
def test_many_pages_score_as_few_do(stats_dtype):
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 2 * 2500, 8)
    got = score_pages(q, k, page_size=2, stats_dtype=stats_dtype)
    assert got.shape == (1, 1, 2500)
    for pages in (slice(0, 100), slice(1000, 1100), slice(2400, 2500)):
        part = score_pages(q, k[:, :, pages.start * 2 : pages.stop * 2], page_size=2, stats_dtype=stats_dtype)
        torch.testing.assert_close(got[..., pages], part)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("group_reduce", ["mean", "softmax_mean", "shifted_max"])
def test_ragged_rows_score_as_they_do_alone(score, group_reduce):
    q, k = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 32, 8)
    lens, starts = torch.tensor([32, 17, 9]), torch.tensor([0, 6, 3])
    got = score_pages(q, k, score, seq_lens=lens, seq_starts=starts, group_reduce=group_reduce)
    for b in range(3):
        row = slice(b, b + 1)
        alone = score_pages(q[row], k[row, :, : lens[b]], score, seq_starts=starts[row], group_reduce=group_reduce)
        torch.testing.assert_close(got[row, :, : alone.shape[-1]], alone)
        outside = got[b, :, -(-int(lens[b]) // 4) :]
        assert (outside == -torch.inf).all() and (got[b, :, : int(starts[b]) // 4] == -torch.inf).all()


@pytest.mark.parametrize("score", ["scalar", "diagonal", "oracle"])
def test_page_table_scores_equal_contiguous(score):
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 24, 8)
    table = torch.randperm(15)[:12].reshape(2, 6).int()
    pool = torch.full((15, 2, 4, 8), float("nan"))
    pool[table.flatten().long()] = k.unflatten(2, (6, 4)).transpose(1, 2).flatten(0, 1)
    lens = torch.tensor([22, 9])
    table[1, 3:] = -1  # past the end of the row: any number
    paged = score_pages(q, pool, score, seq_lens=lens, page_table=table)
    torch.testing.assert_close(paged, score_pages(q, k, score, seq_lens=lens))


def test_wrong_storage_is_named():
    stats = reference.page_stats(torch.randn(1, 1, 8, 4), page_size=4, stats_dtype="bf16")
    with pytest.raises(ValueError, match="Expected statistics stored as 'int4', got 'bf16'"):
        reference.page_scores(torch.randn(1, 1, 1, 4), stats, page_size=4)


def test_oracle_needs_the_keys():
    stats = reference.page_stats(torch.randn(1, 1, 8, 4), page_size=4, score="oracle")
    with pytest.raises(ValueError, match="expected `k`, got None"):
        reference.page_scores(torch.randn(1, 1, 1, 4), stats, page_size=4, score="oracle")
