"""Scores do not depend on how they are launched: block sizes, blocks per program, depth of the loads' pipeline."""

import importlib
from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import DEVICE, Case
from tests.numerics import assert_same_pages
from unique_attention import ops

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

BASE = Case(S=331, P=2, K=8, HK=1, D=64, DV=64, stats_dtype="int4")
CASES = [
    BASE,
    replace(BASE, stats_dtype="int8", vote="max"),
    replace(BASE, table=True, padded=False),
    replace(BASE, stats_dtype="int8", table=True, padded=False, score="minmax"),
    replace(BASE, D=32, DV=32, score="absolute"),
    replace(BASE, stats_dtype="fp8"),
]
# pages per block, warps, blocks per program, stages; 0: the next block waits in registers
LAUNCHES = [(32, 1, 1, 1), (32, 1, 2, 0), (16, 2, 4, 0), (32, 1, 8, 3)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_scores_and_selection_are_the_same_however_they_are_launched(case, monkeypatch):
    module = importlib.import_module("unique_attention.page_score")
    if case == BASE:
        # peaks of groups too
        monkeypatch.setattr(importlib.import_module("unique_attention.page_select"), "MAX_SINGLE", 0)
    t = case.tensors()
    names = {"score": case.score, "stats_dtype": case.stats_dtype}
    rows = {name: t[name] for name in ("seq_lens", "seq_starts", "page_table")}
    stats = ops.page_stats(t["k"], page_size=case.P, **names, **rows, impl="triton")
    results = []
    for launch in LAUNCHES:
        for table in ("SCORE_LAUNCH", "FEW_LAUNCH", "FEWEST_LAUNCH"):
            monkeypatch.setattr(module, table, dict.fromkeys(module.SCORE_LAUNCH, launch))
        monkeypatch.setattr(module, "UNPACKED_LAUNCH", launch)
        scores = ops.page_scores(
            t["q"], stats, page_size=case.P, group_reduce=case.vote, **names, **rows, impl="triton"
        )  # fmt: skip
        _, ids = ops.unique_decode(
            t["q"], t["k"], t["v"], stats, config=case.config, **rows, return_page_ids=True, impl="triton"
        )  # fmt: skip
        results.append((scores, ids))
    assert results[0][0].isfinite().any()
    for scores, ids in results[1:]:
        if case.stats_dtype == "fp8" or DEVICE == "cuda":
            # sums of floats in another order, or rounded once less
            torch.testing.assert_close(scores, results[0][0], rtol=1e-5, atol=1e-5)
            assert_same_pages(ids, results[0][1], results[0][0], band=1e-4)
        else:
            assert torch.equal(scores, results[0][0])
            assert torch.equal(ids, results[0][1])
