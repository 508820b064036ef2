"""figures.py on the committed results, and on metrics made up."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from cli import UserError
from experiments import figures

COMMITTED = {path.name for path in (figures.HERE / "assets").iterdir()}


def test_every_committed_figure_is_drawn_from_a_folder_in_a_notebook_too(tmp_path):
    for path in (figures.HERE / "results").glob("*.json"):
        shutil.copy(path, tmp_path)
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    argv = [sys.executable, figures.__file__, tmp_path]
    subprocess.run(argv, env=env, check=True)
    drawn = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(drawn) == COMMITTED and min(drawn.values()) > 10_000


def fake_run(folder, precision, losses, val_losses):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"precision": precision}))
    records = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    records[5:5] = [{"step": 10 * i, "val_loss": v} for i, v in enumerate(val_losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"st')
    return str(folder)


def test_curves_of_runs(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr(figures, "HERE", tmp_path)
    runs = [
        fake_run(tmp_path / "a", "bf16", range(25), [9.00004, 8]),
        fake_run(tmp_path / "b", "fp4", [2.0] * 30, [9, 8.5, 8]),
    ]
    figures.main(["--nano", *runs])
    assert json.loads((tmp_path / "results" / "nano.json").read_text()) == {
        "bf16": {"train": [[5, 4.5], [15, 14.5]], "val": [[0, 9.0], [10, 8]]},
        "fp4": {"train": [[5, 2.0], [15, 2.0], [25, 2.0]], "val": [[0, 9], [10, 8.5], [20, 8]]},
    }
    assert (tmp_path / "assets" / "loss.png").stat().st_size > 10_000
    odd = fake_run(tmp_path / "c", "fp4_mean_sr", [2.0] * 10, [9])
    for argv, message in {
        (runs[1],): "takes runs of bf16",
        (runs[0], odd): "takes runs of bf16",
        (str(tmp_path),): "is no run of 10 steps",
    }.items():
        with pytest.raises(UserError, match=message):
            figures.main(["--nano", *argv])
    with pytest.raises(UserError, match="none of added_mean"):
        figures.main([str(tmp_path)])
