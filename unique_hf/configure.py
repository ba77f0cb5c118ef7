"""Changing the settings of a model. May import torch, Transformers and the kernel's public names."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .backend import kernel_module

ATTRIBUTE = "unique_attention"


def text_config(model: Any) -> Any:
    """The configuration that holds the settings: that of the model's decoder.

    Args:
        model (`PreTrainedModel`): A Transformers model, possibly wrapped (PEFT, DDP).
    Returns:
        `PreTrainedConfig`: The text configuration.
    Raises:
        TypeError: `model` has no Transformers configuration.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"expected a Transformers model, got {type(model).__name__} without a configuration: pass the model that "
            "`from_pretrained` returned"
        )
    found = config.get_text_config(decoder=True)
    # encoder-decoder models without a text configuration get a pruned copy, which no module reads
    held = {id(getattr(module, "config", None)) for module in model.modules()}
    return found if id(found) in held else config


def configure(model: PreTrainedModel, **settings: Any) -> Any:
    """Change settings of UNIQUE attention; they take effect at the next call, also on a cache that is in use.

    The settings go to `config.get_text_config().unique_attention` and travel with `save_pretrained`. Another
    `page_size` does not fit the pages of a cache in use: the next call on it raises and says so.

    Args:
        model (`PreTrainedModel`): The model.
        **settings: Any of [`UniqueConfig`]; those not named keep their values.
    Returns:
        `UniqueConfig`: All settings now in force.
    Raises:
        TypeError: `model` is not a Transformers model, or a setting has the wrong type.
        ValueError: A setting is unknown or out of range.
    """
    config = text_config(model)
    current = getattr(config, ATTRIBUTE, None) or {}
    changed = kernel_module().UniqueConfig.from_dict(current).replace(**settings)
    setattr(config, ATTRIBUTE, changed.to_dict())
    return changed
