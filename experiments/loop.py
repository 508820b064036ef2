"""A loop for models that train.py cannot build: the same steps, on one device, as a generator.

    config = settings("micro", dataset="shakespeare", precision="bf16", vocab_size=4096, seed=1)
    model = GPT(config, generator_for(config, "init"))
    for step in train(model, config):  # before each step, and once more after the last
        print(step, evaluate(model, config))

A plain GPT gets train.py's losses and weights, on a CPU bit for bit with as many threads. What is
done between two steps disturbs nothing, as all that is random has seeds of its own.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import torch

from data.shards import load
from model import ModelConfig

PURPOSES = "init", "data", "noise", "sample", "evaluation"
DEFAULTS = {  # train.py's
    "max_steps": 320, "batch_size": 16, "learning_rate": 2e-3, "min_lr": 0.1, "warmup_steps": 32,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "eval_windows": 128,
    "seed": 1337,
}  # fmt: skip
PRESETS = {  # train.py's, but for the shape of smollm2's model, which brings its own
    "nano": {"dataset": "shakespeare"},
    "micro": {"n_head": 2, "n_kv_head": 1, "dim": 128, "ffn_dim": 384, "max_steps": 400,
              "learning_rate": 3e-3, "warmup_steps": 30},
    "smollm2": {"dataset": "shakespeare-smollm2", "block_size": 512, "batch_size": 2,
                "max_steps": 60, "learning_rate": 1e-4, "warmup_steps": 5, "eval_windows": 8},
}  # fmt: skip


def settings(preset, **changes):
    """A run's fields, named as in train.py; a model's config is part of them."""
    return SimpleNamespace(**vars(ModelConfig()) | DEFAULTS | PRESETS[preset] | changes)


def once(path, make):
    """The record that make() returned when path, a JSON file, was not there yet."""
    if not path.exists():
        record = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record))
        part.rename(path)
    return json.loads(path.read_text())


def seed_for(config, purpose, step=0):
    key = (config.seed, PURPOSES.index(purpose), step, 0)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator_for(*key):
    return torch.Generator().manual_seed(seed_for(*key))


def batch(tokens, starts, config, device):
    """Inputs and targets (B, T), int64."""
    window = tokens.batch(starts, config.block_size + 1).to(device)
    return window[:, :-1], window[:, 1:]


def learning_rate(step, config):
    """Linear warm-up, then a cosine to min_lr times the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return config.learning_rate * (config.min_lr + (1 - config.min_lr) * cosine)


@torch.no_grad()
def evaluate(model, config):
    """Mean loss in nats over the run's windows of validation text."""
    torch.manual_seed(seed_for(config, "evaluation"))
    tokens, device = load(config.dataset, "val"), model.head.weight.device
    starts = tokens.spaced(config.eval_windows, config.block_size + 1)
    total = torch.zeros((), device=device)
    for rows in starts.split(config.batch_size):
        total += model(*batch(tokens, rows, config, device)) * len(rows)
    return (total / len(starts)).item()


def train(model, config):
    """Train a model in place, from where it is. Yields the number of steps done: 0, 1, ...,
    max_steps. SystemExit where the gradient is not finite."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=decay, fused=True)
    tokens, device = load(config.dataset, "train"), model.head.weight.device
    windows = tokens.windows(config.block_size + 1)
    for step in range(config.max_steps):
        yield step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        torch.manual_seed(seed_for(config, "noise", step))
        generator = generator_for(config, "data", step)
        starts = torch.randint(windows, (config.batch_size,), generator=generator)
        model(*batch(tokens, starts, config, device)).backward()
        limit = config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        if not norm.isfinite():
            raise SystemExit(f"error: step {step}: gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    yield config.max_steps
