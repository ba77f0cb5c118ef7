"""What importing and running must not do: change other models, wait for the device, recompile, keep memory."""

import contextlib
import gc
import json
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DynamicLayer, StaticLayer

import unique_hf
from tests.integration.tiny import batch, make
from tests.processes import run_python
from unique_attention import hf, ops
from unique_attention.hf import activity

BEFORE_AND_AFTER = """
import json, torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
model.generation_config.eos_token_id = None
ids = torch.randint(3, 99, (2, 30))
mask = torch.ones_like(ids)
mask[0, :9] = 0
old_cache = DynamicCache(config=config)

def run(**kwargs):
    kwargs.update(max_new_tokens=6, min_new_tokens=6, do_sample=False, output_scores=True)
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **kwargs)
    return torch.stack(out.scores)

def tables():
    return [dict(t) for t in (ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
                              DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING)]

cases = [{}, {"cache_implementation": "static"}, {"num_beams": 2}]
before, old = [run(**case) for case in cases], tables()
import unique_hf
after, new = [run(**case) for case in cases], tables()
changed = [sorted(k for k in b if a.get(k) is not b[k]) for a, b in zip(old, new)]
cached = run(past_key_values=old_cache)
caches = DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)
kinds = [type(cache.layers[0]).__name__ for cache in caches]
print(json.dumps({
    "difference": [(a - b).abs().max().item() for a, b in zip(before + [before[0]], after + [cached])],
    "changed": changed, "kinds": kinds, "report": len(unique_hf.report(model).layers),
}))
"""


def test_import_changes_nothing_for_other_models():
    found = json.loads(" ".join(run_python(BEFORE_AND_AFTER)))
    assert found["difference"] == [0.0] * 4
    assert found["changed"] == [["unique"], ["unique"], ["full_attention"], ["full_attention"]]
    assert found["kinds"] == ["UniqueDynamicLayer", "UniqueStaticLayer"]
    assert found["report"] == 0


SYNCS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")


@contextlib.contextmanager
def no_syncs(monkeypatch):
    """Every way to read a tensor on the host raises, except inside the ops (whose CPU reference may)."""
    with monkeypatch.context() as patch:
        inside = []

        def forbid(name):
            original = getattr(torch.Tensor, name)

            def method(self, *args, **kwargs):
                assert inside, f"Tensor.{name} waits for the device"
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, method)

        def exempt(name):
            original = getattr(ops, name)

            def call(*args, **kwargs):
                inside.append(name)
                try:
                    return original(*args, **kwargs)
                finally:
                    inside.pop()

            patch.setattr(ops, name, call)

        for name in SYNCS:
            forbid(name)
        for name in ("page_stats", "unique_decode"):
            exempt(name)
        yield


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decode_step_never_waits_for_the_device(monkeypatch, kind):
    model, inputs = make(num_hidden_layers=1), batch()
    unique_hf.configure(model, page_size=4, budget=16)
    cache = (
        StaticCache(config=model.config, max_cache_len=64) if kind == "static" else DynamicCache(config=model.config)
    )
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        arguments = {
            "input_ids": inputs["input_ids"][:, :1], "attention_mask": mask, "past_key_values": cache,
            "position_ids": torch.full((2, 1), 40),
        }  # fmt: skip
        with no_syncs(monkeypatch):
            model(**arguments)
        with pytest.raises(AssertionError, match="waits for the device"), no_syncs(monkeypatch):
            assert arguments["position_ids"].sum() > 0
    assert unique_hf.report(model).sparse_rows == 2


def test_compiled_static_decode_is_one_graph_with_the_same_numbers():
    from torch._dynamo.testing import CompileCounter

    model, inputs, steps = make(), batch(), 6
    unique_hf.configure(model, page_size=4, budget=16)
    found, counter = {}, CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    for name, step in {"eager": model, "compiled": compiled}.items():
        cache, logits = StaticCache(config=model.config, max_cache_len=64), []
        with torch.no_grad():
            out, mask = model(**inputs, past_key_values=cache), inputs["attention_mask"]
            for at in range(steps):
                # a mask of fixed width: what lies beyond the length is hidden by the length
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, at + 1), value=1)
                wide = torch.nn.functional.pad(mask, (0, 64 - mask.shape[1]), value=0)
                out = step(
                    input_ids=out.logits[:, -1:].argmax(-1), attention_mask=wide, past_key_values=cache,
                    position_ids=mask.sum(-1, keepdim=True) - 1,
                )  # fmt: skip
                logits.append(out.logits)
        found[name] = torch.cat(logits, dim=1)
    assert counter.frame_count == 1, "one compilation for all steps"
    assert torch.equal(found["eager"], found["compiled"])


def test_a_model_and_its_cache_are_freed_without_the_garbage_collector():
    model, inputs = make(), batch()
    unique_hf.configure(model, page_size=4, budget=16, measure_recall=True)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        out = model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=out.past_key_values)
    layer = out.past_key_values.layers[0]
    watched = [weakref.ref(x) for x in (layer.keys, layer._buffers[0], layer.index.stats.codes)]
    assert len(unique_hf.report(model).layers) == 2
    gc.collect()
    gc.disable()
    try:
        del out, layer
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()
    counted = len(activity.ACTIVITY)
    module = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()  # a model has cycles of its own
    assert module() is None
    assert len(activity.ACTIVITY) == counted - 2


@pytest.fixture
def stock_tables():
    """The tables as they were before registration; restored afterwards."""
    ours = DYNAMIC_LAYER_TYPE_MAPPING["full_attention"], STATIC_LAYER_TYPE_MAPPING["full_attention"]
    yield
    DYNAMIC_LAYER_TYPE_MAPPING["full_attention"], STATIC_LAYER_TYPE_MAPPING["full_attention"] = ours


def test_a_second_copy_joins_or_is_refused(stock_tables):
    class Foreign(DynamicLayer):
        pass

    class Newer(DynamicLayer):
        unique_adapter_version = hf.ADAPTER_VERSION + 1

    class Same(DynamicLayer):
        unique_adapter_version = hf.ADAPTER_VERSION
        unique_activity = (activity.ACTIVITY, activity.PROBE)

    for layer, message in ((Foreign, "another package"), (Newer, "version 2 of this adapter")):
        DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] = layer
        with pytest.raises(RuntimeError, match=message):
            hf.register()
        assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is layer
    DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] = Same
    hf.register()
    assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is Same
    DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] = DynamicLayer
    STATIC_LAYER_TYPE_MAPPING["full_attention"] = StaticLayer
    hf.register()
    assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is hf.UniqueDynamicLayer
    assert STATIC_LAYER_TYPE_MAPPING["full_attention"] is hf.UniqueStaticLayer
