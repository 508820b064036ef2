"""A Qwen3-style decoder whose block linears are FP4Linear; all else stays in high precision.

Pre-norm blocks of grouped-query attention (RMSNorm on queries and keys, rotary positions) and a
SwiGLU feed-forward layer, no biases: Qwen3 (arXiv 2505.09388). Without qk_norm it is Llama, with
qkv_bias on top Qwen2; for equal weights transformers' model of that name has the same logits.
Queries, keys and values come from one linear, gate and up from another, so that each input is
quantized once.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError, why_not
from experiments.recipes import RECIPES, recipe_of
from fp4 import FP4Linear


def knob(default, help, **kwargs):
    """A dataclass field with the help text that the command line shows. low: a number's minimum;
    without it the number is above 0."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


@dataclasses.dataclass
class ModelConfig:
    """The defaults are the `nano` preset."""

    precision: str = knob("fp4_mean", "recipe of the block linears", choices=list(RECIPES))
    bf16_blocks: int = knob(0, "keep the last N blocks in bf16", low=0)
    added_mean: float = knob(
        0.0, "an experiment: a mean of this many RMS that only the rounding sees", low=0
    )
    vocab_size: int = knob(
        0, "token embeddings; 0: the dataset's, rounded up to a multiple of 64", low=0
    )
    block_size: int = knob(128, "context length in tokens")
    n_layer: int = knob(4, "blocks")
    n_head: int = knob(4, "query heads")
    n_kv_head: int = knob(2, "key and value heads; divides n_head")
    head_dim: int = knob(64, "features of a head")
    dim: int = knob(256, "features of the residual stream; a multiple of 16")
    ffn_dim: int = knob(768, "hidden features of the feed-forward layer; a multiple of 16")
    tied: bool = knob(True, "the head shares the embedding's weight")
    rope_theta: float = knob(10000.0, "base of the rotary frequencies")
    rope_factor: float = knob(1.0, "Llama 3's stretching of slow rotary frequencies; 1: none")
    norm_eps: float = knob(1e-6, "epsilon of the RMS norms")
    qk_norm: bool = knob(True, "RMS norms on queries and keys, as in Qwen3 but not in Llama")
    qkv_bias: bool = knob(False, "biases on queries, keys and values, as in Qwen2")

    def check(self):
        """UserError, naming the field, for a config that cannot work."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value not in choices:
                raise UserError(f"{field.name} {value!r} is not one of {', '.join(choices)}")
            number, low = type(value) in (int, float), field.metadata.get("low")
            if number and (problem := why_not(value, low)):
                raise UserError(f"{field.name} {value} {problem}")
        if self.n_head % self.n_kv_head or self.head_dim % 2:
            raise UserError(
                f"bad head split: n_head {self.n_head} must be a multiple of n_kv_head "
                f"{self.n_kv_head}, and head_dim {self.head_dim} even"
            )
        if self.bf16_blocks > self.n_layer:
            raise UserError(f"bf16_blocks {self.bf16_blocks} is more than n_layer {self.n_layer}")


class RMSNorm(nn.RMSNorm):
    """Computed in FP32 whatever the input's dtype, which the output has again."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def frequencies(config, device="cpu"):
    """The rotary frequencies in radians a token, (head_dim / 2,). rope_factor divides those that
    turn less than once in 8192 tokens, and those that turn less than 4 times in part, as in every
    Llama 3.x."""
    share = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    frequency = config.rope_theta**-share
    if config.rope_factor == 1:
        return frequency
    whole = ((8192 / (2 * math.pi) * frequency - 1) / 3).clamp(0, 1)
    return frequency * (whole + (1 - whole) / config.rope_factor)


def rotate(x, cos, sin):
    """Rotary positions. x (B, heads, T, head_dim); cos, sin (T, head_dim / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, recipe):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head
        self.head_dim, self.window = config.head_dim, config.block_size
        self.qkv = FP4Linear(config.dim, sum(self.heads) * self.head_dim, config.qkv_bias, recipe)
        self.out = FP4Linear(config.n_head * self.head_dim, config.dim, False, recipe)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(self.head_dim, config.norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, cache):  # x (B, T, dim)
        batch, time, _ = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_dim).split(self.heads, dim=2)
        q, k, v = (h.transpose(1, 2) for h in heads)  # (B, heads, T, head_dim)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        mask = None
        if cache:  # a new token sees itself and window - 1 tokens before it, cached ones too
            reach = slice(1 - self.window - time, None)
            k, v = (
                torch.cat((cache[0], k), 2)[:, :, reach],
                torch.cat((cache[1], v), 2)[:, :, reach],
            )
            old = k.shape[2] - time
            mask = torch.ones(time, old + time, dtype=torch.bool, device=x.device)
            mask = mask.tril(old).triu(old - self.window + 1)
        if cache is not None:
            cache[:] = k[:, :, -self.window :], v[:, :, -self.window :]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))


class FeedForward(nn.Module):
    def __init__(self, config, recipe):
        super().__init__()
        self.gate_up = FP4Linear(config.dim, 2 * config.ffn_dim, False, recipe)
        self.down = FP4Linear(config.ffn_dim, config.dim, False, recipe)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, recipe):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, recipe)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config, recipe)

    def forward(self, x, cos, sin, cache):
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """Token ids (B, T) -> FP32 logits (B, T, vocab_size). Parameters are FP32; activations are BF16
    on a GPU (FP32 for precision fp32), FP32 on a CPU."""

    def __init__(self, config, generator=None):
        super().__init__()
        config.check()
        self.config = config
        recipe = recipe_of(config.precision, config.added_mean)
        high = config.n_layer - config.bf16_blocks  # from this block on, bf16
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            Block(config, recipe if i < high else "bf16") for i in range(config.n_layer)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Normal, std .02, or .02 / sqrt(2 n_layer) for what writes to the residual stream (GPT-2);
        biases are zero."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("attention.out.weight", "ffn.down.weight"))
                scale = (2 * self.config.n_layer) ** -0.5 if writes else 1.0
                p.normal_(0.0, 0.02 * scale, generator=generator)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, tokens, targets=None, cache=None, start=0):
        """Logits, or with targets (B, T) the mean cross-entropy in nats. cache: n_layer lists,
        empty before the first call, that keep keys and values; start: the tokens before these."""
        x = self.embedding(tokens)
        x = x.bfloat16() if x.is_cuda and self.config.precision != "fp32" else x
        cos, sin = self.rope(start, tokens.shape[1], x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache and cache[i])
        logits = F.linear(self.norm(x), self.head.weight.to(x.dtype)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def rope(self, start, time, device):
        position = torch.arange(start, start + time, device=device)
        angle = position[:, None] * frequencies(self.config, device)
        return angle.cos(), angle.sin()

    def flops_per_token(self):
        """Forward and backward: 6 a matrix parameter, and attention's products (PaLM, app. B)."""
        c = self.config
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.ndim == 2)
        matrices -= 0 if c.tied else self.embedding.weight.numel()
        return 6 * matrices + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None, generator=None):
        """Append n sampled tokens to tokens (B, T): (B, T + n). temperature 0 takes the likeliest.
        Keys and values are cached; attention sees the last block_size tokens.

        The mean over a single token is the token itself, so at batch size 1 fp4_mean decodes in
        high precision, but with stored means (inference.py) in 4 bits."""
        cache = [[] for _ in self.blocks]
        fresh = tokens[:, -self.config.block_size :]
        start = 0
        for _ in range(n):
            logits = self(fresh, cache=cache, start=start)[:, -1]
            start += fresh.shape[1]
            if top_k is not None:
                kept = logits.topk(min(top_k, logits.shape[-1])).values
                logits[logits < kept[:, -1:]] = -torch.inf
            if temperature == 0:
                fresh = logits.argmax(-1, keepdim=True)
            else:
                logits -= logits.amax(-1, keepdim=True)  # a tiny temperature makes no inf - inf
                p = F.softmax(logits / temperature, -1)
                fresh = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
            tokens = torch.cat((tokens, fresh), 1)
        return tokens
