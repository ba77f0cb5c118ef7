"""The soft-mask cases that the interpreter, the GPU tests and the benchmark share."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics import assert_close_to_oracle, error
from unique_attention import reference, reference_attention, soft_mask


@dataclass(frozen=True)
class SoftCase:
    """Shapes and settings of one training call."""

    B: int = 1
    HK: int = 2
    G: int = 2
    T: int = 60
    D: int = 32
    DV: int = 32
    P: int = 4
    K: int = 6
    recent: int = 1
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    score: str = "scalar"
    left_padding: bool = False
    holes: bool = False
    documents: tuple[int, ...] | None = None
    softcap: float | None = None
    sinks: bool = False
    threshold_grad: bool = False
    seed: int = 1

    @property
    def id(self) -> str:
        """Names what differs from the default case."""
        default = SoftCase()
        parts = [
            f"{name}={str(getattr(self, name)).removeprefix('torch.')}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(default, name)
        ]
        return ",".join(parts) or "default"

    def tensors(self, device: str) -> dict[str, torch.Tensor]:
        """Random q, k, v, the gradient of the output and, if asked for, sinks, rounded to the dtype."""
        heads = self.HK * self.G
        shapes = {
            "q": (self.B, heads, self.T, self.D), "k": (self.B, self.HK, self.T, self.D),
            "v": (self.B, self.HK, self.T, self.DV), "dout": (self.B, heads, self.T, self.DV),
        }  # fmt: skip
        if self.sinks:
            shapes["sinks"] = (heads,)
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.randn(shape, generator=generator).to(device, self.dtype) for name, shape in shapes.items()}

    def settings(self, device: str) -> dict:
        """Keyword arguments of the call."""
        mask = cu = None
        if self.left_padding or self.holes:
            mask = torch.ones(self.B, self.T, dtype=torch.bool, device=device)
            if self.holes:
                mask = torch.rand(self.B, self.T, device=device) > 0.2
            if self.left_padding:
                starts = torch.arange(self.B, device=device) * (self.T // 3 + 1) // max(1, self.B - 1)
                mask &= torch.arange(self.T, device=device) >= starts[:, None]
        if self.documents is not None:
            cu = torch.tensor(self.documents, dtype=torch.int32, device=device)
        return {
            "page_size": self.P, "num_kept": self.K, "recent_pages": self.recent, "temperature": self.temperature,
            "score": self.score, "token_mask": mask, "cu_seq_lens": cu, "softcap": self.softcap,
            "threshold_grad": self.threshold_grad,
        }  # fmt: skip


def outputs_and_grads(function, tensors, dtype, **settings):
    """Output and the gradient of every input, computed in `dtype`."""
    inputs = {name: x.to(dtype).detach().requires_grad_() for name, x in tensors.items() if name != "dout"}
    out = function(inputs["q"], inputs["k"], inputs["v"], sinks=inputs.get("sinks"), **settings)
    grads = torch.autograd.grad(out, list(inputs.values()), tensors["dout"].to(dtype))
    return {"out": out, **{f"d{name}": grad for name, grad in zip(inputs, grads)}}


class AnyOrderOfSums(TorchDispatchMode):
    """Moves the results of matrix products by what another order of their sums may change.

    A sum of n products rounded to unit roundoff u is off by at most about sqrt(n) u sum |a_i b_i| when roundings are
    independent (the probabilistic error bound), whatever the order. Each result moves by a random part of that.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.generator = seed, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return result
        left, right = args
        if self.generator is None:
            self.generator = torch.Generator(left.device).manual_seed(self.seed)
        unit = torch.finfo(left.dtype).eps / 2
        bound = left.shape[-1] ** 0.5 * unit * (left.abs() @ right.abs())
        return result + bound * (2 * torch.rand(result.shape, generator=self.generator, device=result.device) - 1)


def noise_samples(case, tensors, settings):
    """The reference in the dtype of the case; in fp32 also as other orders of summation may find it.

    One run in fp32 says how this library happens to split its sums (in four on one device, in vectors on another, each
    head for itself), not how exact fp32 can be: the kernels add up in one chain what the reference adds up in several.
    In 16 bits the rounding of the tensors outweighs all that.
    """
    run = lambda: outputs_and_grads(reference.soft_mask_attention, tensors, case.dtype, **settings)  # noqa: E731
    samples = [run()]
    for seed in range(8 if case.dtype == torch.float32 else 0):
        with AnyOrderOfSums(seed):
            samples.append(run())
    return samples


def noisiest(samples, oracle, name):
    """The sample of tensor `name` that is farthest from the oracle."""
    return max((sample[name] for sample in samples), key=lambda x: error(x, oracle[name]))


@contextmanager
def recorded_selections():
    """Features, and thresholds with the map of open tiles, of the kernel calls made inside."""
    seen = []
    select = soft_mask.select_tiles

    def spy(*args):
        result = select(*args)
        seen.append((soft_mask.Features(*args[:4]), *result))
        return result

    with mock.patch.object(soft_mask, "select_tiles", spy):
        yield seen


def slots_of_tokens(case, settings, device):
    """Slot of every token in the layout of the kernels: documents start at a page."""
    token = torch.arange(case.T, device=device)
    if settings["cu_seq_lens"] is None:
        return token
    token_at = reference_attention._paginate(case.T, case.P, settings["cu_seq_lens"], token.device)[2].flatten()
    taken = (token_at < case.T).nonzero()[:, 0]
    return token.scatter(0, token_at[taken], taken)


@contextmanager
def boundary_pages(pair, chosen):
    """The reference takes theta from the pages `pair [B, HK, T, 2]` of the `chosen` queries; yields what it saw.

    Scores that differ by less than the rounding of the features have no order that both must find, but the gradient
    of the threshold goes to two of their pages as a whole. `check_boundary` says which pages the kernel may take.
    """
    seen = []

    def log_gate(scores, free, num_free, temperature, threshold_grad):
        assert threshold_grad
        seen.append((scores.detach(), free, num_free))
        theta = scores.masked_fill(~free, 0).gather(-1, pair).mean(-1, keepdim=True)
        soft = free & chosen
        return F.logsigmoid((scores.masked_fill(~soft, 0) - theta) / temperature).masked_fill(~soft, 0)

    with mock.patch.object(reference_attention, "_log_gate", log_gate):
        yield seen


def check_boundary(pair, chosen, features, slots, scores, free, num_free):
    """The pages hold the K'-th and the next best score of the features, which are those of Eq. 1 to 3, rounded."""
    fq, nq, fp, fs = (x.double() for x in features)
    fq = fq[:, :, slots]
    of_features, size = fq @ fp.mT, fq.norm(dim=-1)[..., None] * fp.norm(dim=-1)[:, :, None]
    if nq.numel():
        offset = nq[:, :, slots, None] * fs[:, :, None]
        of_features, size = of_features + offset, size + offset
    fp32 = torch.finfo(torch.float32).eps
    rounding = (torch.finfo(features.fq.dtype).eps + 16 * fp32) * size
    free = free.expand_as(scores)
    wrong = ((of_features - scores).abs() > rounding) & free
    assert not wrong.any(), f"{wrong.sum()} scores are not those of the reference, first at {wrong.nonzero()[0]}"
    assert torch.equal(free.sum(-1, keepdim=True) > num_free, chosen), "the wrong queries have a threshold"
    assert (free.gather(-1, pair) | ~chosen).all(), "a page that is not free sets a threshold"
    best = of_features.masked_fill(~free, -torch.inf).topk(num_free + 1, dim=-1).values[..., -2:]
    off = torch.where(chosen, of_features.gather(-1, pair) - best, 0).abs()
    band = 16 * fp32 * size.amax(-1, keepdim=True)
    assert (off <= band).all(), f"boundary scores are off by {off.max():.3g}, allowed {band.min():.3g}"


def check_case(case, device):
    """Output and all gradients against the reference in float64, with the kernel's boundary pages where they count."""
    tensors, settings = case.tensors(device), case.settings(device)
    with recorded_selections() as selections:
        got = outputs_and_grads(soft_mask.soft_mask_attention, tensors, case.dtype, **settings)
    pages = nullcontext()
    if case.threshold_grad:
        features, thresholds, _ = selections[0]
        slots = slots_of_tokens(case, settings, device)
        chosen = thresholds.theta[:, :, slots, None] > -torch.inf
        pair = torch.stack([thresholds.above, thresholds.below], dim=-1)[:, :, slots].long()
        pages = boundary_pages(pair, chosen)
    with pages as seen:
        oracle = outputs_and_grads(reference.soft_mask_attention, tensors, torch.float64, **settings)
        samples = noise_samples(case, tensors, settings)
    if case.threshold_grad:
        check_boundary(pair, chosen, features, slots, *seen[0])
    for name, expected in oracle.items():
        try:
            assert_close_to_oracle(got[name], expected, noisiest(samples, oracle, name), case.dtype)
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from failure
