"""Soft-mask attention (Eq. 6): right row by row, causal, its limits, and gradients through the statistics."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.reference import naive
from unique_attention import reference
from unique_attention.reference_stats import page_vectors
from unique_attention.settings import GROUP_REDUCES, SCORES, UniqueConfig, resolve_score_weight

F64 = torch.float64
PAGES = {"page_size": 4, "num_kept": 4, "sink_pages": 1, "recent_pages": 1}


def inputs(batch=1, heads=4, kv_heads=2, length=36, dim=8, value_dim=6):
    q = torch.randn(batch, heads, length, dim, dtype=F64)
    k = torch.randn(batch, kv_heads, length, dim, dtype=F64)
    return q, k, torch.randn(batch, kv_heads, length, value_dim, dtype=F64)


def soft(q, k, v, **changes):
    return reference.soft_mask_attention(q, k, v, **{**PAGES, "temperature": 0.7, **changes})


def dense(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def left_padding(batch, length, starts):
    return torch.arange(length).expand(batch, -1) >= torch.tensor(starts)[:, None]


@pytest.mark.parametrize("score", [s for s in SCORES if s != "principal"])
@pytest.mark.parametrize("group_reduce", GROUP_REDUCES)
def test_every_row_equals_the_formula(score, group_reduce):
    q, k, v = inputs()
    settings = {"page_size": 4, "num_kept": 5, "sink_pages": 1, "recent_pages": 2}
    got = soft(q, k, v, score=score, group_reduce=group_reduce, softcap=5.0, **settings)
    for i in (0, 3, 19, 20, 23, 24, 35):
        for kv in (0, 1):
            group = slice(kv * 2, kv * 2 + 2)
            row = naive.soft_row(
                q[0, group], k[0, kv], v[0, kv], i, temperature=0.7, score=score, rule=group_reduce,
                weight=resolve_score_weight(score), softcap=5.0, **settings,
            )  # fmt: skip
            torch.testing.assert_close(got[0, group, i], row)


@pytest.mark.parametrize("starts", [[0, 5], [4, 10]])
def test_padded_rows_with_sinks_equal_the_formula(starts):
    q, k, v = inputs(batch=2)
    sinks = torch.randn(4, dtype=F64)
    mask = left_padding(2, 36, starts)
    poisoned = v.masked_fill(~mask[:, None, :, None], float("nan"))
    got = soft(q, k, poisoned, token_mask=mask, sinks=sinks)
    for b, start in enumerate(starts):
        for i in (start, start + 13, 30, 35):
            row = naive.soft_row(
                q[b, 2:], k[b, 1], v[b, 1], i, temperature=0.7, score="scalar", weight=0.5, start=start,
                sinks=sinks[2:], **PAGES,
            )  # fmt: skip
            torch.testing.assert_close(got[b, 2:, i], row)


def test_a_row_by_hand():
    # one dim, pages of two equal keys: the score of a page is q k, and there is no spread
    keys = torch.tensor([0.0, 1.0, 3.0, 2.0, 0.0], dtype=F64).repeat_interleave(2)
    values = torch.arange(10, dtype=F64)
    q = torch.ones(1, 1, 10, 1, dtype=F64)
    out = soft(q, keys.view(1, 1, 10, 1), values.view(1, 1, 10, 1), page_size=2, num_kept=3, temperature=0.5)
    # the last query: page 0 is a sink, page 4 its own; of 1, 3, 2 one is kept, so theta = (3 + 2) / 2
    gates = [1, *(1 / (1 + math.exp(-(x - 2.5) / 0.5)) for x in (1, 3, 2)), 1]
    weights = [gates[t // 2] * math.exp(keys[t].item()) for t in range(10)]
    expected = sum(w * t for t, w in enumerate(weights)) / sum(weights)
    assert out[0, 0, 9, 0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("group_reduce", ["mean", "max"])
@pytest.mark.parametrize("score", SCORES)
def test_temperature_to_zero_is_hard_decode(score, group_reduce):
    q, k, v = inputs(batch=2)
    mask = left_padding(2, 36, [0, 6])
    settings = {"page_size": 4, "sink_pages": 1, "recent_pages": 2, "score": score, "group_reduce": group_reduce}
    config = UniqueConfig(budget=20, stats_dtype="fp32", **settings)
    got = soft(q, k, v, num_kept=5, temperature=1e-9, token_mask=mask, **settings)
    for i in (7, 19, 20, 27, 31, 32, 35):
        rows = {"seq_lens": torch.tensor([i + 1, i + 1]), "seq_starts": torch.tensor([0, 6])}
        stats = reference.page_stats(k, page_size=4, score=score, stats_dtype="fp32", **rows)
        hard = reference.unique_decode(q[:, :, i : i + 1], k, v, stats, config=config, **rows)
        torch.testing.assert_close(got[:, :, i : i + 1], hard)


def test_temperature_to_infinity_halves_every_free_page():
    q, k, v = inputs()
    got = soft(q, k, v, temperature=1e12)
    token = torch.arange(36)
    page, query_page = token // 4, (token // 4)[:, None]
    free = (page >= 1) & (page < query_page) & (query_page + 1 > 4)
    bias = torch.where(free, math.log(0.5), 0.0).masked_fill(token > token[:, None], -torch.inf).to(F64)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("score", SCORES)
def test_all_pages_kept_is_dense(score):
    q, k, v = inputs()
    torch.testing.assert_close(soft(q, k, v, num_kept=9, score=score), dense(q, k, v))


def test_rows_with_few_pages_are_dense_exactly_up_to_the_boundary():
    q, k, v = inputs()
    difference = (soft(q, k, v) - dense(q, k, v)).abs().amax((0, 1, 3))
    assert (difference[:16] < 1e-12).all()  # four pages
    assert (difference[16:] > 1e-6).all()


@pytest.mark.parametrize("temperature", [1e-9, 0.7])
@pytest.mark.parametrize("score", ["scalar", "principal", "minmax", "oracle"])
@pytest.mark.parametrize("group_reduce", ["mean", "softmax_mean"])
def test_past_rows_do_not_see_future_keys(temperature, score, group_reduce):
    q, k, v = inputs()
    settings = {"temperature": temperature, "score": score, "group_reduce": group_reduce}
    before = soft(q, k, v, **settings)
    for i in (17, 20, 30):  # in the middle and at the start of a page
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, i:] = torch.randn_like(x[:, :, i:])
        after = soft(*changed, **settings)
        torch.testing.assert_close(after[:, :, :i], before[:, :, :i], rtol=0, atol=1e-13)
        assert not torch.allclose(after[:, :, i:], before[:, :, i:])


def test_left_padding_by_whole_pages_changes_nothing():
    q, k, v = inputs()
    padded = [F.pad(x, (0, 0, 8, 0)) for x in (q, k, v)]
    got = soft(*padded, token_mask=left_padding(1, 44, [8]))
    torch.testing.assert_close(got[:, :, 8:], soft(q, k, v))


def test_queries_in_the_padding_give_zero_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in inputs(batch=2))
    out = soft(q, k, v, token_mask=left_padding(2, 36, [0, 7]), score="diagonal", sinks=torch.zeros(4, dtype=F64))
    assert (out[1, :, :7] == 0).all()
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and (x.grad[1, :, :7] == 0).all()


@pytest.mark.parametrize("bounds", [[0, 22, 60], [0, 5, 5, 32, 60], [0, 3, 7, 41, 52]])
@pytest.mark.parametrize("group_reduce", ["mean", "softmax_mean"])
def test_packed_documents_equal_each_document_alone(bounds, group_reduce):
    q, k, v = inputs(length=60)
    got = soft(q, k, v, cu_seq_lens=torch.tensor(bounds, dtype=torch.int32), group_reduce=group_reduce)
    for start, end in zip(bounds, [*bounds[1:], 60]):
        if end > start:
            alone = soft(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], group_reduce=group_reduce)
            torch.testing.assert_close(got[:, :, start:end], alone)


@pytest.mark.parametrize("threshold_grad", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_gradients_match_finite_differences(score, threshold_grad):
    q, k, v = inputs(heads=2, kv_heads=1, length=14, dim=4, value_dim=3)
    settings = {
        "page_size": 2, "num_kept": 4, "temperature": 0.7, "score": score, "threshold_grad": threshold_grad,
    }  # fmt: skip
    if threshold_grad:
        arguments = [x.requires_grad_() for x in (q, k, v)]
        assert torch.autograd.gradcheck(lambda q, k, v: soft(q, k, v, **settings), arguments, fast_mode=True)
        return
    # with a detached threshold the gradient is that of a function whose threshold stands still: freeze it and compare
    loss = soft(q, k.requires_grad_(), v, **settings).square().sum()
    (got,) = torch.autograd.grad(loss, k)
    numeric = frozen_threshold_differences(q, k.detach(), v, settings)
    torch.testing.assert_close(got, numeric, rtol=1e-5, atol=1e-7)


def frozen_threshold_differences(q, k, v, settings):
    """Central differences of the loss in k while every threshold keeps the value it has at k."""
    thresholds = []
    topk = torch.Tensor.topk

    def record(x, *args, **kwargs):
        thresholds.append(topk(x, *args, **kwargs))
        return thresholds[-1]

    def loss(keys):
        return soft(q, keys, v, **settings).square().sum()

    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(torch.Tensor, "topk", record)
        loss(k)
        patch.setattr(torch.Tensor, "topk", lambda *args, **kwargs: thresholds[0])
        numeric = torch.zeros_like(k)
        for index in range(k.numel()):
            step = torch.zeros_like(k)
            step.view(-1)[index] = 1e-5
            numeric.view(-1)[index] = (loss(k + step) - loss(k - step)) / 2e-5
    finally:
        patch.undo()
    assert len(thresholds) == 1
    return numeric


@pytest.mark.parametrize("group_reduce", GROUP_REDUCES)
def test_gradients_of_every_vote_match_finite_differences(group_reduce):
    q, k, v = (x.requires_grad_() for x in inputs(heads=4, kv_heads=2, length=14, dim=4, value_dim=3))
    sinks = torch.randn(4, dtype=F64, requires_grad=True)

    def run(q, k, v, sinks):
        return soft(
            q, k, v, page_size=2, group_reduce=group_reduce, threshold_grad=True, sinks=sinks, softcap=2.0,
            cu_seq_lens=torch.tensor([0, 1, 14]),
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)


@pytest.mark.parametrize("score", [s for s in SCORES if s not in ("mean", "oracle")])
def test_old_keys_get_a_gradient_through_the_spread_of_their_page(score):
    # moving two keys of a page apart keeps its mean: only the spread carries that to the score
    q, k, _ = inputs(heads=2, kv_heads=2)
    apart = torch.zeros_like(k)
    apart[:, :, 12], apart[:, :, 13] = 1, -1

    def score_of_page(keys):
        pages = keys.unflatten(2, (-1, 4))
        vectors, spread = page_vectors(pages, torch.ones(pages.shape[:-1], dtype=torch.bool), score)
        stats = reference.PageStats(vectors, None, spread)
        return reference.head_scores(q, stats, score, resolve_score_weight(score), 8**-0.5)[..., 3].sum()

    moving = k.clone().requires_grad_()
    (grad,) = torch.autograd.grad(score_of_page(moving), moving)
    numeric = (score_of_page(k + 1e-5 * apart) - score_of_page(k - 1e-5 * apart)) / 2e-5
    torch.testing.assert_close((grad * apart).sum(), numeric, rtol=1e-5, atol=1e-8)
    assert abs(numeric) > 1e-3


def test_threshold_gradient_changes_the_gradient_and_not_the_output():
    q, k, v = inputs()
    outs, grads = [], []
    for threshold_grad in (False, True):
        moving = q.clone().requires_grad_()
        out = soft(moving, k, v, threshold_grad=threshold_grad)
        outs.append(out.detach())
        grads.append(torch.autograd.grad(out.square().sum(), moving)[0])
    assert torch.equal(*outs)
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("temperature", [1e-9, 1e-3, 1e3, 1e12])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("group_reduce", ["mean", "softmax_mean"])
def test_extreme_temperatures_and_large_keys_stay_finite(temperature, score, group_reduce):
    tensors = [(30 * x).float().requires_grad_() for x in inputs(batch=2)]
    out = soft(
        *tensors, temperature=temperature, score=score, group_reduce=group_reduce, threshold_grad=True,
        token_mask=left_padding(2, 36, [0, 9]),
    )  # fmt: skip
    out.square().sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize("score", SCORES)
def test_equal_keys_give_finite_gradients(score):
    # no spread and nothing but ties
    q, k, v = inputs()
    k = k[:, :, :1].expand(-1, -1, 36, -1).clone().requires_grad_()
    out = soft(q, k, v, score=score, threshold_grad=True)
    out.square().sum().backward()
    assert out.isfinite().all() and k.grad.isfinite().all()


def test_low_precision_inputs_keep_their_dtype():
    q, k, v = (x.bfloat16() for x in inputs())
    out = soft(q, k, v)
    assert out.dtype == torch.bfloat16
    expected = soft(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kept": 2}, r"num_kept > sink_pages \+ recent_pages = 2, got 2"),
        ({"recent_pages": 0}, "recent_pages >= 1, got 0"),
        ({"temperature": 0.0}, "temperature > 0, got 0.0"),
    ],
)
def test_settings_without_a_choice_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        soft(*inputs(), **changes)


def test_shapes_that_are_not_training_are_refused():
    q, k, v = inputs(batch=2)
    with pytest.raises(ValueError, match="as many keys as queries, got 36 and 1"):
        soft(q[:, :, :1], k, v)
    with pytest.raises(ValueError, match="batch of 1, got 2"):
        soft(q, k, v, cu_seq_lens=torch.tensor([0, 36]))
