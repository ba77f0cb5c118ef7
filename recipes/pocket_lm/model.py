"""The network, plain torch: parameter names and numbers are those of transformers' Qwen3, so export is a copy."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, in the words of `Qwen3Config`."""

    vocab_size: int = 4096
    hidden_size: int = 320
    intermediate_size: int = 896
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6

    def to_qwen3(self):
        """The matching `Qwen3Config`."""
        from transformers import Qwen3Config

        values = asdict(self)
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        return Qwen3Config(
            **values, rope_parameters=rope, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
            bos_token_id=None, eos_token_id=0, pad_token_id=0, dtype="bfloat16",
        )  # fmt: skip


class Linear(nn.Linear):
    """No bias; the fp32 weight is rounded to the dtype of the activations."""

    def __init__(self, in_features, out_features, scale=1.0):
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight, std=scale / math.sqrt(in_features))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, computed in fp32 inside the fused op."""

    def __init__(self, size, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), value))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


def rotate(x, cos, sin):
    """Rotary embedding of `[B, T, H, D]`, halves rotated as in Qwen3; `cos` and `sin` are `[T, 1, D / 2]`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with QK-norm."""

    def __init__(self, shape):
        super().__init__()
        self.head_dim = shape.head_dim
        width, kv_width = (shape.head_dim * n for n in (shape.num_attention_heads, shape.num_key_value_heads))
        self.q_proj = Linear(shape.hidden_size, width)
        self.k_proj = Linear(shape.hidden_size, kv_width)
        self.v_proj = Linear(shape.hidden_size, kv_width)
        self.o_proj = Linear(width, shape.hidden_size, scale=0.3)
        self.q_norm = RMSNorm(shape.head_dim)
        self.k_norm = RMSNorm(shape.head_dim)

    def forward(self, x, cos, sin):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, self.v_proj(x).view(heads)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape):
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, scale=0.3)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm block."""

    def __init__(self, shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size)
        self.mlp = MLP(shape)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PocketLM(nn.Module):
    """Decoder with tied embeddings; `state_dict()` is that of `Qwen3Model`."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)  # std 1
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        # the head is the std-1 embedding: this scale makes the first logits O(1)
        self.norm = RMSNorm(shape.hidden_size, shape.hidden_size**-0.5)
        self.rope = None

    def forward(self, ids, dtype=torch.bfloat16):
        """Logits `[B, T, vocab]` in `dtype` of `ids [B, T]`."""
        x = self.embed_tokens(ids).to(dtype)
        cos, sin = self._rotary(ids.shape[1], ids.device, dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight.to(dtype))

    def _rotary(self, length, device, dtype):
        if self.rope is None or self.rope[0].shape[0] < length or self.rope[0].dtype != dtype:
            half = self.shape.head_dim // 2
            frequency = self.shape.rope_theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
            size = max(length, self.shape.max_position_embeddings)
            angle = torch.arange(size, device=device, dtype=torch.float32)[:, None, None] * frequency
            self.rope = (angle.cos().to(dtype), angle.sin().to(dtype))
        return self.rope[0][:length], self.rope[1][:length]

    def to_transformers(self, dtype=torch.bfloat16):
        """The same model as a `Qwen3ForCausalLM` on the CPU."""
        from transformers import Qwen3ForCausalLM

        model = Qwen3ForCausalLM(self.shape.to_qwen3()).to(dtype)
        model.model.load_state_dict({name: value.to("cpu", dtype) for name, value in self.state_dict().items()})
        model.tie_weights()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
        return model.eval()


class BatchedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` with matrices of one shape orthogonalised together; same update, a tenth of the launches.

    Equation: m = lerp(m, g, 1 - mu); p -= lr wd p + lr sqrt(max(1, rows / cols)) NewtonSchulz(lerp(g, m, mu)).
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, cols), params in shapes.items():
                states = [self.state[p] for p in params]
                for p, state in zip(params, states):
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                grads, buffers = [p.grad for p in params], [state["momentum_buffer"] for state in states]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).bfloat16()
                update = newton_schulz(update.mT).mT if rows > cols else newton_schulz(update)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * math.sqrt(max(1, rows / cols))
                torch._foreach_add_(params, list(update.to(params[0].dtype).unbind()), alpha=-scale)


def newton_schulz(x, steps=5):
    """Five quintic steps that push the singular values of each matrix of `[n, rows <= cols]` towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x
