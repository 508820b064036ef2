"""Compare precisions: train each with the same weights and batches, over seeds and settings.

python compare.py dial            a mean bias, turned from 0 to 8, that only the quantizer sees
python compare.py ablations       fp4_mean with one choice changed, without the dial and at 4
python compare.py natural         no dial, a longer run: the bias that training itself makes
python compare.py dial --draw     the table and the figure again, from results/dial.json

A run is a folder of train.py's under out/compare; what is finished is not run again, and what was
interrupted goes on. results/NAME.json keeps all that counts; table and figure are drawn from it.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import train

ROOT = Path(__file__).parent
DATA = ROOT / "out" / "plays-bytes"


def grid(precisions, dials, **more):
    return [{"precision": p, "mean_bias": b, **more} for b in dials for p in precisions]


FP4 = ["fp4", "fp4_mean", "fp4_mean_paper", "fp4_hadamard", "fp4_svd"]
PATHS = ["row_bf16", "row_fp4", "row_fp4_sr", "row_weight", "cross", "x"]  # of the mean
ROUNDING = ["x", "headroom", "sr", "1d"]
EXPERIMENTS = {  # base: to what differences are taken; keep: the checkpoints, for analyze.py
    "dial": {"seeds": 3, "steps": 300, "base": "fp4", "settings": grid(FP4, [0.0, 4.0, 8.0])},
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
}  # fmt: skip
SETTING = "precision", "mean_bias", "bf16_blocks", "seed"  # what a record keeps of a run's knobs
STYLES = {  # of what is drawn: curves that coincide stay visible
    "bf16": {"marker": "x", "color": "k"},
    "fp4": {"marker": "o", "color": "C0"},
    "fp4_mean": {"marker": "s", "color": "C1"},
    "fp4_mean_paper": {"marker": "^", "color": "C2"},
    "fp4_hadamard": {"marker": "D", "color": "C3", "ls": "--"},
    "fp4_svd": {"marker": "v", "color": "C4", "ls": "--"},
}


def label(run):
    blocks = run.get("bf16_blocks")
    return run["precision"] + (f", {blocks} block{'s' * (blocks > 1)} in bf16" if blocks else "")


def runs(name, preset, seeds, steps):
    """The knobs of an experiment's runs: seed by seed, bf16 first, which has no dial."""
    experiment = EXPERIMENTS[name]
    folder = ROOT / "out" / "compare" / f"{Path(preset).stem}-{steps}"
    common = {"max_steps": steps, "eval_interval": max(1, min(steps // 5, 200))}
    common |= {"dataset": str(DATA), "keep": experiment.get("keep", False)}
    for seed in range(1, seeds + 1):
        for setting in [*grid(["bf16"], [0.0]), *experiment["settings"]]:
            out = folder / "-".join(
                f"{v:g}" if isinstance(v, float) else str(v) for v in setting.values()
            )
            yield {**setting, "seed": seed, "out_dir": f"{out}-{seed}", **common}


def finish(preset, knobs):
    """Train, or go on, or do nothing if this run is finished; returns its record."""
    out = Path(knobs["out_dir"])
    record = out / "record.json"
    if not record.exists():
        flags = [
            f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k.replace('_', '-')}={v}"
            for k, v in knobs.items()
        ]
        start = ["--resume"] if (out / "checkpoint.pt").exists() else ["--preset", preset]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*start, *flags])
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        if metrics[-1]["step"] < knobs["max_steps"]:
            sys.exit(f"{out} was interrupted. HINT: the same command goes on with it")
        seconds = [m["seconds"] for m in metrics if "seconds" in m]
        config = json.loads((out / "config.json").read_text())
        tokens = config["batch_size"] * config["block_size"]
        evaluated = [m for m in metrics if "val_loss" in m]
        result = {k: knobs[k] for k in SETTING if k in knobs} | {
            "val": [[m["step"], round(m["val_loss"], 5)] for m in evaluated],
            "mean_share": [[m["step"], round(m["mean_share"], 4)] for m in evaluated],
            "tokens_per_second": round(tokens / statistics.median(seconds)),
        }
        record.write_text(json.dumps(result))
    if knobs["keep"] and not (out / "step-0.pt").exists():
        raise train.RunError(f"{out} was run without --keep. HINT: delete it")
    return json.loads(record.read_text())


def summary(records, base):
    """A row for each precision and setting, means over seeds: loss, gap to bf16 and difference to
    the base at the same dial, both paired by seed, with standard errors; speed relative to bf16."""
    final, share, speed = {}, {}, {}
    for r in records:
        key = label(r), r["mean_bias"]
        final.setdefault(key, {})[r["seed"]] = r["val"][-1][1]
        share.setdefault(key, []).append(r["mean_share"][-1][1])
        speed.setdefault(key, []).append(r["tokens_per_second"])

    def paired(key, other):
        d = [loss - final[other][s] for s, loss in final[key].items() if s in final.get(other, {})]
        error = statistics.stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.nan
        return statistics.mean(d) if d else math.nan, error

    rows = []
    for key, losses in final.items():
        loss = statistics.mean(losses.values())
        gap, gap_error = paired(key, ("bf16", 0.0))
        gain, gain_error = paired(key, (base, key[1]))
        rows.append({
            "label": key[0], "mean_bias": key[1], "seeds": len(losses), "loss": loss,
            "share": statistics.mean(share[key]), "gap": gap, "gap_error": gap_error,
            "percent": 100 * gap / (loss - gap), "percent_error": 100 * gap_error / (loss - gap),
            "to_base": gain, "to_base_error": gain_error,
            "speed": statistics.median(speed[key]) / statistics.median(speed["bf16", 0.0]),
        })  # fmt: skip
    return rows


def table(rows, base):
    columns = "precision", "dial", "share of mean", "val loss", "gap to bf16, %"
    lines = [(*columns, f"minus {base}", "tokens/s, of bf16's"), ("---",) * 7]
    for r in rows:
        to_base = f"{r['to_base']:+.4f} ± {r['to_base_error']:.4f}".replace(" ± nan", "")
        lines.append((
            f"`{r['label']}`", f"{r['mean_bias']:g}", f"{r['share']:.3f}", f"{r['loss']:.4f}",
            f"{r['percent']:+.2f} ± {r['percent_error']:.2f}".replace(" ± nan", ""),
            "" if r["label"] in ("bf16", base) else to_base, f"{r['speed']:.2f}",
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def over_steps(records, key, dial):
    """{label: (steps, means over seeds)} of a curve at this dial; bf16's at 0."""
    curves = {}
    for r in records:
        if r["mean_bias"] == dial or r["precision"] == "bf16":
            curves.setdefault(label(r), []).append([value for _, value in r[key]])
            steps = [step for step, _ in r[key]]
    return {
        k: (steps, [statistics.mean(v) for v in zip(*c, strict=True)]) for k, c in curves.items()
    }


def draw_gap(axes, records, dial):
    """Validation loss minus bf16's over training."""
    curves = over_steps(records, "val", dial)
    steps, bf16 = curves.pop("bf16")
    for name, (_, loss) in curves.items():
        axes.plot(
            steps[1:],
            [a - b for a, b in zip(loss, bf16, strict=True)][1:],
            **STYLES.get(name, {}),
            ms=4,
            label=name,
        )
    axes.set(title=f"over training, dial at {dial:g}", xlabel="step")
    axes.set(ylabel="validation loss minus bf16's (nats)")


def draw_dial(left, right, records, rows):
    for name in dict.fromkeys(r["label"] for r in rows if r["label"] != "bf16"):
        mine = [(r["share"], r["gap"], r["gap_error"]) for r in rows if r["label"] == name]
        left.errorbar(*zip(*mine, strict=True), **STYLES.get(name, {}), ms=5, capsize=2, label=name)
    left.set_xscale("logit")
    ticks = [0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99]
    left.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    left.set_xticks([], minor=True)
    left.set(title="at the end", xlabel="share of the mean in the energy, ||μ||² / E||x||²")
    left.set(ylabel="validation loss minus bf16's (nats)")
    draw_gap(right, records, max(r["mean_bias"] for r in rows))


def draw_natural(left, middle, right, records, rows):
    for name, (steps, loss) in over_steps(records, "val", 0.0).items():
        left.plot(steps[1:], loss[1:], **STYLES.get(name, {}), ms=4, label=name)
    left.set(title="validation loss (nats)", xlabel="step")
    draw_gap(middle, records, 0.0)
    for name, (steps, share) in over_steps(records, "mean_share", 0.0).items():
        right.plot(steps, share, **STYLES.get(name, {}), ms=4, label=name)
    right.set(title="the mean's share, all linears", xlabel="step", ylabel="||μ||² / E||x||²")


def draw_ablations(left, right, records, rows):
    for axes, dial in ((left, 0.0), (right, 4.0)):
        mine = [
            r for r in rows if r["mean_bias"] == dial and r["label"] not in ("bf16", "fp4_mean")
        ]
        values, errors = ([r[k] for r in mine] for k in ("to_base", "to_base_error"))
        axes.errorbar(values, range(len(mine)), xerr=errors, fmt="o", capsize=3)
        axes.set_yticks(range(len(mine)), [r["label"] for r in mine])
        axes.invert_yaxis()
        axes.axvline(0, color="k", lw=0.6)
        axes.set(title=f"dial at {dial:g}", xlabel="validation loss minus fp4_mean's (nats)")


def draw(name, stored, rows):
    """assets/NAME.png, with standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    how = {"natural": draw_natural, "ablations": draw_ablations}.get(name, draw_dial)
    count = 3 if how is draw_natural else 2
    figure, panels = plt.subplots(1, count, figsize=(11, 4.2), layout="constrained")
    how(*panels, stored["runs"], rows)
    if how is not draw_ablations:
        for axes in panels[-2:]:
            axes.axhline(0, color="k", lw=0.6)
        panels[0].legend(frameon=False)
    seeds = f"{rows[0]['seeds']} seed{'s' * (rows[0]['seeds'] > 1)}"
    figure.suptitle(f"{Path(stored['preset']).stem}, {stored['steps']} steps, {seeds}")
    path = ROOT / "assets" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compact(stored):
    """JSON with a run a line."""
    head = {k: v for k, v in stored.items() if k != "runs"}
    lines = ",\n ".join(json.dumps(run) for run in stored["runs"])
    return json.dumps(head)[:-1] + f', "runs": [\n {lines}\n]}}\n'


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--preset", default="micro", help="of train.py (micro)")
    parser.add_argument("--seeds", type=int, help="(3; natural 1)")
    parser.add_argument("--steps", type=int, help="(300; natural 2000)")
    parser.add_argument(
        "--draw", action="store_true", help="from the committed results; no training"
    )
    args = parser.parse_args(argv)
    results = ROOT / "results" / f"{args.experiment}.json"
    if not args.draw:
        if not (DATA / "meta.json").exists():
            script = ROOT / "data" / "shakespeare" / "prepare.py"
            flags = ["--tokenizer", "bytes", "--out", DATA]
            subprocess.run([sys.executable, script, *flags], check=True)
        experiment = EXPERIMENTS[args.experiment]
        stored = {
            "preset": args.preset, "steps": args.steps or experiment["steps"],
            "base": experiment["base"], "runs": [],
        }  # fmt: skip
        results.parent.mkdir(exist_ok=True)
        seeds = args.seeds or experiment["seeds"]
        for knobs in runs(args.experiment, args.preset, seeds, stored["steps"]):
            r = finish(args.preset, knobs)
            print(
                f"{label(r):24} dial {r['mean_bias']:g}  seed {r['seed']}  "
                f"share {r['mean_share'][-1][1]:.3f}  val loss {r['val'][-1][1]:.4f}",
                flush=True,
            )
            stored["runs"].append(r)
            results.write_text(compact(stored))
    if not results.exists():
        raise train.RunError(f"no {results}. HINT: python compare.py {args.experiment}")
    stored = json.loads(results.read_text())
    rows = summary(stored["runs"], stored["base"])
    print(table(rows, stored["base"]))
    draw(args.experiment, stored, rows)


if __name__ == "__main__":
    try:
        main()
    except (train.RunError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
