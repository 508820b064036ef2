"""A Qwen3-style decoder whose block linears are FP4Linear; all else stays in high precision.

Pre-norm blocks of grouped-query attention (RMSNorm on queries and keys, rotary positions) and a
SwiGLU feed-forward layer, no biases: Qwen3 (arXiv 2505.09388). Without qk_norm it is Llama; without
qk_norm and with qkv_bias, Qwen2. For equal weights transformers' model of that name has the same
logits, to 1e-4.
Queries, keys and values come from one linear, gate and up from another, so that they share the
rounding of their input.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fp4 import FP4Linear

CHECKPOINT_FORMAT = "nanofp4 checkpoint 2"


@dataclasses.dataclass
class ModelConfig:
    """A decoder's shape, by default that of the preset nano. The comments are train.py's help."""

    precision: str = "fp4_mean"  # recipe of the block linears: fp32, bf16, fp4, fp4_mean, or more
    bf16_blocks: int = 0  # keep the last N blocks in bf16
    vocab_size: int = 0  # token embeddings; 0: the dataset's, up to a multiple of 64
    block_size: int = 128  # context length in tokens
    n_layer: int = 4  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key and value heads; divides n_head
    head_dim: int = 64  # features of a head; even
    dim: int = 256  # features of the residual stream; a multiple of 16
    ffn_dim: int = 768  # hidden features of the feed-forward layer; a multiple of 16
    tied: bool = True  # the head shares the embedding's weight
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # epsilon of the RMS norms
    qk_norm: bool = True  # RMS norms on queries and keys, as in Qwen3 but not in Llama
    qkv_bias: bool = False  # biases on queries, keys and values, as in Qwen2


class RMSNorm(nn.RMSNorm):
    """Computed in FP32 whatever the input's dtype, which the output has again."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864). x (B, heads, T, head_dim); cos, sin (T, head_dim/2)."""
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
        self.q_norm = norm(self.head_dim, config.norm_eps)
        self.k_norm = norm(self.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, cache):  # x (B, T, dim)
        batch, time, _ = x.shape
        qkv = self.qkv(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, heads, T, head_dim)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cache:  # then x is one token (GPT.forward checks), and sees the last `window` tokens
            k = torch.cat((cache[0], k), 2)[:, :, -self.window :]
            v = torch.cat((cache[1], v), 2)[:, :, -self.window :]
        if cache is not None:
            cache[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=time > 1, enable_gqa=True)
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
    on a GPU (FP32 for precision fp32), FP32 on a CPU. ValueError for an unknown recipe, and where
    it rounds to FP4, for widths that are no multiple of 16."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        for i in range(config.n_layer):
            high = i >= config.n_layer - config.bf16_blocks
            self.blocks.append(Block(config, "bf16" if high else config.precision))
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

    @classmethod
    def load(cls, path, device="cpu", precision=None):
        """The model of a run's folder, or of one of its checkpoints, in evaluation mode, and in
        `model.run` what else the checkpoint holds. precision: a recipe instead of the run's own."""
        run = load_checkpoint(path, device)
        fields = {field.name for field in dataclasses.fields(ModelConfig)}
        config = ModelConfig(**{k: v for k, v in run["config"].items() if k in fields})
        config.precision = precision or config.precision
        model = cls(config).to(device)
        model.load_state_dict(run.pop("model"))
        del run["optimizer"]
        model.run = run
        return model.eval()

    def forward(self, tokens, targets=None, cache=None, start=0):
        """Logits, or with targets (B, T) the mean cross-entropy in nats. cache: n_layer lists that
        keep keys and values: empty at the first call, which takes any T, later T is 1. start: how
        many tokens came before. Where activations are BF16, so is the head's product."""
        if cache and cache[0] and tokens.shape[1] > 1:
            raise ValueError("after the first call a cache takes one token at a time")
        x = self.embedding(tokens)
        if x.is_cuda and self.config.precision != "fp32":
            x = x.bfloat16()
        cos, sin = self.rope(start, tokens.shape[1], x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache and cache[i])
        logits = F.linear(self.norm(x), self.head.weight.to(x.dtype)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def rope(self, start, time, device):
        """Cosines and sines (time, head_dim/2), FP32 whatever torch's default dtype."""
        c, fp32 = self.config, {"dtype": torch.float32, "device": device}
        frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, **fp32) / c.head_dim)
        angle = torch.arange(start, start + time, **fp32)[:, None] * frequency  # radians
        return angle.cos(), angle.sin()

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None, generator=None):
        """Append n sampled tokens to tokens (B, T): (B, T + n). temperature 0 takes the likeliest.

        Keys and values are cached; attention sees the last block_size tokens. A single token is its
        own mean, so at batch size 1 fp4_mean decodes in high precision; tools/stored_means.py
        changes that."""
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
                p = F.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
                fresh = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
            tokens = torch.cat((tokens, fresh), 1)
        return tokens


def load_checkpoint(path, device="cpu"):
    """A checkpoint, or that of a run's folder: the dict that was saved, with its "folder" added.
    Nothing in it is executed."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise SystemExit(f"error: no checkpoint at {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=True)
        known = state["format"] == CHECKPOINT_FORMAT
    except Exception:  # what a broken pickle raises has no common type
        known = False
    if not known:
        raise SystemExit(f"error: {path} is cut short, or no checkpoint of this project")
    return state | {"folder": path.parent}
