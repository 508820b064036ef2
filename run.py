"""What a run is: its config and command line, its random numbers, its folder, its processes.

A run is a folder: config.json, metrics.jsonl, checkpoint.pt, loss.png. Whatever is random in it is
a function of (seed, purpose, step, rank) alone.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist

from cli import Parser, UserError, is_a, read_json
from hf import is_hf, read_architecture
from model import ModelConfig, knob

PRESETS = Path(__file__).parent / "presets"
PURPOSES = "init", "data", "noise", "sample", "evaluation"  # their order is part of every seed
RENAMED = {"mean_bias": "added_mean"}  # names of Config in older runs
FREE = "precision", "bf16_blocks", "added_mean", "block_size"  # to choose beside --init


@dataclasses.dataclass
class Config(ModelConfig):
    dataset: str = knob("shakespeare", "a folder under data/, or a path to one")
    out_dir: str = knob("", "the run's folder; by default out/PRESET-PRECISION or INIT-PRECISION")
    init: str = knob("", "start from the weights of a Hugging Face directory or a run")
    max_steps: int = knob(320, "optimizer steps")
    batch_size: int = knob(16, "sequences a step, over all processes and micro-steps")
    grad_accum: int = knob(1, "micro-steps a step, for batches that do not fit in memory")
    learning_rate: float = knob(2e-3, "peak learning rate of AdamW")
    min_lr: float = knob(0.1, "final learning rate, as a share of the peak", low=0)
    warmup_steps: int = knob(32, "steps of linear warm-up; a cosine follows", low=0)
    weight_decay: float = knob(0.1, "of the matrices; vectors have none", low=0)
    beta1: float = knob(0.9, "AdamW", low=0)
    beta2: float = knob(0.95, "AdamW", low=0)
    grad_clip: float = knob(1.0, "largest gradient norm; 0: no clipping", low=0)
    eval_interval: int = knob(80, "steps between evaluations, each followed by a checkpoint")
    eval_windows: int = knob(128, "validation sequences, evenly spaced, always the same")
    log_interval: int = knob(10, "steps between progress lines")
    keep: bool = knob(False, "keep the checkpoint of every evaluation, as step-N.pt")
    seed: int = knob(1337, "of weights, batches and rounding noise", low=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    compile: bool = knob(False, "torch.compile the whole model")
    shard: bool = knob(False, "split parameters, gradients and AdamW's moments over processes")
    recompute: bool = knob(False, "keep only the blocks' inputs, and run blocks again in backward")


def parse(doc, argv):
    """(Config, whether to resume) of a command line, over the preset, the architecture of --init or
    with --resume the run's config, over the defaults. UserError, naming the argument, for what
    cannot work."""
    names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.json")))
    parser = Parser(doc)
    parser.add_argument(
        "--preset", help=f"{names}, or a config.json (nano on a CPU, small on a GPU)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out-dir")
    for field in dataclasses.fields(Config):
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": field.type, "choices": field.metadata.get("choices")}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} ({field.default})",
            **kind,
        )
    values = vars(parser.parse_args(argv))
    preset, resume, init = values.pop("preset"), values.pop("resume"), values.get("init")
    if resume:
        if preset or init or not values.get("out_dir"):
            raise UserError(
                "--resume needs the run's --out-dir, takes config and weights from there, and so "
                "no --preset and no --init"
            )
        values = {**read_config(Path(values["out_dir"]) / "config.json"), **values}
    elif init:
        if preset:
            raise UserError(
                "--init brings the architecture, and so takes no --preset. HINT: the settings of "
                "the training are flags"
            )
        name = Path(init).resolve().name.removesuffix(".pt")
    else:
        gpu = torch.cuda.is_available() and values.get("device") != "cpu"
        preset = preset or ("small" if gpu else "nano")
        path = Path(preset) if preset.endswith(".json") else PRESETS / f"{preset}.json"
        if not path.exists():
            raise UserError(f"no preset {preset!r}: there are {names}. HINT: or give a .json file")
        values, name = {**read_config(path), **values}, path.stem
    if values.get("init") and not resume:
        values = adopt(values)
    config = Config(**values)
    config.out_dir = config.out_dir or f"out/{name}-{config.precision}"
    config.check()
    return config, resume


def read_config(path):
    """A JSON object of Config's names as a dict. UserError for anything else."""
    return check_values(path, read_json(path))


def check_values(path, values):
    """A dict of Config's names and values of their types, as read from a file, with today's names.
    UserError for anything else."""
    types = {f.name: f.type for f in dataclasses.fields(Config)}
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{path}: unknown name {name!r}")
        if not is_a(value, types[name]):
            raise UserError(f"{path}: {name} {value!r} is no {types[name].__name__}")
    return values


def adopt(values):
    """Config's values with the architecture of the model in values["init"], a Hugging Face
    directory or a run. UserError, naming both, for a value that contradicts it."""
    path = Path(values["init"])
    if not path.exists():
        raise UserError(f"no model at {path}. HINT: python hf.py smollm2 {path} fetches one")
    if is_hf(path):
        theirs = read_architecture(path)
    else:  # a run's folder, or a checkpoint in it
        theirs = read_config((path if path.is_dir() else path.parent) / "config.json")
        theirs = {f.name: theirs.get(f.name, f.default) for f in dataclasses.fields(ModelConfig)}
    longest = theirs["block_size"]
    theirs = {name: value for name, value in theirs.items() if name not in FREE}
    for name, value in theirs.items():
        if values.get(name, value) != value:
            raise UserError(f"{name} {values[name]} contradicts {path}, which has {value}")
    block_size = values.get("block_size", min(Config.block_size, longest))
    if block_size > longest:
        raise UserError(f"block_size {block_size} is more than the {longest} of {path}")
    return {**theirs, **values, "block_size": block_size}


def seed_for(config, purpose, step=0, rank=0):
    """A 63-bit seed for one purpose, step and rank, independent of all others."""
    key = (config.seed, PURPOSES.index(purpose), step, rank)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator_for(*key):
    return torch.Generator().manual_seed(seed_for(*key))


class World:
    """The processes of this run, which torchrun names in the environment, and this one's device."""

    def __init__(self, device="auto"):
        self.held = None  # the folder's lock
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.split(":")[0] not in ("cpu", "cuda"):
            raise UserError(f"--device {device} is not auto, cpu, cuda or cuda:N")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch sees no CUDA GPU here")
        try:
            self.device = torch.device(device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
        except RuntimeError:
            raise UserError(f"--device {device}: there is no such device here") from None
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def check(self, config):
        """UserError for a config that does not split over these processes."""
        if config.batch_size % (self.size * config.grad_accum):
            raise UserError(
                f"batch_size {config.batch_size} does not split into {self.size} processes "
                f"times grad_accum {config.grad_accum}. HINT: --batch-size"
            )
        if config.shard and self.size == 1:
            raise UserError(
                "--shard splits the model over processes, and there is one. HINT: torchrun "
                "--nproc-per-node 2 train.py, or --no-shard"
            )

    def mean(self, value):
        """The mean of a scalar tensor over all processes, as a float."""
        value = value.detach().double()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def share(self, rows):
        return rows[self.rank * len(rows) // self.size : (self.rank + 1) * len(rows) // self.size]

    def first(self, f, *args):
        """Rank 0 calls f, the others wait for it. Where it fails, all end."""
        failure = None
        try:
            f(*args) if self.rank == 0 else None
        except (ValueError, OSError) as error:
            failure = error
        if self.mean(torch.tensor(float(failure is not None), device=self.device)):
            raise failure or UserError("rank 0 failed, see its error")

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def print(self, *args):
        if self.rank == 0:
            print(*args, flush=True)

    def lock(self, folder):
        """Make and hold a run's folder, until `close` or the end of the process; UserError if
        another process has it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.held = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            self.held.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is training in {folder}") from None

    def close(self):
        if self.held:
            self.held.release()
        if self.size > 1:
            dist.destroy_process_group()
