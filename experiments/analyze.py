"""The mean bias in a trained model, what FP4 makes of it, and what each remedy does about it.

    python analyze.py out/run/step-200.pt out/run/step-2000.pt     stages of one training (--keep)
    python analyze.py QWEN3_DIRECTORY --text FILE                  a Hugging Face model
    python analyze.py --draw                                       from results/analysis.json again

All is measured on one batch of held-out text, on the exact input X (l, m) and output gradient
D (l, n) of every block linear, in FP32: what their mean over tokens is and does, the error that
each remedy leaves in each GEMM, and the error of the whole FP4 gradient, split into bias and noise.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fp4
from data.shards import DataError, load, prepare_if_missing
from export import load_hf
from sample import load_model
from train import RunError

ROOT = Path(__file__).parent
DIALS = 0.0, 4.0  # FP4Linear's mean_bias: the natural mean, and a strong one
TITLES = {"0": "the natural mean", "4": "a mean of 4 RMS added"}
GRADIENTS = "fp4", "fp4_mean", "fp4_mean_paper", "fp4_hadamard", "fp4_svd"
OUT = "results/analysis.json"
CROP = 64  # tokens and features of the image
VALUES = 0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6  # of the 16 codes

# ------------------------------------------------------------------------------------------------
# Diagnostics of a matrix x (l, m), tokens by features. All return floats.


def _gram(x):
    """x'x or xx', the smaller: both have the squared singular values of x as eigenvalues."""
    return x @ x.t() if len(x) < x.shape[1] else x.t() @ x


def mean_share(x):
    """||mu||^2 / E||x||^2: the mean's share of the energy, in [0, 1]; R of arXiv 2603.10444 is its
    square root."""
    return (x.mean(0).square().sum() / x.square().sum(1).mean()).item()


def mean_alignment(x):
    """|cos(mu, v1)|, v1 the leading right singular vector (arXiv 2603.10444)."""
    v = torch.linalg.eigh(_gram(x)).eigenvectors[:, -1]
    v = x.t() @ v if len(x) < x.shape[1] else v
    return F.cosine_similarity(x.mean(0), v, dim=0).abs().item()


def top_explained(x, share=0.001):
    """How much of the largest magnitudes the mean explains: sum mu_j x_ij / sum x_ij^2 over the
    0.1% of the entries with the largest |x_ij|. The residual r explains the rest: x^2 = mu x + r x.
    """
    top = x.abs().flatten().topk(math.ceil(share * x.numel())).indices
    value, mean = x.flatten()[top], x.mean(0)[top % x.shape[1]]
    return ((mean * value).sum() / value.square().sum()).item()


def leading_share(x):
    """sigma_1^2 / sum of sigma_i^2: the leading singular value's share of the energy."""
    gram = _gram(x)
    return (torch.linalg.eigvalsh(gram)[-1] / gram.trace()).item()


def mean_cosine(x):
    """The mean cosine similarity of two different tokens (Ethayarajh 2019, arXiv 1909.00512)."""
    total = F.normalize(x).sum(0).square().sum()
    return ((total - len(x)) / (len(x) * (len(x) - 1))).item()


def isoscore(x):
    """IsoScore (Rudman et al. 2022, arXiv 2108.07344) of x - mean(x), if that is what is given: 1
    if the variance is the same in all m directions, 0 if it is all in one.

    Its seven steps amount to (p - 1) / (m - 1), p = (sum of lambda)^2 / sum of lambda^2 over the
    eigenvalues of the covariance. Nothing is subtracted here, so of an x that is not centered the
    mean counts as one more direction."""
    gram = _gram(x)
    participation = gram.trace().square() / gram.square().sum()
    return ((participation - 1) / (x.shape[1] - 1)).item()


def code_shares(x):
    """How often each of the 16 codes of E2M1 occurs in NVFP4's x: (16,), sum 1."""
    codes = fp4._unpack(fp4.quantize(x).codes, (1, 16))
    return torch.bincount(codes.flatten(), minlength=16) / codes.numel()


def code_entropy(x):
    """Bits a code carries, of 4."""
    return -torch.special.xlogy(p := code_shares(x), p).sum().item() / math.log(2)


def scale_spread(x):
    """The standard deviation of log2 of NVFP4's nonzero block scales: octaves."""
    scales = fp4.quantize(x).scales.float()
    return scales[scales > 0].log2().std(correction=0).item()


def diagnose(x):
    """The diagnostics of x, by name; those in a pair are before and after centering."""
    x = x.double()
    pairs = {
        "leading_share": leading_share,
        "mean_cosine": mean_cosine,
        "isoscore": isoscore,
        "code_entropy": code_entropy,
        "scale_spread": scale_spread,
        "amax": lambda x: x.abs().max().item(),
    }
    share = mean_share(x)
    return {
        "mean_share": share,
        "R": math.sqrt(share),
        "alignment": mean_alignment(x),
        "top_explained": top_explained(x),
    } | {name: [f(x), f(x - x.mean(0))] for name, f in pairs.items()}


# ------------------------------------------------------------------------------------------------
# Remedies. Those of fp4.py are the real code. The related systems are emulated: functions of two
# operands a (M, K), b (N, K) and their roundings, returning a b' (M, N). All rotate, permute or
# choose along K, the axis that the GEMM contracts, and take W in 16 x 16 blocks as fp4.py does.


def rotate(a):
    """Every 16 columns times the Hadamard matrix with signs of fp4.rotate_tokens."""
    return fp4.rotate_tokens(a.t()).t()


def hadamard(a, b, round_a, round_b):
    return round_a(rotate(a)) @ round_b(rotate(b)).t()


def outliers(a, b, round_a, round_b):
    """LLM.int8() (arXiv 2208.07339), mixed-precision decomposition. Simplified: the outliers are
    the 1% of a's columns with the largest amax, not those that reach a threshold."""
    top = a.abs().amax(0).topk(math.ceil(0.01 * a.shape[1])).indices
    high = a[:, top] @ b[:, top].t()
    return high + round_a(a.index_fill(1, top, 0)) @ round_b(b.index_fill(1, top, 0)).t()


def zigzag(amax):
    """DuQuant's permutation: (K,) columns by falling amax dealt to blocks of 16, forth and back."""
    deal = amax.argsort(descending=True).view(16, -1)
    deal[1::2] = deal[1::2].flip(1)
    return deal.t().flatten()


def duquant(a, b, round_a, round_b):
    """DuQuant (arXiv 2406.01721): rotate blocks, deal the columns anew, rotate again. Simplified:
    blocks of 16, not 128; Hadamard, not a rotation from a greedy search; no smoothing."""
    a, b = rotate(a), rotate(b)
    order = zigzag(a.abs().amax(0))
    return hadamard(a[:, order], b[:, order], round_a, round_b)


def per_channel(a, b, round_a, round_b):
    """Per-IC quantization (arXiv 2309.15531): a block is 16 values of one input channel. That paper
    rounds weights only; here both operands. Its AdaDim takes per layer the better of this and none.
    """
    return round_a(a, (16, 1)) @ round_b(b, (16, 1)).t()


REMEDIES = {  # a recipe or a function, and what it costs over none
    "none": ("fp4", "-"),
    "mean": ("fp4_mean", "a reduction and a subtraction for X and D; two matrix-vector products"),
    "mean in FP4": ("fp4_mean_paper", "the same, and the cross terms of wgrad"),
    "rank-1 SVD": ("fp4_svd", "16 passes over X and over D; the cross terms of wgrad"),
    "Hadamard, wgrad": ("fp4_hadamard", "wgrad: a 16-point transform of both operands"),
    "mean + Hadamard": ("fp4_mean_hadamard", "that of the mean and that of the transform"),
    "Hadamard, all": (hadamard, "a 16-point transform of both operands; W rounded for each GEMM"),
    "outlier columns": (outliers, "1% of each GEMM in high precision; a search and a gather"),
    "DuQuant": (duquant, "two transforms and a permutation; W rounded for each GEMM"),
    "per channel": (per_channel, "scales vary within the contraction: no FP4 tensor core does it"),
}
COLUMNS = "fprop", "fprop varying", "dgrad", "dgrad varying", "wgrad"


def rounding(block=(1, 16), stochastic=False):
    """A function that rounds a matrix to NVFP4 and back, in these blocks unless told others."""
    return lambda x, block=block: fp4.quantize(x, block=block, stochastic=stochastic).dequantize()


def gemms(x, w, d, how):
    """Y (l, n), dX (l, m) and dW (n, m) of X (l, m), W (n, m), D (l, n), l a multiple of 16, under
    a recipe or a function of REMEDIES. Gradients are rounded stochastically."""
    if callable(how):
        near, random, blocks = rounding(), rounding(stochastic=True), rounding((16, 16))
        y, dx = how(x, w, near, blocks), how(d, w.t(), random, blocks)
        return y, dx, how(d.t(), x.t(), random, near)
    layer = fp4.FP4Linear(w.shape[1], len(w), False, how, device="meta")
    layer.weight, x = torch.nn.Parameter(w), x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight), d)


def offset(x, bias):
    """The mean (m,) that FP4Linear's dial adds to x (l, m)."""
    return fp4.FP4Linear(x.shape[1], 16, False, "fp4", bias).to(x.device).offset(x) if bias else 0.0


def gemm_errors(got, exact):
    """Relative errors in the order of COLUMNS; varying: the mean over tokens taken off both."""

    def relative(a, b):
        return ((a - b).norm() / b.norm()).item()

    def both(a, b):
        return relative(a, b), relative(a - a.mean(0), b - b.mean(0))

    return *both(got[0], exact[0]), *both(got[1], exact[1]), relative(got[2], exact[2])


def remedy_errors(tensors, weights, bias):
    """{remedy: errors in the order of COLUMNS}, root mean squares over the linears; the dial's
    offset at `bias` is added to every X, as a mean that the model might have. What it adds to dW
    cancels in training, so the unit of wgrad's error is dW without it."""
    squares = {name: torch.zeros(len(COLUMNS), dtype=torch.float64) for name in REMEDIES}
    for linear, (x, d) in tensors.items():
        w, x, d = weights[linear], x[: len(x) // 16 * 16], d[: len(d) // 16 * 16]
        unit = (d.t() @ x).norm().item()
        x = x + offset(x, bias)
        exact = gemms(x, w, d, "fp32")
        for name, (how, _) in REMEDIES.items():
            torch.manual_seed(0)
            errors = torch.tensor(gemm_errors(gemms(x, w, d, how), exact), dtype=torch.float64)
            errors[-1] *= exact[2].norm().item() / unit
            squares[name] += errors.square() / len(tensors)
    return {name: square.sqrt().tolist() for name, square in squares.items()}


# ------------------------------------------------------------------------------------------------
# The whole gradient.


def split_error(pairs):
    """Of a gradient, given as pairs of draws (S, P), S > 1, and exact (P,), one for each parameter:
    the relative error of a draw, its bias, its noise, and its cosine to the exact gradient.

    noise^2 is the variance of a draw, and bias^2 is ||mean error||^2 - noise^2 / S, which is right
    on average; error^2 = bias^2 + noise^2. The cosine is E<g, exact> / sqrt(E||g||^2 ||exact||^2).
    """
    sums = 0
    for draws, exact in pairs:
        draws, exact = draws.double(), exact.double()
        mean = draws.mean(0)
        noise = (draws - mean).square().sum() / (len(draws) - 1)
        bias = (mean - exact).square().sum() - noise / len(draws)
        size = draws.square().sum() / len(draws)
        sums += torch.stack((bias, noise, mean @ exact, size, exact @ exact))
    bias, noise, dot, size, norm = sums.tolist()
    parts = bias + noise, max(bias, 0.0), noise
    return [math.sqrt(p / norm) for p in parts] + [dot / math.sqrt(size * norm)]


def gradients(model, layers, ids, targets, recipe):
    """{parameter: gradient of the loss}, with this recipe in every block linear."""
    for layer in layers.values():
        layer.recipe = fp4.RECIPES[recipe]
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(model(ids, targets), parameters)
    return dict(zip(names, grads, strict=True))


def gradient_errors(model, layers, ids, targets, seeds):
    """{recipe: {"whole" or a linear: [error, bias, noise, cosine]}}. To nearest, the rounding in
    the forward pass is the same in every draw, so its error counts as bias, on this batch."""
    exact = gradients(model, layers, ids, targets, "fp32")
    result = {}
    for recipe in GRADIENTS:
        draws = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            draws.append(gradients(model, layers, ids, targets, recipe))

        def pair(name, draws=draws):
            return torch.stack([d[name].flatten() for d in draws]), exact[name].flatten()

        result[recipe] = {"whole": split_error(map(pair, exact))}
        result[recipe] |= {name: split_error([pair(f"{name}.weight")]) for name in layers}
    return result


# ------------------------------------------------------------------------------------------------
# A model, its held-out text, and what its linears see.


def open_model(path, text, tokens, device):
    """A checkpoint, a run's folder or a Hugging Face directory: the model in FP32, and ids and
    targets (B, T) of about this many tokens of held-out text, evenly spaced."""

    def spaced(count):
        n = max(1, tokens // (length - 1))
        return torch.linspace(0, count - 1, n, dtype=torch.float64).long()

    if path.is_dir() and list(path.glob("*.safetensors")):
        from transformers import AutoTokenizer

        if not text:
            raise RunError(f"{path} is a Hugging Face directory. HINT: --text FILE")
        if not any((path / f"tokenizer{end}.json").exists() for end in ("", "_config")):
            raise RunError(f"no tokenizer in {path}: no tokenizer.json. HINT: copy it there")
        model, _ = load_hf(path, "fp32", device)
        ids = AutoTokenizer.from_pretrained(path)(Path(text).read_text())["input_ids"]
        length = min(model.config.block_size, tokens) + 1
        if len(ids) < length:
            raise RunError(f"{text} has {len(ids)} tokens, fewer than {length}")
        window = torch.tensor(ids).unfold(0, length, 1)[spaced(len(ids) - length + 1)]
    else:
        if text:
            raise RunError(f"--text is for Hugging Face models; {path} has its own dataset")
        model, config = load_model(path, device, "fp32")
        prepare_if_missing(config["dataset"])
        val = load(config["dataset"], "val")
        length = min(model.config.block_size, tokens) + 1
        window = val.batch(spaced(val.windows(length)), length)
    window = window.to(device)
    return model, window[:, :-1], window[:, 1:]


def capture(model, layers, ids, targets):
    """{linear: (X (l, m), D (l, n))}, exact, l the tokens of the batch."""
    seen = {}

    def look(name):
        def hook(layer, inputs, output):
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda d: seen.update({name: (x, d.flatten(0, -2))}))

        return hook

    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    gradients(model, layers, ids, targets, "fp32")
    for hook in hooks:
        hook.remove()
    return {name: seen[name] for name in layers}  # backward visits them in reverse


def analyze(path, text, tokens, seeds, device):
    """One stage: all that tables and figures need."""
    path = Path(path)
    model, ids, targets = open_model(path, text, tokens, device)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fp4.FP4Linear)}
    tensors = capture(model, layers, ids, targets)
    weights = {n: layer.weight.detach() for n, layer in layers.items()}
    linears = {n: {"X": diagnose(x), "D": diagnose(d)} for n, (x, d) in tensors.items()}

    largest = max(linears, key=lambda n: linears[n]["X"]["mean_share"])
    x = tensors[largest][0]
    mean = x.mean(0)
    first = mean.square().unfold(0, min(CROP, len(mean)), 1).sum(1).argmax().item()
    codes, images = {}, {}
    for bias in DIALS:
        y = x + offset(x, bias)
        codes[f"{bias:g}"] = [code_shares(y).tolist(), code_shares(y - y.mean(0)).tolist()]
        crop = y[:CROP, first : first + CROP].tolist()
        images[f"{bias:g}"] = {"share": mean_share(y), "x": crop}
    return {
        "name": path.parent.name if path.name == "checkpoint.pt" else path.name.removesuffix(".pt"),
        "tokens": ids.numel(),
        "linears": linears,
        "remedies": {f"{bias:g}": remedy_errors(tensors, weights, bias) for bias in DIALS},
        "gradients": gradient_errors(model, layers, ids, targets, seeds),
        "largest": {
            "linear": largest,
            "codes": codes,
            "first": first,
            "images": images,
            "mean": mean[first : first + CROP].tolist(),
        },
    }


def rounded(value):
    """A JSON value with every float at four significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------
# Tables and figures, from the JSON alone.


def table(columns, rows):
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(stage):
    """The printed tables of a stage, in Markdown."""
    linears = []
    for name, sides in stage["linears"].items():
        for side, measures in sides.items():
            pairs = (v if isinstance(v, list) else [v] for v in measures.values())
            linears.append((name, side, *(" → ".join(f"{v:.2g}" for v in p) for p in pairs)))
    yield f"{stage['name']}, {stage['tokens']} tokens: before → after centering"
    yield table(("linear", "", *(m.replace("_", " ") for m in measures)), linears)
    for bias, errors in stage["remedies"].items():
        rows = [(n, *(f"{v:.4f}" for v in e), REMEDIES[n][1]) for n, e in errors.items()]
        yield f"relative error of each GEMM, {TITLES[bias]}"
        yield table(("remedy", *COLUMNS, "costs"), rows)
    rows = []
    for recipe, errors in stage["gradients"].items():
        worst = max(stage["linears"], key=lambda n: errors[n][0])
        rows.append((f"`{recipe}`", *(f"{v:.4f}" for v in errors["whole"])))
        rows[-1] += (f"{worst} {errors[worst][0]:.4f}",)
    yield "the whole gradient"
    yield table(("recipe", "relative error", "bias", "noise", "cosine", "worst linear"), rows)


def draw_stripes(plt, stage):
    """A linear's input, also with a strong mean, and what centering leaves of either, on one colour
    scale."""
    largest = stage["largest"]
    images = {bias: np.array(image["x"]) for bias, image in largest["images"].items()}
    panels = {
        f"{TITLES[bias]}: {largest['images'][bias]['share']:.0%} of the energy": x
        for bias, x in images.items()
    }
    panels["after subtracting the mean, of either"] = images["0"] - np.array(largest["mean"])
    limit = 3 * np.sqrt(np.square(images["0"]).mean())
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), sharey=True, layout="constrained")
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        extent = (largest["first"], largest["first"] + x.shape[1], len(x), 0)
        shown = ax.imshow(x, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        ax.set_title(title, fontsize=10)
    axes[0].set(ylabel="token")
    axes[1].set(xlabel=f"feature of {largest['linear']}'s input")
    figure.colorbar(shown, ax=axes, shrink=0.85)
    return figure


def draw_codes(plt, stage):
    """How often NVFP4 uses each of its 16 codes, before and after centering."""
    order = sorted(range(16), key=lambda c: (VALUES[c], c < 8))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for ax, (bias, shares) in zip(axes, stage["largest"]["codes"].items(), strict=True):
        for i, when in enumerate(("X", "X - μ")):
            bits = -sum(p * math.log2(p) for p in shares[i] if p)
            place = [k + 0.4 * i - 0.2 for k in range(16)]
            height = [100 * shares[i][c] for c in order]
            ax.bar(place, height, 0.4, label=f"{when}: {bits:.2f} bits")
        ax.set_xticks(range(16), [f"{VALUES[c]:g}" for c in order])
        ax.set(title=f"{stage['largest']['linear']}, {TITLES[bias]}", xlabel="E2M1 value")
        ax.legend(frameon=False)
    axes[0].set(ylabel="share of the values, %")
    return figure


def draw_mean_share(plt, stages):
    """The mean's share by depth, a column for each kind of linear, a line for each stage."""
    linears = stages[-1]["linears"]
    kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in linears))
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(10, 4.8), sharex=True, sharey="row", layout="constrained"
    )
    for row, side, color in zip(axes, "XD", ("#c44e52", "#4c72b0"), strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            mine = [name for name in linears if name.endswith(kind)]
            for i, stage in enumerate(stages, 1):
                shares = [stage["linears"][name][side]["mean_share"] for name in mine]
                shade = color, 0.15 + 0.85 * i / len(stages)
                ax.plot(shares, "o-", ms=3, color=shade, label=stage["name"])
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.25)
            if side == "X":
                ax.set(title=kind)
        row[0].set(ylabel=f"mean's share of {side}")
        row[-1].legend(frameon=False, fontsize=8)
    figure.supxlabel("block")
    return figure


def draw_remedies(plt, stage):
    """The error that each remedy leaves, with the natural mean and with a strong one."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (bias, errors) in zip(axes, stage["remedies"].items(), strict=True):
        for i, column in enumerate(("fprop varying", "dgrad varying", "wgrad")):
            place = [k + 0.27 * (i - 1) for k in range(len(errors))]
            ax.barh(place, [e[COLUMNS.index(column)] for e in errors.values()], 0.27, label=column)
        ax.set_yticks(range(len(errors)), list(errors))
        ax.set(title=TITLES[bias], xlabel="relative error")
        ax.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, loc="lower right")
    return figure


def draw(stages, folder):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {
        "stripes": draw_stripes(plt, stages[-1]),
        "codes": draw_codes(plt, stages[-1]),
        "mean_share": draw_mean_share(plt, stages),
        "remedies": draw_remedies(plt, stages[-1]),
    }
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", help="checkpoints, or a Hugging Face directory")
    parser.add_argument("--text", help="held-out text for a Hugging Face model")
    parser.add_argument("--tokens", type=int, default=2048, help="of held-out text (2048)")
    parser.add_argument("--seeds", type=int, default=4, help="rounding seeds, at least 2 (4)")
    parser.add_argument("--out", default=OUT, help=f"({OUT}; figures of another file go beside it)")
    parser.add_argument("--draw", action="store_true", help="from --out: no model, no data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if not args.draw:
        if not args.paths or args.seeds < 2 or args.tokens < 16:
            raise RunError("give a checkpoint, 2 or more --seeds, 16 or more --tokens, or --draw")
        print(fp4.backend(torch.device(args.device)), flush=True)
        stages = []
        for path in args.paths:
            stages.append(analyze(path, args.text, args.tokens, args.seeds, args.device))
            shares = [v["X"]["mean_share"] for v in stages[-1]["linears"].values()]
            print(f"{stages[-1]['name']}: mean share {statistics.mean(shares):.3f}", flush=True)
        for stage in stages[:-1]:
            del stage["largest"]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounded(stages), separators=(",", ":")) + "\n")
    if not out.exists():
        raise RunError(f"no {out}. HINT: python analyze.py CHECKPOINT...")
    stages = json.loads(out.read_text())
    print("\n\n".join(tables(stages[-1])))
    draw(stages, ROOT / "assets" if args.out == OUT else out.parent)


if __name__ == "__main__":
    try:
        main()
    except (RunError, DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}. HINT: pip install -r requirements-dev.txt")
