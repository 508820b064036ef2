"""The three tokenizers, all byte-level, all with <|endoftext|> as their last token.

    bytes      257 tokens   the 256 bytes
    plays     4096 tokens   byte-pair encoding learned on the plays (data/shakespeare/train_bpe.py)
    gpt2     50257 tokens   GPT-2's; its ranks are downloaded at first use

All ids fit the uint16 of a shard.
"""

import base64
from pathlib import Path

import numpy as np
import tiktoken

from data.shards import DataError

EOT = "<|endoftext|>"
TOKENIZERS = ("bytes", "plays", "gpt2")
PLAYS = Path(__file__).resolve().parent / "shakespeare" / "plays.tiktoken"
# How GPT-2 cuts text before merging: contractions, words, numbers, punctuation, white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def get_encoding(name):
    """The tiktoken.Encoding of that name; DataError if unknown, or if gpt2 cannot be downloaded."""
    if name not in TOKENIZERS:
        raise DataError(f"no tokenizer {name!r}\nHINT: one of {', '.join(TOKENIZERS)}")
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            reason = type(error).__name__
            raise DataError(
                f"cannot download the ranks of the tokenizer gpt2: {reason}\n"
                "HINT: --tokenizer plays needs no network"
            ) from error
    ranks = {bytes([i]): i for i in range(256)}
    if name == "plays":  # not tiktoken.load: it would keep serving an old copy from its cache
        lines = (line.split() for line in PLAYS.read_text().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(
        name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def encode(encoding, pieces):
    """Tokens (N,) uint16 of an iterable of str; <|endoftext|> in them becomes the one token."""
    arrays = (encoding.encode_to_numpy(piece, allowed_special="all") for piece in pieces)
    return np.concatenate([array.astype(np.uint16) for array in arrays])
