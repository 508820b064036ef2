"""Tokenizers: three of our own, all byte-level, all with <|endoftext|> as their last token,

    bytes      257 tokens   the 256 bytes
    plays     4096 tokens   byte-pair encoding learned on the plays (data/shakespeare/train_bpe.py)
    gpt2     50257 tokens   GPT-2's; its ranks are downloaded at first use

and that of any Hugging Face folder with a tokenizer.json.
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
TOKENIZERS = ("bytes", "plays", "gpt2")
PLAYS = Path(__file__).resolve().parent / "shakespeare" / "plays.tiktoken"
# How GPT-2 cuts text before merging: contractions, words, numbers, punctuation, white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What a run's or a dataset's folder keeps of a Hugging Face folder, in tokenizer/.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES += ("generation_config.json", "config.json", "chat_template.jinja")
# How a byte-level tokenizer.json spells bytes: a printable one as that character of Latin-1, the
# others as U+0100 and on.
OTHERS = [i for i in range(256) if i < 33 or not chr(i).isprintable()]
BYTE = {chr(i): bytes([i]) for i in range(256) if i not in OTHERS}
BYTE |= {chr(256 + n): bytes([i]) for n, i in enumerate(OTHERS)}


class FolderEncoding:
    """The tokenizer of a Hugging Face folder, with what this project uses of tiktoken.Encoding.

    folder: has tokenizer.json, or is a run or a dataset, which has it in tokenizer/.
    <|endoftext|> in a text is the token that ends one here: that name, which a chat model has
    beside its end of a turn, or else the eos of tokenizer_config.json.
    prefix: the ids that the tokenizer itself puts before a text, such as Llama's BOS.
    """

    def __init__(self, folder):
        from tokenizers import Tokenizer, decoders  # our own tokenizers do without

        self.name = f"{Path(folder).resolve().name}/tokenizer.json"  # none of ours is called that
        directories = [Path(folder), Path(folder, "tokenizer")]
        found = [path for path in directories if (path / "tokenizer.json").exists()]
        if not found:
            known = f"{', '.join(TOKENIZERS)}, or a folder with tokenizer.json"
            raise SystemExit(f"error: no tokenizer {str(folder)!r}. HINT: one of {known}")
        paths = [found[0] / name for name in FILES]
        self.files = {path.name: path.read_bytes() for path in paths if path.exists()}
        self.tokenizer = Tokenizer.from_buffer(self.files["tokenizer.json"])
        self.tokenizer.no_truncation()  # a tokenizer.json may ask for both
        self.tokenizer.no_padding()
        self.byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        self.n_vocab = 1 + max(self.tokenizer.get_vocab().values())  # ids may have gaps
        text = self.tokenizer.encode("a")  # with what the post-processor adds
        self.prefix = text.ids[: text.special_tokens_mask.index(0)]
        eos = json.loads(self.files.get("tokenizer_config.json", "{}")).get("eos_token")
        if isinstance(eos, dict):
            eos = eos["content"]
        self.eot = eos if self.tokenizer.token_to_id(EOT) is None else EOT
        if not self.eot or len(self.encode(EOT)) != 1:
            raise SystemExit(f"error: {folder}: no token ends a text: no {EOT}, and no eos_token")
        (self.eot_token,) = self.encode(EOT)

    def encode(self, text, allowed_special="all"):
        """All special tokens of this tokenizer, and <|endoftext|>."""
        self.tokenizer.encode_special_tokens = False  # that is, do not spell them out
        return self.tokenizer.encode(text.replace(EOT, self.eot), add_special_tokens=False).ids

    def encode_ordinary(self, text):
        """What looks like a special token is text."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token):
        """Empty for an unused id. Without byte-level pieces, the piece as tokenizer.json has it."""
        piece = self.tokenizer.id_to_token(token) or ""
        table = BYTE if self.byte_level else {}
        return b"".join(table.get(character, character.encode()) for character in piece)

    def decode_bytes(self, tokens):
        if self.byte_level:
            return b"".join(map(self.decode_single_token_bytes, tokens))
        return self.tokenizer.decode(tokens, skip_special_tokens=False).encode()

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors="replace")

    def save(self, folder):
        """Write its files, as they were when it was loaded, into folder/tokenizer."""
        Path(folder, "tokenizer").mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            Path(folder, "tokenizer", name).write_bytes(content)


def get_encoding(name):
    """The tiktoken.Encoding of that name, or the FolderEncoding of that path."""
    if name not in TOKENIZERS:
        return FolderEncoding(name)
    if name == "gpt2":
        return tiktoken.get_encoding(name)
    ranks = {bytes([i]): i for i in range(256)}
    if name == "plays":  # not tiktoken.load: it would keep serving an old copy from its cache
        lines = [line.split() for line in PLAYS.read_text().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {EOT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def tokenizer_hash(encoding):
    """16 hex digits of the bytes of every token by id, wherever the encoding comes from."""
    digest = hashlib.sha256()
    for token in range(encoding.n_vocab):
        piece = encoding.decode_single_token_bytes(token)
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()[:16]


def encoding_of(folder, name, expected):
    """The encoding of a run's or a dataset's folder: one of ours by name, or else the one in
    folder/tokenizer. SystemExit if its tokenizer_hash is not the expected one."""
    encoding = get_encoding(name if name in TOKENIZERS else folder)
    if tokenizer_hash(encoding) != expected:
        raise SystemExit(f"error: the tokenizer {name} is not the one with which {folder} was made")
    return encoding


def encode(encoding, pieces):
    """Tokens (N,) of an iterable of str, uint16, or uint32 if the vocabulary does not fit into it;
    <|endoftext|> in them becomes the one token."""
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    tokens = [np.empty(0, dtype)]
    for piece in pieces:
        tokens.append(np.array(encoding.encode(piece, allowed_special="all"), dtype))
    return np.concatenate(tokens)


def prompt_ids(encoding, text):
    """A prompt's ids: the tokenizer's own prefix and the text, or if that is nothing, what ends a
    text."""
    ids = getattr(encoding, "prefix", []) + encoding.encode(text, allowed_special="all")
    return ids or [encoding.eot_token]
