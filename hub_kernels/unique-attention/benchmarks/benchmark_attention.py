"""What `kernels benchmark <this kernel>` times and verifies: decode steps and a training step, sparse beside dense.

Every workload has a rival named `dense` in the same class: compare their means. The column `Ref` times the
verification, which computes the reference twice, in float64 and in the dtype of the workload; it is no rival.

On a GPU (of 40 GB or more): bf16, 32 query and 8 kv heads of 128, default settings with a budget of 512 tokens.
Elsewhere small float32 shapes show that everything works; with `TRITON_INTERPRET=1` they run the Triton kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torch.nn.attention import SDPBackend, sdpa_kernel


def check_error(name: str, actual: torch.Tensor, oracle: torch.Tensor, low: torch.Tensor) -> None:
    """Raises unless `err(actual) <= 2 err(low) + eps max|oracle|`, the rule of this repository's tests.

    `oracle` is the reference in float64 and `low` the reference in the dtype under test, on the same numbers. The
    command's own comparison (`allclose` with an absolute 1e-2) is too weak for attention outputs.
    """
    error = (actual.double() - oracle).abs().max().item()
    largest = oracle.abs().max().item()
    allowed = 2 * (low.double() - oracle).abs().max().item() + torch.finfo(actual.dtype).eps * largest
    # written so that NaN fails
    if not error <= allowed:
        raise RuntimeError(f"{name}: error {error:.3g}, expected at most {allowed:.3g} (largest entry {largest:.3g})")


def grad_outputs(function, tensors: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and gradients of a causal attention function, computed in `dtype`."""
    inputs = [tensors[name].to(dtype).detach().requires_grad_() for name in "qkv"]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, tensors["dout"].to(dtype))
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


class _Decode:
    """One decode step, the write of the new token included, of `rows` sequences of `context` tokens."""

    rows: int
    context: int
    context_cpu: int

    def setup(self):
        gpu = self.device in ("cuda", "xpu")
        self.dtype = torch.bfloat16 if gpu else torch.float32
        B, S = self.rows, self.context if gpu else self.context_cpu
        H, HK, D = (32, 8, 128) if gpu else (8, 2, 64)
        self.config = self.kernel.UniqueConfig(budget=512 if gpu else 128)

        def random(*shape, scale=1.0):
            return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale

        self.q = random(B, H, 1, D)
        # keys with structure, or every page would look alike; small values keep the outputs below 1, where the fixed
        # 1e-2 of the command exceeds the spacing of bf16 numbers
        self.k = random(B, HK, S, D).add_(2 * random(B, HK, S // 16, D).repeat_interleave(16, 2))
        self.v = random(B, HK, S, D, scale=0.2)
        self.new = tuple(x[:, :, -1:].clone() for x in (self.k, self.v))
        self.lens = torch.full((B,), S, device=self.device, dtype=torch.int32)
        self.how = {name: getattr(self.config, name) for name in ("page_size", "score", "stats_dtype")}
        self.stats = self.kernel.page_stats(self.k, **self.how)
        # the step itself has to bring the last token
        self.k[:, :, -1:], self.v[:, :, -1:] = 0, 0
        self.counters = torch.zeros(B * HK * self.kernel.ops.ROW_COUNTERS, device=self.device, dtype=torch.int32)

    def benchmark_unique(self):
        self.out, self.page_ids = self.kernel.unique_decode(
            self.q, self.k, self.v, self.stats, config=self.config, seq_lens=self.lens, counters=self.counters,
            new=self.new, return_page_ids=True,
        )  # fmt: skip

    def benchmark_dense(self):
        self.k[:, :, -1:], self.v[:, :, -1:] = self.new
        self.out = F.scaled_dot_product_attention(self.q, self.k, self.v, enable_gqa=True)

    def verify_unique(self) -> torch.Tensor:
        if not all(torch.equal(x[:, :, -1:], new) for x, new in zip((self.k, self.v), self.new)):
            raise RuntimeError("the new token is not in the cache")
        for row in range(len(self.q)):
            self._check_selection(slice(row, row + 1))
        return self._reference(self.page_ids)

    def verify_dense(self) -> torch.Tensor:
        pages = self.k.shape[2] // self.config.page_size
        every = torch.arange(pages, device=self.q.device, dtype=torch.int32)
        return self._reference(every.expand(*self.k.shape[:2], pages))

    def _reference(self, page_ids: torch.Tensor) -> torch.Tensor:
        # row by row: float64 copies of all keys may not fit
        oracle, low = [], []
        for row in range(len(self.q)):
            q, k, v, ids = (x[row : row + 1] for x in (self.q, self.k, self.v, page_ids))
            how = {"page_size": self.config.page_size, "impl": "reference"}
            oracle.append(self.kernel.sparse_decode(q.double(), k.double(), v.double(), ids, **how))
            low.append(self.kernel.sparse_decode(q, k, v, ids, **how))
        expected, rounded = torch.cat(oracle), torch.cat(low)
        if self.dtype != torch.float32:
            # probabilities are rounded to the dtype of the values before the second product
            rounded = rounded + rounded.abs().max() * torch.finfo(self.dtype).eps
        check_error("output", self.out, expected, rounded)
        return expected.to(self.dtype)

    def _check_selection(self, row: slice) -> None:
        """The kept pages of a row are those of the reference; scores closer than rounding may stand for each other."""
        k, q, page_ids = self.k[row], self.q[row], self.page_ids[row]
        stats = type(self.stats)(*(x if x is None else x[row] for x in self.stats))
        expected = self.kernel.page_stats(k, **self.how, impl="reference")
        # a code on the edge between two steps may fall either way
        if not (stats.codes.view(torch.uint8) != expected.codes.view(torch.uint8)).double().mean() <= 0.04:
            raise RuntimeError("the statistics differ from the reference's in more than rounding")
        config = self.config
        scores = self.kernel.page_scores(
            q.double(), stats, **self.how, score_weight=config.score_weight, group_reduce=config.group_reduce,
            impl="reference",
        ).double()  # fmt: skip
        wanted = self.kernel.select_pages(
            scores, num_kept=config.num_kept, sink_pages=config.sink_pages, recent_pages=config.recent_pages,
            page_size=config.page_size, impl="reference",
        )  # fmt: skip
        kept, wanted = (
            torch.zeros_like(scores, dtype=torch.bool).scatter(-1, i.long(), True) for i in (page_ids, wanted)
        )
        # 4-bit codes meet the query as 8-bit numbers: half a step of rounding in each dim, of either page
        means = k.double().unflatten(2, (-1, config.page_size)).mean(3)
        band = 2 * q.abs().max().double() / 254 * 1.25 * means.abs().sum(-1).max()
        different = kept ^ wanted
        highest, lowest = (scores.masked_fill(~different, s * torch.inf) for s in (-1, 1))
        spread = (highest.amax(-1) - lowest.amin(-1)).max()
        if not (kept.sum(-1) == config.num_kept).all() or not spread <= band:
            raise RuntimeError(f"other pages than the reference's: scores differ by {spread:.3g}, expected {band:.3g}")


class OneRow(_Decode, Benchmark):
    """A single long sequence: 131,072 tokens."""

    seed = 0
    rows, context, context_cpu = 1, 131072, 2048


class ManyRows(_Decode, Benchmark):
    """A batch: 16 sequences of 32,768 tokens."""

    seed = 1
    rows, context, context_cpu = 16, 32768, 256


class TrainingStep(Benchmark):
    """Forward and all gradients of one layer over 2,048 tokens (as many as the reference's `T x T` tensors allow)."""

    seed = 2

    def setup(self):
        gpu = self.device in ("cuda", "xpu")
        self.dtype = torch.bfloat16 if gpu else torch.float32
        H, HK, T, D = (32, 8, 2048, 128) if gpu else (4, 2, 64, 32)
        shapes = {"q": (1, H, T, D), "k": (1, HK, T, D), "v": (1, HK, T, D), "dout": (1, H, T, D)}
        self.tensors = {n: torch.randn(s, device=self.device, dtype=self.dtype) for n, s in shapes.items()}
        # see `_Decode.setup`
        self.tensors["v"] *= 0.2
        self.settings = {"page_size": 4, "num_kept": 64 if gpu else 8, "temperature": 1.0}

    def _unique(self, q, k, v, impl=None):
        return self.kernel.soft_mask_attention(q, k, v, **self.settings, impl=impl)

    @staticmethod
    def _dense(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def benchmark_unique(self):
        self.results = grad_outputs(self._unique, self.tensors, self.dtype)
        self.out = self.results["out"]

    def benchmark_dense(self):
        self.results = grad_outputs(self._dense, self.tensors, self.dtype)
        self.out = self.results["out"]

    def verify_unique(self) -> torch.Tensor:
        return self._verify(lambda q, k, v: self._unique(q, k, v, impl="reference"))

    def verify_dense(self) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self._verify(self._dense)

    def _verify(self, reference) -> torch.Tensor:
        oracle = grad_outputs(reference, self.tensors, torch.float64)
        low = grad_outputs(reference, self.tensors, self.dtype)
        for name, expected in oracle.items():
            check_error(name, self.results[name], expected, low[name])
        return oracle["out"].to(self.dtype)
