"""Learn the tokenizer "plays" from the training plays: python -m data.shakespeare.train_bpe

Writes plays.tiktoken beside this file: a token in base64 and its rank on each line, 4095 lines, the
same file every time. Byte-pair encoding: start from single bytes, and again and again make the most
frequent pair of neighbours one token. The committed file is the result; datasets are only readable
with the ranks that wrote them.
"""

import base64
from collections import Counter

import regex

from data.shakespeare.prepare import plays
from data.tokenizer import PATTERN, PLAYS


def train(text, size):
    """{token: rank} of `size` tokens, the 256 bytes first; of equal counts the larger pair wins.

    A word is a str of one character a token, chr(rank), so that str.replace merges a pair.
    """
    counts = Counter(regex.findall(PATTERN, text))
    words = [(word.encode().decode("latin-1"), n) for word, n in counts.items()]
    tokens = [bytes([i]) for i in range(256)]
    pairs = Counter()

    def count(word, n):
        for i in range(len(word) - 1):
            pairs[word[i : i + 2]] += n

    def parts(pair):
        return [tokens[ord(character)] for character in pair]

    for word, n in words:
        count(word, n)
    while len(tokens) < size:
        most = max(pairs.values())
        best = max([pair for pair, n in pairs.items() if n == most], key=parts)
        token = b"".join(parts(best))
        if token not in tokens:  # another pair may have made it
            tokens.append(token)
        for i, (word, n) in enumerate(words):
            if best in word:
                words[i] = word.replace(best, chr(tokens.index(token))), n
                count(word, -n)
                count(words[i][0], n)
    return {token: rank for rank, token in enumerate(tokens)}


def main(path=PLAYS):
    ranks = train("".join(plays()["train"]), 4095)  # <|endoftext|> makes it 4096
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))


if __name__ == "__main__":
    main()
