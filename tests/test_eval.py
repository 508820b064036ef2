"""eval.py on tiny and on rigged models, with small files made up."""

import dataclasses
import io
import json
import lzma
import math
import runpy
import sys
import tarfile

import numpy as np
import pytest
import torch

import fp4
import hf
import train
from checkpoint import CHECKPOINT_FORMAT, load_model, save
from cli import UserError
from data.shards import DataError, load, write_dataset, write_meta
from data.vocab import EOT, encode, get_encoding
from experiments import eval as evaluation
from model import GPT
from run import Config, World

BYTES = get_encoding("bytes")
TEXT = "The old king sat on the hill. A cat saw the king, and the king saw a cat; then it ran. "
BLIMP = [("numbers", uid, f"the cat {i} ran", f"the xat {i} ran") for uid in "ab" for i in "12"]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(fp4, "fuse", lambda: "plain")


@pytest.fixture
def data(tmp_path):
    tokens = encode(BYTES, [TEXT * 40, EOT])
    write_dataset(tmp_path / "data", BYTES, {"train": tokens, "val": tokens})
    return str(tmp_path / "data")


def config_of(data, precision="fp32", **knobs):
    return Config(
        precision=precision, dataset=data, vocab_size=320, block_size=64, n_layer=2, n_head=2,
        n_kv_head=1, head_dim=16, dim=32, ffn_dim=48, batch_size=6, grad_accum=2, eval_windows=8,
        **knobs,
    )  # fmt: skip


def model_of(config):
    """Weights large enough to make the logits differ."""
    model = GPT(config, torch.Generator().manual_seed(1)).eval()
    for p in model.parameters():
        p.data *= 5 if p.ndim == 2 else 1
    return model


def save_run(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    state = {"format": CHECKPOINT_FORMAT, "step": 0, "config": dataclasses.asdict(config)}
    state |= {"model": model_of(config).state_dict(), "optimizer": {}}
    save(folder / "checkpoint.pt", state)
    return str(folder)


class Bigram(torch.nn.Module):
    """Logits are a row of a table (V, V), chosen by the last token. Keeps the shapes it saw."""

    def __init__(self, table):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.table, self.shapes = table, []

    def forward(self, tokens):
        self.shapes.append(tuple(tokens.shape))
        return self.table[tokens]


def examples_of(n, vocab, seed=0):
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.integers(vocab, size=rng.integers(1, high)).tolist() for high in (9, 4))
        for _ in range(n)
    ]


# Scores.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_scores_equal_a_loop_in_numpy(precision, batch_tokens):
    model = model_of(config_of("", precision))
    examples = examples_of(60, 320)
    tokens = torch.tensor([examples[0][0] + examples[0][1]])
    best = model(tokens)[0, :-1].argmax(-1).tolist()
    examples.append((examples[0][0], best[len(examples[0][0]) - 1 :][:1]))  # one that is right
    logp, exact = evaluation.score(model, examples, batch_tokens)
    for i, (context, target) in enumerate(examples):
        expected, right = 0.0, True
        for j, token in enumerate(target):
            with torch.no_grad():
                z = model(torch.tensor([context + target[:j]]))[0, -1].double().numpy()
            expected += z[token] - z.max() - np.log(np.exp(z - z.max()).sum())
            right &= bool(z.argmax() == token)
        assert logp[i] == pytest.approx(expected, rel=1e-4)
        assert exact[i] == right
    assert exact[-1] and exact.sum() < 30


def test_batches_hold_one_length_and_every_example():
    model = Bigram(torch.zeros(8, 8))
    examples = examples_of(200, 8)
    logp, _ = evaluation.score(model, examples, 30)
    assert logp == pytest.approx([-len(target) * math.log(8) for _, target in examples])
    lengths = [len(c) + len(t) - 1 for c, t in examples]
    for length in set(lengths):
        sizes = [b for b, t in model.shapes if t == length]
        assert sum(sizes) == lengths.count(length)
        assert sizes[:-1] == [30 // length] * (len(sizes) - 1)
    evaluation.score(model, [([1] * 50, [1])] * 2, 30)
    assert model.shapes[-2:] == [(1, 50)] * 2


def test_greedy_needs_every_token_of_the_target_and_none_of_the_context():
    model = Bigram(20 * torch.eye(8).roll(1, 1))  # after i comes i + 1
    examples = [([1], [2, 3]), ([1], [2, 4]), ([1], [3, 4]), ([5, 1, 0], [1]), ([7], [0, 1, 2])]
    logp, exact = evaluation.score(model, examples, 100)
    assert exact.tolist() == [True, False, False, True, True]
    assert logp[exact] == pytest.approx(0, abs=1e-6) and (logp[~exact] < -10).all()


# What is measured.


def test_val_loss_is_that_of_the_training_in_fp4_too(data):
    for precision in ("fp32", "fp4", "fp4_mean", "fp4_mean_sr"):  # the last rounds at random
        config = config_of(data, precision)
        model, val = model_of(config), load(data, "val")
        expected = train.evaluate(model, val, config, World("cpu"))
        columns, _ = evaluation.measure(model, config)
        assert columns["val loss"][1].mean() == pytest.approx(expected, rel=1e-6)
        bits = columns["bits per byte"][1].mean()
        assert f"{bits:.4f}" == train.bits_per_byte(expected, val)


def test_a_score_repeats_whatever_was_measured_before(data):
    config = config_of(data, "fp4_mean_sr")  # rounds at random in the forward pass
    model = model_of(config)
    first, _ = evaluation.measure(model, config, BLIMP)
    torch.rand(1)
    again, _ = evaluation.measure(model, config, BLIMP)
    assert all(np.array_equal(values, again[name][1]) for name, (_, values) in first.items())


def test_bits_per_byte_without_the_datasets_count(tmp_path):
    """Uniform over 4096 tokens: 12 bits each, over the bytes of the windows' texts."""
    plays = get_encoding("plays")
    tokens = encode(plays, [TEXT * 9, EOT] * 9)
    write_dataset(tmp_path, plays, {"train": tokens, "val": tokens})
    write_meta(tmp_path, "plays", 4096, None)
    config = config_of(str(tmp_path))
    val = load(str(tmp_path), "val")
    windows = val.batch(val.spaced(8, 65), 65)[:, 1:]
    count = sum(len(plays.decode(w.tolist()).replace(EOT, "").encode()) for w in windows)
    assert sum((w == plays.eot_token).sum() for w in windows) > 0
    columns, _ = evaluation.measure(Bigram(torch.zeros(4096, 4096)), config)
    assert columns["bits per byte"][1].mean() == pytest.approx(12 * 8 * 64 / count)


def test_blimp_of_a_model_that_knows_and_one_that_does_not(data):
    table = torch.zeros(320, 320)
    uneven = [("numbers", "c", "the cat ran", "the cat ran home")]  # the longer is less likely
    columns, phenomena = evaluation.measure(Bigram(table), config_of(data), BLIMP + uneven)
    means = {name: values.mean() for name, (_, values) in phenomena.items()}
    assert means == {"numbers: a": 50, "numbers: b": 50, "numbers: c": 100}
    assert columns["BLiMP, %"][1].tolist() == [50, 50, 50, 50, 100]

    table[:, ord("x")] = -5
    mixed = [*BLIMP[:3], (*BLIMP[3][:2], *BLIMP[3][:1:-1])]  # the last one turned around
    columns, phenomena = evaluation.measure(Bigram(table), config_of(data), mixed)
    means = {name: values.mean() for name, (_, values) in phenomena.items()}
    assert means == {"numbers: a": 100, "numbers: b": 50}
    assert columns["BLiMP, %"][1].tolist() == [100, 100, 100, 0]


def test_the_first_token_of_a_sentence_counts(data):
    table = torch.zeros(320, 320)
    table[BYTES.eot_token, ord("A")] = 3
    pair = [("numbers", "a", "A cat", "B cat")]
    columns, _ = evaluation.measure(Bigram(table), config_of(data), pair)
    assert columns["BLiMP, %"][1].tolist() == [100]


def test_last_words_of_a_model_that_knows(data):
    """After every letter of "king" comes the next, after all else a space."""
    table = torch.zeros(320, 320)
    table[:, ord(" ")] = 20
    for a, b in zip(b" kin", b"king", strict=True):
        table[a, b] = 40
    lambada = [("they crowned the", " king"), ("they fed the", " cat"), ("they saw a", " kin")]
    columns, _ = evaluation.measure(Bigram(table), config_of(data), (), lambada, limit=7)
    assert columns["LAMBADA, %"][1].tolist() == [100, 0, 100]
    nats = columns["LAMBADA, log perplexity"][1]
    assert nats == pytest.approx([0, 80, 0], abs=1e-4)  # "c" 40, "a" and "t" 20 each
    examples, values = columns["last word, %"]
    assert values.tolist() == [100 * (word == " king") for _, word in examples]
    assert len(values) == 7 and 0 < values.sum() < 700


# Texts.


@pytest.mark.parametrize("name", ["bytes", "plays"])
@pytest.mark.parametrize("word", [" hill", " Laertes", " don't", " naïve"])
def test_context_and_word_are_tokenized_as_one_text(name, word):
    encoding = get_encoding(name)
    text = f'HAMLET:\nTo be, or not: {EOT} 12 "the'
    whole = [encoding.eot_token, *encoding.encode_ordinary(text + word)]
    context, target = evaluation.tokenize(encoding, text, word, 1000)
    assert context + target == whole and encoding.decode(target) == word
    assert len(target) < len(whole) - 1
    context, target = evaluation.tokenize(encoding, text, word, 12)
    assert context + target == whole[-13:] and encoding.decode(target) == word
    context, target = evaluation.tokenize(encoding, "", text, 3)
    assert (context, encoding.decode(target)) == ([encoding.eot_token], text)


def test_last_words():
    far = "king " + "of the hill " * 30
    text = (
        "A king is a king. The King saw the king, as kings see: a man is a man. A milkmaid's"
        f" maid. CLOWN: O, clown.{EOT}He is a\nking! Long live the king; the king: the end{EOT}"
        f"{far}king. {far[:200]}king?"
    )
    passages = evaluation.last_words(text)
    assert [word for _, word in passages] == [" king", " king", " clown", " king", " king"]
    contexts = [context for context, _ in passages]
    assert contexts[0].endswith("king is a") and contexts[1].endswith("The King saw the")
    assert contexts[3] == "is a\nking! Long live the" and contexts[4].endswith("of the hill of")
    assert all(len(context) <= 300 and EOT not in context for context in contexts)
    assert evaluation.last_words(text, 2) == passages[:2]


# Files.


def jsonl(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def blimp_files():
    keys = "linguistics_term", "UID", "sentence_good", "sentence_bad"
    files = {}
    for pair in reversed(BLIMP):
        files.setdefault(f"{pair[1]}.jsonl", []).append(dict(zip(keys, pair, strict=True)))
    return {name: jsonl(records[::-1]) for name, records in files.items()}


def blimp_tar(path, mode="w:xz"):
    with tarfile.open(path, mode) as tar:
        for name, text in {**blimp_files(), "README.md": "{"}.items():
            info = tarfile.TarInfo(f"data/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.xz", "tar.gz", "one file"])
def test_blimp_is_read(kind, tmp_path):
    path = tmp_path / "blimp"
    if kind == "folder":
        path.mkdir()
        for name, text in {**blimp_files(), "README.md": "{"}.items():
            (path / name).write_text(text)
    elif kind == "one file":
        path.write_text("".join(blimp_files().values()))
    else:
        blimp_tar(path, "w:" + kind[4:])
    assert evaluation.read_blimp(path) == BLIMP
    assert evaluation.read_blimp(path, 1) == BLIMP[::2]


def test_lambada_is_read(tmp_path):
    text = jsonl([{"text": "I saw the  king\n"}, {"context": "“Stop,” he", "continuation": "said"}])
    text = text.replace("Stop", "\u2028top")  # no end of a line in JSON
    (tmp_path / "l.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "l.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    expected = [("I saw the", " king"), ("“\u2028top,” he", " said")]
    assert evaluation.read_lambada(tmp_path / "l.jsonl") == expected
    assert evaluation.read_lambada(tmp_path / "l.jsonl.xz", 1) == expected[:1]


@pytest.mark.parametrize("kind", ["folder", "tar", "file"])
def test_a_byte_order_mark_is_skipped(kind, tmp_path):
    path = tmp_path / "l"
    path.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (path / name).write_text(jsonl([{"text": "I saw the king"}]), encoding="utf-8-sig")
    if kind == "tar":
        with tarfile.open(tmp_path / "l.tar", "w") as tar:
            tar.add(path)
    path = {"folder": path, "tar": tmp_path / "l.tar", "file": path / "a.jsonl"}[kind]
    due = [("I saw the", " king")] * (1 if kind == "file" else 2)
    assert evaluation.read_lambada(path) == due


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]\n", b'{"UID": "a"}\n', b"\xff\n", "half", "folder"]
)
def test_a_bad_file_is_named(content, tmp_path):
    path = tmp_path / "bad"
    if content == "folder":
        path.mkdir()
    elif content == "half":
        whole = blimp_tar(path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content is not None:
        path.write_bytes(content)
    for read in (evaluation.read_blimp, evaluation.read_lambada):
        with pytest.raises(DataError, match="bad"):
            read(path)


# Statistics and tables.


def test_standard_errors():
    rng = np.random.default_rng(0)
    a, b = (100.0 * (rng.random(400) < p) for p in (0.3, 0.6))
    examples = list(range(400))
    n, mean, error = evaluation.statistics((examples, a))
    p = a.mean() / 100
    assert (n, mean) == (400, pytest.approx(100 * p))
    assert error == pytest.approx(100 * math.sqrt(p * (1 - p) / 400), abs=1e-5)
    paired = evaluation.statistics((examples, b), (list(examples), a))
    assert paired[:3] == evaluation.statistics((examples, b))
    assert paired[3:] == pytest.approx([(b - a).mean(), (b - a).std() / 20], abs=1e-5)
    assert paired[4] != pytest.approx(math.hypot(error, paired[2]), rel=1e-3)  # the unpaired one
    assert len(evaluation.statistics((examples, b), (examples[::-1], a))) == 3


def command(monkeypatch, capsys, *argv):
    """eval.py as a command: what it prints."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device", "cpu", *map(str, argv)])
    capsys.readouterr()
    runpy.run_path(evaluation.__file__, run_name="__main__")
    return capsys.readouterr().out


def test_the_command(data, tmp_path, monkeypatch, capsys):
    runs = [save_run(tmp_path / p, config_of(data, p)) for p in ("fp4", "fp4_mean", "bf16")]
    argv = ["--out-dir", *runs, "--json", tmp_path / "eval.json", "--limit", 9, "--means", "batch"]
    printed = command(monkeypatch, capsys, *argv, "--blimp", blimp_tar(tmp_path / "b.tar.xz"))
    rows = json.loads((tmp_path / "eval.json").read_text())
    labels = [(r["run"], r["in"]) for r in rows]
    a, b, c = runs
    assert labels == [(a, "bf16"), (a, "fp4"), (b, "bf16"), (b, "fp4_mean"), (c, "bf16")]
    loss = [r["columns"]["val loss"][1] for r in rows]
    assert loss[0] == loss[2] == loss[4] and len(set(loss)) == 3  # the weights are the same
    for row, (folder, precision) in zip(rows, labels, strict=True):
        model, config = load_model(folder, precision=precision)
        config, val = Config(**config), load(data, "val")
        expected = train.evaluate(model, val, config, World("cpu"))
        n, mean, _, *paired = row["columns"]["val loss"]
        assert (n, mean) == (8, pytest.approx(expected, rel=1e-5))
        assert paired[:1] == ([] if row is rows[0] else [pytest.approx(mean - loss[0], abs=2e-6)])
        assert row["columns"]["last word, %"][0] == 9
        assert set(row["phenomena"]) == {"numbers: a", "numbers: b"}

    lines = printed.splitlines()
    n, mean, error, gap, gap_error = rows[1]["columns"]["val loss"]
    assert lines[0].startswith("| run | in | val loss | bits per byte | last word, % |")
    assert lines[3].startswith(
        f"| `{a}` | fp4 | {mean:.4f} ± {error:.4f} ({gap:+.4f} ± {gap_error:.4f}) |"
    )
    assert lines[8] == "| BLiMP, % | " + " | ".join(f"`{f}` in {p}" for f, p in labels) + " |"
    assert lines[10].startswith("| numbers: a | ") and lines[11].startswith("| numbers: b | ")
    assert {line.count("|") for line in lines[:7]} == {8}
    assert {line.count("|") for line in lines[8:12]} == {7}
    assert "LAMBADA is left out. HINT: --lambada" in printed and "BLiMP is left" not in printed


def test_means_are_stored_unless_it_is_said_otherwise(data, tmp_path, monkeypatch, capsys):
    """A score then is the same in batches of any size, but for the order of sums."""
    run, losses = save_run(tmp_path / "run", config_of(data, "fp4_mean")), {}
    for means in ([], ["--means", "stored"], ["--means", "batch"]):
        for size in (64, 512):
            argv = ["--out-dir", run, "--precision", "own", "--json", tmp_path / "e.json", *means]
            command(monkeypatch, capsys, *argv, "--batch-tokens", size, "--limit", 1)
            (row,) = json.loads((tmp_path / "e.json").read_text())
            losses[(*means[1:], size)] = row["columns"]["val loss"][1]
            assert row["means"] == ("batch" if "batch" in means else "stored")
    assert losses[(64,)] == losses["stored", 64] != losses["batch", 64]
    assert losses[(512,)] == losses["stored", 512] == pytest.approx(losses[(64,)], abs=2e-5)
    assert abs(losses["batch", 512] - losses["batch", 64]) > 2e-4


def test_own_is_the_precision_of_the_training_and_pairs_have_a_limit_of_their_own(
    data, tmp_path, monkeypatch, capsys
):
    runs = [save_run(tmp_path / p, config_of(data, p)) for p in ("bf16", "fp4_mean")]
    argv = ["--out-dir", *runs, "--precision", "own", "--limit", 9, "--pairs", 1]
    argv += ["--blimp", blimp_tar(tmp_path / "b.tar.xz"), "--json", tmp_path / "own.json"]
    command(monkeypatch, capsys, *argv)
    rows = json.loads((tmp_path / "own.json").read_text())
    assert [r["in"] for r in rows] == ["bf16", "fp4_mean"]
    for row in rows:
        assert row["columns"]["last word, %"][0] == 9 and row["columns"]["BLiMP, %"][0] == 2


def test_without_data_it_says_where_to_get_it(data, tmp_path, monkeypatch, capsys):
    run = save_run(tmp_path / "run", config_of(data, "bf16"))
    (tmp_path / "l.jsonl").write_text(jsonl([{"text": "I saw the king"}]))
    argv = ["--out-dir", run, "--precision", "fp32", "fp4"]
    printed = command(monkeypatch, capsys, *argv)
    assert "https://github.com/alexwarstadt/blimp" in printed
    assert "EleutherAI/lambada_openai" in printed
    assert [line.split(" | ")[1] for line in printed.splitlines()[2:4]] == ["fp32", "fp4"]
    printed = command(monkeypatch, capsys, *argv, "--lambada", tmp_path / "l.jsonl")
    assert "LAMBADA, % | LAMBADA, log perplexity |" in printed
    assert "LAMBADA is left" not in printed and "BLiMP is left" in printed


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--out-dir", "missing"], "missing"),
        (["--out-dir", "RUN", "--blimp", "missing.tar"], "missing.tar"),
        (["--out-dir", "RUN", "--limit", "0"], "--limit: 0"),
        (["--out-dir", "RUN", "--batch-tokens", "-5"], "--batch-tokens: -5"),
        (["--out-dir", "RUN", "--device", "tpu"], "tpu"),
    ],
    ids=str,
)
def test_errors_are_one_line(argv, named, data, tmp_path, monkeypatch, capsys):
    run = save_run(tmp_path / "run", config_of(data))
    argv = [run if a == "RUN" else a for a in argv]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, capsys, *argv)
    assert stop.value.code.startswith("error: ") and named in stop.value.code
    assert "\n" not in stop.value.code


def test_a_hugging_face_directory(data, tmp_path, capsys):
    """The scores of the run that it was made of; a dataset must be named, of its own tokenizer."""
    run = save_run(tmp_path / "run", config_of(data, "fp4_mean"))
    hf.main(["to-hf", run, str(tmp_path / "hf")])
    argv = ["--windows", "4", "--limit", "2", "--precision", "bf16", "fp4_mean", "--json"]
    losses = []
    for out, more in ((run, []), (tmp_path / "hf", ["--dataset", data, "--block-size", "64"])):
        path = tmp_path / "scores.json"
        evaluation.main(["--out-dir", str(out), *more, "--batch-tokens", "192", *argv, str(path)])
        losses.append([row["columns"]["val loss"] for row in json.loads(path.read_text())])
    assert losses[0] == losses[1] and losses[0][0][0] == 4
    with pytest.raises(UserError, match=r"has no dataset of its own\. HINT: --dataset"):
        evaluation.main(["--out-dir", str(tmp_path / "hf"), *argv[:-1]])
    plays = get_encoding("plays")
    tokens = encode(plays, [TEXT * 40, EOT])
    write_dataset(tmp_path / "plays", plays, {"train": tokens, "val": tokens})
    with pytest.raises(UserError, match="has tokens of plays"):
        evaluation.main(
            ["--out-dir", str(tmp_path / "hf"), "--dataset", str(tmp_path / "plays"), *argv[:-1]]
        )
