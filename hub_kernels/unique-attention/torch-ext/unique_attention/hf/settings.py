"""Reading the settings from a Transformers configuration. May import `..settings` only."""

from __future__ import annotations

import functools
from typing import Any

from ..settings import UniqueConfig

ATTRIBUTE = "unique_attention"


@functools.lru_cache(maxsize=64)
def _parse(items: tuple[tuple[str, Any], ...]) -> UniqueConfig:
    return UniqueConfig.from_dict(dict(items))


def settings_of(config: Any) -> UniqueConfig:
    """The settings in a configuration, or the defaults where it has none.

    Args:
        config (`PreTrainedConfig`): A model's configuration or text configuration.
    Returns:
        `UniqueConfig`: Validated; equal dicts give the same object.
    Raises:
        TypeError: `config.unique_attention` is not a dict.
        ValueError: It has an unknown or invalid setting.
    """
    values = getattr(config, ATTRIBUTE, None)
    if values is None and hasattr(config, "get_text_config"):
        values = getattr(config.get_text_config(decoder=True), ATTRIBUTE, None)
    if values is None:
        return _parse(())
    if isinstance(values, UniqueConfig):
        return values
    if not isinstance(values, dict):
        raise TypeError(
            f"expected `config.{ATTRIBUTE}` to be a dict of settings, got {type(values).__name__}: "
            "use unique_hf.configure(model, ...)"
        )
    try:
        return _parse(tuple(values.items()))
    except TypeError:
        # an unhashable value (a list, say) is a wrong type too, and from_dict names the setting
        return UniqueConfig.from_dict(values)
