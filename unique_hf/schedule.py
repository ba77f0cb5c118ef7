"""How sharp the soft mask is, how many tokens it keeps and when it is off, step by step. Standard library only.

What a first training run taught: with one length, one budget and the mask in every step the model leaves the work of
suppressing other tokens to the mask, and forgets it. So the budget is drawn anew for every step, a share of the steps
is dense, and the temperature starts where gradients reach many pages and never gets to a hard cut.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SoftMaskSchedule:
    """Settings of each training step; a pure function of the step, so every process of a job draws the same.

    Equation: temperature(step) = first (last / first)^min(1, step / ((1 - hold) (num_steps - 1))).

    Args:
        temperature (`tuple`, *optional*, defaults to `(0.5, 0.08)`): First and last width of the sigmoid of Eq. 6, in
            units of attention logits (a page score of Eq. 2 times the softmax scale), whatever the head dim.
        hold (`float`, *optional*, defaults to 0.4): Share of the steps, at the end, that stay at the last temperature.
        budget (`tuple`, *optional*): Least and most tokens kept, drawn log-uniformly per step; `None` keeps the
            budget of the model.
        dense_share (`float`, *optional*, defaults to 0.5): Share of the steps that train dense.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
    Raises:
        ValueError: a value is out of range.
    """

    temperature: tuple[float, float] = (0.5, 0.08)
    hold: float = 0.4
    budget: tuple[int, int] | None = None
    dense_share: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if len(self.temperature) != 2 or min(self.temperature) <= 0:
            raise ValueError(f"`temperature` must be two numbers > 0 (first, last), got {self.temperature}.")
        for name in ("hold", "dense_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        if self.budget is not None and not 0 < self.budget[0] <= self.budget[1]:
            raise ValueError(f"`budget` must be (least, most) tokens with 0 < least <= most, got {self.budget}.")

    def temperature_at(self, step: int, num_steps: int) -> float:
        """Width of the sigmoid in units of attention logits.

        Args:
            step (`int`): From 0.
            num_steps (`int`): Steps in all.
        Returns:
            `float`: The temperature.
        """
        first, last = self.temperature
        falling = max(1.0, (1 - self.hold) * (num_steps - 1))
        return first * (last / first) ** min(1.0, step / falling)

    def is_dense(self, step: int) -> bool:
        """Whether a step trains without the mask.

        Args:
            step (`int`): From 0.
        Returns:
            `bool`: True for `dense_share` of the steps; a larger share adds steps to those of a smaller.
        """
        return random.Random(f"dense/{self.seed}/{step}").random() < self.dense_share

    def settings(self, step: int, num_steps: int, base: Any, softmax_scale: float, most: int | None = None) -> Any:
        """The settings of one step.

        Args:
            step (`int`): From 0.
            num_steps (`int`): Steps in all.
            base (`UniqueConfig`): The settings of the model; what the schedule does not draw stays.
            softmax_scale (`float`): Factor from page scores to attention logits.
            most (`int`, *optional*): Upper bound of the budget in tokens, where rows are short.
        Returns:
            `UniqueConfig`: `base` with `temperature`, `budget` and `soft_mask` of this step.
        """
        budget = base.budget
        if self.budget is not None:
            where = random.Random(f"budget/{self.seed}/{step}").random()
            least, upper = self.budget
            upper = max(least, upper if most is None else min(upper, most))
            budget = round(math.exp(math.log(least) + where * math.log(upper / least)))
        pages = max(round(budget / base.page_size), base.sink_pages + base.recent_pages + 1)
        return base.replace(
            temperature=self.temperature_at(step, num_steps) / softmax_scale,
            budget=pages * base.page_size,
            soft_mask=not self.is_dense(step),
        )


def softmax_scale_of(model: Any) -> float:
    """Factor from page scores to attention logits in a model: the `scaling` of its first attention module.

    Args:
        model (`torch.nn.Module`): A Transformers model, possibly wrapped.
    Returns:
        `float`: `scaling`, or `1 / sqrt(head_dim)` where a module has a `head_dim` only.
    Raises:
        TypeError: no module has either.
    """
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            if isinstance(getattr(module, "scaling", None), (int, float)):
                return float(module.scaling)
            if isinstance(getattr(module, "head_dim", None), int):
                return module.head_dim**-0.5
    raise TypeError(f"expected a Transformers model with attention modules, got {type(model).__name__}")
