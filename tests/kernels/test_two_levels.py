"""Super-pages first, then the pages of the best ones: the decode step against its parts, however it is launched."""

import importlib
import weakref
from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import DEVICE, Case
from tests.numerics import assert_same_pages
from unique_attention import ops
from unique_attention.reference import page_stats as reference_page_stats

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

BASE = Case(S=301, P=4, K=8, stats_dtype="int4")
CASES = [
    BASE,
    replace(BASE, S=41),
    replace(BASE, padded=False, stats_dtype="fp8", vote="max"),
    replace(BASE, holes=True, score="diagonal", stats_dtype="bf16"),
    replace(BASE, D=128, DV=128, HK=1, stats_dtype="int8", sinks=True),
    replace(BASE, D=80, DV=48, HK=1, P=2, K=16),
]
LENGTHS = ("seq_lens", "seq_starts", "token_mask")


@pytest.fixture(params=["at once", "in groups"])
def search(request, monkeypatch):
    """Super-pages searched at once, or the groups of them with the highest peaks first."""
    if request.param == "in groups":
        monkeypatch.setattr(importlib.import_module("unique_attention.page_select"), "MAX_SINGLE", 0)


def settings(case, ratio, budget):
    return case.config.replace(super_page_size=case.P * ratio, super_budget=budget)


def statistics(case, t, page_size, lens):
    named = {"page_size": page_size, "score": case.score, "stats_dtype": case.stats_dtype, "seq_lens": lens}
    return ops.page_stats(t["k"], **named, seq_starts=t["seq_starts"], token_mask=t["token_mask"], impl="triton")


def expected_ids(case, t, config, stats, super_stats):
    """From scores and selections of the kernels that do one thing."""
    rows = {"seq_lens": t["seq_lens"], "seq_starts": t["seq_starts"]}
    named = {"score": case.score, "group_reduce": case.vote, "stats_dtype": case.stats_dtype, "impl": "triton"} | rows
    upper = config.upper
    supers = ops.select_pages(
        ops.page_scores(t["q"], super_stats, page_size=upper.page_size, **named), num_kept=upper.num_kept,
        sink_pages=upper.sink_pages, recent_pages=upper.recent_pages, page_size=upper.page_size, impl="triton", **rows,
    )  # fmt: skip
    scores = ops.page_scores(t["q"], stats, page_size=case.P, **named)
    owner = torch.arange(scores.shape[-1], device=DEVICE) // (upper.page_size // case.P)
    kept = (supers.unsqueeze(-1) == owner).any(-2)
    scores = scores.masked_fill(~kept, float("-inf"))
    ids = ops.select_pages(
        scores, num_kept=case.K, sink_pages=config.sink_pages, recent_pages=config.recent_pages, page_size=case.P,
        impl="triton", **rows,
    )  # fmt: skip
    return ids, scores


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("ratio", [2, 8])
def test_two_levels_are_the_chain_of_their_parts(case, ratio, search):
    t = case.tensors()
    config = settings(case, ratio, 2 * case.P * ratio + -(-case.K // ratio) * ratio * case.P + case.P * ratio)
    stats = statistics(case, t, case.P, t["seq_lens"])
    super_stats = statistics(case, t, case.P * ratio, t["seq_lens"])
    common = {"softcap": t["softcap"], "sinks": t["sinks"]} | {name: t[name] for name in LENGTHS}
    out, page_ids = ops.unique_decode(
        *(t[n] for n in "qkv"), stats, config=config, super_stats=super_stats, **common, return_page_ids=True,
        impl="triton",
    )  # fmt: skip
    ids, scores = expected_ids(case, t, config, stats, super_stats)
    assert torch.equal(page_ids, ids)
    parts = ops.sparse_decode(*(t[n] for n in "qkv"), ids, page_size=case.P, **common, impl="triton")
    assert (out - parts).abs().max() <= 8 * torch.finfo(case.dtype).eps * parts.abs().max()
    if case.stats_dtype != "bf16" and DEVICE == "cpu":
        # the interpreter truncates bf16; GPUs round the query before integer products
        _, reference_ids = ops.unique_decode(
            *(t[n] for n in "qkv"), stats, config=config, super_stats=super_stats, **common, return_page_ids=True,
            impl="reference",
        )  # fmt: skip
        assert_same_pages(page_ids, reference_ids, scores)


@pytest.mark.parametrize(
    "case", [BASE, replace(BASE, holes=True, score="minmax"), replace(BASE, K=80)], ids=lambda case: case.id
)
def test_a_step_refreshes_both_levels(case, search):
    # the last case attends to everything it can hold: nothing is scored, both levels are appended to
    t = case.tensors()
    config = settings(case, 4, 96 if case.K == 8 else 384)
    new = tuple(torch.randn(case.B, case.HK, 1, d, device=DEVICE).to(case.dtype) for d in (case.D, case.DV))
    k, v = t["k"].clone(), t["v"].clone()
    for b, end in enumerate(t["seq_lens"].tolist()):
        t["k"][b, :, end - 1], t["v"][b, :, end - 1] = new[0][b, :, 0], new[1][b, :, 0]
    whole = [statistics(case, t, page, t["seq_lens"]) for page in (case.P, config.super_page_size)]
    before = [statistics(case, t | {"k": k}, page, t["seq_lens"] - 1) for page in (case.P, config.super_page_size)]
    common = {"config": config, "return_page_ids": True, "impl": "triton"} | {name: t[name] for name in LENGTHS}
    expected, ids = ops.unique_decode(*(t[n] for n in "qkv"), whole[0], super_stats=whole[1], **common)
    out, page_ids = ops.unique_decode(t["q"], k, v, before[0], super_stats=before[1], new=new, **common)
    assert torch.equal(page_ids, ids) and torch.equal(k, t["k"]) and torch.equal(v, t["v"])
    assert (out - expected).abs().max() <= 8 * torch.finfo(case.dtype).eps * expected.abs().max()
    for written, recomputed in zip((*before[0], *before[1]), (*whole[0], *whole[1])):
        assert written is None or torch.equal(written.view(torch.uint8), recomputed.view(torch.uint8))


def test_a_budget_that_holds_every_super_page_changes_nothing():
    case = replace(BASE, S=120)
    t = case.tensors()
    config = settings(case, 4, 160)
    stats = [statistics(case, t, page, t["seq_lens"]) for page in (case.P, 16)]
    common = {name: t[name] for name in LENGTHS} | {"return_page_ids": True, "impl": "triton"}
    _, two = ops.unique_decode(*(t[n] for n in "qkv"), stats[0], config=config, super_stats=stats[1], **common)
    _, one = ops.unique_decode(*(t[n] for n in "qkv"), stats[0], config=case.config, **common)
    assert torch.equal(two, one)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_settings_and_statistics_must_agree(impl):
    case = BASE
    t = case.tensors()
    stats = reference_page_stats(t["k"], page_size=4, stats_dtype="int4")
    few = reference_page_stats(t["k"][:, :, :64], page_size=16, stats_dtype="int4")
    call = {"config": settings(case, 4, 96), "impl": impl}
    with pytest.raises(ValueError, match="`super_stats` not given"):
        ops.unique_decode(*(t[n] for n in "qkv"), stats, **call)
    with pytest.raises(ValueError, match="`super_stats` given"):
        ops.unique_decode(*(t[n] for n in "qkv"), stats, config=case.config, super_stats=few, impl=impl)
    with pytest.raises(NotImplementedError, match="contiguous"):
        ops.unique_decode(
            *(t[n] for n in "qkv"), stats, super_stats=few, page_table=torch.zeros(2, 4, dtype=torch.int32), **call
        )
    if impl == "triton":
        many = case.config.replace(budget=65536, super_page_size=32)
        with pytest.raises(NotImplementedError, match="16384 pages one by one"):
            ops.unique_decode(*(t[n] for n in "qkv"), stats, super_stats=stats, **(call | {"config": many}))
        with pytest.raises(ValueError, match="too few"):
            ops.unique_decode(*(t[n] for n in "qkv"), stats, super_stats=few, **call)


def test_scratch_of_the_selection_outlives_the_allocations_after_it(monkeypatch):
    # rows in step do not wait for the launch before as a whole, so its memory must not be given out again
    module = importlib.import_module("unique_attention.unique_decode")
    scratch, select, choose = [], module.launch_select, module.choose_listed

    def watched(*args, **kwargs):
        scratch.extend(map(weakref.ref, args[:3]))
        return select(*args, **kwargs)

    def after(*args, **kwargs):
        assert len(scratch) == 3 and all(ref() is not None for ref in scratch)
        return choose(*args, **kwargs)

    monkeypatch.setattr(module, "launch_select", watched)
    monkeypatch.setattr(module, "choose_listed", after)
    t = BASE.tensors()
    config = settings(BASE, 4, BASE.P * 4 * 8)
    stats, supers = (statistics(BASE, t, size, t["seq_lens"]) for size in (BASE.P, config.super_page_size))
    rows = {name: t[name] for name in LENGTHS}
    ops.unique_decode(*(t[n] for n in "qkv"), stats, config=config, super_stats=supers, impl="triton", **rows)
    assert scratch


@pytest.mark.parametrize("ratio", [None, 4])
def test_rows_in_step_give_what_launch_after_launch_gives(ratio, monkeypatch):
    target = importlib.import_module("unique_attention._common").Target
    # more rows than multiprocessors
    case = replace(BASE, B=9) if DEVICE == "cpu" else replace(BASE, B=20, HK=8)
    t = case.tensors()
    config = case.config if ratio is None else settings(case, ratio, case.P * 4 * 8)
    levels = (case.P,) if ratio is None else (case.P, config.super_page_size)
    rows = {name: t[name] for name in LENGTHS}
    counters = torch.zeros(case.B * case.HK * ops.ROW_COUNTERS, dtype=torch.int32, device=DEVICE)
    new = tuple(torch.randn(case.B, case.HK, 1, d, device=DEVICE).to(case.dtype) for d in (case.D, case.DV))
    found = []
    for in_step in (False, True):
        monkeypatch.setattr(target, "in_step", in_step)
        stats = [statistics(case, t, size, t["seq_lens"] - 1) for size in levels]
        call = {"config": config, "super_stats": stats[1] if ratio else None, "counters": counters, "impl": "triton"}
        found.append(
            ops.unique_decode(*(t[n] for n in "qkv"), stats[0], new=new, **call, **rows, return_page_ids=True)
        )
        assert not counters.any()
        # the new token and its statistics are there whichever launch comes last
        for level, size in zip(stats, levels):
            for kept, expected in zip(level, statistics(case, t, size, t["seq_lens"])):
                assert kept is None or torch.equal(kept.view(torch.uint8), expected.view(torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(*found))
