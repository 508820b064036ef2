"""FineWeb-Edu in GPT-2 tokens: python -m data.fineweb.prepare [--shards 1]

Downloads shards of 100 million tokens, 200 MB each: the validation shard and the first --shards of
about a thousand training shards. An interrupted download resumes where it stopped, also when the
command is given again.
"""

import shutil
import urllib.request
from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path

from data.shards import DATA, open_shard, write_dataset
from data.tokenizer import get_encoding

HUB = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main"


def fetch(url, path):
    """Download a shard to `path`. What has come so far is in *.part, where the next call goes on;
    SystemExit if the connection was cut."""
    part = path.with_suffix(".part")
    part.touch()
    request = urllib.request.Request(url, headers={"Range": f"bytes={part.stat().st_size}-"})
    with urllib.request.urlopen(request, timeout=30) as reply, part.open("ab") as file:
        if reply.status == 200:  # this server cannot resume: all of it comes
            file.truncate(0)
        due = part.stat().st_size + int(reply.headers["Content-Length"])
        shutil.copyfileobj(reply, file, 1 << 20)
    if part.stat().st_size < due:
        raise SystemExit(f"error: {url} was cut. HINT: the same command resumes")
    part.replace(path)


def prepare(shards=1, out=DATA / "fineweb", url=HUB):
    encoding = get_encoding("gpt2")
    out.mkdir(parents=True, exist_ok=True)
    for name in ["val_000000", *(f"train_{i:06d}" for i in range(1, shards + 1))]:
        path = out / f"{name}.bin"
        if not path.exists():
            print(f"downloading {name}", flush=True)
            fetch(f"{url}/edu_fineweb_{name}.bin", path)
        print(f"{name} {len(open_shard(path)):12,} tokens", flush=True)
    write_dataset(out, encoding, {})


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--shards", type=int, default=1, help="training shards")
    parser.add_argument("--out", type=Path, default=DATA / "fineweb", help="the dataset's folder")
    prepare(**vars(parser.parse_args()))
