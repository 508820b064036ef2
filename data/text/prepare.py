"""Any UTF-8 text: python data/text/prepare.py FILE... [--tokenizer T] [--out DIR]

Files ending in .gz and .xz are decompressed. A file is a document, or several where it has
<|endoftext|> between them. The last --val-fraction of all tokens is for validation, whole documents
if one ends near that place.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cli import Parser, script
from data.shards import UNREADABLE, DataError, open_text, write_dataset
from data.vocab import EOT, OUT_HELP, TOKENIZER_HELP, default_out, encode, get_encoding


def pieces(paths):
    """The text of the files in pieces of whole lines, about 1 MB each, with EOT after each file."""
    for path in paths:
        piece = ""
        try:
            with open_text(path) as file:
                while lines := file.readlines(1 << 20):
                    piece = "".join(lines)
                    yield piece
        except UNREADABLE as error:
            raise DataError(f"cannot read {path}: {error}") from error
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


def main():
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tokenizer", default="plays", help=TOKENIZER_HELP)
    parser.add_argument("--val-fraction", type=float, default=0.05)
    parser.add_argument("--out", help=OUT_HELP)
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        parser.error("--val-fraction must be between 0 and 1")
    encoding = get_encoding(args.tokenizer)
    tokens = encode(encoding, pieces(args.files))
    splits = split(tokens, encoding.eot_token, args.val_fraction)
    write_dataset(args.out or default_out(__file__, args.tokenizer), encoding, splits)


if __name__ == "__main__":
    script(main)
