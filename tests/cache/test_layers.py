"""Cache layers on their own: what generate does to them, against the parent layers and statistics from scratch."""

import copy
import gc
import weakref

import pytest
import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from unique_attention import UniqueConfig, ops
from unique_attention.hf import UniqueDynamicLayer, UniqueStaticLayer
from unique_attention.hf.pages import ALIGN_PAGES, GROWTH, MIN_SPARE, layer_of

SETTINGS = UniqueConfig(page_size=4, budget=16, stats_dtype="fp8")


def states(tokens, batch=2, heads=2, dim=32):
    return torch.randn(batch, heads, tokens, dim), torch.randn(batch, heads, tokens, dim)


def from_scratch(keys, settings=SETTINGS, token_mask=None, seq_starts=None):
    return ops.page_stats(
        keys,
        page_size=settings.page_size,
        score=settings.score,
        stats_dtype=settings.stats_dtype,
        token_mask=token_mask,
        seq_starts=seq_starts,
    )


def same_stats(found, expected):
    return all(
        (a is None and b is None) or torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True)
    )


def remove(layer, tokens):
    layer.crop(-tokens)


# what generate, assisted decoding, beams and users do between updates
OPERATIONS = {
    "nothing": lambda layer: None,
    "crop inside a page": lambda layer: remove(layer, 2),
    "crop to a page boundary": lambda layer: remove(layer, 5),
    "crop several pages": lambda layer: remove(layer, 11),
    "crop nothing": lambda layer: remove(layer, 0),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "offload and prefetch": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("awake", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dynamic_layer_holds_what_its_parent_holds(operation, awake):
    ours, parent = UniqueDynamicLayer(SETTINGS if awake else None), DynamicLayer()
    for tokens in (21, 1, 1, 3):
        for layer in (ours, parent):
            torch.manual_seed(tokens)
            layer.update(*states(tokens))
        if awake:
            ours.index.refresh(ours.keys, None, None)
    for layer in (ours, parent):
        OPERATIONS[operation](layer)
    for tokens in (1, 2, 300):
        batch = len(parent.keys)
        for layer in (ours, parent):
            torch.manual_seed(tokens)
            returned = layer.update(*states(tokens, batch))
            assert torch.equal(returned[0], layer.keys) and torch.equal(returned[1], layer.values)
        assert ours.get_seq_length() == parent.get_seq_length()
        assert torch.equal(ours.keys, parent.keys) and torch.equal(ours.values, parent.values)
        if awake:
            assert same_stats(ours.index.refresh(ours.keys, None, None), from_scratch(parent.keys))


def test_reset_forgets_everything():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(21))
    layer.index.refresh(layer.keys, None, None)
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, values = states(6, batch=3)
    layer.update(keys, values)
    assert torch.equal(layer.keys, keys)
    assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(keys))


def test_growth_is_amortised_and_small():
    layer, moves, address = UniqueDynamicLayer(SETTINGS), 0, None
    layer.update(*states(2000, 1, 1))
    for _ in range(2000):
        layer.update(*states(1, 1, 1))
        layer.index.refresh(layer.keys, None, None)
        moves += layer.keys.data_ptr() != address
        address = layer.keys.data_ptr()
        capacity, length = layer._buffers[0].shape[2], layer.get_seq_length()
        assert capacity - length <= max(MIN_SPARE, length // GROWTH) + SETTINGS.page_size
        spare_pages = layer.index.stats.spread.shape[2] - length // SETTINGS.page_size
        assert spare_pages <= max(MIN_SPARE, length // GROWTH) // SETTINGS.page_size + ALIGN_PAGES
    assert moves <= 2000 // MIN_SPARE + 2


def test_old_views_keep_their_tokens_while_the_layer_grows():
    layer = UniqueDynamicLayer(SETTINGS)
    first, _ = layer.update(*states(7))
    seen = first.clone()
    for _ in range(400):
        layer.update(*states(1))
    assert torch.equal(first, seen)


def test_deepcopy_is_independent():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(21))
    layer.index.refresh(layer.keys, None, None)
    twin = copy.deepcopy(layer)
    kept = layer.keys.clone()
    for _ in range(5):
        twin.update(*states(1))
    assert torch.equal(layer.keys, kept)
    assert torch.equal(twin.keys[:, :, :21], kept)
    assert twin._owns_buffers(), "the copy must not fall back to concatenation"
    assert twin.index is not layer.index
    assert same_stats(twin.index.refresh(twin.keys, None, None), from_scratch(twin.keys))
    assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(layer.keys))


def test_under_grad_the_layer_concatenates_and_gradients_flow():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(9))
    parts = [torch.randn(2, 2, n, 32, requires_grad=True) for n in (3, 2)]
    for part in parts:
        keys, values = layer.update(part, part)
    assert keys.shape[2] == 14
    (keys.sum() + values.sum()).backward()
    assert all(torch.equal(part.grad, torch.full_like(part, 2)) for part in parts)
    with torch.no_grad():
        layer.update(*states(1))
        assert layer._owns_buffers() and layer.get_seq_length() == 15
        assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(layer.keys))


def test_cache_filled_in_inference_mode_can_be_continued_outside():
    layer = UniqueDynamicLayer(SETTINGS)
    with torch.inference_mode():
        layer.update(*states(21))
        layer.index.refresh(layer.keys, None, None)
    with torch.no_grad():
        layer.update(*states(1))
        assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(layer.keys))


def test_keys_assigned_from_outside_are_kept():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(21))
    layer.keys, layer.values = layer.keys * 2, layer.values * 2
    expected = layer.keys.clone()
    layer.update(*states(1))
    assert torch.equal(layer.keys[:, :, :21], expected)


def test_padding_travels_with_the_rows():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(21))
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, :6] = False
    starts = torch.tensor([6, 0], dtype=torch.int32)
    layer.index.refresh(layer.keys, mask, starts)
    layer.index.seq_starts, layer.index.starts_host = starts, [6, 0]
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.index.seq_starts.tolist() == layer.index.starts_host == [0, 6]
    expected = from_scratch(layer.keys, token_mask=mask.flip(0), seq_starts=starts.flip(0))
    assert same_stats(layer.index.refresh(layer.keys, mask.flip(0), starts.flip(0)), expected)
    layer.batch_repeat_interleave(2)
    assert layer.index.starts_host == [0, 0, 6, 6]


@pytest.mark.parametrize("awake", [False, True])
def test_memory_is_freed_without_the_garbage_collector(awake):
    layer = UniqueDynamicLayer(SETTINGS if awake else None)
    keys, values = layer.update(*states(21))
    assert layer_of(keys, values) is layer
    if awake:
        layer.index.refresh(keys, None, None)
    buffer = weakref.ref(layer._buffers[0] if awake else layer.keys)
    gc.disable()
    try:
        del layer, keys, values
        assert buffer() is None
    finally:
        gc.enable()


def test_changed_tensors_lose_their_layer():
    layer = UniqueDynamicLayer(SETTINGS)
    keys, values = layer.update(*states(5))
    assert layer_of(keys, values) is layer
    assert layer_of(keys * 1, values) is None
    assert layer_of(keys, values.clone()) is None
    assert layer_of(layer.keys, layer.values) is None, "the stored tensors must not be tagged: that would be a cycle"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (states(1, batch=3), r"expected new keys of shape \[2, 2, 1, 32\]"),
        (states(1, heads=4), "another model or batch"),
        (states(1, dim=64), "another model or batch"),
        (tuple(x.half() for x in states(1)), "torch.float16"),
    ],
)
def test_tokens_of_another_model_are_refused(new, message):
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(5))
    with pytest.raises(ValueError, match=message):
        layer.update(*new)


def test_another_page_size_is_refused_and_another_score_rebuilds():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(21))
    layer.index.refresh(layer.keys, None, None)
    with pytest.raises(ValueError, match="expected page_size=4.*got page_size=8"):
        layer.index.wake(SETTINGS.replace(page_size=8, budget=32))
    other = SETTINGS.replace(score="minmax", stats_dtype="bf16")
    layer.index.wake(other)
    assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(layer.keys, other))


def test_fixed_form_equals_the_growing_form():
    growing, fixed = UniqueDynamicLayer(SETTINGS), UniqueDynamicLayer(SETTINGS)
    prompt = states(21)
    for layer in (growing, fixed):
        layer.update(*prompt)
        layer.index.refresh(layer.keys, None, None)
    seq_lens = torch.full((2,), 21)
    fixed.enter_fixed(seq_lens, capacity=63)
    addresses = None
    for step in range(9):
        new = states(1)
        seq_lens += 1
        assert int(fixed.get_seq_length()) == growing.get_seq_length()
        assert fixed.get_mask_sizes(1) == (fixed._buffers[0].shape[2], 0)
        growing.update(*new)
        keys, values = fixed.update(*new)
        assert layer_of(keys, values) is fixed
        pointers = (keys.data_ptr(), values.data_ptr(), fixed.index.stats.codes.data_ptr())
        assert addresses in (None, pointers), "a captured step needs fixed addresses"
        addresses = pointers
        assert torch.equal(keys[:, :, : 22 + step], growing.keys)
        expected = growing.index.refresh(growing.keys, None, None)
        assert same_stats(fixed.index.first(22 + step), expected)
    fixed.leave_fixed(30)
    for layer in (growing, fixed):
        torch.manual_seed(3)
        layer.update(*states(2))
    assert torch.equal(growing.keys, fixed.keys)
    assert same_stats(fixed.index.refresh(fixed.keys, None, None), from_scratch(growing.keys))


def test_fixed_form_needs_a_layer_that_was_read():
    layer = UniqueDynamicLayer()
    layer.update(*states(5))
    with pytest.raises(ValueError, match="run the prefill first"):
        layer.enter_fixed(torch.tensor([5, 5]), capacity=8)


@pytest.mark.parametrize("awake", [False, True])
def test_static_layer_holds_what_its_parent_holds(awake):
    ours, parent = UniqueStaticLayer(64, settings=SETTINGS if awake else None), StaticLayer(64)
    for tokens in (21, 1, 5):
        for layer in (ours, parent):
            torch.manual_seed(tokens)
            returned = layer.update(*states(tokens))
            assert torch.equal(returned[0], layer.keys)
        assert torch.equal(ours.keys, parent.keys) and torch.equal(ours.values, parent.values)
        assert ours.host_length == int(parent.cumulative_length) == int(ours.get_seq_length())
        if awake:
            lens = ours.cumulative_length.expand(2)
            found = ours.index.refresh_static(ours.keys, tokens, ours.host_length, lens, None, None)
            length = ours.host_length
            pages = -(-length // 4)
            expected = from_scratch(parent.keys[:, :, :length])
            assert same_stats([t if t is None else t[:, :, :pages] for t in found], expected)
    for layer in (ours, parent):
        layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(ours.keys, parent.keys)
    if awake:
        expected = from_scratch(parent.keys[:, :, :27])
        assert same_stats([t if t is None else t[:, :, :7] for t in ours.index.stats], expected)
    ours.reset()
    assert ours.host_length == 0 and ours.index.covered == 0


def test_static_reset_keeps_the_storage_for_the_next_prompt():
    layer = UniqueStaticLayer(64, settings=SETTINGS)

    def read(tokens, starts):
        layer.update(*states(tokens))
        lens = layer.cumulative_length.expand(2)
        return layer.index.refresh_static(layer.keys, tokens, layer.host_length, lens, None, starts)

    before = read(40, torch.tensor([9, 0], dtype=torch.int32))
    layer.index.seq_starts, layer.index.starts_host = torch.tensor([9, 0]), [9, 0]
    layer.reset()
    assert layer.index.seq_starts is None and layer.index.starts_host is None
    starts = torch.tensor([0, 5], dtype=torch.int32)
    found = read(21, starts)
    assert all(a is b for a, b in zip(found, before)), "compiled steps know these addresses"
    expected = from_scratch(layer.keys[:, :, :21], seq_starts=starts)
    assert same_stats([t if t is None else t[:, :, :6] for t in found], expected)
    layer.reset()
    # nothing is stored under the page size any more
    layer.index.wake(SETTINGS.replace(page_size=8, budget=32))
    assert read(21, None).spread.shape[2] == 8


def test_static_statistics_catch_up_with_tokens_that_others_appended():
    layer = UniqueStaticLayer(64, settings=SETTINGS)
    for tokens, read in ((21, True), (6, False), (1, False), (1, True)):
        layer.update(*states(tokens))
        if read:
            lens = layer.cumulative_length.expand(2)
            found = layer.index.refresh_static(layer.keys, tokens, layer.host_length, lens, None, None)
    expected = from_scratch(layer.keys[:, :, :29])
    assert same_stats([t if t is None else t[:, :, :8] for t in found], expected)


def test_static_length_is_set_right_by_a_prompt_after_compiled_steps(monkeypatch):
    layer = UniqueStaticLayer(64, settings=SETTINGS)
    layer.update(*states(9))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for _ in range(5):
        layer.update(*states(1))
    monkeypatch.undo()
    layer.update(*states(3))
    assert layer.host_length == int(layer.cumulative_length) == 17


def test_offloaded_tokens_leave_no_buffers_behind(monkeypatch):
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(21))
    buffers = [weakref.ref(buffer) for buffer in layer._buffers]
    kept = layer.keys.clone()

    def to_another_device(self):
        self.keys, self.values = self.keys.clone(), self.values.clone()

    monkeypatch.setattr(DynamicLayer, "offload", to_another_device)
    layer.offload()
    assert [buffer() for buffer in buffers] == [None, None]
    layer.update(*states(1))
    assert torch.equal(layer.keys[:, :, :21], kept)
    assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(layer.keys))


def test_rows_dropped_by_hand_after_a_step_under_grad_get_new_statistics():
    layer = UniqueDynamicLayer(SETTINGS)
    layer.update(*states(21))
    layer.index.refresh(layer.keys, None, None)
    part = torch.randn(2, 2, 2, 32, requires_grad=True)
    layer.update(part, part)
    layer.keys, layer.values = layer.keys.detach()[1:], layer.values.detach()[1:]
    with torch.no_grad():
        layer.update(*states(1, batch=1))
        assert same_stats(layer.index.refresh(layer.keys, None, None), from_scratch(layer.keys))


def test_keys_that_somebody_assigns_get_new_statistics():
    torch.manual_seed(3)
    layers = [UniqueDynamicLayer(SETTINGS) for _ in range(2)]
    keys, values = torch.randn(3, 2, 40, 32), torch.randn(3, 2, 40, 32)
    new = torch.randn(3, 2, 1, 32)
    order = torch.tensor([2, 0, 1])
    for layer in layers:
        layer.update(keys, values)
        layer.index.refresh(layer.keys, None, None)
    layers[0].batch_select_indices(order)
    layers[1].keys, layers[1].values = layers[1].keys[order], layers[1].values[order]
    found = []
    for layer in layers:
        layer.update(new, new)
        found.append(layer.index.refresh(layer.keys, None, None))
    assert torch.equal(found[0].codes.view(torch.uint8), found[1].codes.view(torch.uint8))
