"""What only a device can show: 16-bit types, determinism, graphs, growth without compilation or synchronisation."""

import importlib
from dataclasses import replace

import pytest
import torch
import triton

from tests.kernels.cases import Case
from tests.numerics import assert_close_to_oracle
from unique_attention import ops

pytestmark = pytest.mark.gpu
LARGE = Case(B=3, HK=4, G=8, S=5000, D=128, DV=128, K=64, dtype=torch.bfloat16, stats_dtype="int4")
CASES = [
    LARGE,
    replace(LARGE, P=16, K=32, stats_dtype="int8", dtype=torch.float16),
    replace(LARGE, P=8, stats_dtype="bf16", table=True, padded=False),
    replace(LARGE, D=256, DV=256, G=4, stats_dtype="fp8", holes=True),
    replace(LARGE, D=64, DV=64, G=1, softcap=20.0, sinks=True),
    replace(LARGE, D=80, DV=80, G=7, HK=1),
    replace(LARGE, B=20, HK=8, G=2, S=2000),
]
NAMES = ("seq_lens", "seq_starts", "token_mask", "page_table", "softcap", "sinks")


def prepared(case):
    t = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.tensors().items()}
    settings = {"page_size": case.P, "score": case.score, "stats_dtype": case.stats_dtype}
    lengths = {name: t[name] for name in ("seq_lens", "seq_starts", "token_mask", "page_table")}
    stats = ops.page_stats(t["k"], **settings, **lengths, impl="triton")
    return t, stats, {name: t[name] for name in NAMES}


def compilations():
    """Kernels compiled so far."""
    count = 0
    for name in ("page_stats", "page_score", "page_select", "second_level", "sparse_decode", "dense_decode"):
        for value in vars(importlib.import_module(f"unique_attention.{name}")).values():
            if isinstance(value, triton.runtime.JITFunction):
                count += sum(len(cache[0]) for cache in value.device_caches.values())
    return count


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_decode_is_as_exact_as_the_reference(case):
    t, stats, common = prepared(case)
    out, page_ids = ops.unique_decode(
        t["q"], t["k"], t["v"], stats, config=case.config, **common, return_page_ids=True, impl="triton"
    )
    wide = {name: x.double() if name == "sinks" and x is not None else x for name, x in common.items()}
    listed = {"page_size": case.P, "impl": "reference"}
    oracle = ops.sparse_decode(*(t[n].double() for n in "qkv"), page_ids, **listed, **wide)
    low = ops.sparse_decode(*(t[n] for n in "qkv"), page_ids, **listed, **common)
    # probabilities are rounded to the dtype of the values before the second product
    rounded = low + low.abs().max() * torch.finfo(case.dtype).eps
    assert_close_to_oracle(out, oracle, rounded, case.dtype)
    kept = (page_ids >= 0).sum(-1)
    assert (kept == case.K).all()


def test_the_same_input_gives_the_same_bits():
    t, stats, common = prepared(LARGE)
    runs = [ops.unique_decode(t["q"], t["k"], t["v"], stats, config=LARGE.config, **common) for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs)


def test_a_graph_follows_lengths_on_the_device():
    t, stats, common = prepared(LARGE)
    counters = torch.zeros(LARGE.B * LARGE.HK * ops.ROW_COUNTERS, dtype=torch.int32, device="cuda")

    def step():
        return ops.unique_decode(
            t["q"], t["k"], t["v"], stats, config=LARGE.config, **common, counters=counters, return_page_ids=True
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, page_ids = step()
    for shorter in (0, 1, 700, 4000, 4400):
        t["seq_lens"].copy_(torch.tensor([5000, 4989, 4978]) - shorter)
        graph.replay()
        expected, expected_ids = step()
        assert torch.equal(page_ids, expected_ids) and torch.equal(out, expected)
        # rows far shorter than the cache too list as many pages as they keep, each once and all their own
        num_pages = -(-t["seq_lens"] // LARGE.P)
        full = page_ids[num_pages > LARGE.K]
        assert (full >= 0).all() and (full.diff(dim=-1) > 0).all()
        assert (page_ids.amax((1, 2)) == num_pages - 1).all()


def test_growing_contexts_neither_compile_nor_wait():
    t, stats, common = prepared(LARGE)
    new = tuple(torch.randn(LARGE.B, LARGE.HK, 1, 128, dtype=LARGE.dtype, device="cuda") for _ in "kv")

    def step():
        ops.unique_decode(t["q"], t["k"], t["v"], stats, config=LARGE.config, **common, new=new)

    t["seq_lens"].fill_(1)
    step()
    before = compilations()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(64):
            t["seq_lens"].add_(73)
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compilations() == before > 0
