"""What a cache in fixed mode says of its length, to whoever asks and whenever; and models that drop their cache."""

import pytest
import torch
from transformers import DynamicCache

import unique_hf
from tests.capture.recorder import Late, Replayed, recording_on_cpu
from tests.capture.test_generate import model_with
from tests.integration.tiny import batch, greedy
from unique_hf import capture


@pytest.mark.parametrize("recorder", [Replayed, Late])
def test_between_steps_a_cache_has_the_length_that_an_eager_one_has(recorder, monkeypatch):
    # as models do that ask for it while they prepare their inputs, a step being under way or not
    model, inputs, seen = model_with("phi3"), batch(), []
    original = type(model).prepare_inputs_for_generation

    def asks(self, *args, past_key_values=None, **kwargs):
        length = past_key_values.get_seq_length()
        assert isinstance(length, int), "a tensor would make the host wait for the device"
        seen.append(length)
        return original(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", asks)
    expected = greedy(model, inputs, tokens=12).tolist()
    eager = seen.copy()
    seen.clear()
    with recording_on_cpu(recorder):
        assert greedy(model, inputs, tokens=12).tolist() == expected
        tally = unique_hf.report(model).capture
    assert seen == eager == [0, *range(40, 51)] and tally.early > 0


def test_within_a_step_the_length_is_on_the_device(monkeypatch):
    model, inputs, seen = model_with(), batch(padding=(0, 0)), []
    original = type(model.model).forward

    def forward(self, *args, past_key_values=None, **kwargs):
        length = past_key_values.get_seq_length()
        seen.append(int(length) if torch.is_tensor(length) else -1)
        return original(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", forward)

    class Looks(Replayed):
        def capture(self, step):
            # not recorded: the test reads the device
            return step

    with recording_on_cpu(Looks):
        greedy(model, inputs, tokens=6)
    assert seen == [-1, *range(40, 45)]


def test_a_step_that_fails_leaves_the_length_to_the_host():
    model, cache = model_with(), None
    with recording_on_cpu():
        with torch.no_grad():
            cache = model(**batch(padding=(0, 0)), use_cache=True).past_key_values
        step = capture.DecodeStep(torch.device("cpu"), 2)
        step.bind(model, cache, 40, 64, None, state=0)
        assert cache.get_seq_length() == 40
        with pytest.raises(RuntimeError, match="indices"):
            step.run({"input_ids": torch.ones(2, 1)})
        assert cache.get_seq_length() == 40
        step.release(40)
    assert cache.get_seq_length() == 40 and cache.layers[0]._between is None


def test_a_model_that_drops_its_cache_goes_on_eagerly(monkeypatch):
    # phi3 does where it switches to rotations for long contexts, and reads the whole prompt again
    model, inputs = model_with("phi3"), batch(padding=(0, 0))
    model.config.original_max_position_embeddings = 46
    expected = greedy(model, inputs, tokens=14).tolist()
    unique_hf.report(model, reset=True)
    with recording_on_cpu() as log:
        assert greedy(model, inputs, tokens=14).tolist() == expected
    (reason,) = unique_hf.report(model).capture.eager
    assert "starts another cache" in reason and "replay" in log


def test_a_model_that_brings_another_cache_is_noticed(monkeypatch):
    model, inputs = model_with(), batch(padding=(0, 0))
    original = type(model).prepare_inputs_for_generation
    calls = []

    def swaps(self, *args, past_key_values=None, **kwargs):
        found = original(self, *args, past_key_values=past_key_values, **kwargs)
        calls.append(0)
        if len(calls) == 6:
            found["past_key_values"] = other = DynamicCache()
            length = past_key_values.get_seq_length()
            for index, layer in enumerate(past_key_values.layers):
                keys, values = (x[:, :, :length].clone() for x in layer.buffers())
                other.update(keys, values, index)
        return found

    expected = greedy(model, inputs, tokens=12).tolist()
    unique_hf.report(model, reset=True)
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", swaps)
    with recording_on_cpu():
        found = greedy(model, inputs, tokens=12).tolist()
    assert "starts another cache" in next(iter(unique_hf.report(model).capture.eager))
    assert [row[:5] for row in found] == [row[:5] for row in expected]
