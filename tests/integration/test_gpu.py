"""The same promises on a CUDA device, where the kernels and torch's flash attention run."""

import pytest
import torch

import unique_hf
from tests.integration.tiny import batch, greedy, make
from unique_attention.hf import dense

pytestmark = pytest.mark.gpu
SPARSE = {"page_size": 4, "budget": 16, "stats_dtype": "fp32"}


def to_cuda(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("cache", [None, "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("padding", [(0, 0), (13, 0)])
def test_all_pages_kept_gives_the_tokens_of_sdpa_on_cuda(padding, cache):
    inputs = to_cuda(batch(padding=padding))
    own, ours = make(attention="sdpa").cuda(), make().cuda()
    arguments = {"cache_implementation": cache, "disable_compile": True}
    # not offloaded: there Transformers up to 5.17 may read a layer of its own while it is being moved
    assert greedy(ours, inputs, **arguments).tolist() == greedy(own, inputs).tolist()
    assert unique_hf.report(ours).pages_read > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_few_pages_kept_gives_the_logits_of_the_cpu(architecture):
    inputs, found = batch(), {}
    for device in ("cpu", "cuda"):
        model = make(architecture).to(device)
        unique_hf.configure(model, **SPARSE)
        mask, logits = inputs["attention_mask"].to(device), []
        with torch.no_grad():
            out = model(input_ids=inputs["input_ids"].to(device), attention_mask=mask, use_cache=True)
            for step in range(6):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                token = torch.full((2, 1), 5 + step, device=device)
                out = model(token, attention_mask=mask, past_key_values=out.past_key_values)
                logits.append(out.logits.cpu())
        found[device] = torch.cat(logits, dim=1)
    assert found["cpu"].std() > 0.05
    assert (found["cpu"] - found["cuda"]).abs().max() < 1e-3


def test_compiled_static_decode_gives_the_tokens_of_eager():
    model, inputs = make().cuda(), to_cuda(batch())
    unique_hf.configure(model, **SPARSE)
    eager = greedy(model, inputs, cache_implementation="static", disable_compile=True)
    assert greedy(model, inputs, cache_implementation="static").tolist() == eager.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(128, 128), (80, 80), (64, 96)])
def test_unmasked_chunks_on_a_warm_cache_are_exact(dtype, dims):
    q = torch.randn(1, 8, 257, dims[0], device="cuda", dtype=dtype)
    k = torch.randn(1, 2, 1025, dims[0], device="cuda", dtype=dtype)
    v = torch.randn(1, 2, 1025, dims[1], device="cuda", dtype=dtype)
    marker = torch.empty(1, 1, 0, 0, dtype=torch.bool, device="cuda")
    out = dense.dense_attention(torch.nn.Module(), q, k, v, marker, causal=True, scaling=0.1)
    hidden = torch.ones(257, 1025, dtype=torch.bool, device="cuda").triu(1025 - 257 + 1)

    def softmax(q, k, v):
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        return (q @ k.transpose(2, 3) * 0.1).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    truth = softmax(q.double(), k.double(), v.double())
    eager_error = (softmax(q, k, v) - truth).abs().max()
    bound = 2 * eager_error + torch.finfo(dtype).eps * truth.abs().max()
    assert (out.transpose(1, 2) - truth).abs().max() <= bound
