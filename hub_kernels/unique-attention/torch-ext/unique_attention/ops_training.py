"""The public operation of training. Triton is imported inside the call."""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._checks import check_choice, check_page_size, check_triton_dims, kernels, resolve_scale, use_triton
from .settings import SCORES, resolve_score_weight


def soft_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    page_size: int,
    num_kept: int,
    sink_pages: int = 1,
    recent_pages: int = 1,
    temperature: float,
    score: str = "scalar",
    score_weight: float | None = None,
    group_reduce: str = "mean",
    softmax_scale: float | None = None,
    token_mask: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    threshold_grad: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Differentiable attention that learns to be sparse: a sigmoid around each query's top-k boundary (Eq. 6).

    Equation: logits of page p get `+ log sigmoid((score_ip - theta_i) / temperature)`.

    Args:
        q (`torch.Tensor`): `[B, H, T, D]`.
        k (`torch.Tensor`): `[B, HK, T, D]`.
        v (`torch.Tensor`): `[B, HK, T, DV]`.
        page_size (`int`): Tokens per page.
        num_kept (`int`): K, sink and recent pages included.
        sink_pages (`int`, *optional*, defaults to 1): First pages, never masked.
        recent_pages (`int`, *optional*, defaults to 1): Last pages of each query, its own among them, never masked.
        temperature (`float`): Width of the sigmoid in units of the page score.
        score (`str`, *optional*, defaults to `"scalar"`): Form of the offset.
        score_weight (`float`, *optional*): w; `None` takes the form's default.
        group_reduce (`str`, *optional*, defaults to `"mean"`): Vote of the query heads of a kv head.
        softmax_scale (`float`, *optional*): s; `None` takes `D ** -0.5`.
        token_mask (`torch.Tensor`, *optional*): `[B, T]` bool, tokens that count.
        cu_seq_lens (`torch.Tensor`, *optional*): `[documents + 1]` boundaries of packed documents (B = 1).
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`.
        sinks (`torch.Tensor`, *optional*): `[H]` an extra logit per head.
        threshold_grad (`bool`, *optional*, defaults to `False`): Let gradients flow through theta.
        impl (`str`, *optional*): `"triton"` or `"reference"`.
    Returns:
        `torch.Tensor`: `[B, H, T, DV]`, differentiable in `q`, `k` (through the statistics too) and `v`.
    Raises:
        ValueError: shapes or names do not fit.
        NotImplementedError: no kernel for these settings under `impl="triton"`.

    Numerics: float32 accumulation; deterministic; memory O(T) with Triton.
    """
    check_page_size(page_size)
    check_choice("score", score, SCORES)
    settings = {
        "page_size": page_size, "num_kept": num_kept, "sink_pages": sink_pages, "recent_pages": recent_pages,
        "temperature": temperature, "score": score, "score_weight": resolve_score_weight(score, score_weight),
        "group_reduce": group_reduce, "softmax_scale": resolve_scale(softmax_scale, q.shape[-1]),
        "token_mask": token_mask,
        "cu_seq_lens": cu_seq_lens, "softcap": softcap, "sinks": sinks, "threshold_grad": threshold_grad,
    }  # fmt: skip
    if not use_triton(q, impl, score):
        return reference.soft_mask_attention(q, k, v, **settings)
    soft_mask = kernels("soft_mask")
    if impl is None and not soft_mask.supports(score=score, group_reduce=group_reduce):
        return reference.soft_mask_attention(q, k, v, **settings)
    check_triton_dims(k, v)
    return soft_mask.soft_mask_attention(q, k, v, **settings)
