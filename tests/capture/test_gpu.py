"""The captured step on a CUDA device: the same tokens, no waiting, no compilation, and memory that comes back."""

import gc
import importlib
import threading
import time

import pytest
import torch
from transformers import DynamicCache

import unique_hf
from tests.capture.test_generate import Stream
from tests.integration.tiny import batch, greedy, make
from unique_hf import capture, deferred
from unique_hf.fused import fused

pytestmark = pytest.mark.gpu
SPARSE = {"page_size": 4, "budget": 64, "stats_dtype": "fp32"}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_cuda(attention="unique", architecture="llama", dtype=torch.float32, seed=0, **settings):
    model = make(architecture, attention, seed=seed, max_position_embeddings=1 << 16).to("cuda", dtype)
    if attention == "unique":
        unique_hf.configure(model, **{**SPARSE, **settings})
    return model


def prompt(rows=2, length=300, padding=(13, 0), seed=1):
    return {name: x.cuda() for name, x in batch(rows=rows, length=length, padding=padding, seed=seed).items()}


def eager(model, run):
    """`run()` without a captured step."""
    unique_hf.configure(model, capture=False)
    try:
        return run()
    finally:
        unique_hf.configure(model, capture=True)
        unique_hf.report(model, reset=True)


def captured(model, run):
    found = run()
    tally = unique_hf.report(model, reset=True).capture
    assert tally.calls and not tally.eager, tally
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "granite", "qwen3_moe"])
@pytest.mark.parametrize("padding", [(0, 0), (13, 0)])
def test_256_steps_equal_the_eager_path_in_fp32(architecture, padding):
    model, inputs = on_cuda(architecture=architecture), prompt(padding=padding)
    expected = eager(model, lambda: greedy(model, inputs, tokens=257))
    for _ in range(2):
        assert captured(model, lambda: greedy(model, inputs, tokens=257)).tolist() == expected.tolist()


@pytest.mark.parametrize("padding", [(0, 0), (13, 0)])
def test_all_pages_kept_equals_sdpa(padding):
    own, model, inputs = on_cuda("sdpa"), on_cuda(budget=1024), prompt(padding=padding)
    expected = greedy(own, inputs, tokens=257)
    assert captured(model, lambda: greedy(model, inputs, tokens=257)).tolist() == expected.tolist()


def test_sampling_growth_and_turns(monkeypatch):
    model, inputs = on_cuda(), prompt(length=40)

    def sample():
        torch.manual_seed(5)
        return model.generate(**inputs, max_new_tokens=100, do_sample=True, top_k=20)

    expected = eager(model, sample)
    assert captured(model, sample).tolist() == expected.tolist()
    expected = eager(model, lambda: turns_on_cuda(model, inputs))
    assert captured(model, lambda: turns_on_cuda(model, inputs)).tolist() == expected.tolist()
    for name in ("AHEAD", "MIN_SPARE"):
        monkeypatch.setattr(capture, name, 8)
    monkeypatch.setattr(capture, "weight_bytes", lambda model: 0)
    capture.release(model)
    expected = eager(model, lambda: greedy(model, inputs, tokens=200))
    assert greedy(model, inputs, tokens=200).tolist() == expected.tolist()
    assert unique_hf.report(model).capture.captures > 2


def turns_on_cuda(model, inputs):
    cache, found = DynamicCache(config=model.config), inputs["input_ids"]
    for turn in range(3):
        more = prompt(length=9, padding=(0, 0), seed=turn)["input_ids"] if turn else found[:, :0]
        found = torch.cat([found, more], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, found.shape[1] - 40), value=1)
        arguments = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 12}
        found = model.generate(found, do_sample=False, **arguments)
    return found


def test_memory_comes_back_and_a_second_call_needs_no_capture():
    model, inputs = on_cuda(dtype=torch.bfloat16), prompt(rows=2, length=8000, padding=(0, 0))
    greedy(model, inputs, tokens=5)
    capture.release(model)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    captures = []
    for _ in range(3):
        unique_hf.report(model, reset=True)
        greedy(model, inputs, tokens=40)
        captures.append(unique_hf.report(model).capture.captures)
        gc.collect()
        torch.cuda.synchronize()
        # logits and activations of one token; the keys and values alone are 16 MiB
        assert torch.cuda.memory_allocated() - before < 4 << 20
    assert captures == [1, 0, 0], "later calls find their memory where it was"
    capture.release(model)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_a_first_capture_takes_seconds_and_a_later_call_milliseconds():
    model, inputs = on_cuda(dtype=torch.bfloat16), prompt(length=2000, padding=(0, 0))

    def first_steps():
        times = []
        greedy(model, inputs, tokens=6, streamer=Stream(lambda: times.append(time.perf_counter())))
        return [b - a for a, b in zip(times[1:], times[2:])]

    assert sum(first_steps()[:2]) < 20
    assert first_steps()[0] < 0.05


def test_growing_contexts_neither_compile_nor_wait():
    from triton.runtime.jit import JITFunction

    # by path: the package shows the operations of these names, not the files
    names = ("page_stats", "page_score", "page_select", "second_level", "sparse_decode")
    modules = [importlib.import_module(f"unique_attention.{name}") for name in names]
    model, inputs = on_cuda(), prompt(length=500, padding=(0, 0))
    kernels = [f for module in modules for f in vars(module).values()]
    kernels = [f for f in kernels if isinstance(f, JITFunction)]

    def compiled():
        return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())

    cache, begin = DynamicCache(config=model.config), inputs["input_ids"]
    with torch.no_grad():
        model.generate(begin, past_key_values=cache, max_new_tokens=4, do_sample=False)
        step = capture._STEPS[model][0]
        step.seq_lens.fill_(cache.get_seq_length())
        count, length = compiled(), cache.get_seq_length()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(64):
                step.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(step.seq_lens[0]) == length + 64 and compiled() == count > 0
        # whole calls at other lengths: the eager first steps compile nothing new either, once there was a call whose
        # prompt went into the buffers of the one before
        capture.release(model)
        for extra in (0, 0, 1, 7, 64, 300):
            longer = torch.cat([begin, begin[:, :extra]], dim=1)
            model.generate(longer, max_new_tokens=4, do_sample=False)
            count = count if extra else compiled()
        assert compiled() == count


def test_threads_and_interleaved_calls_of_two_models():
    models = [on_cuda(), on_cuda(seed=1)]
    work = [(models[i % 2], prompt(length=200 + 40 * i, padding=(i, 0), seed=i)) for i in range(4)]
    expected = [eager(model, lambda m=model, x=inputs: greedy(m, x, tokens=60)).tolist() for model, inputs in work]
    found, errors = {}, []

    def run(index, stream):
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    found[index] = greedy(*work[index], tokens=60).tolist()
        except BaseException as error:
            errors.append(error)
            raise

    for streams in ([torch.cuda.current_stream()] * 4, [torch.cuda.Stream() for _ in range(4)]):
        torch.cuda.synchronize()
        threads = [threading.Thread(target=run, args=(i, streams[i])) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and [found[i] for i in range(4)] == expected
    inner = []
    stream = Stream(lambda: inner.append(greedy(*work[1], tokens=60).tolist()))
    assert greedy(*work[0], tokens=60, streamer=stream).tolist() == expected[0]
    assert all(tokens == expected[1] for tokens in inner)
    for model in models:
        assert not unique_hf.report(model).capture.eager


def test_a_forward_that_waits_for_the_device_falls_back():
    model, inputs = on_cuda(), prompt()
    original = model.model.forward

    def waits(*args, **kwargs):
        out = original(*args, **kwargs)
        assert out.last_hidden_state.sum().item() == out.last_hidden_state.sum().item()
        return out

    model.model.forward = waits
    expected = eager(model, lambda: greedy(model, inputs, tokens=20))
    assert greedy(model, inputs, tokens=20).tolist() == expected.tolist()
    assert len(unique_hf.report(model, reset=True).capture.eager) == 1
    model.model.forward = original
    assert captured(model, lambda: greedy(model, inputs, tokens=20)).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_rotations_are_fused_while_recording(dtype):
    model, inputs = on_cuda(architecture="qwen3", dtype=dtype), prompt(padding=(0, 0))
    with torch.no_grad():
        expected = model(**inputs).logits.float()
        with fused(model) as counts:
            found = model(**inputs).logits.float()
    assert counts == (9, 2), "four norms and a rotation per layer, and the last norm"
    assert (found - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1) * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_linear_layers_that_run_together_are_as_exact_as_torchs(architecture, rows):
    model = on_cuda(architecture=architecture, dtype=torch.bfloat16)
    ids = torch.randint(3, 90, (rows, 1), device="cuda")
    truth = make(architecture, "unique").to("cuda", torch.float64)
    truth.load_state_dict(model.state_dict())
    mode = deferred.Deferred(deferred.kernel(), trial=True)
    with torch.no_grad():
        exact, plain = truth(ids).logits, model(ids).logits
        with fused(model, mode), mode:
            found = model(ids).logits
    assert mode.counts["gated linear"] == mode.counts["3 linear"] == model.config.num_hidden_layers
    bound = 2 * (plain.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= bound


def test_a_recorded_step_in_16_bits_runs_linear_layers_together():
    model, inputs = on_cuda(architecture="qwen3", dtype=torch.bfloat16), prompt(rows=1, padding=(0,))
    greedy(model, inputs, tokens=12)
    step = capture._STEPS[model][0]
    assert step.defers and step.launches["linear and residual"] == 2 * model.config.num_hidden_layers
    assert unique_hf.report(model).capture.together == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_begin_ahead_and_give_the_same_tokens_and_logits(dtype, monkeypatch):
    model, inputs = on_cuda(architecture="qwen3", dtype=dtype), prompt(rows=3, padding=(13, 0, 5))

    def run(**arguments):
        cache = DynamicCache(config=model.config)
        out = model.generate(
            **inputs, **{"max_new_tokens": 120, "do_sample": False, "pad_token_id": 0, **arguments},
            past_key_values=cache, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tally = unique_hf.report(model, reset=True).capture
        assert not tally.eager
        lengths = [layer.get_seq_length() for layer in cache.layers]
        return out.sequences.tolist(), torch.stack(out.logits), [x.keys for x in cache.layers], lengths, tally

    plain = run()[0][0][300:]
    stop = next(token for token in plain[8:100] if token not in plain[:8])
    cases = [{}, {"eos_token_id": stop}, {"repetition_penalty": 1.5}, {"streamer": Stream(lambda: time.sleep(1e-3))}]
    for arguments in cases:
        found = run(**arguments)
        with monkeypatch.context() as patch:
            patch.setattr(capture.Call, "_captured", without_lookahead(capture.Call._captured))
            expected = run(**arguments)
        assert expected[4].early == expected[4].vain == 0
        assert found[0] == expected[0] and found[3] == expected[3] and torch.equal(found[1], expected[1])
        assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2]))
        if arguments.keys() <= {"streamer"}:
            assert found[4].early >= 117 and found[4].vain == 0
        elif "eos_token_id" in arguments:
            assert found[4].early > found[4].vain, "wrong at most where one of the three rows ends"
        else:
            # the processor chooses other tokens than the logits do, so every guess may be wrong
            assert found[4].vain > 0


def without_lookahead(original):
    def captured(call, inputs):
        call.greedy = False
        return original(call, inputs)

    return captured


def test_the_device_does_not_wait_for_the_host_between_steps():
    model, inputs = on_cuda(), prompt(rows=1, length=500, padding=(0,))
    original, times = model.model.forward, []

    def slow(*args, **kwargs):
        torch.cuda._sleep(20_000_000)
        return original(*args, **kwargs)

    def put():
        times.append(time.perf_counter())
        time.sleep(8e-3)

    model.model.forward = slow
    greedy(model, inputs, tokens=8)
    step = capture._STEPS[model][0]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        step.replay()
    torch.cuda.synchronize()
    replay = (time.perf_counter() - begin) / 10
    assert replay > 8e-3
    captured(model, lambda: greedy(model, inputs, tokens=40, streamer=Stream(put)))
    found = sorted(b - a for a, b in zip(times[8:], times[9:]))[15]
    assert found < replay + 4e-3, "as long as the longer of the two, not as both"
