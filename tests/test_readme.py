"""README.md and experiments/README.md: their Python runs and prints what they say, their links lead
somewhere, and the map counts right."""

import dataclasses
import doctest
import re
from pathlib import Path

import pytest
import torch

import fp4
import run

ROOT = Path(__file__).parents[1]
READMES = "README.md", "experiments/README.md"
TEXT = (ROOT / "README.md").read_text()


def test_the_worked_block_prints_what_it_says():
    result = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.attempted == 6 and result.failed == 0


def blocks():
    return [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.S) if ">>>" not in b]


def test_the_fix_in_eight_lines_is_the_layer():
    scope, (x, w) = {}, (torch.randn(64, 32) + 1, torch.randn(48, 32))
    exec(blocks()[0], scope)
    assert blocks()[0].count("\n") <= 8
    torch.testing.assert_close(scope["linear"](x, w), fp4.linear_fp4_mean(x, w))


def test_convert_as_shown(monkeypatch):
    monkeypatch.setattr(fp4, "fuse", lambda: "plain")
    scope = {}
    exec(blocks()[1], scope)
    assert type(scope["model"][0]) is fp4.FP4Linear
    assert scope["model"](torch.randn(2, 64)).shape == (2, 64)


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text()
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / readme).parent / path if path else ROOT / readme
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            names = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in names, link


def test_the_map_counts_right():
    """Within a tenth, so that not every commit must touch it."""
    for row in re.findall(r"^\| (\[`.*?) \| ([\d +]+) \|", TEXT, re.M):
        for name, lines in zip(re.findall(r"\[`(.*?)`\]", row[0]), row[1].split("+"), strict=True):
            files = sorted((ROOT / name).rglob("*.py")) if name.endswith("/") else [ROOT / name]
            count = sum(len(f.read_text().splitlines()) for f in files)
            assert count == pytest.approx(int(lines), rel=0.1), name


def test_commands_name_files_and_flags_that_exist():
    knobs = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(run.Config)}
    for readme in READMES:
        for path, rest in re.findall(r"([\w/]+\.py)(.*)", (ROOT / readme).read_text()):
            if path in ("train.py", "bench.py") or "/" in path:
                source = (ROOT / path).read_text()
                known = knobs | {"--preset", "--resume", "--help"} if path == "train.py" else set()
                for flag in re.findall(r"(?<= )--[a-z][a-z-]+", rest.split("`")[0]):
                    assert flag in known or f'"{flag}"' in source, (path, flag)
