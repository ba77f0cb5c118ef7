"""When a call is captured, what the wrapper leaves alone, what is kept between calls, and what makes a graph stale."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, StaticCache

import unique_hf
from tests.capture.recorder import Replayed, recording_on_cpu
from tests.capture.test_generate import Stream, model_with
from tests.integration.tiny import batch, greedy, make
from unique_hf import capture


def reasons(model):
    return list(unique_hf.report(model, reset=True).capture.eager)


# --- the wrapper ---


def test_models_without_unique_attention_get_the_original_method(monkeypatch):
    seen = []

    def original(self, input_ids, *args, **kwargs):
        seen.append((self, input_ids, args, kwargs))
        return "result"

    capture.uninstall()
    try:
        assert not hasattr(GenerationMixin._sample, "_unique_original")
        stock = GenerationMixin._sample
        with monkeypatch.context() as patch:
            patch.setattr(GenerationMixin, "_sample", original)
            capture.install()
            capture.install()
            assert GenerationMixin._sample._unique_original is original, "installed once"
            model, ids, marker = make(attention="sdpa"), torch.ones(1, 2), object()
            assert GenerationMixin._sample(model, ids, 1, logits_processor=marker) == "result"
            assert seen == [(model, ids, (1,), {"logits_processor": marker})]
            assert model not in capture.tally_of.__globals__["TALLIES"]
        assert GenerationMixin._sample is stock
    finally:
        capture.install()
    assert inspect.signature(GenerationMixin._sample) == inspect.signature(stock)


def test_without_the_wrapper_generate_is_eager():
    model, inputs = model_with(), batch()
    expected = greedy(model, inputs).tolist()
    capture.uninstall()
    try:
        with recording_on_cpu() as log:
            assert greedy(model, inputs).tolist() == expected and not log
    finally:
        capture.install()


# --- reasons ---


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        ({"cache_implementation": "static", "disable_compile": True}, "static cache"),
        ({"past_key_values": DynamicCache}, "not ours: unknown before the prompt"),
        ({"num_beams": 2}, None),
        ({"prompt_lookup_num_tokens": 3}, None),
    ],
)
def test_calls_that_stay_eager(arguments, reason):
    model, inputs = model_with(), batch(rows=1, padding=(0,))
    arguments = {name: value() if value is DynamicCache else value for name, value in arguments.items()}
    with recording_on_cpu() as log:
        model.generate(**inputs, max_new_tokens=5, do_sample=False, **arguments)
    assert not log
    found = reasons(model)
    assert len(found) == (reason is not None) and (reason is None or reason in found[0])


def test_models_that_stay_eager():
    inputs = batch()
    cases = {
        "switched off": model_with(capture=False),
        "measure_recall": model_with(measure_recall=True),
        "DynamicSlidingWindowLayer": model_with("gemma2", layers=2),
        "did not read": model_with("deepseek_v3", layers=2),
        "forward hooks on model.layers.0.mlp": model_with(),
    }
    calls = []
    handle = (
        cases["forward hooks on model.layers.0.mlp"]
        .model.layers[0]
        .mlp.register_forward_hook(lambda *args: calls.append(0))
    )
    for reason, model in cases.items():
        own = greedy(model, inputs).tolist()
        unique_hf.report(model, reset=True)
        with recording_on_cpu() as log:
            assert greedy(model, inputs).tolist() == own
        found = reasons(model)
        assert "replay" not in log and len(found) == 1 and reason in found[0], found
    assert len(calls) == 2 * 9
    handle.remove()


def test_hooks_of_transformers_do_not_count():
    model, inputs = model_with(), batch()
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    with recording_on_cpu() as log:
        greedy(model, inputs)
    assert "replay" in log


def test_holes_in_the_padding_stay_eager():
    model, inputs = model_with(), batch(padding=(13, 0))
    inputs["attention_mask"][1, 20:23] = 0
    expected = greedy(model, inputs, tokens=12)
    with recording_on_cpu() as log:
        assert greedy(model, inputs, tokens=12).tolist() == expected.tolist() and not log
    assert "the attention mask has holes beside left padding" in reasons(model)


def test_autocast_and_grad_stay_eager():
    model, inputs = model_with(), batch()
    with recording_on_cpu() as log, torch.autocast("cpu", torch.bfloat16):
        greedy(model, inputs)
    assert not log and reasons(model) == ["grad or autocast is on"]


def test_encoder_decoder_caches_stay_eager():
    model = model_with()
    words = {"EncoderDecoderCache": "EncoderDecoderCache", "StaticCache": "static cache", "NoneType": "NoneType"}
    settings = unique_hf.UniqueConfig(page_size=4, budget=16)
    generation = copy.deepcopy(model.generation_config)
    generation.is_assistant = False
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with recording_on_cpu(), torch.no_grad():
        for kind in (cache, StaticCache(config=model.config, max_cache_len=8), None):
            call = {"generation_config": generation, "past_key_values": kind}
            assert words[type(kind).__name__] in capture.why_eager(model, settings, call)[0]


def test_the_cpu_is_no_place_for_graphs():
    model = model_with()
    greedy(model, batch())
    assert reasons(model) == ["runs on cpu; a step can be captured on cuda"]


# --- what is kept, and when it is stale ---


def test_a_second_call_uses_the_graph_and_the_addresses_of_the_first():
    model, inputs = model_with(layers=2), batch()
    with recording_on_cpu() as log:
        for tokens in (20, 25, 15):
            captured = greedy(model, inputs, tokens=tokens).tolist()
            unique_hf.configure(model, capture=False)
            assert captured == greedy(model, inputs, tokens=tokens).tolist()
            unique_hf.configure(model, capture=True)
    assert log.count("capture") == 1 and log.count("replay") == 18 + 24 + 14
    assert unique_hf.report(model).capture.calls == 3


def test_keys_and_values_are_returned_and_nothing_waits_for_the_garbage_collector():
    model, inputs = model_with(layers=2), batch(padding=(0, 0))
    gc.collect()
    gc.disable()
    try:
        with recording_on_cpu():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
            layer = out.past_key_values.layers[0]
            watched = [weakref.ref(x) for x in (out.past_key_values, layer.keys, layer._buffers[0])]
            watched += [weakref.ref(layer.index.stats.codes)]
            del out, layer
            assert [ref() for ref in watched] == [None] * 4
            assert capture._STEPS[model][0].replay is not None, "the graph is kept"
    finally:
        gc.enable()
    step = weakref.ref(capture._STEPS[model][0])
    capture.release(model)
    gc.collect()  # the stand-in's recording holds its step
    assert step() is None


def test_a_model_with_a_graph_can_be_copied_and_freed():
    model, inputs = model_with(), batch()
    with recording_on_cpu() as log:
        expected = greedy(model, inputs).tolist()
        other = copy.deepcopy(model)
        assert greedy(other, inputs).tolist() == expected
        assert log.count("capture") == 2
        alive = weakref.ref(model)
        kept = weakref.ref(capture._STEPS[model][0])
        del model, other
        gc.collect()
    assert alive() is None and kept() is None


def test_other_addresses_are_captured_anew():
    model, inputs = model_with(layers=2), batch(padding=(0, 0))
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    with recording_on_cpu() as log:
        first = model.generate(**inputs, **arguments)
        second = model.generate(**inputs, **arguments)
        # the first cache is alive: its blocks cannot come back
        assert first.past_key_values.get_seq_length() == second.past_key_values.get_seq_length()
    assert log.count("capture") == 2
    assert first.sequences.tolist() == second.sequences.tolist()


def changed_settings(model):
    unique_hf.configure(model, budget=24)


def replaced_layer(model):
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


def switched_flag(model):
    model.model.layers[0].mlp.disable_adapters = True


def moved_weight(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    # the old memory must not be given out again; kept outside the model, whose attributes the fingerprint reads too
    weakref.finalize(model, list, [weight.data])
    weight.data = weight.data * -1.0


def own_forward(model):
    original = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: original(*args, **kwargs)


def trained_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


@pytest.mark.parametrize(
    "change", [changed_settings, replaced_layer, switched_flag, moved_weight, own_forward, trained_in_place]
)
def test_changes_of_the_model_between_calls(change):
    model, inputs = model_with(layers=2), batch()
    with recording_on_cpu() as log:
        greedy(model, inputs, tokens=12)
        change(model)
        found = greedy(model, inputs, tokens=12).tolist()
    assert log.count("capture") == (1 if change is trained_in_place else 2)
    assert found == greedy(model, inputs, tokens=12).tolist()


@pytest.mark.parametrize("changes", [{"stats_dtype": "bf16"}, {"page_size": 8, "budget": 32}])
def test_other_settings_get_buffers_of_their_own_and_keep_them(changes):
    model, inputs = model_with(layers=2), batch(padding=(0, 0))
    with recording_on_cpu() as log:
        greedy(model, inputs, tokens=12)
        unique_hf.configure(model, **changes)
        found = [greedy(model, inputs, tokens=12).tolist() for _ in range(3)]
    assert log.count("capture") == 2
    assert found == [greedy(model, inputs, tokens=12).tolist()] * 3


def test_other_constants_of_the_forward_make_the_recording_stale():
    model, inputs = model_with(), batch()
    with recording_on_cpu():
        greedy(model, inputs, tokens=12)
        (step,) = capture._STEPS[model]
    ids, helper = torch.zeros(2, 1, dtype=torch.long), object()
    calls = ({"scale": 1.0}, {"scale": 2.0}, {"scale": 2.0, "helper": helper}, {"scale": 2.0, "helper": object()}, {})
    for constants in calls:
        for again in (False, True):
            step._load({"input_ids": ids, **constants})
            assert step.constants == constants and (step.replay is not None) == again
            step.replay = lambda: None


def test_a_cache_without_padding_follows_one_with_it():
    model = model_with()
    with recording_on_cpu():
        greedy(model, batch(padding=(13, 0)), tokens=6)
        (step,) = capture._STEPS[model]
        assert step.seq_starts.tolist() == [13, 0]
        with torch.no_grad():
            cache = model(**batch(padding=(0, 0)), use_cache=True).past_key_values
        length = cache.get_seq_length()
        step.bind(model, cache, length, length + 8, None, state=0)
        assert step.seq_starts.tolist() == [0, 0] and step.seq_lens.tolist() == [length] * 2
        step.release(length)


def test_another_batch_or_length_is_captured_anew_and_concurrent_calls_keep_two():
    model = model_with()
    with recording_on_cpu() as log:
        for rows, tokens in ((2, 8), (1, 8), (2, 8), (1, 8), (2, 900)):
            greedy(model, batch(rows=rows, padding=(0,)), tokens=min(tokens, 12), max_length=None)
        assert log.count("capture") == 2
        nested = Stream(lambda: greedy(model, batch(rows=1, padding=(0,)), tokens=4))
        greedy(model, batch(padding=(0,)), tokens=5, streamer=nested)
        greedy(model, batch(rows=3, padding=(0,)), tokens=4)
    assert [step.batch for step in capture._STEPS[model]][0] == 3 and len(capture._STEPS[model]) == capture.KEPT


# --- the stand-in itself must be able to fail ---


@pytest.mark.parametrize("fault", ["host number", "host read", "moved tensor"])
def test_the_recorder_notices(fault):
    state = {"step": 0, "x": torch.zeros(8), "keep": []}

    def step():
        state["step"] += 1
        if fault == "host number":
            return dict, {"y": state["x"][: state["step"]] + 1}
        if fault == "host read":
            return dict, {"y": state["x"] + float(state["x"].sum())}
        state["keep"].append(state["x"])
        state["x"] = state["x"].clone()
        return dict, {"y": state["x"] + 1}

    replay = Replayed(torch.device("cpu")).capture(step)
    with pytest.raises(AssertionError, match="recorded|record"):
        for _ in range(2):
            replay()
