"""The kernel for linear layers of few tokens, and the norms in the rotary kernel, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.linear import entries
from tests.kernels.cases import DEVICE
from unique_attention import skinny_linear as module
from unique_attention.rotary import rotary
from unique_attention.skinny_linear import LinearLaunch, plan_linear, rms_norm, skinny_linear

pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]
# the interpreter gets tl.dot wrong in bf16
DTYPES = [torch.float32, torch.float16] + ([] if DEVICE == "cpu" else [torch.bfloat16])


def tensor(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def noise(x, weight):
    """What the order of a float32 sum may change, `[..., n]`: sqrt(K) u (|x| @ |w|) with independent roundings."""
    unit = torch.finfo(torch.float32).eps / 2
    return x.shape[-1] ** 0.5 * unit * F.linear(x.double().abs(), weight.double().abs())


def compare(found, exact, torchs, order=0.0):
    """Not further from the truth than torch's own result of that dtype, twice over, and the order of its sums."""
    assert torch.isfinite(found).all(), "not written"
    bound = 2 * (torchs.double() - exact).abs().max() + torch.finfo(found.dtype).eps * exact.abs().max()
    assert ((found.double() - exact).abs() <= bound + order).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("depth", "sizes"), [(96, (64, 33, 40)), (2072, (30, 7)), (16, (5,))])
@pytest.mark.parametrize("bias", [False, True])
def test_linears_that_share_an_input_equal_torch(dtype, rows, depth, sizes, bias, poisoned_memory):
    x = tensor(rows, 1, depth, dtype=dtype)
    weights = tuple(tensor(n, depth, dtype=dtype, scale=depth**-0.5) for n in sizes)
    biases = tuple(tensor(n, dtype=dtype) for n in sizes) if bias else None
    outs = tuple(torch.empty(rows, 1, n, dtype=dtype, device=DEVICE) for n in sizes)
    skinny_linear(x, weights, biases, outs)
    for i, out in enumerate(outs):
        own = None if biases is None else biases[i]
        exact = F.linear(x.double(), weights[i].double(), None if own is None else own.double())
        compare(out, exact, F.linear(x, weights[i], own), noise(x, weights[i]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_pair_and_the_residual_equal_torch(dtype, rows, bias, poisoned_memory):
    x, residual = tensor(rows, 160, dtype=dtype), tensor(rows, 48, dtype=dtype)
    gate, up = (tensor(48, 160, dtype=dtype, scale=0.08) for _ in "gu")
    biases = tuple(tensor(48, dtype=dtype) for _ in "gu") if bias else None
    out, added = torch.empty_like(residual), torch.empty_like(residual)
    skinny_linear(x, (gate, up), biases, (out,), gated=True)
    skinny_linear(x, (up,), None if biases is None else biases[1:], (added,), residual)

    def formula(x, gate, up, residual, a, b):
        return F.silu(F.linear(x, gate, a)) * F.linear(x, up, b), residual + F.linear(x, up, b)

    pair = biases or (None, None)
    exact = formula(*(t if t is None else t.double() for t in (x, gate, up, residual, *pair)))
    # the slope of silu stays below 1.1
    left, right = (F.linear(x.double(), w.double(), b if b is None else b.double()) for w, b in zip((gate, up), pair))
    gated = 1.1 * noise(x, gate) * right.abs() + noise(x, up) * F.silu(left).abs()
    for found, truth, torchs, order in zip(
        (out, added), exact, formula(x, gate, up, residual, *pair), (gated, noise(x, up))
    ):
        compare(found, truth, torchs, order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 1024])
def test_the_norm_equals_torch(dtype, width, poisoned_memory):
    x, weight = tensor(3, 1, width, dtype=dtype, scale=5.0), tensor(width, dtype=dtype)
    out = torch.empty_like(x)
    rms_norm(x, weight, 1e-6, out)
    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    # as Transformers has it, rounded before the weight
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    compare(out, exact, weight * normed.to(dtype))
    with pytest.raises(ValueError, match="like x"):
        rms_norm(x, weight[1:], 1e-6, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80])
def test_norms_before_the_rotation_equal_torch(dtype, dim, poisoned_memory):
    q, k = (tensor(2, 1, heads, dim, dtype=dtype, scale=3.0).transpose(1, 2) for heads in (8, 2))
    weights = tuple(tensor(dim, dtype=dtype) for _ in "qk")
    angle = torch.randn(1, 1, dim // 2, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def formula(kind):
        normed = (F.rms_norm(x.to(kind), (dim,), w.to(kind), 1e-6) for x, w in zip((q, k), weights))
        return apply_rotary_pos_emb(*normed, cos.to(kind), sin.to(kind))

    for found, exact, torchs in zip(
        rotary(q, k, cos, sin, weights, (1e-6, 1e-6)), formula(torch.float64), formula(dtype)
    ):
        # one rounding more than torch's fused norm
        compare(found, exact, torchs + torch.finfo(dtype).eps * torchs.abs().max())


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("depth", [16, 1000, 4096])
def test_tiles_are_powers_of_two_that_fit(rows, depth):
    for columns in (8, 1024, 6144, 151936):
        for gated in (False, True):
            plan = plan_linear(rows, columns, depth, gated, 132)
            assert plan.block_m >= rows and plan.block_k >= 16 and plan.block_k & (plan.block_k - 1) == 0
            assert plan.block_k < 2 * max(depth, 16)


def test_measured_tiles_come_first(monkeypatch):
    best, other = LinearLaunch(1, 16, 64, 1, 4), LinearLaunch(16, 16, 64, 3, 2)
    times = {1: {plan_linear(1, 80, 64, False, 7): 3.0, best: 2.0}, 2: {other: 1.0}, 8: {other: 1.0}}
    lines = entries((7, 80, 64, False), times)
    assert lines == ["    (7, 1, 80, 64, False): LinearLaunch(1, 16, 64, 1, 4),  # 3.0 -> 2.0 us"]
    monkeypatch.setitem(module.MEASURED, (7, 1, 80, 64, False), best)
    assert plan_linear(1, 80, 64, False, 7) == best != plan_linear(1, 80, 64, False, 8)
    assert plan_linear(2, 80, 64, False, 7) != best


def test_refuses_what_does_not_fit():
    x, w, out = torch.zeros(1, 16), torch.zeros(8, 16), torch.zeros(1, 8)
    for wrong in (
        (x, (w,), None, (out[:, :4],)), (torch.zeros(17, 16), (w,), None, (torch.zeros(17, 8),)),
        (x, (w,) * 4, None, (out,) * 4), (x, (w.t().contiguous().t(),), None, (out,)),
        (x.double(), (w,), None, (out,)), (x, (w, w), None, (out,)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="to match"):
            skinny_linear(*wrong)
