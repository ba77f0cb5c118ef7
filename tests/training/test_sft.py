"""Stock TRL trainers train through the soft mask, in every way they lay out rows."""

import math

import pytest
import torch

import unique_hf

pytest.importorskip("trl")

from peft import LoraConfig

from tests.training.tiny import make_model, make_trainer

WAYS = {
    "padded": {},
    "packed bfd": {"packing": True, "packing_strategy": "bfd"},
    "packed wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "LoRA": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]), "learning_rate": 5e-2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_sft_trains_through_the_soft_mask(way, tmp_path):
    trainer = make_trainer(tmp_path, **WAYS[way])
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tokens = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    unique_hf.report(model, reset=True)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert any("q_proj" in name for name in changed) and any("k_proj" in name for name in changed)
    counts = unique_hf.report(model)
    # both layers; checkpointing runs every layer twice
    passes = 2 if way == "gradient checkpointing" else 1
    assert counts.soft_rows == 2 * passes * sum(tokens) and counts.prompt_rows == 0


@pytest.mark.parametrize("way", ["packed bfd", "padding-free"])
@pytest.mark.parametrize("soft_mask", [True, False])
def test_packed_rows_give_the_logits_of_separate_documents(way, soft_mask, tmp_path):
    trainer = make_trainer(tmp_path, **WAYS[way])
    unique_hf.configure(trainer.model, soft_mask=soft_mask)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    unique_hf.report(model, reset=True)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        assert bool(unique_hf.report(model, reset=True).soft_rows) == soft_mask
        compared = 0
        for row, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"])):
            starts = (positions == 0).nonzero().flatten().tolist() + [len(ids)]
            for start, end in zip(starts, starts[1:]):
                if end - start > 1:  # the padding behind a packed row counts as documents of one token
                    alone = model(input_ids=ids[None, start:end], use_cache=False).logits
                    assert (alone[0] - packed[row, start:end]).abs().max() < 1e-4
                    compared += end - start > 16
    assert compared >= 4, "documents longer than the budget, or nothing was masked"


def test_dense_training_is_training_with_sdpa(tmp_path):
    losses = {}
    for attention in ("sdpa", "unique"):
        model = make_model(attention=attention)
        unique_hf.configure(model, soft_mask=False)
        trainer = make_trainer(tmp_path, model=model, steps=3)
        trainer.train()
        losses[attention] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert unique_hf.report(model).soft_rows == 0
    assert losses["sdpa"] == pytest.approx(losses["unique"], abs=1e-5)
