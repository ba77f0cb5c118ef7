"""Plain generate through a captured step gives the tokens of the eager path, whatever else it does."""

import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import unique_hf
from tests.capture.recorder import Replayed, recording_on_cpu
from tests.integration.tiny import VOCAB, batch, greedy, make
from unique_attention.hf import unique_attention_forward
from unique_hf import arena, capture

SPARSE = {"page_size": 4, "budget": 16}


def model_with(architecture="llama", seed=0, layers=1, **settings):
    model = make(architecture, seed=seed, num_hidden_layers=layers)
    unique_hf.configure(model, **{**SPARSE, **settings})
    return model


def both(run, model, steps=None):
    """The result of `run()` eager and captured, after checking that the second one was captured."""
    eager = run()
    unique_hf.report(model, reset=True)
    with recording_on_cpu() as log:
        found = run()
        tally = unique_hf.report(model).capture
    assert tally.calls > 0 and not tally.eager
    assert log.count("replay") + log.count("warm") == tally.steps + tally.vain
    assert log.count("replay") > log.count("warm")
    return eager, found


class Steady(LogitsProcessor):
    """Looks at the tokens so far, as processors may."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -3:], -10.0)


class Stream(BaseStreamer):
    def __init__(self, act=lambda: None):
        self.tokens, self.ended, self.act = [], False, act

    def put(self, value):
        self.tokens.append(value.reshape(-1).tolist())
        self.act()

    def end(self):
        self.ended = True


class Letters:
    """A tokenizer that stop strings can work with: token i is one letter."""

    def get_vocab(self):
        return {chr(40 + i): i for i in range(VOCAB)}

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) - 40 for letter in text]}

    def _convert_id_to_token(self, index):
        return chr(40 + index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.mark.parametrize("padding", [(0, 0), (13, 0), (2, 39)])
def test_greedy_tokens_of_66_steps(padding):
    model, inputs = model_with(layers=2), batch(padding=padding)
    eager, found = both(lambda: greedy(model, inputs, tokens=67), model)
    assert found.tolist() == eager.tolist()


def test_a_recorded_step_builds_no_mask(monkeypatch):
    masks, original = [], unique_attention_forward.__globals__["decide"]

    def decide(module, query, key, value, layer, attention_mask, kwargs):
        if query.shape[2] == 1:
            masks.append((torch.cuda.is_current_stream_capturing(), attention_mask is None))
        return original(module, query, key, value, layer, attention_mask, kwargs)

    monkeypatch.setitem(unique_attention_forward.__globals__, "decide", decide)
    with recording_on_cpu():
        greedy(model_with(), batch(), tokens=6)
    assert masks == [(False, True)] + [(True, True)] * 4


def test_counts_are_those_of_the_eager_path():
    model, inputs = model_with(layers=2), batch()
    greedy(model, inputs, tokens=20)
    eager = unique_hf.report(model, reset=True)
    with recording_on_cpu():
        greedy(model, inputs, tokens=20)
        found = unique_hf.report(model)
    assert found.layers == eager.layers and found.total == eager.total
    assert found.capture.steps == 19 and "19 steps" in str(found)


@pytest.mark.parametrize("architecture", ["qwen3", "phi3", "granite", "qwen3_moe", "glm4"])
def test_other_architectures(architecture):
    model, inputs = model_with(architecture), batch()
    eager, found = both(lambda: greedy(model, inputs, tokens=12), model)
    assert found.tolist() == eager.tolist()


FEATURES = {
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logits_processor": [Steady()]},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 16},
    "two tokens": {"max_new_tokens": 4},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_generate(name):
    model, inputs = model_with(), batch()
    arguments = {"max_new_tokens": 24, "do_sample": False, **FEATURES[name]}
    if "logits_processor" in arguments:
        arguments["logits_processor"] = LogitsProcessorList(arguments["logits_processor"])

    def run():
        torch.manual_seed(3)
        out = model.generate(**inputs, **arguments, return_dict_in_generate=True, output_logits=True)
        return out.sequences, torch.stack(out.logits)

    (eager, eager_logits), (found, logits) = both(run, model)
    assert found.tolist() == eager.tolist()
    assert torch.equal(logits, eager_logits), "kept logits must not be overwritten by later steps"


def test_prompts_of_one_token_and_of_embeddings():
    model = model_with(layers=2)
    ids = torch.tensor([[5]])
    eager, found = both(lambda: model.generate(ids, max_new_tokens=30, do_sample=False), model)
    assert found.tolist() == eager.tolist()
    embeds = model.get_input_embeddings()(batch(padding=(0, 0))["input_ids"]).detach()
    eager, found = both(lambda: model.generate(inputs_embeds=embeds, max_new_tokens=30, do_sample=False), model)
    assert found.tolist() == eager.tolist()


def test_stopping_and_streaming():
    model, inputs = model_with(), batch(rows=1, padding=(0,))
    plain = greedy(model, inputs, tokens=40)[0].tolist()
    last = next(i for i in range(6, 40) if plain[i] not in plain[:i])
    ends = {
        "eos": {"eos_token_id": plain[last]},
        "string": {"stop_strings": [chr(40 + plain[last - 1]) + chr(40 + plain[last])], "tokenizer": Letters()},
    }
    for arguments in ends.values():
        streams = []

        def run(arguments=arguments, streams=streams):
            streams.append(Stream())
            return greedy(model, inputs, tokens=40, streamer=streams[-1], **arguments)

        eager, found = both(run, model)
        assert found.tolist() == eager.tolist() == [plain[: last + 1]]
        assert streams[1].tokens == streams[0].tokens and streams[1].ended


def test_rows_that_end_early():
    model, inputs = model_with(), batch(padding=(0, 0))
    plain = greedy(model, inputs, tokens=40).tolist()
    stop = next(token for token in plain[0][4:30] if token not in plain[1])
    eager, found = both(lambda: greedy(model, inputs, tokens=40, eos_token_id=stop, pad_token_id=0), model)
    assert found.tolist() == eager.tolist() and found[0, -1] == 0


def test_growth_captures_again(monkeypatch):
    monkeypatch.setattr(capture, "AHEAD", 8)
    monkeypatch.setattr(capture, "MIN_SPARE", 8)
    monkeypatch.setattr(capture, "weight_bytes", lambda model: 0)
    model, inputs = model_with(layers=2), batch()
    eager, found = both(lambda: greedy(model, inputs, tokens=100), model)
    assert found.tolist() == eager.tolist()
    assert unique_hf.report(model).capture.captures == 3, "140 tokens in steps of 64 slots"


def test_the_room_of_a_capture_is_small():
    for weights, slot, length in [(16 << 30, 147456, 32768), (16 << 30, 6 * 147456, 131072), (1 << 30, 114688, 2048)]:
        for ahead in (1, 128, 100_000):
            limit = length + ahead
            slots = capture.choose_capacity(length, limit, slot, weights, 4)
            extra = slots - min(limit, length + capture.AHEAD)
            assert slots >= min(limit, length + capture.MIN_SPARE) and slots % 64 == 0
            assert extra * slot <= 0.07 * (weights + length * slot) or extra <= 256
    assert capture.choose_capacity(1000, 1 << 40, 1 << 20, 0, 128) >= 1000 + capture.AHEAD


def turns(model, inputs):
    """Three turns on one cache, the last one after a crop."""
    cache = DynamicCache(config=model.config)
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    found, mask = [first], inputs["attention_mask"]
    for crop in (0, 7):
        if crop:
            cache.crop(-crop)
            found[-1] = found[-1][:, :-crop]
        more = torch.cat([found[-1], batch(padding=(0, 0))["input_ids"][:, :9]], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1] - mask.shape[1]), value=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1] - 40), value=1)
        found.append(
            model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=15, do_sample=False)
        )
    assert cache.get_seq_length() == found[-1].shape[1] - 1
    return found[-1]


@pytest.mark.parametrize("padding", [(0, 0), (13, 0)])
def test_turns_on_one_cache_use_one_graph(padding):
    model = model_with(layers=2)
    eager, found = both(lambda: turns(model, batch(padding=padding)), model)
    assert found.tolist() == eager.tolist()
    assert unique_hf.report(model).capture.captures == 1


def test_a_returned_cache_goes_on_eagerly_by_hand():
    model, inputs = model_with(layers=2), batch()

    def run():
        arguments = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(**inputs, **arguments)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 10), value=1)
        position_ids = mask.sum(-1, keepdim=True) - 1
        arguments = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": out.past_key_values}
        with torch.no_grad():
            return model(out.sequences[:, -1:], **arguments).logits

    eager, found = both(run, model)
    assert torch.equal(eager, found)


def test_interleaved_calls_do_not_disturb_each_other():
    inner = batch(rows=2, length=33, padding=(0, 4), seed=9)
    models = [model_with(), model_with(seed=1)]
    for other in models:
        expected = greedy(models[0], batch(), tokens=14).tolist(), greedy(other, inner, tokens=6).tolist()
        within = []
        with recording_on_cpu():
            stream = Stream(lambda other=other, within=within: within.append(greedy(other, inner, tokens=6).tolist()))
            outer = greedy(models[0], batch(), tokens=14, streamer=stream)
        assert outer.tolist() == expected[0]
        assert len(within) == 15 and all(tokens == expected[1] for tokens in within)


def test_threads_share_a_model():
    model, work = model_with(), [batch(padding=(i, 0), seed=i) for i in range(4)]
    expected = [greedy(model, inputs, tokens=25).tolist() for inputs in work]
    found, errors = {}, []

    def run(index):
        try:
            with torch.no_grad():
                found[index] = greedy(model, work[index], tokens=25).tolist()
        except BaseException as error:
            errors.append(error)
            raise

    with recording_on_cpu():
        threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert [found[i] for i in range(4)] == expected


def test_a_step_that_cannot_be_recorded_runs_eagerly(caplog):
    class Refuses(Replayed):
        def capture(self, step):
            step()
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    model, inputs = model_with(layers=2), batch()
    expected = greedy(model, inputs, tokens=12)
    unique_hf.report(model, reset=True)
    capture._log_once.cache_clear()
    with recording_on_cpu(Refuses), caplog.at_level("WARNING"):
        for _ in range(2):
            assert greedy(model, inputs, tokens=12).tolist() == expected.tolist()
            (step,) = capture._STEPS[model]
            assert step.replay is None and step.warmed_for is None, "the next call starts over, with an eager step"
    tally = unique_hf.report(model).capture
    assert list(tally.eager.values()) == [2]
    assert "not permitted when stream is capturing" in next(iter(tally.eager))
    assert unique_hf.report(model).total.sparse_rows == 2 * 2 * 2 * 11, "the eager step is not counted twice"


def test_an_error_of_the_caller_leaves_a_usable_cache():
    class Boom(Exception):
        pass

    def act():
        calls.append(0)
        if len(calls) == 8:
            raise Boom

    model, inputs, calls = model_with(), batch(padding=(0, 0)), []
    cache = DynamicCache(config=model.config)
    with recording_on_cpu(), pytest.raises(Boom):
        greedy(model, inputs, tokens=20, past_key_values=cache, streamer=Stream(act))
    assert cache.get_seq_length() == 40 + 6 and cache.layers[0].fixed_lens is None
    so_far = greedy(model, inputs, tokens=7)
    more = torch.cat([inputs["input_ids"], so_far], dim=1)
    rest = model.generate(more, past_key_values=cache, max_new_tokens=13, do_sample=False)
    assert rest[:, 40:].tolist() == greedy(model, inputs, tokens=20).tolist()


def test_inference_mode_and_normal_mode_share_a_step():
    model, inputs = model_with(), batch()
    expected = greedy(model, inputs, tokens=10).tolist()
    with recording_on_cpu():
        for _ in range(2):
            with torch.inference_mode():
                assert greedy(model, inputs, tokens=10).tolist() == expected
            assert greedy(model, inputs, tokens=10).tolist() == expected
    assert not unique_hf.report(model).capture.eager.keys() - {"runs on cpu; a step can be captured on cuda"}


def test_a_cache_too_large_for_blocks_is_captured_where_it_lies(monkeypatch):
    monkeypatch.setattr(capture, "free_bytes", lambda device: 0)
    model, inputs = model_with(layers=2), batch()
    eager, found = both(lambda: greedy(model, inputs, tokens=30), model)
    assert found.tolist() == eager.tolist()
    cache = DynamicCache(config=model.config)
    with recording_on_cpu():
        greedy(model, inputs, past_key_values=cache)
    assert not arena.in_blocks(cache.layers)
