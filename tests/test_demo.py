"""The demo: one prefill serves both ways, the picture shows what the scores say, bad input is a clear error."""

import json
import re
import shutil

import pytest
import torch

import unique_hf
from tests.processes import ROOT
from unique_hf import configure, demo, picture, recording, report, retrieval
from unique_hf.facts import make_haystack
from unique_hf.text import read_text, topics

FACTS = 5


@pytest.fixture(scope="module")
def pocket():
    torch.set_num_threads(1)
    return demo.load_model(None)


@pytest.fixture
def model(pocket):
    model = pocket[0]
    yield model
    model.config.unique_attention = None
    del model.config.unique_attention
    model.set_attn_implementation("unique")
    report(model, reset=True)


@pytest.fixture(scope="module")
def hay(pocket):
    return make_haystack(pocket[1], topics(held_out=True), 700, FACTS, seed=1)


@pytest.fixture
def cache(model, hay):
    return retrieval.prefill(model, hay.input_ids)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "TRAINED_MODEL", tmp_path / "none")


def test_the_demo_answers_alike_and_draws(pocket, alone, capsys, tmp_path):
    demo.main(["--context", "1200", "--facts", "6", "--out", str(tmp_path / "picture" / "demo.png")])
    out = capsys.readouterr().out
    length = int(re.search(r": ([\d,]+) tokens\n", out)[1].replace(",", ""))
    budget = int(re.search(r"budget ([\d,]+) tokens", out)[1].replace(",", ""))
    assert 0 < budget <= length / 16
    assert len(re.findall(r"^(?:What|Tell|For) .*", out, re.MULTILINE)) == 6
    assert "dense: 6 of 6 right" in out and re.search(r"unique: [56] of 6 right", out)
    read, present = (int(x.replace(",", "")) for x in re.search(r"pages: ([\d,]+) read of ([\d,]+)", out).groups())
    assert 0 < read < present / 10
    sparse, steps = re.search(r"([\d,]+) of ([\d,]+) steps x layers sparse", out).groups()
    assert sparse == steps
    assert (tmp_path / "picture" / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_a_trained_model_answers_beside_the_dense_one(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "pocket-lm-unique"
    shutil.copytree(demo.DEFAULT_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["unique_attention"] = unique_hf.UniqueConfig(page_size=8, budget=512).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(demo, "TRAINED_MODEL", folder)
    demo.main(["--context", "1200", "--facts", "4", "--out", str(tmp_path / "demo.png")])
    out = capsys.readouterr().out
    assert re.search(r"unique  budget 7\d tokens .* pages of 4,", out), "the default settings"
    # a page more than the three that are always kept
    assert re.search(r"tight  budget 32 tokens .* pages of 8,", out)
    assert re.search(r"^question +expected +dense +unique +tight +trained *$", out, re.MULTILINE)
    arms = ("dense", "unique", "tight", "trained")
    found = {name: int(re.search(rf"{name}: (\d) of 4 right", out)[1]) for name in arms}
    # the same weights and settings, so the same answers
    assert found["dense"] == 4 and found["tight"] == found["trained"]


def test_users_own_text_is_answered(pocket, alone, capsys, tmp_path):
    text = topics(held_out=True)[:2500].rsplit(".", 1)[0]
    file = tmp_path / "own.txt"
    file.write_text(f"{text}. The access code of the northern library is 48213. {text[:900]}")
    demo.main(["--text", str(file), "--ask", "What is the access code of the northern library?"])
    out = capsys.readouterr().out
    assert re.search(r"northern library\?\s+48213\s+48213", out)
    assert "right" not in out and "picture" not in out


def test_questions_of_different_lengths_are_answered_as_one_by_one(model, hay, cache):
    questions = sorted(hay.question_ids, key=len)[::2]
    assert len({len(ids) for ids in questions}) > 1
    configure(model, budget=128)
    for attention in ("sdpa", "unique"):
        model.set_attn_implementation(attention)
        together = retrieval.ask(model, cache, questions).ids
        alone = [retrieval.ask(model, cache, [ids]).ids[0] for ids in questions]
        assert together == alone and all(together)
    model.set_attn_implementation("sdpa")
    chunked = retrieval.ask(model, cache, questions, chunk=True)
    assert chunked.ids == retrieval.ask(model, cache, questions).ids
    assert chunked.chunked == min(map(len, questions)) - 1
    assert cache.get_seq_length() == len(hay.input_ids) and cache.layers[0].keys.shape[0] == 1


def test_several_contexts_are_answered_as_one_by_one(model, hay, cache):
    other = hay.input_ids[::-1]
    configure(model, budget=128)
    both = retrieval.prefill(model, [hay.input_ids, other])
    questions = hay.question_ids[:2]
    together = retrieval.ask(model, both, questions * 2).ids
    alone = [retrieval.ask(model, retrieval.prefill(model, ids), questions).ids for ids in (hay.input_ids, other)]
    assert together == alone[0] + alone[1] and alone[0] != alone[1]
    with pytest.raises(ValueError, match="equally many questions for each of 2 contexts, got 3"):
        retrieval.ask(model, both, hay.question_ids[:3])
    with pytest.raises(ValueError, match="contexts of one length"):
        retrieval.prefill(model, [[1, 2], [3]])


def test_answers_are_those_of_generate(pocket, model, hay, cache):
    model.set_attn_implementation("sdpa")
    answers = retrieval.ask(model, cache, hay.question_ids).ids
    for ids, found, fact in zip(hay.question_ids, answers, hay.facts):
        prompt = torch.tensor([hay.input_ids + ids])
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        assert tokens[0, prompt.shape[1] :].tolist()[: len(found)] == found
        assert pocket[1].decode(found).strip() == fact.answer


def test_a_question_needs_a_token(model, cache):
    for questions in ([], [[5], []]):
        with pytest.raises(ValueError, match="at least one token"):
            retrieval.ask(model, cache, questions)


def test_recording_leaves_no_trace_and_changes_nothing(model, hay, cache):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model.set_attn_implementation("sdpa")
    plain = retrieval.ask(model, cache, hay.question_ids).ids
    model.set_attn_implementation("unique")
    with pytest.raises(RuntimeError, match="stop"), recording.recorded(model) as seen:
        assert retrieval.ask(model, cache, hay.question_ids).ids == plain
        steps = len(seen.queries[0])
        # several tokens on a warm cache need a mask, and are no decode steps
        chunked = retrieval.ask(model, cache, hay.question_ids, chunk=True)
        assert chunked.ids == plain and len(seen.queries[0]) == 2 * steps - chunked.chunked
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "unique" and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    assert sorted(seen.queries) == list(range(model.config.num_hidden_layers))
    query = seen.at(0, [0] * FACTS)
    assert query.shape == (FACTS, model.config.num_attention_heads, 1, model.config.head_dim)
    assert torch.equal(query[0], query[1]) and not torch.equal(query, seen.at(0, [3] * FACTS))  # "\n" comes first


def test_masses_scores_and_kept_pages_fit_together(model, hay, cache):
    settings = configure(model, page_size=8, budget=64, score="oracle", stats_dtype="fp32")
    with recording.recorded(model) as seen:
        retrieval.ask(model, cache, hay.question_ids)
    query, keys = seen.at(3, [len(ids) - 1 for ids in hay.question_ids]), cache.layers[3].keys
    mass = recording.token_mass(query, keys, seen.scaling[3])
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:2]))
    for row, head in ((0, 0), (2, 1)):
        each = [torch.softmax(keys[0, head] @ query[row, 4 * head + g, 0] * 128**-0.5, -1) for g in range(4)]
        torch.testing.assert_close(mass[row, head], sum(each) / 4)
    pages = recording.by_page(mass, 8)
    assert pages.shape[-1] == -(-keys.shape[2] // 8)
    torch.testing.assert_close(pages[..., 5], mass[..., 40:48].sum(-1))
    kept = {}
    for form in ("oracle", "mean"):
        form_settings = settings.replace(score=form)
        scores = recording.page_scores(query, keys, form_settings, seen.scaling[3])
        kept[form] = recording.kept_pages(query, keys, form_settings, seen.scaling[3])
        assert kept[form].shape == scores.shape and scores[kept[form]].isfinite().all()
        assert (kept[form].sum(-1) == 8).all() and kept[form][..., 0].all() and kept[form][..., -2:].all()
    recall = {form: float((pages * chosen).sum(-1).mean()) for form, chosen in kept.items()}
    assert recall["oracle"] > recall["mean"] > 0.02


def test_picture_shows_the_head_that_looks_away_and_keeps_its_pages(pocket, model, hay, cache, tmp_path):
    settings = configure(model, budget=64)
    with recording.recorded(model) as seen:
        retrieval.ask(model, cache, hay.question_ids)
    view = picture.sharpest_view([(seen, [len(ids) - 1 for ids in hay.question_ids])], cache, settings)
    assert view.mass.shape == view.scores.shape == view.kept.shape == (FACTS, -(-len(hay.input_ids) // 4))
    query = seen.at(view.layer, [len(ids) - 1 for ids in hay.question_ids])
    mass = recording.token_mass(query, cache.layers[view.layer].keys, seen.scaling[view.layer])
    by_head = recording.by_page(mass, 4)[..., 1:-2].amax(-1).mean(0)
    assert by_head.argmax() == view.head and by_head.min() < by_head.max()
    peaks = view.mass[:, 1:-2].amax(-1)
    assert peaks.mean() > 0.3, "no head looks at the facts"
    # the pages that the head looks at are where the facts stand
    for row, fact in enumerate(hay.facts):
        where = view.mass[row, 1:-2].argmax().item() + 1
        around = pocket[1].decode(hay.input_ids[max(0, 4 * where - 60) : 4 * where + 60])
        assert fact.answer in around
    assert 0.5 < view.recall <= 1.0001
    values = picture.columns_of(torch.arange(10.0).reshape(1, 10), columns=4)
    assert values.tolist() == [[2.0, 5.0, 8.0, 9.0]]
    picture.draw(view, tmp_path / "p.png", 4)
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_budget_is_a_sixteenth_unless_the_default_is_less(pocket, model):
    def task(length):
        return demo.Task([1] * length, ["q"], [[1]], None, "test")

    assert demo.fit(model, task(20_000)).budget == 1024
    assert demo.fit(model, task(3_300)).budget == 204
    assert demo.fit(model, task(3_300), share=64).budget == 48
    assert demo.fit(model, task(20)).budget == 16


BAD = {
    "missing": (None, "does not exist"),
    "empty": (b" \n\n", "which is empty"),
    "binary": (b"\x7fELF\x02\x01\x00\xff\xfe", "is not"),
    "zeros": (b"text\0text", "zero bytes"),
    "folder": ("folder", "not a file"),
    "long": (b"word " * 40_000, "context of at most 32,"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_clear_errors(kind, pocket, tmp_path, capsys, monkeypatch):
    content, message = BAD[kind]
    file = tmp_path / "file.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(demo, "load_model", lambda name: pocket)
    with pytest.raises(SystemExit) as stop:
        demo.main(["--text", str(file), "--ask", "What?"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--text", "x.txt"], "belong together"),
        (["--ask", "What?"], "belong together"),
        (["--facts", "0"], "--facts must be at least 1"),
        (["--model", "no/such/folder/here"], "expected a model folder or Hub id, got 'no/such/folder/here'"),
        (["--context", "200"], "do not fit into 200 tokens"),
        (["--context", "900000"], "give a longer text"),
    ],
)
def test_bad_arguments_are_clear_errors(arguments, message, pocket, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_installation_without_the_model_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "DEFAULT_MODEL", tmp_path / "models" / "pocket-lm")
    with pytest.raises(SystemExit):
        demo.main([])
    assert "--model PATH_OR_HUB_ID" in capsys.readouterr().err


def test_text_files_are_read_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffA naïve\r\ntext".encode())
    assert read_text(tmp_path / "a.txt") == "A naïve\ntext"
    assert demo.CHECKOUT == ROOT
