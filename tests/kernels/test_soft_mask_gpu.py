"""Soft-mask attention on the GPU: 16-bit types, realistic lengths, memory, and no compilation as lengths grow."""

import pytest
import torch

from tests.kernels.soft_mask_cases import SoftCase, check_case, outputs_and_grads
from unique_attention import soft_mask
from unique_attention.soft_mask_bwd import _soft_mask_bwd_dkv_kernel
from unique_attention.soft_mask_fwd import _soft_mask_fwd_attend_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
BF16, FP16 = torch.bfloat16, torch.float16

CASES = [
    SoftCase(HK=8, G=4, T=2048, D=128, DV=128, K=64, dtype=BF16),
    SoftCase(HK=8, G=4, T=2048, D=128, DV=128, K=64, dtype=BF16, temperature=0.2),
    SoftCase(HK=4, G=4, T=2000, D=128, DV=128, P=8, K=32, dtype=FP16, recent=2),
    SoftCase(HK=2, G=8, T=1531, D=64, DV=64, P=16, K=16, dtype=BF16),
    SoftCase(HK=2, G=1, T=1024, D=256, DV=256, P=8, K=16, dtype=BF16),
    SoftCase(HK=1, G=7, T=1024, D=80, DV=48, K=32, dtype=BF16, softcap=30.0, sinks=True),
    SoftCase(HK=1, G=16, T=777, D=128, DV=128, P=2, K=64, dtype=BF16),
    SoftCase(HK=2, G=4, T=1024, D=128, DV=128, P=32, K=8, dtype=BF16, score="minmax"),
    SoftCase(HK=2, G=2, T=1024, D=96, DV=96, P=128, K=4, dtype=FP16, score="mean"),
    SoftCase(B=3, HK=2, G=4, T=900, D=128, DV=128, K=32, dtype=BF16, left_padding=True, holes=True),
    SoftCase(HK=2, G=4, T=1500, D=128, DV=128, K=32, dtype=BF16, documents=(0, 13, 700, 701, 1400)),
    SoftCase(HK=2, G=4, T=1024, D=128, DV=128, K=32, dtype=BF16, threshold_grad=True, temperature=0.5),
    SoftCase(HK=2, G=4, T=512, D=64, DV=64, K=16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_soft_mask_matches_reference_on_gpu(case):
    check_case(case, "cuda")


def test_soft_mask_is_deterministic_on_gpu():
    case = SoftCase(HK=8, G=4, T=4096, D=128, DV=128, K=64, dtype=BF16, temperature=0.1, threshold_grad=True)
    tensors, settings = case.tensors("cuda"), case.settings("cuda")
    first, second = (outputs_and_grads(soft_mask.soft_mask_attention, tensors, BF16, **settings) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_soft_mask_never_compiles_again_for_another_length():
    def step(length):
        case = SoftCase(HK=2, G=4, T=length, D=64, DV=64, K=16, dtype=BF16)
        outputs_and_grads(soft_mask.soft_mask_attention, case.tensors("cuda"), BF16, **case.settings("cuda"))

    def compiled():
        kernels = (_soft_mask_fwd_attend_kernel, _soft_mask_bwd_dkv_kernel)
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    step(256)
    before = compiled()
    for length in range(257, 1500, 37):
        step(length)
    assert compiled() == before


def test_soft_mask_never_waits_for_the_device():
    case = SoftCase(HK=2, G=4, T=700, D=64, DV=64, K=16, dtype=BF16, documents=(0, 300, 640))
    tensors, settings = case.tensors("cuda"), case.settings("cuda")
    outputs_and_grads(soft_mask.soft_mask_attention, tensors, BF16, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_grads(soft_mask.soft_mask_attention, tensors, BF16, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_soft_mask_memory_is_linear():
    def peak(length):
        case = SoftCase(HK=2, G=4, T=length, D=128, DV=128, K=64, dtype=BF16)
        tensors, settings = case.tensors("cuda"), case.settings("cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs_and_grads(soft_mask.soft_mask_attention, tensors, BF16, **settings)
        return torch.cuda.max_memory_allocated() - before

    # lists of tiles grow with the square of the length, but stay far below everything else
    assert peak(32768) <= 2.3 * peak(16384)
