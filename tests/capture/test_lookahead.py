"""A step that starts before it is asked for changes no token and leaves no trace, whenever the device gets to it."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import unique_hf
from tests.capture.recorder import Late, Replayed, recording_on_cpu
from tests.capture.test_generate import Steady, Stream, model_with
from tests.integration.tiny import batch, greedy
from unique_hf import capture
from unique_hf.lookahead import Lookahead

RECORDERS = pytest.mark.parametrize("recorder", [Replayed, Late])


class Every(LogitsProcessor):
    """Forbids the best token at each n-th call."""

    def __init__(self, n):
        self.n, self.calls = n, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % self.n:
            return scores
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


def compare(model, run, recorder):
    """Results of `run()` eager and captured must be equal; the tally of the captured one."""
    expected = run()
    unique_hf.report(model, reset=True)
    with recording_on_cpu(recorder) as log:
        found = run()
    tally = unique_hf.report(model, reset=True).capture
    assert tally.calls > 0 and not tally.eager
    assert log.count("warm") + log.count("replay") == tally.steps + tally.vain
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    return tally


def everything(model, inputs, **arguments):
    """Tokens, scores and logits of a call, what it streamed, and what it left in its cache."""
    cache = DynamicCache(config=model.config)
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **arguments}
    torch.manual_seed(3)
    out = model.generate(
        **inputs, **arguments, past_key_values=cache, return_dict_in_generate=True, output_logits=True,
        output_scores=True,
    )  # fmt: skip
    found = [out.sequences, torch.stack(out.logits), torch.stack(out.scores), cache.get_seq_length()]
    for layer in cache.layers:
        stats = [level.refresh(layer.keys, None, level.seq_starts) for level in layer.index.levels]
        found += [layer.keys, layer.values, *(x for level in stats for x in level if x is not None)]
    return found


@RECORDERS
@pytest.mark.parametrize("settings", [{}, {"super_page_size": 16, "super_budget": 64}])
def test_greedy_steps_begin_ahead(recorder, settings):
    model, inputs = model_with(layers=2, **settings), batch()
    tally = compare(model, lambda: everything(model, inputs), recorder)
    assert (tally.steps, tally.early, tally.vain) == (19, 17, 0), "all but the first two, and none after the last"


@RECORDERS
@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_ends_by_surprise_leaves_no_trace(recorder, stream):
    model, inputs = model_with(layers=2), batch(rows=1, padding=(3,))
    plain = greedy(model, inputs, tokens=20)[0].tolist()
    last = next(i for i in range(6, 19) if plain[i] not in plain[:i])

    def run():
        streamer = Stream() if stream else None
        found = everything(model, inputs, eos_token_id=plain[last], streamer=streamer)
        return found + (streamer.tokens if stream else [])

    tally = compare(model, run, recorder)
    assert tally.steps == last and tally.early == last - 2 and tally.vain == 1


@RECORDERS
def test_rows_that_end_are_guessed_to_get_padding(recorder):
    model, inputs = model_with(), batch(rows=3, padding=(0, 5, 9))
    plain = greedy(model, inputs, tokens=30).tolist()
    stop = next(t for t in plain[0][4:20] if t not in plain[1])
    ends = sum(stop in row for row in plain)
    tally = compare(model, lambda: everything(model, inputs, max_new_tokens=30, eos_token_id=stop), recorder)
    assert tally.steps == 29 and 1 <= tally.vain <= ends and tally.early == 27 - tally.vain


@RECORDERS
def test_sampling_starts_nothing_ahead(recorder):
    model, inputs = model_with(), batch()
    tally = compare(model, lambda: everything(model, inputs, do_sample=True, top_k=20), recorder)
    assert tally.early == tally.vain == 0


@RECORDERS
def test_processors_that_choose_other_tokens_end_it(recorder):
    model, inputs = model_with(), batch()

    def steered(n):
        return everything(model, inputs, logits_processor=LogitsProcessorList([Every(n)]))

    rare, often = (compare(model, lambda n=n: steered(n), recorder) for n in (10, 2))
    assert rare.early > rare.vain > 0
    assert 1 <= often.vain <= 4 and often.early <= 4, "two rows may err three times"
    more = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "logits_processor": LogitsProcessorList([Steady()])}
    assert compare(model, lambda: everything(model, inputs, **more), recorder).vain > 0


@RECORDERS
def test_it_stops_short_of_the_capacity(recorder, monkeypatch):
    for name in ("AHEAD", "MIN_SPARE"):
        monkeypatch.setattr(capture, name, 8)
    monkeypatch.setattr(capture, "weight_bytes", lambda model: 0)
    model, inputs = model_with(), batch()
    tally = compare(model, lambda: everything(model, inputs, max_new_tokens=70), recorder)
    assert tally.captures == 2 and tally.vain == 0 and tally.early == 69 - 2 * 2


def test_an_error_while_a_step_is_under_way():
    class Fails(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            if self.calls == 9:
                raise RuntimeError("not the model's")
            return scores

    model, inputs = model_with(), batch(padding=(0, 0))
    cache = DynamicCache(config=model.config)
    with recording_on_cpu(Late):
        with pytest.raises(RuntimeError, match="not the model's"):
            greedy(model, inputs, tokens=30, past_key_values=cache, logits_processor=LogitsProcessorList([Fails()]))
        (step,) = capture._STEPS[model]
        assert step._started is None and not step.recorder.queue, "nothing runs on in memory that is given away"
        assert cache.get_seq_length() == 40 + 8
        more = torch.cat([inputs["input_ids"], greedy(model, inputs, tokens=9)], dim=1)
        rest = model.generate(more, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert rest[:, 40:].tolist() == greedy(model, inputs, tokens=14).tolist()


@RECORDERS
def test_a_model_with_other_inputs_is_not_guessed(recorder, monkeypatch):
    model, inputs = model_with(), batch()
    monkeypatch.setattr(Lookahead, "suits", staticmethod(lambda inputs, outputs: False))
    tally = compare(model, lambda: everything(model, inputs), recorder)
    assert tally.early == tally.vain == 0 and tally.captures == 1


def test_what_suits():
    ids, logits = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, 9)
    assert Lookahead.suits({"input_ids": ids, "position_ids": ids}, {"logits": logits, "loss": None})
    assert not Lookahead.suits({"input_ids": ids, "bias": logits}, {"logits": logits})
    assert not Lookahead.suits({"input_ids": ids}, {"logits": logits, "states": (logits,)})
    assert not Lookahead.suits({"position_ids": ids}, {"logits": logits})
    assert not Lookahead.suits({"input_ids": ids}, {"logits": logits[0]})


@RECORDERS
def test_other_positions_than_counted_ones_are_noticed(recorder, monkeypatch):
    # a model that gives its tokens positions of its own
    model, inputs = model_with(), batch(padding=(0, 0))
    original = type(model).prepare_inputs_for_generation

    def twice(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        found["position_ids"] = found["position_ids"] * 2
        return found

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", twice)
    tally = compare(model, lambda: everything(model, inputs), recorder)
    assert tally.early == 0 and 1 <= tally.vain <= 4
