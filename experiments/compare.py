"""Compare precisions: train each with the same weights and batches, over seeds and settings.

    python experiments/compare.py added_mean    a mean of 0, 4 and 8 RMS that only the rounding sees
    python experiments/compare.py ablations     fp4_mean with one choice changed, at 0 and 4 RMS
    python experiments/compare.py natural       a longer run, with the mean that training makes
    python experiments/compare.py train_on      a real model, SmolLM2, and its own mean
    python experiments/compare.py novels        the same with 16,384 tokens a step, on a GPU
    python experiments/compare.py rates         train_on in bf16, at three learning rates
    python experiments/compare.py experiments/results/natural.json      a table again, no training

A run is a folder of train.py's, out/compare/PRESET-STEPS/PRECISION-ADDED_MEAN-SEED. What is
finished is not run again, and what was interrupted goes on. The table is printed; --json keeps the
numbers, and figures.py draws them.
"""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import read_metrics
from cli import Parser, UserError, number, script
from experiments.report import label, markdown, results, summary
from run import Config, parse, read_config

ROOT, OUT = Path(__file__).resolve().parents[1], Path("out")


def grid(precisions, added_means, **more):
    return [{"precision": p, "added_mean": a, **more} for a in added_means for p in precisions]


FP4 = ["fp4", "fp4_mean", "fp4_mean_paper", "fp4_hadamard", "fp4_svd"]
ON = ["fp4_hadamard", "fp4_project", "fp4_mean_1d", "fp4_project_1d"]
PATHS = ["row_bf16", "row_fp4", "row_fp4_sr", "row_weight", "cross", "x"]  # of the mean
ROUNDING = ["x", "headroom", "sr", "1d"]
EXPERIMENTS = {
    # base: to what differences are taken; keep: the checkpoints, for analyze.py; preset: else micro
    # on bytes of the plays; windows: of validation text, else the preset's;
    # once: settings for the first seed alone
    "added_mean": {"seeds": 3, "steps": 300, "base": "fp4", "settings": grid(FP4, [0.0, 4.0, 8.0])},
    "ablations": {
        "seeds": 3, "steps": 300, "base": "fp4_mean",
        "settings": grid(["fp4_mean"], [0.0, 4.0])
        + grid([f"fp4_mean_{name}" for name in ROUNDING], [0.0])
        + grid(["fp4_mean"], [0.0], bf16_blocks=1)
        + grid([f"fp4_mean_{name}" for name in PATHS] + ["fp4_mean_paper"], [4.0]),
    },
    "natural": {
        "seeds": 1, "steps": 2000, "base": "fp4", "keep": True,
        "settings": grid(["fp4", "fp4_mean"], [0.0]),
    },
    "train_on": {
        "seeds": 3, "steps": 60, "base": "fp4", "preset": "smollm2", "windows": 32,
        "settings": grid(["fp4", "fp4_mean", *ON], [0.0]),
        "once": grid(["fp4_mean_paper", "fp4_svd"], [0.0]),
    },
    "novels": {
        "seeds": 1, "steps": 200, "base": "fp4", "preset": "smollm2-16k",
        "settings": grid(["fp4", "fp4_mean", "fp4_project_1d"], [0.0]),
    },
    "rates": {
        "seeds": 1, "steps": 60, "base": "bf16", "preset": "smollm2", "windows": 32,
        "settings": grid(["bf16"], [0.0], learning_rate=3e-5)
        + grid(["bf16"], [0.0], learning_rate=3e-4),
    },
}  # fmt: skip
SETTING = "precision", "added_mean", "bf16_blocks", "learning_rate", "seed"  # of a run's knobs


def call(path, argv):
    """Run a script of ours; its error is ours. At Ctrl-C train.py saves and ends: wait for that."""
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        command = [sys.executable, ROOT / path, *argv]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"{path} failed: {lines[-1].removeprefix('error: ')}")


def train(argv):
    call("train.py", argv)


def runs(name, preset, seeds, steps):
    """The knobs of an experiment's runs: seed by seed, bf16 first, to which no mean is added."""
    experiment = EXPERIMENTS[name]
    folder = OUT / "compare" / f"{Path(preset).stem}-{steps}"
    common = {"max_steps": steps, "eval_interval": max(1, min(steps // 5, 200))}
    common |= {"keep": experiment.get("keep", False)}
    if "windows" in experiment:
        common["eval_windows"] = experiment["windows"]
    if "preset" not in experiment:
        common["dataset"] = str(OUT / "plays-bytes")
    for seed in range(1, seeds + 1):
        once = experiment.get("once", []) if seed == 1 else []
        for setting in [*grid(["bf16"], [0.0]), *experiment["settings"], *once]:
            out = folder / "-".join(
                f"{v:g}" if isinstance(v, float) else str(v) for v in setting.values()
            )
            yield {**setting, "seed": seed, "out_dir": f"{out}-{seed}", **common}


def check_same(out, config):
    """UserError if the folder `out` holds a run of another config: a preset of the same name."""
    then = Config(**read_config(out / "config.json"))
    config.vocab_size = config.vocab_size or then.vocab_size
    now, then = dataclasses.asdict(config), dataclasses.asdict(then)
    if changed := [k for k in now if now[k] != then[k] and k != "keep"]:
        raise UserError(f"{out} was run with another {', '.join(changed)}. HINT: delete it")


def finished(out, steps):
    """The evaluations of a run that has made all its steps, else []."""
    evaluations = [m for m in read_metrics(out) if "val_loss" in m]
    return evaluations if evaluations and evaluations[-1]["step"] == steps else []


def finish(preset, knobs):
    """Train, or go on, or do nothing if this run is finished; returns its record."""
    out, steps = Path(knobs["out_dir"]), knobs["max_steps"]
    flags = [
        f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k.replace('_', '-')}={v}"
        for k, v in knobs.items()
    ]
    config, _ = parse(__doc__, ["--preset", preset, *flags])
    if (out / "config.json").exists():
        check_same(out, config)
    evaluations = finished(out, steps)
    if not evaluations:
        start = ["--resume"] if (out / "checkpoint.pt").exists() else ["--preset", preset]
        train([*start, *flags])
        evaluations = finished(out, steps)
    if not evaluations:
        raise UserError(f"{out} was interrupted. HINT: the same command goes on with it")
    if knobs["keep"] and not (out / "step-0.pt").exists():
        raise UserError(f"{out} was run without --keep. HINT: delete it")
    return {k: knobs[k] for k in SETTING if k in knobs} | {
        "val": [[m["step"], round(m["val_loss"], 5)] for m in evaluations],
        "mean_share": [[m["step"], round(m["mean_share"], 4)] for m in evaluations],
    }


def table(rows, base):
    columns = "precision", "added mean, RMS", "share of the mean", "val loss", "gap to bf16, %"
    lines = []
    for r in rows:
        percent, to_base = (
            f"{r[k]:+.{digits}f} ± {r[f'{k}_error']:.{digits}f}".replace(" ± nan", "")
            for k, digits in (("percent", 2), ("to_base", 4))
        )
        name = r["label"] + f", {r['seeds']} seed" * (r["seeds"] < rows[0]["seeds"])
        lines.append((
            f"`{name}`", f"{r['added_mean']:g}", f"{r['share']:.3f}", f"{r['loss']:.4f}",
            percent, "" if r["label"] in ("bf16", base) else to_base,
        ))  # fmt: skip
    return markdown((*columns, f"minus {base}"), lines)


def compact(stored):
    """JSON with a run a line."""
    head = {k: v for k, v in stored.items() if k != "runs"}
    lines = ",\n ".join(json.dumps(run) for run in stored["runs"])
    return json.dumps(head)[:-1] + f', "runs": [\n {lines}\n]}}\n'


def run_all(name, preset, seeds, steps):
    """All that counts of an experiment's runs, as --json keeps it."""
    made = "preset" in EXPERIMENTS[name] or (OUT / "plays-bytes" / "meta.json").exists()
    if not made:
        call("data/shakespeare/prepare.py", ["--tokenizer", "bytes", "--out", OUT / "plays-bytes"])
    records = []
    for knobs in runs(name, preset, seeds, steps):
        r = finish(preset, knobs)
        print(
            f"{label(r):24} added mean {r['added_mean']:g}  seed {r['seed']}  "
            f"share {r['mean_share'][-1][1]:.3f}  val loss {r['val'][-1][1]:.4f}",
            flush=True,
        )
        records.append(r)
    return {"preset": preset, "steps": steps, "base": EXPERIMENTS[name]["base"], "runs": records}


def show(stored):
    """Print the table of an experiment's results."""
    rows = summary(stored["runs"], stored["base"])
    seeds = f"{rows[0]['seeds']} seed{'s' * (rows[0]['seeds'] > 1)}"
    print(f"\n{Path(stored['preset']).stem}, {stored['steps']} steps, {seeds}\n")
    print(table(rows, stored["base"]))


def main(argv=None):
    parser = Parser(__doc__)
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("experiment", help=f"{names}, or a .json file to print the table of")
    parser.add_argument("--preset", help="of train.py (micro, smollm2 or smollm2-16k)")
    parser.add_argument("--seeds", type=number(int), help="(3; natural, novels and rates 1)")
    parser.add_argument(
        "--steps", type=number(int), help="(300; natural 2000, novels 200, train_on 60)"
    )
    parser.add_argument("--json", type=Path, help="keep the numbers there")
    args = parser.parse_args(argv)
    if args.experiment in EXPERIMENTS:
        default = EXPERIMENTS[args.experiment]
        seeds, steps = args.seeds or default["seeds"], args.steps or default["steps"]
        preset = args.preset or default.get("preset", "micro")
        stored = run_all(args.experiment, preset, seeds, steps)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(compact(stored))
        show(stored)
    elif not args.experiment.endswith(".json"):
        raise UserError(f"{args.experiment!r} is not one of {names}, and no .json file")
    elif args != parser.parse_args([args.experiment]):
        raise UserError(f"{args.experiment} holds numbers: it takes no other argument")
    else:
        with results(args.experiment) as stored:
            show(stored)


if __name__ == "__main__":
    script(main)
