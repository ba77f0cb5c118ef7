"""The algorithm once more, in loops and with none of the reference's code: what the reference must equal."""

import torch


def bounds(row, num_slots, seq_lens=None, seq_starts=None):
    return (0 if seq_starts is None else int(seq_starts[row])), (num_slots if seq_lens is None else int(seq_lens[row]))


def page_tokens(page, page_size, start, end, mask=None):
    """Valid slots of a page."""
    slots = range(max(page * page_size, start), min((page + 1) * page_size, end))
    return [slot for slot in slots if mask is None or mask[slot]]


def head_score(q, keys, score, weight, scale):
    """Eq. 2 for one query vector and the keys `[n, D]` of one page."""
    if len(keys) == 0:
        return torch.zeros((), dtype=q.dtype)
    mean, var = keys.mean(0), keys.var(0, unbiased=False)
    base = q @ mean
    if score == "mean":
        return base
    if score == "scalar":
        return base + weight * q.norm() * var.sum().sqrt()
    if score == "diagonal":
        return base + weight * (q**2 * var).sum().sqrt()
    if score == "absolute":
        return base + weight * (q.abs() * var.sqrt()).sum()
    if score == "moment":
        return base + weight * 0.5 * scale * (q**2 * var).sum()
    if score == "minmax":
        return torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum()
    if score == "oracle":
        return (scale * keys @ q).logsumexp(0) / scale
    raise KeyError(score)


def vote(scores, rule, scale):
    """Eq. 3 for `[G, number of candidates]`."""
    if rule == "mean":
        return scores.sum(0) / len(scores)
    if rule == "max":
        return scores.max(0).values
    if rule == "softmax_mean":
        mass = (scale * scores).exp()
        return (mass / mass.sum(1, keepdim=True)).sum(0) / len(scores)
    if rule == "shifted_max":
        return (scores - scores.max(1, keepdim=True).values).max(0).values
    raise KeyError(rule)


def select(scores, first, stop, num_kept, sink_pages, recent_pages):
    """Eq. 4 for the scores of one row and kv head, as a sorted list."""
    row = list(range(first, stop))
    forced = set(row[:sink_pages]) | set(row[len(row) - recent_pages :] if len(row) >= recent_pages else row)
    free = sorted((page for page in row if page not in forced), key=lambda page: (-scores[page], page))
    return sorted(forced | set(free[: max(0, num_kept - len(forced))]))


def attend(q, keys, values, scale, softcap=None, sink=None, bias=None):
    """Eq. 5 for one query vector and the tokens it sees."""
    logits = scale * keys @ q
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    weights = logits.exp()
    total = weights.sum() + (0 if sink is None else sink.exp())
    return weights @ values / total if len(keys) else torch.zeros(values.shape[-1], dtype=values.dtype)


def decode(
    q, k, v, pages, page_size, *, seq_lens=None, seq_starts=None, mask=None, scale=None, softcap=None, sinks=None
):
    """Eq. 5 for a batch; `pages[b][h]` is a list of page ids."""
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, 1, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        start, end = bounds(b, k.shape[2], seq_lens, seq_starts)
        for h in range(heads):
            kv = h // (heads // kv_heads)
            row_mask = None if mask is None else mask[b]
            slots = [t for page in pages[b][kv] for t in page_tokens(page, page_size, start, end, row_mask)]
            sink = None if sinks is None else sinks[h]
            out[b, h, 0] = attend(q[b, h, 0], k[b, kv, slots], v[b, kv, slots], scale, softcap, sink)
    return out


def soft_row(
    q, k, v, i, *, page_size, num_kept, sink_pages, recent_pages, temperature, score, weight,
    rule="mean", start=0, softcap=None, sinks=None,
):  # fmt: skip
    """Eq. 6 for query i of one kv head: `q [G, T, D]`, `k [T, D]`, `v [T, DV]`, valid tokens start .. T - 1."""
    scale = q.shape[-1] ** -0.5
    own, first = i // page_size, start // page_size
    row = list(range(first, own + 1))
    bias = torch.zeros(i + 1 - start, dtype=q.dtype)
    if len(row) > num_kept:
        complete = row[:-1]
        keys = [k[page_tokens(page, page_size, start, i + 1)] for page in complete]
        heads = torch.stack([torch.stack([head_score(x[i], key, score, weight, scale) for key in keys]) for x in q])
        scores = dict(zip(complete, vote(heads, rule, scale)))
        free = [page for page in row if page >= first + sink_pages and page <= own - recent_pages]
        ranked = sorted((scores[page] for page in free), reverse=True)
        last_kept = num_kept - sink_pages - recent_pages
        theta = ((ranked[last_kept - 1] + ranked[last_kept]) / 2).detach()
        gates = {page: torch.sigmoid((scores[page] - theta) / temperature) for page in free}
        bias = torch.stack([gates[t // page_size].log() if t // page_size in gates else bias[0]
                            for t in range(start, i + 1)])  # fmt: skip
    tokens = slice(start, i + 1)
    return torch.stack([
        attend(q[g, i], k[tokens], v[tokens], scale, softcap, None if sinks is None else sinks[g], bias)
        for g in range(len(q))
    ])  # fmt: skip
