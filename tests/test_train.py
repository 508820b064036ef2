"""Training runs of a tiny model: what they write, repeat and resume, and what they refuse."""

import contextlib
import dataclasses
import errno
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

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fp4
import model as model_module
import sample
import train
from data.shards import Tokens, load, write_dataset
from data.tokenizer import BYTE, EOT, encode, get_encoding
from model import GPT, load_checkpoint
from train import Config, generator_for, seed_for

ROOT = Path(train.__file__).parent
TINY = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "dim": 32, "ffn_dim": 48,
    "block_size": 32, "batch_size": 4, "max_steps": 10, "learning_rate": 0.01, "warmup_steps": 2,
    "eval_interval": 4, "eval_windows": 8, "log_interval": 5, "device": "cpu",
}  # fmt: skip
fp4.recipe_named("fp4_project_1d")  # adds the experiments' recipes to fp4.RECIPES
PLUS = [name for name in fp4.RECIPES if "plus" in name]
RECIPES = [name for name in fp4.RECIPES if name not in PLUS[1:]]


def text_of(words):
    return " ".join(np.random.default_rng(0).choice(words.split(), 3000))


def write_tokens(directory, encoding, text):
    tokens = encode(encoding, [text])
    cut = len(tokens) * 8 // 10
    write_dataset(directory, encoding, {"train": tokens[:cut], "val": tokens[cut:]})
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a config, its dataset beside it."""
    directory = tmp_path_factory.mktemp("tiny")
    tokens = encode(get_encoding("bytes"), [text_of("the cat sat on a mat and then it ran")])
    splits = {"train": tokens[:8000], "val": tokens[8000:]}
    write_dataset(directory / "data", get_encoding("bytes"), splits)
    preset = directory / "tiny.json"
    preset.write_text(json.dumps(TINY | {"dataset": str(directory / "data")}))
    return preset


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an fp4_mean run that nothing interrupted. Read only."""
    return run(tiny, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flags(fields):
    return [str(part) for k, v in fields.items() for part in ("--" + k.replace("_", "-"), v)]


def main(*argv):
    """train.py without compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4, "use_fast_path", lambda device: "plain PyTorch")
        train.main([str(part) for part in argv])


def run(preset, out, *argv, **fields):
    main("--preset", preset, "--out-dir", out, *argv, *flags(fields))
    return out


def resume(out, *argv, **fields):
    main("--resume", "--out-dir", out, *argv, *flags(fields))


def refused(call, *args, **fields):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as stop:
        call(*args, **fields)
    message = stop.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


PLAIN = "import os, signal, sys, fp4, train; fp4.use_fast_path = lambda device: 'plain PyTorch'\n"
MAIN = "train.main(sys.argv[1:])\n"
SIGNAL = """
schedule = train.learning_rate
def learning_rate(step, config):
    if step == 5:
        os.kill(os.getpid(), signal.{})
    return schedule(step, config)
train.learning_rate = learning_rate
"""


def processes(size, code, *argv, **fields):
    """train.py after this code in as many processes, as torchrun starts them: their exit codes, and
    what the first one printed."""
    command = [sys.executable, "-c", PLAIN + code + MAIN, *map(str, argv), *flags(fields)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(size)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    started = []
    for rank in range(size):
        pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment | ranks, stdout=pipe, stderr=pipe, text=True
            )
        )
    try:
        stdout, stderr = started[0].communicate(timeout=100)
        codes = [process.wait(timeout=20) for process in started]
    finally:
        for process in started:
            process.kill()
    assert any(codes) or "Error" not in stderr, stderr
    return codes, stdout, stderr


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


def assert_close_runs(a, b, but=()):
    for left, right in zip(metrics(a), metrics(b), strict=True):
        for key in but:
            left.pop(key, None), right.pop(key, None)
        assert left == pytest.approx(right, rel=2e-5)


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
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert [line[:19] for line in printed.splitlines() if "  lr " in line] == [
        f"step {step:6d}  loss {losses(out)[step - 1]:.1f}"[:19] for step in (5, 10)
    ]
    text, _, lines = printed.split("--- sample ---\n")[1].rpartition("\n---\n")
    assert text
    summary = dict(line.split(": ") for line in lines.splitlines())
    assert (summary["precision"], summary["out_dir"]) == ("bf16", str(out))
    assert float(summary["val_loss"]) == pytest.approx(metrics(out)[-1]["val_loss"], abs=1e-4)
    bits = float(summary["val_loss"]) / math.log(2)  # a token of this tokenizer is a byte
    assert float(summary["bits_per_byte"]) == pytest.approx(bits, abs=2e-4)
    parameters = sum(p.numel() for p in GPT.load(out).parameters())
    assert (int(summary["parameters"]), int(summary["tokens"])) == (parameters, 10 * 4 * 32)


def test_plotting_needs_nothing_that_another_import_brings():
    """A run of hours must not end without its curve."""
    code = "import train; train.plot([{'step': 0, 'loss': 1.0}], sys.argv[1], '')"
    command = [sys.executable, "-c", f"import sys; {code}", os.devnull + ".png"]
    command[-1] = "/dev/stdout"
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


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


def test_precisions_start_from_the_same_weights_and_see_the_same_batches(tiny, tmp_path, starts):
    weights, windows = [], []
    for precision in ("bf16", "fp4_mean"):
        out = run(tiny, tmp_path / precision, "--keep", precision=precision, max_steps=4)
        weights.append(load_checkpoint(out / "step-0.pt")["model"])
        windows.append({split: list(rows) for split, rows in starts.items()})
        starts["train"].clear(), starts["val"].clear()
    assert_same_tensors(*weights)
    assert windows[0] == windows[1]
    assert len(windows[0]["train"]) == 4 and windows[0]["train"][0] != windows[0]["train"][1]


def test_the_seed_orders_the_data(tiny, tmp_path, starts):
    for seed in (1, 2):
        run(tiny, tmp_path / str(seed), precision="bf16", max_steps=2, seed=seed)
    assert starts["train"][:2] != starts["train"][2:]


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
    assert metrics(often)[-1] == metrics(seldom)[-1]


def test_the_validation_loss_does_not_depend_on_the_batch_size(tiny, tmp_path):
    """Nor on whether the last batch of it is full."""
    val = []
    for size in (3, 8):
        out = run(tiny, tmp_path / str(size), precision="bf16", batch_size=size, max_steps=1)
        val.append(metrics(out)[0]["val_loss"])
    assert val[0] == pytest.approx(val[1], abs=1e-6)


def test_a_config_json_repeats_its_run(whole, tmp_path):
    assert_same_run(run(whole / "config.json", tmp_path / "run"), whole)


# Interrupted runs.


def test_a_killed_run_resumes_bit_for_bit(tiny, whole, tmp_path):
    """And its lock ends with it."""
    out = tmp_path / "run"
    codes, _, _ = processes(1, SIGNAL.format("SIGKILL"), "--preset", tiny, out_dir=out)
    assert codes == [-signal.SIGKILL]
    assert load_checkpoint(out)["step"] == 4 and len(losses(out)) == 5
    resume(out)
    assert_same_run(out, whole)


def test_ctrl_c_saves_at_once_and_the_run_resumes_bit_for_bit(tiny, whole, tmp_path):
    out = tmp_path / "run"
    argv = SIGNAL.format("SIGINT"), "--preset", tiny, "--keep"
    codes, printed, errors = processes(1, *argv, out_dir=out)
    assert (codes, errors) == ([0], "")
    assert printed.splitlines()[-1].startswith("stopped at step 6 and saved")
    assert load_checkpoint(out)["step"] == 6
    assert sorted(path.name for path in out.glob("step-*.pt")) == ["step-0.pt", "step-4.pt"]
    resume(out)
    assert_same_run(out, whole)


def test_a_torn_last_record_does_not_stop_a_resume(copy, whole):
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    resume(copy)
    assert_same_run(copy, whole)


def test_a_finished_run_goes_on_when_asked_for_more_steps(copy, whole):
    resume(copy, max_steps=12)
    assert metrics(copy)[:-3] == metrics(whole)[:-1]
    assert [m["step"] for m in metrics(copy)[-3:]] == [10, 11, 12]


def test_keep_leaves_the_checkpoint_of_every_evaluation(tiny, tmp_path):
    run(tiny, tmp_path, "--keep", precision="bf16")
    kept = {int(path.stem[5:]): load_checkpoint(path)["step"] for path in tmp_path.glob("step-*")}
    assert kept == {0: 0, 4: 4, 8: 8, 10: 10}
    assert (tmp_path / "step-10.pt").read_bytes() == (tmp_path / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.01 is not 0.5"),
        ({"precision": "bf16"}, "precision fp4_mean is not bf16"),
        ({"dim": 48, "seed": 7}, "dim 32 is not 48, seed 1337 is not 7"),
    ],
    ids=str,
)
def test_resume_refuses_another_config_and_names_the_fields(fields, named, copy):
    before = files(copy)
    assert named in refused(resume, copy, **fields)
    assert files(copy) == before


def test_a_run_whose_dataset_has_moved_resumes(tiny, copy, whole, tmp_path):
    """Bit for bit: data is what it is, wherever it lies."""
    data = shutil.copytree(tiny.parent / "data", tmp_path / "data")
    shutil.copy(copy / "checkpoint.pt", copy / "last.pt")
    resume(copy, dataset=data, max_steps=11)
    assert metrics(copy)[:-2] == metrics(whole)[:-1]
    assert_same_tensors(tensors(copy / "last.pt"), tensors(whole))


@pytest.mark.parametrize("split", ["train", "val"])
def test_resume_refuses_other_data(split, tiny, copy, tmp_path):
    data = Path(shutil.copytree(tiny.parent / "data", tmp_path / "data"))
    shard = data / f"{split}_000.bin"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    before = files(copy)
    assert f"data of {data} is not that of the checkpoint" in refused(resume, copy, dataset=data)
    assert files(copy) == before


def test_a_run_knows_its_tokenizer(tmp_path, capsys):
    """Its dataset is prepared again, with another tokenizer, in the same place."""
    text = text_of("to be or not that is the question")
    data = write_tokens(tmp_path / "data", get_encoding("plays"), text)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"dataset": str(data)}))
    out = run(tmp_path / "tiny.json", tmp_path / "run", precision="bf16", max_steps=4)
    before = continuation(capsys, out)
    write_tokens(data, get_encoding("bytes"), text)
    assert "tokenizer" in refused(resume, out, max_steps=8)
    assert continuation(capsys, out) == before


def test_a_run_keeps_a_tokenizer_that_is_none_of_ours(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    write_tokenizer(theirs, range(256))
    data = write_tokens(tmp_path / "data", get_encoding(theirs), text_of("a cat sat"))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"dataset": str(data)}))
    out = run(tmp_path / "tiny.json", tmp_path / "run", precision="bf16", max_steps=4)
    shutil.rmtree(theirs)
    shutil.rmtree(data)
    assert continuation(capsys, out).startswith("the cat")
    write_tokenizer(out / "tokenizer", range(255, -1, -1))
    assert "tokenizer" in refused(continuation, capsys, out)


# The folder.


def test_another_run_is_not_overwritten(tiny, copy):
    before = files(copy)
    assert "another run. HINT: --resume" in refused(run, tiny, copy, precision="bf16")
    assert files(copy) == before


@pytest.mark.parametrize("how", ["new", "resumed"])
def test_a_folder_in_use_is_left_alone(how, tiny, copy, monkeypatch):
    """While another process trains in it, which holds its lock."""
    before, inside = files(copy), []
    schedule = train.learning_rate

    def learning_rate(step, config):
        if not inside:
            inside.append(True)
            (copy / "checkpoint.pt").rename(copy / "away")
            start = resume if how == "resumed" else lambda out: run(tiny, out)
            message = refused(start, copy)
            assert message == f"error: another process is training in {copy}"
            (copy / "away").rename(copy / "checkpoint.pt")
            assert {k: v for k, v in files(copy).items() if k != "config.json"}.keys() <= before.keys()
        return schedule(step, config)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    resume(copy, max_steps=11)
    assert inside and metrics(copy)[-1]["step"] == 11


def test_a_full_disk_leaves_the_checkpoint_before_it(copy):
    before = (copy / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        message = refused(resume, copy, max_steps=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"cannot write {copy / 'checkpoint.pt'}" in message
    assert (copy / "checkpoint.pt").read_bytes() == before
    assert not list(copy.glob("*.part"))


def test_a_disk_that_fills_at_the_last_moment(copy, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files(copy)
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(resume, copy, max_steps=12)
    assert files(copy) == before


@pytest.mark.parametrize("rate", ["1e38", "1e16"])  # the weights, or only the loss, become nan
@pytest.mark.parametrize("interval", [1, 1000])
def test_a_diverged_run_stops_and_keeps_a_good_checkpoint(rate, interval, tiny, tmp_path):
    fields = {"precision": "bf16", "learning_rate": rate, "warmup_steps": 0}
    message = refused(run, tiny, tmp_path, **fields, eval_interval=interval)
    assert "nan" in message and "HINT: a lower --learning-rate" in message
    assert len(losses(tmp_path)) == 1
    x = load(tiny.parent / "data", "val").batch([0], 33)
    assert GPT.load(tmp_path)(x[:, :-1], x[:, 1:]).isfinite()


def test_resume_refuses_what_is_no_checkpoint(copy):
    whole = (copy / "checkpoint.pt").read_bytes()
    (copy / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    before = files(copy)
    assert "checkpoint.pt is cut short" in refused(resume, copy)
    assert files(copy) == before


# Runs that start from a model.


def write_tokenizer(folder, ids):
    """A token a byte, byte i as number ids[i], and <|endoftext|>, in a tokenizer.json."""
    spelled = {value[0]: character for character, value in BYTE.items()}
    tokenizer = Tokenizer(models.BPE({spelled[i]: ids[i] for i in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    tokenizer.save(str(folder / "tokenizer.json"))


def run_from(init, tiny, out, *argv, **fields):
    """Two steps of bf16 from another run, on the dataset of a config."""
    small = {"precision": "bf16", "batch_size": 4, "block_size": 32, "max_steps": 2}
    small |= {"warmup_steps": 1, "eval_windows": 8, "dataset": tiny.parent / "data"}
    main("--init", init, "--out-dir", out, "--keep", *argv, *flags(small | fields))
    return out


def test_a_run_starts_from_another(whole, tiny, tmp_path):
    """With its weights and shape, and an optimizer and data of its own; it then stands alone."""
    first = Path(shutil.copytree(whole, tmp_path / "first"))
    out = run_from(first, tiny, tmp_path / "run", block_size=16)
    start, end = (load_checkpoint(out / f"step-{step}.pt") for step in (0, 2))
    assert_same_tensors(start["model"], load_checkpoint(first)["model"])
    assert not torch.equal(start["model"]["head.weight"], end["model"]["head.weight"])
    config = end["config"]
    assert (config["dim"], config["vocab_size"], config["block_size"]) == (32, 320, 16)
    assert (config["precision"], config["init"]) == ("bf16", str(first))
    assert_same_run(run(out / "config.json", tmp_path / "again"), out)
    shutil.copy(out / "step-0.pt", out / "checkpoint.pt")
    shutil.rmtree(first)
    resume(out)
    assert_same_run(out, tmp_path / "again")


def test_a_run_starts_from_an_imported_model(whole, tiny, tmp_path):
    """Whose config has a model's fields alone, and which has no optimizer and no data."""
    state = load_checkpoint(whole)
    config = dataclasses.asdict(GPT.load(whole).config)
    names = {field.name for field in dataclasses.fields(model_module.ModelConfig)}
    config = {name: value for name, value in config.items() if name in names}
    imported = tmp_path / "imported"
    imported.mkdir()
    (imported / "config.json").write_text(json.dumps(config))
    del state["folder"]
    state |= {"config": config, "optimizer": None, "step": 0, "data": ""}
    torch.save(state, imported / "checkpoint.pt")
    out = run_from(imported, tiny, tmp_path / "run")
    assert_same_tensors(load_checkpoint(out / "step-0.pt")["model"], state["model"])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--dim", "48"], "has a dim of its own"),
        (["--tied"], "has a tied of its own"),
        (["--vocab-size", "257"], "has a vocab_size of its own"),
        (["--init", "out/missing"], "HINT: python -m tools.hf smollm2 out/missing"),
        (["--dataset", "plays"], "tokens of plays, .* reads those of bytes"),
    ],
    ids=str,
)
def test_what_a_model_cannot_start_is_one_line(argv, named, whole, tiny, tmp_path, capsys):
    if "plays" in argv:
        text = text_of("to be or not")
        argv = ["--dataset", write_tokens(tmp_path / "plays", get_encoding("plays"), text)]
        named = "vocab_size 320 is less than the 4097"
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        run_from(whole, tiny, out, *argv)
    print(stop.value.code, capsys.readouterr().err)


# Several processes.


SPY = """
quantize = fp4.center_quantize
def center_quantize(x, center, rowwise=True, columnwise=True, seeds=None):
    if seeds is not None:
        with open(f"{sys.argv[-1]}/seeds-{os.environ['RANK']}", "a") as file:
            file.write(f"{seeds.tolist()}\\n")
    return quantize(x, center, rowwise, columnwise, seeds)
fp4.center_quantize = center_quantize
make_optimizer = train.make_optimizer
def count(model, config):
    local = [p.to_local() if config.shard else p for p in model.parameters()]
    with open(f"{sys.argv[-1]}/parameters-{os.environ['RANK']}", "w") as file:
        file.write(str(sum(p.numel() for p in local)))
    return make_optimizer(model, config)
train.make_optimizer = count
"""


def seeds_of(out):
    return [(out / f"seeds-{rank}").read_text().splitlines() for rank in (0, 1)]


def parameters_of(out):
    return [int((out / f"parameters-{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """The folder of an fp4_mean run of 4 steps by two processes, and what it printed."""
    out = tmp_path_factory.mktemp("two")
    fields = {"max_steps": 4, "vocab_size": 321, "out_dir": out}
    codes, printed, errors = processes(2, SPY, "--preset", tiny, **fields)
    assert codes == [0, 0], errors
    assert printed.count("val_loss: ") == printed.count("--- sample ---") == 1
    return out


def test_every_rank_and_every_step_draws_noise_of_its_own(two):
    """8 linears, 4 steps; whether a rank repeats itself or the other one, a line occurs twice."""
    seeds = [line for lines in seeds_of(two) for line in lines]
    assert len(seeds) == 2 * 4 * 8 and len(set(seeds)) == len(seeds)


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
    doubles its gradients, and a power of two does not change how BF16 rounds. mean_share is that of
    what one process rounds at a time."""
    fields = {"precision": "bf16", "grad_accum": 2, "vocab_size": 321}
    micro = run(tiny, tmp_path / "micro", **fields)
    out = tmp_path / "two"
    codes, _, errors = processes(2, "", "--preset", tiny, out_dir=out, **fields)
    assert codes == [0, 0], errors
    assert_close_runs(one, micro, but=["mean_share"])
    assert_close_runs(one, out, but=["mean_share"])


def test_sharded_processes_train_as_whole_ones_and_hold_half(two, tiny, tmp_path):
    """DDP adds in the same order for two processes. The gradient's norm does not, and by its last
    bits clipping can turn the rounding of a value."""
    fields = {"max_steps": 4, "vocab_size": 321, "out_dir": tmp_path}
    codes, printed, errors = processes(2, SPY, "--preset", tiny, "--shard", **fields)
    assert codes == [0, 0], errors
    assert printed.count("val_loss: ") == printed.count("--- sample ---") == 1
    assert_close_runs(two, tmp_path)
    assert seeds_of(tmp_path) == seeds_of(two)
    assert parameters_of(tmp_path) == pytest.approx([parameters_of(two)[0] / 2] * 2, rel=0.01)
    there, here = tensors(two), tensors(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in there.items()} == {
        name: (t.dtype, t.shape) for name, t in here.items()
    }
    assert here["head.weight"].data_ptr() == here["embedding.weight"].data_ptr()


def test_two_sharded_processes_are_killed_and_one_goes_on(one, tmp_path):
    out = tmp_path / "run"
    argv = SIGNAL.format("SIGKILL"), "--preset", one / "config.json", "--shard", "--recompute"
    codes, _, _ = processes(2, *argv, out_dir=out)
    assert -signal.SIGKILL in codes and load_checkpoint(out)["step"] == 4
    assert "--no-shard" in refused(resume, out)
    resume(out, "--no-shard", "--no-recompute")
    assert_close_runs(one, out, but=["mean_share"])


def test_two_sharded_processes_go_on_with_the_run_of_one(one, tmp_path):
    out = Path(shutil.copytree(one, tmp_path / "run"))
    shutil.copy(out / "step-4.pt", out / "checkpoint.pt")
    codes, _, errors = processes(2, "", "--resume", "--shard", out_dir=out)
    assert codes == [0, 0], errors
    assert_close_runs(one, out, but=["mean_share"])


# How blocks run.


@pytest.mark.parametrize("precision", ["fp4_mean", "fp4_mean_sr"])
def test_recomputed_activations_are_the_same_bit_for_bit(precision, tiny, tmp_path, monkeypatch):
    """Also where forward draws noise. Every block runs once more a step, and not in evaluations."""
    calls, forward = [], model_module.Block.forward
    monkeypatch.setattr(
        model_module.Block, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    fields = {"precision": precision, "max_steps": 3}
    run(tiny, tmp_path / "kept", **fields)
    kept = len(calls)
    run(tiny, tmp_path / "again", "--recompute", **fields)
    assert_same_run(tmp_path / "kept", tmp_path / "again")
    assert len(calls) - kept == kept + 3 * TINY["n_layer"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_rounds_to_bf16(tiny, tmp_path):
    """A compiler that drops a cast to BF16 and back trains in FP32 and does not say so."""
    fields = {"max_steps": 3, "n_layer": 1, "warmup_steps": 0}
    eager = run(tiny, tmp_path / "eager", precision="bf16", **fields)
    fp32 = run(tiny, tmp_path / "fp32", precision="fp32", **fields)
    compiled = run(tiny, tmp_path / "compiled", "--compile", precision="bf16", **fields)
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-5)
    assert abs(losses(compiled)[-1] - losses(fp32)[-1]) > 5e-5


# The command line.


def test_help_names_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in printed
    for comment in ("peak learning rate of AdamW (0.002)", "the head shares the embedding's"):
        assert comment in printed


def test_flags_go_over_the_preset_over_the_defaults(tiny):
    config, resuming = train.parse(["--preset", str(tiny), "--batch-size", "8", "--no-tied"])
    assert (config.batch_size, config.tied, resuming) == (8, False, False)
    assert (config.dim, config.learning_rate) == (32, 0.01)
    assert (config.weight_decay, config.out_dir) == (0.1, "out/tiny-fp4_mean")


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
        ("--vocab-size 256", "vocab_size 256 is less than the 257"),
        ("--block-size 9000", "no run of 9001 tokens in train"),
        ("--block-size 4000", "no run of 4001 tokens in val"),
        ("--batch-size 5 --grad-accum 2", "batch_size 5 does not split"),
        ("--shard", "HINT: torchrun, or --no-shard"),
        ("--resume", "--resume takes the run's --out-dir"),
        pytest.param(
            "--device cuda", "no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(argv, named, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tiny, tmp_path / "run", *argv.split())
    (line,) = (s for s in f"{stop.value}\n{capsys.readouterr().err}".splitlines() if "error: " in s)
    assert named in line
    assert not (tmp_path / "run" / "config.json").exists()


# The parts.


def test_the_learning_rate_warms_up_and_decays():
    config = Config(learning_rate=0.5, min_lr=0.1, warmup_steps=4, max_steps=24)
    rates = [train.learning_rate(step, config) for step in range(26)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[14] == pytest.approx(0.275)
    assert rates[24:] == pytest.approx([0.05, 0.05])
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_vectors_do_not(tied):
    config = Config(vocab_size=64, dim=32, n_layer=1, tied=tied, weight_decay=0.3, beta2=0.9)
    model = GPT(config)
    optimizer = train.make_optimizer(model, config)
    matrices, vectors = optimizer.param_groups
    assert optimizer.defaults["betas"] == (0.9, 0.9)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    grouped = [id(p) for p in matrices["params"] + vectors["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("clip", [0.25, 0])
def test_gradients_are_clipped(clip, tiny, tmp_path, monkeypatch):
    """And with 0, as in most programs, they are not."""
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
    keys = [(p, s, r) for p in train.PURPOSES for s in range(9) for r in (0, 1)]
    seeds = [seed_for(Config(seed=seed), *key) for seed in (0, 1, 2**40) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


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


def continuation(capsys, out, *argv):
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4, "use_fast_path", lambda device: "plain PyTorch")
        argv = "--out-dir", out, "--prompt", "the cat", "--tokens", 20, "--device", "cpu", *argv
        sample.main([str(part) for part in argv])
    return capsys.readouterr().out


def test_a_sample_goes_on_with_the_prompt_and_its_seed_repeats_it(whole, capsys):
    first, again, other = (continuation(capsys, whole, "--seed", seed) for seed in (1, 1, 2))
    assert first.startswith("the cat") and first.endswith("\n---\n") and len(first) > 20
    assert first == again != other
    two = continuation(capsys, whole, "--seed", 1, "--samples", 2)
    assert two.startswith(first) and two.count("\n---\n") == 2


def test_sampling_needs_a_run(tmp_path, capsys):
    assert "no checkpoint at" in refused(continuation, capsys, tmp_path)
