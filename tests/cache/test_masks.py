"""Masks and exact dense attention: what is read off a mask, when nothing is, and equality with plain softmax."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from unique_attention.hf import dense, masks
from unique_attention.hf.masks import facts_of, is_lower_right, matches, unique_mask


class Module(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


def padding(rows=2, length=40, pads=(13, 0)):
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row, pad in enumerate(pads):
        mask[row, :pad] = False
    return mask


def truth(q, k, v, mask, scaling=0.2, softcap=None, sinks=None):
    """Plain softmax in fp64."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    logits = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        return (logits.softmax(-1)[..., :-1] @ v).transpose(1, 2).float()
    return (logits.softmax(-1) @ v).transpose(1, 2).float()


def tensors(length, size, batch=2):
    return (
        torch.randn(batch, 4, length, 16),
        torch.randn(batch, 2, size, 16),
        torch.randn(batch, 2, size, 24),
    )


SIZES = [(40, 40, 0), (1, 40, 39), (7, 40, 33)]


@pytest.mark.parametrize("pads", [None, (0, 0), (13, 0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_mask_means_what_sdpas_means(sizes, pads):
    length, size, offset = sizes
    given = None if pads is None else padding(pads=pads)
    arguments = {"batch_size": 2, "q_length": length, "kv_length": size, "q_offset": offset, "attention_mask": given}
    ours, theirs = unique_mask(**arguments), sdpa_mask(**arguments, allow_is_causal_skip=False)
    if ours is None:
        assert pads != (13, 0)
    else:
        assert torch.equal(ours.expand_as(theirs), theirs)
        facts = facts_of(ours, 2)
        assert torch.equal(facts.token_mask, given if given is not None else torch.ones_like(facts.token_mask))
        assert facts.seq_starts.tolist() == facts.starts_host == list(pads or (0, 0))
        recomputed = facts_of(ours.clone(), 2)
        assert torch.equal(recomputed.token_mask, facts.token_mask)
    if length == size and pads != (13, 0):
        assert ours is None, "no T x S mask where nothing is padded"


def test_long_chunk_on_a_warm_cache_is_marked_not_masked(monkeypatch):
    monkeypatch.setattr(masks, "MARK_FROM", 100)
    arguments = {"batch_size": 2, "q_length": 7, "kv_length": 40, "q_offset": 33}
    for given in (None, padding(pads=(0, 0))):
        marker = unique_mask(**arguments, attention_mask=given)
        assert is_lower_right(marker) and marker.numel() == 0
    assert unique_mask(**arguments, attention_mask=padding()).shape == (2, 1, 7, 40)
    for changed in (
        {"q_offset": torch.tensor(33)},
        {"kv_length": 64},
        {"mask_function": and_masks(causal_mask_function, sliding_window_overlay(8))},
        {"allow_is_causal_skip": False},
    ):
        mask = unique_mask(**{**arguments, **changed})
        assert mask.numel() > 0, "only a plain causal chunk on a growing cache may be marked"


@pytest.mark.parametrize("features", [{}, {"softcap": 3.0}, {"s_aux": 1}, {"softcap": 3.0, "s_aux": 1}])
@pytest.mark.parametrize("kind", ["causal", "marker", "padded", "float", "static", "decode"])
def test_dense_attention_is_exact(features, kind, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK_ELEMENTS", 2 * 4 * 40 * 5)  # blocks of five queries
    length, size = {"marker": (7, 40), "static": (7, 40), "decode": (1, 40)}.get(kind, (40, 40))
    q, k, v = tensors(length, size)
    sinks = torch.randn(4) if "s_aux" in features else None
    full = torch.ones(length, size, dtype=torch.bool).tril(0 if kind == "static" else size - length)
    mask = {"marker": torch.empty(1, 1, 0, 0, dtype=torch.bool)}.get(kind)
    full = full.expand(2, 1, -1, -1)
    if kind in ("padded", "float"):
        full = full & padding()[:, None, None]
        full = full | torch.eye(40, dtype=torch.bool)  # no query without keys: what it gives is nobody's business
        mask = full if kind == "padded" else torch.where(full, 0.0, torch.finfo(torch.float32).min)
    out = dense.dense_attention(
        Module(), q, k, v, mask, causal=True, scaling=0.2, softcap=features.get("softcap"), s_aux=sinks
    )
    expected = truth(q, k, v, full, softcap=features.get("softcap"), sinks=sinks)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-5


def test_dense_attention_has_the_gradients_of_plain_softmax(monkeypatch):
    q, k, v = (x.requires_grad_() for x in tensors(20, 20))
    sinks = torch.randn(4, requires_grad=True)
    weights = torch.randn(2, 20, 4, 24)
    found = []
    for block in (1 << 26, 2 * 4 * 20 * 6):
        monkeypatch.setattr(dense, "BLOCK_ELEMENTS", block)
        out = dense.dense_attention(Module(), q, k, v, None, causal=True, scaling=0.2, softcap=3.0, s_aux=sinks)
        found.append(torch.autograd.grad((out * weights).sum(), (q, k, v, sinks)))
    full = torch.ones(20, 20, dtype=torch.bool).tril()
    out = truth(q, k, v, full, softcap=3.0, sinks=sinks)
    expected = torch.autograd.grad((out * weights).sum(), (q, k, v, sinks))
    for grads in found:
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(grads, expected, strict=True))


def test_dense_without_features_is_sdpa_bit_for_bit():
    q, k, v = tensors(40, 40)
    mask = sdpa_mask(2, 40, 40, attention_mask=padding(), allow_is_causal_skip=False)
    for given in (None, mask):
        theirs, _ = sdpa_attention_forward(Module(), q, k, v, given, scaling=0.2, is_causal=True)
        assert torch.equal(dense.dense_attention(Module(), q, k, v, given, causal=True, scaling=0.2), theirs)


def test_plain_and_packed_masks_are_told_from_others():
    square = {"batch_size": 2, "q_length": 40, "kv_length": 40, "allow_is_causal_skip": False}
    plain = sdpa_mask(**square, attention_mask=padding())
    assert matches(plain, padding())
    documents = torch.tensor([[0] * 15 + [1] * 25, [0] * 40])
    packed = sdpa_mask(
        **square, mask_function=and_masks(causal_mask_function, packed_sequence_mask_function(documents))
    )
    everything = torch.ones(2, 40, dtype=torch.bool)
    assert matches(packed, everything, documents)
    assert not matches(packed, everything)
    assert not matches(packed, everything, documents.flip(0))
    window = and_masks(causal_mask_function, sliding_window_overlay(8))
    for other in (sdpa_mask(**square, mask_function=window), ~torch.zeros_like(plain), plain[:, :, :20]):
        assert not matches(other, facts_of(other, 2).token_mask)


def test_a_mask_of_many_rows_is_compared_in_all_of_them():
    length = 1100  # more than one block of rows
    plain = sdpa_mask(batch_size=1, q_length=length, kv_length=length, allow_is_causal_skip=False)
    everything = torch.ones(1, length, dtype=torch.bool)
    assert matches(plain, everything)
    for row, column in ((3, 1), (3, 9), (1090, 2)):
        other = plain.clone()
        other[0, 0, row, column] ^= True
        assert not matches(other, everything)


def test_facts_cover_the_keys_whatever_the_width_of_the_given_mask():
    given = padding(length=50)
    mask = unique_mask(batch_size=2, q_length=7, kv_length=40, q_offset=33, attention_mask=given)
    facts = facts_of(mask, 2)
    assert torch.equal(facts.token_mask, given[:, :40]) and facts.seq_starts.tolist() == [13, 0]


def test_a_decode_step_asks_sdpa_for_no_look_at_the_padding(monkeypatch):
    skips = []

    def recorded(*args, allow_is_causal_skip=True, **kwargs):
        skips.append(allow_is_causal_skip)
        return sdpa_mask(*args, allow_is_causal_skip=allow_is_causal_skip, **kwargs)

    monkeypatch.setattr(masks, "sdpa_mask", recorded)
    for pads in ((0, 0), (13, 0)):
        mask = unique_mask(batch_size=2, q_length=1, kv_length=40, q_offset=39, attention_mask=padding(pads=pads))
        assert mask.shape == (2, 1, 1, 40)
    assert skips == [False, False]


def test_float_masks_and_missing_masks_have_no_facts():
    assert facts_of(None, 2) is None
    assert facts_of(torch.zeros(2, 1, 1, 40), 2) is None
    assert facts_of(torch.empty(1, 1, 0, 0, dtype=torch.bool), 2) is None


@pytest.mark.parametrize(("dims", "kind"), [((16, 64), "dense"), ((64, 512), "dense"), ((64, 64), "sparse")])
def test_head_dims_without_a_kernel_stay_dense_where_kernels_run(dims, kind, monkeypatch):
    from types import SimpleNamespace

    from unique_attention.hf import modes

    monkeypatch.setattr(modes, "use_triton", lambda *args: True)
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(layer_types=None))
    q, k, v = (torch.zeros(1, 2, n, d) for n, d in ((1, dims[0]), (9, dims[0]), (9, dims[1])))
    mode = modes.decide(module, q, k, v, object(), None, {})
    assert mode.kind == kind and mode.fallback == (kind == "dense")
