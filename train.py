"""Pretrain a GPT in NVFP4, BF16, or any other recipe, on one CPU, one GPU or several.

    python train.py --precision fp4_mean              on a CPU the nano preset, about 5 minutes
    python train.py --preset 124m --dataset fineweb
    python train.py --init hf/smollm2 --dataset shakespeare-smollm2 --learning-rate 1e-4
    python train.py --resume --out-dir out/nano-fp4_mean
    torchrun --nproc-per-node 8 train.py --preset 124m --dataset fineweb
    torchrun --nproc-per-node 8 train.py --preset qwen3-4b --dataset fineweb

A run is a folder: config.json, metrics.jsonl, checkpoint.pt, loss.png. Whatever is random at a step
is a function of (seed, purpose, step, rank) alone. So runs that differ only in --precision start
from the same weights and see the same batches, evaluation disturbs nothing, and a resumed run
repeats, bit for bit, the run that was not interrupted.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import fp4
from checkpoint import CHECKPOINT_FORMAT, initial_weights, resume_run, save, write_text
from cli import UserError, script
from data.shards import load, prepare_if_missing
from data.vocab import get_encoding
from experiments.recipes import AddedMean
from memory import gather, recompute, shard
from model import GPT
from run import World, generator_for, parse, seed_for

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense BF16


# ------------------------------------------------------------------------------------------------
# The parts of a step.


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


def make_optimizer(model, config):
    """AdamW: matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)


@torch.no_grad()
def evaluate(model, tokens, config, world):
    """Mean loss in nats over fixed windows, in batches of the training size, with rounding noise of
    its own."""
    torch.manual_seed(seed_for(config, "evaluation", 0, world.rank))
    starts = tokens.spaced(config.eval_windows, config.block_size + 1)
    total = torch.zeros((), device=world.device)
    for chunk in starts.split(max(config.batch_size // config.grad_accum, world.size)):
        mine = world.share(chunk)
        rows = mine if len(mine) else chunk[:1]  # a sharded model runs in all processes or in none
        total += model(*batch(tokens, rows, config, world.device)) * len(mine)
    return world.mean(total) * world.size / len(starts)


@torch.no_grad()
def mean_share(model, ids):
    """fp4.mean_share of what FP4Linears round, a mean over them; ids (B, T)."""
    shares = []

    def look(layer, inputs):
        x, recipe = inputs[0].flatten(0, -2), layer.recipe
        shares.append(fp4.mean_share(x + recipe.mean(x) if isinstance(recipe, AddedMean) else x))

    layers = [m for m in model.modules() if isinstance(m, fp4.FP4Linear)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(shares).mean().item()


# ------------------------------------------------------------------------------------------------
# The folder of a run.


def plot(metrics, path, title):
    os.environ["MPLBACKEND"] = "agg"  # a notebook's need not be installed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        axes.plot(*np.array(points).reshape(-1, 2).T, style, lw=0.8, ms=4, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def bits_per_byte(loss, tokens):
    """Comparable across tokenizers, unlike the loss per token; loss in nats."""
    return f"{loss / math.log(2) / tokens.bytes_per_token:.4f}" if tokens.bytes_per_token else "n/a"


def sample(model, config, tokenizer, world):
    encoding = get_encoding(tokenizer)
    prompt = torch.tensor([[encoding.eot_token]], device=model.head.weight.device)
    ids = model.generate(prompt, 100, 0.8, 50, generator_for(config, "sample"))[0, 1:].tolist()
    text = encoding.decode([t for t in ids if t < encoding.n_vocab])
    world.print(f"\n--- sample ---\n{text}\n---")


def attempt(what, world, f, *args):
    """What follows the training must not undo it."""
    try:
        return f(*args)
    except Exception as error:
        world.print(f"no {what}: {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------
# A run, from the first line to the last.


def train(config, resume, world):
    device, out = world.device, Path(config.out_dir)
    world.check(config)

    # data
    world.first(prepare_if_missing, config.dataset)
    train_tokens, val_tokens = load(config.dataset, "train"), load(config.dataset, "val")
    config.vocab_size = config.vocab_size or -(-train_tokens.vocab_size // 64) * 64
    if config.vocab_size < train_tokens.vocab_size:
        raise UserError(
            f"vocab_size {config.vocab_size} is less than {train_tokens.vocab_size}, that "
            f"of {config.dataset}"
        )
    windows = train_tokens.windows(config.block_size + 1)
    micro_batch = config.batch_size // config.grad_accum // world.size  # sequences of a process
    rows = val_tokens.spaced(micro_batch, config.block_size + 1)
    share_ids, _ = batch(val_tokens, rows, config, device)  # to measure the mean's share by

    # model, optimizer, and the folder
    model = GPT(config, generator_for(config, "init"))
    if config.init and not resume:
        model.load_state_dict(initial_weights(config, train_tokens))
    if config.shard:
        shard(model, world)
    else:
        model = model.to(device)
    if config.recompute:
        recompute(model)
    optimizer = make_optimizer(model, config)
    world.first(world.lock, out)  # before anything in it is read
    if not resume and (out / "checkpoint.pt").exists():
        raise UserError(
            f"{out} holds another run. HINT: --resume goes on with it, --out-dir names "
            "another folder"
        )
    step, metrics = 0, []
    if resume:
        step, metrics = resume_run(out, config, model, optimizer, world)
    world.wait()  # all have read
    if world.rank == 0:
        write_text(out / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        write_text(out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))

    # what runs, and how fast it could
    parameters = sum(p.numel() for p in model.parameters())
    tokens_per_step = config.batch_size * config.block_size
    flops_per_step = model.flops_per_token() * tokens_per_step
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((v for k, v in PEAK_FLOPS.items() if k in name), 0) * world.size
    world.print(
        f"{config.precision} on {world.size} x {name}: {parameters / 1e6:.2f} M parameters, "
        f"{config.dataset} {len(train_tokens):,} tokens, {tokens_per_step:,} a step"
    )
    if config.precision.startswith("fp4"):
        world.print(fp4.backend(device))
    forward = torch.compile(model) if config.compile else model
    if world.size > 1 and not config.shard:
        ids = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=ids)

    def log(**record):
        metrics.append(record)
        if world.rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def checkpoint(due):
        state = {"format": CHECKPOINT_FORMAT, "step": step, "config": dataclasses.asdict(config)}
        state["model"] = gather(model.state_dict(keep_vars=True))  # a tied weight is one object
        state["optimizer"] = gather(optimizer.state_dict())
        world.first(save, out / "checkpoint.pt", state)
        if config.keep and due:
            world.first(shutil.copy, out / "checkpoint.pt", out / f"step-{step}.pt")

    def diverged(what):
        path = out / "checkpoint.pt"
        saved = f"{path} is the last good state" if path.exists() else "nothing is saved"
        return UserError(
            f"step {step}: {what}; {saved}. HINT: a lower --learning-rate or more --warmup-steps"
        )

    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.append(True))
    began, times = time.monotonic(), []
    while True:
        # evaluate, then save: what evaluates to nan must not replace a good checkpoint
        stop = world.mean(torch.tensor(float(bool(interrupted)), device=device)) > 0
        last = step >= config.max_steps
        due = not stop and (last or step % config.eval_interval == 0)
        if due:
            val_loss = evaluate(model, val_tokens, config, world)
            if not math.isfinite(val_loss):
                raise diverged(f"val loss {val_loss}")
        if due or stop:
            checkpoint(due)
        if due:
            share = mean_share(model, share_ids)
            log(step=step, val_loss=val_loss, mean_share=share)
            world.print(f"step {step:6d}  val loss {val_loss:.4f}  mean share {share:.3f}")
        if stop or last:
            break

        # a step: forward and backward in micro-steps, clip, update
        tick = time.monotonic()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_for(config, "noise", step, world.rank))
        generator = generator_for(config, "data", step)
        starts = torch.randint(windows, (config.batch_size,), generator=generator)
        micro_steps = starts.view(config.grad_accum, -1)
        loss = torch.zeros((), device=device)
        for i, rows in enumerate(micro_steps, 1):
            x, y = batch(train_tokens, world.share(rows), config, device)
            # DDP adds gradients up in the last micro-step; FSDP in each, else it holds them whole
            wait = world.size > 1 and not config.shard and i < len(micro_steps)
            with forward.no_sync() if wait else contextlib.nullcontext():
                part = forward(x, y) / config.grad_accum
                part.backward()
            loss += part.detach()
        loss = world.mean(loss)
        clip = config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        norm = (norm.full_tensor() if config.shard else norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(f"loss {loss}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.monotonic() - tick)
        log(step=step, loss=loss, lr=lr, grad_norm=norm, seconds=times[-1])
        step += 1
        if step % config.log_interval == 0:
            pace = np.median(times[-50:])  # seconds; the median forgets compilation
            mfu = f"  mfu {flops_per_step / pace / peak:.1%}" if peak else ""
            world.print(
                f"step {step:6d}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
                f"{tokens_per_step / pace:,.0f} tokens/s{mfu}  "
                f"{(config.max_steps - step) * pace:.0f} s left"
            )

    # a curve, a sample, a summary
    if stop:
        world.print(
            f"stopped at step {step} and saved. HINT: python train.py --resume --out-dir {out}"
        )
        return
    title = f"{config.precision}, {config.dataset}"
    if world.rank == 0:
        attempt("loss curve", world, plot, metrics, out / "loss.png", title)
    attempt("sample", world, sample, model, config, train_tokens.tokenizer, world)
    losses = [m["loss"] for m in metrics if "loss" in m][-20:]
    summary = {
        "precision": config.precision,
        "parameters": parameters,
        "steps": step,
        "tokens": step * tokens_per_step,
        "train_loss": f"{np.mean(losses):.4f}" if losses else "n/a",
        "val_loss": f"{val_loss:.4f}",
        "bits_per_byte": bits_per_byte(val_loss, val_tokens),
        "tokens_per_second": f"{tokens_per_step / np.median(times or [math.inf]):.0f}",
        "seconds": f"{time.monotonic() - began:.1f}",
        "out_dir": out,
    }
    world.print("\n".join(f"{k}: {v}" for k, v in summary.items()))


def main(argv=None):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    config, resume = parse(__doc__, argv)
    world = World(config.device)
    try:
        train(config, resume, world)
        world.wait()  # gloo aborts a process that leaves in the middle of a collective
    finally:
        world.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    script(main)
