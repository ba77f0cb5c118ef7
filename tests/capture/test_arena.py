"""Blocks of a cache: what moves into them stays the same, and a later cache gets the same addresses."""

import pytest
import torch
from transformers import DynamicCache

from tests.capture.recorder import recording_on_cpu
from tests.capture.test_generate import model_with
from tests.integration.tiny import batch
from unique_hf import UniqueCache, arena, capture
from unique_hf.arena import Arena, in_blocks, slot_bytes


@pytest.fixture
def filled():
    model = model_with(layers=3)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch(), past_key_values=cache)
    return model, cache


def contents(cache):
    found = []
    for layer in cache.layers:
        stats = layer.index.refresh(layer.keys, None, layer.index.seq_starts)
        found += [x.float().clone() for x in (layer.keys, layer.values, *stats) if x is not None]
    return found


@pytest.mark.parametrize("block", [1, 16 << 10, 1 << 30])
def test_moving_changes_nothing_but_the_place(filled, block, monkeypatch):
    monkeypatch.setattr(arena, "BLOCK_BYTES", block)
    monkeypatch.setattr(arena, "LEAST_BYTES", 0)
    monkeypatch.setattr(arena, "SEGMENT_BYTES", 1)
    model, cache = filled
    before = contents(cache)
    assert not in_blocks(cache.layers)
    place = Arena(cache.layers, 128)
    place.move(cache.layers)
    assert in_blocks(cache.layers) and cache.get_seq_length() == 40
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache)))
    tensors = [t for layer in cache.layers for t in (*layer.buffers(), *layer.index.stats) if t is not None]
    used = sum(t.numel() * t.element_size() for t in tensors)
    assert used <= place.bytes <= used + 3 * 5 * arena.ALIGN_BYTES
    assert slot_bytes((x.keys, x.values) for x in cache.layers) == 3 * 2 * 2 * 2 * 32 * 4
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:])), "nothing overlaps"


def test_a_later_cache_gets_the_same_addresses_in_whatever_order_they_come(filled, monkeypatch):
    monkeypatch.setattr(arena, "BLOCK_BYTES", 1)
    model, cache = filled
    with recording_on_cpu():
        place = Arena(cache.layers, 128)
        place.move(cache.layers)
        first = [layer.buffers()[0].data_ptr() for layer in cache.layers]
        expected = contents(cache)
        del cache
        filled[1].layers.clear()
        original = Arena._block
        held = []

        def backwards(self, size):
            # the allocator gives the blocks out in another order
            if not held:
                held.extend(original(self, s) for s in self._sizes)
            return held.pop()

        monkeypatch.setattr(Arena, "_block", backwards)
        other = DynamicCache(config=model.config)
        place.provide(other.layers)
        assert [layer.buffers()[0].data_ptr() for layer in other.layers] == first
        assert other.get_seq_length() == 0
        with torch.no_grad():
            model(**batch(), past_key_values=other)
        assert [layer.buffers()[0].data_ptr() for layer in other.layers] == first
        assert all(torch.equal(a, b) for a, b in zip(expected, contents(other)))


@pytest.mark.parametrize("least", [0, 5 << 20])
def test_blocks_are_whole_segments(filled, least, monkeypatch):
    monkeypatch.setattr(arena, "LEAST_BYTES", least)
    sizes = Arena(filled[1].layers, 128)._sizes
    assert sizes and all(size % (2 << 20) == 0 and size >= least for size in sizes)


def test_layers_with_room_of_their_own_move_into_blocks_and_stay_there():
    model = model_with()
    cache = UniqueCache(config=model.config)
    with recording_on_cpu():
        model.generate(**batch(padding=(0, 0)), past_key_values=cache, max_new_tokens=6, do_sample=False)
        (step,) = capture._STEPS[model]
    assert in_blocks(cache.layers) and cache.layers[0].buffers()[0].shape[2] == step.arena.capacity


def test_buffers_for_another_batch_are_not_used(filled):
    model, cache = filled
    place = Arena(cache.layers, 128)
    other = DynamicCache(config=model.config)
    place.provide(other.layers)
    with torch.no_grad():
        found = model(**batch(rows=3, padding=(0,)), past_key_values=other).logits
        expected = model(**batch(rows=3, padding=(0,)), past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(found, expected) and other.layers[0].keys.shape[0] == 3
