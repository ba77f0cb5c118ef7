"""`attn_implementation="<org>/unique-attention"` without a package of ours generates what the pip route generates."""

import pytest
import torch
import transformers

from tests.hub.loopback import KERNEL_CLIENT, LoopbackHub
from tests.processes import run_python

pytest.importorskip("kernels")

REPO = "acme/unique-attention"
SETTINGS = {"page_size": 4, "budget": 32, "sink_pages": 1, "recent_pages": 2}
# `unique_hf` and `unique_attention` cannot be imported; the kernel has to do alone
ALONE = "import sys\nsys.modules['unique_hf'] = sys.modules['unique_attention'] = None\n"
GENERATE = """
import torch
from transformers import AutoModelForCausalLM

def logits(implementation, model=None, **load):
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation=implementation, **load)
    ids = torch.randint(3, 90, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0,
                         output_logits=True, return_dict_in_generate=True)
    return {"tokens": out.sequences[:, 150:], "logits": torch.stack(out.logits)}
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(trusted=("acme",)) as hub:
        yield hub


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.unique_attention = SETTINGS
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generate(model_folder, tmp_path_factory):
    """Runs code after GENERATE in a fresh process; it saves `result`, which comes back."""

    def run(code, alone=True, env=None):
        folder = tmp_path_factory.mktemp("run")
        offline = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        where = f"FOLDER, OUT = {str(model_folder)!r}, {str(folder / 'out.pt')!r}\n"
        code = (ALONE if alone else "") + where + GENERATE + code + "\ntorch.save(result, OUT)"
        paths = {"paths": ()} if alone else {}
        run_python(code, env=offline | (env or {}), **paths)
        return torch.load(folder / "out.pt")

    return run


@pytest.fixture(scope="module")
def by_pip(generate):
    return generate("import unique_hf\nresult = {i: logits(i) for i in ('unique', 'sdpa')}", alone=False)


def assert_same(result, expected):
    assert torch.equal(result["tokens"], expected["tokens"])
    torch.testing.assert_close(result["logits"], expected["logits"])


def test_the_pip_route_is_sparse(by_pip):
    first, later = (by_pip["unique"]["logits"] - by_pip["sdpa"]["logits"]).abs().amax((1, 2))[:2]
    assert first < 1e-5 and later > 1e-2


def test_local_kernels_gives_the_tokens_of_the_pip_route(generate, by_pip, staged_kernel):
    code = f"""
model = AutoModelForCausalLM.from_pretrained(FOLDER)
before = logits(None, model)
model.set_attn_implementation({REPO!r})
result = {{"before": before, "set": logits(None, model), "loaded": logits({REPO!r})}}
model.set_attn_implementation("sdpa")
result["after"] = logits(None, model)"""
    result = generate(code, env={"LOCAL_KERNELS": f"{REPO}={staged_kernel}"})
    assert_same(result["loaded"], by_pip["unique"])
    assert_same(result["set"], by_pip["unique"])
    for when in ("before", "after"):
        assert torch.equal(result[when]["logits"], by_pip["sdpa"]["logits"]), when


def test_hub_kernel_gives_the_tokens_of_the_pip_route(generate, by_pip, hub, staged_kernel, tmp_path):
    pytest.importorskip("huggingface_hub", minversion=KERNEL_CLIENT)
    publish = f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_repo({REPO!r}, repo_type="kernel")
api.create_branch({REPO!r}, branch="v1", repo_type="kernel")
api.upload_folder(repo_id={REPO!r}, folder_path={str(staged_kernel)!r}, repo_type="kernel", revision="v1")"""
    env = hub.environment(tmp_path)
    run_python(publish, paths=(), env=env)
    code = f"result = {{'trusted': logits({REPO!r}), 'pinned': logits('{REPO}@v1', allow_all_kernels=True)}}"
    result = generate(code, env=env)
    assert_same(result["trusted"], by_pip["unique"])
    assert_same(result["pinned"], by_pip["unique"])


def test_kernel_and_pip_route_share_a_process(generate, by_pip, staged_kernel):
    code = f"""
import unique_hf
result = {{"kernel": logits({REPO!r}), "pip": logits("unique")}}"""
    result = generate(code, alone=False, env={"LOCAL_KERNELS": f"{REPO}={staged_kernel}"})
    assert_same(result["kernel"], by_pip["unique"])
    assert_same(result["pip"], by_pip["unique"])


def test_pip_route_on_a_staged_kernel(generate, by_pip, staged_kernel):
    code = "import unique_hf\nresult = logits('unique')"
    env = {"UNIQUE_HF_KERNEL": str(staged_kernel)}
    assert_same(generate(code, alone=False, env=env), by_pip["unique"])
