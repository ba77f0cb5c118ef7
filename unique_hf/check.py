"""Which layers will run sparse, and why the others will not. Imports torch, Transformers and the kernel's adapter."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backend import adapter
from .configure import text_config
from .table import render


class LayerCheck(NamedTuple):
    """The forecast for one attention module.

    Args:
        name (`str`): Name of the module in the model.
        sparse (`bool`): Whether decode steps read kept pages only (once there are more pages than are kept).
        reason (`str`): Why.
    """

    name: str
    sparse: bool
    reason: str


@dataclass(frozen=True)
class CheckResult:
    """The forecast for a model; prints as a table.

    Args:
        layers (`tuple[LayerCheck]`): In the order of the model.
    """

    layers: tuple[LayerCheck, ...]

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the modules that will run sparse."""
        return tuple(layer.name for layer in self.layers if layer.sparse)

    @property
    def dense_layers(self) -> tuple[str, ...]:
        """Names of the modules that will not."""
        return tuple(layer.name for layer in self.layers if not layer.sparse)

    def __str__(self) -> str:
        rows = [(layer.name, "sparse" if layer.sparse else "dense", layer.reason) for layer in self.layers]
        total = f"{len(self.sparse_layers)} of {len(self.layers)} attention layers run sparse"
        return f"{render(('layer', 'decode', 'reason'), rows)}\n{total}"

    __repr__ = __str__


def check(model: PreTrainedModel, **inputs: Any) -> CheckResult:
    """Say which attention layers will run sparse, by running three tokens and one decode step through the model.

    Args:
        model (`PreTrainedModel`): The model, loaded or switched to `attn_implementation="unique"`.
        **inputs: Inputs of the model's forward for a short prompt, where `input_ids` alone does not do (pixels, say).
    Returns:
        `CheckResult`: One line per attention module.
    Raises:
        TypeError: `model` is not a Transformers model.
        ValueError: The model cannot run on text alone and needs other `inputs`.

    Numerics: weights, generator states, counters and training flags of the model stay as they were.
    """
    implementation = text_config(model)._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(implementation) if implementation != "eager" else None
    candidates = _attention_modules(model)
    if not hasattr(function, "is_unique_attention"):
        reason = f"attn_implementation is {implementation!r}; call model.set_attn_implementation('unique')"
        return CheckResult(tuple(LayerCheck(name, False, reason) for name in candidates))
    seen, settings = _probe(model, inputs), adapter().settings_of(model.config)
    super_pages = ""
    if settings.upper is not None:
        super_pages = f", in the best super-pages of {settings.super_page_size} ({settings.upper.budget:,} tokens)"
    layers = []
    for name, module in model.named_modules():
        if module in seen:
            calls = seen[module]
            mode = next((mode for tokens, mode in reversed(calls) if tokens == 1), calls[-1][1])
            sparse = mode.kind == "sparse"
            layers.append(LayerCheck(name, sparse, mode.reason + (super_pages if sparse else "")))
        elif name in candidates:
            layers.append(LayerCheck(name, False, _why_unseen(module)))
    result = CheckResult(tuple(layers))
    if not result.sparse_layers:
        reasons = "; ".join(sorted({layer.reason for layer in layers})) or "it has no attention layers"
        warnings.warn(
            f"unique attention will not run sparse in {type(model).__name__}: {reasons}. The model answers as with "
            "its own attention, and no faster",
            stacklevel=2,
        )
    return result


def _attention_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules that look like attention by name and hold no other such module."""
    named = {name: m for name, m in model.named_modules() if re.search(r"Attention|Attn", type(m).__name__)}
    return {name: m for name, m in named.items() if not any(other.startswith(f"{name}.") for other in named)}


def _why_unseen(module: torch.nn.Module) -> str:
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        source = ""
    if "ALL_ATTENTION_FUNCTIONS" in source or "attention_interface" in source:
        return "not run by this prompt; pass the inputs that reach it to check()"
    return "does not use Transformers' attention interface: computes its own attention"


def _probe(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[torch.nn.Module, list[Any]]:
    ids = torch.zeros((1, 3), dtype=torch.long, device=model.device)
    step: dict[str, Any] = {"input_ids": ids[:, :1]}
    if not inputs:
        inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs = {"decoder_input_ids": ids, **inputs}
        step = {"decoder_input_ids": ids[:, :1]}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), adapter().activity.probing() as log:
            outputs = model(**inputs, **({"use_cache": True} if _takes_cache(model) else {}))
            cache = getattr(outputs, "past_key_values", None)
            if cache is not None:
                if model.config.is_encoder_decoder:
                    step["encoder_outputs"] = (outputs.encoder_last_hidden_state,)
                model(**step, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"expected {type(model).__name__} to run on {sorted(inputs)}, got {type(error).__name__}: {error}. Pass "
            "inputs for a short prompt, e.g. check(model, input_ids=..., pixel_values=...)"
        ) from error
    finally:
        for module in training:
            module.training = True
    return log


def _takes_cache(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
