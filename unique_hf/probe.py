"""What sparsity a model has learnt, measured on a batch: recall, sharpness, open pages, and what the hard cut costs.

May import torch, Transformers and the kernel's public names and adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .backend import adapter, kernel_module
from .configure import configure
from .recording import select

# far below any difference of scores: every gate of Eq. 6 is open or shut
HARD_TEMPERATURE = 1e-6


@contextlib.contextmanager
def temporarily(model: Any, **settings: Any) -> Iterator[None]:
    """Settings of UNIQUE attention for the time of a block; those before come back, also after an error.

    Args:
        model (`PreTrainedModel`): The model.
        **settings: As for [`configure`].
    """
    before = configure(model)
    configure(model, **settings)
    try:
        yield
    finally:
        configure(model, **{name: value for name, value in before.to_dict().items() if name != "format_version"})


@torch.no_grad()
def measure(
    model: Any, batch: dict[str, torch.Tensor], *, positions: int = 8, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Measure the learnt sparsity on one batch of unpacked rows, under the model's budget and temperature.

    Equation: recall = share of dense attention mass on the pages that hard top-k keeps; open_pages = sum_p g_p / N and
    sharpness = 1 - mean_p 4 g_p (1 - g_p) with g of Eq. 6 (the mean over pages that are not forced; 1: a hard cut).

    Args:
        model (`PreTrainedModel`): With attn_implementation="unique".
        batch (`dict`): `input_ids [B, T]`; `attention_mask` and `labels` (-100: no loss) as usual.
        positions (`int`, *optional*, defaults to 8): Queries per row and layer at which pages are looked at, evenly
            spaced over those that see more pages than are kept.
        dtype (`torch.dtype`, *optional*): Run under autocast to this dtype.
    Returns:
        `dict`: `loss_dense`, `loss_hard`, `loss_gap` (hard minus dense), and where rows are long enough to choose
        pages `recall`, `open_pages`, `kept_pages` (what `open_pages` tends to as the mask sharpens) and `sharpness`.

    Numerics: three forward passes without grad; recall reads all keys in fp32.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels = batch.pop("labels", None)
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    meter = _Meter(positions)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            with temporarily(model, soft_mask=False):
                dense = _loss(model, batch, labels)
            with temporarily(model, soft_mask=True, temperature=HARD_TEMPERATURE):
                hard = _loss(model, batch, labels)
            with temporarily(model, soft_mask=True), adapter().soft.observing(meter):
                model(**batch, use_cache=False)
    finally:
        for module in training:
            module.training = True
    return {"loss_dense": dense, "loss_hard": hard, "loss_gap": hard - dense, **meter.result()}


def _loss(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> float:
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100).item()


class _Meter:
    """Sums over the layers of a pass what their pages look like; called before each soft-mask call."""

    def __init__(self, positions: int):
        self.positions = positions
        self.sums: dict[str, torch.Tensor] = {}
        self.rows = 0

    def result(self) -> dict[str, float]:
        return {name: (value / self.rows).item() for name, value in self.sums.items()}

    def __call__(self, settings, query, key, *, token_mask, bounds, scaling, softcap, sinks) -> None:
        if bounds is not None:
            raise ValueError("expected rows of one document each, got packed documents: give the probe unpacked rows")
        page_size, kept = settings.page_size, settings.num_kept
        for row in range(query.shape[0]):
            valid = None if token_mask is None else token_mask[row].nonzero().flatten().tolist()
            start, end = (0, query.shape[2]) if valid is None else (valid[0], valid[-1] + 1)
            first = (kept + start // page_size) * page_size
            if end <= first:
                continue
            where = torch.linspace(first, end - 1, self.positions, device=query.device).long().unique()
            mask = torch.arange(key.shape[2], device=key.device) <= where[:, None]
            if token_mask is not None:
                mask &= token_mask[row]
            queries = query[row, :, where].transpose(0, 1)[:, :, None]  # [n, H, 1, D]
            keys = key[row : row + 1].expand(len(where), -1, -1, -1)
            self._add(settings, queries, keys, mask, where, start, scaling, softcap, sinks)

    def _add(self, settings, queries, keys, mask, where, start, scaling, softcap, sinks) -> None:
        kernel, page_size = kernel_module(), settings.page_size
        rows = {"seq_lens": (where + 1).int(), "seq_starts": torch.full_like(where, start).int()}

        def scores_of(level) -> torch.Tensor:
            form = {"page_size": level.page_size, "score": level.score, "stats_dtype": "fp32"}
            stats = kernel.page_stats(keys, **form, **rows, token_mask=mask)
            return kernel.page_scores(
                queries, stats, **form, **rows, score_weight=level.score_weight, group_reduce=level.group_reduce,
                softmax_scale=scaling, k=keys if level.score == "oracle" else None,
            )  # fmt: skip

        scores = scores_of(settings)
        # the gates of training rank all pages, decoding those of the super-pages kept
        page_ids = select(lambda level: scores if level is settings else scores_of(level), settings, **rows)
        mass = adapter().activity.kept_mass(
            queries,
            keys,
            page_ids,
            page_size=page_size,
            scaling=scaling,
            token_mask=mask,
            softcap=softcap,
            sinks=sinks,
        )
        ids = torch.arange(scores.shape[-1], device=scores.device)
        first, own = start // page_size, (where // page_size)[:, None]
        present = (ids >= first) & (ids <= own)
        free = present & (ids >= first + settings.sink_pages) & (ids <= own - settings.recent_pages)
        num_free = settings.num_kept - settings.sink_pages - settings.recent_pages
        ranked = scores.masked_fill(~free[:, None], -torch.inf)
        theta = ranked.topk(num_free + 1).values[..., -2:].mean(-1, keepdim=True)
        gate = torch.sigmoid((ranked - theta) / settings.temperature)  # 0 where not free
        softness = (4 * gate * (1 - gate)).sum(-1) / free.sum(-1, keepdim=True)
        total = present.sum(-1, keepdim=True)
        forced_pages = total - free.sum(-1, keepdim=True)
        found = {
            "recall": mass,
            "open_pages": ((gate.sum(-1) + forced_pages) / total).mean(-1),
            "kept_pages": (settings.num_kept / total).squeeze(-1),
            "sharpness": 1 - softness.mean(-1),
        }
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value.float().sum()
        self.rows += len(where)
