"""Norms and rotations that run as one launch while a step is recorded: which, how exactly, what is left behind."""

import pytest
import torch

from tests.capture.recorder import Replayed, recording_on_cpu
from tests.capture.test_generate import model_with
from tests.integration.tiny import ARCHITECTURES, batch, greedy, make
from unique_hf import fused as parts
from unique_hf.fused import fused

# rotations of other pairs, of a part of the head, or by other functions
NOT_ROTATED = {"glm4", "gpt_oss", "deepseek_v3"}


@pytest.fixture(autouse=True)
def rotation(monkeypatch):
    """In place of the kernel, which needs a device: the same in torch, counting its calls."""
    calls = []

    def rotary(q, k, cos, sin):
        calls.append(q.shape)
        turned = (torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) for x in (q, k))
        return tuple(x * cos.unsqueeze(1) + y * sin.unsqueeze(1) for x, y in zip((q, k), turned))

    monkeypatch.setattr(parts, "_rotary", lambda: rotary)
    return calls


# the weight of a Gemma norm is an offset from one
NOT_PLAIN = {"gemma2", "gemma3_text"}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_all_plain_norms_and_no_others(architecture):
    model = make(architecture)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(-1.0, 2.0)
    x = {norm: torch.randn(3, norm.weight.numel()) for norm in norms}
    expected = {norm: norm(x[norm]) for norm in norms}
    with fused(model) as (count, _):
        assert count == (0 if architecture in NOT_PLAIN else len(norms)) and norms
        for norm in norms:
            assert (norm(x[norm]) - expected[norm]).abs().max() < 1e-5
            assert norm(x[norm].double()).dtype == torch.float64, "other dtypes take the module's own way"
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_plain_rotations_and_no_others(architecture, rotation):
    model, inputs = make(architecture), batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        with fused(model) as (_, count):
            rotation.clear()
            found = model(**inputs).logits
    assert len(rotation) == (0 if architecture in NOT_ROTATED else 2) <= count
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_norm_that_differs_or_is_overridden_is_left_alone():
    model = model_with("qwen3")
    first, second = model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm

    def own(x):
        return x

    first.forward = own
    with fused(model) as (count, _):
        assert count == 4 and first.forward is own and "forward" in vars(second)
    assert first.forward is own and "forward" not in vars(second)
    kind = type(second)
    original = kind.forward
    try:
        kind.forward = lambda self, x: original(self, x) * 1.01
        with fused(model) as (count, _):
            assert count == 0
    finally:
        kind.forward = original


def test_generation_with_fused_parts_gives_the_same_tokens(rotation):
    model, inputs = model_with("qwen3", layers=2), batch()
    expected = greedy(model, inputs, tokens=40).tolist()
    with fused(model) as counts:
        rotation.clear()
        assert greedy(model, inputs, tokens=40).tolist() == expected
    assert counts == (9, 2) and len(rotation) == 2 * 40


def test_nothing_stays_fused_after_a_captured_call(rotation):
    class Fusing(Replayed):
        fuses = True

    model, inputs = model_with("qwen3", layers=2), batch()
    expected = greedy(model, inputs, tokens=12).tolist()
    with recording_on_cpu(Fusing) as log:
        for _ in range(2):
            assert greedy(model, inputs, tokens=12).tolist() == expected
    assert log.count("capture") == 1 and rotation
    assert not any("forward" in vars(module) for module in model.modules())
