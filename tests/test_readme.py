"""What README.md and experiments/README.md say is so: code, commands, links and counts. And who may
import whom."""

import ast
import contextlib
import doctest
import graphlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

import fp4

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README, "experiments/README.md": (ROOT / "experiments/README.md").read_text()}
PYTHON = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if ">>>" not in block]
MAY_IMPORT = {  # a file, or the files of a folder, of what is ours
    "kernels": set(),
    "fp4": {"kernels"},
    "model": {"fp4"},
    "data": {"data"},
    "train": {"data", "fp4", "model"},
    "sample": {"data", "fp4", "model"},
    "tools": {"data", "fp4", "kernels", "model", "tools"},
    "experiments": {"data", "experiments", "fp4", "kernels", "model", "tools"},
}
SOURCES = {}  # module: path
for pattern in ("*.py", "data/**/*.py", "tools/*.py", "experiments/*.py"):
    for path in sorted(ROOT.glob(pattern)):
        SOURCES[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path


def imports(module):
    """The full names of modules that a module of ours imports, and of what it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    ours = {name.split(".")[0] for name in imports(module)} & MAY_IMPORT.keys()
    assert ours <= MAY_IMPORT[module.split(".")[0]]
    source = SOURCES[module].read_text()
    assert "sys.path" not in source
    lazy = re.findall(r'import_module\("(.*?)"\)', source)
    assert lazy == (["experiments.recipes"] if module == "fp4" else [])


def test_the_root_has_five_files_and_imports_no_circle():
    root = {name for name in SOURCES if "." not in name}
    assert root == {"fp4", "kernels", "model", "sample", "train"}
    graph = {name: imports(name) & SOURCES.keys() for name in SOURCES}
    assert graph["train"] == {"data.shards", "data.tokenizer", "fp4", "model"}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names one


def test_the_worked_block_prints_what_it_says():
    flags = doctest.NORMALIZE_WHITESPACE
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=flags)
    assert result.attempted >= 5 and result.failed == 0


def test_python_blocks_run(monkeypatch):
    """The first, of eight lines, is the layer. The others convert a model."""
    monkeypatch.setattr(fp4, "use_fast_path", lambda device: "plain PyTorch")
    scope, x, w = {}, torch.randn(64, 32) + 1, torch.randn(48, 32)
    exec(PYTHON[0], scope)
    assert len(PYTHON[0].splitlines()) <= 8
    torch.testing.assert_close(scope["linear"](x, w), fp4.linear(x, w, "fp4_mean"))
    for block in PYTHON[1:]:
        exec(block, scope)
    assert any(type(layer) is fp4.FP4Linear for layer in scope["model"])


@pytest.mark.parametrize(("readme", "budget"), [*zip(TEXTS, (200, 242), strict=True)])
def test_lines_fit_and_links_lead_somewhere(readme, budget):
    lines = TEXTS[readme].splitlines()
    assert len(lines) <= budget
    assert [line for line in lines if len(line) > 100] == []
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXTS[readme]):
        target = (ROOT / readme).parent / name if name else ROOT / readme
        assert target.exists(), name
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, (name, anchor)


def test_the_map_counts_right():
    rows = re.findall(r"^\| \[`(.*?)`\]\(.*?\) \| (\d+) \|", README, re.M)
    assert len(rows) == 9
    for name, lines in rows:
        files = (ROOT / name).rglob("*.py") if name.endswith("/") else [ROOT / name]
        assert sum(path.read_bytes().count(b"\n") for path in files) == int(lines), name


def commands():
    """(script or module, its first argument, its flags) of every command in the code of a README; a
    remark follows after two spaces."""
    found = set()
    for text in TEXTS.values():
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
        code = [code for language, code in blocks if language != "python"]
        code += re.findall(r"`(python [^`]+)`", text)
        for line in "\n".join(code).replace("\\\n", "").splitlines():
            command = re.match(r"(?:python|torchrun(?: --\S+ \S+)*)(?: -m)? (\S+)(.*)", line)
            if command:
                rest = re.split(r"\s{3,}", command[2])[0]
                first = "" if rest.startswith(" -") else " ".join(rest.split()[:1])
                found.add((command[1], first, *re.findall(r" (--[\w-]+)", rest)))
    return sorted(found)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests have imported it
@pytest.mark.parametrize("command", commands(), ids=str)
def test_commands_name_what_is_there(command, monkeypatch):
    script, first, *flags = command
    monkeypatch.setattr("sys.argv", [script, *([first] if first else []), "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    assert stop.value.code == 0
    assert set(flags) <= {*re.findall(r"--[\w-]+", printed.getvalue())}
