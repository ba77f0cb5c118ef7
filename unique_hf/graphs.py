"""Recording a step once and replaying it: CUDA graphs. Imports torch only."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

# streams that no recorder uses: cuBLAS keeps a workspace for each stream it has seen, and never frees it
_IDLE: dict[torch.device, list[Any]] = {}
# handles of all streams that a recorder has or had
_OWNED: dict[torch.device, set[int]] = {}
_CHOOSING = threading.Lock()
# torch deals streams out in turn, from as many per device and priority
POOL = 32
# captures exclude each other: a graph being recorded must not see the allocations of another one
_RECORDING = threading.Lock()
# with less free memory, blocks that torch keeps for re-use are given back first: a capture cannot do that
LOW_MEMORY = 1 << 30


def _own_stream(device: torch.device) -> Any:
    """A stream for one recorder: what other work is put on it meanwhile would be recorded instead of run."""
    idle, owned = _IDLE.setdefault(device, []), _OWNED.setdefault(device, set())
    with _CHOOSING:
        if idle:
            return idle.pop()
        for _ in range(POOL):
            # streams for work of users come from the pool of ordinary priority
            stream = torch.cuda.Stream(device, priority=-1)
            if stream.cuda_stream not in owned:
                owned.add(stream.cuda_stream)
                return stream
    raise RuntimeError(
        f"expected a stream of {device} that no other captured step uses, got {POOL} streams in use: free the steps "
        "of models that do not generate now, `unique_hf.capture.release(model)`"
    )


class CudaGraph:
    """Records CUDA work with a memory pool, a stream and thus matrix workspaces of its own; replays on any stream.

    Args:
        device (`torch.device`): A CUDA device.
    """

    # launches are what a decode step of a small model spends its time on
    fuses = True

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = _own_stream(device)
        # appending is one operation: the garbage collector may come at any time, in any thread
        weakref.finalize(self, _IDLE[device].append, self.stream)

    def take_over(self) -> None:
        """Let the caller's stream wait for what earlier callers did, maybe on other streams (see `hand_over`)."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def hand_over(self) -> None:
        """Let whoever comes next, and whatever re-uses memory of this stream, wait for the caller's work so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def make(self, work: Callable[[], Any]) -> Any:
        """Run work on the recorder's stream, to which the memory of what it makes will belong.

        Args:
            work (`Callable`): Takes nothing.
        Returns:
            `Any`: What it returns; the caller's stream waits for it.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                return work()
        finally:
            # after an error too: what did start uses memory that the caller is about to free
            current.wait_stream(self.stream)

    def warm(self, step: Callable[[], Any]) -> Any:
        """Run a step for real, on the stream that the capture will use: libraries and kernels get loaded.

        Args:
            step (`Callable`): Takes nothing.
        Returns:
            `Any`: What the step returns.
        """
        return self.make(step)

    def beside(self, work: Callable[[], Any]) -> Callable[[], None]:
        """Run work on the recorder's own stream, after what the caller's stream has now and what ran here before.

        Args:
            work (`Callable`): Takes nothing.
        Returns:
            `Callable`: Makes the stream that is then current wait for it.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                work()
        except BaseException:
            # what did start uses memory that the caller is about to free
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            raise
        done = self.stream.record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)

    def capture(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Record a step without running it.

        Args:
            step (`Callable`): Takes nothing; what it reads and writes outside must stay where it is.
        Returns:
            `Callable`: Replays the step; returns the same tensors every time, with the new numbers.
        Raises:
            RuntimeError: The step waits for the device, or does something else that cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(self.device):
            if torch.cuda.mem_get_info()[0] < LOW_MEMORY:
                torch.cuda.empty_cache()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                # other threads may go on with their own work meanwhile
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    outputs = step()
                except BaseException:
                    # the capture must end, and its own complaint would hide the cause
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            torch.cuda.current_stream().wait_stream(self.stream)

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


# by device type; a test on a machine without a GPU puts a stand-in here
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaGraph}
