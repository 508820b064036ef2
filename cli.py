"""What all command lines share: arguments that are checked, and errors that are one line."""

import argparse
import io
import json
import math
import sys
from pathlib import Path


class UserError(ValueError):
    """What a user can put right: shown as one line, and mostly a HINT, without a traceback."""


class Parser(argparse.ArgumentParser):
    """argparse with a script's docstring as it stands, no abbreviations, and UserError."""

    def __init__(self, doc):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise UserError(f"{message}. HINT: python {sys.argv[0]} --help")


def is_a(value, kind):
    """Whether a JSON value is of a type; an int is a float too, but a bool is no int."""
    return type(value) is kind or (kind is float and type(value) is int)


def why_not(value, low=None):
    """What is wrong with a number that must be finite and at least low, or above 0 if low is None;
    or None."""
    if value < math.inf and (value > 0 if low is None else value >= low):
        return None
    return f"is not a finite number {'above 0' if low is None else f'of {low} or more'}"


def read_json(path):
    """A JSON object as a dict; UserError if there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def number(kind, low=None):
    """An argparse type: an int or float that `why_not` has nothing against."""

    def parse(text):
        value = kind(text)
        if problem := why_not(value, low):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: invalid int value
    return parse


def script(main):
    """Run a script; what a user can put right, and what the system refuses, ends it with a line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for consoles that lack a character
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}. HINT: pip install -r requirements-dev.txt")
