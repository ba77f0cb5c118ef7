"""Several tokens with grad (and passes without a cache): the soft mask, and when it must not be used."""

import pytest
import torch

import unique_hf
from tests.integration.tiny import batch, make

DENSE = {"page_size": 4, "budget": 1024}
SPARSE = {"page_size": 4, "budget": 16, "temperature": 0.5}


def gradients(model, inputs, **kwargs):
    """Logits at valid positions and all gradients of a fixed scalar of them."""
    model.zero_grad()
    logits = model(**inputs, **kwargs).logits
    if "attention_mask" in inputs:
        logits = logits[inputs["attention_mask"].bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, expected, tolerance=1e-4):
    assert (found[0] - expected[0]).abs().max() < tolerance
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max() <= tolerance * grad.abs().max().clamp(min=1e-6), name


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_all_pages_kept_trains_as_own_attention(architecture, use_cache):
    own, ours = make(architecture, attention="eager"), make(architecture)
    unique_hf.configure(ours, **DENSE)
    assert_close(gradients(ours, batch(), use_cache=use_cache), gradients(own, batch(), use_cache=use_cache))
    # the latent attention of deepseek_v3 stays dense in training too
    assert bool(unique_hf.report(ours).soft_rows) == (architecture != "deepseek_v3")


def test_evaluation_without_cache_gives_the_numbers_of_training():
    model = make()
    unique_hf.configure(model, **SPARSE)
    trained, _ = gradients(model, batch(), use_cache=False)
    with torch.no_grad():
        evaluated = model(**batch(), use_cache=False).logits[batch()["attention_mask"].bool()]
        prefilled = model(**batch(), use_cache=True).logits[batch()["attention_mask"].bool()]
    assert torch.equal(trained, evaluated)
    assert not torch.allclose(trained, prefilled, atol=1e-2), "prefill is exact, training is not"
    found = unique_hf.report(model)
    assert (found.soft_rows, found.prompt_rows) == (2 * 2 * 80, 2 * 80)


def test_gradient_checkpointing_changes_nothing():
    model = make()
    unique_hf.configure(model, **SPARSE)
    plain = gradients(model, batch(), use_cache=False)
    model.train()
    model.gradient_checkpointing_enable()
    assert_close(gradients(model, batch(), use_cache=False), plain, tolerance=1e-6)


def documents(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (1, n), generator=generator) for n in lengths]


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_do_not_see_each_other(rows, told_by):
    model = make()
    unique_hf.configure(model, **SPARSE)
    packs = [documents(lengths, seed) for seed, lengths in enumerate([(23, 31, 6), (40, 20)][:rows])]
    expected = torch.cat([torch.cat([gradients(model, {"input_ids": d})[0] for d in docs], 1) for docs in packs])
    inputs = {
        "input_ids": torch.cat([torch.cat(docs, 1) for docs in packs]),
        "position_ids": torch.stack([torch.cat([torch.arange(d.shape[1]) for d in docs]) for docs in packs]),
    }
    unique_hf.report(model, reset=True)
    if told_by == "cu_seq_lens":
        lengths = torch.tensor([0] + [d.shape[1] for docs in packs for d in docs]).cumsum(0).to(torch.int32)
        inputs.update(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=40, max_length_k=40)
    found, _ = gradients(model, inputs, use_cache=False)
    assert (found - expected).abs().max() < 1e-4
    assert unique_hf.report(model).soft_rows == 2 * rows * 60


def prefix_mask():
    """The first ten tokens see each other: causal plus something that the soft mask does not know."""
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[:10, :10] = True
    return mask.expand(2, 1, -1, -1)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (prefix_mask(), "a mask that is not causal"),
        (torch.where(prefix_mask(), 0.0, -1e30), "float mask"),
    ],
)
def test_other_masks_train_dense_and_exact(mask, reason):
    inputs = {"input_ids": batch()["input_ids"], "attention_mask": mask}
    ours, own = make(), make(attention="sdpa")
    unique_hf.configure(ours, **SPARSE)
    ours.zero_grad()
    found = ours(**inputs, use_cache=False).logits
    assert (found - own(**inputs, use_cache=False).logits).abs().max() < 1e-4
    counts = unique_hf.report(ours)
    assert counts.soft_rows == 0 and counts.prompt_rows == 2 * 80
    with torch.no_grad():
        cache = ours(**inputs, use_cache=True).past_key_values
        theirs = own(**inputs, use_cache=True).past_key_values
        row = torch.ones(2, 1, 1, 41, dtype=torch.bool)
        row[:, :, :, 3:9] = False
        step = row if mask.dtype == torch.bool else torch.where(row, 0.0, -1e30)
        unique_hf.configure(ours, **DENSE)
        token = {"input_ids": torch.full((2, 1), 7), "attention_mask": step, "position_ids": torch.full((2, 1), 40)}
        difference = ours(**token, past_key_values=cache).logits - own(**token, past_key_values=theirs).logits
    assert difference.abs().max() < 1e-4
    reasons = unique_hf.report(ours).reasons
    assert set(reasons) == ({"pages by score"} if mask.dtype == torch.bool else {"float mask"})


def test_attention_dropout_trains_dense():
    model = make(attention_dropout=0.5).train()
    unique_hf.configure(model, **SPARSE)
    model(**batch(), use_cache=False)
    assert unique_hf.report(model).soft_rows == 0


def test_training_on_a_warm_cache_is_dense_and_exact():
    """As prefix tuning does it: keys from elsewhere in front, gradients through them."""
    found = {}
    for attention in ("sdpa", "unique"):
        model = make(attention=attention)
        unique_hf.configure(model, **SPARSE)
        with torch.no_grad():
            cache = model(**batch(), use_cache=True).past_key_values
        mask = torch.nn.functional.pad(batch()["attention_mask"], (0, 9), value=1)
        inputs = {"input_ids": batch(seed=8)["input_ids"][:, 20:29], "attention_mask": mask}
        model.zero_grad()
        logits = model(**inputs, past_key_values=cache).logits
        logits.square().mean().backward()
        found[attention] = logits.detach(), {name: p.grad for name, p in model.named_parameters()}
    assert_close(found["unique"], found["sdpa"])
