"""The shapes that kernel tests share: one frozen case each, with a readable id."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from unique_attention.settings import UniqueConfig

# the interpreter runs on the CPU; otherwise these tests need a CUDA device
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one decode call."""

    B: int = 2
    HK: int = 2
    G: int = 4
    S: int = 77
    D: int = 64
    DV: int = 64
    P: int = 4
    K: int = 8
    dtype: torch.dtype = torch.float32
    stats_dtype: str = "fp8"
    score: str = "scalar"
    vote: str = "mean"
    padded: bool = True
    holes: bool = False
    table: bool = False
    softcap: float | None = None
    sinks: bool = False

    @property
    def id(self) -> str:
        """Names what differs from the default case."""
        default = Case()
        parts = []
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value != getattr(default, name):
                parts.append(f"{name}={str(value).removeprefix('torch.')}")
        return ",".join(parts) or "default"

    @property
    def config(self) -> UniqueConfig:
        """The settings of the case."""
        return UniqueConfig(
            page_size=self.P,
            budget=self.P * self.K,
            score=self.score,
            group_reduce=self.vote,
            stats_dtype=self.stats_dtype,
        )

    def tensors(self, seed: int = 0) -> dict:
        """Queries, cache and lengths; with `table`, shuffled physical pages of which two rows share the first."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(self.dtype)

        N = -(-self.S // self.P)
        S = N * self.P if self.table else self.S
        # keys with structure, or every page would look alike: a few directions per page and a common offset
        k = (
            random(self.B, self.HK, S, self.D)
            + 2 * random(self.B, self.HK, -(-S // 16), self.D).repeat_interleave(16, 2)[:, :, :S]
        )
        v = random(self.B, self.HK, S, self.DV)
        out = {
            "q": random(self.B, self.HK * self.G, 1, self.D),
            "seq_lens": torch.tensor([self.S - 11 * b for b in range(self.B)], dtype=torch.int32),
            "seq_starts": torch.tensor([(7 * b) % 20 for b in range(self.B)]) if self.padded else None,
            "token_mask": torch.rand(self.B, S, generator=generator) > 0.2 if self.holes else None,
            "page_table": None,
            "softcap": self.softcap,
            "sinks": random(self.HK * self.G) if self.sinks else None,
        }
        if self.table:
            order = torch.randperm(self.B * N, generator=generator)
            out["page_table"] = torch.argsort(order).reshape(self.B, N).to(torch.int32)

            def to_pages(x):
                pages = (
                    x.reshape(self.B, self.HK, N, self.P, -1).transpose(1, 2).reshape(self.B * N, self.HK, self.P, -1)
                )
                return pages[order].contiguous()

            k, v = to_pages(k), to_pages(v)
        out |= {"k": k, "v": v}
        return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in out.items()}


DEFAULT = Case()
STATS = [
    *(replace(DEFAULT, stats_dtype=s) for s in ("fp32", "bf16", "fp8", "int8", "int4")),
    *(
        replace(DEFAULT, score=s, stats_dtype="int4", P=8)
        for s in ("mean", "diagonal", "absolute", "moment", "minmax")
    ),
    *(replace(DEFAULT, score=s, P=16, S=150) for s in ("diagonal", "absolute", "minmax")),
    replace(DEFAULT, D=80, DV=80, stats_dtype="int4", HK=1),
    replace(DEFAULT, D=96, DV=96, stats_dtype="int8", HK=1),
    replace(DEFAULT, D=128, DV=128, P=2, stats_dtype="int4", HK=1),
    replace(DEFAULT, D=256, DV=256, P=128, S=300, K=4, HK=1, stats_dtype="fp8"),
    replace(DEFAULT, D=32, DV=32, P=64, S=300, K=4, stats_dtype="int8"),
    replace(DEFAULT, padded=False),
    replace(DEFAULT, holes=True),
    replace(DEFAULT, table=True, padded=False),
    replace(DEFAULT, dtype=torch.float16),
]
SCORES = [
    *STATS,
    *(
        replace(DEFAULT, vote=v, score=s)
        for v in ("max", "softmax_mean", "shifted_max")
        for s in ("scalar", "diagonal")
    ),
    replace(DEFAULT, G=1),
    replace(DEFAULT, G=7, HK=1, stats_dtype="int8"),
    replace(DEFAULT, G=16, HK=1),
]
DECODES = [
    *SCORES,
    replace(DEFAULT, D=96, DV=48, HK=1),
    replace(DEFAULT, softcap=5.0),
    replace(DEFAULT, sinks=True),
    replace(DEFAULT, softcap=3.0, sinks=True, holes=True, dtype=torch.float16),
    replace(DEFAULT, K=20),
]
