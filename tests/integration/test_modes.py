"""The decision table: which path a call takes, and the reason that people read."""

from types import SimpleNamespace

import pytest
import torch

from unique_attention.hf.modes import DENSE, PREFILL, SOFT, SPARSE, decide

STEP, CHUNK = (1, 40), (7, 40)


def decided(sizes=STEP, layer="ours", mask=None, module=None, grad=False, **kwargs):
    tokens, slots = sizes
    query = torch.randn(2, 4, tokens, 16, requires_grad=grad)
    key, value = torch.randn(2, 2, 2, slots, 16)
    attention = torch.nn.Module()
    for name, item in (module or {}).items():
        setattr(attention, name, item)
    return decide(attention, query, key, value, layer, mask, kwargs)


SLIDING = {"config": SimpleNamespace(layer_types=["full_attention", "sliding_attention"]), "layer_idx": 1}
FULL = SLIDING | {"layer_idx": 0}


@pytest.mark.parametrize("sizes", [STEP, CHUNK])
@pytest.mark.parametrize(
    ("changes", "reason", "fallback"),
    [
        ({"cache": object()}, "continuous batching", True),
        ({"is_causal": False}, "not causal", False),
        ({"module": {"is_causal": False}}, "not causal", False),
        ({"sliding_window": 16}, "sliding window of 16 tokens", False),
        ({"module": SLIDING}, "layer type sliding_attention", False),
        ({"module": {"kv_lora_rank": 8}}, "latent attention", True),
        ({"module": {"indexer": torch.nn.Identity()}}, "its own indexer", True),
        ({"position_bias": torch.zeros(1)}, "position bias", True),
        ({"layer": None}, "do not come from a cache", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_runs_dense(sizes, changes, reason, fallback):
    mode = decided(sizes, **changes)
    assert (mode.kind, mode.fallback) == (DENSE, fallback) and reason in mode.reason


@pytest.mark.parametrize(
    ("mask", "reason"), [(torch.zeros(2, 1, 1, 40), "float mask"), (torch.ones(2, 4, 1, 40) > 0, "a mask per head")]
)
def test_masks_that_a_step_cannot_take(mask, reason):
    assert decided(mask=mask) == (DENSE, reason, True)


def test_what_runs_sparse():
    for changes in ({}, {"mask": torch.ones(2, 1, 1, 40) > 0}, {"module": FULL}, {"is_causal": True}):
        assert decided(**changes).kind == SPARSE
    # the keyword speaks for the call, the attribute for the module
    assert decided(module={"is_causal": False}, is_causal=True).kind == SPARSE
    assert decided(CHUNK, mask=torch.zeros(2, 1, 7, 40)).kind == decided(CHUNK).kind == PREFILL


def test_what_trains_through_the_soft_mask():
    whole = (40, 40)
    assert decided(whole, grad=True).kind == SOFT
    assert decided(whole, layer=None, use_cache=False).kind == SOFT
    assert decided(whole).kind == PREFILL
    with torch.no_grad():
        assert decided(whole, grad=True).kind == PREFILL
    for changes, reason in (
        ({"mask": torch.zeros(2, 1, 40, 40)}, "float mask"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"sizes": CHUNK}, "several new tokens on a warm cache"),
    ):
        mode = decided(**{"sizes": whole, "grad": True, **changes})
        assert mode.kind == DENSE and mode.fallback and reason in mode.reason
