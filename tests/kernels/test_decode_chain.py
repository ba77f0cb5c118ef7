"""Statistics, scores, selection and decode: each kernel against the reference in float64."""

import importlib
from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import DECODES, DEVICE, SCORES, STATS, Case
from tests.numerics import assert_close_to_oracle, assert_same_pages, tolerance
from unique_attention import ops, reference

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
if DEVICE == "cuda":
    # not interpreted: the same tests, on a device
    pytestmark.append(pytest.mark.gpu)
LENGTHS = ("seq_lens", "seq_starts", "token_mask", "page_table")


def ids(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def stats_settings(case):
    return {"page_size": case.P, "score": case.score, "stats_dtype": case.stats_dtype}


def score_settings(case, t):
    return stats_settings(case) | {
        "group_reduce": case.vote, "seq_lens": t["seq_lens"], "seq_starts": t["seq_starts"],
        "page_table": t["page_table"],
    }  # fmt: skip


def some(t, names):
    return {name: t[name] for name in names}


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def reference_stats(case, t):
    return ops.page_stats(t["k"], **stats_settings(case), **some(t, LENGTHS), impl="reference")


def decoded(case, stats):
    """Stored statistics as float64 vectors."""
    return reference.dequantize(stats, case.D).double()


def quantisation_step(case, stats):
    """Half a code step of each stored vector: statistics may differ by rounding to the neighbouring code."""
    vectors = decoded(case, stats)
    if case.stats_dtype == "bf16":
        return vectors.abs() * 2**-7
    if case.stats_dtype == "fp32":
        return torch.full_like(vectors, 1e-5) * vectors.abs().max()
    width = {"fp8": 2**-3, "int8": 1 / 127, "int4": 1 / 7}[case.stats_dtype]
    return vectors.abs().amax(-1, keepdim=True) * width


@ids(STATS)
def test_page_stats_matches_reference(case):
    t = case.tensors()
    expected = reference_stats(case, t)
    out = None
    if case.table:
        # physical pages that no row uses keep what they hold
        out = ops.empty_stats(
            tuple(t["k"].shape[:2]), case.D, score=case.score, stats_dtype=case.stats_dtype, device=DEVICE
        )
        for a, b in zip(out, expected):
            if a is not None:
                a.copy_(b)
    actual = ops.page_stats(t["k"], **stats_settings(case), **some(t, LENGTHS), out=out, impl="triton")
    difference = (decoded(case, actual) - decoded(case, expected)).abs()
    assert decoded(case, actual).isfinite().all()
    assert (difference <= quantisation_step(case, expected)).all()
    if DEVICE == "cuda" or case.stats_dtype != "bf16":
        # rounding may tip single codes, not many (the interpreter truncates bf16)
        tipped = difference > 1e-5 * decoded(case, expected).abs().max()
        assert tipped.double().mean() < 0.02
    assert torch.allclose(actual.spread.float(), expected.spread.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("new", [1, 3, 9])
@ids([STATS[2], STATS[4], STATS[5], STATS[16], STATS[17], STATS[18]])
def test_append_equals_recompute(case, new):
    t = case.tensors()
    settings = stats_settings(case) | some(t, LENGTHS)
    before = settings | {"seq_lens": t["seq_lens"] - new}
    stats = ops.page_stats(t["k"], **before, impl="triton")
    k, v = t["k"].clone(), t["v"].clone()

    def slots(x, cache):
        """The new tokens of each row, taken out of the cache."""
        rows = []
        for b, end in enumerate(t["seq_lens"].tolist()):
            position = torch.arange(end - new, end, device=DEVICE)
            if case.table:
                page = t["page_table"][b, position // case.P].long()
                rows.append(x[page, :, position % case.P].transpose(0, 1))
                cache[page, :, position % case.P] = float("nan")
            else:
                rows.append(x[b, :, position])
                cache[b, :, position] = float("nan")
        return torch.stack(rows)

    k_new, v_new = slots(t["k"], k), slots(t["v"], v)
    settings.pop("seq_lens")
    ops.append_tokens(k, v, stats, k_new, v_new, t["seq_lens"], **settings, impl="triton")
    whole = ops.page_stats(t["k"], **settings, seq_lens=t["seq_lens"], impl="triton")
    for appended, recomputed in zip(stats, whole):
        if appended is not None:
            assert torch.equal(appended.view(torch.uint8), recomputed.view(torch.uint8))
    assert torch.equal(k, t["k"]) and torch.equal(v, t["v"])


@ids(SCORES)
def test_page_scores_matches_reference(case):
    t = case.tensors()
    stats = reference_stats(case, t)
    settings = score_settings(case, t)
    low = ops.page_scores(t["q"], stats, **settings, impl="reference")
    oracle = ops.page_scores(t["q"].double(), stats, **settings, impl="reference").double()
    actual = ops.page_scores(t["q"], stats, **settings, impl="triton")
    if case.stats_dtype in ("int8", "int4") and DEVICE == "cuda":
        # the query is a fixed-point number there, of 15 bits (int8 codes) or 8 bits: half a step of rounding in
        # each dim
        finite = oracle.isfinite()
        steps = {"int8": 2 * 16256, "int4": 2 * 127}[case.stats_dtype]
        bound = t["q"].abs().max().double() / steps * decoded(case, stats).abs().sum(-1).max()
        assert torch.equal(actual.isfinite(), finite)
        assert (actual - oracle)[finite].abs().max() <= bound + tolerance(oracle, low, torch.float32)
    else:
        # float32 sums of D terms in another order
        terms = torch.finfo(torch.float32).eps * case.D * oracle[oracle.isfinite()].abs().max()
        assert torch.equal(actual.isfinite(), oracle.isfinite())
        error = (actual.double() - oracle)[oracle.isfinite()].abs().max()
        assert error <= max(tolerance(oracle, low, torch.float32), terms)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "descending", "negative", "wide"])
@pytest.mark.parametrize("pages", [9, 40, 1100])
def test_select_pages_matches_reference(kind, pages):
    generator = torch.Generator().manual_seed(pages)
    scores = torch.randn(3, 2, pages, generator=generator)
    if kind == "ties":
        scores = (scores * 2).round()
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "descending":
        scores = -torch.arange(pages).float().expand(3, 2, pages).contiguous()
    elif kind == "negative":
        scores = -scores.abs() - 1e3
    elif kind == "wide":
        scores = scores * torch.logspace(-30, 30, pages)
    P = 4
    settings = {
        "num_kept": 16, "sink_pages": 1, "recent_pages": 2, "page_size": P,
        "seq_lens": torch.tensor([pages * P, pages * P - 3, pages * P - 5], device=DEVICE),
        "seq_starts": torch.tensor([0, 6, 3], device=DEVICE),
    }  # fmt: skip
    scores = scores.to(DEVICE)
    actual = ops.select_pages(scores, **settings, impl="triton")
    expected = ops.select_pages(scores, **settings, impl="reference")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_kept", [9, 64])
def test_select_pages_of_rows_far_shorter_than_the_cache(num_kept):
    # from one page too many over fewer groups than pages to keep to a full cache
    pages = torch.tensor([num_kept + 1, num_kept + 2, num_kept + 30, 2 * num_kept + 5, 5 * num_kept, 2500])
    scores = torch.randn(len(pages), 2, 2500, device=DEVICE)
    settings = {"num_kept": num_kept, "sink_pages": 1, "recent_pages": 2, "page_size": 4, "seq_lens": pages * 4}
    settings["seq_lens"] = settings["seq_lens"].to(DEVICE)
    actual = ops.select_pages(scores, **settings, impl="triton")
    assert torch.equal(actual, ops.select_pages(scores, **settings, impl="reference"))


def test_select_pages_reads_long_rows_in_tiles(monkeypatch):
    from unique_attention import page_select

    plan = page_select.SelectPlan(4, 1024, 512, False)
    monkeypatch.setattr(page_select, "plan_selection", lambda *_: plan)
    scores = torch.randn(1, 1, 3000, device=DEVICE).round(decimals=1)
    settings = {"num_kept": 700, "sink_pages": 2, "recent_pages": 3, "page_size": 4}
    actual = ops.select_pages(scores, **settings, impl="triton")
    assert torch.equal(actual, ops.select_pages(scores, **settings, impl="reference"))


@ids(DECODES)
def test_sparse_decode_matches_reference(case):
    t = case.tensors()
    stats = reference_stats(case, t)
    scores = ops.page_scores(t["q"], stats, **score_settings(case, t), impl="reference")
    page_ids = ops.select_pages(
        scores, num_kept=case.K, sink_pages=1, recent_pages=2, page_size=case.P, impl="reference",
        **some(t, ("seq_lens", "seq_starts")),
    )  # fmt: skip
    settings = {"page_size": case.P} | some(t, (*LENGTHS, "softcap", "sinks"))
    wide = settings | {"sinks": double(t["sinks"])}
    oracle = ops.sparse_decode(*(t[n].double() for n in "qkv"), page_ids, **wide, impl="reference")
    low = ops.sparse_decode(*(t[n] for n in "qkv"), page_ids, **settings, impl="reference")
    actual = ops.sparse_decode(*(t[n] for n in "qkv"), page_ids, **settings, impl="triton")
    assert actual.dtype == case.dtype
    # probabilities are rounded to the dtype of the values before the second product
    low_error = low if case.dtype == torch.float32 else low + low.abs().max() * torch.finfo(case.dtype).eps
    assert_close_to_oracle(actual, oracle, low_error, case.dtype)


@ids(DECODES)
def test_unique_decode_is_the_chain_of_its_parts(case):
    t = case.tensors()
    stats = reference_stats(case, t)
    common = some(t, (*LENGTHS, "softcap", "sinks"))
    out, page_ids = ops.unique_decode(
        *(t[n] for n in "qkv"), stats, config=case.config, **common, return_page_ids=True, impl="triton"
    )
    scores = ops.page_scores(t["q"], stats, **score_settings(case, t), impl="triton")
    expected = ops.select_pages(
        scores, num_kept=case.K, sink_pages=1, recent_pages=2, page_size=case.P, impl="triton",
        **some(t, ("seq_lens", "seq_starts")),
    )  # fmt: skip
    assert torch.equal(page_ids, expected)
    assert_same_pages(page_ids, ops.select_pages(
        scores, num_kept=case.K, sink_pages=1, recent_pages=2, page_size=case.P, impl="reference",
        **some(t, ("seq_lens", "seq_starts")),
    ), scores)  # fmt: skip
    parts = ops.sparse_decode(*(t[n] for n in "qkv"), expected, page_size=case.P, **common, impl="triton")
    assert (out - parts).abs().max() <= 8 * torch.finfo(case.dtype).eps * parts.abs().max()


@pytest.mark.parametrize("dense_below", [0, 16, 40, 55, 59, 60, 71, 400])
def test_rows_of_at_most_dense_below_tokens_attend_to_everything(dense_below):
    case = Case(S=70, K=4)
    t = case.tensors()
    stats = reference_stats(case, t)
    settings = {"config": case.config, "dense_below": dense_below, "return_page_ids": True} | some(t, LENGTHS)
    out, page_ids = ops.unique_decode(*(t[n] for n in "qkv"), stats, **settings, impl="triton")
    expected, expected_ids = ops.unique_decode(*(t[n] for n in "qkv"), stats, **settings, impl="reference")
    # row 0 has 70 tokens in 18 pages, row 1 has 52 in 14 pages
    assert torch.equal(page_ids, expected_ids)
    assert ((page_ids == -1).all(2).all(1)).tolist() == [dense_below >= 72, dense_below >= 56]
    assert torch.allclose(out, expected, atol=1e-5)


def test_counters_are_left_zeroed_and_can_be_used_again():
    case = Case(S=300, K=64)
    t = case.tensors()
    stats = reference_stats(case, t)
    counters = torch.zeros(case.B * case.HK * ops.ROW_COUNTERS, dtype=torch.int32, device=DEVICE)
    settings = {"config": case.config, "counters": counters, "impl": "triton"} | some(t, LENGTHS)
    first = ops.unique_decode(*(t[n] for n in "qkv"), stats, **settings)
    assert (counters == 0).all()
    assert torch.equal(first, ops.unique_decode(*(t[n] for n in "qkv"), stats, **settings))


def test_a_row_without_valid_tokens_gives_zeros():
    case = Case()
    t = case.tensors()
    t["seq_lens"] = torch.tensor([0, 40], device=DEVICE)
    t["seq_starts"] = None
    stats = reference_stats(case, t)
    out = ops.unique_decode(*(t[n] for n in "qkv"), stats, config=case.config, **some(t, LENGTHS), impl="triton")
    assert (out[0] == 0).all() and out[1].isfinite().all() and (out[1] != 0).any()


# in a launch before the attention or behind it; the last three attend to everything, in one launch
@pytest.mark.parametrize(
    ("case", "append_first"),
    [
        *((x, 1) for x in (STATS[0], STATS[2], STATS[4], STATS[14], STATS[16], STATS[17], STATS[18], SCORES[-4])),
        *((x, 0) for x in (STATS[0], STATS[17], STATS[18])),
        *((replace(x, K=20), 1) for x in (STATS[2], STATS[17], STATS[18])),
    ],
    ids=lambda x: x.id if isinstance(x, Case) else "first" if x else "behind",
)
def test_a_step_appends_as_the_append_does(case, append_first, monkeypatch):
    monkeypatch.setattr(importlib.import_module("unique_attention.unique_decode"), "APPEND_FIRST", append_first)
    t = case.tensors()
    settings = stats_settings(case) | some(t, ("seq_starts", "token_mask", "page_table"))
    stats = [ops.page_stats(t["k"], **settings, seq_lens=t["seq_lens"] - 1, impl="triton") for _ in range(2)]
    new = tuple(torch.randn(case.B, case.HK, 1, d, device=DEVICE).to(case.dtype) for d in (case.D, case.DV))
    cache = [(t["k"].clone(), t["v"].clone()) for _ in range(2)]
    common = {"config": case.config, "impl": "triton", "return_page_ids": True} | some(
        t, (*LENGTHS, "softcap", "sinks")
    )
    ops.append_tokens(*cache[0], stats[0], *new, t["seq_lens"], **settings, impl="triton")
    expected, expected_ids = ops.unique_decode(t["q"], *cache[0], stats[0], **common)
    out, page_ids = ops.unique_decode(t["q"], *cache[1], stats[1], **common, new=new)
    assert torch.equal(page_ids, expected_ids)
    assert (out - expected).abs().max() <= 8 * torch.finfo(case.dtype).eps * expected.abs().max()
    for a, b in zip((*cache[0], *stats[0]), (*cache[1], *stats[1])):
        assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("S", [16, 64])
def test_a_token_below_the_start_of_its_row_is_still_written(S):
    # nothing to attend to, in one launch and in several
    case = replace(DECODES[-1], B=1, S=S, K=8, padded=False)
    t = case.tensors()
    t["seq_lens"], t["seq_starts"] = torch.tensor([5], device=DEVICE), torch.tensor([8], device=DEVICE)
    stats = ops.page_stats(t["k"], **stats_settings(case), impl="triton")
    new = tuple(torch.ones(1, case.HK, 1, d, device=DEVICE).to(case.dtype) for d in (case.D, case.DV))
    ops.unique_decode(
        *(t[n] for n in "qkv"), stats, config=case.config, seq_lens=t["seq_lens"], seq_starts=t["seq_starts"], new=new,
        impl="triton",
    )  # fmt: skip
    assert (t["k"][:, :, 4] == 1).all() and (t["v"][:, :, 4] == 1).all()
