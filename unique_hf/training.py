"""Sparsity-aware training with the trainers of Transformers and TRL. Imports torch and Transformers, never trl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configure import configure, text_config
from .hub import card_for_trainer
from .probe import measure
from .schedule import SoftMaskSchedule, softmax_scale_of

__all__ = ["SoftMaskCallback", "SoftMaskSchedule", "measure"]

_DRAWN = ("temperature", "budget", "soft_mask")


class SoftMaskCallback(TrainerCallback):
    """Trains through the soft mask by a schedule and shows sparsity being learnt in the trainer's logs.

    Before every step the settings of that step go to the model with [`configure`], after it the user's own come back,
    so evaluations and checkpoints in between see those; the trainer's cards tell them too. Add it with
    `trainer.add_callback(SoftMaskCallback(trainer))`.

    Args:
        trainer (`Trainer`): The trainer, also TRL's; the callback logs through it.
        schedule (`SoftMaskSchedule`, *optional*): Temperature, budgets and dense steps; see its defaults.
        probe (`Mapping`, *optional*): Unpacked rows to measure on, `input_ids [B, T]`, with `attention_mask` and
            `labels` where needed; the same on every process. Without it only what the schedule drew is logged.
        probe_every (`int`, *optional*, defaults to 50): Steps between measurements; the first is before training, the
            last after it.
    Raises:
        ValueError: `probe_every` is below 1, or (at the start of training) the model does not run UNIQUE attention.

    Numerics: what a step draws depends on the schedule's seed and the step alone, so all processes agree and a resumed
    run goes on as it would have.
    """

    def __init__(
        self,
        trainer: Any,
        schedule: SoftMaskSchedule | None = None,
        *,
        probe: Mapping[str, torch.Tensor] | None = None,
        probe_every: int = 50,
    ):
        if probe_every < 1:
            raise ValueError(f"`probe_every` must be >= 1, got {probe_every}.")
        self.trainer = trainer
        self.schedule = SoftMaskSchedule() if schedule is None else schedule
        self.probe = probe
        self.probe_every = probe_every
        self.soft_steps, self.steps = 0, 0
        card_for_trainer(trainer)

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        """Reads the user's settings; measures the model as it comes."""
        name = text_config(model)._attn_implementation
        if not hasattr(ALL_ATTENTION_FUNCTIONS.get(name) if name != "eager" else None, "is_unique_attention"):
            raise ValueError(
                f"expected a model with attn_implementation='unique', got {name!r}: load it with "
                "model_init_kwargs={'attn_implementation': 'unique'}, or call model.set_attn_implementation('unique')"
            )
        self.base = configure(model)
        self.scale = softmax_scale_of(model)
        if state.global_step == 0:
            self._log(args, model, {})

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        """Puts the settings of this step in force."""
        drawn = self.schedule.settings(state.global_step, state.max_steps, self.base, self.scale)
        self.steps += 1
        self.soft_steps += drawn.soft_mask
        self._set(model, drawn)

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        """Brings the user's settings back; measures and logs when it is time."""
        self._set(model, self.base)
        measuring = state.global_step % self.probe_every == 0 or state.global_step == state.max_steps
        if measuring or control.should_log:
            temperature = self.schedule.temperature_at(state.global_step - 1, state.max_steps)
            drawn = {"temperature": temperature, "soft_steps": self.soft_steps / max(1, self.steps)}
            self.soft_steps = self.steps = 0
            self._log(args, model, drawn, measuring, temperature / self.scale)

    def on_train_end(self, args, state, control, model: Any = None, **kwargs):
        """Leaves the user's settings in force."""
        self._set(model, self.base)

    def _set(self, model: Any, settings: Any) -> None:
        configure(model, **{name: getattr(settings, name) for name in _DRAWN})

    def _log(self, args, model, values: dict[str, float], measuring: bool = True, temperature: float | None = None):
        if measuring and self.probe is not None:
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            temperature = self.schedule.temperature[0] / self.scale if temperature is None else temperature
            # the mask as it is trained now, at the user's budget
            configure(model, temperature=temperature)
            values = {**values, **measure(model, dict(self.probe), dtype=dtype)}
            configure(model, temperature=self.base.temperature)
        if values:
            # past TRL's `log`, which would hand the averages of its own next entry to this one
            Trainer.log(self.trainer, {f"unique/{name}": value for name, value in values.items()})
