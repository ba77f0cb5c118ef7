"""Many questions about one long context: one prefill, then the questions in step, token by token. Imports torch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Answers:
    """What a model decoded for a batch of questions.

    Args:
        ids (`list`): Token ids of each answer, without the end token.
        step_seconds (`list`): Wall time of each decode step of the whole batch.
        chunked (`int`): Tokens of every question that were read at once, before the first of these steps.
    """

    ids: list[list[int]]
    step_seconds: list[float]
    chunked: int


@torch.no_grad()
def prefill(
    model: PreTrainedModel, input_ids: Sequence[Any], on_layer: Callable[[], Any] | None = None
) -> DynamicCache:
    """Read a context, or several of one length, with the model's attention, which is exact also in "unique".

    Args:
        model (`PreTrainedModel`): The model.
        input_ids (`Sequence`): Tokens of the context, or a sequence of contexts.
        on_layer (`Callable`, *optional*): Called after each decoder layer.
    Returns:
        `DynamicCache`: One row per context, with page statistics when the model runs "unique".
    Raises:
        ValueError: The contexts differ in length.
    """
    rows = [list(row) for row in input_ids] if isinstance(input_ids[0], Sequence) else [list(input_ids)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"expected contexts of one length, got {sorted({len(row) for row in rows})} tokens: read them one by one"
        )
    cache = DynamicCache(config=model.config)

    def hook(*_: Any) -> None:
        if on_layer is not None:
            on_layer()

    hooks = [layer.register_forward_hook(hook) for layer in getattr(model.get_decoder(), "layers", ())]
    try:
        model(torch.tensor(rows, device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return cache


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    cache: DynamicCache,
    questions: Sequence[Sequence[int]],
    max_new_tokens: int = ANSWER_TOKENS,
    chunk: bool = False,
    on_step: Callable[[], Any] | None = None,
) -> Answers:
    """Feed every question token by token after its context and decode the answers greedily.

    The cache is copied, one row per question, and stays as it is. With several contexts every one has equally many
    questions: first those of the first context, then those of the second, and so on. All rows take their steps
    together: a row whose question is over feeds its own answer while longer questions are still being read, so
    questions of different lengths need no padding.

    Args:
        model (`PreTrainedModel`): The model; its attention implementation decides whether the steps are sparse.
        cache (`DynamicCache`): Of `prefill`.
        questions (`Sequence`): Token ids of each question, at least one token.
        max_new_tokens (`int`, *optional*, defaults to 12): Longest answer.
        chunk (`bool`, *optional*, defaults to `False`): Read what all questions have, up to the last token of the
            shortest one, at once. That is exact attention in "unique" too, so it suits dense arms only.
        on_step (`Callable`, *optional*): Called after each step.
    Returns:
        `Answers`: As many as questions.
    Raises:
        ValueError: No question, an empty one, or not equally many for every context.
    """
    # a layer that holds keys, whatever its class
    layer: Any = cache.layers[0]
    sizes, contexts = [len(question) for question in questions], layer.keys.shape[0]
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"expected questions of at least one token each, got {sizes} tokens: leave out empty questions"
        )
    if len(sizes) % contexts:
        raise ValueError(f"expected equally many questions for each of {contexts} contexts, got {len(sizes)} in all")
    rows, longest = len(sizes), max(sizes)
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows // contexts)
    starts = torch.tensor([size - 1 for size in sizes], device=model.device)
    fed = torch.tensor([[*question] + [-1] * (longest - len(question)) for question in questions], device=model.device)
    ends = _end_tokens(model)
    stops = torch.tensor(ends or [-1], device=model.device)
    done = torch.zeros(rows, dtype=torch.bool, device=model.device)
    chunked = min(sizes) - 1 if chunk else 0
    if chunked:
        model(fed[:, :chunked], past_key_values=cache, use_cache=True, logits_to_keep=1)
    # nobody's answer starts before step `chunked`
    guesses, seconds = [fed[:, 0]] * chunked, []
    for step in range(chunked, longest - 1 + max_new_tokens):
        token = fed[:, step] if step < longest else guesses[-1]
        if guesses and step < longest:
            token = torch.where(token < 0, guesses[-1], token)
        begin = time.perf_counter()
        logits = model(token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        seconds.append(time.perf_counter() - begin)
        guesses.append(logits[:, -1].argmax(-1))
        done |= torch.isin(guesses[-1], stops) & (starts <= step)
        if on_step is not None:
            on_step()
        # asking earlier could not end the loop and would wait for the device
        if step >= longest - 1 and bool(done.all()):
            break
    table = torch.stack(guesses, dim=1).tolist()
    answers = [_until(row[size - 1 :][:max_new_tokens], ends) for row, size in zip(table, sizes)]
    return Answers(answers, seconds, chunked)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = model.config.get_text_config().eos_token_id if found is None else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[:index]
    return tokens
