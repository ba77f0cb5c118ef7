"""A tiny model with the pocket model's tokenizer, documents to train on, and stock TRL trainers for them."""

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.processes import ROOT

SETTINGS = {"page_size": 4, "budget": 16, "temperature": 2.0}
TEXT = (
    "The access code of the northern library is 48213. The mascot of the old station is a falcon. For the red "
    "museum, the door colour is teal. Note that the locker number of the quiet harbour is 9071."
)


def make_model(seed=0, attention="unique"):
    config = Qwen3Config(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0, eos_token_id=0,
        bos_token_id=None, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.config.unique_attention = dict(SETTINGS)
    return model


def make_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "recipes/pocket_lm/tokenizer")


def documents():
    """Documents of 30 to 90 tokens."""
    words = TEXT.split()
    return Dataset.from_dict({"text": [" ".join(words[i % 7 :][: 16 + 5 * (i % 4)]) for i in range(24)]})


def make_trainer(folder, model=None, steps=4, **options):
    peft = options.pop("peft_config", None)
    settings = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "max_length": 96, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    model = make_model() if model is None else model
    return SFTTrainer(
        model, SFTConfig(**settings | options), train_dataset=documents(), processing_class=make_tokenizer(),
        peft_config=peft,
    )  # fmt: skip
