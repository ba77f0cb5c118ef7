"""Both levels of the page index stay what they would be from scratch, whatever happens to the cache."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from tests.cache.test_layers import OPERATIONS, from_scratch, same_stats, states
from unique_attention import UniqueConfig
from unique_attention.hf import UniqueDynamicLayer, UniqueStaticLayer
from unique_hf.arena import Arena
from unique_hf.decode_step import _tensors

SETTINGS = UniqueConfig(page_size=4, budget=16, stats_dtype="fp8", super_page_size=16, super_budget=64)


def assert_current(layer, length, settings=SETTINGS, **padding):
    """Both levels of a layer hold the statistics of its first `length` keys."""
    # static, or the growing or the fixed form
    keys = layer.keys if isinstance(layer, UniqueStaticLayer) else layer.buffers()[0]
    keys = keys[:, :, :length]
    levels = layer.index.levels
    assert [level.settings for level in levels] == [settings, settings.upper]
    for level in levels:
        assert same_stats(level.first(length), from_scratch(keys, level.settings, **padding))


def refreshed(layer):
    layer.index.refresh(layer.keys, None, None)
    return layer


def filled(*tokens, layer=None):
    layer = UniqueDynamicLayer(SETTINGS) if layer is None else layer
    for count in tokens:
        layer.update(*states(count))
        refreshed(layer)
    return layer


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_carry_both_levels(operation):
    layer = filled(37, 1, 1, 3)
    OPERATIONS[operation](layer)
    for tokens in (1, 2, 300):
        layer.update(*states(tokens, len(layer.keys)))
        assert_current(refreshed(layer), layer.get_seq_length())


def test_rows_are_not_recomputed_but_carried():
    layer = filled(37)
    before = layer.index.upper.stats.codes.clone()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.index.upper.stats.codes.float(), before.float().flip(0))
    assert layer.index.upper.covered == 37


def test_padding_and_holes_reach_both_levels():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(37))
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0, :18] = False
    mask[1, 20:23] = False
    starts = torch.tensor([18, 0], dtype=torch.int32)
    layer.index.refresh(layer.keys, mask, starts)
    assert_current(layer, 37, token_mask=mask, seq_starts=starts)
    layer.index.forget()
    layer.index.refresh(layer.keys, None, starts)
    assert_current(layer, 37, seq_starts=starts)


def test_a_copy_and_its_original_go_their_own_ways():
    layer = filled(37)
    twin = copy.deepcopy(layer)
    filled(1, 30, layer=twin)
    assert_current(twin, 68)
    assert_current(layer, 37)
    assert twin.index.upper is not layer.index.upper


def test_reset_forgets_both_levels():
    layer = filled(37)
    layer.reset()
    assert layer.index.upper.stats is None
    layer.update(*states(6, batch=3))
    assert_current(refreshed(layer), 6)


def test_keys_assigned_from_outside_change_both_levels():
    layer = filled(37)
    layer.keys, layer.values = layer.keys * 2, layer.values * 2
    assert_current(filled(1, layer=layer), 38)


def test_a_cache_filled_in_inference_mode_can_be_continued_outside():
    with torch.inference_mode():
        layer = filled(37)
    with torch.no_grad():
        assert_current(filled(1, layer=layer), 38)


def test_super_pages_may_change_on_a_kept_cache():
    layer = filled(37)
    pages = layer.index.stats
    for change in ({"super_page_size": 8}, {"super_page_size": 32, "super_budget": 128}, {"super_budget": 64}):
        settings = SETTINGS.replace(**change)
        layer.index.wake(settings)
        assert_current(refreshed(layer), 37, settings)
        assert layer.index.stats is pages, "pages stay the same"
    layer.index.wake(SETTINGS.replace(super_page_size=None, super_budget=None))
    assert layer.index.upper is None and len(layer.index.levels) == 1
    layer.update(*states(1))
    refreshed(layer)
    layer.index.wake(SETTINGS)
    assert_current(refreshed(layer), 38)
    other = SETTINGS.replace(score="minmax", stats_dtype="bf16")
    layer.index.wake(other)
    assert_current(refreshed(layer), 38, other)


@pytest.mark.parametrize("capacity", [60, 80])
def test_fixed_form_keeps_both_levels_in_place(capacity):
    layer = filled(37)
    seq_lens = torch.full((2,), 37)
    layer.enter_fixed(seq_lens, capacity=capacity)
    addresses = [level.stats.codes.data_ptr() for level in layer.index.levels]
    for length in range(38, 58):
        seq_lens += 1
        layer.update(*states(1))
        assert_current(layer, length)
        assert [level.stats.codes.data_ptr() for level in layer.index.levels] == addresses
    layer.leave_fixed(57)
    assert [level.covered for level in layer.index.levels] == [57, 57]
    assert_current(filled(2, layer=layer), 59)


def test_fixed_form_builds_super_pages_that_are_new():
    layer = UniqueDynamicLayer(SETTINGS.replace(super_page_size=None, super_budget=None))
    filled(37, layer=layer)
    layer.index.wake(SETTINGS)
    layer.enter_fixed(torch.full((2,), 37), capacity=64)
    assert_current(layer, 37)


def test_blocks_hold_both_levels():
    layers = [filled(37), filled(37)]
    expected = [layer.keys.clone() for layer in layers]
    place = Arena(layers, 60)
    place.move(layers)
    for layer, keys in zip(layers, expected):
        assert torch.equal(layer.keys, keys)
        assert_current(layer, 37)
        assert [level.stats.spread.shape[2] for level in layer.index.levels] == [16, 16], "multiples of 16"
        # a graph is good for these addresses only
        held = {id(t) for t in _tensors(layer)}
        assert all(t is None or id(t) in held for level in layer.index.levels for t in level.stats)
        storages = {t.untyped_storage()._cdata for level in layer.index.levels for t in level.stats if t is not None}
        assert storages == {layer.buffers()[0].untyped_storage()._cdata}
        assert_current(filled(1, layer=layer), 38)
    empty = [UniqueDynamicLayer() for _ in layers]
    place.provide(empty)
    for layer in empty:
        address = layer.index.upper.stats.codes.data_ptr()
        assert_current(filled(50, layer=layer), 50)
        assert layer.index.upper.stats.codes.data_ptr() == address


def test_static_layer_keeps_both_levels():
    layer, length = UniqueStaticLayer(70, settings=SETTINGS), 0

    def read(tokens, settings=SETTINGS):
        layer.update(*states(tokens))
        lens = layer.cumulative_length.expand(2)
        layer.index.refresh_static(layer.keys, tokens, layer.host_length, lens, None, None)
        assert_current(layer, layer.host_length, settings)

    for tokens in (37, 1, 5):
        read(tokens)
        length += tokens
    stats = layer.index.upper.stats
    layer.reorder_cache(torch.tensor([1, 1]))
    assert_current(layer, length)
    assert layer.index.upper.covered == length
    other = SETTINGS.replace(super_page_size=8)
    layer.index.wake(other)
    read(1, other)
    layer.index.wake(SETTINGS)
    read(1)
    layer.update(*states(6))
    read(1)
    stats = layer.index.upper.stats
    layer.reset()
    read(21)
    assert layer.index.upper.stats is stats, "compiled steps know this address"


def test_super_pages_do_not_change_what_the_layer_holds():
    ours, parent = UniqueDynamicLayer(SETTINGS), DynamicLayer()
    for tokens in (37, 1, 300):
        for layer in (ours, parent):
            torch.manual_seed(tokens)
            layer.update(*states(tokens))
        refreshed(ours)
        assert torch.equal(ours.keys, parent.keys) and torch.equal(ours.values, parent.values)
