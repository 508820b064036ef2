"""Learn the tokenizer "plays" from the training plays: python data/shakespeare/train_bpe.py

Writes plays.tiktoken beside this file: a token in base64 and its rank on each line, 4095 lines, the
same file every time. Byte-pair encoding: start from single bytes, and again and again make the most
frequent pair of neighbours one token. The committed file is the result; datasets are only readable
with the ranks that wrote them.
"""

import base64
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cli import Parser, script
from data.shakespeare.prepare import plays
from data.vocab import PATTERN, PLAYS


def merge(parts, pair):
    """parts, a list of bytes, with every occurrence of the pair joined."""
    joined, i = [], 0
    while i < len(parts):
        step = 2 if tuple(parts[i : i + 2]) == pair else 1
        joined.append(b"".join(parts[i : i + step]))
        i += step
    return joined


def train(text, size):
    """{token: rank} of `size` tokens, the 256 bytes first; of equal counts the larger pair wins."""
    counts = Counter(word.encode() for word in regex.findall(PATTERN, text))
    words = [[[bytes([byte]) for byte in word], n] for word, n in counts.items()]
    ranks = {bytes([i]): i for i in range(256)}
    pairs, where = Counter(), defaultdict(set)
    for i, (parts, n) in enumerate(words):
        for pair in pairwise(parts):
            pairs[pair] += n
            where[pair].add(i)
    while len(ranks) < size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(b"".join(best), len(ranks))
        for i in where.pop(best):
            parts, n = words[i]
            words[i][0] = merge(parts, best)
            for pair in pairwise(parts):
                pairs[pair] -= n
            for pair in pairwise(words[i][0]):
                pairs[pair] += n
                where[pair].add(i)
        del pairs[best]
    return ranks


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", default=PLAYS)
    args = parser.parse_args()
    ranks = train("".join(plays()["train"]), 4095)  # <|endoftext|> makes it 4096
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    Path(args.out).write_text("".join(lines))


if __name__ == "__main__":
    script(main)
