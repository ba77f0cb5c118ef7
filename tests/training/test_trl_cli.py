"""`trl sft --attn_implementation <org>/unique-attention` trains with the Hub kernel and no package of ours."""

import json

import pytest

from tests.processes import run_python
from tests.training.tiny import documents, make_model, make_tokenizer

pytest.importorskip("kernels")

REPO = "acme/unique-attention"


def test_trl_sft_trains_with_the_hub_kernel_alone(staged_kernel, tmp_path):
    make_model(attention="sdpa").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents()))
    options = [
        "sft", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data), "--attn_implementation",
        REPO, "--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--per_device_train_batch_size", "4",
        "--learning_rate", "5e-3", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true", "--bf16",
        "false", "--dtype", "float32", "--packing", "true", "--max_length", "96", "--save_strategy", "no",
    ]  # fmt: skip
    code = f"""
import sys
sys.modules["unique_hf"] = sys.modules["unique_attention"] = None
sys.argv = {options!r}
from trl.scripts.sft import main, make_parser
main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
activity = sys.modules[ALL_ATTENTION_FUNCTIONS[{REPO!r}].__module__].activity.ACTIVITY
print("counted", sum(a.soft_rows for a in activity.values()), sum(a.prompt_rows for a in activity.values()))"""
    shown = run_python(code, paths=(), env={"LOCAL_KERNELS": f"{REPO}={staged_kernel}"})
    soft, prompt = (int(word) for word in shown[shown.index("counted") + 1 :][:2])
    assert soft > 0 and prompt == 0 and soft % 2 == 0
    settings = json.loads((tmp_path / "out/config.json").read_text())["unique_attention"]
    assert settings["budget"] == 16 and (tmp_path / "out/model.safetensors").exists()
