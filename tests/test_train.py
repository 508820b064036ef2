"""Training runs of a tiny model: what they write, repeat and resume, and what they refuse."""

import dataclasses
import errno
import json
import math
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fp4
import sample
import train
from data.shards import Tokens, load, write_dataset, write_meta, write_shard
from data.vocab import encode, get_encoding
from model import GPT, ModelConfig

ROOT = Path(train.__file__).parent
BYTES = get_encoding("bytes")
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 1,
    "head_dim": 16,
    "dim": 32,
    "ffn_dim": 48,
    "block_size": 32,
    "batch_size": 4,
    "max_steps": 10,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "eval_interval": 4,
    "eval_windows": 8,
    "log_interval": 5,
}
PLAIN = "import os, signal, sys, fp4, train; fp4.fuse = lambda: 'plain passes'\n"
SIGNAL = """
schedule = train.learning_rate
def learning_rate(step, config):
    if step == 5:
        os.kill(os.getpid(), signal.{})
    return schedule(step, config)
train.learning_rate = learning_rate
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a preset, on a dataset beside it."""
    directory = tmp_path_factory.mktemp("tiny")
    words = "the cat sat on a mat and then it ran".split()
    tokens = encode(BYTES, [" ".join(np.random.default_rng(0).choice(words, 3000))])
    write_dataset(directory / "data", BYTES, {"train": tokens[:8000], "val": tokens[8000:]})
    preset = directory / "tiny.json"
    preset.write_text(json.dumps({**TINY, "dataset": str(directory / "data")}))
    return preset


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an fp4_mean run that nothing interrupted. Read only."""
    return run(tiny, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flags(knobs):
    return [str(part) for k, v in knobs.items() for part in ("--" + k.replace("_", "-"), v)]


def main(*argv):
    """train.main on one thread and without compiling; leaves the signal handlers as they were."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4, "fuse", lambda: "plain passes")
        try:
            train.main([str(a) for a in argv])
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def run(preset, out, **knobs):
    main("--preset", preset, "--out-dir", out, *flags(knobs))
    return out


def resume(out, **knobs):
    main("--resume", "--out-dir", out, *flags(knobs))


def refused(call, *args, **knobs):
    """The message of a run that ends with an error: a line, and maybe a line with a hint."""
    with pytest.raises(SystemExit) as stop:
        call(*args, **knobs)
    message = stop.value.code
    assert message.startswith("error: ")
    assert all(line.startswith("HINT: ") for line in message.splitlines()[1:])
    return message


def process(code, *argv):
    return subprocess.run(
        [sys.executable, "-c", f"{PLAIN}{code}\ntrain.main(sys.argv[1:])", *map(str, argv)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def metrics(out):
    """Every record of a run, less the time it took."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def losses(out):
    return [m["loss"] for m in metrics(out) if "loss" in m]


def tensors(out):
    """The weights and the optimizer's moments and counts in a run's checkpoint."""
    state = train.read_checkpoint(out / "checkpoint.pt")
    moments = state["optimizer"]["state"].items()
    return state["model"] | {f"{i} {name}": t for i, s in moments for name, t in s.items()}


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def files(out):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}


@pytest.fixture
def starts(monkeypatch):
    """The windows that batches were made of, in order: {"train": [...], "val": [...]}."""
    seen = {"train": [], "val": []}
    batch = Tokens.batch

    def spy(self, starts, length):
        seen[self.split].append(starts.tolist())
        return batch(self, starts, length)

    monkeypatch.setattr(Tokens, "batch", spy)
    return seen


# What a run writes.


def test_a_run_is_a_folder_and_a_summary(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "run", precision="bf16")
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "loss.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")

    progress, text, after = capsys.readouterr().out.split("---\n", 2)[0:1] + ["", ""]
    assert progress


@pytest.mark.parametrize("precision", fp4.RECIPES)
def test_every_recipe_trains(precision, tiny, tmp_path):
    out = run(tiny, tmp_path / "run", precision=precision, max_steps=2, warmup_steps=0)
    first, second = losses(out)
    assert first == pytest.approx(math.log(320), abs=0.05)
    assert second < first - 0.2
