"""Pretrain a GPT in NVFP4, BF16, or any other recipe, on one CPU, one GPU or several.

    python train.py --precision fp4_mean              on a CPU the preset nano, about 5 minutes
    python train.py --resume --out-dir out/nano-fp4_mean
    torchrun --nproc-per-node 8 train.py --preset qwen3-0.6b --dataset fineweb --shard --recompute

A run is a folder: config.json, metrics.jsonl, checkpoint.pt, loss.png. Whatever is random at a step
is a function of (seed, purpose, step, rank) alone. So runs that differ only in --precision start
from the same weights and see the same batches, evaluation disturbs nothing, and a resumed run
repeats the run that was not interrupted: on a CPU bit for bit, with as many threads and processes.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from matplotlib.figure import Figure
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fp4
from data.shards import load, prepare_if_missing
from data.tokenizer import TOKENIZERS, encoding_of
from model import CHECKPOINT_FORMAT, GPT, ModelConfig, load_checkpoint


@dataclasses.dataclass
class Config(ModelConfig):
    """A run. The comments, here and in ModelConfig, are the help of the command line."""

    dataset: str = "shakespeare"  # a folder under data/, or a path to one
    out_dir: str = ""  # the run's folder; by default out/PRESET-PRECISION
    init: str = ""  # start from the weights of another run, or of an imported model
    max_steps: int = 320  # optimizer steps
    batch_size: int = 16  # sequences a step, over all processes and micro-steps
    grad_accum: int = 1  # micro-steps a step, for batches that do not fit in memory
    learning_rate: float = 2e-3  # peak learning rate of AdamW
    min_lr: float = 0.1  # final learning rate, as a share of the peak
    warmup_steps: int = 32  # steps of linear warm-up; a cosine follows
    weight_decay: float = 0.1  # of the matrices; vectors have none
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    eval_interval: int = 80  # steps between evaluations, each followed by a checkpoint
    eval_windows: int = 128  # validation sequences, evenly spaced, always the same
    log_interval: int = 10  # steps between progress lines
    keep: bool = False  # keep the checkpoint of every evaluation, as step-N.pt
    seed: int = 1337  # of weights, batches and rounding noise
    device: str = ""  # cpu, cuda or cuda:N; by default a GPU if there is one
    compile: bool = False  # torch.compile the whole model
    shard: bool = False  # split parameters, gradients and AdamW's moments over processes (FSDP2)
    recompute: bool = False  # keep only the blocks' inputs, and run blocks again in backward


PRESETS = {  # what differs from the defaults
    "nano": {},
    "micro": {"n_head": 2, "n_kv_head": 1, "dim": 128, "ffn_dim": 384, "max_steps": 400,
              "learning_rate": 3e-3, "warmup_steps": 30, "eval_interval": 100},
    "small": {"n_layer": 8, "n_head": 8, "n_kv_head": 4, "dim": 512, "ffn_dim": 1536,
              "block_size": 256, "batch_size": 64, "max_steps": 1000, "learning_rate": 1e-3,
              "warmup_steps": 100, "eval_interval": 200},
    "124m": {"n_layer": 12, "n_head": 12, "n_kv_head": 6, "dim": 768, "ffn_dim": 2304,
             "block_size": 1024, "batch_size": 480, "grad_accum": 30, "max_steps": 20000,
             "learning_rate": 6e-4, "warmup_steps": 700, "eval_interval": 500,
             "eval_windows": 480},
    "qwen3-0.6b": {"n_layer": 28, "n_head": 16, "n_kv_head": 8, "head_dim": 128, "dim": 1024,
                   "ffn_dim": 3072, "block_size": 4096, "rope_theta": 1e6, "batch_size": 256,
                   "grad_accum": 64, "max_steps": 100000, "learning_rate": 3e-4,
                   "warmup_steps": 2000, "eval_interval": 1000, "eval_windows": 256},
    "smollm2": {"init": "out/smollm2", "dataset": "shakespeare-smollm2", "block_size": 512,
                "batch_size": 2, "max_steps": 60, "learning_rate": 1e-4, "warmup_steps": 5,
                "eval_interval": 12, "eval_windows": 8},
}  # fmt: skip
FREE_WITH_INIT = {"precision", "bf16_blocks", "block_size"}  # of a model; the rest is --init's
FREE_ON_RESUME = {
    "out_dir", "init", "dataset", "device", "compile", "shard", "recompute",
    "max_steps", "eval_interval", "log_interval", "keep",
}  # fmt: skip
PURPOSES = "init", "data", "noise", "sample", "evaluation"  # their order is part of every seed


def parse(argv):
    """(Config, whether to resume) of a command line. What counts is first a flag, then the preset
    or with --resume the run's own config, then the default. With --init the model's shape is that
    of the other run."""
    source = inspect.getsource(ModelConfig) + inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # 40 lines before each error
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(PRESETS)
    parser.add_argument("--preset", help=f"{names}, or a config.json (nano; on a GPU small)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out-dir")
    for field in dataclasses.fields(Config):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{comments[field.name]} ({field.default})",
            **kind,
        )
    flags = vars(parser.parse_args(argv))
    preset, resume = flags.pop("preset"), flags.pop("resume")
    if resume:
        if preset or not flags.get("out_dir"):
            parser.error("--resume takes the run's --out-dir, and no --preset")
        saved = load_checkpoint(flags["out_dir"])["config"]
        for name, value in flags.items():
            if name not in FREE_ON_RESUME and value != saved.get(name):
                parser.error(f"the run in {flags['out_dir']} has {name} {saved.get(name)}")
        return Config(**saved | flags), resume
    if not preset and "init" not in flags:
        gpu = torch.cuda.is_available() and flags.get("device") != "cpu"
        preset = "small" if gpu else "nano"
    if preset in (None, *PRESETS):
        values = PRESETS.get(preset, {}) | flags
        name = preset or Path(flags["init"]).name
    elif preset.endswith(".json") and Path(preset).exists():
        values = json.loads(Path(preset).read_text()) | {"out_dir": ""} | flags
        name = Path(preset).resolve().parent.name
    else:
        parser.error(f"no preset {preset!r}: there are {names}, and config.json files of runs")
    if values.get("init"):
        path = values["init"]
        if not Path(path).exists():
            parser.error(f"no run in {path}. HINT: python -m tools.hf smollm2 {path}")
        given = {field.name for field in dataclasses.fields(ModelConfig)} - FREE_WITH_INIT
        if clash := given & flags.keys():
            parser.error(f"{path} has a {', '.join(clash)} of its own")
        shape = load_checkpoint(path)["config"]
        values |= {name: shape[name] for name in given}
    config = Config(**values)
    config.out_dir = config.out_dir or f"out/{name}-{config.precision}"
    return config, resume


# ------------------------------------------------------------------------------------------------
# The parts of a step.


def seed_for(config, purpose, step=0, rank=0):
    """A 63-bit seed for one purpose, step and rank, independent of all others."""
    key = (config.seed, PURPOSES.index(purpose), step, rank)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator_for(*key):
    return torch.Generator().manual_seed(seed_for(*key))


def batch(tokens, starts, config, device):
    """Inputs and targets (B, T), int64: the windows of these numbers, counted as by Tokens."""
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
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    return torch.optim.AdamW(groups, betas=betas, weight_decay=decay, fused=True)


def mean_over_ranks(value):
    """A scalar tensor, averaged over the processes, as a float."""
    value = value.detach().double()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


@torch.no_grad()
def evaluate(model, tokens, config, device, rank, world_size):
    """Mean loss in nats over fixed windows, in batches of the training's size. Where a recipe
    rounds X at random, the noise is evaluation's own."""
    torch.manual_seed(seed_for(config, "evaluation", 0, rank))
    starts = tokens.spaced(config.eval_windows, config.block_size + 1).view(world_size, -1)[rank]
    total = torch.zeros((), device=device)
    for rows in starts.split(config.batch_size // config.grad_accum // world_size):
        total += model(*batch(tokens, rows, config, device)) * len(rows)
    return mean_over_ranks(total / len(starts))


@torch.no_grad()
def mean_share(model, ids):
    """fp4.mean_share of what FP4Linears round, a mean over them; ids (B, T)."""
    shares = []

    def look(layer, inputs):
        shares.append(fp4.mean_share(inputs[0]))

    layers = [m for m in model.modules() if isinstance(m, fp4.FP4Linear)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(shares).mean().item()


# ------------------------------------------------------------------------------------------------
# The folder of a run.


def save(path, model, optimizer, config, step, origin):
    """Write a checkpoint, whole or not at all. Its tensors are whole, however many processes made
    it, so that any number can go on. All of them must call this. origin: tokenizer and data."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {"format": CHECKPOINT_FORMAT, "step": step, "config": dataclasses.asdict(config)}
    state |= origin
    state["model"] = dcp.get_model_state_dict(model, options=options)
    state["optimizer"] = None
    if optimizer.state:  # before the first step dcp would make a step of its own to fill it
        state["optimizer"] = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    if int(os.environ.get("RANK", 0)) == 0:
        part = path.with_suffix(".part")
        try:
            torch.save(state, part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # a full disk can be either
            part.unlink(missing_ok=True)
            raise SystemExit(f"error: cannot write {path}, the one before stays: {error}") from None


def restore(path, model, optimizer, origin):
    """Load a checkpoint of this run into model and optimizer; returns its step."""
    state = load_checkpoint(path)
    for what in ("tokenizer_hash", "data"):  # the folder of the dataset may have moved
        if state[what] != origin[what]:
            raise SystemExit(f"error: the dataset's {what} is not that of {path}. HINT: --dataset")
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_model_state_dict(model, state["model"], options=options)
    if state["optimizer"]:
        dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    return state["step"]


def read_metrics(path, before):
    """The records of metrics.jsonl before a step, without a last line that a kill has torn."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if r["step"] < before]


def plot(metrics, path, title):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        axes.plot(*np.array(points).reshape(-1, 2).T, style, lw=0.8, ms=4, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# A run, from the first line to the last.


def main(argv=None):
    config, resume = parse(argv)
    out = Path(config.out_dir)

    # processes, which torchrun names in the environment, and this one's device
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"error: --device {device}: PyTorch sees no CUDA GPU here")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    micro_batch = config.batch_size // config.grad_accum // world_size  # sequences of a process
    if config.batch_size % (config.grad_accum * world_size) or config.eval_windows % world_size:
        raise SystemExit(
            f"error: --batch-size {config.batch_size} must split into {world_size} processes times "
            f"{config.grad_accum} micro-steps, --eval-windows {config.eval_windows} into processes"
        )
    if config.shard and world_size == 1:
        raise SystemExit("error: --shard is for several processes. HINT: torchrun, or --no-shard")
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def say(text):
        if rank == 0:
            print(text, flush=True)

    # the folder, which one process at a time may use
    lock = filelock.FileLock(out / ".lock", timeout=0)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise SystemExit(f"error: another process is training in {out}") from None
        if not resume and (out / "checkpoint.pt").exists():
            raise SystemExit(f"error: {out} holds another run. HINT: --resume, or --out-dir")

    # data
    if rank == 0:
        prepare_if_missing(config.dataset)
    if world_size > 1:
        dist.barrier()
    train_tokens = load(config.dataset, "train")
    val_tokens = load(config.dataset, "val")
    encoding = encoding_of(
        train_tokens.directory, train_tokens.tokenizer, train_tokens.tokenizer_hash
    )
    origin = {
        "tokenizer": train_tokens.tokenizer,
        "tokenizer_hash": train_tokens.tokenizer_hash,
        "data": f"{train_tokens.fingerprint} {val_tokens.fingerprint}",
    }
    config.vocab_size = config.vocab_size or -(-train_tokens.vocab_size // 64) * 64
    if config.vocab_size < train_tokens.vocab_size:
        raise SystemExit(
            f"error: vocab_size {config.vocab_size} is less than the {train_tokens.vocab_size} of "
            f"{config.dataset}"
        )
    windows = train_tokens.windows(config.block_size + 1)
    rows = val_tokens.spaced(micro_batch, config.block_size + 1)
    share_ids, _ = batch(val_tokens, rows, config, device)  # to measure the mean's share by

    # model and optimizer
    try:
        model = GPT(config, generator_for(config, "init"))
    except ValueError as error:  # an unknown recipe, or a width
        raise SystemExit(f"error: {error}") from None
    if config.init and not resume:
        other = GPT.load(config.init)
        if other.run["tokenizer_hash"] != origin["tokenizer_hash"]:
            raise SystemExit(
                f"error: {config.dataset} has tokens of {origin['tokenizer']}, {config.init} reads "
                f"those of {other.run['tokenizer']}. HINT: the dataset's prepare --tokenizer"
            )
        model.load_state_dict(other.state_dict())
    parameters = sum(p.numel() for p in model.parameters())
    if config.shard:
        mesh = init_device_mesh(device.type, (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)  # what is left: embedding, last norm and head
    else:
        model = model.to(device)
    if config.recompute:
        for block in model.blocks:  # not the module: FSDP's hooks must stay outside
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    optimizer = make_optimizer(model, config)
    step = 0
    if resume:
        step = restore(out / "checkpoint.pt", model, optimizer, origin)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        part = out / "metrics.part"
        kept = read_metrics(out / "metrics.jsonl", step)
        part.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(part, out / "metrics.jsonl")
        if train_tokens.tokenizer not in TOKENIZERS:  # a run brings what reads its tokens
            encoding.save(out)

    # what runs
    tokens_per_step = config.batch_size * config.block_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(
        f"{config.precision} on {world_size} x {name}: {parameters / 1e6:.2f} M parameters, "
        f"{config.dataset} {len(train_tokens):,} tokens, {tokens_per_step:,} a step"
    )
    if config.precision not in ("fp32", "bf16"):
        say(fp4.use_fast_path(device))
    forward = torch.compile(model) if config.compile else model
    use_ddp = world_size > 1 and not config.shard
    if use_ddp:
        forward = DistributedDataParallel(forward, [device] if device.type == "cuda" else None)

    def log(**record):
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    hint = f"The last checkpoint in {out} is from before. HINT: a lower --learning-rate"
    interrupted = []

    def interrupt(number, _):
        interrupted.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    began, seconds = time.monotonic(), []
    while True:
        # Evaluate, then save: what evaluates to nan must not replace a good checkpoint. When
        # interrupted, save at once.
        stop = mean_over_ranks(torch.tensor(float(bool(interrupted)), device=device)) > 0
        last = step >= config.max_steps
        due = not stop and (last or step % config.eval_interval == 0)
        if due:
            val_loss = evaluate(model, val_tokens, config, device, rank, world_size)
            if not math.isfinite(val_loss):
                raise SystemExit(f"error: step {step}: val loss {val_loss}. {hint}")
        if due or stop:
            save(out / "checkpoint.pt", model, optimizer, config, step, origin)
        if due:
            if config.keep and rank == 0:
                shutil.copy(out / "checkpoint.pt", out / f"step-{step}.pt")
            share = mean_share(model, share_ids)
            log(step=step, val_loss=val_loss, mean_share=share)
            say(f"step {step:6d}  val loss {val_loss:.4f}  mean share {share:.3f}")
        if stop or last:
            break

        # a step: forward and backward in micro-steps, clip, update
        tick = time.monotonic()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_for(config, "noise", step, rank))
        generator = generator_for(config, "data", step)
        starts = torch.randint(windows, (config.batch_size,), generator=generator)
        loss = torch.zeros((), device=device)
        mine = starts.view(config.grad_accum, world_size, micro_batch)[:, rank]
        for i, rows in enumerate(mine):
            x, y = batch(train_tokens, rows, config, device)
            # DDP adds gradients up in the last micro-step, FSDP in each, to hold only its part
            hold = use_ddp and i < config.grad_accum - 1
            with forward.no_sync() if hold else contextlib.nullcontext():
                micro_loss = forward(x, y) / config.grad_accum
                micro_loss.backward()
            loss += micro_loss.detach()
        loss = mean_over_ranks(loss)
        limit = config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        if config.shard:
            norm = norm.full_tensor()
        norm = norm.item()
        if not math.isfinite(norm):  # nor is it where the loss is not
            raise SystemExit(f"error: step {step}: loss {loss}, norm {norm}. {hint}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - tick)
        log(step=step, loss=loss, lr=lr, grad_norm=norm, seconds=seconds[-1])
        step += 1
        if step % config.log_interval == 0:
            pace = np.median(seconds[-50:])  # the median forgets compilation
            say(
                f"step {step:6d}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
                f"{tokens_per_step / pace:,.0f} tokens/s  "
                f"{(config.max_steps - step) * pace:.0f} s left"
            )

    # a curve, a sample, a summary
    if stop:
        say(f"stopped at step {step} and saved. HINT: train.py --resume --out-dir {out}")
    else:
        prompt = torch.tensor([[encoding.eot_token]], device=device)
        ids = model.generate(prompt, 100, 0.8, 50, generator_for(config, "sample"))[0, 1:].tolist()
        text = encoding.decode([t for t in ids if t < encoding.n_vocab])
        say(f"\n--- sample ---\n{text}\n---")
        bits_per_byte = val_loss / math.log(2) / (val_tokens.bytes_per_token or math.nan)
        say(f"precision: {config.precision}")
        say(f"parameters: {parameters}")
        say(f"tokens: {step * tokens_per_step}")
        say(f"val_loss: {val_loss:.4f}")
        say(f"bits_per_byte: {bits_per_byte:.4f}")  # comparable across tokenizers
        say(f"seconds: {time.monotonic() - began:.1f}")
        say(f"out_dir: {out}")
        if rank == 0:
            metrics = read_metrics(out / "metrics.jsonl", step + 1)
            plot(metrics, out / "loss.png", f"{config.precision}, {config.dataset}")
    lock.release()
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
