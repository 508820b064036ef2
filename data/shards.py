"""Tokens on disk: the one shard format, its writer and its reader.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros)
and then that many little-endian uint16 tokens: the format of llm.c and modded-nanogpt. For
vocabularies of more than 65,536 it is llm.c's other one: magic 20240801, version 7, uint32 tokens.
A dataset is a directory of shards:

    data/<name>/train_000.bin ...   val_000.bin ...
    data/<name>/meta.json           {"tokenizer": "plays", "vocab_size": 4096,
                                     "bytes_per_token": {"train": 3.1, "val": 3.0}}

bytes_per_token turns a loss into bits per byte; it is null where the text itself is not at hand.
"""

import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cli import UserError, why_not

FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # of a magic number
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000  # the count in the header is an int32
DATA = Path(__file__).resolve().parent
AUTOMATIC = ("shakespeare", "pydocs")  # small, and their scripts need no arguments


class DataError(UserError):
    """Data is missing or broken."""


def hint(directory):
    """The line that names the command which makes the dataset in `directory`."""
    directory = Path(directory).resolve()
    if (directory / "prepare.py").exists() and directory.name != "text":
        return f"HINT: python data/{directory.name}/prepare.py"
    return f"HINT: python data/text/prepare.py FILE... --out {directory}"


def write_shard(path, tokens):
    """Write tokens (N,), uint32 or else what uint16 can hold. Not atomic: see write_dataset."""
    magic = 20240801 if np.asarray(tokens).dtype == np.uint32 else 20240520
    version, dtype = FORMATS[magic]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype))  # tofile hides why a disk refused


def write_meta(directory, tokenizer, vocab_size, bytes_per_token):
    """Write meta.json, atomically. It comes last: a directory without it is not a dataset."""
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "bytes_per_token": bytes_per_token}
    temporary = Path(directory) / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(temporary, Path(directory) / "meta.json")


def read_meta(directory):
    """(tokenizer, vocab_size, {split: bytes per token}) of a dataset; DataError if meta.json is
    missing or says anything else."""
    path = directory / "meta.json"
    if not path.exists():
        raise DataError(f"no dataset in {directory}: no meta.json\n{hint(directory)}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(meta, dict):
            raise ValueError("it is not a JSON object")
        tokenizer, size, ratios = map(meta.get, ("tokenizer", "vocab_size", "bytes_per_token"))
        ratios = {} if ratios is None else ratios
        if not isinstance(tokenizer, str):
            raise ValueError(f"tokenizer {tokenizer!r} is not a name")
        if type(size) is not int or not 0 < size <= 2**32:
            raise ValueError(f"vocab_size {size!r} is not an int up to 2**32")
        numbers = ratios.values() if isinstance(ratios, dict) else [None]
        if any(type(ratio) not in (int, float) or why_not(ratio, 0) for ratio in numbers):
            raise ValueError(f"bytes_per_token {ratios!r} is not a number for each split")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}\n{hint(directory)}") from None
    return tokenizer, size, ratios


def write_dataset(directory, encoding, splits, shard_tokens=SHARD_TOKENS):
    """Write a dataset and print its sizes; a failure leaves what was there before.

    encoding: see data/vocab.py; splits: {"train": (N,), "val": (M,)}, both uint16 or both uint32.
    DataError if a split has no tokens.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)]
    lengths[encoding.eot_token] = 0  # a separator is a token but no text
    bytes_per_token = {}
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        for split, tokens in splits.items():
            if not len(tokens):
                raise DataError(f"{directory}: no text for the split {split}")
            text_bytes = 0
            for i, start in enumerate(range(0, len(tokens), shard_tokens)):
                shard = tokens[start : start + shard_tokens]
                write_shard(Path(temporary) / f"{split}_{i:03d}.bin", shard)
                for part in np.array_split(shard, len(shard) // 2**20 + 1):  # bincount widens
                    text_bytes += int(np.bincount(part, minlength=len(lengths)) @ lengths)
            bytes_per_token[split] = text_bytes / len(tokens)
        (directory / "meta.json").unlink(missing_ok=True)
        for split in splits:
            for old in directory.glob(f"{split}_*.bin"):
                old.unlink()
        for new in Path(temporary).glob("*.bin"):
            os.replace(new, directory / new.name)
    exact = getattr(encoding, "byte_level", True)  # else a piece's bytes are not the text's
    write_meta(directory, encoding.name, encoding.n_vocab, bytes_per_token if exact else None)
    for split, tokens in splits.items():
        ratio = f", {bytes_per_token[split]:.3f} bytes per token" if exact else ""
        print(f"{split:5} {len(tokens):12,} tokens{ratio}")
    print(f"wrote {directory}")


def read_header(path):
    """(number of tokens, their dtype) by a shard's header; DataError if this is no such header."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    magic, version, count = header[:3].tolist()
    if magic not in FORMATS:
        known = " or ".join(map(str, FORMATS))
        raise DataError(f"{path} is no token shard: magic {magic}, not {known}")
    due, dtype = FORMATS[magic]
    if version != due:
        raise DataError(f"{path} has shard version {version}, not {due}")
    return count, dtype


class Tokens:
    """One split of a dataset, memory-mapped.

    tokenizer: str; vocab_size: int; bytes_per_token: float or None; len(): number of tokens.
    DataError if meta.json or the shards are missing or damaged, or not ours.
    """

    def __init__(self, directory, split):
        self.directory, self.split = Path(directory), split
        self.tokenizer, self.vocab_size, ratios = read_meta(self.directory)
        self.bytes_per_token = ratios.get(split)
        self.paths = sorted(self.directory.glob(f"{split}_*.bin"))
        if not self.paths:
            raise DataError(f"no {split}_*.bin in {self.directory}\n{hint(directory)}")
        self.shards = [self._map(path) for path in self.paths]

    def _map(self, path):
        try:
            count, dtype = read_header(path)
        except DataError as error:
            raise DataError(f"{error}\n{hint(self.directory)}") from None
        size, due = path.stat().st_size, HEADER_BYTES + dtype.itemsize * count
        if size != due:
            fault = "truncated" if size < due else "too long"
            sizes = f"{size} bytes, {due} by its header"
            raise DataError(f"{path} is {fault}: {sizes}\n{hint(self.directory)}")
        return np.memmap(path, dtype, mode="r")[HEADER_BYTES // dtype.itemsize :]

    def __len__(self):
        return sum(len(shard) for shard in self.shards)

    def windows(self, length):
        """How many runs of `length` tokens there are, none across two shards; DataError if none."""
        count = sum(max(0, len(shard) - length + 1) for shard in self.shards)
        if not count:
            longest = max(len(shard) for shard in self.shards)
            raise DataError(
                f"no run of {length} tokens in {self.split} of {self.directory}: the longest shard "
                f"has {longest}\nHINT: a shorter block, or more text"
            )
        return count

    def spaced(self, n, length):
        """The numbers of n evenly spaced windows of `length` tokens, always the same: (n,)."""
        return torch.linspace(0, self.windows(length) - 1, n, dtype=torch.float64).long()

    def batch(self, starts, length):
        """Windows number `starts` (B,), each in range(windows(length)), as int64 (B, length).

        IndexError beyond that range; DataError on a token that the vocabulary does not have.
        """
        starts = np.asarray(starts, np.int64)
        first = np.cumsum([0] + [max(0, len(shard) - length + 1) for shard in self.shards])
        if ((starts < 0) | (starts >= first[-1])).any():
            raise IndexError(f"window {starts.min()} or {starts.max()} of {first[-1]}")
        rows = np.empty((len(starts), length), np.int64)
        where = np.searchsorted(first, starts, side="right") - 1
        for row, start, i in zip(rows, starts, where, strict=True):
            row[:] = self.shards[i][start - first[i] :][:length]
            if row.max() >= self.vocab_size:
                raise DataError(
                    f"{self.paths[i]} has token {row.max()}, the vocabulary of {self.tokenizer} "
                    f"only {self.vocab_size}\n{hint(self.directory)}"
                )
        return torch.from_numpy(rows)


def datasets():
    """The names that `load` knows: every directory in data/ with a script or a dataset."""
    return sorted({p.parent.name for f in ("prepare.py", "meta.json") for p in DATA.glob(f"*/{f}")})


def load(dataset, split):
    """Tokens of a bare name, looked up in data/, or of a directory; DataError as for Tokens."""
    if Path(dataset).name != str(dataset):
        return Tokens(dataset, split)
    if dataset not in (names := datasets()):
        base, _, directory = str(dataset).partition("-")
        hint = f"one of {', '.join(names)}"
        if directory and base in names:
            hint = f"python data/{base}/prepare.py --tokenizer hf/{directory}"
        raise DataError(f"no dataset {dataset!r}\nHINT: {hint}")
    return Tokens(DATA / dataset, split)


def prepare_if_missing(dataset):
    """Run the script of a small dataset that is not there yet; DataError if the script fails."""
    if dataset not in AUTOMATIC or (DATA / dataset / "meta.json").exists():
        return
    print(f"preparing data/{dataset}", flush=True)
    script = DATA / dataset / "prepare.py"
    done = subprocess.run([sys.executable, script], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        error = done.stderr.strip().removeprefix("error: ")
        raise DataError(error or f"{script} failed: status {done.returncode}")


UNREADABLE = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)  # by `open_text`


def open_text(path):
    """A UTF-8 file to read, decompressed if it ends in .gz or .xz; a byte-order mark is no text."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opened(path, "rt", encoding="utf-8-sig")
