"""Checkpoints with their settings and a card, on disk and on the Hub.

May import torch, Transformers, huggingface_hub and the kernel's public names.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from transformers import AutoConfig

from .backend import kernel_module
from .configure import ATTRIBUTE, configure

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAG = "unique-attention"
# settings of inference; the rest steers training or debugging
SHOWN = (
    "page_size", "budget", "sink_pages", "recent_pages", "score", "score_weight", "group_reduce", "stats_dtype",
    "super_page_size", "super_budget", "dense_below",
)  # fmt: skip
# what trainers leave beside a checkpoint and do not push themselves
IGNORED = ["_*", "checkpoint-*/**"]
FACTS = ("summary", "licence", "base_model", "datasets", "tags", "tables")


def render_card(config: Any, location: str, facts: Mapping[str, Any] | None = None, appendix: str = "") -> ModelCard:
    """The model card of a checkpoint: how to load it, its settings, and facts about it.

    Args:
        config (`PreTrainedConfig`): Its configuration, with the settings of UNIQUE attention.
        location (`str`): Repository id or folder that users load it from.
        facts (`Mapping`, *optional*): `summary` (a sentence or two), `licence` (its identifier on the Hub),
            `base_model`, `datasets`, `tags`, and `tables`: mappings with `title`, `columns`, `rows`, perhaps `note`.
        appendix (`str`, *optional*, defaults to `""`): Markdown for the end.
    Returns:
        `ModelCard`: The card.
    Raises:
        ValueError: unknown facts, or a table whose rows do not fit its columns.
    """
    facts = dict(facts or {})
    if unknown := set(facts) - set(FACTS):
        raise ValueError(f"unknown facts {sorted(unknown)} for a model card; known: {', '.join(FACTS)}")
    tables = facts.get("tables") or []
    for table in tables:
        if any(len(row) != len(table["columns"]) for row in table["rows"]):
            raise ValueError(f"expected {len(table['columns'])} cells per row in table {table['title']!r}, got others")
    text = config.get_text_config(decoder=True)
    values = getattr(text, ATTRIBUTE, None) or getattr(config, ATTRIBUTE, None) or {}
    settings = kernel_module().UniqueConfig.from_dict(values).to_dict()
    base, licence = facts.get("base_model"), facts.get("licence")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licence,
        base_model=base,
        datasets=facts.get("datasets"),
        tags=sorted({TAG, *(facts.get("tags") or ())}),
    )
    origin = f" Fine-tuned from `{base}`." if base else ""
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(),
        name=location.rstrip("/").split("/")[-1],
        location=location,
        summary=(facts.get("summary") or "A model for UNIQUE sparse attention (page-wise top-k).") + origin,
        licence=licence or "Not stated by the author. The licence of the base model applies where there is one.",
        settings={name: settings[name] for name in SHOWN},
        tables=[{"note": "", **table} for table in tables],
        appendix=appendix,
    )


def save_checkpoint(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: Any = None,
    facts: Mapping[str, Any] | None = None,
    location: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a model as safetensors, with its settings of UNIQUE attention in the configuration, and a card.

    Args:
        model (`PreTrainedModel`): The model.
        folder (`str` or `os.PathLike`): Where; created if missing.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer or processor to save beside it.
        facts (`Mapping`, *optional*): Facts for the card, see [`render_card`].
        location (`str`, *optional*): Repository id for the card; the folder's name by default.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Largest file of weights.
    Returns:
        `Path`: The folder.
    Raises:
        TypeError: `model` is not a Transformers model, or has adapters that are not merged.
        ValueError: the facts do not fit a card.
    """
    folder = Path(folder)
    if hasattr(model, "merge_and_unload"):
        raise TypeError(
            "expected a model whose adapters are merged, since an adapter has no configuration to hold the settings, "
            f"got {type(model).__name__}: pass model.merge_and_unload()"
        )
    configure(model)  # writes every setting out, so that later defaults do not change a checkpoint
    card = render_card(model.config, location or folder.name, facts)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    card.save(folder / "README.md")
    return folder


def push_checkpoint(
    checkpoint: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    facts: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    create: bool = True,
    commit_message: str = "Upload checkpoint",
    max_shard_size: str = "5GB",
) -> str:
    """Send a checkpoint to the Hub: weights, settings, tokenizer and card, in one commit.

    Args:
        checkpoint (`PreTrainedModel` or path): A model, or a folder that [`save_checkpoint`] or a trainer wrote.
        repo_id (`str`): `"<user or org>/<name>"`.
        tokenizer, facts, max_shard_size: For a model, as in [`save_checkpoint`].
        private (`bool`, *optional*): Visibility of a new repository.
        token (`str`, *optional*): Access token; by default that of the login.
        create (`bool`, *optional*, defaults to `True`): Create the repository if there is none.
        commit_message (`str`, *optional*): Of the commit.
    Returns:
        `str`: URL of the commit.
    Raises:
        ValueError: not a checkpoint, or not a repository id.
        PermissionError: the token is missing, wrong, or may not write there.
        FileNotFoundError: there is no such repository and `create` is off.
        ConnectionError: the network failed. The files stay on disk, the message says where; pushing that folder again
            sends only what the Hub does not have yet.
    """
    temporary = None
    if isinstance(checkpoint, (str, os.PathLike)):
        folder = _checked(Path(checkpoint))
        _name_in_card(folder, repo_id, facts)
    else:
        temporary = folder = Path(tempfile.mkdtemp(prefix="unique-checkpoint-"))
        save_checkpoint(
            checkpoint, folder, tokenizer=tokenizer, facts=facts, location=repo_id, max_shard_size=max_shard_size
        )
    api = HfApi(token=token)
    try:
        if create:
            api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=["_*", "checkpoint-*/**"],
        )
    except HFValidationError as error:
        raise ValueError(f"expected '<user or org>/<name>' as repository, got {repo_id!r}: {error}") from error
    except (HTTPError, RuntimeError) as error:
        # the upload of large files wraps what went wrong
        reason = error if isinstance(error, HTTPError) else error.__cause__
        if not isinstance(reason, HTTPError):
            raise
        raise _explained(reason, repo_id, folder) from error
    if temporary is not None:
        shutil.rmtree(temporary)
    return commit.commit_url


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"expected a folder with config.json and *.safetensors, got {str(folder)!r}: write it with save_checkpoint"
        )
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ValueError(f"expected all shards that {index.name} names, missing {', '.join(missing)}: save again")
    return folder


def _name_in_card(folder: Path, repo_id: str, facts: Mapping[str, Any] | None) -> None:
    """A folder without a card, or with new facts for one, gets it now."""
    card = folder / "README.md"
    if facts is not None or not card.is_file():
        render_card(AutoConfig.from_pretrained(folder), repo_id, facts).save(card)


def _explained(error: Any, repo_id: str, folder: Path) -> OSError:
    """The error of a failed push in terms of what to do; the checkpoint is complete in `folder` whatever happened."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    again = f"the checkpoint is kept in {str(folder)!r}: then call push_checkpoint({str(folder)!r}, {repo_id!r})"
    if status in (401, 403):
        return PermissionError(
            f"expected a token that may write to {repo_id!r}, got status {status} from the Hub: log in with "
            f"`hf auth login` or pass `token`; {again}"
        )
    if status == 404:
        return FileNotFoundError(
            f"expected a repository {repo_id!r}, the Hub has none: check its name, or let create=True make it; {again}"
        )
    return ConnectionError(
        f"the push to {repo_id!r} broke off ({type(error).__name__}: {error}). Nothing was published and nothing is "
        f"lost; files that arrived are not sent again, and {again}"
    )


def card_for_trainer(trainer: Any, facts: Mapping[str, Any] | None = None) -> None:
    """Let the cards of a trainer (with checkpoints and `push_to_hub`) say how to load the model, and its settings.

    The trainer's own card, which names its data and versions, becomes the end of ours; its metadata is kept.

    Args:
        trainer (`Trainer`): The trainer, also TRL's; its `create_model_card` is wrapped on this instance.
        facts (`Mapping`, *optional*): As in [`render_card`].
    """
    written_by_trainer = trainer.create_model_card

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        written_by_trainer(*args, **kwargs)
        path = Path(trainer.args.output_dir) / "README.md"
        if not trainer.is_world_process_zero() or not path.is_file():
            return
        theirs = ModelCard.load(path)
        location = trainer.hub_model_id or Path(trainer.args.output_dir).name
        body = theirs.text.strip().replace("# ", "## ", 1).replace("\n## ", "\n### ")
        ours = render_card(trainer.model.config, location, facts, appendix=body)
        known = {name: value for name, value in ours.data.to_dict().items() if value}
        metadata = {**theirs.data.to_dict(), **known}
        metadata["tags"] = sorted({*(theirs.data.to_dict().get("tags") or ()), *known["tags"]})
        ours.data = ModelCardData(**metadata)
        ours.save(path)

    trainer.create_model_card = create_model_card
