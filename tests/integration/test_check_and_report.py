"""Forecast and counts: against numbers worked out by hand, for models with encoders, towers and other attention."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import unique_hf
from tests.integration.tiny import attention_modules, batch, make


def decode(model, inputs, steps):
    with torch.no_grad():
        cache, mask = model(**inputs, use_cache=True).past_key_values, inputs["attention_mask"]
        for _ in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(torch.full((len(mask), 1), 7), attention_mask=mask, past_key_values=cache)
    return cache


def test_report_counts_pages_and_bytes():
    model = make(num_hidden_layers=1)
    unique_hf.configure(model, page_size=4, budget=16, stats_dtype="fp8")
    decode(model, batch(rows=2, length=40, padding=(13, 0)), steps=2)
    found = unique_hf.report(model)
    # rows with 41 and 42 slots: pages 3..10 and 0..10, of which 4 are kept
    assert (found.sparse_rows, found.dense_rows, found.prompt_rows, found.soft_rows) == (4, 0, 80, 0)
    assert found.pages_read == 4 * 4
    assert found.pages_present == 2 * (8 + 11)
    token = 2 * (32 + 32) * 4  # two kv heads, keys and values of 32 numbers, fp32
    page = 2 * (32 + 2 + 2)  # fp8 mean, one bf16 scale, bf16 spread
    tokens_read = 2 * (13 + 14)  # the last page holds one token at length 41, two at 42
    assert found.bytes_read == tokens_read * token + found.pages_present * page
    assert found.bytes_dense == (28 + 41 + 29 + 42) * token
    assert found.recall is None
    row = found.layers[0]
    assert (row.name, row.sparse_rows) == ("model.layers.0.self_attn", 4)
    assert row.reasons == {"pages by score": 4}
    text = str(found).splitlines()
    assert text[0].split()[:3] == ["layer", "sparse_rows", "dense_rows"]
    assert text[-2].split()[:2] == ["total", "4"]


def test_report_resets():
    model = make(num_hidden_layers=1)
    decode(model, batch(), steps=1)
    assert unique_hf.report(model, reset=True).prompt_rows == 80
    found = unique_hf.report(model)
    assert found.layers == () and found.prompt_rows == found.sparse_rows == 0


def test_short_contexts_are_dense_rows():
    model = make(num_hidden_layers=1)
    unique_hf.configure(model, page_size=4, budget=44)
    decode(model, batch(padding=(13, 0)), steps=8)
    found = unique_hf.report(model)
    # row 1 has 11 pages up to 44 slots, then 12; row 0 never has more than 9
    assert (found.sparse_rows, found.dense_rows) == (4, 12)


def test_recall_is_the_attention_mass_on_the_kept_pages():
    model, inputs = make(num_hidden_layers=1, attention="eager"), batch(padding=(13, 0))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        step = {"input_ids": torch.full((2, 1), 7), "attention_mask": mask, "past_key_values": cache}
        weights = model(**step, output_attentions=True).attentions[0][:, :, 0]  # [B, H, S]
    model.set_attn_implementation("unique")
    # with no scored page but one, and mean scores, the kept pages can be found by hand
    unique_hf.configure(model, page_size=4, budget=16, score="mean", stats_dtype="fp32", measure_recall=True)
    decode(model, inputs, steps=1)
    found = unique_hf.report(model)
    kept_mass = []
    with torch.no_grad():
        keys = cache.layers[0].keys
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.full((2, 1), 7)))
        position = mask.sum(-1, keepdim=True) - 1
        cos, sin = model.model.rotary_emb(hidden, position)
        queries = model.model.layers[0].self_attn.q_proj(hidden).view(2, 1, 4, 32).transpose(1, 2)
        half = torch.cat([-queries[..., 16:], queries[..., :16]], -1)
        queries = (queries * cos[:, None] + half * sin[:, None])[:, :, 0]
    for row, first in enumerate((13, 0)):
        for head in range(4):
            group = slice(head // 2 * 2, head // 2 * 2 + 2)
            pages = list(range(first // 4, 11))
            means = {p: keys[row, head // 2, max(first, 4 * p) : 4 * p + 4].mean(0) for p in pages}
            best = max(pages[1:-2], key=lambda p: (queries[row, group] @ means[p]).mean().item())
            kept = {pages[0], best, pages[-2], pages[-1]}
            kept_mass.append(sum(weights[row, head, 4 * p : 4 * p + 4].sum().item() for p in kept))
    assert found.sparse_rows == 2
    assert abs(found.recall - sum(kept_mass) / 8) < 1e-4
    assert 0.05 < found.recall < 0.95


def test_sinks_take_their_share_of_the_recall():
    from unique_attention.hf.activity import kept_mass

    query, key, sinks = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 10, 8), torch.randn(4)
    logits = torch.einsum("bhgd,bhsd->bhgs", query.view(2, 2, 2, 8), key) * 0.3
    weights = torch.cat([logits, sinks.view(1, 2, 2, 1).expand(2, -1, -1, -1)], -1).softmax(-1)
    call = {"page_size": 4, "scaling": 0.3, "sinks": sinks}
    everything = torch.tensor([0, 1, 2, -1], dtype=torch.int32).expand(2, 2, 4)
    torch.testing.assert_close(kept_mass(query, key, everything, **call), torch.ones(2))
    found = kept_mass(query, key, everything[..., 1:], **call)
    torch.testing.assert_close(found, weights[..., 4:].sum(-1).mean((1, 2)))


def test_settings_travel_with_the_model(tmp_path):
    model = make(num_hidden_layers=1)
    settings = unique_hf.configure(model, page_size=8, budget=64, score="diagonal")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["unique_attention"]["score"] == "diagonal"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="unique")
    assert unique_hf.configure(loaded) == settings
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    inputs = batch()
    with torch.no_grad():
        plain(**inputs)


def test_check_leaves_no_trace_and_says_when_unique_is_off():
    model = make(attention="sdpa").train()
    found = unique_hf.check(model)
    assert not found.sparse_layers and "call model.set_attn_implementation('unique')" in found.layers[0].reason
    model.set_attn_implementation("unique")
    state = torch.get_rng_state()
    assert len(unique_hf.check(model).sparse_layers) == 2
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert unique_hf.report(model).layers == ()


def test_encoder_is_exactly_sdpa_and_check_says_why():
    config = AutoConfig.for_model(
        "bert", vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model = AutoModel.from_config(config, attn_implementation="unique").eval()
    with torch.no_grad():
        ours = model(**batch()).last_hidden_state
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model(**batch()).last_hidden_state)
    model.set_attn_implementation("unique")
    with pytest.warns(UserWarning, match="not causal"):
        found = unique_hf.check(model)
    assert len(found.dense_layers) == 2


def test_encoder_decoder_is_sparse_in_decoder_self_attention_only():
    config = AutoConfig.for_model(
        "bart", vocab_size=99, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=96, decoder_ffn_dim=96, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="unique").eval()
    found = unique_hf.check(model)
    assert found.sparse_layers == tuple(f"model.decoder.layers.{i}.self_attn" for i in (0, 1))
    assert {layer.reason for layer in found.layers if not layer.sparse} == {"not causal (encoder or cross-attention)"}
    arguments = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    unique_hf.configure(model, page_size=2, budget=1024)
    ours = model.generate(**batch(), **arguments)
    unique_hf.configure(model, page_size=2, budget=8)
    unique_hf.report(model, reset=True)
    sparse = model.generate(**batch(), **arguments)
    ran = {row.name for row in unique_hf.report(model).layers if row.sparse_rows}
    assert ran == set(found.sparse_layers)
    model.set_attn_implementation("sdpa")
    expected = model.generate(**batch(), **arguments)
    assert ours.tolist() == expected.tolist() != sparse.tolist()


def test_vision_tower_behaves_as_sdpa_and_text_runs_sparse():
    config = AutoConfig.for_model(
        "llava", image_token_index=98,
        text_config={
            "model_type": "llama", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 32,
        },
        vision_feature_layer=-1,
    )  # fmt: skip
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="unique").eval()
    settings = unique_hf.configure(model, page_size=2, budget=8)
    assert model.config.text_config.unique_attention == settings.to_dict()
    ids = torch.tensor([[5] * 12 + [98] * 4 + [6] * 12])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    found = unique_hf.check(model, **inputs)
    assert [("vision" in layer.name, layer.sparse) for layer in found.layers].count((False, True)) == 2
    assert all("not causal" in layer.reason for layer in found.layers if "vision" in layer.name)
    textual = unique_hf.check(model)
    assert textual.sparse_layers == found.sparse_layers
    assert any("not run by this prompt" in layer.reason for layer in textual.layers)
    with torch.no_grad():
        ours = model(**inputs).logits
        model.set_attn_implementation("sdpa")
        assert (ours - model(**inputs).logits).abs().max() < 1e-4


def test_hybrid_sliding_layers_are_named():
    found = unique_hf.check(make("gemma2"))
    assert [(layer.sparse, layer.reason) for layer in found.layers] == [
        (False, "sliding window of 16 tokens"),
        (True, "pages by score"),
    ]
    assert found.layers[0].name == attention_modules(make("gemma2"))[0][0]


def test_chunked_layers_are_named():
    config = AutoConfig.for_model(
        "llama4_text", vocab_size=99, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96, head_dim=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, pad_token_id=0,
        attention_chunk_size=16, layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="unique").eval()
    assert [layer.reason for layer in unique_hf.check(model).layers] == [
        "layer type chunked_attention",
        "pages by score",
    ]
