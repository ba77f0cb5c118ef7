"""A recorded step that runs before it is asked for. Imports torch only.

`generate` chooses a token, asks its criteria, and prepares the next inputs on the host while the device has nothing to
do. So the recording ends with the inputs that greedy search would give to the next step, and that step starts at once,
on the recorder's own stream. When it is asked for, its inputs are compared with those it ran on; if they differ, the
caller undoes it (one length to take back: its token's slot and page are written again by the step that replaces it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

IDS = "input_ids"
# inputs that count tokens; any other is taken to stay as it is
COUNTED = ("position_ids", "cache_position")
# a step in vain may cost as much as HITS good ones gain
HITS = 8


class Started(NamedTuple):
    """A step under way.

    Args:
        turn (`int`): Which of the two sets of results it writes.
        wait (`Callable`): Makes the stream of the caller, not the host, wait for it.
    """

    turn: int
    wait: Callable[[], None]


class Lookahead:
    """Guesses the inputs of the next step, and keeps results until the step after has begun.

    Args:
        recorder: Runs work beside the caller's stream.
        inputs (`dict`): Static inputs of the recording, `[B, 1]` token ids among them.
    """

    def __init__(self, recorder: Any, inputs: dict[str, torch.Tensor]):
        self.recorder, self.inputs = recorder, inputs
        self._names = [IDS, *(name for name in inputs if name != IDS)]
        ids = inputs[IDS]
        numbers = sum(tensor.numel() for tensor in inputs.values())
        with torch.inference_mode(False):
            # what a row is given whatever its logits say (padding, once it has ended), or -1
            self.held = recorder.make(lambda: torch.full_like(ids[:, 0], -1))
            self._guesses = recorder.make(lambda: [ids.new_zeros(numbers) for _ in range(2)])
        self._results: list[dict[str, Any]] = []
        self._last = 0
        self.credit = 0.0

    @staticmethod
    def suits(inputs: dict[str, torch.Tensor], outputs: dict[str, Any]) -> bool:
        """Whether the next inputs of a step can be guessed from its results.

        Args:
            inputs (`dict`): Its static inputs.
            outputs (`dict`): Fields of what the model returned.
        Returns:
            `bool`: Token ids and other integers go in, tensors with logits among them come out.
        """
        logits = outputs.get("logits")
        return (
            IDS in inputs
            and all(tensor.dtype == torch.int64 for tensor in inputs.values())
            and all(value is None or torch.is_tensor(value) for value in outputs.values())
            and logits is not None
            and logits.dim() == 3
            and logits.shape[0] == inputs[IDS].shape[0]
        )

    def begin(self) -> None:
        """Forget what another call did."""
        self.held.fill_(-1)
        self.credit = 1.0 + self.held.shape[0]

    def guess(self, outputs: dict[str, Any]) -> None:
        """The end of a recorded step: put the inputs of the next one in place.

        Args:
            outputs (`dict`): Fields of what the model returned.
        """
        best = outputs["logits"][:, -1].argmax(-1)
        self.inputs[IDS][:, 0].copy_(torch.where(self.held < 0, best, self.held))
        for name in COUNTED:
            if name in self.inputs:
                self.inputs[name].add_(1)

    def start(self, replay: Callable[[], tuple[type, dict[str, Any]]]) -> Started:
        """Run a step on the inputs in place, beside the caller's stream.

        Args:
            replay (`Callable`): The recorded step, whose results the next step overwrites.
        Returns:
            `Started`: The step.
        """
        turn = self._last = 1 - self._last

        def work() -> None:
            _, fields = replay()
            if not self._results:
                with torch.inference_mode(False):
                    self._results = [{k: v if v is None else torch.empty_like(v) for k, v in fields.items()}
                                     for _ in range(2)]  # fmt: skip
            for name, value in fields.items():
                if value is not None:
                    self._results[turn][name].copy_(value)
            torch.cat([self.inputs[name].reshape(-1) for name in self._names], out=self._guesses[turn])

        return Started(turn, self.recorder.beside(work))

    def results(self, started: Started) -> dict[str, Any]:
        """The fields that a step under way writes; the caller's stream waits for them.

        Args:
            started (`Started`): The step.
        Returns:
            `dict`: Good until the step after the next one starts.
        """
        started.wait()
        return self._results[started.turn]

    def guessed(self, inputs: dict[str, Any], started: Started) -> bool:
        """Whether a step under way has the inputs that are now asked for. The host waits, but not for that step.

        Args:
            inputs (`dict`): Keywords of the model's forward, of the shapes of the static inputs.
            started (`Started`): The step; the one before it gave the inputs.
        Returns:
            `bool`: `False` also ends the guesses of a call in which they are too often wrong.
        """
        guess = self._guesses[1 - started.turn]
        if torch.equal(torch.cat([inputs[name].reshape(-1) for name in self._names]), guess):
            self.credit += 1 / HITS
            return True
        self.credit -= 1
        ids = inputs[IDS][:, 0]
        # a row that ends is given padding from then on; one that departs from that was only steered
        other = torch.where(self.held < 0, ids, -1)
        self.held.copy_(torch.where(ids == guess[: ids.shape[0]], self.held, other))
        return False
