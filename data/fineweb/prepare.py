"""FineWeb-Edu in GPT-2 tokens: python data/fineweb/prepare.py [--shards 1]

Downloads shards of 100 million tokens, 200 MB each: the validation shard and the first --shards of
about a thousand training shards. An interrupted download resumes where it stopped, also when the
command is given again.
"""

import http.client
import shutil
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cli import Parser, number, script
from data.shards import HEADER_BYTES, DataError, read_header, write_meta

HUB = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main"
HINT = "HINT: the same command resumes; python train.py --dataset pydocs needs no network"


def complete(part, url):
    """Whether `part` holds all that its header promises; a foreign one is removed: DataError."""
    have = part.stat().st_size if part.exists() else 0
    if have < 12:  # not yet magic, version and count
        return False
    try:
        count, dtype = read_header(part)
        size = HEADER_BYTES + dtype.itemsize * count
        if have > size:
            raise DataError(f"{part} has {have} bytes, {size} by its header")
    except DataError as error:
        part.unlink()
        raise DataError(f"refused {url}: {error}") from None
    return have == size


def fetch(url, path, tries=6, wait=1.0):
    """Download a shard to `path`; DataError after `tries` failures, or if it is no shard.

    The waits in seconds are wait, 2 wait, 4 wait and so on. What has come so far is in *.part.
    """
    part = path.with_suffix(".part")
    part.touch()  # where that fails, another try would too
    for i in range(tries):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        reason = "the connection was cut"  # which urllib does not call an error
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                mode = "ab" if reply.status == 206 else "wb"  # 200: no Range here, all of it comes
                with part.open(mode) as file:
                    shutil.copyfileobj(reply, file, 1 << 20)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        if complete(part, url):
            part.replace(path)
            return
        if i < tries - 1:
            time.sleep(wait * 2**i)
    raise DataError(f"gave up on {url} after {tries} tries: {reason}\n{HINT}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=number(int), default=1, help="training shards")
    parser.add_argument("--base-url", default=HUB)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ["val_000000", *(f"train_{i:06d}" for i in range(1, args.shards + 1))]:
        path = args.out / f"{name}.bin"
        if not path.exists():
            print(f"downloading {name}", flush=True)
            fetch(f"{args.base_url}/edu_fineweb_{name}.bin", path)
        print(f"{name} {read_header(path)[0]:12,} tokens", flush=True)
    write_meta(args.out, "gpt2", 50257, None)


if __name__ == "__main__":
    script(main)
