"""Several threads and streams: who is fused, whose stream is recorded, and what is waited for in between."""

import gc
import threading

import pytest
import torch

import unique_hf
from tests.capture.recorder import Replayed, recording_on_cpu
from tests.capture.test_generate import model_with
from tests.integration.tiny import batch, greedy
from unique_hf import capture, graphs
from unique_hf import fused as parts
from unique_hf.fingerprint import fingerprint
from unique_hf.fused import fused
from unique_hf.graphs import CudaGraph


def in_thread(work):
    """The result of `work()` in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(60)
    assert found, "the thread failed or hangs"
    return found[0]


# --- fused parts ---


def test_other_threads_run_the_modules_own_way_and_see_no_change(monkeypatch):
    model, x = model_with("qwen3"), torch.randn(2, 64)
    norm = model.model.layers[0].input_layernorm
    runs, original = [], parts._run
    monkeypatch.setattr(parts, "_run", lambda *args: runs.append(threading.get_ident()) or original(*args))
    before = fingerprint(model)
    with fused(model) as counts:
        runs.clear()
        assert counts[0] == 5 and "forward" in vars(norm)
        own = in_thread(lambda: norm(x))
        assert not runs and fingerprint(model) == before == in_thread(lambda: fingerprint(model))
        torch.testing.assert_close(norm(x), own)
        assert runs == [threading.get_ident()]
    norm.forward = lambda x: x
    assert fingerprint(model) != before, "what others put there is seen"


def test_two_threads_do_not_fuse_at_once():
    model, inside, leave, seen = model_with("qwen3"), threading.Event(), threading.Event(), []

    def second():
        assert inside.wait(60)
        with fused(model) as counts:
            seen.append((counts, leave.is_set()))
        # what the other one fused is still taken away by whoever fused it
        return all("forward" not in vars(module) for module in model.modules())

    def first():
        with fused(model) as counts:
            inside.set()
            leave.wait(0.3)
            leave.set()
            assert all("forward" in vars(module) for module in [model.model.norm])
            with fused(model) as nested:
                assert nested == (0, 0), "in one thread the outer one stays"
            return counts

    found = []
    threads = [threading.Thread(target=lambda work=work: found.append(work())) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2 and True in found
    assert seen == [((5, 0), True)] or seen == [((5, 1), True)], "the second one waits and then fuses all"


def test_fingerprints_are_taken_while_another_thread_fuses():
    model = model_with("qwen3")
    norm = model.model.norm

    class Fuses:
        # read in the middle of the module's attributes
        def __repr__(self):
            norm.forward = parts.Patch(norm.forward, norm.forward)
            return "settings"

    norm.settings = [Fuses()]
    found = fingerprint(model)
    assert isinstance(vars(norm).pop("forward"), parts.Patch)
    assert fingerprint(model) == found


def test_threads_that_record_one_model_get_the_eager_tokens():
    class Fusing(Replayed):
        fuses = True

    model, work = model_with("qwen3", layers=2), [batch(padding=(i, 0), seed=i) for i in range(3)]
    expected = [greedy(model, inputs, tokens=16).tolist() for inputs in work]
    found = {}
    with recording_on_cpu(Fusing):
        unique_hf.report(model, reset=True)
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: greedy(model, work[i], tokens=16).tolist()}))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not unique_hf.report(model).capture.eager
    assert [found.get(i) for i in range(3)] == expected
    assert not any("forward" in vars(module) for module in model.modules())


# --- streams ---


class Stream:
    """Handles dealt out in turn, as torch does."""

    dealt = 0

    def __init__(self, device, priority=0):
        Stream.dealt += 1
        self.priority, self.cuda_stream = priority, (priority, Stream.dealt % graphs.POOL)


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(graphs, "_IDLE", {})
    monkeypatch.setattr(graphs, "_OWNED", {})
    return torch.device("cuda", 0)


def test_no_two_recorders_share_a_stream_nor_take_those_of_users(streams):
    first = CudaGraph(streams)
    users = [torch.cuda.Stream(streams) for _ in range(31)]
    recorders = [first, *(CudaGraph(streams) for _ in range(20))]
    handles = [recorder.stream.cuda_stream for recorder in recorders]
    assert len(set(handles)) == len(handles) and not set(handles) & {user.cuda_stream for user in users}
    elsewhere = CudaGraph(torch.device("cuda", 1))
    assert elsewhere.stream is not None, "devices have streams of their own"


def test_streams_are_used_again_and_run_out_with_a_reason(streams):
    recorders = [CudaGraph(streams) for _ in range(graphs.POOL)]
    with pytest.raises(RuntimeError, match="32 streams in use"):
        CudaGraph(streams)
    free = recorders.pop().stream
    gc.collect()
    assert CudaGraph(streams).stream is free


def test_a_call_without_a_stream_decodes_eagerly():
    class None_(Replayed):
        def __init__(self, device):
            raise RuntimeError("expected a stream that no other captured step uses")

    model, inputs = model_with(), batch()
    expected = greedy(model, inputs).tolist()
    unique_hf.report(model, reset=True)
    with recording_on_cpu(None_):
        assert greedy(model, inputs).tolist() == expected
    (reason,) = unique_hf.report(model).capture.eager
    assert "expected a stream" in reason


# --- handing a step over ---


def test_a_step_is_handed_over_after_its_last_work_and_taken_over_before_the_first():
    model, inputs = model_with(), batch()
    with recording_on_cpu() as log:
        in_thread(lambda: greedy(model, inputs, tokens=5).tolist())
        first = log.copy()
        in_thread(lambda: greedy(model, inputs, tokens=5).tolist())
    assert first[-1] == "hand over" and first.count("hand over") == 1 and "take over" not in first
    assert log[len(first)] == "take over" and log[-1] == "hand over" and "replay" in log[len(first) :]


def test_memory_of_a_step_belongs_to_the_recorders_stream():
    made = []

    class Makes(Replayed):
        def make(self, work):
            found = super().make(work)
            tensors = found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
            made.extend(tensor.data_ptr() for tensor in tensors)
            return found

    model = model_with()
    with recording_on_cpu(Makes):
        greedy(model, batch(), tokens=6)
        (step,) = capture._STEPS[model]
        tensors = [step.seq_lens, step.seq_starts, step.counters, *step.inputs.values()]
        tensors += [step.lookahead.held, *step.lookahead._guesses]
        assert {tensor.data_ptr() for tensor in tensors} <= set(made)


def test_cuda_streams_wait_for_each_other(streams, monkeypatch):
    # what `wait_stream` is called with, in order: the recorder's own logic without a device
    waits = []

    class Waits(Stream):
        def wait_stream(self, other):
            waits.append((self, other))

    monkeypatch.setattr(torch.cuda, "Stream", Waits)
    user = Waits(streams)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: user)
    recorder = CudaGraph(streams)
    recorder.hand_over()
    recorder.take_over()
    assert waits == [(recorder.stream, user), (user, recorder.stream)]
