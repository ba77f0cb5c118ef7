"""The soft-mask cases that the interpreter, the GPU tests and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.numerics import assert_close_to_oracle
from unique_attention import reference, soft_mask


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


def check_case(case, device):
    """Output and all gradients against the reference in float64."""
    tensors, settings = case.tensors(device), case.settings(device)
    oracle = outputs_and_grads(reference.soft_mask_attention, tensors, torch.float64, **settings)
    low = outputs_and_grads(reference.soft_mask_attention, tensors, case.dtype, **settings)
    got = outputs_and_grads(soft_mask.soft_mask_attention, tensors, case.dtype, **settings)
    for name, expected in oracle.items():
        try:
            assert_close_to_oracle(got[name], expected, low[name], case.dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
