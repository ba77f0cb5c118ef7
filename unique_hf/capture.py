"""How plain `model.generate(...)` comes to decode through a captured step, and when it does not.

Nothing in Transformers hands a cache or an attention function the model that runs, and `generate` looks its decoding
loop up on the class. So importing `unique_hf` wraps one method, `GenerationMixin._sample` (greedy search, sampling):
for a model whose text configuration does not name unique attention the wrapper calls the original at once, with the
same arguments. For one that does, the loop runs on a stand-in for the model that passes everything on to it except
the call of the decode step; no model, class table or configuration is changed. `uninstall()` takes the wrapper away.

The Hub kernel without this package decodes eagerly.

Between calls a model keeps its graph (activations of one token), its static inputs, and neither keys nor values: those
belong to the cache. May import torch, Transformers and the kernel's adapter.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .arena import FREE_SHARE, Arena, free_bytes, in_blocks, slot_bytes
from .backend import adapter
from .decode_step import DecodeStep, NotCapturable
from .fingerprint import fingerprint, weight_bytes, why_not_model
from .graphs import RECORDERS
from .tally import StepCounts, tally_of

# spare room of a captured cache: at most one part in SPARE of weights and cache together, or MIN_SPARE tokens a row
SPARE = 32
MIN_SPARE = 256
# how far to look ahead where a call may run on for long
AHEAD = 1024
# slots come in multiples of this many pages, so that strides keep the alignment that kernels are compiled for
ALIGN_PAGES = 16
# steps kept per model for its next calls: one for each of as many concurrent ones
KEPT = 2
# of keys for which page statistics have storage of a known form before they are read
DTYPES = {torch.float32, torch.bfloat16, torch.float16}
# what a forward that does not suit a captured step raises; anything else is a bug and shows
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)

_METHODS: Any = GenerationMixin
_STEPS: weakref.WeakKeyDictionary[torch.nn.Module, list[DecodeStep]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def release(model: torch.nn.Module) -> None:
    """Free the graphs that a model, or one inside it, keeps for its next call.

    Args:
        model (`torch.nn.Module`): The model.
    """
    for module in model.modules():
        with _LOCK:
            _STEPS.pop(module, None)


def _take(model: PreTrainedModel, batch: int) -> DecodeStep:
    with _LOCK:
        kept = _STEPS.get(model, [])
        for step in kept:
            if step.batch == batch and step.seq_lens.device == model.device:
                kept.remove(step)
                step.recorder.take_over()
                return step
    return DecodeStep(model.device, batch)


def _keep(model: PreTrainedModel, step: DecodeStep) -> None:
    with _LOCK:
        kept = _STEPS.setdefault(model, [])
        kept.insert(0, step)
        del kept[KEPT:]


@functools.cache
def _log_once(name: str, reason: str) -> None:
    logging.get_logger("transformers.unique_attention").warning(
        f"unique attention: {name} decodes eagerly, without a captured step: {reason}. "
        "`unique_hf.report(model)` counts it."
    )


def choose_capacity(length: int, limit: int, slot_bytes: int, weights: int, page_size: int) -> int:
    """Slots for a captured step.

    Equation: `min(limit, length + max(1024, room))` with `room = (weights + length * slot_bytes) / 32 / slot_bytes`,
    3 % of the memory in use anyway; rounded up to a multiple of the power of two below `max(room / 2, 256)`, so that
    calls of like lengths get the same.

    Args:
        length (`int`): Tokens in the cache, the coming one included.
        limit (`int`): Tokens that the call can reach.
        slot_bytes (`int`): Bytes of one slot, all rows and layers together.
        weights (`int`): Bytes of the model's weights.
        page_size (`int`): Tokens per page.
    Returns:
        `int`: At least `length`.
    """
    room = (weights + length * slot_bytes) // SPARE // max(slot_bytes, 1)
    step = max(1 << (max(room // 2, MIN_SPARE).bit_length() - 1), ALIGN_PAGES * page_size)
    wanted = max(length, min(limit, length + max(AHEAD, room)))
    return -(-wanted // step) * step


class Call:
    """One `generate` call: what its loop calls in place of the model, once per token.

    Args:
        model (`PreTrainedModel`): The model.
        settings (`UniqueConfig`): Its settings.
        cache (`DynamicCache`): The cache of the call.
        batch (`int`): Rows.
        new_tokens (`int`): Tokens that the call can add to the prompt.
        greedy (`bool`, *optional*, defaults to `False`): Tokens are chosen by their score alone.
    """

    def __init__(
        self, model: PreTrainedModel, settings: Any, cache: DynamicCache, batch: int, new_tokens: int,
        greedy: bool = False,
    ):  # fmt: skip
        self.model, self.settings = model, settings
        # its layers are ours, see `why_eager`
        self.cache: Any = cache
        self.batch, self.new_tokens = batch, new_tokens
        self.greedy, self.failed = greedy, False
        # decode steps asked for, tokens and slots in the cache
        self.asked = self.length = self.capacity = 0
        # set by `prepare` until `finish`
        self._step: Any = None
        self._running = False
        self._counts: Any = None
        self._starts: torch.Tensor | None = None

    def decode(self, **inputs: Any) -> Any:
        """One decode step: captured where that works, otherwise eager from here on."""
        if not self.failed:
            try:
                return self._captured(inputs)
            except FAILURES as error:
                self.give_up(error)
        return self.model(**inputs)

    def _captured(self, inputs: dict[str, Any]) -> Any:
        if inputs.get("past_key_values") is not self.cache:
            raise NotCapturable("the model starts another cache while it decodes")
        if not self._running:
            self._begin(inputs)
            self._running = True
        elif self.length >= self.capacity:
            state = self._step.state
            self._step.release(self.length)
            self._bind(state)
        self.asked += 1
        # the prompt gave the first token; a step beyond the capacity would need another recording
        more = self.asked < self.new_tokens - 1 and self.length + 2 <= self.capacity
        outputs = self._step.run(inputs, more and self.greedy)
        self.length += 1
        self._counts.add(self.length)
        return outputs

    def _begin(self, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        if ids is None or ids.shape != (self.batch, 1):
            raise NotCapturable("the model does not take one token id per row and step")
        asleep = sum(layer.index.stats is None or not layer.index.covered for layer in self.cache.layers)
        if asleep:
            raise NotCapturable(f"{asleep} cache layers hold keys that unique attention did not read")
        self.length = self.cache.get_seq_length()
        self._starts = self._first_slots(inputs.get("attention_mask"))
        self._bind(fingerprint(self.model))
        self._counts = StepCounts(self.cache, self.settings, None if self._starts is None else self._starts.tolist())

    def _first_slots(self, mask: Any) -> torch.Tensor | None:
        if mask is None:
            return None
        if not torch.is_tensor(mask) or mask.dim() != 2 or mask.shape[1] != self.length + 1:
            raise NotCapturable("the attention mask is not a `[B, S]` tensor over the cached tokens")
        valid = mask != 0
        starts = valid.to(torch.int32).argmax(-1)
        slots = torch.arange(mask.shape[1], device=mask.device)
        # waits for the device, once per call
        if not bool((valid == (slots >= starts[:, None])).all()):
            raise NotCapturable("the attention mask has holes beside left padding")
        return starts

    def prepare(self, length: int) -> None:
        """Before the prompt: see that an empty cache gets buffers that last for the call.

        Those of an earlier call, so that its graph can be used again; otherwise new ones as soon as the first layer
        shows what its keys look like. A cache that grows would be copied again and again, and once more for the step.

        Args:
            length (`int`): Tokens of the prompt.
        Raises:
            RuntimeError: There is no stream for another captured step.
        """
        step = self._step = _take(self.model, self.batch)
        layers, arena = self.cache.layers, step.arena
        if any(layer.is_initialized for layer in layers):
            return
        if arena is not None and arena.settings is self.settings:
            if arena.capacity == self._wanted(length, arena.slot_bytes):
                with contextlib.suppress(torch.OutOfMemoryError):
                    return arena.provide(layers)
        step.arena = None
        for layer in layers:
            layer.index.wake(self.settings)
            layer.provider = functools.partial(self._make_room, length)

    def _make_room(self, length: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Give empty layers room for the whole call, if all of them look like the first one and there is memory."""
        layers, step, like = self.cache.layers, self._step, (keys, values)
        for layer in layers:
            layer.provider = None
        capacity = self._wanted(length, slot_bytes([like] * len(layers)))
        suits = keys.shape[0] == self.batch and keys.dtype in DTYPES
        if not suits or any(layer.is_initialized for layer in layers[1:]):
            return
        arena = Arena(layers, capacity, step.recorder.stream, like)
        if arena.bytes <= free_bytes(self.model.device):
            # otherwise the cache grows, and moves where there is room for that
            with contextlib.suppress(torch.OutOfMemoryError):
                arena.provide(layers)
                step.arena = arena

    def _wanted(self, length: int, slot: int) -> int:
        sizes = {"slot_bytes": slot, "weights": weight_bytes(self.model), "page_size": self.settings.page_size}
        return choose_capacity(length + 1, length + self.new_tokens, **sizes)

    def _bind(self, state: int) -> None:
        step, layers = self._step, self.cache.layers
        capacity = min(0 if pair is None else pair[0].shape[2] for pair in (layer.buffers() for layer in layers))
        enough = capacity >= self.length + min(self.new_tokens, MIN_SPARE) + 1
        if not enough or not in_blocks(layers):
            slot = slot_bytes((layer.keys, layer.values) for layer in layers)
            arena = Arena(layers, self._wanted(self.length, slot), step.recorder.stream)
            fits = arena.bytes <= free_bytes(self.model.device) // FREE_SHARE
            if fits:
                arena.move(layers)
                step.arena = arena
            if fits or not enough:
                capacity = arena.capacity
        self.capacity = step.bind(self.model, self.cache, self.length, capacity, self._starts, state)

    def give_up(self, error: Exception) -> None:
        """Decode eagerly from here on.

        Args:
            error (`Exception`): Why.
        """
        reason = str(error) if isinstance(error, NotCapturable) else f"{type(error).__name__}: {str(error)[:200]}"
        self.failed = True
        if self._step is not None:
            # whatever stopped it may stop the next call too, and would leave half a recording behind
            self._step.drop_graph()
        self.finish()
        tally_of(self.model).eager[reason] += 1
        _log_once(type(self.model).__name__, reason)

    def finish(self) -> None:
        """Give the cache back to the growing form, keep the graph for the next call, and add up what ran."""
        step, self._step = self._step, None
        if step is None:
            return
        for layer in self.cache.layers:
            layer.provider = None
        step.release(self.length)
        tally = tally_of(self.model)
        if self._counts is not None and self._counts.steps:
            tally.calls += 1
            tally.steps += self._counts.steps
            self._counts.flush(module for module in (ref() for ref in step.modules) if module is not None)
        tally.captures += step.captures
        tally.seconds += step.seconds
        tally.together += step.captures if step.launches else 0
        tally.early, tally.vain = tally.early + step.early, tally.vain + step.vain
        step.captures = step.early = step.vain = 0
        step.seconds = 0.0
        _keep(self.model, step)


class _StandIn:
    """A model whose call is the decode step of one `generate` call; everything else is the model's."""

    def __init__(self, call: Call):
        self._unique_call = call
        # asked for at every step, and found by a walk over the weights
        self.device = call.model.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unique_call.model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._unique_call.decode(**inputs)


def _uses_unique(model: Any) -> bool:
    config = model.config.get_text_config(decoder=True)
    return hasattr(ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation), "is_unique_attention")


def why_eager(model: PreTrainedModel, settings: Any, kwargs: dict[str, Any]) -> tuple[str | None, bool]:
    """What rules out a captured step before the first token.

    Args:
        model (`PreTrainedModel`): The model.
        settings (`UniqueConfig`): Its settings.
        kwargs (`dict`): Keywords of `GenerationMixin._sample`.
    Returns:
        `tuple`: The reason or `None`, and whether it is worth a line in the log.
    """
    if not settings.capture:
        return "switched off (capture=False)", False
    if model.device.type not in RECORDERS:
        return f"runs on {model.device.type}; a step can be captured on {', '.join(RECORDERS)}", False
    generation, cache = kwargs["generation_config"], kwargs.get("past_key_values")
    if generation.is_assistant:
        return "drafts for assisted decoding, a few tokens at a time", False
    if type(cache).__name__ == "StaticCache":
        return "static cache, which Transformers compiles by itself", False
    if settings.measure_recall:
        return "measure_recall reads all keys at every step", False
    if generation.output_attentions or generation.output_hidden_states:
        return "attentions or hidden states were asked for", True
    if torch.is_grad_enabled() or torch.is_autocast_enabled(model.device.type):
        return "grad or autocast is on", True
    if kwargs.get("synced_gpus"):
        return "several processes generate in step", True
    if not isinstance(cache, DynamicCache) or cache.offloading:
        return f"the cache is {'offloaded' if isinstance(cache, DynamicCache) else type(cache).__name__}", True
    others = {type(layer).__name__ for layer in cache.layers if not hasattr(layer, "enter_fixed")}
    if others or not cache.layers:
        return f"cache layers that are not ours: {', '.join(sorted(others)) or 'unknown before the prompt'}", True
    return why_not_model(model), True


def _begin(model: PreTrainedModel, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Call | None:
    settings = adapter().settings_of(model.config)
    reason, worth_a_line = why_eager(model, settings, kwargs)
    if reason is None:
        rows, tokens = input_ids.shape
        new_tokens = (kwargs["generation_config"].max_length or 1 << 40) - tokens
        greedy = not kwargs["generation_config"].do_sample
        call = Call(model, settings, kwargs["past_key_values"], rows, new_tokens, greedy)
        embeds = kwargs.get("inputs_embeds")
        try:
            call.prepare(tokens if embeds is None else embeds.shape[1])
            return call
        except RuntimeError as error:
            call.give_up(error)
            return None
    tally_of(model).eager[reason] += 1
    if worth_a_line:
        _log_once(type(model).__name__, reason)
    return None


def install() -> None:
    """Wrap `GenerationMixin._sample`; a second call changes nothing."""
    original = _METHODS._sample
    if hasattr(original, "_unique_original"):
        return

    @functools.wraps(original)
    def _sample(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        call = _begin(self, input_ids, kwargs) if _uses_unique(self) else None
        if call is None:
            return original(self, input_ids, *args, **kwargs)
        try:
            return original(_StandIn(call), input_ids, *args, **kwargs)
        finally:
            call.finish()

    vars(_sample)["_unique_original"] = original
    _METHODS._sample = _sample


def uninstall() -> None:
    """Put `GenerationMixin._sample` back; `generate` then decodes eagerly."""
    original = getattr(_METHODS._sample, "_unique_original", None)
    if original is not None:
        _METHODS._sample = original
