"""UNIQUE attention by brute force: few lines, no shared code, recomputed from all keys at every decode step."""

import math

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Brute:
    """Dense attention for several tokens; for one, pages by `q . mean + w |q| std`, mean vote, sink and recent.

    With super-pages these are ranked first, in the same way, and only the pages of those kept are ranked then.
    """

    def __init__(
        self, page_size, budget, sink_pages=1, recent_pages=2, weight=0.5, super_page_size=None, super_budget=None
    ):
        self.page_size, self.kept, self.sink, self.recent = page_size, budget // page_size, sink_pages, recent_pages
        self.weight, self.super_page_size, self.super_budget = weight, super_page_size, super_budget

    def pages(self, q, k, valid):
        if self.super_page_size is None:
            return self.best(q, k, valid, self.page_size, self.kept, self.sink, self.recent, lambda p: True)
        # as many forced super-pages as forced pages can touch, wherever the boundaries lie
        ratio = self.super_page_size // self.page_size
        sink, recent = (max(len({(at + i) // ratio for i in range(n)}) for at in range(ratio))
                        for n in (self.sink, self.recent))  # fmt: skip
        upper = self.best(
            q, k, valid, self.super_page_size, self.super_budget // self.super_page_size, sink, recent, lambda p: True
        )
        return self.best(q, k, valid, self.page_size, self.kept, self.sink, self.recent, lambda p: p // ratio in upper)

    def best(self, q, k, valid, page_size, kept, sink, recent, competes):
        first, last = int(valid.nonzero()[0]) // page_size, len(valid) - 1
        ids = list(range(first, last // page_size + 1))
        forced = set(ids[:sink]) | set(ids[-recent:])
        ids = [p for p in ids if competes(p)]
        assert forced <= set(ids)
        scores = {}
        for p in ids:
            span = slice(p * page_size, (p + 1) * page_size)
            keys = k[span][valid[span]]
            if len(keys) == 0:
                scores[p] = 0.0
                continue
            std = keys.var(0, unbiased=False).sum().sqrt()
            scores[p] = (q @ keys.mean(0) + self.weight * q.norm(dim=-1) * std).mean().item()
        free = sorted((p for p in ids if p not in forced), key=lambda p: (-scores[p], p))
        return forced | set(free[: max(0, kept - len(forced))])

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        batch, heads, length, _ = query.shape
        groups, size = heads // key.shape[1], key.shape[2]
        mask = attention_mask
        if mask is None:
            mask = torch.ones(length, size, dtype=torch.bool).tril(size - length).expand(batch, 1, -1, -1)
        mask = mask.expand(batch, heads, length, size).clone()
        for b in range(batch if length == 1 else 0):
            for h in range(key.shape[1]):
                own = slice(h * groups, (h + 1) * groups)
                valid = mask[b, h * groups, 0]
                end = int(valid.nonzero()[-1]) + 1
                kept = self.pages(query[b, own, 0].double(), key[b, h, :end].double(), valid[:end])
                open_tokens = torch.tensor([t // self.page_size in kept for t in range(size)])
                mask[b, own, 0] &= open_tokens
        k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = (query @ k.transpose(2, 3)) * scaling
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), None


def register(name="brute", **settings):
    """Make an `attn_implementation` of this name mean these settings."""
    assert math.log2(settings["page_size"]).is_integer()
    ALL_ATTENTION_FUNCTIONS.register(name, Brute(**settings))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
