"""Compare precisions: train each with the same weights and batches, over seeds and settings.

    python -m experiments.compare added_mean   a mean of 0, 4 and 8 RMS that only the rounding sees
    python -m experiments.compare ablations    fp4_mean with one choice changed, at 0 and 4 RMS
    python -m experiments.compare natural      a longer run, with the mean that training makes
    python -m experiments.compare train_on     a real model, SmolLM2, and its own mean
    python -m experiments.compare directions   the same, with more directions than the mean's
    python -m experiments.compare novels       the same with 16,384 tokens a step, on a GPU
    python -m experiments.compare rates        train_on in bf16, at other learning rates
    python -m experiments.compare experiments/results/natural.json     a table again, no training

A run is a folder of train.py's, out/compare/PRESET-STEPS/PRECISION-ADDED_MEAN-SEED. What is
finished is not run again, and what was interrupted goes on. The table is printed; --json keeps the
numbers, and experiments.figures draws them.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

OUT = Path("out")
PLAYS = OUT / "plays-bytes"  # the plays in bytes: the dataset where an experiment names no preset


def grid(precisions, added_means=(0.0,), **more):
    """A setting for each pair; more: other fields of train.py's config."""
    return [{"precision": p, "added_mean": a, **more} for a in added_means for p in precisions]


FP4 = ["fp4", "fp4_mean", "fp4_mean_paper", "fp4_hadamard", "fp4_svd"]
ON = ["fp4_hadamard", "fp4_project", "fp4_mean_1d", "fp4_project_1d"]
FOUR_OVER_SIX = ["fp4_project_1d_46", "fp4_project32_1d_46"]
MORE = ["fp4_project4_1d", "fp4_project16_1d", "fp4_project32_1d"]
PATHS = ["row_bf16", "row_fp4", "row_fp4_sr", "row_weight", "cross", "x"]  # of the mean
ROUNDING = ["x", "headroom", "sr", "1d"]
EXPERIMENTS = {
    # base: to what differences are taken; preset: else micro on bytes of the plays; flags: more of
    # train.py's; settings: beside bf16, which all have; once: those for the first seed alone
    "added_mean": {
        "seeds": 3, "steps": 300, "base": "fp4", "settings": grid(FP4, [0.0, 4.0, 8.0]),
    },
    "ablations": {
        "seeds": 3, "steps": 300, "base": "fp4_mean",
        "settings": grid(["fp4_mean"], [0.0, 4.0])
        + grid([f"fp4_mean_{name}" for name in ROUNDING])
        + grid(["fp4_mean"], bf16_blocks=1)
        + grid([f"fp4_mean_{name}" for name in PATHS] + ["fp4_mean_paper"], [4.0]),
    },
    "natural": {
        "seeds": 1, "steps": 2000, "base": "fp4", "flags": {"keep": True},
        "settings": grid(["fp4", "fp4_mean"]),
    },
    "train_on": {
        "seeds": 3, "steps": 60, "base": "fp4", "preset": "smollm2", "flags": {"eval_windows": 32},
        "settings": grid(["fp4", "fp4_mean", *ON]),
        "once": grid(["fp4_mean_paper", "fp4_svd"]),
    },
    "directions": {
        "seeds": 3, "steps": 60, "base": "fp4", "preset": "smollm2",
        "flags": {"eval_windows": 32, "eval_interval": 30},
        "settings": grid(["fp4", "fp4_mean", "fp4_lowrank"]),
        "once": grid(["fp4_1d", "fp4_project_1d", *MORE, *FOUR_OVER_SIX]),
    },
    "novels": {
        "seeds": 1, "steps": 200, "base": "fp4", "preset": "smollm2",
        "flags": {
            "dataset": "text-smollm2", "batch_size": 32, "grad_accum": 2, "learning_rate": 2e-4,
            "warmup_steps": 15, "eval_windows": 64,
        },
        "settings": grid(["fp4", "fp4_mean", "fp4_project_1d"]),
    },
    "rates": {
        "seeds": 1, "steps": 60, "base": "bf16", "preset": "smollm2", "flags": {"eval_windows": 32},
        "settings": grid(["bf16"], learning_rate=3e-5) + grid(["bf16"], learning_rate=3e-4),
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Runs.


def call(*argv):
    """Run a script of ours, which says itself what is wrong."""
    if subprocess.run([sys.executable, *argv], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"error: {' '.join(argv)} failed")


def runs(name, preset, seeds, steps):
    """The runs of an experiment, seed by seed, bf16 first, to which no mean is added: a setting
    with its seed, and the fields of train.py's config that make the run."""
    experiment = EXPERIMENTS[name]
    folder = OUT / "compare" / f"{Path(preset).stem}-{steps}"
    common = {"max_steps": steps, "eval_interval": max(1, min(steps // 5, 200))}
    common |= experiment.get("flags", {})
    if "preset" not in experiment:
        common["dataset"] = str(PLAYS)
    for seed in range(1, seeds + 1):
        once = experiment.get("once", []) if seed == 1 else []
        for setting in [*grid(["bf16"]), *experiment["settings"], *once]:
            parts = [f"{v:g}" if isinstance(v, float) else str(v) for v in setting.values()]
            setting = {**setting, "seed": seed}
            fields = common | setting | {"out_dir": str(folder / "-".join([*parts, str(seed)]))}
            if rms := fields.pop("added_mean"):
                fields["precision"] += f"_plus{rms:g}"
            yield setting, fields


def evaluations(out):
    """The records of metrics.jsonl that evaluate; a line that a kill has torn has no end."""
    path = Path(out, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if "val_loss" in line and line.endswith("}")]


def finish(preset, setting, fields):
    """Train, or go on, or do nothing if this run is finished; returns its record. SystemExit if its
    folder holds another run.

    train.py logs the mean's share s of a layer's own input, before a mean of B RMS is added. That
    mean is independent of the layer's, so with it the share is (s + B²) / (1 + B²) on average."""
    out, steps = fields["out_dir"], fields["max_steps"]
    path = Path(out, "config.json")
    if path.exists():
        then = json.loads(path.read_text())
        if changed := [k for k, v in fields.items() if then[k] != v]:
            raise SystemExit(
                f"error: {out} was run with another {', '.join(changed)}. HINT: delete it"
            )
    records = evaluations(out)
    if not records or records[-1]["step"] < steps:
        start = ["--resume"] if Path(out, "checkpoint.pt").exists() else ["--preset", preset]
        flags = {f"--{k.replace('_', '-')}": v for k, v in fields.items()}
        call("train.py", *start, *(k if v is True else f"{k}={v}" for k, v in flags.items()))
        records = evaluations(out)
    if not records or records[-1]["step"] < steps:
        raise SystemExit(f"error: {out} was interrupted. HINT: the same command goes on with it")
    energy = setting["added_mean"] ** 2
    shares = [(m["step"], (m["mean_share"] + energy) / (1 + energy)) for m in records]
    return setting | {
        "val": [[m["step"], round(m["val_loss"], 5)] for m in records],
        "mean_share": [[step, round(share, 4)] for step, share in shares],
    }


def run_all(name, preset, seeds, steps):
    """All that counts of an experiment's runs, as --json keeps it."""
    if "preset" not in EXPERIMENTS[name] and not (PLAYS / "meta.json").exists():
        call("-m", "data.shakespeare.prepare", "--tokenizer", "bytes", "--out", str(PLAYS))
    records = []
    for setting, fields in runs(name, preset, seeds, steps):
        records.append(finish(preset, setting, fields))
        print(f"{fields['out_dir']}: val loss {records[-1]['val'][-1][1]:.4f}", flush=True)
    return {"preset": preset, "steps": steps, "base": EXPERIMENTS[name]["base"], "runs": records}


# ------------------------------------------------------------------------------------------------
# What they add up to.


def label(record):
    """The name of a setting in tables and figures, but for the added mean."""
    text = record["precision"]
    if blocks := record.get("bf16_blocks"):
        text += f", {blocks} block{'s' * (blocks > 1)} in bf16"
    if rate := record.get("learning_rate"):
        text += f", learning rate {rate:g}"
    return text


def summary(records, base):
    """A row for each label and added mean: over seeds the mean loss, its gap to bf16, and its
    difference to the label `base` at the same added mean. Gap and difference are paired by seed;
    errors are standard errors, NaN for one seed."""
    final, share = {}, {}
    for r in records:
        key = label(r), r["added_mean"]
        final.setdefault(key, {})[r["seed"]] = r["val"][-1][1]
        share.setdefault(key, []).append(r["mean_share"][-1][1])

    def paired(key, other):
        others = final.get(other, {})
        differences = [loss - others[seed] for seed, loss in final[key].items() if seed in others]
        n = len(differences)
        mean = statistics.mean(differences) if n else math.nan
        error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
        return mean, error

    rows = []
    for key, losses in final.items():
        loss = statistics.mean(losses.values())
        gap, gap_error = paired(key, ("bf16", 0.0))
        to_base, to_base_error = paired(key, (base, key[1]))
        rows.append({
            "label": key[0], "added_mean": key[1], "seeds": len(losses), "loss": loss,
            "share": statistics.mean(share[key]), "gap": gap, "gap_error": gap_error,
            "percent": 100 * gap / (loss - gap), "percent_error": 100 * gap_error / (loss - gap),
            "to_base": to_base, "to_base_error": to_base_error,
        })  # fmt: skip
    return rows


def markdown(columns, rows):
    """A table of strings."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows, base):
    """The rows of `summary` in Markdown."""
    columns = "precision", "added mean, RMS", "share of the mean", "val loss", "gap to bf16, %"
    lines = []
    for r in rows:
        name = r["label"]
        if r["seeds"] < rows[0]["seeds"]:
            name += f", {r['seeds']} seed"
        percent = f"{r['percent']:+.2f} ± {r['percent_error']:.2f}".replace(" ± nan", "")
        to_base = f"{r['to_base']:+.4f} ± {r['to_base_error']:.4f}".replace(" ± nan", "")
        if r["label"] in ("bf16", base):
            to_base = ""
        numbers = f"{r['added_mean']:g}", f"{r['share']:.3f}", f"{r['loss']:.4f}"
        lines.append((f"`{name}`", *numbers, percent, to_base))
    return markdown((*columns, f"minus {base}"), lines)


def show(stored):
    """Print the table of an experiment's results."""
    rows = summary(stored["runs"], stored["base"])
    seeds = f"{rows[0]['seeds']} seed{'s' * (rows[0]['seeds'] > 1)}"
    print(f"\n{Path(stored['preset']).stem}, {stored['steps']} steps, {seeds}\n")
    print(table(rows, stored["base"]))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("experiment", help=f"{names}, or a .json file to print the table of")
    parser.add_argument("--preset", help="of train.py (micro, or smollm2)")
    parser.add_argument("--seeds", type=int, help="(3; natural, novels and rates 1)")
    parser.add_argument("--steps", type=int, help="(300; natural 2000, novels 200, of SmolLM2 60)")
    parser.add_argument("--json", type=Path, help="keep the numbers there")
    args = parser.parse_args(argv)
    if args.experiment.endswith(".json"):
        show(json.loads(Path(args.experiment).read_text()))
        return
    if args.experiment not in EXPERIMENTS:
        parser.error(f"{args.experiment!r} is not one of {names}, and no .json file")
    default = EXPERIMENTS[args.experiment]
    preset = args.preset or default.get("preset", "micro")
    seeds, steps = args.seeds or default["seeds"], args.steps or default["steps"]
    stored = run_all(args.experiment, preset, seeds, steps)
    if args.json:
        head = json.dumps({k: v for k, v in stored.items() if k != "runs"})
        lines = ",\n ".join(json.dumps(run) for run in stored["runs"])  # a run a line
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(f'{head[:-1]}, "runs": [\n {lines}\n]}}\n')
    show(stored)


if __name__ == "__main__":
    main()
