"""The captured decode step: static inputs, lengths on the device, one graph. May import torch and Transformers."""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from . import deferred
from .arena import Arena
from .backend import adapter
from .fused import fused
from .graphs import RECORDERS
from .lookahead import Lookahead, Started

# handled by the step itself: the cache is bound, padding has become `seq_starts`
OWN = ("past_key_values", "attention_mask")


class NotCapturable(RuntimeError):
    """Why a call decodes eagerly; the message is for people."""


def _tensors(layer: Any) -> tuple[torch.Tensor | None, ...]:
    return (*layer.buffers(), *(tensor for level in layer.index.levels for tensor in level.stats))


def _place(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


class _Progress:
    """What layers in fixed mode know of the step: tokens in the cache, and whether the model's forward runs now."""

    def __init__(self):
        self.length, self.inside = 0, False

    def __call__(self) -> int | None:
        """The tokens where no forward runs; a forward asks the device."""
        return None if self.inside else self.length


class DecodeStep:
    """One decode step of a batch, recorded once and replayed, on the buffers of the cache that is bound to it.

    A graph reads addresses, not objects: it stays good for another cache as long as all buffers lie where they lay.

    Args:
        device (`torch.device`): Where the model runs.
        batch (`int`): Rows.
    """

    def __init__(self, device: torch.device, batch: int):
        self.recorder = RECORDERS[device.type](device)
        # calls on other streams come and go, so all memory belongs to the recorder's
        self.seq_lens, self.seq_starts, self.counters = self._own(
            lambda: [torch.zeros(rows, dtype=torch.int32, device=device) for rows in (batch, batch, 0)]
        )
        self.inputs: dict[str, torch.Tensor] = {}
        self.constants: dict[str, Any] = {}
        self.layout: tuple[Any, ...] | None = None
        self.bound: tuple[Any, ...] | None = None
        self.shapes: tuple[Any, ...] = ()
        self.state = 0
        self.warmed_for: tuple[Any, ...] | None = None
        self.captured_for: tuple[Any, ...] | None = None
        self.replay: Callable[[], Any] | None = None
        # attention modules that ran, in order; weakly, since the step outlives no model
        self.modules: list[weakref.ref[torch.nn.Module]] = []
        # where the buffers of the last cache lay, for a later call to ask for the same places
        self.arena: Arena | None = None
        self.captures, self.seconds = 0, 0.0
        # steps that were under way when they were asked for, and steps that ran in vain
        self.early = self.vain = 0
        self.guessable = False
        self.lookahead: Lookahead | None = None
        self._started: Started | None = None
        self.progress = _Progress()
        # why launches may not wait for what comes next (`None`: they may), found out at the first run; and what the
        # recording launches
        self.plain_because: str | None = "not tried yet"
        self.launches: Counter[str] = Counter()
        self._model: Any = None
        self._cache: Any = None
        # class of what the recorded forward returns
        self._kind: Any = None
        # by the set of results that they show: the recording's own, or one of the two that a lookahead keeps
        self._outputs: dict[int | None, ModelOutput] = {}
        self._starts: list[torch.Tensor | None] = []

    @property
    def batch(self) -> int:
        """Rows."""
        return self.seq_lens.shape[0]

    @property
    def defers(self) -> bool:
        """Whether launches wait for what comes next."""
        return self.plain_because is None

    def _own(self, make: Callable[[], Any]) -> Any:
        # plain tensors can be written in inference mode and outside, tensors born inside only there
        with torch.inference_mode(False):
            return self.recorder.make(make)

    def bind(
        self, model: PreTrainedModel, cache: Any, length: int, capacity: int, starts: torch.Tensor | None, state: int
    ) -> int:
        """Put a cache into fixed mode under this step.

        Args:
            model (`PreTrainedModel`): The model that decodes.
            cache (`Cache`): Its cache, all layers awake.
            length (`int`): Tokens in the cache.
            capacity (`int`): Slots to provide.
            starts (`torch.Tensor`, *optional*): `[B]`, first valid slot of each row.
            state (`int`): Fingerprint of the model.
        Returns:
            `int`: Slots there are.
        Raises:
            ValueError: A layer cannot be fixed.
        """
        self._model, self._cache, self.progress.length = model, cache, length
        self._starts = [layer.index.seq_starts for layer in cache.layers]
        self.seq_lens.fill_(length)
        if starts is None:
            self.seq_starts.zero_()
        else:
            self.seq_starts.copy_(starts)
        for layer in cache.layers:
            layer.enter_fixed(self.seq_lens, capacity, self._scratch(layer), self.progress)
            layer.index.seq_starts = self.seq_starts
        self.state = state
        places = tuple(_place(tensor) for layer in cache.layers for tensor in _tensors(layer))
        self.bound, self.shapes = (state, places), tuple(place and place[1:] for place in places)
        self._outputs = {}
        if self.lookahead is not None:
            self.lookahead.begin()
        return min(layer.buffers()[0].shape[2] for layer in cache.layers)

    def _scratch(self, layer: Any) -> torch.Tensor:
        if self.counters.numel() < layer.num_counters:
            self.drop_graph()
            self.counters = self._own(lambda: self.seq_lens.new_zeros(layer.num_counters))
        return self.counters

    def release(self, length: int) -> None:
        """Return the cache to the growing form, `length` tokens long; the graph is kept.

        Args:
            length (`int`): Tokens in the cache now.
        """
        if self._cache is None:
            return
        self._undo()
        for layer, starts in zip(self._cache.layers, self._starts):
            # restored even where a layer failed to enter: then `fixed_lens` was never set
            layer.index.seq_starts = starts
            if layer.fixed_lens is not None:
                layer.leave_fixed(length)
                for level in layer.index.levels:
                    # a step in vain may have left a token too many in the last page: recomputed before it is read
                    level.covered -= length % level.settings.page_size
        self._model = self._cache = self.bound = None
        self._outputs, self._starts = {}, []
        self.recorder.hand_over()

    def _undo(self) -> None:
        """Take back the step under way, if there is one."""
        started, self._started = self._started, None
        if started is not None:
            started.wait()
            self.seq_lens.sub_(1)
            self.vain += 1

    def drop_graph(self) -> None:
        """Forget the recording, whose memory returns to torch."""
        # memory that a step under way writes to must not be given to others
        self._undo()
        self.lookahead = None
        self.replay = self.captured_for = self.warmed_for = None

    def run(self, inputs: dict[str, Any], more: bool = False) -> ModelOutput:
        """One decode step of the bound cache: eager at first, recorded at the second, replayed from then on.

        Args:
            inputs (`dict`): Keywords of the model's forward, `[B, 1]` token ids among them.
            more (`bool`, *optional*, defaults to `False`): Start the step after this one too, where its inputs can be
                guessed; there is room for it in the cache.
        Returns:
            `ModelOutput`: As from the model; its tensors are overwritten by the next step.
        Raises:
            NotCapturable: The step cannot be replayed.
        """
        outputs = self._run(inputs, more)
        self.progress.length += 1
        return outputs

    def _run(self, inputs: dict[str, Any], more: bool) -> ModelOutput:
        started = self._asked_for(inputs)
        if started is None:
            self._load(inputs)
            key = (self.bound, self.layout)
            if self.replay is None or self.captured_for != key:
                kind = (self.state, self.layout, self.shapes)
                if self.warmed_for != kind:
                    return self._dress(self._warm(kind))
                # what a step of these shapes loads and compiles is there, wherever its buffers lie
                self._record(key)
        replay: Any = self.replay
        ahead = self.lookahead
        if ahead is None or (started is None and not (more and ahead.credit > 0)):
            return self._show(None, replay()[1])
        if started is None:
            started = ahead.start(replay)
        if more and ahead.credit > 0:
            self._started = ahead.start(replay)
        return self._show(started.turn, ahead.results(started))

    def _asked_for(self, inputs: dict[str, Any]) -> Started | None:
        """The step under way, if it is the one that is asked for; otherwise it is undone."""
        started, ahead = self._started, self.lookahead
        if started is None or ahead is None:
            return None
        if self._as_before(inputs) and ahead.guessed(inputs, started):
            self._started = None
            self.early += 1
            return started
        self._undo()
        return None

    def _warm(self, kind: tuple[Any, ...]) -> tuple[type, dict[str, Any]]:
        self.drop_graph()
        with adapter().activity.probing() as log, self._fused():
            outputs = self.recorder.warm(self._forward)
        self._check(log)
        self.plain_because = self._why_plain(outputs)
        self.guessable = Lookahead.suits(self.inputs, outputs[1])
        self.warmed_for, self._kind = kind, outputs[0]
        return outputs

    def _record(self, key: tuple[Any, ...]) -> None:
        self.replay = None
        begin = time.perf_counter()
        mode = self._mode() if self.defers else None
        ahead = self.lookahead = Lookahead(self.recorder, self.inputs) if self.guessable else None

        def step() -> tuple[type, dict[str, Any]]:
            outputs = self._forward(mode)
            if ahead is not None:
                ahead.guess(outputs[1])
            return outputs

        with adapter().activity.probing(), self._fused(mode):
            self.replay = self.recorder.capture(step)
        if ahead is not None:
            ahead.begin()
        self.launches = Counter() if mode is None else mode.counts
        self.captured_for = key
        self.captures, self.seconds = self.captures + 1, self.seconds + time.perf_counter() - begin
        self._outputs = {}

    def _show(self, turn: int | None, fields: dict[str, Any]) -> ModelOutput:
        # the same tensors every time
        if turn not in self._outputs:
            self._outputs[turn] = self._dress((self._kind, fields))
        return self._outputs[turn]

    def _fused(self, mode: deferred.Deferred | None = None) -> contextlib.AbstractContextManager[Any]:
        return fused(self._model, mode) if self.recorder.fuses else contextlib.nullcontext()

    def _mode(self, trial: bool = False) -> deferred.Deferred:
        return deferred.Deferred(deferred.kernel(), trial)

    def _why_plain(self, outputs: tuple[type, dict[str, Any]]) -> str | None:
        """Run the step once more on trial, its launches waiting: what speaks against recording it so."""
        module = deferred.kernel()
        if not self.recorder.fuses:
            return f"{type(self.recorder).__name__} records launch by launch"
        if module is None:
            return "no kernel for linear layers of few rows (no Triton, or a kernel from the Hub without it)"
        if self.batch > module.MAX_ROWS:
            return f"{self.batch} rows, the kernel takes at most {module.MAX_ROWS}"
        mode = self._mode(trial=True)
        try:
            found = self._again(mode)[1]
            reason = mode.complaint() or deferred.nan_where_none_was(outputs[1], found)
        except module.FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            # what was poisoned went into the cache too
            self._again()
            logging.get_logger("transformers.unique_attention").warning(
                f"unique attention: {type(self._model).__name__} is recorded launch by launch: {reason}"
            )
        elif not any("linear" in kind for kind in mode.counts):
            reason = "no linear layer that could wait (contiguous parameters in 16 bits)"
        return reason

    def _again(self, mode: deferred.Deferred | None = None) -> tuple[type, dict[str, Any]]:
        """Repeat the last step: its token is written to the same slot."""
        lengths = self.seq_lens.clone()
        self.seq_lens.sub_(1)
        try:
            with adapter().activity.probing(), self._fused(mode):
                return self.recorder.warm(functools.partial(self._forward, mode))
        finally:
            self.seq_lens.copy_(lengths)

    def _load(self, inputs: dict[str, Any]) -> None:
        if not self._as_before(inputs):
            self._lay_out(inputs)
        for name, static in self.inputs.items():
            static.copy_(inputs[name])

    def _as_before(self, inputs: dict[str, Any]) -> bool:
        """Whether the inputs differ from those of the last step in numbers of tensors only."""
        seen = 0
        for name, value in inputs.items():
            if name in OWN:
                continue
            seen += 1
            static = self.inputs.get(name)
            if static is None:
                if name not in self.constants or self.constants[name] is not value:
                    return False
            elif not torch.is_tensor(value) or value.shape != static.shape or value.dtype != static.dtype:
                return False
        return self.layout is not None and seen == len(self.inputs) + len(self.constants)

    def _lay_out(self, inputs: dict[str, Any]) -> None:
        tensors, constants = {}, {}
        for name, value in inputs.items():
            if name in OWN:
                continue
            if torch.is_tensor(value):
                tensors[name] = value
            elif isinstance(value, (dict, list, tuple)):
                raise NotCapturable(f"the model takes `{name}` of type {type(value).__name__} at every step")
            else:
                constants[name] = value
        layout = tuple((name, value.shape, value.dtype) for name, value in sorted(tensors.items()))
        # objects (a tokenizer, for stop strings) by identity: `constants` keeps them, so that no other gets their id
        plain = (bool, int, float, str, type(None))
        layout += tuple((name, x if isinstance(x, plain) else id(x)) for name, x in sorted(constants.items()))
        if layout != self.layout:
            self.inputs = self._own(lambda: {name: torch.empty_like(value) for name, value in tensors.items()})
            self.constants, self.layout = constants, layout
            self.drop_graph()

    def _forward(self, mode: deferred.Deferred | None = None) -> tuple[type, dict[str, Any]]:
        self.seq_lens.add_(1)
        self.progress.inside = True
        try:
            with contextlib.nullcontext() if mode is None else mode:
                outputs = self._model(**self.inputs, **self.constants, past_key_values=self._cache)
        finally:
            self.progress.inside = False
        if not isinstance(outputs, ModelOutput) or outputs.get("past_key_values") is not self._cache:
            raise NotCapturable("the model does not return the cache that it was given")
        # without the cache: a kept graph must not keep a cache alive
        return type(outputs), {name: value for name, value in outputs.items() if name != "past_key_values"}

    def _dress(self, outputs: tuple[type, dict[str, Any]]) -> ModelOutput:
        kind, fields = outputs
        return kind(**fields, past_key_values=self._cache)

    def _check(self, log: dict[torch.nn.Module, list[Any]]) -> None:
        for module, calls in log.items():
            for tokens, mode in calls:
                if tokens != 1 or mode.kind != "sparse":
                    raise NotCapturable(f"{type(module).__name__} runs dense: {mode.reason}")
        if not log:
            raise NotCapturable("no attention module ran through attn_implementation='unique'")
        self.modules = [weakref.ref(module) for module in log]
