"""Training runs of a tiny model: what they write, repeat and resume, and what they refuse."""

import contextlib
import dataclasses
import io
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fp4
import sample
import train
from data.shards import Tokens, load, write_dataset
from data.tokenizer import encode, get_encoding
from model import GPT, Block, load_checkpoint
from tools.hf import transformers_tokenizer
from train import Config, generator_for, seed_for

ROOT = Path(train.__file__).parent
TINY = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "dim": 32, "ffn_dim": 48,
    "block_size": 32, "batch_size": 4, "max_steps": 10, "learning_rate": 0.01, "warmup_steps": 2,
    "eval_interval": 3, "eval_windows": 8, "log_interval": 5, "device": "cpu",
}  # fmt: skip
fp4.recipe_named("fp4_project_1d")  # adds the experiments' recipes to fp4.RECIPES
RECIPES = [name for name in fp4.RECIPES if "plus" not in name]


def prepare(folder, encoding, words, length=2000):
    """The path of a config, its dataset beside it, with a training split of this length."""
    text = " ".join(np.random.default_rng(0).choice(words.split(), 3000))
    tokens = encode(encoding, [text])
    write_dataset(folder / "data", encoding, {"train": tokens[:length], "val": tokens[length:]})
    (folder / "tiny.json").write_text(json.dumps(TINY | {"dataset": str(folder / "data")}))
    return folder / "tiny.json"


@pytest.fixture(scope="module", autouse=True)
def plain():
    """Nothing is compiled: that takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4, "use_fast_path", lambda device: "plain PyTorch")
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    words = "the cat sat on a mat and then it ran"
    return prepare(tmp_path_factory.mktemp("tiny"), get_encoding("bytes"), words, 8000)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an fp4_mean run that nothing interrupted. Read only."""
    return run(tiny, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def command(*argv, **fields):
    """Arguments, and a flag for each field, as strings."""
    named = [part for k, v in fields.items() for part in ("--" + k.replace("_", "-"), v)]
    return [str(part) for part in (*argv, *named)]


def run(preset, out, *argv, **fields):
    train.main(command("--preset", preset, "--out-dir", out, *argv, **fields))
    return out


def resume(out, *argv, **fields):
    train.main(command("--resume", "--out-dir", out, *argv, **fields))


def refused(call, *args, **fields):
    """The one line with which a run ends. argparse prints it; all else hands it to SystemExit."""
    with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        call(*args, **fields)
    (line,) = (printed.getvalue() if stop.value.code == 2 else stop.value.code).splitlines()
    assert "error: " in line
    return line


PLAIN = "import os, signal, sys, fp4, train; fp4.use_fast_path = lambda device: 'plain PyTorch'\n"
SIGNAL = """
schedule = train.learning_rate
def learning_rate(step, config):
    if step == 7:
        os.kill(os.getpid(), signal.{})
    return schedule(step, config)
train.learning_rate = learning_rate
"""


def processes(size, code, *argv, ends=0, **fields):
    """train.py after this code in as many processes, as torchrun starts them. ends: the exit code
    of all, or if not 0 of one of them."""
    code = PLAIN + code + "train.main(sys.argv[1:])"
    python = [sys.executable, "-c", code, *command(*argv, **fields)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group["WORLD_SIZE"] = str(size)
    started = []
    for rank in range(size):
        environment = os.environ | group | {"RANK": str(rank)}
        started.append(subprocess.Popen(python, cwd=ROOT, env=environment))
    try:
        codes = [process.wait(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    assert ends in codes and (ends or not any(codes))


def metrics(out):
    """Every record of a run, less the time it took."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def losses(out):
    return [m["loss"] for m in metrics(out) if "loss" in m]


def tensors(path):
    """The weights and the optimizer's moments and counts of a checkpoint."""
    state = load_checkpoint(path)
    moments = state["optimizer"]["state"].items()
    return state["model"] | {f"{i} {name}": t for i, s in moments for name, t in s.items()}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    assert_same_tensors(tensors(a), tensors(b))


def assert_close_runs(a, b, rel=2e-5):
    """But for mean_share, which is that of what a process rounds at a time."""
    for left, right in zip(metrics(a), metrics(b), strict=True):
        left.pop("mean_share", None)
        right.pop("mean_share", None)
        assert left == pytest.approx(right, rel=rel)


def files(out):
    found = (path for path in out.iterdir() if path.name != ".lock")
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


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


# What a run is.


def test_a_run_is_a_folder_a_sample_and_a_summary(tiny, tmp_path, capsys):
    out = run(tiny, tmp_path / "run", precision="bf16")
    assert set(files(out)) == {"config.json", "metrics.jsonl", "checkpoint.pt", "loss.png"}
    printed = capsys.readouterr().out
    for step in (5, 10):  # log_interval 5
        assert f"step {step:6d}  loss {losses(out)[step - 1]:.4f}  lr " in printed
    assert printed.count("  lr ") == 2
    _, _, lines = printed.split("--- sample ---\n")[1].rpartition("\n---\n")
    summary = dict(line.split(": ") for line in lines.splitlines())
    loss = metrics(out)[-1]["val_loss"]
    assert float(summary["val_loss"]) == pytest.approx(loss, abs=1e-4)
    bits = loss / math.log(2)  # a token of this tokenizer is a byte
    assert float(summary["bits_per_byte"]) == pytest.approx(bits, abs=2e-4)
    parameters = sum(p.numel() for p in GPT.load(out).parameters())
    assert (int(summary["parameters"]), int(summary["tokens"])) == (parameters, 10 * 4 * 32)


@pytest.mark.parametrize("precision", RECIPES)
def test_every_recipe_trains(precision, tiny, tmp_path):
    fields = {"n_layer": 1, "max_steps": 2, "warmup_steps": 0}
    first, second = losses(run(tiny, tmp_path, precision=precision, **fields))
    assert first == pytest.approx(math.log(320), abs=0.05)
    assert second < first - 0.2


@pytest.mark.parametrize(
    ("precision", "loss", "val_loss", "tolerance"),
    [
        ("bf16", 2.91206, 2.92442, 2e-4),
        ("fp4", 2.92409, 2.93355, 2e-3),
        ("fp4_mean", 2.91029, 2.92079, 2e-3),
    ],
)
def test_ten_steps_end_at_a_known_loss(precision, loss, val_loss, tolerance, tiny, tmp_path):
    """One and two threads agree to every digit. Kernels for other CPUs (scalar, SSE4, AVX2, AVX512)
    add in other orders and differ by up to 5e-5 in bf16; in fp4 one last bit can turn the rounding
    of a value to the next code, and that makes up to 7e-4."""
    records = metrics(run(tiny, tmp_path, precision=precision))
    assert records[-2]["loss"] == pytest.approx(loss, abs=tolerance)
    assert records[-1]["val_loss"] == pytest.approx(val_loss, abs=tolerance)


# What runs share.


def test_precisions_start_from_the_same_weights_and_see_the_same_batches(tiny, tmp_path, starts):
    weights = []
    for precision in ("bf16", "fp4_mean"):
        out = run(tiny, tmp_path / precision, "--keep", precision=precision, max_steps=4)
        weights.append(load_checkpoint(out / "step-0.pt")["model"])
    assert_same_tensors(*weights)
    for rows in starts.values():
        half = len(rows) // 2
        assert rows[:half] == rows[half:]
    assert len(starts["train"]) == 8 and starts["train"][0] != starts["train"][1]


def test_evaluation_sees_the_same_windows_and_changes_nothing(tiny, tmp_path, starts):
    """Also where the forward pass draws noise."""
    fields = {"precision": "fp4_mean_sr", "max_steps": 4}
    often = run(tiny, tmp_path / "often", eval_interval=1, **fields)
    _, *rows = starts["val"]  # the first are those by which the mean's share is measured
    evaluations = np.reshape(rows, (5, 8))  # before every step and after the last
    assert (evaluations == evaluations[0]).all()
    assert evaluations[0, 0] == 0 and len(set(evaluations[0])) == 8
    torch.rand(7)  # what else draws from PyTorch's generator must not matter
    seldom = run(tiny, tmp_path / "seldom", eval_interval=1000, **fields)
    assert [m for m in metrics(often) if "loss" in m] == [m for m in metrics(seldom) if "loss" in m]
    assert metrics(often)[0] == metrics(seldom)[0] and metrics(often)[-1] == metrics(seldom)[-1]


def test_the_validation_loss_does_not_depend_on_the_batch_size(tiny, tmp_path):
    """Nor on whether the last batch of it is full."""
    val = []
    for size in (3, 8):
        out = run(tiny, tmp_path / str(size), precision="bf16", batch_size=size, max_steps=1)
        val.append(metrics(out)[0]["val_loss"])
    assert val[0] == pytest.approx(val[1], abs=1e-6)


# Interrupted runs.


@pytest.mark.parametrize(
    ("number", "ends", "step", "records"),
    [("SIGKILL", -signal.SIGKILL, 6, 7), ("SIGINT", 0, 8, 8)],
)
def test_an_interrupted_run_resumes_bit_for_bit(number, ends, step, records, tiny, whole, tmp_path):
    """Ctrl-C saves at once, and kill -9 takes the lock along. With --keep the checkpoint of every
    evaluation stays, and not that of an interruption."""
    out = tmp_path / "run"
    processes(1, SIGNAL.format(number), "--preset", tiny, "--keep", ends=ends, out_dir=out)
    assert (load_checkpoint(out)["step"], len(losses(out))) == (step, records)
    resume(out)
    assert_same_run(out, whole)
    kept = {int(path.stem[5:]): load_checkpoint(path)["step"] for path in out.glob("step-*.pt")}
    assert kept == {0: 0, 3: 3, 6: 6, 9: 9, 10: 10}


def test_a_finished_run_goes_on_when_asked_for_more_steps(copy, whole):
    """Also if the last record of its metrics is torn."""
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    resume(copy, max_steps=12)
    assert metrics(copy)[:-3] == metrics(whole)[:-1]
    assert [m["step"] for m in metrics(copy)[-3:]] == [10, 11, 12]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_knows_its_data_wherever_it_lies(split, tiny, copy, whole, tmp_path):
    data = Path(shutil.copytree(tiny.parent / "data", tmp_path / "data"))
    resume(copy, dataset=data)
    assert_same_run(copy, whole)
    shard = data / f"{split}_000.bin"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    before = files(copy)
    assert "the dataset's data is not that of" in refused(resume, copy, dataset=data)
    assert files(copy) == before


def test_a_run_knows_its_tokenizer(tmp_path):
    """Its dataset is prepared again, with another tokenizer, in the same place."""
    words = "to be or not that is the question"
    preset = prepare(tmp_path, get_encoding("plays"), words)
    out = run(preset, tmp_path / "run", precision="bf16", max_steps=4)
    before = continuation(out)
    prepare(tmp_path, get_encoding("bytes"), words)
    assert "the dataset's tokenizer_hash is not that of" in refused(resume, out, max_steps=8)
    assert continuation(out) == before


def test_a_run_keeps_a_tokenizer_that_is_none_of_ours(tiny, tmp_path):
    transformers_tokenizer(get_encoding("plays")).save_pretrained(tmp_path)
    preset = prepare(tmp_path, get_encoding(tmp_path), "a cat sat")
    out = run(preset, tmp_path / "run", precision="bf16", max_steps=4)
    assert "has tokens of bytes" in refused(run, tiny, tmp_path / "other", init=out)
    (tmp_path / "tokenizer.json").unlink()
    shutil.rmtree(tmp_path / "data")
    assert continuation(out).startswith("the cat")
    transformers_tokenizer(get_encoding("bytes")).save_pretrained(out / "tokenizer")
    assert "tokenizer" in refused(continuation, out)


# The folder.


def test_a_folder_in_use_is_left_alone(tiny, copy, tmp_path):
    """Also by a second run that finds no checkpoint of the first yet."""
    before, other = files(copy), tmp_path / "other"
    with filelock.FileLock(copy / ".lock"), filelock.FileLock(other / ".lock"):
        assert "another process is training in" in refused(resume, copy)
        assert "another process is training in" in refused(run, tiny, other)
    assert files(copy) == before and files(other) == {}


@pytest.mark.parametrize("room", [1000, 50_000])  # for config.json, or for metrics too
def test_a_full_disk_leaves_the_checkpoint_and_the_metrics_before_it(room, copy, whole):
    before = files(copy)["checkpoint.pt"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises((OSError, SystemExit), match=r"cannot write|too large"):
            resume(copy, max_steps=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert files(copy)["checkpoint.pt"] == before
    assert [m for m in metrics(copy) if m["step"] < 10] == metrics(whole)[:-1]


@pytest.mark.parametrize("rate", ["1e38", "1e16"])  # the weights, or only the loss, become nan
@pytest.mark.parametrize("interval", [1, 1000])
def test_a_diverged_run_stops_and_keeps_a_good_checkpoint(rate, interval, tiny, tmp_path):
    fields = {"precision": "bf16", "learning_rate": rate, "warmup_steps": 0}
    message = refused(run, tiny, tmp_path, **fields, eval_interval=interval)
    assert "nan" in message and "HINT: a lower --learning-rate" in message
    assert len(losses(tmp_path)) == 1
    x = load(tiny.parent / "data", "val").batch([0], 33)
    assert GPT.load(tmp_path)(x[:, :-1], x[:, 1:]).isfinite()


def test_a_gradient_that_overflows_stops_a_run_whose_loss_is_finite(copy, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    assert "norm inf" in refused(resume, copy, max_steps=11)
    assert load_checkpoint(copy)["step"] == 10


@pytest.mark.parametrize("imported", [False, True])
def test_a_run_starts_from_a_model(imported, whole, tiny, tmp_path):
    """With its weights and shape, and an optimizer and data of its own; it then stands alone."""
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    state = load_checkpoint(whole)
    if imported:  # its config has a model's fields alone
        del state["folder"]
        state["config"] = dataclasses.asdict(GPT.load(whole).config)
        state |= {"optimizer": None, "step": 0, "data": ""}
        torch.save(state, other / "checkpoint.pt")
    fields = {"precision": "bf16", "block_size": 16, "max_steps": 2}
    out = run(tiny, tmp_path / "run", "--keep", init=other, **fields)
    start, end = (load_checkpoint(out / f"step-{step}.pt") for step in (0, 2))
    assert_same_tensors(start["model"], state["model"])
    assert not torch.equal(start["model"]["head.weight"], end["model"]["head.weight"])
    assert {name: end["config"][name] for name in fields} == fields
    assert_same_run(run(out / "config.json", tmp_path / "again"), out)
    shutil.copy(out / "step-0.pt", out / "checkpoint.pt")
    shutil.rmtree(other)
    resume(out)
    assert_same_run(out, tmp_path / "again")


# Several processes.


SPY = """
make_optimizer = train.make_optimizer
def count(model, config):
    local = [p.to_local() if config.shard else p for p in model.parameters()]
    with open(f"{sys.argv[-1]}/size-{os.environ['RANK']}", "w") as file:
        units = sum(type(module).__name__.startswith("FSDP") for module in model.modules())
        file.write(f"{sum(p.numel() for p in local)} {units}")
    return make_optimizer(model, config)
train.make_optimizer = count
"""


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """The folder of an fp4_mean run of 4 steps by two processes."""
    out = tmp_path_factory.mktemp("two")
    processes(2, SPY, "--preset", tiny, max_steps=4, vocab_size=321, out_dir=out)
    return out


def test_two_processes_train_as_by_hand(two, tiny):
    """Each rank centers and rounds its half of the batch with noise of its own; gradients are
    averaged. Only the order of FP32 sums may differ: DDP adds bucket by bucket."""
    config, _ = train.parse(["--preset", str(tiny), "--max-steps", "4", "--vocab-size", "321"])
    tokens = load(config.dataset, "train")
    model = GPT(config, generator_for(config, "init"))
    optimizer, got = train.make_optimizer(model, config), []
    for step in range(4):
        generator = generator_for(config, "data", step)
        starts = torch.randint(tokens.windows(33), (4,), generator=generator)
        total = 0.0
        for rank in (0, 1):
            torch.manual_seed(seed_for(config, "noise", step, rank))
            x, y = train.batch(tokens, starts[2 * rank :][:2], config, "cpu")
            loss = model(x, y) / 2
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        got.append((total, norm.item()))
    want = [(m["loss"], m["grad_norm"]) for m in metrics(two) if "loss" in m]
    assert np.array(got) == pytest.approx(np.array(want), rel=2e-5)


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A bf16 run by one process, whose 321 rows of the embedding do not split evenly."""
    out = tmp_path_factory.mktemp("one")
    return run(tiny, out, "--keep", precision="bf16", vocab_size=321)


def test_two_processes_and_micro_steps_train_as_one(one, tiny, tmp_path):
    """Only the order of FP32 sums differs, by 4e-6 in these losses of 3 to 6: halving a batch
    doubles its gradients, and a power of two does not change how BF16 rounds."""
    fields = {"precision": "bf16", "grad_accum": 2, "vocab_size": 321}
    assert_close_runs(one, run(tiny, tmp_path / "micro", **fields))
    processes(2, "", "--preset", tiny, out_dir=tmp_path / "two", **fields)
    assert_close_runs(one, tmp_path / "two")


def test_sharded_processes_train_as_whole_ones_and_hold_half(two, tiny, tmp_path):
    """DDP adds in the same order for two processes. The gradient's norm does not, and by its last
    bits clipping can turn the rounding of a value: one such changes a norm by 9e-5 and a loss by
    6e-7. Other noise changes a loss after ten steps by 1.5e-3."""
    fields = {"max_steps": 4, "vocab_size": 321, "out_dir": tmp_path}
    processes(2, SPY, "--preset", tiny, "--shard", **fields)
    assert_close_runs(two, tmp_path, rel=3e-4)
    for rank in "01":
        whole, _ = (two / f"size-{rank}").read_text().split()
        part, units = (tmp_path / f"size-{rank}").read_text().split()
        assert int(part) / int(whole) == pytest.approx(0.5, rel=0.01)
        assert units == "3"  # two blocks and the model: a block is whole only while it runs
    shapes = [{k: (t.dtype, t.shape) for k, t in tensors(out).items()} for out in (two, tmp_path)]
    assert shapes[0] == shapes[1]


def test_a_run_goes_on_with_other_numbers_of_processes(one, tmp_path):
    """From one to two sharded ones, which are killed, and to one again."""
    out = Path(shutil.copytree(one, tmp_path / "run"))
    shutil.copy(out / "step-3.pt", out / "checkpoint.pt")
    argv = SIGNAL.format("SIGKILL"), "--resume", "--shard", "--recompute"
    processes(2, *argv, ends=-signal.SIGKILL, out_dir=out)
    assert (load_checkpoint(out)["step"], len(losses(out))) == (6, 7)
    assert "--no-shard" in refused(resume, out)
    resume(out, "--no-shard", "--no-recompute")
    assert_close_runs(one, out)


# How blocks run.


def test_recomputed_activations_are_the_same_bit_for_bit(tiny, tmp_path, monkeypatch):
    """Also where forward draws noise. Every block runs once more a step, and not in evaluations."""
    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: calls.append(1) or forward(*args))
    fields = {"precision": "fp4_mean_sr", "max_steps": 3}
    kept = run(tiny, tmp_path / "kept", **fields)
    count = len(calls)
    assert_same_run(kept, run(tiny, tmp_path / "again", "--recompute", **fields))
    assert len(calls) - count == count + 3 * TINY["n_layer"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_rounds_to_bf16(tiny, tmp_path, monkeypatch):
    """A compiler that drops a cast to BF16 and back trains in FP32 and does not say so."""
    seen, compile_model = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: seen.append(model) or compile_model(model))
    fields = {"n_layer": 1, "max_steps": 8, "warmup_steps": 0}
    eager = run(tiny, tmp_path / "eager", precision="bf16", **fields)
    fp32 = run(tiny, tmp_path / "fp32", precision="fp32", **fields)
    compiled = run(tiny, tmp_path / "compiled", "--compile", precision="bf16", **fields)
    assert [type(model) for model in seen] == [GPT]
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-5)
    assert np.abs(np.subtract(losses(compiled), losses(fp32))).max() > 2e-4


# The command line.


def test_flags_go_over_the_preset_over_the_defaults(tiny, whole):
    config, resuming = train.parse(["--preset", str(tiny), "--batch-size", "8", "--no-tied"])
    assert (config.batch_size, config.tied, resuming) == (8, False, False)
    assert (config.dim, config.learning_rate) == (32, 0.01)
    assert (config.weight_decay, config.out_dir) == (0.1, f"out/{tiny.parent.name}-fp4_mean")
    config, _ = train.parse(["--init", str(whole)])  # gives a model's shape, and no more
    assert (config.dim, config.vocab_size, config.learning_rate) == (32, 320, 0.002)
    assert config.out_dir == f"out/{whole.name}-fp4_mean"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--frobnicate 1", "--frobnicate"),
        ("--precis bf16", "--precis"),
        ("--max-steps 5.5", "--max-steps"),
        ("--precision fp5", "'fp5' is not one of fp32, bf16, fp4, fp4_mean"),
        ("--preset huge", "no preset 'huge'"),
        ("--dataset missing", "no dataset in"),
        ("--dim 40", "multiples of 16"),
        ("--vocab-size 256", "257"),
        ("--block-size 9000", "no run of 9001 tokens in train"),
        ("--block-size 4000", "no run of 4001 tokens in val"),
        ("--batch-size 5 --grad-accum 2", "--batch-size 5 must split into 1 processes"),
        ("--shard", "HINT: torchrun, or --no-shard"),
        ("--out-dir copy --precision bf16", "copy holds another run. HINT: --resume"),
        ("--init copy --dim 48", "copy has a dim of its own"),
        ("--init missing", "HINT: python -m tools.hf smollm2 missing"),
        ("--resume", "--resume takes the run's --out-dir"),
        ("--resume --out-dir copy --learning-rate 0.5", "has learning_rate 0.01"),
        ("--device cuda", "no CUDA GPU"),
    ],
)
def test_what_cannot_work_is_one_line_and_writes_no_run(argv, named, tiny, copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    preset = [] if "--resume --" in argv else ["--preset", tiny]
    before = files(copy)
    assert named in refused(train.main, command(*preset, *argv.split()))
    assert files(copy) == before and not list(Path("out").rglob("checkpoint.pt"))


# The parts.


def test_the_learning_rate_warms_up_and_decays():
    config = Config(learning_rate=0.5, min_lr=0.1, warmup_steps=4, max_steps=24)
    rates = [train.learning_rate(step, config) for step in range(26)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[14] == pytest.approx(0.275)
    assert rates[24:] == pytest.approx([0.05, 0.05])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_matrices_decay_and_vectors_do_not():
    config = Config(vocab_size=64, dim=32, n_layer=1, weight_decay=0.3, beta1=0.8, beta2=0.9)
    model = GPT(config)
    optimizer = train.make_optimizer(model, config)
    matrices, vectors = optimizer.param_groups
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    grouped = len(matrices["params"]) + len(vectors["params"])
    assert grouped == len(list(model.parameters()))


@pytest.mark.parametrize("clip", [0.25, 0])
def test_gradients_are_clipped_but_by_0(clip, tiny, tmp_path):
    norms = []

    def look(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(look)
    records = metrics(run(tiny, tmp_path, precision="bf16", grad_clip=clip, max_steps=2))
    hook.remove()
    before = [m["grad_norm"] for m in records if "loss" in m]
    assert min(before) > 0.25
    assert norms == pytest.approx([clip] * 2 if clip else before, rel=1e-4)


def test_every_purpose_step_and_rank_has_a_seed_of_its_own():
    keys = [(p, s, r) for p in train.PURPOSES for s in range(9) for r in (0, 1)]
    seeds = [seed_for(Config(seed=seed), *key) for seed in (0, 1, 2**40) for key in keys]
    assert len(set(seeds)) == len(seeds)


def test_mean_share_of_a_known_input():
    """E||x||^2 = ||mu||^2 + variance: the mean of what the linear sees holds 3/4 of the energy."""
    x = torch.randn(64, 32)
    x = (x - x.mean(0)) / x.std(0, unbiased=False) + 3**0.5
    linear = fp4.FP4Linear(32, 16, False, "fp4")
    model = torch.nn.Sequential(torch.nn.Embedding.from_pretrained(x), linear)
    share = train.mean_share(model, torch.arange(64).view(4, 16))
    assert share == pytest.approx(0.75, rel=1e-5)
    assert not linear._forward_pre_hooks


# sample.py.


def continuation(out, *argv):
    fields = {"out_dir": out, "prompt": "the cat", "tokens": 20, "device": "cpu"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sample.main(command(*argv, **fields))
    return printed.getvalue()


def test_a_sample_goes_on_with_the_prompt_and_its_seed_repeats_it(whole):
    first, again, other = (continuation(whole, "--seed", seed) for seed in (1, 1, 2))
    assert first.startswith("the cat") and first.endswith("\n---\n") and len(first) > 20
    assert first == again != other
    two = continuation(whole, "--seed", 1, "--samples", 2)
    assert two.startswith(first) and two.count("\n---\n") == 2
