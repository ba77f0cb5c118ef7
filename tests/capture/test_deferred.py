"""Linear layers that wait for what comes next: how many launches are left, the same numbers, and what ends waiting."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

import unique_hf
from tests.capture.recorder import Replayed, recording_on_cpu
from tests.capture.test_generate import model_with
from tests.integration.tiny import ARCHITECTURES, batch, greedy, make
from unique_attention.rotary import rotary as _rotary_kernel
from unique_hf import capture, deferred
from unique_hf import fused as parts
from unique_hf.deferred import Deferred
from unique_hf.fused import fused


def linear(x, weights, biases, outs, residual=None, gated=False):
    """The kernel in torch."""
    found = [F.linear(x, w, None if biases is None else biases[i]) for i, w in enumerate(weights)]
    if gated:
        found = [F.silu(found[0]) * found[1]]
    if residual is not None:
        found = [residual + found[0]]
    for out, result in zip(outs, found, strict=True):
        out.copy_(result)


def rotary(q, k, cos, sin, norms=None, eps=(0.0, 0.0)):
    if norms is not None:
        q, k = (F.rms_norm(x, w.shape, w, e) for x, w, e in zip((q, k), norms, eps))
    turned = (torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) for x in (q, k))
    return tuple(x * cos.unsqueeze(1) + y * sin.unsqueeze(1) for x, y in zip((q, k), turned))


class Kernel:
    """Stands in for the module of the kernel."""

    skinny_linear, MAX_ROWS, FAILURES = staticmethod(linear), 16, (RuntimeError,)

    @staticmethod
    def rms_norm(x, weight, eps, out):
        out.copy_(F.rms_norm(x, weight.shape, weight, eps))


class ManyRows(Kernel):
    MAX_ROWS = 64


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    assert callable(_rotary_kernel)
    monkeypatch.setattr(parts, "_rotary", lambda: rotary)
    monkeypatch.setattr(deferred, "kernel", lambda: Kernel)
    monkeypatch.setattr(deferred, "DTYPES", {torch.float32})


def counts_of(model, inputs, expected):
    mode = Deferred(ManyRows, trial=True)
    with torch.no_grad(), fused(model, mode), mode:
        found = model(**inputs).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    return mode.counts


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_gives_the_same_logits(architecture):
    model, inputs = make(architecture), batch(length=8, padding=(3, 0))
    with torch.no_grad():
        expected = model(**inputs).logits
    assert sum(counts_of(model, inputs, expected).values()) > 0


@pytest.mark.parametrize(("architecture", "rotation"), [("qwen3", "norms and rotation"), ("llama", "rotation")])
def test_a_layer_takes_seven_launches_beside_its_attention(architecture, rotation):
    model, inputs = make(architecture), batch(length=8, padding=(0, 0))
    with torch.no_grad():
        expected = model(**inputs).logits
    layers = model.config.num_hidden_layers
    per_layer = {"norm": 2, "3 linear": 1, rotation: 1, "linear and residual": 2, "gated linear": 1}
    counts = {name: count * layers for name, count in per_layer.items()}
    # the last norm and the head
    assert counts_of(model, inputs, expected) == counts | {"norm": 2 * layers + 1, "1 linear": 1}


def weights(*shape):
    return torch.nn.Parameter(torch.randn(shape), requires_grad=False)


def test_whatever_is_not_known_ends_waiting():
    x, w, u, ones = torch.randn(2, 1, 16), weights(24, 16), weights(24, 16), torch.nn.Parameter(torch.ones(8))
    a, b = F.linear(x, w), F.linear(x, u)
    mode = Deferred(Kernel, trial=True)
    with torch.no_grad(), mode:
        # read, changed in place, indexed, handed to a kernel by address, of another shape or type
        assert (F.linear(x, w).sum() - a.sum()).abs() < 1e-3
        assert torch.equal(F.linear(x, w)[:, :, ::2], a[:, :, ::2])
        gate, up = F.linear(x, w), F.linear(x, u)
        assert gate.data_ptr() and torch.equal(gate, a) and torch.equal(up, b)
        y = F.linear(x, w)
        y += 1
        assert torch.equal(y, a + 1)
        late = F.linear(x, w)
        changed = copy.copy(x)
        x.add_(1)
        assert torch.equal(late, a), "the input changed after the call"
        x.sub_(1)
        assert changed.shape == x.shape
        torch.testing.assert_close(F.linear(x, w) + 1.0, a + 1)
        torch.testing.assert_close(F.linear(x, w) + F.linear(x, u), a + b)
        torch.testing.assert_close(F.silu(F.linear(x, w)) * b, F.silu(a) * b)
        act = F.silu(F.linear(x, w))
        torch.testing.assert_close(act * F.linear(x + 1, u), F.silu(a) * F.linear(x + 1, u))
        torch.testing.assert_close(F.linear(x.double(), w.double()).float(), a)
        norm = F.rms_norm(F.linear(x, w).view(2, 1, 3, 8), (8,), ones, 1e-6)
        torch.testing.assert_close(norm, F.rms_norm(a.view(2, 1, 3, 8), (8,), ones, 1e-6))
        assert mode.counts["1 linear"] > 5 and mode.counts["2 linear"], "they waited"
        many = torch.randn(17, 16)
        mode.counts.clear()
        F.linear(many, w)
        assert not mode.counts, "many rows are cuBLAS's"


def test_only_parameters_are_weights_of_what_waits():
    # the kernels read weights before the launch in front of them has ended
    x, w, bias, norm = torch.randn(2, 16), weights(24, 16), weights(24), weights(16)
    for waits, call in (
        (True, lambda: F.linear(x, w)),
        (True, lambda: F.linear(x, w, bias)),
        (False, lambda: F.linear(x, w + 0)),
        (False, lambda: F.linear(x, w, bias + 0)),
        (True, lambda: F.rms_norm(x, (16,), norm, 1e-6)),
        (False, lambda: F.rms_norm(x, (16,), norm + 0, 1e-6)),
    ):
        expected, mode = call(), Deferred(Kernel)
        with torch.no_grad(), mode:
            found = call()
        torch.testing.assert_close(found, expected)
        assert bool(mode.counts) == waits


def test_other_threads_do_not_touch_what_waits():
    waiting, x, w = Deferred(Kernel, trial=True), torch.randn(2, 1, 16), weights(24, 16)
    q, k, turn = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 8)
    with torch.no_grad(), waiting:
        late = F.linear(x, w)
        thread = threading.Thread(target=parts._rotate, args=(rotary, rotary, waiting, q, k, turn, turn))
        thread.start()
        thread.join()
        assert not waiting.counts
        parts._rotate(rotary, rotary, waiting, q, k, turn, turn)
        assert waiting.counts["1 linear"] == 1
    torch.testing.assert_close(late, F.linear(x, w))


class Fusing(Replayed):
    fuses = True


def test_a_captured_call_defers_and_gives_the_same_tokens():
    model, inputs = model_with("qwen3", layers=2), batch()
    expected = greedy(model, inputs, tokens=24).tolist()
    with recording_on_cpu(Fusing):
        for _ in range(2):
            assert greedy(model, inputs, tokens=24).tolist() == expected
        step = capture._STEPS[model][0]
        assert step.defers and step.launches["gated linear"] >= 2
        tally = unique_hf.report(model).capture
        assert tally.together == tally.captures == 1 and "1 with linear layers" in tally.lines()[0]
    assert not any("forward" in vars(module) for module in model.modules())


def off(kind, share):
    """The kernel, with one kind of launch wrong by a share of its numbers in the last row."""

    def scaled(out):
        out.view(-1, out.shape[-1])[-1] *= 1 + share

    class Off(Kernel):
        @staticmethod
        def skinny_linear(x, weights, biases, outs, residual=None, gated=False):
            linear(x, weights, biases, outs, residual, gated)
            if kind == ("gated" if gated else "residual" if residual is not None else len(weights)):
                scaled(outs[-1])

        @staticmethod
        def rms_norm(x, weight, eps, out):
            Kernel.rms_norm(x, weight, eps, out)
            if kind == "norm":
                scaled(out)

    def rotate(*args, **kwargs):
        q, k = rotary(*args, **kwargs)
        return (q, k * (1 + share)) if kind == "rotation" and kwargs else (q, k)

    return Off, rotate


NAMES = {3: "3 linear", "gated": "gated linear", "residual": "linear and residual", "norm": "norm",
         "rotation": "norms and rotation"}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_a_wrong_launch_is_found_out(kind, monkeypatch, caplog):
    model, inputs = model_with("qwen3", layers=2), batch()
    expected = greedy(model, inputs, tokens=12).tolist()
    wrong, rotate = off(kind, 0.1)
    monkeypatch.setattr(deferred, "kernel", lambda: wrong)
    if kind == "rotation":
        monkeypatch.setattr(parts, "_rotary", lambda: rotate)
    with recording_on_cpu(Fusing), caplog.at_level("WARNING"):
        assert greedy(model, inputs, tokens=12).tolist() == expected
        (step,) = capture._STEPS[model]
        assert not step.defers and f"the launch of {NAMES[kind]} is 0.1 off" in step.plain_because
    assert "recorded launch by launch: the launch of" in caplog.text


def test_a_chaotic_model_is_not_taken_for_a_wrong_launch(monkeypatch):
    # few pages and peaked attention: a little rounding chooses other pages, layer after layer
    model, inputs = make(num_hidden_layers=16, initializer_range=1.0), batch(length=200, padding=(0, 0))
    unique_hf.configure(model, page_size=4, budget=16)
    logits = []

    class Rounded(Kernel):
        @staticmethod
        def skinny_linear(x, weights, biases, outs, residual=None, gated=False):
            linear(x, weights, biases, outs, residual, gated)
            for out in outs:
                out.mul_(1 + torch.randn_like(out) * 2**-6)

    monkeypatch.setattr(deferred, "kernel", lambda: Rounded)

    class Keeps(Fusing):
        def warm(self, step):
            outputs = super().warm(step)
            logits.append(outputs[1]["logits"])
            return outputs

    with recording_on_cpu(Keeps):
        greedy(model, inputs, tokens=4)
        (step,) = capture._STEPS[model]
        assert step.defers and step.launches["gated linear"] >= 16
    plain, waited = logits
    assert (plain - waited).norm() > 0.25 * plain.norm(), "this one is chaotic"


def test_what_counts_as_a_distance():
    ones, gap = torch.ones(2, 8), torch.tensor([[1.0, torch.inf, torch.nan, 2.0]])
    assert deferred._distance(ones, ones) == 0 == deferred._distance(0 * ones, 0 * ones)
    assert deferred._distance(gap, gap) == 0, "what overflows in torch overflows here"
    assert deferred._distance(ones * 1.5, ones) == 0.5
    assert deferred._distance(ones, 0 * ones) == torch.inf
    for wrong in (torch.full((2, 8), torch.nan), torch.ones(2, 8).scatter(1, torch.tensor([[3]]), torch.nan)):
        mode = Deferred(Kernel, trial=True)
        mode._compare("a", ones, ones)
        assert mode.complaint() is None
        mode._compare("b", wrong, ones)
        assert "launch of b is nan off" in mode.complaint()


def test_why_nothing_waits_is_said():
    for rows, dtypes, reason in ((17, None, "17 rows, the kernel takes at most 16"), (2, set(), "no linear layer")):
        model = model_with("qwen3")
        with pytest.MonkeyPatch.context() as patch, recording_on_cpu(Fusing):
            if dtypes is not None:
                patch.setattr(deferred, "DTYPES", dtypes)
            greedy(model, batch(rows=rows, padding=(0,)), tokens=4)
            assert reason in capture._STEPS[model][0].plain_because


def test_a_function_that_reads_behind_torchs_back_is_found_out():
    model, inputs = model_with("qwen3", layers=2), batch()
    mlp = model.model.layers[0].mlp
    original = type(mlp).forward

    def reads(self, x):
        gate = self.gate_proj(x)
        with torch._C.DisableTorchFunction():
            # as a foreign extension would
            seen = gate.clone()
        return self.down_proj(F.silu(gate) * self.up_proj(x)) + 0 * self.down_proj(seen)

    type(mlp).forward = reads
    try:
        expected = greedy(model, inputs, tokens=24).tolist()
        with recording_on_cpu(Fusing) as log:
            assert greedy(model, inputs, tokens=24).tolist() == expected
            assert "capture" in log and "before they are computed" in capture._STEPS[model][0].plain_because
    finally:
        type(mlp).forward = original
