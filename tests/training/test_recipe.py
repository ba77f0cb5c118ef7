"""The soft-mask recipe: arms of the pocket model, and the SFT script with its configurations."""

import json

import numpy as np
import pytest
import torch

import unique_hf
from tests.processes import ROOT, run_python
from unique_hf import retrieval
from unique_hf.schedule import SoftMaskSchedule

pytest.importorskip("trl")

from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from recipes.pocket_lm.evaluate import answer_questions
from recipes.soft_mask_sft import arms, card, experiment, pocket_quality, pocket_training, sft, tune
from tests.training.tiny import make_model, make_tokenizer

PLAN = pocket_training.Plan(
    steps=4,
    tokens=256,
    lengths={128: 0.5, 64: 0.5},
    dense_lengths={192: 1.0},
    budgets=(16, 24),
    dense_share=0.25,
    rate=1.0,
    warmup=1,
)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    return pocket_training.build_batches(PLAN, 0, tmp_path_factory.mktemp("state"), 1 << 19, 1)


@pytest.mark.parametrize("settings", [None, {"page_size": 4, "budget": 64}])
def test_lockstep_gives_the_answers_of_one_question_at_a_time(settings):
    model = make_model(attention="sdpa" if settings is None else "unique").eval()
    if settings:
        unique_hf.configure(model, **settings)
    [(ids, haystack)] = pocket_quality.haystacks(make_tokenizer(), 384, 1, 3, seed=5)
    assert len(ids) == 384 and len({len(q) for q in haystack.question_ids}) > 1
    found = retrieval.ask(model, retrieval.prefill(model, ids), haystack.question_ids).ids
    haystack.input_ids[:] = ids
    assert found == answer_questions(model, haystack, feed="decode")
    assert bool(settings) == bool(unique_hf.report(model).sparse_rows)


def test_cells_that_would_run_dense_are_an_error():
    model, tokenizer = make_model(), make_tokenizer()
    arguments = {"sizes": {384: (2, 3)}, "settings": {"page_size": 4}, "rows_at_once": {384: 6}}
    cells = [pocket_quality.Cell(384, None), pocket_quality.Cell(384, 32, trained=False)]
    dense, sparse = pocket_quality.evaluate(model, tokenizer, cells, **arguments)
    assert (dense["questions"], dense["pages_read"], sparse["trained"]) == (6, 1.0, False)
    assert 0.05 < sparse["pages_read"] < 0.1 and model.config._attn_implementation == "unique"
    with pytest.raises(RuntimeError, match="expected only sparse rows at length 384 and budget 1024"):
        pocket_quality.evaluate(model, tokenizer, [pocket_quality.Cell(384, 1024)], **arguments)


def test_paired_tests_on_known_numbers():
    # 1 against 8 discordant pairs: 2 (1 + 9) / 2^9
    first, second = "1" * 12 + "1" + "0" * 8, "1" * 12 + "0" + "1" * 8
    found = pocket_quality.mcnemar(first, second)
    assert (found["only_first"], found["only_second"]) == (1, 8) and found["p"] == pytest.approx(20 / 512)
    assert pocket_quality.mcnemar("1010", "1010")["p"] == 1.0
    low, high = pocket_quality.bootstrap("11111000" * 4, "11110000" * 4, groups=4)
    assert low == high == pytest.approx(0.125)
    low, high = pocket_quality.bootstrap("1111" + "0000", "0000" + "1111", groups=2)
    assert (low, high) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="equal length"):
        pocket_quality.mcnemar("11", "1")


def test_batches_depend_on_the_seed_alone(batches, tmp_path):
    again = np.load(pocket_training.build_batches(PLAN, 0, tmp_path, 1 << 19, 2))
    other = np.load(pocket_training.build_batches(PLAN, 1, tmp_path, 1 << 19, 1))
    first = np.load(batches)
    for step in range(PLAN.steps):
        assert np.array_equal(first[f"ids{step}"], again[f"ids{step}"])
        dense = SoftMaskSchedule(dense_share=0.25).is_dense(step)
        assert first[f"ids{step}"].shape[1] - 1 in (PLAN.dense_lengths if dense else PLAN.lengths)
    assert any(
        first[f"ids{s}"].shape != other[f"ids{s}"].shape or not np.array_equal(first[f"ids{s}"], other[f"ids{s}"])
        for s in range(PLAN.steps)
    )


@pytest.mark.parametrize(("arm", "soft"), [("dense", False), ("hard", True), ("soft", True)])
def test_arms_train_as_they_are_called(arm, soft, batches):
    model = make_model()
    before, settings = model.model.layers[0].self_attn.q_proj.weight.clone(), unique_hf.configure(model)
    task = experiment.Task(arm, 0, ())
    schedule = experiment.schedule_of(task, PLAN)
    found = pocket_training.train(model, PLAN, schedule, batches)
    assert bool(found["soft_rows"]) == soft and not torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)
    assert unique_hf.configure(model) == settings and not model.training
    expected = 1e-4 if arm == "hard" else 0.5
    assert found["curve"][0]["temperature"] == pytest.approx(expected)


def test_numbers_that_are_not_finite_stop_an_arm(batches):
    model = make_model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="step 0: loss nan"):
        pocket_training.train(model, PLAN, SoftMaskSchedule(), batches)


def test_mixing_goes_from_the_start_to_what_was_trained():
    model, other = make_model(), make_model()
    start, end = experiment.weights_of(model), experiment.weights_of(other)
    end = {name: weight + 0.25 for name, weight in end.items()}
    for factor, change in ((0.0, 0.0), (0.5, 0.125), (1.0, 0.25)):
        pocket_training.mixed(model, start, end, factor)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), start[name] + change)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_the_measured_dtype_leaves_rotary_frequencies_alone():
    exact, rounded = (
        experiment.load(experiment.START, dtype, torch.device("cpu"), {"page_size": 8})
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.lm_head.weight.dtype == torch.bfloat16 and unique_hf.configure(rounded).page_size == 8
    assert torch.equal(rounded.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def row(schedule, mix, dense, long, sparse):
    accuracy = {"16384/dense": dense, "32768/dense": long, "16384/512": sparse}
    return {"schedule": schedule, "mix": mix, "page_size": 16, "accuracy": accuracy}


def test_the_choice_keeps_dense_accuracy_first():
    start, best = row("start", 0.0, 0.998, 1.0, 0.83), row("a", 0.75, 0.993, 0.996, 0.93)
    rows = [
        start,
        row("a", 0.5, 0.998, 1.0, 0.90),
        best,
        row("a", 1.0, 0.998, 0.99, 0.97),
        row("b", 1.0, 0.9, 1, 0.99),
    ]
    assert tune.choose(rows, "16384/512") is best
    assert tune.choose([start, *rows[3:]], "16384/512") is rows[3]
    assert tune.choose([start], "16384/512") is None


def test_schedules_change_the_plan_and_what_counts_as_trained():
    default, long = (experiment.scheduled("h200", name) for name in ("plan", "long-sharp"))
    assert (default.plan, long.plan.temperature) == (experiment.H200.plan, (0.5, 0.02))
    trained = {(cell.length, cell.budget): cell.trained for cell in default.cells}
    assert trained[16384, 512] and trained[32768, None] and not trained[16384, 128] and not trained[32768, 512]
    trained = {(cell.length, cell.budget): cell.trained for cell in long.cells}
    assert trained[32768, 512] and not trained[16384, 2048] and trained[8192, 256]
    assert experiment.scheduled("smoke", "long-sharp").plan.lengths == experiment.SMOKE.plan.lengths


def test_tuning_goes_on_where_an_earlier_call_ended(tmp_path, monkeypatch, capsys):
    accuracy = {"512/dense": 1.0, "512/96": 0.5}
    rows = [
        {"schedule": name, "page_size": 16, "mix": mix, "accuracy": accuracy, "seconds": 1.0}
        for name, mix in (("start", 0.0), ("plan", 0.5))
    ]
    file = tmp_path / "tune.json"
    file.write_text(json.dumps({"rows": rows, "schedules": {"plan": {}}}))
    command = [
        "tune",
        "--preset",
        "smoke",
        "--schedules",
        "plan",
        "long",
        "--resume",
        str(file),
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", command)
    args = tune.parse_args()
    done = {(row["schedule"], row["page_size"]) for row in tune.earlier(file)}
    assert [name for name, _ in tune.jobs_of(args, done)] == ["long"]
    tune.conclude(args, rows)
    assert (tmp_path / "chosen.txt").read_text() == "--schedule plan --mix 0.5\n"
    assert "chosen: --schedule plan --mix 0.5" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["arms", "--out", "x", *(tmp_path / "chosen.txt").read_text().split()])
    assert (arms.parse_args().schedule, arms.parse_args().mix) == ("plan", 0.5)
    file.write_text(json.dumps({"rows": rows, "schedules": {"plan": {"clip": 1.0}}}))
    with pytest.raises(ValueError, match="plan differ"):
        tune.earlier(file)


def test_every_task_has_a_name_of_its_own_and_two_seeds():
    names = [task.name for task in experiment.tasks()]
    assert len(set(names)) == len(names)
    for name in names:
        assert name.startswith("start-") or name[:-1] + "01"[name[-1] == "0"] in names


def test_smoke_arms_run_resume_and_ship(tmp_path, monkeypatch):
    model = make_model(attention="sdpa")
    model.config.max_position_embeddings = 2048
    model.config.unique_attention = {}
    model.save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    out, state = tmp_path / "out", tmp_path / "state"
    code = f"""
import sys
from recipes.soft_mask_sft import arms
common = ["arms", "--preset", "smoke", "--steps", "2", "--model", {str(tmp_path / "start")!r}, "--out", {str(out)!r},
          "--state", {str(state)!r}, "--ship", "soft-p16-s0", "--arms", "soft-p16-s0"]
sys.argv = common
arms.main()
sys.argv = [*common, "dense-s0", "--resume", {str(out / "arms.json")!r}]
arms.main()"""
    shown = " ".join(run_python(code))
    assert "FAILED" not in shown
    with pytest.raises(ValueError, match="expected results of the same plan"):
        arms.earlier(out / "arms.json", experiment.H200, "test")
    results = json.loads((out / "arms.json").read_text())
    assert {r["task"] for r in results["records"]} == {"soft-p16-s0", "dense-s0"}
    assert sum(r["task"] == "soft-p16-s0" for r in results["records"]) == 1, "resumed arms are not run again"
    assert {(r["task"], r["against"]) for r in results["comparisons"]} == {("soft-p16-s0", "dense-s0")}
    assert {p.name for p in (out / "soft-p16-s0").iterdir()} == {"meta.tar", "model.safetensors"}
    tables = card.facts_of(results, "soft-p16-s0")["tables"]
    assert tables[0]["columns"][-2:] == ["dense control", "this model"] and len(tables[0]["rows"]) == 3
    facts = {"results": "results/arms.json", "task": "soft-p16-s0", "location": "models/pocket-lm-unique"}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    command = ["card", "--facts", str(tmp_path / "facts.json"), "--root", str(tmp_path), "--shipped", str(out)]
    monkeypatch.setattr("sys.argv", command)
    card.main()
    installed = tmp_path / "models/pocket-lm-unique"
    assert "this model" in (installed / "README.md").read_text() and (tmp_path / "results/arms.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(installed, attn_implementation="unique")
    assert unique_hf.configure(loaded).page_size == 16
    with pytest.raises(ValueError, match="expected the checkpoint of dense-s0"):
        card.install(out, tmp_path / "r.json", "dense-s0", tmp_path / "other")
    assert "| context | tokens kept |" in str(unique_hf.hub.render_card(model.config, "a/b", {"tables": tables}))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data_is_read_from_files_folders_and_in_every_form(tmp_path):
    text = write(tmp_path / "a.jsonl", [{"text": "one", "id": 1}])
    assert sft.read_dataset(ScriptArguments(dataset_name=str(text)))[:] == {"text": ["one"]}
    write(tmp_path / "b.jsonl", [{"text": "two", "id": 2}])
    assert sft.read_dataset(ScriptArguments(dataset_name=str(tmp_path)))["text"][:] == ["one", "two"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chat = write(tmp_path / "chat.jsonl", [{"messages": messages, "length": 2}])
    assert sft.read_dataset(ScriptArguments(dataset_name=str(chat)))[0] == {"messages": messages}
    (tmp_path / "plain.txt").write_text("one line\n")
    with pytest.raises(ValueError, match="expected files of one format"):
        sft.read_dataset(ScriptArguments(dataset_name=str(tmp_path)))
    other = write(tmp_path / "c.jsonl", [{"body": "x"}])
    with pytest.raises(ValueError, match=r"expected a column of text, .* got \['body'\]"):
        sft.read_dataset(ScriptArguments(dataset_name=str(other)))


@pytest.mark.parametrize("name", ["smoke", "h200", "h200x2", "qwen3_8b"])
def test_configurations_are_understood(name):
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, sft.SoftMaskArguments))
    path = ROOT / f"recipes/soft_mask_sft/{name}.yaml"
    script, args, model, mask = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    base = unique_hf.UniqueConfig(page_size=mask.page_size, budget=mask.budget, score=mask.score)
    assert base.num_kept * 4 <= args.max_length and model.model_name_or_path and script.dataset_name


def test_smoke_configuration_trains_and_leaves_a_checkpoint_with_a_card(tmp_path):
    make_model(attention="sdpa").save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    code = f"""
import json, sys
from recipes.soft_mask_sft import facts_data, sft
with open({str(tmp_path / "facts.jsonl")!r}, "w") as file:
    for row in facts_data.rows(8, 384):
        file.write(json.dumps(row) + "\\n")
sys.argv = ["sft", "--config", {str(ROOT / "recipes/soft_mask_sft/smoke.yaml")!r}, "--model_name_or_path",
            {str(tmp_path / "start")!r}, "--dataset_name", {str(tmp_path / "facts.jsonl")!r}, "--output_dir",
            {str(tmp_path / "out")!r}, "--dense_share", "0.25"]
sft.main()"""
    shown = run_python(code)
    assert "'unique/recall':" in shown and "'unique/loss_gap':" in shown
    settings = json.loads((tmp_path / "out/config.json").read_text())["unique_attention"]
    assert (settings["page_size"], settings["budget"], settings["soft_mask"]) == (8, 64, True)
    assert "| `budget` | 64 |" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/model.safetensors").exists()
