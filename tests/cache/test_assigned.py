"""Tensors that somebody assigns to a layer get statistics of their own, and other operations keep what is known."""

import pytest
import torch

from tests.cache.test_layers import SETTINGS, from_scratch, remove, same_stats, states
from unique_attention.hf import UniqueDynamicLayer


def under_grad(layer):
    part = torch.randn(3, 2, 2, 32, requires_grad=True)
    layer.update(part, part)
    layer.index.refresh(layer.keys.detach(), None, None)


def elsewhere(layer):
    # as another device does: other tensors of the same numbers
    for move in (layer.offload, layer.prefetch):
        layer._moved(lambda: vars(layer).update(keys=layer.keys.clone(), values=layer.values.clone()))
        move()


BEFORE = {
    "nothing": lambda layer: None,
    "grad": under_grad,
    "moved": elsewhere,
    "grad, then cropped": lambda layer: (under_grad(layer), remove(layer, 3)),
    "grad, then rows": lambda layer: (under_grad(layer), layer.reorder_cache(torch.tensor([1, 0, 2]))),
    "moved, then cropped": lambda layer: (elsewhere(layer), remove(layer, 3)),
}
AFTER = {
    "update": lambda layer: None,
    "crop": lambda layer: remove(layer, 1),
    "rows": lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
    "move": elsewhere,
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("before", BEFORE)
def test_assigned_keys_are_noticed_whatever_happened_before_and_kept_statistics_are_kept(before, after):
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(41, batch=3))
    layer.index.refresh(layer.keys, None, None)
    BEFORE[before](layer)
    assert layer.index.covered == layer.get_seq_length() >= 38, "what is known stays known"
    order = torch.tensor([2, 0, 1])
    layer.keys, layer.values = layer.keys.detach()[order], layer.values.detach()[order]
    AFTER[after](layer)
    with torch.no_grad():
        layer.update(*states(1, batch=len(layer.keys)))
        assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(layer.keys))
