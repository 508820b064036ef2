"""How much of the authors' gain is the mean's, and how much their branch's?

    python -m experiments.authors smollm2      SmolLM2, as it is and trained on
    python -m experiments.authors nano         from scratch
    python -m experiments.authors experiments/results/authors.json      the tables again

Code that is inferred to be that of arXiv 2603.10444's authors (experiments/recipes.py says where)
compares a vanilla run with one that subtracts the mean and, besides, splits each W by an SVD. Here
the two are apart: fp4_authors and fp4_authors_mean, each without and with a LowRankBranch of rank
16. A run is out/authors/PRESET-PRECISION-BRANCH-SEED.json. What is finished is not run again.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch

import fp4
from experiments.compare import markdown
from experiments.loop import evaluate, generator_for, once, settings, train
from experiments.recipes import add_branches
from model import GPT

OUT = Path("out/authors")
CHANGES = {"smollm2": {"eval_windows": 32}, "nano": {"vocab_size": 4096}}
PRECISIONS = "fp4_authors", "fp4_authors_mean"
SETTINGS = [("bf16", False), *itertools.product(PRECISIONS, (False, True))]


def run(preset, precision, branch, seed, **changes):
    """Train once: [[step, validation loss], ...] before it, halfway, and after it."""
    config = settings(preset, precision=precision, seed=seed, **CHANGES[preset] | changes)
    if preset == "smollm2":
        model = GPT.load("out/smollm2", precision=precision)
    else:
        model = GPT(config, generator_for(config, "init"))
    if branch:
        add_branches(model)
    moments = range(0, config.max_steps + 1, config.max_steps // 2)
    steps = (step for step in train(model, config) if step in moments)
    return [[step, round(evaluate(model, config), 5)] for step in steps]


def finish(preset, precision, branch, seed):
    """The record of a run, which is trained if it was not yet."""
    path = OUT / f"{preset}-{precision}-{branch}-{seed}.json"
    setting = {"preset": preset, "precision": precision, "branch": branch, "seed": seed}
    record = once(path, lambda: setting | {"val": run(**setting)})
    print(f"{path}: val loss {record['val'][-1][1]:.4f}", flush=True)
    return record


def table(records, preset):
    """Losses minus those of bf16 with the same seed, means over seeds."""
    runs = {}
    for r in records:
        if r["preset"] == preset:
            runs.setdefault((r["precision"], r["branch"]), {})[r["seed"]] = dict(r["val"])
    bf16 = runs.pop(("bf16", False))
    steps = list(bf16[1])
    losses = (f"{statistics.mean(val[step] for val in bf16.values()):.3f}" for step in steps)
    lines = [("`bf16`", "", *losses)]
    for (precision, branch), seeds in runs.items():
        gaps = ([val[step] - bf16[seed][step] for seed, val in seeds.items()] for step in steps)
        cells = (f"{statistics.mean(gap):+.3f}" for gap in gaps)
        lines.append((f"`{precision}`", "yes" if branch else "", *cells))
    return markdown(("precision", "branch", *(f"step {step}" for step in steps)), lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="smollm2, nano, or a .json file to print the tables of")
    parser.add_argument("--seeds", type=int, default=1, help="(1)")
    parser.add_argument("--json", type=Path, help="add the numbers to this file")
    args = parser.parse_args(argv)
    if args.preset.endswith(".json"):
        records = json.loads(Path(args.preset).read_text())
        for preset in dict.fromkeys(r["preset"] for r in records):
            print(f"\n{preset}, minus bf16's loss\n\n{table(records, preset)}")
        return
    print(fp4.use_fast_path(torch.device("cpu")), flush=True)
    seeds = range(1, args.seeds + 1)
    records = [finish(args.preset, *setting, seed) for seed in seeds for setting in SETTINGS]
    if args.json:
        old = json.loads(args.json.read_text()) if args.json.exists() else []
        kept = [r for r in old if r["preset"] != args.preset] + records
        args.json.write_text("[\n" + ",\n".join(json.dumps(r) for r in kept) + "\n]\n")
    print(f"\n{table(records, args.preset)}")


if __name__ == "__main__":
    main()
