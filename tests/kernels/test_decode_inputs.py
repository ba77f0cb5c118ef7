"""Inputs of unusual layout give the numbers of usual ones; inputs that do not fit are refused, never misread."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import DEVICE, Case
from unique_attention import ops

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
CASE = Case(sinks=True, holes=True, stats_dtype="fp32")
LENGTHS = ("seq_lens", "seq_starts", "token_mask", "page_table")


def decoded(case, t, impl="triton", **changed):
    t = t | changed
    settings = {"page_size": case.P, "score": case.score, "stats_dtype": case.stats_dtype}
    stats = ops.page_stats(t["k"], **settings, **{n: t[n] for n in LENGTHS}, out=t.get("stats"), impl=impl)
    common = {n: t[n] for n in (*LENGTHS, "softcap", "sinks")}
    return ops.unique_decode(t["q"], t["k"], t["v"], stats, config=case.config, **common, impl=impl), stats


def test_strided_masks_tables_and_sinks_are_read_as_they_are():
    t = CASE.tensors()
    expected, stats = decoded(CASE, t)
    mask = t["token_mask"].t().contiguous().t()
    sinks = torch.stack([t["sinks"], -t["sinks"]], dim=1)[:, 0]
    assert mask.stride(-1) != 1 and sinks.stride(-1) != 1
    out, found = decoded(CASE, t, token_mask=mask, sinks=sinks)
    assert torch.equal(out, expected) and torch.equal(found.codes, stats.codes)
    case = replace(CASE, table=True, padded=False, holes=False)
    t = case.tensors()
    fill = ops.page_stats(t["k"], page_size=case.P, stats_dtype="fp32", **{n: t[n] for n in LENGTHS}, impl="reference")
    table = torch.stack([t["page_table"], torch.zeros_like(t["page_table"])], dim=2)[:, :, 0]
    assert torch.equal(decoded(case, t, page_table=table, stats=fill)[0], decoded(case, t, stats=fill)[0])


def test_slots_beyond_a_narrow_mask_do_not_count():
    t = CASE.tensors()
    narrow = t["token_mask"][:, :40].contiguous()
    wide = torch.nn.functional.pad(narrow, (0, t["k"].shape[2] - 40))
    assert torch.equal(decoded(CASE, t, token_mask=narrow)[0], decoded(CASE, t, token_mask=wide)[0])


@pytest.mark.parametrize("unused", [0, -1])
def test_unused_entries_of_a_page_table_name_nothing(unused):
    case = Case(table=True, padded=False, stats_dtype="fp32")
    t = case.tensors()
    lens = torch.tensor([77, 30], device=DEVICE)
    table = t["page_table"].clone()
    table[1, 8:] = unused
    names = {"page_size": case.P, "stats_dtype": "fp32", "seq_lens": lens, "page_table": table}
    storage = ops.empty_stats((t["k"].shape[0] + 2, case.HK), case.D, stats_dtype="fp32", device=DEVICE)
    for x in (storage.codes, storage.spread):
        x.fill_(7.0)
    # the storage has a page before the first and one behind the last, which nobody may touch
    inner = type(storage)(storage.codes[1:-1], None, storage.spread[1:-1])
    ops.page_stats(t["k"], **names, out=inner, impl="triton")
    expected = type(storage)(torch.full_like(inner.codes, 7.0), None, torch.full_like(inner.spread, 7.0))
    ops.page_stats(t["k"], **names, out=expected, impl="reference")
    assert torch.allclose(inner.codes, expected.codes, atol=1e-5)
    assert (storage.codes[0] == 7).all() and (storage.codes[-1] == 7).all()


def test_tokens_beyond_the_capacity_are_dropped():
    t = Case(S=64, padded=False, stats_dtype="fp32").tensors()
    names = {"page_size": 4, "score": "scalar", "stats_dtype": "fp32"}
    stats = ops.page_stats(t["k"], **names, impl="triton")
    k, v = t["k"].clone(), t["v"].clone()
    new = tuple(torch.randn(2, 2, 1, 64, device=DEVICE) for _ in "kv")
    ops.append_tokens(k, v, stats, *new, torch.tensor([65, 64], device=DEVICE), **names, impl="triton")
    assert torch.equal(k[0], t["k"][0]) and torch.equal(v[0], t["v"][0])
    assert torch.equal(k[1, :, 63], new[0][1, :, 0]) and torch.equal(k[1, :, :63], t["k"][1, :, :63])


def test_zeros_are_equal_and_nan_ranks_last():
    settings = {"num_kept": 3, "sink_pages": 1, "recent_pages": 1, "page_size": 4, "impl": "triton"}
    scores = torch.full((1, 1, 12), -1.0, device=DEVICE)
    scores[..., 3], scores[..., 5] = -0.0, 0.0
    assert ops.select_pages(scores, **settings).tolist() == [[[0, 3, 11]]]
    scores[..., 7] = float("nan")
    assert ops.select_pages(scores, **settings).tolist() == [[[0, 3, 11]]]


def test_what_does_not_fit_is_refused():
    t = CASE.tensors()
    _, stats = decoded(CASE, t)
    call = {"config": CASE.config, "seq_lens": t["seq_lens"], "impl": "triton"}
    parts = (t["k"], t["v"], stats)
    with pytest.raises(ValueError, match="expected statistics of score='scalar' stored as 'int4'"):
        ops.unique_decode(t["q"], *parts, **(call | {"config": CASE.config.replace(stats_dtype="int4")}))
    with pytest.raises(ValueError, match="`q` .* does not fit"):
        ops.unique_decode(t["q"][..., :32].contiguous(), *parts, **call)
    new = (torch.randn(2, 2, 1, 128, device=DEVICE)[..., ::2], torch.randn(2, 2, 1, 64, device=DEVICE))
    with pytest.raises(ValueError, match="must be contiguous"):
        ops.unique_decode(t["q"], *parts, **call, new=new)
    with pytest.raises(ValueError, match="new values .* do not fit the cache"):
        ops.unique_decode(t["q"], *parts, **call, new=(new[1], new[1].half()))
    two = new[1].expand(2, 2, 2, 64).contiguous()
    with pytest.raises(ValueError, match="expected new keys of one token for each of 2 rows"):
        ops.unique_decode(t["q"], *parts, **call, new=(two, two))
    with pytest.raises(ValueError, match="expected new values of one token for each of 2 rows"):
        ops.unique_decode(t["q"], *parts, **call, new=(new[1], new[1][:1]))
    with pytest.raises(ValueError, match="`score` must be one of"):
        ops.append_tokens(
            *parts, new[1], new[1], t["seq_lens"], page_size=4, score="nope", stats_dtype="fp32", impl="triton"
        )
    with pytest.raises(ValueError, match="`token_mask` must be bool"):
        ops.unique_decode(t["q"], *parts, **call, token_mask=t["token_mask"].long())
    with pytest.raises(NotImplementedError, match="at most 8192 scored pages"):
        ops.select_pages(
            torch.zeros(1, 1, 20000, device=DEVICE),
            num_kept=9000,
            sink_pages=1,
            recent_pages=1,
            page_size=2,
            impl="triton",
        )
