"""The adapter between the kernels and Transformers: importing it registers attention, mask and cache layers, once."""

from __future__ import annotations

from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import activity
from .attention import unique_attention_forward
from .cache import UniqueCache, UniqueDynamicLayer
from .masks import unique_mask
from .settings import settings_of
from .static import UniqueStaticLayer

__all__ = [
    "UniqueCache",
    "UniqueDynamicLayer",
    "UniqueStaticLayer",
    "activity",
    "settings_of",
    "unique_attention_forward",
    "unique_mask",
]

NAME = "unique"
# raised whenever cache layers of one version could not be read by the attention function of another
ADAPTER_VERSION = 1

_LAYERS = (
    (DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, UniqueDynamicLayer),
    (STATIC_LAYER_TYPE_MAPPING, StaticLayer, UniqueStaticLayer),
)


def register() -> None:
    """Register attention, mask and cache layers under the name "unique"; a second equal copy joins the first.

    Raises:
        RuntimeError: Another version of this adapter, or another package, already replaced the stock cache layers.
    """
    for mapping, stock, ours in _LAYERS:
        current = mapping["full_attention"]
        if current is stock or current is ours:
            continue
        version = getattr(current, "unique_adapter_version", None)
        if version != ADAPTER_VERSION:
            found = f"version {version} of this adapter" if version is not None else "another package"
            raise RuntimeError(
                f"expected the cache layer {stock.__name__}, got {current.__module__}.{current.__qualname__} of "
                f"{found}: copies that do not fit cannot run in one process. Use either the installed unique_hf or "
                "the Hub kernel, or bring both to the same version"
            )
    for mapping, stock, ours in _LAYERS:
        ours.unique_adapter_version = ADAPTER_VERSION
        if mapping["full_attention"] is stock:
            ours.unique_activity = (activity.ACTIVITY, activity.PROBE)
            mapping["full_attention"] = ours
        else:
            # the counters of an earlier copy, so that either copy reports both
            activity.ACTIVITY, activity.PROBE = mapping["full_attention"].unique_activity
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, unique_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, unique_mask)


register()
