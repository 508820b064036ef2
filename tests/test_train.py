"""Training runs of a tiny model: what they write, repeat and resume, and what they refuse."""

import dataclasses
import errno
import json
import math
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import bench
import fp4
import memory
import model as model_module
import run as run_module
import train
from checkpoint import CHECKPOINT_FORMAT, encoding_of, load_model, read_checkpoint, resume_run
from cli import UserError, script
from data.shards import Tokens, load, write_dataset, write_meta, write_shard
from data.vocab import BYTE, EOT, encode, get_encoding
from experiments.recipes import RECIPES, recipe_of
from model import GPT
from run import Config, seed_for

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
PLAIN = "import os, signal, sys, cli, fp4, train; fp4.fuse = lambda: 'plain passes'\n"
MAIN = "cli.script(lambda: train.main(sys.argv[1:]))\n"
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
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran"]
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
    """train.py on one thread and without compiling."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4, "fuse", lambda: "plain passes")
        try:
            script(lambda: train.main([str(a) for a in argv]))
        finally:
            torch.set_num_threads(threads)


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


def process(code, *argv, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"{PLAIN}{code}\n{MAIN}", *map(str, argv)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
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
    state = read_checkpoint(out / "checkpoint.pt")
    moments = state["optimizer"]["state"].items()
    return state["model"] | {f"{i} {name}": t for i, s in moments for name, t in s.items()}


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def files(out):
    found = (p for p in out.iterdir() if p.name != ".lock")
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


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


def test_a_run_is_a_folder_a_sample_and_a_summary(tiny, tmp_path, capsys):
    out = run(tiny, tmp_path / "run", precision="bf16")
    assert set(files(out)) == {"config.json", "metrics.jsonl", "checkpoint.pt", "loss.png"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    text, _, lines = capsys.readouterr().out.split("--- sample ---\n")[1].rpartition("\n---\n")
    assert text
    summary = dict(line.split(": ") for line in lines.splitlines())
    assert summary["precision"] == "bf16" and summary["steps"] == "10"
    assert float(summary["val_loss"]) == pytest.approx(metrics(out)[-1]["val_loss"], abs=1e-4)
    assert float(summary["train_loss"]) == pytest.approx(np.mean(losses(out)), abs=1e-4)
    bits = float(summary["val_loss"]) / math.log(2)  # a token of this tokenizer is a byte
    assert float(summary["bits_per_byte"]) == pytest.approx(bits, abs=2e-4)
    assert int(summary["tokens"]) == 10 * 4 * 32 and int(summary["tokens_per_second"]) > 0


def test_the_loss_falls(whole):
    val = [m["val_loss"] for m in metrics(whole) if "val_loss" in m]
    assert val[0] == pytest.approx(math.log(320), abs=0.05)
    assert val[-1] < 3.2 and losses(whole)[-1] < 3.2


@pytest.mark.parametrize("precision", RECIPES)
def test_every_recipe_trains(precision, tiny, tmp_path):
    first, second = losses(run(tiny, tmp_path, precision=precision, max_steps=2, warmup_steps=0))
    assert first == pytest.approx(math.log(320), abs=0.05)
    assert second < first - 0.2


@pytest.mark.parametrize(
    ("precision", "loss", "val_loss", "tolerance"),
    [
        ("bf16", 2.91206, 2.92442, 2e-4),
        ("fp4", 2.92084, 2.93191, 2e-3),
        ("fp4_mean", 2.90679, 2.91753, 2e-3),
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


def test_precisions_start_from_the_same_weights_and_see_the_same_batches(
    tiny, tmp_path, starts, monkeypatch
):
    first, save = [], train.save

    def spy(path, state):
        if state["step"] == 0:
            first.append(torch.cat([w.flatten() for w in state["model"].values()]))
        save(path, state)

    monkeypatch.setattr(train, "save", spy)
    run(tiny, tmp_path / "a", precision="bf16", max_steps=4)
    once = {split: list(rows) for split, rows in starts.items()}
    run(tiny, tmp_path / "b", precision="fp4_mean", max_steps=4)
    assert torch.equal(*first)
    assert len(once["train"]) == 4 and once["train"][0] != once["train"][1]
    assert starts == {split: rows * 2 for split, rows in once.items()}


def test_the_seed_orders_the_data(tiny, tmp_path, starts):
    for seed in (1, 2):
        run(tiny, tmp_path / str(seed), precision="bf16", max_steps=2, seed=seed)
    assert starts["train"][:2] != starts["train"][2:]


def test_evaluation_sees_the_same_windows_and_changes_nothing(tiny, tmp_path, starts):
    often = run(tiny, tmp_path / "often", eval_interval=1, max_steps=4)
    _, *rows = starts["val"]  # the first are those by which the mean's share is measured
    evaluations = np.reshape(rows, (5, 8))  # before every step and after the last
    assert (evaluations == evaluations[0]).all()
    assert evaluations[0, 0] == 0 and len(set(evaluations[0])) == 8
    seldom = run(tiny, tmp_path / "seldom", eval_interval=1000, max_steps=4)
    assert [m for m in metrics(often) if "loss" in m] == [m for m in metrics(seldom) if "loss" in m]
    assert metrics(often)[-1] == metrics(seldom)[-1]


def test_the_validation_loss_does_not_depend_on_the_batch_size(tiny, tmp_path):
    runs = [
        run(tiny, tmp_path / str(b), precision="bf16", batch_size=b, max_steps=1) for b in (3, 8)
    ]
    a, b = (metrics(out)[0]["val_loss"] for out in runs)
    assert a == pytest.approx(b, abs=1e-6)


# Interrupted runs.


def test_a_killed_run_resumes_bit_for_bit(tiny, whole, tmp_path):
    out = tmp_path / "run"
    killed = process(SIGNAL.format("SIGKILL"), "--preset", tiny, "--out-dir", out)
    assert killed.returncode == -signal.SIGKILL
    assert read_checkpoint(out / "checkpoint.pt")["step"] == 4
    assert len(losses(out)) == 5
    resume(out)
    assert_same_run(out, whole)


def test_ctrl_c_saves_at_once_and_the_run_resumes_bit_for_bit(tiny, whole, tmp_path):
    out = tmp_path / "run"
    stopped = process(SIGNAL.format("SIGINT"), "--preset", tiny, "--out-dir", out)
    assert stopped.returncode == 0 and stopped.stderr == ""
    assert stopped.stdout.splitlines()[-1].startswith("stopped at step 6 and saved")
    assert read_checkpoint(out / "checkpoint.pt")["step"] == 6
    resume(out)
    assert_same_run(out, whole)


def test_a_finished_run_goes_on_when_asked_for_more_steps(copy, whole):
    resume(copy, max_steps=12)
    assert metrics(copy)[:-3] == metrics(whole)[:-1]
    assert [m["step"] for m in metrics(copy)[-3:]] == [10, 11, 12]


def test_a_finished_run_asked_for_fewer_steps_stays_as_it_is(copy, whole):
    resume(copy, max_steps=5)
    assert_same_run(copy, whole)


def test_evaluations_of_equal_runs_are_equal_also_where_the_forward_pass_is_random(tiny, tmp_path):
    """And those of a run that was interrupted. The share of the mean too."""
    knobs = {"precision": "fp4_mean_sr", "max_steps": 8}
    first = run(tiny, tmp_path / "first", **knobs)
    torch.rand(7)  # what else draws from PyTorch's generator must not matter
    assert_same_run(run(tiny, tmp_path / "second", **knobs), first)
    third = tmp_path / "third"
    stopped = process(SIGNAL.format("SIGINT"), "--preset", tiny, "--out-dir", third, *flags(knobs))
    assert stopped.returncode == 0, stopped.stderr
    resume(third)
    assert_same_run(third, first)


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text(""),
        lambda file: file.write_bytes(b"\x00\xff\xfe" + file.read_bytes()[300:]),
        lambda file: file.write_text("[]\n3\n{}\nnull\n" + file.read_text()[300:]),
        lambda file: file.write_text(file.read_text().replace('"loss": 5', '"loss": null, "x": 5')),
    ],
    ids=["missing", "empty", "damaged", "foreign", "mistyped"],
)
@pytest.mark.parametrize("steps", [10, 12])
def test_a_resume_goes_on_without_the_metrics_and_says_what_is_lost(
    harm, steps, copy, whole, capsys
):
    harm(copy / "metrics.jsonl")
    resume(copy, max_steps=steps)
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "has lost" in line)
    lost = 10 - len([m for m in metrics(copy) if "loss" in m and m["step"] < 10])
    assert lost > 0 and f"metrics.jsonl has lost {lost} of 10 steps" in line
    assert metrics(copy)[-1]["step"] == steps and (copy / "loss.png").exists()
    assert "val_loss: " in printed


def test_a_second_process_in_the_same_folder_is_one_line(tiny, tmp_path):
    """Also one that resumes; the first is not disturbed, and a killed one leaves no lock behind."""
    other = """
step_one = train.learning_rate
def learning_rate(step, config):
    if step == 5:
        import subprocess
        for how in (["--preset", sys.argv[2]], ["--resume"]):
            argv = [sys.executable, "train.py", *how, "--out-dir", sys.argv[4], "--device", "cpu"]
            print(subprocess.run(argv, capture_output=True, text=True).stderr, flush=True)
    return step_one(step, config)
train.learning_rate = learning_rate
"""
    alone = run(tiny, tmp_path / "alone", precision="bf16")
    out = tmp_path / "run"
    argv = "--preset", tiny, "--out-dir", out, "--precision", "bf16"
    done = process(other, *argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"error: another process is training in {out}\n") == 2
    assert_same_run(out, alone)
    shutil.rmtree(out)
    killed = process(SIGNAL.format("SIGKILL"), *argv)
    assert killed.returncode == -signal.SIGKILL
    resume(out)
    assert_same_run(out, alone)


def test_the_folder_is_held_before_anything_in_it_is_read(copy, monkeypatch):
    """Else what another process saves in between would be overwritten by an older state."""
    held, resume_run = [], train.resume_run

    def spy(out, config, model, optimizer, world):
        held.append(world.held.is_locked)
        return resume_run(out, config, model, optimizer, world)

    monkeypatch.setattr(train, "resume_run", spy)
    resume(copy, max_steps=11)
    assert held == [True]


def test_both_ranks_end_with_a_line_where_the_first_cannot_start(tiny, tmp_path):
    held = run_module.World("cpu")
    held.lock(tmp_path / "run")
    (tmp_path / "code.py").write_text(PLAIN + MAIN)
    argv = "--preset", tiny, "--out-dir", tmp_path / "run"
    with pytest.raises(AssertionError) as failed:
        torchrun(tmp_path / "code.py", *argv)
    held.close()
    stderr = str(failed.value)
    assert f"error: another process is training in {tmp_path / 'run'}" in stderr
    assert "error: rank 0 failed" in stderr and "DistributedDataParallel" not in stderr


def test_two_processes_that_start_at_once_in_one_folder(tiny, tmp_path, monkeypatch):
    """Neither sees a checkpoint of the other yet."""
    held = run_module.World("cpu")
    held.lock(tmp_path)
    before = files(tmp_path)
    message = refused(run, tiny, tmp_path, precision="bf16")
    assert message == f"error: another process is training in {tmp_path}"
    assert files(tmp_path) == before
    held.close()
    run(tiny, tmp_path, precision="bf16", max_steps=1)


@pytest.mark.parametrize(
    "environment",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=str,
)
def test_what_follows_the_training_does_not_undo_it(environment, tiny, tmp_path):
    """A notebook's environment; consoles that lack what the sample has."""
    code = "import tiktoken\ntiktoken.Encoding.decode = lambda self, ids: '\\u6f22\\u014d a'\n"
    argv = "--preset", tiny, "--out-dir", tmp_path, "--precision", "bf16", "--max-steps", 2
    done = process(code, *argv, **environment)
    assert done.returncode == 0, done.stderr
    assert " a\n---" in done.stdout and "val_loss: " in done.stdout
    assert (tmp_path / "loss.png").exists()


def test_a_curve_or_a_sample_that_fails_is_said(tiny, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(train, "plot", fail)
    monkeypatch.setattr(GPT, "generate", fail)
    run(tiny, tmp_path, precision="bf16", max_steps=1)
    printed = capsys.readouterr().out
    assert "no loss curve: RuntimeError: no luck" in printed
    assert "no sample: RuntimeError: no luck" in printed and "val_loss: " in printed


def test_older_runs(copy, capsys, monkeypatch):
    """mean_bias is added_mean now, and some knobs are new."""
    state = read_checkpoint(copy / "checkpoint.pt")
    for config in (state["config"], json.loads((copy / "config.json").read_text())):
        config["mean_bias"] = config.pop("added_mean")
        for name in ("qk_norm", "qkv_bias", "rope_factor", "init"):
            del config[name]
    (copy / "config.json").write_text(json.dumps(config))
    torch.save(state, copy / "checkpoint.pt")
    model, config = load_model(copy)
    assert model.config.qk_norm and config["added_mean"] == 0.0 and config["init"] == ""
    assert text_of(capsys, monkeypatch, "--out-dir", copy).endswith("\n---\n")
    resume(copy, max_steps=11)
    assert metrics(copy)[-1]["step"] == 11
    assert run_module.adopt({"init": str(copy)})["qk_norm"]


# Runs that start from a model.


def write_tokenizer(path, ids):
    """A token a byte, byte i as number ids[i], and <|endoftext|>, in a tokenizer.json."""
    spelled = {value[0]: character for character, value in BYTE.items()}
    tokenizer = Tokenizer(models.BPE({spelled[i]: ids[i] for i in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    tokenizer.save(str(path / "tokenizer.json"))


def write_llama(path, ffn_dim=48):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": ffn_dim, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=64)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The directory of a random LlamaForCausalLM with the tokenizer of `tiny`. Read only."""
    path = tmp_path_factory.mktemp("models") / "llama-1.5"
    write_llama(path)
    write_tokenizer(path, range(256))
    return path


@pytest.fixture
def other(llama, tmp_path):
    """A copy of that directory to change."""
    return Path(shutil.copytree(llama, tmp_path / "other"))


def run_from(init, preset, out, **knobs):
    """A run from a model on the dataset of a preset, by default two steps of bf16."""
    small = {"precision": "bf16", "batch_size": 4, "block_size": 32, "max_steps": 2}
    small |= {"warmup_steps": 1, "eval_windows": 8, "dataset": preset.parent / "data"}
    main("--init", init, "--out-dir", out, "--keep", *flags(small | knobs))
    return out


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_run_from_a_directory(llama, tiny, tmp_path):
    out = run_from(llama, tiny, tmp_path / "run", block_size=16)
    start, end = (read_checkpoint(out / f"step-{step}.pt")["model"] for step in (0, 2))
    assert_same_weights(start, load_model(llama)[0].state_dict())
    assert not torch.equal(start["head.weight"], end["head.weight"])
    config = load_model(out)[1]
    assert (config["qk_norm"], config["tied"], config["vocab_size"]) == (False, False, 320)
    assert (config["block_size"], config["precision"], config["init"]) == (16, "bf16", str(llama))
    assert_same_run(run(out / "config.json", tmp_path / "again"), out)


def test_a_run_from_a_run_and_from_one_of_its_checkpoints(tiny, tmp_path):
    first = tmp_path / "first"
    main("--preset", tiny, "--out-dir", first, "--keep", "--max-steps", 4)
    for source, checkpoint in ((first, "step-4.pt"), (first / "step-0.pt", "step-0.pt")):
        out = run_from(source, tiny, tmp_path / f"from-{checkpoint}")
        start = read_checkpoint(out / "step-0.pt")["model"]
        assert_same_weights(start, read_checkpoint(first / checkpoint)["model"])
        assert metrics(out)[-1]["step"] == 2


def test_the_config_of_a_run_from_a_model(llama, whole, monkeypatch):
    config, _ = run_module.parse("", ["--init", str(llama), "--bf16-blocks", "1"])
    assert (config.block_size, config.learning_rate) == (64, Config.learning_rate)
    assert (config.out_dir, config.bf16_blocks) == ("out/llama-1.5-fp4_mean", 1)
    monkeypatch.chdir(whole)
    for init in (".", "checkpoint.pt"):
        config, _ = run_module.parse("", ["--init", init, "--precision", "bf16", "--dim", "32"])
        assert (config.n_layer, config.block_size, config.dataset) == (2, 32, "shakespeare")
    assert config.out_dir == "out/checkpoint-bf16"


def test_a_run_from_a_directory_resumes_without_it(other, tiny, tmp_path):
    """Bit for bit, and also if its dataset is in the tokens of that directory."""
    data = tmp_path / "data"
    encoding = get_encoding(other)
    tokens = encode(encoding, ["the cat sat on a mat " * 100])
    write_dataset(data, encoding, {"train": tokens, "val": tokens})
    once = run_from(other, tiny, tmp_path / "once", dataset=data, max_steps=4)
    # a cosine to the fourth step that is cut after the second
    twice = tmp_path / "twice"
    shutil.copytree(once, twice)
    shutil.copy(twice / "step-0.pt", twice / "checkpoint.pt")
    shutil.rmtree(other)
    resume(twice)
    assert_same_run(twice, once)


def without_tokenizer(path):
    (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("harm", "argv", "named"),
    [
        (None, "--dim 48", "dim 48 contradicts .*other, which has 32"),
        (None, "--tied", "tied True contradicts .*other, which has False"),
        (None, "--vocab-size 257", "vocab_size 257 contradicts .*other, which has 320"),
        (None, "--block-size 65", "block_size 65 is more than the 64 of .*other"),
        (None, "--bf16-blocks 3", "bf16_blocks 3 is more than n_layer 2"),
        (None, "--preset nano", "--init .* takes no --preset. HINT: .* are flags"),
        (None, "--resume", "--resume .* no --init"),
        (None, "--dataset missing", "no dataset 'missing'"),
        (lambda p: write_llama(p, 40), "", "multiples of 16"),
        (lambda p: (p / "model.safetensors").unlink(), "", "cannot read .*model.safetensors"),
        (lambda p: (p / "config.json").unlink(), "", "cannot read .*other/config.json"),
        (shutil.rmtree, "", "no model at .*HINT: python hf.py smollm2"),
        (lambda p: write_tokenizer(p, range(255, -1, -1)), "", "data has tokens of bytes, .*other "
         r"reads those of .*other\. HINT: python data/shakespeare/prepare\.py --tokenizer .*other, "
         "and then --dataset shakespeare-other"),
        (without_tokenizer, "--dataset plays", "vocab_size 320 is less than 4096, that of .*plays"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_start_is_one_line(harm, argv, named, other, tiny, tmp_path):
    if harm:
        harm(other)
    plays = get_encoding("plays")
    tokens = encode(plays, ["the cat sat on a mat " * 100])
    write_dataset(tmp_path / "plays", plays, {"train": tokens, "val": tokens})
    argv = argv.replace("plays", str(tmp_path / "plays")).split()
    given = ["--dataset", tiny.parent / "data", *argv]
    out = tmp_path / "run"
    message = refused(main, "--init", other, "--out-dir", out, *given)
    assert re.search(named, message) and not out.exists()


def test_a_model_without_a_tokenizer_trains_on_any_dataset_that_it_has_ids_for(
    other, tiny, tmp_path
):
    without_tokenizer(other)
    out = run_from(other, tiny, tmp_path / "run", max_steps=1)
    assert metrics(out)[-1]["step"] == 1


def test_a_directory_is_a_run_without_a_dataset(llama, other):
    model, config = load_model(llama)
    assert Config(**config).dataset == "" and model.config.precision == "bf16"
    assert load_model(llama, precision="fp4")[0].config.precision == "fp4"
    encoding = encoding_of(config)
    assert encoding.name == str(llama) and encoding.decode(encoding.encode("a" + EOT)) == "a" + EOT
    without_tokenizer(other)
    with pytest.raises(ValueError, match=r"tokenizer.json: No such file.*\nHINT"):
        encoding_of(load_model(other)[1])


def test_a_sample_of_a_directory(llama, other, capsys, monkeypatch):
    text = text_of(capsys, monkeypatch, "--out-dir", llama, "--prompt", "the cat")
    assert text.startswith("the cat") and len(text) > 15
    without_tokenizer(other)
    message = refused(text_of, capsys, monkeypatch, "--out-dir", other)
    assert "tokenizer.json" in message


def test_a_benchmark_of_a_directory(llama, capsys):
    bench.step("nano", str(llama), ["bf16"], 1, torch.device("cpu"))
    assert f"{llama} step" in capsys.readouterr().out


# Several processes.


def torchrun(script, *argv, returncode=0):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(a) for a in (script, *argv)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == returncode, done.stderr
    return done.stdout


def test_two_processes_and_micro_steps_train_as_one(tiny, tmp_path):
    """Only the order of FP32 sums differs, by 4e-6 in these losses of 3 to 6: halving a batch
    doubles its gradients, and a power of two does not change how BF16 rounds."""
    knobs = {"precision": "bf16", "grad_accum": 2}
    one = run(tiny, tmp_path / "one", precision="bf16")
    micro = run(tiny, tmp_path / "micro", **knobs)
    two = tmp_path / "two"
    printed = torchrun(ROOT / "train.py", "--preset", tiny, "--out-dir", two, *flags(knobs))
    assert printed.count("val_loss: ") == 1
    for other in (micro, two):
        for a, b in zip(metrics(one), metrics(other), strict=True):
            for record in (a, b):
                record.pop("mean_share", None)  # of what one process quantizes at a time
            assert a == pytest.approx(b, rel=2e-5)


SPY = """
def spy(draw, module):
    def draw_seeds(n, device):
        seeds = draw(n, device)
        with open(f"{sys.argv[-1]}/seeds-{os.environ.get('RANK', 0)}", "a") as file:
            file.write(" ".join(map(str, seeds.tolist())) + "\\n")
        return seeds
    module.draw_seeds = draw_seeds
spy(fp4.draw_seeds, fp4)
"""
MEASURE = """
import atexit, torch
made = []
make_optimizer = train.make_optimizer
def spy_model(*args):
    made[:] = args[0], make_optimizer(*args)
    return made[1]
def measure():
    model, optimizer = made
    tensors = list(model.state_dict(keep_vars=True).values())  # drops what sampling gathered
    tensors += [t for moments in optimizer.state.values() for t in moments.values()]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    with open(f"{sys.argv[-1]}/bytes-{os.environ.get('RANK', 0)}", "w") as file:
        file.write(str(sum(held.values())))
train.make_optimizer = spy_model
atexit.register(measure)
"""


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """The folder of an fp4_mean run of 4 steps by two processes, the script that ran it, and the
    seeds that each drew."""
    folder = tmp_path_factory.mktemp("two")
    code = folder / "code.py"
    code.write_text(PLAIN + SPY + MEASURE + MAIN)
    torchrun(code, "--preset", tiny, "--max-steps", 4, "--out-dir", folder)
    return folder, [(folder / f"seeds-{rank}").read_text().splitlines() for rank in (0, 1)]


def test_every_rank_and_every_step_draws_noise_of_its_own(two):
    """8 linears, 4 steps; whether a rank repeats itself or the other one, a line occurs twice."""
    seeds = [line for lines in two[1] for line in lines]
    assert len(seeds) == 2 * 4 * 8 and len(set(seeds)) == len(seeds)


def test_two_processes_train_as_by_hand(two, tiny):
    """Each rank centers and rounds its half of the batch with noise of its own; gradients are
    averaged. Only the order of FP32 sums may differ: DDP adds bucket by bucket."""
    config, _ = run_module.parse("", ["--preset", str(tiny), "--max-steps", "4"])
    tokens = load(config.dataset, "train")
    config.vocab_size = 320
    model = GPT(config, run_module.generator_for(config, "init"))
    optimizer, got = train.make_optimizer(model, config), []
    for step in range(4):
        generator = run_module.generator_for(config, "data", step)
        starts = torch.randint(tokens.windows(33), (4,), generator=generator)
        total = 0.0
        for rank in (0, 1):
            torch.manual_seed(seed_for(config, "noise", step, rank))
            x, y = train.batch(tokens, starts[2 * rank :][:2], config, "cpu")
            loss = model(x, y) / 2
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = train.learning_rate(
            step, config
        )
        optimizer.step()
        optimizer.zero_grad()
        got.append((total, norm.item()))
    want = [(m["loss"], m["grad_norm"]) for m in metrics(two[0]) if "loss" in m]
    assert np.array(got) == pytest.approx(np.array(want), rel=2e-5)


# Models that do not fit one device.


def assert_close_runs(a, b, but=()):
    for left, right in zip(metrics(a), metrics(b), strict=True):
        assert {k: v for k, v in left.items() if k not in but} == pytest.approx(
            {k: v for k, v in right.items() if k not in but}, rel=2e-5
        )


def held(out):
    """Bytes of parameters and optimizer that each of two processes had at its end."""
    return [int((out / f"bytes-{rank}").read_text()) for rank in (0, 1)]


def layout(value):
    """A checkpoint with a tensor's type, dtype and shape for the tensor."""
    if isinstance(value, dict):
        return {k: layout(v) for k, v in value.items()}
    return (type(value), value.dtype, value.shape) if isinstance(value, torch.Tensor) else value


def test_sharded_processes_train_as_whole_ones_and_hold_half(two, tiny, tmp_path):
    """DDP adds in the same order for two processes. The gradient's norm does not, and by its last
    bits clipping can turn the rounding of a value."""
    code = two[0] / "code.py"
    printed = torchrun(code, "--preset", tiny, "--max-steps", 4, "--shard", "--out-dir", tmp_path)
    assert printed.count("val_loss: ") == printed.count("--- sample ---") == 1
    assert_close_runs(two[0], tmp_path)
    assert [(tmp_path / f"seeds-{r}").read_text().splitlines() for r in (0, 1)] == two[1]
    for whole, half in zip(held(two[0]), held(tmp_path), strict=True):
        assert half / whole == pytest.approx(0.5, rel=0.01)
    there, here = (read_checkpoint(out / "checkpoint.pt") for out in (two[0], tmp_path))
    free = {"config": None}
    assert layout(there | free) == layout(here | free)
    assert here["model"]["head.weight"].data_ptr() == here["model"]["embedding.weight"].data_ptr()


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A bf16 run by one process, in two micro-steps, whose last evaluation batch has one window."""
    folder = tmp_path_factory.mktemp("one")
    knobs = {"precision": "bf16", "grad_accum": 2, "eval_windows": 9}
    main("--preset", tiny, "--out-dir", folder, "--keep", *flags(knobs))
    return folder


def test_two_sharded_processes_are_killed_and_one_goes_on(one, tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "code.py").write_text(PLAIN + SIGNAL.format("SIGKILL") + MAIN)
    out = tmp_path / "run"
    argv = "--preset", one / "config.json", "--shard", "--recompute", "--out-dir", out
    torchrun(tmp_path / "code.py", *argv, returncode=1)
    assert read_checkpoint(out / "checkpoint.pt")["step"] == 4
    assert text_of(capsys, monkeypatch, "--out-dir", out).endswith("\n---\n")
    message = refused(resume, out)
    assert message.startswith("error: --shard splits the model over processes, and there is one")
    main("--resume", "--out-dir", out, "--no-shard", "--no-recompute")
    assert_close_runs(one, out, but=["mean_share"])


def test_two_sharded_processes_go_on_with_the_run_of_one(one, tmp_path):
    out = Path(shutil.copytree(one, tmp_path / "run"))
    shutil.copy(out / "step-4.pt", out / "checkpoint.pt")
    (tmp_path / "code.py").write_text(PLAIN + MEASURE + MAIN)
    torchrun(tmp_path / "code.py", "--resume", "--shard", "--out-dir", out)
    assert_close_runs(one, out, but=["mean_share"])
    whole = sum(t.numel() * 4 for name, t in tensors(one).items() if name != "head.weight")
    assert held(out) == pytest.approx([whole / 2] * 2, rel=0.01)


def test_one_process_has_nothing_to_shard_over(tiny, tmp_path):
    message = refused(main, "--preset", tiny, "--out-dir", tmp_path / "run", "--shard")
    assert "HINT: torchrun --nproc-per-node 2 train.py, or --no-shard" in message
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_split_are_named():
    model = GPT(Config(**TINY, vocab_size=320))
    with pytest.raises(UserError, match=r"320 rows of embedding.weight do not split into 3"):
        memory.shard(model, SimpleNamespace(size=3))


@pytest.fixture
def sharded(copy):
    """A model of the run in `copy`, sharded over one process, as only a test can; and its config
    and world."""
    config = Config(**json.loads((copy / "config.json").read_text()) | {"shard": True})
    world, model = run_module.World("cpu"), GPT(config)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    memory.shard(model, world)
    yield model, config, world
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows", [0, 10, 640])
def test_a_sharded_run_refuses_a_checkpoint_of_another_size(rows, copy, sharded):
    state, (model, config, world) = torch.load(copy / "checkpoint.pt"), sharded
    state["model"]["embedding.weight"] = torch.zeros(rows, 32)
    torch.save(state, copy / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint.pt: its weights do not fit its config"):
        resume_run(copy, config, model, train.make_optimizer(model, config), world)


def test_a_block_is_whole_only_while_it_runs(sharded):
    model, seen = sharded[0], []
    for block in model.blocks:
        block.ffn.down.register_forward_pre_hook(
            lambda *_: seen.append(
                [not hasattr(b.ffn.down.weight, "to_local") for b in model.blocks]
            )
        )
    model(torch.zeros(1, 32, dtype=torch.long))
    assert seen == [[True, False], [False, True]]


@pytest.mark.parametrize("precision", ["fp4_mean", "fp4_mean_sr"])
def test_recomputed_activations_are_the_same_bit_for_bit(precision, tiny, tmp_path, monkeypatch):
    """Also where forward draws noise. Every block runs once more a step, and not in evaluations."""
    calls, forward = [], model_module.Block.forward
    monkeypatch.setattr(
        model_module.Block, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    argv = "--preset", tiny, "--precision", precision, "--max-steps", 3
    main(*argv, "--out-dir", tmp_path / "kept")
    kept = len(calls)
    main(*argv, "--out-dir", tmp_path / "again", "--recompute")
    assert_same_run(tmp_path / "kept", tmp_path / "again")
    assert len(calls) - kept == kept + 3 * TINY["n_layer"]


# The command line.


def test_help_names_every_knob(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')} " in printed.replace("]", " ").replace(",", " ")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--frobnicate", "1"], "--frobnicate"),
        (["--precis", "bf16"], "--precis"),
        (["--max_steps", "5"], "--max_steps"),
        (["--max-steps", "5.5"], "--max-steps"),
        (["--learning-rate", "fast"], "--learning-rate"),
        (["--precision", "fp5"], "fp5"),
        (["--preset", "huge"], "huge"),
        (["--preset", "missing.json"], "missing.json"),
        (["--dataset", "missing"], "missing"),
        (["--dataset", "./missing"], "missing"),
        (["--device", "gpu"], "gpu"),
        (["--device", "cpu:x"], "cpu:x"),
        (["--max-steps", "0"], "max_steps"),
        (["--block-size", "0"], "block_size"),
        (["--dim", "0"], "dim"),
        (["--n-head", "3", "--n-kv-head", "2"], "n_head 3"),
        (["--seed", "-1"], "seed -1"),
        (["--learning-rate", "-1"], "learning_rate -1"),
        (["--learning-rate", "inf"], "learning_rate inf is not a finite number above 0"),
        (["--norm-eps", "nan"], "norm_eps nan is not a finite number above 0"),
        (["--weight-decay=-inf"], "weight_decay -inf is not a finite number of 0 or more"),
        (["--added-mean", "-1"], "added_mean -1.0 is not a finite number of 0 or more"),
        (["--grad-clip", "-1"], "grad_clip -1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(argv, named, tiny, tmp_path):
    assert named in refused(main, "--preset", tiny, "--out-dir", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


def test_the_command_line_goes_over_the_preset_over_the_defaults(tiny):
    config, _ = run_module.parse("", ["--preset", str(tiny), "--batch-size", "8", "--compile"])
    assert (config.batch_size, config.compile) == (8, True)
    assert (config.dim, config.learning_rate) == (32, 0.01)
    assert (config.weight_decay, config.out_dir) == (0.1, "out/tiny-fp4_mean")


def test_a_config_json_repeats_its_run(whole, tmp_path):
    assert_same_run(run(whole / "config.json", tmp_path / "run"), whole)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"dimension": 32}', "dimension"),
        ('{"dim": "32"}', "dim"),
        ('{"dim": 32.0}', "dim"),
        ('{"compile": 1}', "compile"),
        ('{"precision": "fp5"}', "fp5"),
        ('{"learning_rate": NaN}', "learning_rate nan"),
        ('{"batch_size": true}', "batch_size True"),
        ("[32]", "bad.json"),
        ("dim: 32", "bad.json"),
    ],
)
def test_a_bad_json_is_named(text, named, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    assert named in refused(run, tmp_path / "bad.json", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Settings and data that do not fit.


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"n_kv_head": 0}, "n_kv_head 0"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"dim": 40}, "multiples of 16"),
        ({"vocab_size": 256}, "vocab_size 256"),
        ({"batch_size": 5, "grad_accum": 2}, "batch_size 5"),
        ({"block_size": 4000}, "4001 tokens in val"),
        ({"block_size": 9000}, "9001 tokens in train"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(knobs, named, tiny, tmp_path):
    assert named in refused(run, tiny, tmp_path / "run", **knobs)
    assert not (tmp_path / "run").exists()


def test_a_token_beyond_the_vocabulary_is_named(tiny, tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}_000.bin", np.full(100, 300, np.uint16))
    write_meta(tmp_path, "bytes", 257, None)
    assert "token 300" in refused(run, tiny, tmp_path / "run", dataset=tmp_path)


def test_another_run_is_not_overwritten(tiny, copy):
    before = files(copy)
    assert "another run" in refused(run, tiny, copy, precision="bf16")
    assert files(copy) == before


def test_an_out_dir_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(run, tiny, tmp_path / "file" / "run", precision="bf16")


@pytest.mark.parametrize("rate", ["1e38", "1e16"])  # the weights, or only the loss, become nan
@pytest.mark.parametrize("interval", [1, 1000])
def test_a_diverged_run_stops_and_keeps_a_good_checkpoint(rate, interval, tiny, tmp_path):
    knobs = {"precision": "bf16", "learning_rate": rate, "warmup_steps": 0}
    message = refused(run, tiny, tmp_path, **knobs, eval_interval=interval)
    assert "nan" in message and "HINT: a lower --learning-rate" in message
    assert len(losses(tmp_path)) == 1
    model, config = load_model(tmp_path)
    x = load(config["dataset"], "val").batch([0], 33)
    assert model(x[:, :-1], x[:, 1:]).isfinite()


# Checkpoints that cannot be written or read.


def test_a_full_disk_leaves_the_checkpoint_before_it(copy):
    before = (copy / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        message = refused(resume, copy, max_steps=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "cannot save" in message and "checkpoint before it stays" in message
    assert (copy / "checkpoint.pt").read_bytes() == before
    assert not (copy / "checkpoint.part").exists()


def test_a_disk_that_fills_at_the_last_moment(copy, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (copy / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(resume, copy, max_steps=12)
    assert (copy / "checkpoint.pt").read_bytes() == before
    assert not (copy / "checkpoint.part").exists()


def test_resume_needs_the_folder():
    assert "--out-dir" in refused(main, "--resume")


def test_resume_takes_no_preset(tiny, copy):
    before = files(copy)
    assert "--resume" in refused(main, "--resume", "--preset", tiny, "--out-dir", copy)
    assert files(copy) == before


def test_resume_needs_a_run(tmp_path):
    assert "config.json" in refused(resume, tmp_path / "missing")


def test_resume_needs_a_checkpoint(copy):
    (copy / "checkpoint.pt").unlink()
    assert "no checkpoint" in refused(resume, copy)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.01 is not 0.5"),
        ({"precision": "bf16"}, "precision fp4_mean is not bf16"),
        ({"dim": 48, "seed": 7}, "dim 32 is not 48, seed 1337 is not 7"),
    ],
    ids=str,
)
def test_resume_refuses_another_config_and_names_the_knobs(knobs, named, copy):
    before = files(copy)
    assert named in refused(resume, copy, **knobs)
    assert files(copy) == before


class Code:
    """What a pickle can do: call any function when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damage(path, how):
    whole = path.read_bytes()
    match how:
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case "no end":
            path.write_bytes(whole[:-1])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint")
        case "broken pickle":
            path.write_bytes(b"\x80\x02he.")
        case "foreign":
            torch.save({"weights": torch.ones(3)}, path)
        case "half a state":
            torch.save({"format": CHECKPOINT_FORMAT, "step": 3}, path)
        case "no config" | "odd config" | "no weights" | "odd optimizer":
            state = torch.load(path)
            change = {
                "no config": {"config": None},
                "odd config": {"config": state["config"] | {"dim": "a"}},
                "no weights": {"model": {}},
                "odd optimizer": {"optimizer": {"a": 1}},
            }[how]
            torch.save(state | change, path)
        case "code":
            torch.save({"format": CHECKPOINT_FORMAT, "step": Code(path.parent / "ran")}, path)
        case "pickled code":
            path.write_bytes(pickle.dumps(Code(path.parent / "ran"), protocol=2))


@pytest.mark.parametrize(
    "how",
    [
        "half",
        "no end",
        "empty",
        "text",
        "broken pickle",
        "foreign",
        "half a state",
        "no config",
        "odd config",
        "no weights",
        "odd optimizer",
        "code",
        "pickled code",
    ],
)
def test_resume_refuses_what_is_no_checkpoint_and_runs_none_of_it(how, copy):
    damage(copy / "checkpoint.pt", how)
    before = files(copy)
    assert re.search(r"checkpoint.pt[: ]", refused(resume, copy))
    assert files(copy) == before


def test_a_torn_last_record_does_not_stop_a_resume(copy, whole):
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    resume(copy)
    assert_same_run(copy, whole)


# The parts.


def test_the_learning_rate_warms_up_and_decays():
    config = Config(learning_rate=0.5, min_lr=0.1, warmup_steps=4, max_steps=24)
    rates = [train.learning_rate(step, config) for step in range(25)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[14] == pytest.approx(0.275)
    assert rates[24] == pytest.approx(0.05)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_vectors_do_not(tied):
    config = Config(vocab_size=64, dim=32, n_layer=1, tied=tied, weight_decay=0.3)
    model = GPT(config)
    matrices, vectors = train.make_optimizer(model, config).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0)
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in vectors["params"]} == {
        1
    }
    grouped = [id(p) for p in matrices["params"] + vectors["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("clip", [0.25, 0])
def test_gradients_are_clipped(clip, tiny, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    records = metrics(run(tiny, tmp_path, precision="bf16", grad_clip=clip, max_steps=2))
    before = [m["grad_norm"] for m in records if "loss" in m]
    assert min(before) > 0.25
    assert norms == pytest.approx([clip] * 2 if clip else before, rel=1e-4)


def test_every_purpose_step_and_rank_has_a_seed_of_its_own():
    keys = [
        (p, s, r) for p in ("init", "data", "noise", "sample") for s in range(9) for r in (0, 1)
    ]
    seeds = [seed_for(Config(seed=seed), *key) for seed in (0, 1, 2**40) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# sample.py.


def text_of(capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--tokens", "20", *map(str, argv)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    return capsys.readouterr().out


def test_the_seed_of_a_sample_repeats_it(whole, capsys, monkeypatch):
    argv = "--out-dir", whole, "--prompt", "the cat", "--seed"
    first, again, other = (text_of(capsys, monkeypatch, *argv, seed) for seed in (1, 1, 2))
    assert first.startswith("the cat") and first.endswith("\n---\n")
    assert first == again != other


def test_a_model_samples_in_another_precision(whole):
    a, b = (load_model(whole, precision=name)[0] for name in (None, "fp4"))
    assert (a.config.precision, b.config.precision) == ("fp4_mean", "fp4")
    x = torch.arange(32)[None]
    assert not torch.equal(a(x), b(x))


def test_samples_of_a_precision(whole, capsys, monkeypatch):
    argv = ["--out-dir", whole, "--precision", "bf16", "--samples", 2]
    assert text_of(capsys, monkeypatch, *argv).count("\n---\n") == 2


def test_sampling_needs_a_run(tmp_path, capsys, monkeypatch):
    assert "no checkpoint" in refused(text_of, capsys, monkeypatch, "--out-dir", tmp_path)


@pytest.mark.parametrize(
    "argv", ["--tokens -3", "--tokens 0", "--top-k 0", "--temperature -1", "--temperature nan",
             "--samples 0", "--seed -1", "--device gpu"],
)  # fmt: skip
def test_bad_arguments_of_a_sample_are_named(argv, whole, capsys, monkeypatch):
    assert argv.split()[0] in refused(
        text_of, capsys, monkeypatch, "--out-dir", whole, *argv.split()
    )


@pytest.mark.parametrize("argv", ["--rounds 0", "--threads 0", "--preset huge", "--precisions fp5"])
def test_bad_arguments_of_a_benchmark_are_named(argv):
    assert argv.split()[0] in refused(lambda: script(lambda: bench.main(argv.split())))


def test_mean_share_of_a_known_input():
    """E||x||^2 = ||mu||^2 + variance; the mean of what the linear sees holds 3/4 of the energy, and
    with a mean added, along the same direction or not, what the definition says."""
    x = torch.randn(64, 32)
    x = (x - x.mean(0)) / x.std(0, unbiased=False) + 3**0.5
    for added in (0.0, 2.0):
        recipe = recipe_of("fp4", added)
        linear = fp4.FP4Linear(32, 16, False, recipe)
        model = torch.nn.Sequential(torch.nn.Embedding.from_pretrained(x), linear)
        mean = x.mean(0) + (recipe.mean(x) if added else 0)
        want = mean.square().sum() / (mean.square().sum() + 32)
        got = train.mean_share(model, torch.arange(64).view(4, 16))
        assert got == pytest.approx(want.item(), rel=1e-5)
        assert not linear._forward_pre_hooks
    assert want > 0.8


def test_keep(tiny, tmp_path):
    """Every evaluation's checkpoint stays, and the last is checkpoint.pt."""
    main("--preset", tiny, "--out-dir", tmp_path, "--keep", "--precision", "bf16")
    kept = {int(p.stem[5:]): read_checkpoint(p) for p in tmp_path.glob("step-*.pt")}
    assert sorted(kept) == [0, 4, 8, 10] and all(s["step"] == step for step, s in kept.items())
    assert (tmp_path / "step-10.pt").read_bytes() == (tmp_path / "checkpoint.pt").read_bytes()


def test_keep_means_evaluations_and_the_share_a_micro_step(tiny, tmp_path, monkeypatch):
    """Ctrl-C saves checkpoint.pt alone; the share is measured on what fits: a micro-step."""
    stopped = process(SIGNAL.format("SIGINT"), "--preset", tiny, "--out-dir", tmp_path, "--keep")
    assert stopped.returncode == 0 and read_checkpoint(tmp_path / "checkpoint.pt")["step"] > 4
    assert sorted(p.name for p in tmp_path.glob("step-*.pt")) == ["step-0.pt", "step-4.pt"]
    shapes = []
    monkeypatch.setattr(train, "mean_share", lambda _, ids: shapes.append(ids.shape) or 0.0)
    run(tiny, tmp_path / "micro", precision="bf16", grad_accum=2, max_steps=1)
    assert set(shapes) == {(2, 32)}
