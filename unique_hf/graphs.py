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
# captures exclude each other: a graph being recorded must not see the allocations of another one
_RECORDING = threading.Lock()
# with less free memory, blocks that torch keeps for re-use are given back first: a capture cannot do that
LOW_MEMORY = 1 << 30


class CudaGraph:
    """Records CUDA work with a memory pool, a stream and thus matrix workspaces of its own; replays on any stream.

    Args:
        device (`torch.device`): A CUDA device.
    """

    # launches are what a decode step of a small model spends its time on
    fuses = True

    def __init__(self, device: torch.device):
        self.device = device
        idle = _IDLE.setdefault(device, [])
        self.stream = idle.pop() if idle else torch.cuda.Stream(device)
        weakref.finalize(self, idle.append, self.stream)

    def warm(self, step: Callable[[], Any]) -> Any:
        """Run a step for real, on the stream that the capture will use: libraries and kernels get loaded.

        Args:
            step (`Callable`): Takes nothing.
        Returns:
            `Any`: What the step returns.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = step()
        current.wait_stream(self.stream)
        return outputs

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
