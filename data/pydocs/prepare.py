"""Python's own documentation strings: python -m data.pydocs.prepare [--tokenizer T]

English prose that every Python installation carries, so it needs no network. The text is the
docstrings of the standard library, read and never imported, and pydoc's help topics; a module is a
document. It differs a little between Python versions. "plays" is the default tokenizer: learned on
other English, it still gives 2.2 bytes per token where "bytes" gives 1.
"""

import ast
import sysconfig
import warnings
import zlib
from pathlib import Path

from data.shards import parser_of, write_texts

SKIP = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def strings(source):
    """The docstrings of a module (bytes), and the values of a dict named topics, pydoc's help."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's modules
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED):
            yield ast.get_docstring(node) or ""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            yield from ast.literal_eval(node.value).values()


def documents(stdlib):
    """{"train": [text, ...], "val": [text, ...]}: about every 20th module is for validation."""
    earlier, splits = set(), {"train": [], "val": []}
    for path in sorted(Path(stdlib).rglob("*.py")):
        name = path.relative_to(stdlib)
        if SKIP.isdisjoint(name.parts):
            fresh = [s for s in dict.fromkeys(strings(path.read_bytes())) if s and s not in earlier]
            earlier.update(fresh)
            # A hash of the name: a module keeps its side when another version adds modules.
            split = "train" if zlib.crc32(name.as_posix().encode()) % 20 else "val"
            if fresh:
                splits[split].append("\n\n".join(fresh) + "\n")
    return splits


def prepare(tokenizer="plays", out=None):
    write_texts(documents(sysconfig.get_paths()["stdlib"]), "pydocs", tokenizer, out)


if __name__ == "__main__":
    prepare(**vars(parser_of(__doc__).parse_args()))
