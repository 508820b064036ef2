"""Tokenizers: three of our own, all byte-level, all with <|endoftext|> as their last token,

    bytes      257 tokens   the 256 bytes
    plays     4096 tokens   byte-pair encoding learned on the plays (data/shakespeare/train_bpe.py)
    gpt2     50257 tokens   GPT-2's; its ranks are downloaded at first use

and that of any Hugging Face directory with a tokenizer.json.
"""

import base64
from pathlib import Path

import numpy as np
import tiktoken

from cli import read_json
from data.shards import DataError

EOT = "<|endoftext|>"
TOKENIZERS = ("bytes", "plays", "gpt2")
TOKENIZER_HELP = f"{', '.join(TOKENIZERS)}, or a Hugging Face directory (plays)"
OUT_HELP = "(this script's folder; for a directory's tokenizer FOLDER-DIRECTORY beside it)"
HINT = f"HINT: one of {', '.join(TOKENIZERS)}, or a directory that has tokenizer.json"
PLAYS = Path(__file__).resolve().parent / "shakespeare" / "plays.tiktoken"
# How GPT-2 cuts text before merging: contractions, words, numbers, punctuation, white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# How a byte-level tokenizer.json spells bytes: a printable one as that character of Latin-1, the
# others as U+0100 and on.
PRINTABLE = [i for i in range(33, 256) if chr(i).isprintable()]
OTHERS = [i for i in range(256) if i not in PRINTABLE]
BYTE = {chr(i): bytes([i]) for i in PRINTABLE}
BYTE |= {chr(256 + n): bytes([i]) for n, i in enumerate(OTHERS)}


class DirectoryEncoding:
    """The tokenizer of a Hugging Face directory, with what this project uses of tiktoken.Encoding.

    <|endoftext|> in a text is the token that ends one here: that name, which a chat model has
    beside its end of a turn, or else the eos of tokenizer_config.json or config.json. Its name is
    the directory's absolute path. DataError if the files are missing or broken.
    """

    def __init__(self, directory):
        from tokenizers import Tokenizer, decoders  # our own tokenizers do without

        directory = Path(directory).resolve()
        self.name = str(directory)
        file = directory / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package tokenizers raises nothing narrower
            raise DataError(f"cannot read {file}: {error}\n{HINT}") from None
        self.tokenizer.no_truncation()  # a tokenizer.json may ask for both
        self.tokenizer.no_padding()
        self.byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        self.n_vocab = 1 + max(self.tokenizer.get_vocab().values())  # ids may have gaps
        self.eot = EOT
        if self.tokenizer.token_to_id(EOT) is None:
            files = [directory / name for name in ("tokenizer_config.json", "config.json")]
            settings, model = (read_json(f) if f.exists() else {} for f in files)
            eos = settings.get("eos_token") or model.get("eos_token_id")
            eos = eos.get("content") if isinstance(eos, dict) else eos
            eos = eos[0] if isinstance(eos, list) else eos
            self.eot = self.tokenizer.id_to_token(eos) if isinstance(eos, int) else eos
        if not self.eot or len(self.encode(EOT)) != 1:
            raise DataError(f"{directory}: no token ends a text: no {EOT}, and no eos\n{HINT}")
        (self.eot_token,) = self.encode(EOT)

    def encode(self, text, allowed_special="all"):
        """All special tokens of this tokenizer, and <|endoftext|>."""
        self.tokenizer.encode_special_tokens = False  # that is, do not spell them out
        return self.tokenizer.encode(text.replace(EOT, self.eot), add_special_tokens=False).ids

    def encode_to_numpy(self, text, allowed_special="all"):
        return np.array(self.encode(text), np.uint32)

    def encode_ordinary(self, text):
        """What looks like a special token is text."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token):
        """Empty for an unused id. Without byte-level pieces, the piece as tokenizer.json has it."""
        piece = self.tokenizer.id_to_token(token) or ""
        return b"".join((self.byte_level and BYTE.get(c)) or c.encode() for c in piece)

    def decode_bytes(self, tokens):
        if self.byte_level:
            return b"".join(map(self.decode_single_token_bytes, tokens))
        return self.tokenizer.decode(tokens, skip_special_tokens=False).encode()

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors="replace")


def get_encoding(name):
    """The tiktoken.Encoding of that name, or the DirectoryEncoding of that path.

    DataError if there is none, if its files are broken, or if gpt2 cannot be downloaded."""
    if name not in TOKENIZERS:
        if Path(name).is_dir():
            return DirectoryEncoding(name)
        raise DataError(f"no tokenizer {name!r}\n{HINT}")
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


def token_bytes(encoding):
    """The bytes of every token, by id. Two encodings for which they are equal are the same."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]


def encode(encoding, pieces):
    """Tokens (N,) of an iterable of str, uint16, or uint32 if the vocabulary does not fit into it;
    <|endoftext|> in them becomes the one token."""
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    arrays = (encoding.encode_to_numpy(piece, allowed_special="all") for piece in pieces)
    return np.concatenate([array.astype(dtype) for array in arrays])


def default_out(script, tokenizer):
    """Where a script writes by default: its own folder, which is named by the presets and holds our
    tokens; for a directory's tokenizer a folder of its own beside that, so that --dataset finds
    both."""
    folder = Path(script).resolve().parent
    if tokenizer in TOKENIZERS:
        return folder
    return folder.with_name(f"{folder.name}-{Path(tokenizer).resolve().name}")
