"""Tokens on disk: the one shard format, its writer and its reader.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros)
and then that many little-endian uint16 tokens: the format of llm.c and modded-nanogpt. For
vocabularies of more than 65,536 it is llm.c's other one: magic 20240801, version 7, uint32 tokens.
A dataset is a folder of shards:

    data/<name>/train_000.bin ...   val_000.bin ...
    data/<name>/meta.json           {"tokenizer": "plays", "tokenizer_hash": "71b50fcf544c216e",
                                     "vocab_size": 4096, "bytes_per_token": {"train": 3.1, ...}}
    data/<name>/tokenizer/          the tokenizer's files, if it is none of ours

bytes_per_token turns a loss into bits per byte; it is {} where the text itself is not at hand.
"""

import gzip
import hashlib
import importlib
import json
import lzma
from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import EOT, TOKENIZERS, FolderEncoding, encode, get_encoding, tokenizer_hash

FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # by magic and version
HEADER_BYTES = 256 * 4
DATA = Path(__file__).resolve().parent
AUTOMATIC = ("shakespeare", "pydocs")  # small: made when they are missing
HINT = "HINT: python -m data.shakespeare.prepare [--tokenizer FOLDER] (or pydocs, or fineweb), or "
HINT += "python -m data.text.prepare FILE... --out DIR"


def write_shard(path, tokens):
    """Write tokens (N,), uint32 or else what uint16 can hold."""
    magic_version = (20240801, 7) if tokens.dtype == np.uint32 else (20240520, 1)
    header = np.zeros(256, "<i4")
    header[:3] = *magic_version, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, FORMATS[magic_version]))


def write_dataset(directory, encoding, splits):
    """Write a dataset in place of the one that was there, and print its sizes.

    encoding: see data/tokenizer.py; splits: {"train": (N,), "val": (M,)}, both uint16 or uint32, or
    {} where the shards are there. SystemExit if a split has no tokens.
    """
    for split, tokens in splits.items():
        if not len(tokens):
            raise SystemExit(f"error: no text for the split {split} of {directory}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "meta.json").unlink(missing_ok=True)
    if isinstance(encoding, FolderEncoding):
        encoding.save(directory)
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)]
    lengths[encoding.eot_token] = 0  # a separator is a token but no text
    bytes_per_token = {}
    for split, tokens in splits.items():
        for stale in directory.glob(f"{split}_*.bin"):
            stale.unlink()
        write_shard(directory / f"{split}_000.bin", tokens)
        print(f"{split:5} {len(tokens):12,} tokens")
        if getattr(encoding, "byte_level", True):  # else a piece's bytes are not the text's
            parts = np.array_split(tokens, len(tokens) // 2**20 + 1)  # bincount widens to int64
            text_bytes = sum(np.bincount(part, minlength=len(lengths)) @ lengths for part in parts)
            bytes_per_token[split] = int(text_bytes) / len(tokens)
    meta = {
        "tokenizer": encoding.name,
        "tokenizer_hash": tokenizer_hash(encoding),
        "vocab_size": encoding.n_vocab,
        "bytes_per_token": bytes_per_token,
    }
    # It comes last: a folder without it is no dataset.
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    print(f"wrote {directory}")


def open_shard(path):
    """The tokens (N,) of a shard, memory-mapped; SystemExit if it is not what its header says."""
    header = np.fromfile(path, "<i4", 3).tolist()
    dtype = FORMATS.get(tuple(header[:2]))
    if dtype is None or path.stat().st_size != HEADER_BYTES + dtype.itemsize * header[2]:
        raise SystemExit(f"error: {path} is no whole token shard. HINT: delete it, prepare again")
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES)


class Tokens:
    """One split of a dataset, memory-mapped.

    tokenizer, tokenizer_hash: str; vocab_size: int; bytes_per_token: float or None; len(): number
    of tokens. SystemExit if there is no such dataset, or a shard is damaged.
    """

    def __init__(self, directory, split):
        self.directory = Path(directory)
        self.split = split
        paths = sorted(self.directory.glob(f"{split}_*.bin"))
        meta = self.directory / "meta.json"
        if not meta.exists() or not paths:
            raise SystemExit(f"error: no dataset in {directory}. {HINT}")
        values = json.loads(meta.read_text())
        if "tokenizer_hash" not in values:
            raise SystemExit(f"error: {meta} was made by another version. {HINT}")
        self.tokenizer = values["tokenizer"]
        self.tokenizer_hash = values["tokenizer_hash"]
        self.vocab_size = values["vocab_size"]
        self.bytes_per_token = values["bytes_per_token"].get(split)
        self.shards = [open_shard(path) for path in paths]

    def __len__(self):
        return sum(len(shard) for shard in self.shards)

    @property
    def fingerprint(self):
        """16 hex digits of what the data is, wherever it lies: the tokenizer, and the length and
        first and last 4,096 tokens of each shard."""
        digest = hashlib.sha256(self.tokenizer_hash.encode())
        for shard in self.shards:
            digest.update(len(shard).to_bytes(8, "little"))
            digest.update(shard[:4096].tobytes())
            digest.update(shard[-4096:].tobytes())
        return digest.hexdigest()[:16]

    def windows(self, length):
        """How many runs of `length` tokens there are within the shards; SystemExit if none."""
        count = sum(max(0, len(shard) - length + 1) for shard in self.shards)
        if not count:
            found = f"no run of {length} tokens in {self.split} of {self.directory}"
            raise SystemExit(f"error: {found}. HINT: a shorter block, or more text")
        return count

    def spaced(self, n, length):
        """The numbers of n evenly spaced windows of `length` tokens, always the same: (n,)."""
        return torch.linspace(0, self.windows(length) - 1, n, dtype=torch.float64).long()

    def batch(self, starts, length):
        """Windows number `starts` (B,), each in range(windows(length)), as int64 (B, length);
        SystemExit on a token that the vocabulary does not have."""
        starts = np.asarray(starts, np.int64)
        first = np.cumsum([0] + [max(0, len(shard) - length + 1) for shard in self.shards])
        numbers = np.searchsorted(first, starts, side="right") - 1  # of the windows' shards
        windows = np.empty((len(starts), length), np.int64)
        for window, start, i in zip(windows, starts, numbers, strict=True):
            window[:] = self.shards[i][start - first[i] :][:length]
            if window.max() >= self.vocab_size:
                found = f"token {window.max()}, the vocabulary only {self.vocab_size}"
                raise SystemExit(f"error: {self.directory} has {found}. {HINT}")
        return torch.from_numpy(windows)


def load(dataset, split):
    """Tokens of a bare name, looked up in data/, or of a path, which has a slash."""
    if Path(dataset).name == str(dataset):
        dataset = DATA / dataset
    return Tokens(dataset, split)


def default_out(source, tokenizer):
    """data/SOURCE, or data/SOURCE-FOLDER for a folder's tokenizer, so that both can be there."""
    if tokenizer in TOKENIZERS:
        return DATA / source
    return DATA / f"{source}-{Path(tokenizer).resolve().name}"


def parser_of(doc):
    """The arguments of a script that makes a dataset of texts."""
    parser = ArgumentParser(description=doc, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--tokenizer", default="plays", help="bytes, plays, gpt2, or a folder")
    parser.add_argument("--out", help="the dataset's folder")
    return parser


def write_texts(texts, source, tokenizer, out):
    """Tokenize {"train": [text, ...], "val": ...} with EOT after each text, and write it."""
    encoding = get_encoding(tokenizer)
    splits = {}
    for split, documents in texts.items():
        splits[split] = encode(encoding, [text + EOT for text in documents])
    write_dataset(out or default_out(source, tokenizer), encoding, splits)


def prepare_if_missing(dataset):
    """Prepare a small dataset that is not there yet."""
    if dataset in AUTOMATIC and not (DATA / dataset / "meta.json").exists():
        print(f"preparing data/{dataset}", flush=True)
        importlib.import_module(f"data.{dataset}.prepare").prepare()


def open_text(path):
    """A UTF-8 file to read, decompressed if it ends in .gz or .xz; a byte-order mark is no text."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opened(path, "rt", encoding="utf-8-sig")
