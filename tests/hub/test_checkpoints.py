"""Checkpoints go to a Hub with settings and card and come back; whatever goes wrong on the way loses nothing."""

import json
import re

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import unique_hf
from tests.hub.loopback import KERNEL_CLIENT, LoopbackHub
from tests.processes import run_python

SETTINGS = {"page_size": 4, "budget": 32, "sink_pages": 1, "recent_pages": 2}
KERNEL = "acme/unique-attention"
FACTS = {
    "summary": "A test.", "licence": "apache-2.0", "base_model": "acme/base", "datasets": ["acme/data"],
    "tables": [{"title": "Accuracy", "columns": ["budget", "accuracy"], "rows": [["32", "0.5"]], "note": "Made up."}],
}  # fmt: skip
GENERATE = """
import torch
from transformers import AutoModelForCausalLM

def tokens(where, implementation="unique"):
    model = AutoModelForCausalLM.from_pretrained(where, attn_implementation=implementation)
    ids = torch.randint(3, 90, (2, 150), generator=torch.Generator().manual_seed(0))
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 150:].flatten().tolist(), model
"""
PUSH = """
import unique_hf
try:
    print(unique_hf.push_checkpoint(FOLDER, REPO))
except OSError as error:
    print(type(error).__name__, str(error))
"""


def make_model():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.unique_attention = SETTINGS
    return transformers.Qwen3ForCausalLM(config)


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(trusted=("acme",)) as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("checkpoint")
    return unique_hf.save_checkpoint(make_model(), where, facts=FACTS, location="acme/pushed", max_shard_size="200KB")


@pytest.fixture(scope="module")
def local_tokens(folder):
    return run_python(f"import unique_hf{GENERATE}print(*tokens({str(folder)!r})[0])")


def push(folder, repo):
    return f"FOLDER, REPO = {str(folder)!r}, {repo!r}\n{PUSH}"


@pytest.fixture(scope="module")
def pushed(hub, folder, tmp_path_factory):
    run_python(push(folder, "acme/pushed"), env=hub.environment(tmp_path_factory.mktemp("home")))
    repo = hub.repos["models", "acme/pushed"]
    return repo.commits[repo.branches["main"]]


def test_checkpoint_holds_safetensors_settings_and_card(folder, pushed):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path: file.content for path, file in pushed.items() if path != ".gitattributes"} == files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    settings = json.loads(files["config.json"])["unique_attention"]
    assert settings == unique_hf.UniqueConfig(**SETTINGS).to_dict()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.base_model == "acme/base"
    assert "unique-attention" in card.data.tags and card.data.datasets == ["acme/data"]
    assert "| 32 | 0.5 |" in card.text and "| `page_size` | 4 |" in card.text and "Made up." in card.text


def test_code_of_the_card_runs(folder):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("acme/pushed", str(folder)).replace("AutoTokenizer.from_pretrained", "str")
    assert run_python(code + "\nprint(model.config.unique_attention['budget'])") == ["32"]


def test_round_trip_gives_the_same_tokens_online_and_offline(hub, pushed, local_tokens, tmp_path):
    code = f"import unique_hf{GENERATE}found, model = tokens('acme/pushed')\nprint(*found)\n"
    code += "print(unique_hf.report(model).sparse_rows > 0)"
    env = hub.environment(tmp_path)
    assert run_python(code, env=env) == [*local_tokens, "True"]
    asked = len(hub.requests)
    assert run_python(code, env=env | {"HF_HUB_OFFLINE": "1"}) == [*local_tokens, "True"]
    assert len(hub.requests) == asked


def test_kernel_and_checkpoint_from_the_hub_need_no_package(hub, pushed, local_tokens, staged_kernel, tmp_path):
    pytest.importorskip("kernels")
    pytest.importorskip("huggingface_hub", minversion=KERNEL_CLIENT)
    publish = f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_repo({KERNEL!r}, repo_type="kernel")
api.create_branch({KERNEL!r}, branch="v1", repo_type="kernel")
api.upload_folder(repo_id={KERNEL!r}, folder_path={str(staged_kernel)!r}, repo_type="kernel", revision="v1")"""
    env = hub.environment(tmp_path)
    run_python(publish, paths=(), env=env)
    alone = "import sys\nsys.modules['unique_hf'] = sys.modules['unique_attention'] = None\n"
    code = f"{alone}{GENERATE}print(*tokens('acme/pushed', {KERNEL!r})[0])"
    assert run_python(code, paths=(), env=env) == local_tokens


def test_wrong_token_keeps_the_model_on_disk(hub, tmp_path):
    code = """
import json, pathlib, unique_hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
try:
    unique_hf.push_checkpoint(model, "acme/refused")
except PermissionError as error:
    print(error)"""
    unique_hf.save_checkpoint(make_model(), tmp_path / "source")
    code = f"FOLDER = {str(tmp_path / 'source')!r}\n{code}"
    answer = " ".join(run_python(code, env=hub.environment(tmp_path / "home", token="hf_wrong")))
    assert "expected a token that may write to 'acme/refused', got status 401" in answer and "hf auth login" in answer
    kept = re.search(r"push_checkpoint\('([^']+)', 'acme/refused'\)", answer)[1]
    env = hub.environment(tmp_path / "home")
    assert run_python(push(kept, "acme/refused"), env=env)[0].startswith(hub.url)
    repo = hub.repos["models", "acme/refused"]
    assert "model.safetensors" in repo.commits[repo.branches["main"]]


def test_missing_repository_and_wrong_names_are_clear(hub, folder, tmp_path):
    code = f"""
import unique_hf
for repo in ("acme/none", "a/b/c"):
    try:
        unique_hf.push_checkpoint({str(folder)!r}, repo, create=False)
    except (OSError, ValueError) as error:
        print(type(error).__name__, str(error), "|")
try:
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("acme/none", attn_implementation="unique")
except OSError as error:
    print(error)"""
    answer = " ".join(run_python(code, env=hub.environment(tmp_path)))
    missing, name, load = answer.split(" | ")
    assert missing.startswith("FileNotFoundError expected a repository 'acme/none', the Hub has none")
    assert name.startswith("ValueError expected '<user or org>/<name>' as repository, got 'a/b/c'")
    assert "acme/none is not a local folder" in load


@pytest.mark.parametrize(("method", "part", "times"), [("POST", "/commit/", 9), ("PUT", "/lfs/", 99)])
def test_network_cut_in_mid_upload_publishes_nothing_and_resumes(hub, tmp_path, method, part, times):
    name = f"acme/cut-{method.lower()}"
    model = make_model()  # with weights of its own, or the Hub would have the files from another test
    torch.nn.init.constant_(model.lm_head.weight, times)
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, times)
    where = unique_hf.save_checkpoint(model, tmp_path / "model", max_shard_size="200KB")
    impatient = "import time\ntime.sleep = lambda seconds: None\n"
    env = hub.environment(tmp_path / "home")
    hub.cut(method, part, times)
    start = len(hub.requests)
    answer = " ".join(run_python(impatient + push(where, name), env=env))
    hub._cuts.clear()
    assert answer.startswith(f"ConnectionError the push to '{name}' broke off") and str(where) in answer
    repo = hub.repos["models", name]
    assert repo.commits[repo.branches["main"]] == {}
    arrived = {path.removeprefix("/lfs/") for kind, path in hub.requests[start:] if kind == "PUT"}
    arrived &= set(hub.lfs_objects)
    again = len(hub.requests)
    answer = run_python(push(where, name), env=env)
    assert answer[0].startswith(hub.url), " ".join(answer)
    sent = {path.removeprefix("/lfs/") for kind, path in hub.requests[again:] if kind == "PUT"}
    assert not sent & arrived and bool(arrived) == (method == "POST")
    tree = repo.commits[repo.branches["main"]]
    assert {path: tree[path].content for path in tree if path.endswith(".safetensors")} == {
        path.name: path.read_bytes() for path in where.glob("*.safetensors")
    }


def test_trainer_pushes_safetensors_settings_and_our_card(hub, tmp_path):
    pytest.importorskip("trl")
    code = f"""
from tests.training.tiny import make_trainer
import unique_hf
trainer = make_trainer({str(tmp_path / "out")!r}, steps=2, hub_model_id="acme/trained")
trainer.add_callback(unique_hf.SoftMaskCallback(trainer, unique_hf.SoftMaskSchedule(budget=(16, 32))))
trainer.train()
trainer.push_to_hub(dataset_name="acme/data")
"""
    run_python(code, env=hub.environment(tmp_path / "home"))
    repo = hub.repos["models", "acme/trained"]
    tree = repo.commits[repo.branches["main"]]
    assert "model.safetensors" in tree and "tokenizer.json" in tree
    settings = json.loads(tree["config.json"].content)["unique_attention"]
    assert (settings["budget"], settings["temperature"], settings["soft_mask"]) == (16, 2.0, True)
    card = ModelCard(tree["README.md"].content.decode())
    assert {"unique-attention", "trl", "sft"} <= set(card.data.tags) and card.data.datasets == "acme/data"
    assert 'from_pretrained("acme/trained"' in card.text and "| `budget` | 16 |" in card.text
    assert "trained using [TRL]" in card.text and card.text.count("\n# ") == 1


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"licensed": "mit"}, r"unknown facts \['licensed'\]"),
        ({"tables": [{"title": "A", "columns": ["a"], "rows": [[1, 2]]}]}, "expected 1 cells per row in table 'A'"),
    ],
)
def test_facts_that_do_not_fit_are_refused_before_anything_is_written(facts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        unique_hf.save_checkpoint(make_model(), tmp_path / "out", facts=facts)
    assert not (tmp_path / "out").exists()


def test_unmerged_adapters_and_incomplete_folders_are_refused(folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="pass model.merge_and_unload"):
        unique_hf.save_checkpoint(adapted, tmp_path / "out")
    with pytest.raises(ValueError, match="expected a folder with config.json"):
        unique_hf.push_checkpoint(tmp_path, "acme/empty")
    lost = max(folder.glob("*.safetensors")).name
    for path in folder.iterdir():
        if path.name != lost:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f"missing {lost}"):
        unique_hf.push_checkpoint(tmp_path, "acme/partial")
