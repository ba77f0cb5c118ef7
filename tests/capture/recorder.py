"""A stand-in for CUDA graphs on any device: replays by running again, and fails where a real graph would go wrong."""

import contextlib
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from unique_attention import ops
from unique_hf import graphs
from unique_hf.arena import Arena

HOST_READS = ("aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default")
# their CPU reference reads lengths; the kernels that a graph records do not
EXEMPT = ("append_tokens", "unique_decode", "page_stats")
_LOCAL = threading.local()


class Trace(TorchDispatchMode):
    """Writes down every op with its shapes, its Python numbers, and the addresses of tensors from outside."""

    def __init__(self):
        super().__init__()
        self.lines, self.inside, self.paused = [], {}, False

    def place(self, tensor):
        owner = tensor.untyped_storage()._cdata
        where = "inside" if owner in self.inside else tensor.data_ptr()
        return (where, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def note(self, name, args):
        self.lines.append((name, repr(tree_map_only(torch.Tensor, self.place, args))))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused:
            assert str(func) not in HOST_READS, f"{func} waits for the device, which a graph cannot record"
            self.note(str(func), (args, kwargs))
        out = func(*args, **(kwargs or {}))

        def keep(tensor):
            known = [a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)]
            if tensor.untyped_storage()._cdata not in known:
                # held until the trace ends: an address must not be used twice within it
                self.inside[tensor.untyped_storage()._cdata] = tensor
            return tensor

        tree_map_only(torch.Tensor, keep, out)
        return out


class Replayed:
    """What `CudaGraph` does, without CUDA. `log` tells what happened, in order."""

    log = []
    fuses = False
    stream = None

    def __init__(self, device):
        self.device = device

    def take_over(self):
        self.log.append("take over")

    def hand_over(self):
        self.log.append("hand over")

    def make(self, work):
        return work()

    def warm(self, step):
        self.log.append("warm")
        return step()

    def beside(self, work):
        work()
        return lambda: None

    def capture(self, step):
        self.log.append("capture")
        first: dict[bool, tuple] = {}

        def replay():
            self.log.append("replay")
            trace = Trace()
            _LOCAL.trace = trace
            try:
                with trace:
                    kind, fields = step()
            finally:
                _LOCAL.trace = None
            # the same work is other ops to a trace in inference mode; a real graph knows no modes
            mode = torch.is_inference_mode_enabled()
            if mode not in first:
                first[mode] = (trace.lines, fields)
                return kind, fields
            lines, static = first[mode]
            for old, new in zip(lines, trace.lines):
                assert old == new, "a replay must do what was recorded, at the same addresses"
            assert len(lines) == len(trace.lines)
            # a real graph writes its results to the same place every time
            for name, value in fields.items():
                if isinstance(value, torch.Tensor):
                    static[name].copy_(value)
            return kind, static

        return replay


class Late(Replayed):
    """Runs what is beside the caller's stream as late as a device may: when it is waited for."""

    def __init__(self, device):
        super().__init__(device)
        self.queue = []

    def beside(self, work):
        self.queue.append(work)

        def wait():
            while work in self.queue:
                self.queue.pop(0)()

        return wait


def exempt(name):
    original = getattr(ops, name)

    def call(*args, **kwargs):
        trace = getattr(_LOCAL, "trace", None)
        if trace is None or trace.paused:
            return original(*args, **kwargs)
        trace.note(name, [args, {k: v for k, v in kwargs.items() if k != "config"}])
        trace.paused = True
        try:
            return original(*args, **kwargs)
        finally:
            trace.paused = False

    return call


class Blocks:
    """Gives freed memory of the wanted size out again, as torch's allocator does on a GPU and malloc may not."""

    def __init__(self):
        self.pool = []

    def __call__(self, arena, size):
        for memory in self.pool:
            # held by the pool, the loop variable, and the call alone
            if len(memory) == size and sys.getrefcount(memory) <= 3:
                break
        else:
            memory = bytearray(size)
            self.pool.append(memory)
        return torch.frombuffer(memory, dtype=torch.uint8)


@contextlib.contextmanager
def recording_on_cpu(recorder=Replayed):
    """Lets `generate` capture on the CPU; yields the log of what the recorder did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graphs.RECORDERS, "cpu", recorder)
        patch.setattr(Replayed, "log", [])
        # Transformers asks, and builds other masks while it thinks that it is recorded
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: getattr(_LOCAL, "trace", None) is not None)
        blocks = Blocks()
        patch.setattr(Arena, "_block", lambda arena, size: blocks(arena, size))
        for name in EXEMPT:
            patch.setattr(ops, name, exempt(name))
        yield Replayed.log
