"""From trained weights to a folder that `from_pretrained` loads: shards, tokenizer, evaluation, card, archive."""

import json
import tarfile
import time
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.pocket_lm import tokenizer as tokenizers
from recipes.pocket_lm.evaluate import bits_per_byte, retrieval

HERE = Path(__file__).parent
# what `save` writes beside the weights
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training.json", "README.md",
)  # fmt: skip


def save(model, out, facts, lengths, contexts, device, dtype=torch.bfloat16):
    """Writes weights and tokenizer, reloads them, evaluates what was reloaded, and writes log and card.

    Args:
        model (`PocketLM`): Trained.
        out (`Path`): Folder, created if missing.
        facts (`dict`): Facts of the training; `evaluation` is added, the whole becomes `training.json`.
        lengths (`list[int]`): Context lengths to evaluate.
        contexts (`int`): Haystacks per length.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    model.to_transformers(dtype).save_pretrained(out, max_shard_size="14MB")
    tokenizers.save_tokenizer(tokenizers.load_tokenizer(), out, model.shape.max_position_embeddings)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")  # nothing is lost if the evaluation fails
    on_gpu = device.type == "cuda"
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=dtype if on_gpu else torch.float32).to(device).eval()
    reader = AutoTokenizer.from_pretrained(out)
    start = time.monotonic()
    rows = retrieval(loaded, reader, lengths, contexts, batch=32 if on_gpu else 4)
    facts["evaluation"] = {
        "retrieval": rows,
        "bits_per_byte": bits_per_byte(loaded, reader, length=min(2048, model.shape.max_position_embeddings)),
        "dtype": str(loaded.dtype),
        "seconds": round(time.monotonic() - start, 1),
        "summary": {str(row["context"]): round(row["accuracy"], 4) for row in rows},
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "README.md").write_text(render_card(facts))


def render_card(facts):
    """The model card; every number in it comes from `facts`."""
    environment = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("card.md.jinja").render(**facts)


def pack(out, names):
    """Moves the small files of a checkpoint into `out/meta.tar`; whatever else lies in `out` stays.

    Args:
        out (`Path`): Folder that `save` wrote.
        names (`Sequence[str]`): The files; those of `names` that are not there are an error.
    """
    paths = [out / name for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"expected {', '.join(names)} in {out}, {', '.join(missing)} are missing: call `save` first")
    with tarfile.open(out / "meta.tar", "w") as archive:
        for path in paths:
            archive.add(path, arcname=path.name)
    for path in paths:
        path.unlink()
