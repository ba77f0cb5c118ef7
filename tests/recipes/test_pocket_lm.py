"""The pocket model recipe: task, batches, curriculum, network, export, evaluation, command line."""

import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError

from recipes.pocket_lm import batches, curriculum, publish, text
from recipes.pocket_lm import tokenizer as pocket_tokenizer
from recipes.pocket_lm.evaluate import answer_questions
from recipes.pocket_lm.model import BatchedMuon, PocketLM, Shape
from unique_hf import facts

ROOT = Path(__file__).parents[2]
TINY = Shape(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=2048,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return pocket_tokenizer.load_tokenizer()


@pytest.fixture(scope="module")
def builder(tokenizer):
    ids = [i for e in tokenizer.encode_batch_fast([text.topics(held_out=False)] * 2) for i in [*e.ids, 0]]
    return batches.Batches(tokenizer, np.array(ids, np.uint16))


def test_tokenizer_is_lossless_and_splits_digits(tokenizer):
    for sample in ("The code is 48213.", "naïve – 日本語 \U0001f600\n\tx = 0xFF\r\n", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) == sample
    assert tokenizer.encode("is 48213.").tokens[-6:] == ["4", "8", "2", "1", "3", "."]


def test_fragments_tokenise_as_the_sentence_does(tokenizer):
    sampler = facts.FactSampler(random.Random(0))
    for fact in (sampler.draw()[0] for _ in range(200)):
        for template in facts.STATEMENTS + facts.QUESTIONS:
            fragments = fact.fragments(template)
            joined = [i for fragment in fragments for i in tokenizer.encode(fragment).ids]
            assert joined == tokenizer.encode("".join(fragments)).ids


def test_splits_share_no_fact_and_no_name():
    drawn = {}
    for split in facts.SPLITS:
        sampler = facts.FactSampler(random.Random(1), split)
        drawn[split] = {(f.attribute, f.subject) for _ in range(1000) for f in sampler.cluster(3)}
    train, validation, test = drawn.values()
    assert not train & validation and not train & test and not validation & test
    names = [{w for _, s in part for w in s.split() if w[0].isupper()} for part in drawn.values()]
    assert len(names[2]) > 50 and not names[0] & names[2] and not names[0] & names[1]


def test_near_duplicates_differ_in_one_part():
    sampler = facts.FactSampler(random.Random(2))
    for _ in range(200):
        fact, *others = sampler.cluster(3)
        for other in others:
            same_attribute = other.attribute == fact.attribute
            shared = set(fact.subject.split()) & set(other.subject.split()) - {"the", "of"}
            assert same_attribute != (other.subject == fact.subject)
            assert shared, (fact, other)


@pytest.mark.parametrize("length", [600, 4096])
def test_haystack_holds_every_fact_and_keeps_its_length(tokenizer, length):
    source = text.topics(held_out=True)
    hay = facts.make_haystack(tokenizer, source, length, 6, seed=3)
    again = facts.make_haystack(tokenizer, source, length, 6, seed=3)
    assert hay == again and hay != facts.make_haystack(tokenizer, source, length, 6, seed=4)
    assert length - 2 * (6 + hay.num_distractors) <= len(hay.input_ids) <= length
    assert hay.input_ids == tokenizer.encode(hay.context).ids
    for fact, depth in zip(hay.facts, hay.depths):
        stated = [form for form in range(len(facts.STATEMENTS)) if fact.statement(form) in hay.context]
        assert stated and abs(hay.context.index(fact.statement(stated[-1])) / len(hay.context) - depth) < 0.02


def test_haystack_says_what_does_not_fit(tokenizer):
    with pytest.raises(ValueError, match="do not fit into 100 tokens"):
        facts.make_haystack(tokenizer, text.topics(held_out=True), 100, 20, seed=0)
    with pytest.raises(ValueError, match="give a longer text"):
        facts.make_haystack(tokenizer, "Too short. " * 20, 2048, 2, seed=0)


def test_held_out_topics_are_never_collected():
    held_out, training = text.topics(held_out=True), text.topics(held_out=False)
    assert len(held_out) > 100_000 and training
    documents = text.collect_text(max_bytes=2 << 20, doc_dir="/nonexistent")
    assert documents[0] == training
    lines = {line for line in held_out.split("\n") if len(line) > 60} - set(training.split("\n"))
    everything = "\n".join(documents)
    assert sum(line in everything for line in lines) < 0.02 * len(lines)


@pytest.mark.parametrize("kind", ["pure", "hay"])
def test_fact_rows_ask_only_what_an_earlier_sentence_states(builder, tokenizer, kind):
    ids, kinds = builder.build(batches.Spec(1024, 8, {kind: 1.0}, 64), 5)
    asked = 0
    for row, row_kinds in zip(ids, kinds):
        for first in np.flatnonzero(row_kinds == batches.FIRST):
            before = tokenizer.decode(row[:first].tolist(), skip_special_tokens=False)
            stop = first
            while stop < len(row) and row_kinds[stop] in (batches.FIRST, batches.REST):
                stop += 1
            if stop == len(row):  # cut off by the end of the row
                continue
            assert row[stop - 1] == batches.END_ID
            answer = tokenizer.decode(row[first : stop - 1].tolist()).strip()
            question = before[before.rindex("Question:") :]
            words = set(question.replace("?", " ").replace(",", " ").replace(".", " ").split())
            words -= {"Question:", "What", "what", "is", "the", "of", "For", "Tell", "me", "Answer:"}
            sentences = before[: before.rindex("Question:")].replace("\n", " ").split(f"is {answer}.")[:-1]
            assert any(all(word in sentence[-160:] for word in words) for sentence in sentences), question
            asked += 1
    assert asked > 8


def test_mqar_rows_have_one_value_per_key(builder):
    spec = batches.Spec(256, 16, {"mqar": 1.0}, 500, key_tokens=3, value_tokens=4)
    for seed in range(6):
        ids, kinds = builder.build(spec, seed)
        run = kinds[0] == batches.MQAR
        first = int(np.flatnonzero(run)[0])
        value = int(np.argmin(run[first:])) or len(run) - first
        key = int(np.argmax(run[first + value :])) if run[first + value :].any() else 0
        if not key:
            continue
        for row in ids:
            half = row[first - key :]
            pairs = {tuple(p[:key]): tuple(p[key:]) for p in half.reshape(-1, key + value).tolist()}
            stated = row[first - key - len(half) : first - key].reshape(-1, key + value).tolist()
            assert len(pairs) == len(stated)
            assert all(pairs[tuple(p[:key])] == tuple(p[key:]) for p in stated)


def test_batches_are_a_function_of_spec_and_seed(builder):
    spec = batches.Spec(128, 16, {"mqar": 0.3, "repeat": 0.2, "pure": 0.3, "text": 0.2}, 100, 2, 3)
    first, second, other = (builder.build(spec, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(first[0], other[0])
    assert set(np.unique(first[1])) == set(range(6))


@pytest.mark.parametrize("stages", [curriculum.h200(), curriculum.smoke()], ids=["h200", "smoke"])
def test_curriculum_can_be_passed_and_cannot_stall(stages):
    deadlines = [stage.deadline for stage in stages]
    assert deadlines == sorted(deadlines) and deadlines[-1] == 1.0
    rows_of = {"fact": {"pure", "hay"}, "rest": {"pure", "hay"}, "mqar": {"mqar"}, "repeat": {"repeat"}}
    for stage in stages:
        assert all(rows_of[kind] & set(stage.mix) for kind in stage.gates), stage.name
        assert abs(sum(stage.mix.values()) - 1) < 1e-6 and sum(stage.shorter.values()) < 1
        assert stage.spec(131072, 0.999).length == stage.length


def _tiny_model():
    torch.manual_seed(0)
    model = PocketLM(TINY)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value += 0.1 * torch.randn_like(value)
    return model.eval()


def test_network_equals_qwen3():
    model = _tiny_model()
    ids = torch.randint(0, 4096, (2, 100))
    ours, theirs = model(ids, torch.float32), model.to_transformers(torch.float32)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_batched_muon_equals_muon():
    shapes = ((8, 16), (16, 8), (8, 16), (8, 8))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = (BatchedMuon(ours), torch.optim.Muon(theirs, lr=0.02))
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 2**-7 * 0.02 * 3 * 2  # bf16 rounding of three updates, two singular values


def test_questions_are_answered_alike_in_chunks_token_by_token_and_without_cache(tokenizer):
    model = _tiny_model().to_transformers(torch.float32)
    hay = facts.make_haystack(tokenizer, text.topics(held_out=True), 500, 4, seed=1)
    chunk = answer_questions(model, hay, "chunk", batch=2)
    assert chunk == answer_questions(model, hay, "decode")
    for ids, answer in zip(hay.question_ids, chunk):
        sequence = [*hay.input_ids, *ids]
        for token in answer[:4]:
            assert model(torch.tensor([sequence])).logits[0, -1].argmax().item() == token
            sequence.append(token)
    with pytest.raises(ValueError, match="feed must be"):
        answer_questions(model, hay, "fast")


def test_card_needs_every_fact():
    with pytest.raises(UndefinedError):
        publish.render_card({"parameters": 1})


def test_smoke_run_exports_a_model_that_loads_and_resumes(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, state = tmp_path / "out", tmp_path / "state"
    command = [sys.executable, "-m", "recipes.pocket_lm.train", "--preset", "smoke", "--state", str(state)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--minutes", "0.05", "--out", str(out)], cwd=ROOT, env=env, check=True, timeout=240)
    log = json.loads((out / "training.json").read_text())
    assert [stage["stage"] for stage in log["log"]["stages"]] == [stage.name for stage in curriculum.smoke()]
    assert log["evaluation"]["retrieval"][0]["questions"] > 0
    card = (out / "README.md").read_text()
    assert "| 512 |" in card and f"{log['steps']} steps" in card
    model, reader = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.head_dim == 16 and model.config.tie_word_embeddings
    saved = torch.load(state / "state.pt", weights_only=False)["model"]
    for name, value in model.model.state_dict().items():
        assert torch.equal(value.float(), saved[name].bfloat16().float()), name
    prompt = reader("A text.\nQuestion: What is the code of the old mill?\nAnswer:", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= prompt["input_ids"].shape[1] + 4 and model.generation_config.eos_token_id == 0

    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "notes.txt").write_text("of the user")
    resumed = [*command, "--minutes", "0.1", "--resume", "--pack", "--out", str(tmp_path / "packed")]
    subprocess.run(resumed, cwd=ROOT, env=env, check=True, timeout=240)
    with tarfile.open(tmp_path / "packed" / "meta.tar") as archive:
        later = json.load(archive.extractfile("training.json"))
    assert later["steps"] > log["steps"] and len(later["log"]["calls"]) == 2
    assert {p.name for p in (tmp_path / "packed").iterdir()} == {"meta.tar", "model.safetensors", "notes.txt"}

    subprocess.run(
        [*command, "--minutes", "0.03", "--init", str(out), "--out", str(tmp_path / "more")],
        cwd=ROOT, env=env, check=True, timeout=240,
    )  # fmt: skip
    tuned = json.loads((tmp_path / "more" / "training.json").read_text())["log"]
    assert [stage["stage"] for stage in tuned["stages"]] == ["hay 256"]
