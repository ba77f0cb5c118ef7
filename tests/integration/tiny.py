"""Tiny random models of twelve architectures, and inputs for them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 99
BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# wide enough to make attention peaked: with the usual 0.02 all keys look alike and a wrong page would not show
INIT = {"initializer_range": 0.3}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip

# architecture -> (differences to BASE, layers that run sparse)
ARCHITECTURES = {
    "llama": ({}, [0, 1]),
    "qwen2": ({}, [0, 1]),
    "qwen3": ({}, [0, 1]),
    "qwen3_moe": (MOE, [0, 1]),
    "mistral": ({"sliding_window": 16}, []),
    "gemma2": ({**SLIDING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}, [1]),
    "gemma3_text": ({**SLIDING, "query_pre_attn_scalar": 32}, [1]),
    "phi3": ({}, [0, 1]),
    "granite": ({"attention_multiplier": 0.3}, [0, 1]),
    "gpt_oss": ({**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1}, [1]),
    "deepseek_v3": (MLA, []),
    "glm4": ({}, [0, 1]),
}


def make(architecture="llama", attention="unique", seed=0, **overrides):
    """A model in eval mode; the same seed gives the same weights whatever the attention."""
    changes, _ = ARCHITECTURES[architecture]
    settings = {**BASE, **INIT, **changes, **overrides}
    if architecture == "deepseek_v3":
        settings.pop("head_dim")
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            # large beside the logits of a smaller initialisation, or leaving them out would not show
            torch.nn.init.normal_(parameter, mean=2.0, std=1.0)
    model.generation_config.eos_token_id = None
    return model


def batch(rows=2, length=40, padding=(13, 0), seed=1):
    """Left-padded `input_ids` and `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, inputs, tokens=9, **kwargs):
    """New tokens of a greedy generation."""
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :]


def attention_modules(model):
    """Attention modules by layer index."""
    return {m.layer_idx: (name, m) for name, m in model.named_modules() if hasattr(m, "layer_idx") and "attn" in name}
