"""Bad input: each case is a clear error that says what was expected, what came and what to change."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import unique_hf
from tests.integration.tiny import batch, make
from unique_attention.hf import unique_attention_forward


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"pagesize": 4}, ValueError, "Unknown setting `pagesize`; did you mean `page_size`"),
        ({"budget": 8}, ValueError, "`budget`.*2 recent.*expected >= 16, got 8"),
        ({"page_size": 3}, ValueError, "power of two from 2 to 128, got 3"),
        ({"page_size": 256}, ValueError, "power of two from 2 to 128, got 256"),
        ({"budget": "many"}, TypeError, "`budget` must be an int"),
        ({"score": "scaler"}, ValueError, "did you mean 'scalar'"),
        ({"stats_dtype": "fp4"}, ValueError, "`stats_dtype` must be one of"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings, error, message):
    model = make(num_hidden_layers=1)
    before = unique_hf.configure(model)
    with pytest.raises(error, match=message):
        unique_hf.configure(model, **settings)
    assert unique_hf.configure(model) == before


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"budgets": 1024}, ValueError, "Unknown setting `budgets`"),
        ({"budget": [1024]}, TypeError, "`budget` must be an int"),
        ("page_size=4", TypeError, "to be a dict of settings, got str"),
        ({"format_version": 99}, ValueError, "format version 99"),
    ],
)
def test_bad_settings_in_the_configuration_are_found_at_the_first_call(values, error, message):
    model = make(num_hidden_layers=1)
    model.config.unique_attention = values
    with pytest.raises(error, match=message), torch.no_grad():
        model(**batch(), use_cache=True)
    with pytest.raises(error, match=message):
        unique_hf.UniqueCache(config=model.config)


def step(model, cache, rows=2, tokens=41):
    mask = torch.ones(rows, tokens, dtype=torch.long)
    with torch.no_grad():
        return model(torch.full((rows, 1), 7), attention_mask=mask, past_key_values=cache)


def test_cache_with_another_page_size_is_refused():
    model = make()
    unique_hf.configure(model, page_size=4, budget=16)
    with torch.no_grad():
        cache = model(**batch(), use_cache=True).past_key_values
    unique_hf.configure(model, page_size=8, budget=32)
    with pytest.raises(ValueError, match="expected page_size=4.*got page_size=8.*start a new cache"):
        step(model, cache)
    cache.reset()
    with torch.no_grad():
        model(**batch(), past_key_values=cache)


def test_cache_of_another_model_is_refused():
    small, wide, deep = make(), make(num_key_value_heads=4), make(num_hidden_layers=3)
    with torch.no_grad():
        cache = small(**batch(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"expected new keys of shape \[2, 2, 1, 32\].*got \[2, 4, 1, 32\]"):
        step(wide, cache)
    with torch.no_grad():
        cache = small(**batch(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="another model or batch"):
        step(small, cache, rows=3)
    with pytest.raises(ValueError, match="expected a layer index below 2, got 2"), torch.no_grad():
        deep(**batch(), past_key_values=unique_hf.UniqueCache(config=small.config))


def test_things_that_are_not_models_or_configurations_are_refused():
    with pytest.raises(TypeError, match=r"write UniqueCache\(config=model.config\)"):
        unique_hf.UniqueCache(config=make(num_hidden_layers=1))
    for call in (unique_hf.configure, unique_hf.check):
        with pytest.raises(TypeError, match="expected a Transformers model, got Linear"):
            call(torch.nn.Linear(2, 2))


def test_fp8_keys_are_refused():
    model = make(num_hidden_layers=1)
    module = model.model.layers[0].self_attn
    cache = DynamicCache(config=model.config)
    keys = torch.randn(1, 2, 9, 32).to(torch.float8_e4m3fn)
    keys, values = cache.update(keys, keys.clone(), 0)
    with pytest.raises(ValueError, match="float16, bfloat16 or float32, got torch.float8_e4m3fn"), torch.no_grad():
        unique_attention_forward(module, torch.randn(1, 4, 1, 32), keys, values, None, scaling=0.2)


def test_attention_weights_are_refused():
    model = make(num_hidden_layers=1)
    with pytest.raises(ValueError, match="attn_implementation='eager'"), torch.no_grad():
        model(**batch(), output_attentions=True, use_cache=True)


def test_sequence_parallelism_is_refused(monkeypatch):
    def wrapper(*args, **kwargs):
        return unique_attention_forward(*args, **kwargs)

    # what DeepSpeed's Ulysses does: every attention function becomes its wrapper around the chosen one
    wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    model = make(num_hidden_layers=1)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "unique", wrapper)
    with pytest.raises(NotImplementedError, match="sequence parallelism.*sp_size=1"):
        model(**batch())
    with pytest.raises(NotImplementedError, match="sequence parallelism"), torch.no_grad():
        model(**batch(), use_cache=True)


def test_gradient_through_a_sparse_step_is_an_error_not_a_wrong_number():
    model = make(num_hidden_layers=1)
    unique_hf.configure(model, page_size=4, budget=16)
    with torch.no_grad():
        cache = model(**batch(), use_cache=True).past_key_values
    out = model(torch.full((2, 1), 7), attention_mask=torch.ones(2, 41, dtype=torch.long), past_key_values=cache)
    with pytest.raises(RuntimeError, match="sparse decode has no gradient"):
        out.logits.sum().backward()


def test_model_without_the_interface_is_named_by_check_and_stays_exact():
    config = AutoConfig.for_model("bloom", vocab_size=99, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3)
    models = []
    for attention in ("eager", "unique"):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval())
    own, ours = models
    with pytest.warns(UserWarning, match="does not use Transformers' attention interface"):
        found = unique_hf.check(ours)
    assert len(found.dense_layers) == 2 and not found.sparse_layers
    assert "computes its own attention" in str(found)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    runs = [m.generate(**batch(), **arguments, return_dict_in_generate=True) for m in (own, ours)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].logits, runs[1].logits, strict=True))
