"""Draw all figures, from numbers alone.

    python -m experiments.figures           experiments/results/*.json -> experiments/assets/*.png
    python -m experiments.figures FOLDER    FOLDER/*.json, named like those -> FOLDER/*.png
    python -m experiments.figures --nano out/nano-bf16 out/nano-fp4 out/nano-fp4_mean
                                            first make nano.json, from the metrics of these runs

Errors are standard errors over seeds.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.compare import label, summary
from experiments.origin import KINDS, over_seeds
from fp4 import quantize

HERE = Path(__file__).resolve().parent
STYLES = {
    "bf16": {"color": "#222222", "marker": "x"},
    "fp4": {"color": "#c0392b", "marker": "o"},
    "fp4_mean": {"color": "#1f6fb4", "marker": "s"},
    "fp4_mean_paper": {"color": "#d98e04", "marker": "^"},
    "fp4_mean_1d": {"color": "#69a8dc", "marker": "P"},
    "fp4_project": {"color": "#8fce9f", "marker": "p"},
    "fp4_project_1d": {"color": "#2a8f5b", "marker": "D"},
    "fp4_svd": {"color": "#7d4fa3", "marker": "v"},
    "fp4_hadamard": {"color": "#888888", "marker": "<"},
}
BLUE, OCHRE = "#1f6fb4", "#d98e04"
SMOOTH = 10  # steps of a training loss in nano.json
CHANGES = {  # the ablations in plain words
    "fp4_mean_x": "X alone centered",
    "fp4_mean_headroom": "unbiased rounding (headroom)",
    "fp4_mean_sr": "X rounded stochastically",
    "fp4_mean_1d": "W in 1-D blocks",
    "fp4_mean, 1 block in bf16": "the last block in BF16",
    "fp4_mean_row_bf16": "means in BF16",
    "fp4_mean_row_fp4": "means rounded to FP4",
    "fp4_mean_row_fp4_sr": "the same, stochastically",
    "fp4_mean_row_weight": "means times the rounded W",
    "fp4_mean_cross": "wgrad's cross terms computed",
    "fp4_mean_paper": "the paper's equations",
}


def panels(width, height, columns=1, **kwargs):
    """A figure and its axes, a list of them if there is more than one."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, **kwargs)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_added_mean(stored):
    """The gap to bf16 against the strength of the mean."""
    named = {
        "fp4": ("vanilla NVFP4", 0),
        "fp4_mean": ("mean taken off, kept in FP32", 13),
        "fp4_mean_paper": ("mean taken off, then rounded", 0),
    }
    rows = summary(stored["runs"], stored["base"])
    figure, ax = panels(8, 4.4)
    for name, (text, up) in named.items():
        mine = [r for r in rows if r["label"] == name]
        x, y, error = ([r[k] for r in mine] for k in ("added_mean", "percent", "percent_error"))
        ax.errorbar(x, y, error, **STYLES[name], ms=6, capsize=3, lw=1.8)
        where = {"xytext": (10, up), "textcoords": "offset points", "va": "center"}
        ax.annotate(f"{name}\n{text}", (x[-1], y[-1]), **where, color=STYLES[name]["color"])
    ax.axhline(0, color="#222222", lw=0.8)
    ax.annotate("bf16", (x[-1], 0), (10, -8), textcoords="offset points", va="center")
    ticks = [f"{r['added_mean']:g}\n{r['share']:.0%}" for r in mine]
    ax.set_xticks(x, ticks)
    ax.set(xlim=(-0.3, x[-1] + 0.2), ylim=(-4, None), ylabel="validation loss above bf16, %")
    ax.set(xlabel="added mean, in RMS of the layer's input, and the mean's share of the energy")
    return figure


def draw_natural(stored):
    """Validation loss, its gap to bf16 and the mean's share, over a longer training."""
    figure, (left, middle, right) = panels(10, 3.6, 3)
    runs = {label(r): r for r in stored["runs"]}
    bf16 = dict(runs["bf16"]["val"])
    for name, r in runs.items():
        style = STYLES[name] | {"ms": 4, "lw": 1.4}
        steps, loss = np.array(r["val"][1:]).T
        left.plot(steps, loss, **style, label=name)
        if name != "bf16":
            middle.plot(steps, [100 * (v / bf16[s] - 1) for s, v in r["val"][1:]], **style)
        right.plot(*np.array(r["mean_share"]).T, **style)
    left.set(title="validation loss, nats a byte")
    left.legend(frameon=False)
    middle.axhline(0, color="#222222", lw=0.8)
    middle.set(title="gap to bf16, %")
    right.set(title="the mean's share of the energy", ylim=(0, None))
    figure.supxlabel("step", fontsize=10)
    return figure


def draw_train_on(stored):
    """Validation loss of a real model trained on, and its gap to bf16."""
    figure, (left, right) = panels(10, 3.8, 2)
    curves = {}  # {precision: {seed: {step: loss}}}
    for r in stored["runs"]:
        curves.setdefault(label(r), {})[r["seed"]] = dict(r["val"])
    for name, seeds in curves.items():
        style = STYLES[name] | {"ms": 4, "lw": 1.2}
        steps, losses = list(seeds[1]), np.array([list(run.values()) for run in seeds.values()])
        left.plot(steps, losses.mean(0), **style, label=name)
        if name != "bf16":
            gaps = losses - [list(curves["bf16"][seed].values()) for seed in seeds]
            error = gaps.std(0, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else None
            right.errorbar(steps, gaps.mean(0), error, **style, capsize=2)
    left.set(title="validation loss, nats a token")
    left.legend(frameon=False, ncols=2, fontsize=9)
    right.set(title="minus bf16's", ylim=(0, None))
    figure.supxlabel("step", fontsize=10)
    return figure


def draw_directions(stored):
    """Of SmolLM2, the gap to bf16 against the number of directions that are split off, as it is and
    trained on, and what they cost."""
    trained = {r["label"]: r["gap"] for r in summary(stored["runs"], stored["base"])}
    first = {label(r): r["val"][0][1] for r in stored["runs"]}
    as_is = {name: loss - first["bf16"] for name, loss in first.items()}
    names = {0: "fp4_1d", 1: "fp4_project_1d", 4: "fp4_project4_1d", 16: "fp4_project16_1d"}
    names |= {32: "fp4_project32_1d", 48: "fp4_lowrank"}
    four_six = {1: "fp4_project_1d_46", 4: "fp4_project32_1d_46"}
    figure, ax = panels(8, 4.2)
    for gaps, color, text in ((as_is, OCHRE, "as it is"), (trained, BLUE, "trained on")):
        values = [gaps[name] for name in names.values()]
        ax.plot(range(len(names)), values, "o-", color=color, lw=1.8, label=text)
        better = [gaps[name] for name in four_six.values()]
        ax.plot(list(four_six), better, "^", mfc="none", color=color, label="... four over six")
    where = {"textcoords": "offset points", "ha": "right", "fontsize": 8}
    for name in ("fp4", "fp4_mean"):
        ax.axhline(trained[name], color=STYLES[name]["color"], lw=0.8, ls=":")
        ax.annotate(f"{name}, trained on", (len(names) - 1, trained[name]), (0, 3), **where)
    costs = [f"{k}\n{k * (1 / 576 + 1 / 1536):.1%}" for k in names]
    ax.set_xticks(range(len(names)), costs)
    ax.set(ylim=(0, None), ylabel="validation loss minus bf16's, nats a token")
    ax.set(xlabel="directions, the mean's first; and their products' part of a GEMM of 576 by 1536")
    ax.legend(frameon=False)
    return figure


def draw_ablations(stored):
    """What one changed choice costs, without an added mean and with one."""
    rows = summary(stored["runs"], stored["base"])
    figure, axes = panels(10, 3.8, 2)
    for ax, added_mean in zip(axes, (0.0, 4.0), strict=True):
        mine = [r for r in rows if r["added_mean"] == added_mean and r["label"] in CHANGES]
        values, errors = ([r[k] for r in mine] for k in ("to_base", "to_base_error"))
        ax.errorbar(values, range(len(mine)), xerr=errors, fmt="o", color=BLUE, capsize=3)
        ax.set_yticks(range(len(mine)), [CHANGES[r["label"]] for r in mine])
        ax.axvline(0, color="#222222", lw=0.8)
        ax.grid(axis="x", alpha=0.3)
        ax.invert_yaxis()
    axes[0].set(title="the model's own mean\n(note the finer scale)")
    axes[1].set(title="4 RMS added\n")
    figure.supxlabel("validation loss minus fp4_mean's, nats a byte", fontsize=10)
    return figure


def draw_nano(stored):
    """Losses over a training in three precisions, and their gaps to bf16."""
    figure, (left, right) = panels(9, 3.8, 2)
    bf16 = {k: dict(stored["bf16"][k]) for k in ("train", "val")}
    for name, curves in stored.items():
        color, dots = STYLES[name]["color"], {"ls": "", "ms": 6, "mfc": "none", **STYLES[name]}
        left.plot(*np.array(curves["train"]).T, color=color, lw=1.2)
        left.plot(*np.array(curves["val"]).T, **dots, label=f"{name}: {curves['val'][-1][1]:.3f}")
        if name != "bf16":
            train, val = (
                [(s, v - bf16[k][s]) for s, v in curves[k] if s in bf16[k]]
                for k in ("train", "val")
            )
            right.plot(*np.array(train).T, color=color, lw=1.2)
            right.plot(*np.array(val).T, **dots, label=name)
    left.set(title="loss, nats a token")
    left.legend(
        frameon=False,
        title="lines: training, means of 10 steps\nmarks: validation, and its last value",
    )
    right.axhline(0, color="#222222", lw=0.8)
    right.set(title="minus bf16's")
    right.legend(frameon=False, loc="lower right")
    figure.supxlabel("step", fontsize=10)
    return figure


def draw_origin(stored):
    """The mean's share over a training and what 4 bits cost, with and without the frequencies of
    tokens given to the head. Bands: the range of the seeds; bars: standard errors."""
    figure, (left, middle, right) = panels(10, 4, 3)
    colors = BLUE, OCHRE, "#2a8f5b", "#7d4fa3"
    vocabularies = {"bytes": "257 tokens", "plays": "4,096", "smollm2": "49,152"}
    curves = [(left, c, k, "plays", "share", k) for k, c in zip(KINDS, colors, strict=True)]
    for (vocab, text), color in zip(vocabularies.items(), colors[:3], strict=True):
        curves.append((middle, color, text, vocab, "share", "linears"))
    for ax, color, text, vocab, *measure in curves:
        for head, line, shown in (("plain", "-", text), ("frequencies", "--", None)):
            steps, values = over_seeds(stored["runs"], vocab, "bf16", head, *measure)
            ax.plot(steps, values.mean(0), line, color=color, lw=1.6, label=shown)
            ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    for name in ("fp4", "fp4_mean"):
        for head, line, shown in (("plain", "-", name), ("frequencies", "--", None)):
            key = stored["runs"], "plays", "bf16", head, "loss"
            steps, bf16 = over_seeds(*key, "bf16")
            gaps = over_seeds(*key, name)[1] - bf16
            error = gaps.std(0, ddof=1) / len(gaps) ** 0.5
            style = STYLES[name] | {"ls": line, "lw": 1.2, "ms": 4, "capsize": 2}
            right.errorbar(steps, gaps.mean(0), error, **style, label=shown)
    left.set(title="the mean's share, 4,096 tokens", ylim=(0, 1))
    middle.set(title="mean over linears, by vocabulary", ylim=(0, 1))
    right.set(title="the same weights rounded:\nloss minus bf16's, nats")
    for ax in (left, middle, right):
        ax.set(xlim=(0, 420))
        ax.set_xscale("function", functions=(np.sqrt, np.square))
        ax.set_xticks([0, 10, 50, 100, 200, 400])
        ax.legend(frameon=False)
    right.axhline(0, color="#222222", lw=0.8)
    figure.supxlabel(
        "step (solid: plain; dashed: log frequencies added to the logits)", fontsize=10
    )
    return figure


def draw_stripes(stages):
    """A layer's input; what tells its tokens apart; and the error of NVFP4 on that, as it is and
    centered. In units of the typical size of what tells tokens apart, by its median."""
    largest = stages[-1]["largest"]
    x, mean = torch.tensor(largest["images"]["0"]["x"]), torch.tensor(largest["mean"])
    residual = x - mean
    errors = [quantize(t).dequantize() - t for t in (x, residual)]
    size = residual.abs().median() / 0.6745  # of a Gaussian the standard deviation
    top = mean.abs().argmax().item()  # and the 15 features of its block
    beside = [i for i in range(top // 16 * 16, top // 16 * 16 + 16) if i != top]
    off = [f"{(e[:, beside].norm() / residual[:, beside].norm()).item():.0%}" for e in errors]
    shown = {
        "input": (x, 6),
        "what tells tokens apart:\nthe input less its mean": (residual, 6),
        f"error of NVFP4: {off[0]} of that\nin the block of the stripe": (errors[0], 3),
        f"error of NVFP4 after centering:\n{off[1]}": (errors[1], 3),
    }
    figure, axes = panels(11, 3.1, 4, sharey=True)
    for ax, (title, (values, limit)) in zip(axes, shown.items(), strict=True):
        extent = (largest["first"], largest["first"] + x.shape[1], len(x), 0)
        drawn = ax.imshow(
            (values / size).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent
        )
        ax.set_title(title, fontsize=9)
        if ax in axes[1::2]:
            bar = figure.colorbar(
                drawn, ax=axes[:2] if limit == 6 else axes[2:], shrink=0.7, pad=0.01
            )
            bar.set_label("typical differences", fontsize=8)
    axes[0].set(ylabel="token")
    figure.supxlabel(f"feature of the input of {largest['linear']}", fontsize=9)
    return figure


def draw_mean_share(stages):
    """The mean's share of X by depth: a column for each kind of linear, a line for each stage."""
    linears = stages[-1]["linears"]
    kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in linears))
    figure, axes = panels(10, 3.2, len(kinds), sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        mine = [name for name in linears if name.endswith(kind)]
        for i, stage in enumerate(stages, 1):
            shares = [stage["linears"][name]["X"]["mean_share"] for name in mine]
            shade = BLUE, 0.15 + 0.85 * i / len(stages)
            ax.plot(shares, "o-", ms=4, color=shade, label=stage["name"].replace("step-", "step "))
        ax.set(title=kind, ylim=(0, None), xticks=range(len(mine)))
    axes[0].set(ylabel="mean's share of the energy")
    axes[-1].legend(frameon=False)
    figure.supxlabel("block", fontsize=10)
    return figure


def draw_depth(stages):
    """The mean's share of X by depth beside that of the leading singular value, of all tokens and
    without those of massive norm: a column for each kind of linear."""
    linears = {name: sides["X"] for name, sides in stages[-1]["linears"].items()}
    kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in linears))
    figure, axes = panels(10, 3.2, len(kinds), sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        mine = [x for name, x in linears.items() if name.endswith(kind)]
        rest = [x["massive"].get("without", x) for x in mine]
        leading, less = ([np.ravel(x["leading_share"])[0] for x in group] for group in (mine, rest))
        ax.plot(leading, "-", color=OCHRE, lw=1.2, label="leading singular value")
        ax.plot(less, ":", color=OCHRE, lw=1.2, label="... without massive tokens")
        ax.plot([x["mean_share"] for x in mine], "-", color=BLUE, lw=1.8, label="mean")
        ax.plot([x["mean_share"] for x in rest], ":", color=BLUE, lw=1.8, label="... without them")
        ax.set(title=kind, ylim=(0, 1))
    axes[0].set(ylabel="share of the energy")
    axes[2].legend(frameon=False, fontsize=8, loc="upper left")
    figure.supxlabel("block", fontsize=10)
    return figure


def draw_remedies(stages):
    """The error that each remedy leaves: a dark bar with the model's own mean, and behind it a
    light one with a strong mean, if there is one such."""
    found = stages[-1]["remedies"]
    own, named = found["0"], {"4": (0.35, "4 RMS added"), "0": (1, "the model's own mean")}
    figure, ax = panels(8, 5)
    for up, column, name, color in ((-0.2, 1, "fprop, varying", BLUE), (0.2, 4, "wgrad", OCHRE)):
        place = [k + up for k in range(len(own))]
        for errors, (shade, what) in ((found[k], v) for k, v in named.items() if k in found):
            values = [e[column] for e in errors.values()]
            ax.barh(place, values, 0.36, color=(color, shade), label=f"{name}: {what}")
    ax.set_yticks(range(len(own)), list(own))
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.set(xlabel="relative error")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=2)
    return figure


def draw_downstream(rows):
    """Loss and scores of a model rounded as it is, with stored means, minus those of bf16."""
    columns = {
        "val loss": "loss, nats a token",
        "LAMBADA, log perplexity": "LAMBADA, log perplexity",
        "BLiMP, %": "BLiMP, %",
    }
    figure, axes = panels(10, 3, len(columns), sharey=True)
    rounded = rows[1:]  # the first is bf16
    for ax, (column, title) in zip(axes, columns.items(), strict=True):
        for place, row in enumerate(rounded):
            _, _, _, difference, error = row["columns"][column]
            color = STYLES[row["in"]]["color"]
            ax.barh(place, difference, 0.6, xerr=error, color=color, capsize=3)
        ax.axvline(0, color="#222222", lw=0.8)
        ax.set(title=title)
    axes[0].set_yticks(range(len(rounded)), [row["in"] for row in rounded])
    axes[0].invert_yaxis()
    figure.supxlabel("minus bf16's", fontsize=10)
    return figure


FIGURES = {  # of a JSON file: the figures drawn from it
    "added_mean": {"added_mean": draw_added_mean},
    "ablations": {"ablations": draw_ablations},
    "natural": {"natural": draw_natural},
    "nano": {"loss": draw_nano},
    "origin": {"origin": draw_origin},
    "analysis": {"mean_share": draw_mean_share, "remedies": draw_remedies},
    "smollm2_analysis": {
        "stripes": draw_stripes, "depth": draw_depth, "smollm2_remedies": draw_remedies
    },
    "train_on": {"train_on": draw_train_on},
    "directions": {"directions": draw_directions},
    "smollm2_stored": {"downstream": draw_downstream},
}  # fmt: skip


def loss_curves(run):
    """{"train": [[step, mean of SMOOTH losses], ...], "val": [[step, loss], ...]} of a run."""
    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    losses = [(m["step"], m["loss"]) for m in records if "loss" in m]
    train = []
    for i in range(0, len(losses) - SMOOTH + 1, SMOOTH):
        steps, values = zip(*losses[i : i + SMOOTH], strict=True)
        train.append([steps[SMOOTH // 2], round(statistics.mean(values), 4)])
    val = [[m["step"], round(m["val_loss"], 4)] for m in records if "val_loss" in m]
    return {"train": train, "val": val}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="(experiments/results)")
    parser.add_argument("--nano", nargs="+", metavar="RUN", help="make nano.json from these runs")
    args = parser.parse_args(argv)
    source, target = args.folder or HERE / "results", args.folder or HERE / "assets"
    if args.nano:
        curves = {}
        for run in args.nano:
            config = json.loads(Path(run, "config.json").read_text())
            curves[config["precision"]] = loss_curves(run)
        text = json.dumps(curves, separators=(",", ":")).replace("]]},", "]]},\n")
        (source / "nano.json").write_text(text + "\n")
    matplotlib.rcParams.update({"font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9})
    found = [source / f"{name}.json" for name in FIGURES if (source / f"{name}.json").exists()]
    if not found:
        raise SystemExit(f"error: {source} has none of {', '.join(FIGURES)}.json")
    for path in found:
        stored = json.loads(path.read_text())
        for name, draw in FIGURES[path.stem].items():
            draw(stored).savefig(target / f"{name}.png", dpi=150)
            print(target / f"{name}.png")


if __name__ == "__main__":
    main()
