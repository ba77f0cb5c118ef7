"""Soft-mask attention kernels: output and gradients against the reference in float64, thresholds, skipped tiles."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cases import DEVICE
from tests.kernels.soft_mask_cases import SoftCase, check_case, outputs_and_grads
from unique_attention import soft_mask

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

CASES = [
    SoftCase(),
    SoftCase(P=8, K=4, recent=2),
    SoftCase(P=16, K=3),
    SoftCase(P=2, K=12, T=40),
    SoftCase(P=64, K=3, T=200, HK=1, G=1, D=16, DV=16),
    SoftCase(score="mean"),
    SoftCase(score="minmax", temperature=0.5),
    SoftCase(G=3, HK=1, D=80, DV=24),
    SoftCase(G=1, HK=1),
    SoftCase(B=2, left_padding=True),
    SoftCase(B=2, left_padding=True, holes=True, score="minmax", T=50),
    SoftCase(documents=(0, 13, 50, 51, 58)),
    SoftCase(documents=(0, 25, 60), holes=True, threshold_grad=True),
    SoftCase(softcap=3.0, sinks=True, T=50),
    SoftCase(threshold_grad=True, temperature=0.3),
    # rounded to fp16 the features order two pages at a boundary differently
    SoftCase(threshold_grad=True, temperature=0.5, dtype=torch.float16, HK=1, T=160, P=2, K=16, seed=3),
    SoftCase(temperature=0.01, T=50),
    SoftCase(temperature=1e3, T=50),
    SoftCase(dtype=torch.float16, P=8, K=4),
    SoftCase(dtype=torch.float16, score="minmax", softcap=5.0, sinks=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_soft_mask_matches_reference(case):
    check_case(case, DEVICE)


@pytest.fixture
def selections(monkeypatch):
    """Thresholds and open tiles of the calls made while it is in use."""
    seen = []
    select = soft_mask.select_tiles

    def spy(*args):
        seen.append(select(*args))
        return seen[-1]

    monkeypatch.setattr(soft_mask, "select_tiles", spy)
    return seen


@pytest.mark.parametrize("kind", ["distinct", "tied", "all equal", "huge"])
def test_soft_mask_threshold_is_the_exact_midpoint(kind, selections):
    P, K, T, D = 2, 9, 80, 16
    q, k = torch.randn(1, 2, T, D, device=DEVICE), torch.randn(1, 1, T, D, device=DEVICE)
    if kind != "distinct":
        # sums of small integers are exact in any order
        q, k = q.round().clamp(-1, 1), k.round().clamp(-1, 1)
    if kind == "all equal":
        k = k[:, :, :1].expand_as(k).contiguous()
    if kind == "huge":
        k = k * 1024.0
    soft_mask.soft_mask_attention(q, k, k, page_size=P, num_kept=K, temperature=1.0, score="mean")
    theta = selections[0][0].theta[0, 0]
    scores = q[0].mean(0).double() @ k[0, 0].unflatten(0, (-1, P)).mean(1).double().T  # [T, N]
    for t in range(T):
        free = scores[t, 1 : t // P]  # sink and own page are forced
        if len(free) <= K - 2:
            assert theta[t] == -torch.inf
        else:
            midpoint = free.topk(K - 1).values[-2:].mean()
            assert abs(theta[t] - midpoint) <= (2e-6 * free.abs().max() if kind == "distinct" else 0), (t, theta[t])


def test_soft_mask_with_all_pages_kept_is_dense_attention():
    tensors = SoftCase(T=50).tensors(DEVICE)
    got = outputs_and_grads(
        soft_mask.soft_mask_attention, tensors, torch.float32, page_size=4, num_kept=13, temperature=1.0
    )
    dense = outputs_and_grads(
        lambda q, k, v, sinks: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        tensors, torch.float64,
    )  # fmt: skip
    for name, expected in dense.items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-5, atol=1e-5)


def topical(T=128, D=16):
    """Four blocks of 32 keys about one topic each; the queries of the last two blocks ask for the second topic."""
    topics = 4 * torch.eye(4, D, device=DEVICE).repeat_interleave(T // 4, 0)
    q = topics.clone()
    q[T // 2 :] = topics[T // 4]
    noise = 0.1 * torch.randn(2, T, D, device=DEVICE)
    v = torch.randn(1, 1, T, D, device=DEVICE)
    return (q + noise[0])[None, None].repeat(1, 2, 1, 1), (topics + noise[1])[None, None], v


def test_soft_mask_skips_tiles_within_the_stated_bound(selections):
    q, k, v = topical()
    T, P, eps = q.shape[2], 4, 1e-3
    settings = {"page_size": P, "num_kept": 6, "temperature": 1.0, "score": "mean"}
    exact = soft_mask.soft_mask_attention(q, k, v, **settings, skip_below=0)
    skipped = soft_mask.soft_mask_attention(q, k, v, **settings, skip_below=eps)
    complete, partial = (is_open for _, is_open in selections)
    assert partial.sum() < complete.sum()
    block_t, block_s = T // partial.shape[1], T // partial.shape[2]
    visited = partial[0].bool().repeat_interleave(block_t, 0).repeat_interleave(block_s, 1)
    token = torch.arange(T, device=DEVICE)
    causal = token <= token[:, None]
    forced = causal & ((token // P == 0) | (token // P == token[:, None] // P))
    mass = (q[0].double() @ k[0, 0].double().T * q.shape[-1] ** -0.5).exp()  # [H, T, T]
    lost = eps * (mass * (causal & ~visited)).sum(-1) / (mass * forced).sum(-1)  # [H, T]
    difference = (exact - skipped)[0].double().abs().amax(-1)
    assert difference.max() > 0, "the bound is not tested if nothing is lost"
    assert (difference <= 2 * lost * v.abs().max() + 1e-6).all()


def test_soft_mask_default_skips_without_a_visible_error(selections):
    q, k, v = topical()
    tensors = {"q": 4 * q, "k": k, "v": v, "dout": torch.randn_like(q)}
    settings = {"page_size": 4, "num_kept": 6, "temperature": 0.2, "score": "mean"}
    exact = outputs_and_grads(soft_mask.soft_mask_attention, tensors, torch.float32, **settings, skip_below=0)
    default = outputs_and_grads(soft_mask.soft_mask_attention, tensors, torch.float32, **settings)
    assert selections[1][1].sum() < selections[0][1].sum()
    for name, expected in exact.items():
        torch.testing.assert_close(default[name], expected, rtol=1e-5, atol=1e-6)


def test_soft_mask_is_deterministic():
    tensors = SoftCase(T=50, sinks=True).tensors(DEVICE)
    settings = SoftCase(T=50, threshold_grad=True).settings(DEVICE)
    first, second = (
        outputs_and_grads(soft_mask.soft_mask_attention, tensors, torch.float32, **settings) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_soft_mask_takes_any_strides():
    case = SoftCase(T=40)
    tensors = case.tensors(DEVICE)
    strided = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for name, x in tensors.items()
    }
    plain, other = (
        outputs_and_grads(soft_mask.soft_mask_attention, t, torch.float32, **case.settings(DEVICE))
        for t in (tensors, strided)
    )
    for name, value in plain.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": "diagonal"}, "impl='reference'"),
        ({"group_reduce": "max"}, "group_reduce"),
        ({"page_size": 3}, "power of two"),
    ],
)
def test_soft_mask_refuses_what_it_has_no_kernel_for(changes, message):
    t = SoftCase(T=8).tensors(DEVICE)
    settings = {"page_size": 4, "num_kept": 6, "temperature": 1.0} | changes
    with pytest.raises(NotImplementedError, match=message):
        soft_mask.soft_mask_attention(t["q"], t["k"], t["v"], **settings)
