"""The rotary kernel against the function of Transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.kernels.cases import DEVICE
from unique_attention.rotary import rotary

pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "rows"), [((2, 8, 2, 1, 64), 1), ((3, 4, 4, 5, 96), 3), ((1, 14, 2, 1, 128), 1)])
def test_equals_the_function_of_transformers(dtype, shape, rows, poisoned_memory):
    batch, heads, kv_heads, tokens, dim = shape
    # as attention modules have them: heads and tokens swapped by a view
    q = torch.randn(batch, tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    k = torch.randn(batch, tokens, kv_heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    angle = torch.randn(rows, tokens, dim // 2, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    # devices round where torch does; the interpreter cuts bf16 off
    tolerance = 4e-2 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.0
    for found, expected in zip(rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)):
        assert found.dtype == dtype and found.is_contiguous()
        assert (found.float() - expected.float()).abs().max() <= tolerance


def test_refuses_what_does_not_fit():
    q, k, cos = torch.zeros(2, 4, 1, 64), torch.zeros(2, 2, 1, 64), torch.ones(1, 1, 64)
    for wrong in ((q, k, cos[..., :32], cos[..., :32]), (q, k[:1], cos, cos), (q, k, cos.double(), cos)):
        with pytest.raises(ValueError, match="do not fit|must share"):
            rotary(*wrong)
