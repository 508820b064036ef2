"""compare.py on runs of a tiny model, and its statistics on numbers made up."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fp4
import train
from checkpoint import read_checkpoint, read_metrics
from cli import UserError
from data.shards import write_dataset
from data.vocab import encode, get_encoding
from experiments import compare
from experiments.recipes import RECIPES
from experiments.report import summary

TINY = {
    "n_layer": 1, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "dim": 32, "ffn_dim": 48,
    "block_size": 32, "batch_size": 4, "warmup_steps": 2, "eval_windows": 4,
}  # fmt: skip
SUBPROCESS = compare.train
RESULTS = compare.ROOT / "experiments" / "results"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An experiment of 2 precisions with 2 added means; the command line that runs it for 4 steps.
    Training is in this process."""
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 3000)
    tokens = encode(get_encoding("bytes"), [" ".join(words)])
    parts = {"train": tokens[:8000], "val": tokens[8000:]}
    write_dataset(tmp_path / "out" / "plays-bytes", get_encoding("bytes"), parts)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    grid = compare.grid(["fp4", "fp4_mean"], [0.0, 8.0])
    toy = {"seeds": 2, "steps": 4, "base": "fp4", "keep": True, "settings": grid, "windows": 2}
    monkeypatch.setitem(compare.EXPERIMENTS, "toy", toy)
    monkeypatch.setattr(fp4, "fuse", lambda: "plain")
    monkeypatch.setattr(train, "attempt", lambda *_: None)  # no curve, no sample
    monkeypatch.setattr(compare, "train", train.main)
    return ["toy", "--preset", "tiny.json"]


@pytest.fixture
def small(toy, monkeypatch):
    """The same with a single run, in bf16."""
    monkeypatch.setitem(compare.EXPERIMENTS["toy"], "settings", [])
    return [*toy, "--seeds", "1"]


def test_runs_once_and_prints_the_table_of_its_json(toy, tmp_path, monkeypatch, capsys):
    committed = {path: path.read_bytes() for path in RESULTS.iterdir()}
    toy += ["--steps", "2"]
    compare.main([*toy, "--json", "kept/toy.json"])
    printed = capsys.readouterr().out.split("\ntiny, 2 steps, 2 seeds\n")[1]
    stored = json.loads((tmp_path / "kept" / "toy.json").read_text())
    runs = {(r["precision"], r["added_mean"], r["seed"]): r for r in stored["runs"]}
    assert len(runs) == 2 * (1 + 2 * 2)
    assert all([step for step, _ in r["val"]] == [0, 1, 2] for r in runs.values())
    kept = [len(list(path.glob("step-*.pt"))) for path in tmp_path.glob("out/compare/tiny-2/*")]
    assert kept == [3] * 10
    shares = [runs["fp4", rms, 1]["mean_share"][-1][1] for rms in (0.0, 8.0)]
    assert shares[1] > max(0.9, shares[0])  # 64 / 65 if the input has no mean of its own
    # one step from the same weights on the same batch: what the mean does to fp4, not to fp4_mean
    first = {key: r["val"][1][1] for key, r in runs.items()}
    for seed in (1, 2):
        moved = [abs(first[p, 8.0, seed] - first[p, 0.0, seed]) for p in ("fp4", "fp4_mean")]
        assert moved[1] < 2e-3 < moved[0], moved

    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("trained again"))
    compare.main(toy)
    assert capsys.readouterr().out.endswith(printed)
    compare.main(["kept/toy.json"])
    assert capsys.readouterr().out.endswith(printed)
    assert committed == {path: path.read_bytes() for path in RESULTS.iterdir()}


def test_training_on_starts_from_the_weights_of_a_preset(small, monkeypatch, tmp_path, capsys):
    compare.main(small)
    on = {"init": "out/compare/tiny-4/bf16-0-1", "dataset": "out/plays-bytes", "eval_windows": 4}
    on |= {"batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-4}
    (tmp_path / "on.json").write_text(json.dumps(on))
    grid = compare.grid(["fp4"], [0.0]) + compare.grid(["bf16"], [0.0], learning_rate=1e-3)
    toy = {
        "seeds": 2,
        "steps": 2,
        "base": "fp4",
        "preset": "on.json",
        "settings": grid,
        "windows": 2,
    }
    monkeypatch.setitem(compare.EXPERIMENTS, "toy", toy | {"once": compare.grid(["fp4_mean"], [0])})
    capsys.readouterr()
    compare.main(["toy", "--json", "on/toy.json"])
    stored = json.loads((tmp_path / "on" / "toy.json").read_text())
    runs = {(r["precision"], r.get("learning_rate"), r["seed"]): r for r in stored["runs"]}
    assert (
        len(runs) == 2 * 3 + 1 and ("fp4_mean", None, 1) in runs and stored["preset"] == "on.json"
    )
    before = read_metrics(tmp_path / on["init"])[-1]["val_loss"]
    assert all(
        r["val"][0][1] == pytest.approx(before, abs=1e-5) for k, r in runs.items() if k[0] == "bf16"
    )
    assert runs["bf16", 1e-3, 1]["val"][-1] != runs["bf16", None, 1]["val"][-1]
    config = json.loads((tmp_path / "out/compare/on-2/fp4-0-2/config.json").read_text())
    assert config["eval_windows"] == 2  # the experiment's, not the preset's
    assert "| `bf16, learning rate 0.001` |" in capsys.readouterr().out


def test_goes_on_with_what_was_interrupted(small, monkeypatch):
    whole = train.learning_rate

    def stop(step, config):
        if step == 2:
            raise KeyboardInterrupt
        return whole(step, config)

    monkeypatch.setattr(train, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        compare.main(small)
    monkeypatch.setattr(train, "learning_rate", whole)
    given = []
    monkeypatch.setattr(compare, "train", lambda argv: given.append(argv) or train.main(argv))
    compare.main([*small, "--seeds", "2"])
    assert given[0][0] == "--resume" and given[1][0] == "--preset"


def test_an_unfinished_run_is_no_result(small, tmp_path, monkeypatch):
    def unfinished(argv):
        (out,) = (Path(a.split("=")[1]) for a in argv if a.startswith("--out-dir"))
        out.mkdir(parents=True)
        lines = '{"step": 2, "val_loss": 1.0}', '{"step": 3, "loss": 1.0}', '{"step": 4, "val_lo'
        (out / "metrics.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(compare, "train", unfinished)
    with pytest.raises(UserError, match="was interrupted"):
        compare.main([*small, "--json", "toy.json"])
    assert not (tmp_path / "toy.json").exists()


def test_a_run_is_not_taken_for_one_of_another_preset_of_the_same_name(small, tmp_path):
    compare.main(small)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"learning_rate": 1e-4}))
    with pytest.raises(
        UserError, match=r"tiny-4/bf16-0-1 was run with another learning_rate. HINT"
    ):
        compare.main(small)
    (tmp_path / "other.json").write_text(json.dumps(TINY | {"learning_rate": 1e-4}))
    compare.main([*small[:2], "other.json", *small[3:]])
    compare.main([*small[:2], "other.json", *small[3:], "--steps", "3"])
    folders = {path.name for path in tmp_path.glob("out/compare/*")}
    assert folders == {"tiny-4", "other-4", "other-3"}


def test_a_run_without_its_checkpoints_is_named(small, monkeypatch):
    monkeypatch.setitem(compare.EXPERIMENTS["toy"], "keep", False)
    compare.main(small)
    monkeypatch.setitem(compare.EXPERIMENTS["toy"], "keep", True)
    with pytest.raises(UserError, match=r"run without --keep. HINT: delete it"):
        compare.main(small)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["added_mean", "--steps", "0"], "--steps: 0"),
        (["added_mean", "--steps", "x"], "--steps"),
        (["natural", "--seeds", "-1"], "--seeds: -1"),
        (["natural", "--seeds", "0"], "--seeds: 0"),
        (["dial"], "'dial' is not one of added_mean, ablations, natural"),
        (["none.json"], "none.json"),
        ([str(RESULTS / "natural.json"), "--seeds", "2"], "no other argument"),
        ([str(RESULTS / "nano.json")], "is not what --json wrote"),
    ],
    ids=str,
)
def test_what_cannot_run_is_said_and_prints_no_table(argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "call", lambda *_: pytest.fail("it runs"))
    with pytest.raises(UserError, match=named):
        compare.main(argv)
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_real_subprocess_trains_and_its_error_is_one_line(small, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train", SUBPROCESS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    compare.main(small)
    assert "| `bf16` | 0 | " in capsys.readouterr().out
    Path("odd.json").write_text(json.dumps(TINY | {"grad_accum": 3}))
    with pytest.raises(UserError) as error:
        compare.main([*small[:2], "odd.json"])
    assert str(error.value).startswith("train.py failed: batch_size 4 does not split into 1 ")
    assert "\n" not in str(error.value)


def test_ctrl_c_saves_and_is_one_line(small):
    experiment = {"seeds": 1, "steps": 10**6, "base": "fp4", "settings": []}
    code = f"from experiments import compare; compare.EXPERIMENTS['toy'] = {experiment}; "
    code += f"compare.script(lambda: compare.main({small}))"
    env = {**os.environ, "PYTHONPATH": str(compare.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-c", code]
    process = subprocess.Popen(argv, env=env, stderr=-1, text=True, start_new_session=True)
    out = Path("out", "compare", "tiny-1000000", "bf16-0-1")
    while not read_metrics(out) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # to both processes, as a terminal does
    _, error = process.communicate(timeout=60)
    assert error == f"error: {out} was interrupted. HINT: the same command goes on with it\n"
    assert process.returncode == 1
    saved = read_checkpoint(out / "checkpoint.pt")["step"]
    assert saved == sum("loss" in m for m in read_metrics(out)) > 0


def record(precision, added_mean, seed, loss, **more):
    run = {"precision": precision, "added_mean": added_mean, "seed": seed, **more}
    return run | {"val": [[0, 9.0], [5, loss]], "mean_share": [[0, 0.9], [5, 0.5]]}


def test_summary():
    rows = summary([
        record("bf16", 0.0, 1, 2.0), record("fp4", 4.0, 1, 2.5), record("fp4_mean", 4.0, 1, 2.2),
        record("bf16", 0.0, 2, 3.0), record("fp4", 4.0, 2, 3.3), record("fp4_mean", 4.0, 2, 3.1),
        record("fp4", 4.0, 3, 9.0), record("fp4_mean", 0.0, 1, 2.1, bf16_blocks=2),
        record("fp4", 0.0, 1, 2.3),
    ], "fp4")  # fmt: skip
    bf16, plain, mean, blocks, _ = rows
    assert [r["seeds"] for r in rows] == [2, 3, 2, 1, 1] and bf16["gap"] == 0
    assert plain["gap"] == pytest.approx(0.4) and plain["gap_error"] == pytest.approx(0.1)
    assert plain["loss"] == pytest.approx(14.8 / 3) and plain["to_base"] == 0
    assert mean["percent"] == pytest.approx(100 * 0.15 / 2.5)
    assert mean["percent_error"] == pytest.approx(100 * 0.05 / 2.5)
    assert mean["to_base"] == pytest.approx(-0.25) and mean["share"] == 0.5
    assert mean["to_base_error"] == pytest.approx(np.std([0.3, 0.2], ddof=1) / math.sqrt(2))
    assert blocks["label"] == "fp4_mean, 2 blocks in bf16"
    assert blocks["to_base"] == pytest.approx(2.1 - 2.3) and math.isnan(blocks["to_base_error"])
    printed = compare.table(rows, "fp4").splitlines()
    assert "| +6.00 ± 2.00 | -0.2500 ± 0.0500 |" in printed[4] and "nan" not in "".join(printed)


@pytest.mark.parametrize("name", ["added_mean", "natural", "ablations", "train_on"])
def test_committed_results_are_those_of_the_listed_settings(name, capsys):
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    experiment = compare.EXPERIMENTS[name]
    assert (stored["steps"], stored["base"]) == (experiment["steps"], experiment["base"])
    made = list(compare.runs(name, stored["preset"], experiment["seeds"], stored["steps"]))
    settings = [{k: knobs[k] for k in compare.SETTING if k in knobs} for knobs in made]
    assert settings == [{k: r[k] for k in compare.SETTING if k in r} for r in stored["runs"]]
    assert len({knobs["out_dir"] for knobs in made}) == len(made)
    assert all(knobs["precision"] in RECIPES for knobs in made)
    compare.main([str(RESULTS / f"{name}.json")])
    preset = experiment.get("preset", "micro")
    line = f"\n{preset}, {stored['steps']} steps, {experiment['seeds']} seed"
    assert stored["preset"] == preset and line in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["[]", '{"base": "fp4"}', '{"base": "fp4", "runs": []}', '{"base": "fp4", "runs": [{}]}', "x"],
)
def test_a_json_of_another_kind_is_one_line(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not what --json wrote"):
        compare.main([str(tmp_path / "x.json")])
