"""Twelve architectures: exact where all pages are kept, sparse exactly where `check` foretold."""

import pytest
import torch

import unique_hf
from tests.integration.tiny import ARCHITECTURES, attention_modules, batch, make


def run(model, steps=4):
    """Logits of a left-padded prefill and of `steps` decode steps with fixed tokens, at valid positions."""
    inputs = batch(length=40, padding=(13, 0))
    tokens = torch.arange(5, 5 + steps).expand(2, -1)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        logits = [out.logits[:, 13:]]
        for step in range(steps):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            out = model(input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=out.past_key_values)
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_pages_kept_equals_own_attention(architecture):
    own = run(make(architecture, attention="eager"))
    ours = run(make(architecture))
    assert own.std() > 0.05, "logits too flat to compare"
    assert (own - ours).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_layers_are_those_that_check_foretold(architecture):
    expected = ARCHITECTURES[architecture][1]
    model = make(architecture)
    dense = run(model)
    unique_hf.configure(model, page_size=2, budget=8)
    names = {index: name for index, (name, _) in attention_modules(model).items()}
    if expected:
        foretold = unique_hf.check(model)
    else:
        with pytest.warns(UserWarning, match="will not run sparse"):
            foretold = unique_hf.check(model)
    assert foretold.sparse_layers == tuple(names[i] for i in expected)
    assert len(foretold.layers) == 2
    unique_hf.report(model, reset=True)
    sparse = run(model)
    found = unique_hf.report(model)
    # two rows, four decode steps; 27 to 44 tokens are more than 4 pages of 2
    assert {row.name: row.sparse_rows for row in found.layers} == {
        name: 8 if index in expected else 0 for index, name in names.items()
    }
    assert all(row.dense_rows == (0 if row.sparse_rows else 8) for row in found.layers)
    assert bool((sparse - dense).abs().max() > 1e-3) == bool(expected)
