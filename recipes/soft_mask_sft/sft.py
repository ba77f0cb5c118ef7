"""Fine-tunes a model through the soft mask with TRL, so that hard top-k decoding loses less afterwards.

    python -m recipes.soft_mask_sft.sft --config recipes/soft_mask_sft/smoke.yaml
    accelerate launch --config_file recipes/soft_mask_sft/fsdp2.yaml -m recipes.soft_mask_sft.sft --config CONFIG

Every key of the YAML can be given on the command line too. The checkpoint in `output_dir` has the settings in its
configuration and a card; `push_to_hub: true` sends it to the Hub.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import unique_hf

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
COLUMNS = ("text", "messages", "prompt", "completion")


@dataclass
class SoftMaskArguments:
    """The mask; temperatures are in units of attention logits, budgets in tokens."""

    page_size: int = field(default=16, metadata={"help": "Tokens per page."})
    budget: int = field(default=1024, metadata={"help": "Tokens kept at inference; goes into the checkpoint."})
    score: str = field(default="scalar", metadata={"help": "Form of the page score."})
    first_temperature: float = field(default=0.5, metadata={"help": "Width of the sigmoid at the first step."})
    last_temperature: float = field(default=0.08, metadata={"help": "Width of the sigmoid at the last step."})
    least_budget: int | None = field(default=None, metadata={"help": "Budgets are drawn from here ..."})
    most_budget: int | None = field(default=None, metadata={"help": "... to here; by default a quarter to 4 times."})
    dense_share: float = field(default=0.5, metadata={"help": "Share of steps without the mask."})
    probe_rows: int = field(default=2, metadata={"help": "Rows to measure recall and losses on; 0 for none."})
    probe_length: int = field(default=8192, metadata={"help": "Longest of them, in tokens."})
    probe_every: int = field(default=50, metadata={"help": "Steps between measurements."})


def read_dataset(script: ScriptArguments) -> Dataset:
    """The training split of a Hub data set, or of a local file or folder of files of one format.

    Args:
        script (`ScriptArguments`): `dataset_name` (a path or an id), `dataset_config`, `dataset_train_split`.
    Returns:
        `Dataset`: With the columns that TRL reads (`text`, `messages`, or `prompt` and `completion`) and no others.
    Raises:
        ValueError: unknown file format, or none of these columns.
    """
    path = Path(script.dataset_name)
    if path.exists():
        files = sorted(p for p in path.iterdir() if p.suffix in FORMATS) if path.is_dir() else [path]
        formats = {FORMATS.get(p.suffix) for p in files}
        if len(formats) != 1 or None in formats:
            raise ValueError(
                f"expected files of one format of {', '.join(FORMATS)}, got {[p.name for p in files]}: change "
                "`dataset_name`"
            )
        data = load_dataset(formats.pop(), data_files=[str(p) for p in files], split="train")
    else:
        data = load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    kept = [name for name in data.column_names if name in COLUMNS]
    if not kept:
        raise ValueError(f"expected a column of {', '.join(COLUMNS)}, got {data.column_names}: rename one")
    return data.select_columns(kept)


def probe_batch(trainer: SFTTrainer, rows: int, length: int, seed: int) -> dict[str, torch.Tensor] | None:
    """The longest of a sample of tokenised training rows, right-padded to one length; the same on every process."""
    if rows == 0:
        return None
    data = trainer.train_dataset.shuffle(seed=seed).select(range(min(256, len(trainer.train_dataset))))
    found = sorted(data["input_ids"], key=len, reverse=True)[:rows]
    found = [ids[:length] for ids in found]
    batch = {"input_ids": torch.zeros(len(found), max(map(len, found)), dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, ids in enumerate(found):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
    return batch


def main() -> None:
    """Reads the configuration, trains, saves, and pushes where asked."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SoftMaskArguments))
    script, args, model_args, mask = parser.parse_args_and_config()
    args.model_init_kwargs = {
        **(args.model_init_kwargs or {}),
        "attn_implementation": model_args.attn_implementation or "unique",
        "revision": model_args.model_revision,
        "dtype": model_args.dtype or "auto",
    }
    trainer = SFTTrainer(
        model_args.model_name_or_path,
        args,
        train_dataset=read_dataset(script),
        peft_config=get_peft_config(model_args),
    )
    unique_hf.configure(trainer.model, page_size=mask.page_size, budget=mask.budget, score=mask.score)
    least = mask.least_budget or max(mask.budget // 4, 4 * mask.page_size)
    schedule = unique_hf.SoftMaskSchedule(
        temperature=(mask.first_temperature, mask.last_temperature),
        budget=(least, mask.most_budget or 4 * mask.budget),
        dense_share=mask.dense_share,
        seed=args.seed,
    )
    probe = None
    if not args.packing:
        probe = probe_batch(trainer, mask.probe_rows, mask.probe_length, args.seed)
    trainer.add_callback(unique_hf.SoftMaskCallback(trainer, schedule, probe=probe, probe_every=mask.probe_every))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name=script.dataset_name)
    print(unique_hf.report(trainer.model))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()
