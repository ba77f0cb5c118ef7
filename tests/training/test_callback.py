"""The schedule, the callback and what it measures."""

import math

import pytest
import torch

import unique_hf
from tests.processes import run_python
from unique_hf.backend import adapter
from unique_hf.probe import measure, temporarily
from unique_hf.schedule import SoftMaskSchedule, softmax_scale_of

pytest.importorskip("trl")

from transformers import TrainerCallback

from tests.training.tiny import SETTINGS, make_model, make_trainer

BASE = unique_hf.UniqueConfig(**SETTINGS)


def test_temperature_falls_geometrically_and_then_holds():
    schedule = SoftMaskSchedule(temperature=(1.0, 0.1), hold=0.5)
    found = [schedule.temperature_at(step, 101) for step in (0, 25, 50, 100)]
    assert found == pytest.approx([1.0, 0.1**0.5, 0.1, 0.1])
    assert SoftMaskSchedule(temperature=(1.0, 0.1)).temperature_at(0, 1) == 1.0


def test_temperature_is_in_logits_whatever_the_head_dim():
    model = make_model()  # head_dim 32
    assert softmax_scale_of(model) == pytest.approx(32**-0.5)
    drawn = SoftMaskSchedule(temperature=(1.0, 1.0)).settings(0, 10, BASE, softmax_scale_of(model))
    assert drawn.temperature == pytest.approx(32**0.5)


def test_budgets_and_dense_steps_are_drawn_from_their_ranges():
    schedule = SoftMaskSchedule(budget=(16, 200), dense_share=0.3, seed=5)
    drawn = [schedule.settings(step, 400, BASE, 1.0) for step in range(400)]
    budgets = [settings.budget for settings in drawn]
    assert min(budgets) == 16 and max(budgets) in (196, 200) and all(budget % 4 == 0 for budget in budgets)
    assert sum(budget < 57 for budget in budgets) == pytest.approx(200, abs=30)  # the median of a log-uniform draw
    assert sum(not settings.soft_mask for settings in drawn) == pytest.approx(120, abs=30)
    assert drawn == [schedule.settings(step, 400, BASE, 1.0) for step in range(400)]
    assert max(schedule.settings(step, 400, BASE, 1.0, most=40).budget for step in range(400)) == 40
    assert SoftMaskSchedule().settings(0, 10, BASE, 1.0).budget == BASE.budget


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": (1.0, 0.0)}, "two numbers > 0"),
        ({"dense_share": 1.5}, "`dense_share` must lie between 0 and 1, got 1.5"),
        ({"budget": (64, 32)}, "0 < least <= most"),
    ],
)
def test_wrong_schedules_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SoftMaskSchedule(**wrong)


class Watch(TrainerCallback):
    """Settings in force while a step runs; added after the callback under test."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(unique_hf.configure(model))


def probe_rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 4096, (2, 60), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 41:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_callback_follows_the_schedule_logs_and_restores_the_settings(tmp_path):
    schedule = SoftMaskSchedule(temperature=(1.0, 0.2), budget=(16, 32), dense_share=0.4, seed=2)
    trainer, watch = make_trainer(tmp_path, steps=6, save_strategy="steps", save_steps=3), Watch()
    trainer.add_callback(unique_hf.SoftMaskCallback(trainer, schedule, probe=probe_rows(), probe_every=3))
    trainer.add_callback(watch)
    before = unique_hf.configure(trainer.model)
    trainer.train()
    scale = 32**-0.5
    assert watch.seen == [schedule.settings(step, 6, before, scale) for step in range(6)]
    assert len({settings.soft_mask for settings in watch.seen}) == 2
    assert unique_hf.configure(trainer.model) == before
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3", attn_implementation="unique")
    assert unique_hf.configure(saved) == before
    history = trainer.state.log_history
    measured = [row for row in history if "unique/recall" in row]
    assert [row["step"] for row in measured] == [0, 3, 6]
    assert all(math.isfinite(value) for row in measured for value in row.values())
    temperatures = [row["unique/temperature"] for row in history if "unique/temperature" in row]
    assert len(temperatures) == 6 and temperatures[0] == 1.0 and temperatures[-1] == pytest.approx(0.2)
    # the trainer's own entries keep their averages
    assert all("mean_token_accuracy" in row for row in history if "loss" in row)


def test_callback_refuses_a_model_without_unique_attention(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(attention="sdpa"))
    trainer.add_callback(unique_hf.SoftMaskCallback(trainer))
    with pytest.raises(ValueError, match="expected a model with attn_implementation='unique', got 'sdpa'"):
        trainer.train()


def by_hand(model, batch, temperature):
    """Recall, open pages and sharpness of the first layer at the last valid token of each row, from Eq. 1 to 6."""
    captured = {}

    def see(settings, query, key, **where):
        captured.setdefault("layer", (query, key, where))

    with torch.no_grad(), adapter().soft.observing(see):
        model(**batch, use_cache=False)
    query, key, where = captured["layer"]
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        own, pages = (length - 1) // 4, []
        for head in range(2):
            q = query[row, 2 * head : 2 * head + 2, length - 1].double()
            k = key[row, head, :length].double()
            chunks = k.split(4)
            scores = torch.tensor(
                [
                    (q @ c.mean(0) + 0.5 * q.norm(dim=-1) * (c - c.mean(0)).square().sum(-1).mean().sqrt()).mean()
                    for c in chunks
                ]
            )
            free = scores[1 : own - 1]
            ranked = free.sort(descending=True).values
            theta = (ranked[0] + ranked[1]) / 2  # budget 16: sink, two recent, one chosen
            gate = torch.sigmoid((free - theta) / temperature)
            kept = {0, own - 1, own, 1 + int(free.argmax())}
            weights = ((q @ k.T) * where["scaling"]).softmax(-1)
            mass = sum(weights[:, 4 * page : 4 * page + 4].sum(-1) for page in kept).mean()
            sharp = 1 - (4 * gate * (1 - gate)).mean()
            sums += torch.tensor([mass, (gate.sum() + 3) / (own + 1), sharp], dtype=torch.float64)
            pages.append(own)
            count += 1
    return (sums / count).tolist()


def test_measure_is_what_the_equations_say():
    model = make_model().eval()
    model.config.num_hidden_layers = 1
    del model.model.layers[1]
    found = measure(model, probe_rows(), positions=1)
    # one position is the first that has a choice; the last one is looked at with two
    both = measure(model, probe_rows(), positions=2)
    assert set(found) == set(both)
    last = {name: 2 * both[name] - found[name] for name in ("recall", "open_pages", "sharpness")}
    expected = by_hand(model, probe_rows(), SETTINGS["temperature"])
    assert [last["recall"], last["open_pages"], last["sharpness"]] == pytest.approx(expected, abs=1e-4)


def test_measured_losses_are_dense_and_hard():
    model, rows = make_model(), probe_rows()
    model.train()
    found = measure(model, rows)
    assert all(module.training for module in model.modules())
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    sdpa = make_model(attention="sdpa").eval()
    with torch.no_grad():
        assert found["loss_dense"] == pytest.approx(sdpa(**rows, labels=labels).loss.item(), abs=1e-5)
    assert found["loss_gap"] == pytest.approx(found["loss_hard"] - found["loss_dense"])
    assert abs(found["loss_gap"]) > 1e-4
    with temporarily(model, budget=64):
        assert abs(measure(model, rows)["loss_gap"]) < 1e-5, "everything kept: hard is dense"
        assert "recall" not in measure(model, rows), "nothing to choose"
    assert unique_hf.configure(model) == BASE


def test_measure_refuses_packed_rows():
    rows = {"input_ids": torch.arange(1, 61)[None], "position_ids": torch.arange(30).repeat(2)[None]}
    with pytest.raises(ValueError, match="give the probe unpacked rows"):
        measure(make_model(), rows)


def test_importing_unique_hf_leaves_trl_and_trainer_modules_alone():
    names = ("trl", "unique_hf.training", "unique_hf.hub")
    assert run_python(f"import sys, unique_hf\nprint(*[m for m in {names} if m in sys.modules])") == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_soft_mask(dtype):
    """Norms and rotary embeddings in fp32 leave queries in fp32 beside values in 16 bits; sdpa would cast them."""
    model, seen = make_model(), []

    def see(settings, query, key, **where):
        seen.append((query.dtype, key.dtype))

    with torch.autocast("cpu", dtype), adapter().soft.observing(see):
        logits = model(**probe_rows(), use_cache=False).logits
    assert set(seen) == {(dtype, dtype)} and len(seen) == 2 and torch.isfinite(logits).all()
    with torch.no_grad():
        exact = model(**probe_rows(), use_cache=False).logits
    valid = probe_rows()["attention_mask"].bool()
    assert (logits - exact)[valid].abs().max() < 0.1 * exact[valid].abs().max()
    assert len(seen) == 2, "nobody watches any more"
