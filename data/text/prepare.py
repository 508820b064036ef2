"""Any UTF-8 text: python -m data.text.prepare FILE... [--tokenizer T] [--out DIR]

Files ending in .gz and .xz are decompressed. A file is a document, or several where it has
<|endoftext|> between them. The last --val-fraction of all tokens is for validation, whole documents
if one ends near that place.
"""

from pathlib import Path

import numpy as np

from data.shards import default_out, open_text, parser_of, write_dataset
from data.tokenizer import EOT, encode, get_encoding


def pieces(paths):
    """The text of the files in pieces of whole lines, about 1 MB each, with EOT after each file."""
    for path in paths:
        piece = ""
        with open_text(path) as file:
            while lines := file.readlines(1 << 20):
                piece = "".join(lines)
                yield piece
        if not piece.rstrip().endswith(EOT):
            yield EOT


def split(tokens, eot, fraction):
    """tokens (N,) cut in two, the second `fraction` of it, at a document's end if one is near."""
    cut = round(len(tokens) * (1 - fraction))
    ends = np.flatnonzero(tokens == eot) + 1
    near = ends[np.abs(ends - cut).argmin()]
    if abs(near - cut) < len(tokens) * fraction / 2:
        cut = near
    return {"train": tokens[:cut], "val": tokens[cut:]}


def prepare(files, tokenizer="plays", val_fraction=0.05, out=None):
    encoding = get_encoding(tokenizer)
    tokens = encode(encoding, pieces(files))
    splits = split(tokens, encoding.eot_token, val_fraction)
    write_dataset(out or default_out("text", tokenizer), encoding, splits)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--val-fraction", type=float, default=0.05)
    prepare(**vars(parser.parse_args()))
