"""The mean in a trained model, what FP4 makes of it, and what each remedy does about it.

    python -m experiments.analyze RUN/step-200.pt RUN/step-2000.pt  stages of a training (--keep)
    python -m experiments.analyze out/smollm2 --dataset shakespeare-smollm2 --tokens 1024 --seeds 2
                                                                    an imported model
    python -m experiments.analyze experiments/results/analysis.json tables again, no model

All is measured on one batch of held-out text, on the exact input X (T, m) and output gradient
D (T, n) of every block linear, in FP32: what their mean over tokens is and does, also without the
tokens of massive norm, the error that each remedy leaves in each GEMM, and the error of the whole
FP4 gradient, split into bias and noise. For our own small models some is repeated with a strong
mean added. The tables of the last stage are printed; --json keeps the numbers, and
experiments.figures draws them.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

import fp4
from experiments.compare import markdown
from experiments.eval import text_of
from experiments.recipes import added_mean, massive_tokens, rotate_tokens
from model import GPT

ADDED = 0.0, 4.0  # means added to X, in RMS: only the model's own mean, and a strong one
TITLES = {"0": "the model's own mean", "4": "and a mean of 4 RMS added"}
GRADIENTS = (
    "fp4", "fp4_mean", "fp4_mean_paper", "fp4_hadamard", "fp4_svd", "fp4_project", "fp4_1d",
    "fp4_mean_1d", "fp4_project_1d",
)  # fmt: skip
FIRST = "fp4", "fp4_mean", "fp4_project", "fp4_svd"
CROP = 64  # tokens and features of the image

# ------------------------------------------------------------------------------------------------
# Diagnostics of a matrix x (T, m), tokens by features. All return floats.


def _gram(x):
    """xᵀx or xxᵀ, the smaller: both have the squared singular values of x as eigenvalues."""
    return x @ x.t() if len(x) < x.shape[1] else x.t() @ x


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


def mean_share(x):
    return fp4.mean_share(x).item()


MEASURES = {
    "mean_share": mean_share,
    "alignment": mean_alignment,
    "leading_share": leading_share,
    "top_explained": top_explained,
}


def massive(x):
    """Tokens of x with more than 4 times the RMS norm: {} if there are none. Else which, the norm
    of the largest over the median, the energy of all, and what the mean is without them."""
    tokens, energy = massive_tokens(x), x.square().sum(1)
    if not len(tokens):
        return {}
    rest = x[~torch.isin(torch.arange(len(x), device=x.device), tokens)]
    return {
        "tokens": tokens.tolist(),
        "to_median": (energy.max() / energy.median()).sqrt().item(),
        "energy": (energy[tokens].sum() / energy.sum()).item(),
        "without": {name: measure(rest) for name, measure in MEASURES.items()},
    }


def diagnose(x):
    """MEASURES of x, and what its massive tokens are."""
    x = x.double()
    return {name: measure(x) for name, measure in MEASURES.items()} | {"massive": massive(x)}


# ------------------------------------------------------------------------------------------------
# Remedies. Those of fp4.py are the real code. The related systems are emulated: functions of two
# operands a (M, K), b (N, K) and their roundings, returning a bᵀ (M, N). All rotate, permute or
# choose along K, the axis that the GEMM contracts, and take W in 16 x 16 blocks as fp4.py does.


def rotate(a):
    """Every 16 columns times the Hadamard matrix with signs of recipes.rotate_tokens."""
    return rotate_tokens(a.t()).t()


def hadamard(a, b, round_a, round_b):
    return round_a(rotate(a)) @ round_b(rotate(b)).t()


def outliers(a, b, round_a, round_b):
    """LLM.int8() (arXiv 2208.07339), mixed-precision decomposition. Simplified: the outliers are
    the 1% of a's columns with the largest amax, not those that reach a threshold."""
    top = a.abs().amax(0).topk(math.ceil(0.01 * a.shape[1])).indices
    high = a[:, top] @ b[:, top].t()
    return high + round_a(a.index_fill(1, top, 0)) @ round_b(b.index_fill(1, top, 0)).t()


def hot_channels(a, b, round_a, round_b):
    """CHON's hot-channel patch (arXiv 2602.02047): of a few channels the rounding's error is put
    back, in high precision. Simplified: the 1% of a's columns with the largest error, found anew
    for every product."""
    a_q, b_q = round_a(a), round_b(b)
    hot = (a - a_q).square().sum(0).topk(math.ceil(0.01 * a.shape[1])).indices
    return a_q @ b_q.t() + a[:, hot] @ b[:, hot].t() - a_q[:, hot] @ b_q[:, hot].t()


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


REMEDIES = {  # a recipe's name or a function, and what it costs over none
    "none": ("fp4", "-"),
    "mean": ("fp4_mean", "a reduction and a subtraction for X and D; two matrix-vector products"),
    "projection": ("fp4_project", "the same, and one more read of X; wgrad reads D once more"),
    "W in 1 x 16": ("fp4_1d", "W is rounded twice, and 4.5 bits more of it are kept"),
    "both": ("fp4_project_1d", "that of both"),
    "mean in FP4": ("fp4_mean_paper", "that of the mean, and the cross terms of wgrad"),
    "rank-1 SVD": ("fp4_svd", "16 passes over X and over D; the cross terms of wgrad"),
    "Hadamard, wgrad": ("fp4_hadamard", "wgrad: a 16-point transform of both operands"),
    "mean + Hadamard": ("fp4_mean_hadamard", "that of the mean and that of the transform"),
    "Hadamard, all": (hadamard, "a 16-point transform of both operands; W rounded for each GEMM"),
    "outlier columns": (outliers, "1% of each GEMM in high precision; a search and a gather"),
    "hot channels": (hot_channels, "2% of each GEMM in high precision; a search and two gathers"),
    "DuQuant": (duquant, "two transforms and a permutation; W rounded for each GEMM"),
    "per channel": (per_channel, "scales vary within the contraction: no FP4 tensor core does it"),
}
COLUMNS = "fprop", "fprop varying", "dgrad", "dgrad varying", "wgrad"


def rounding(block=(1, 16), stochastic=False):
    """A function that rounds a matrix to NVFP4 and back, in these blocks unless told others."""

    def round_trip(x, block=block):
        seed = torch.randint(2**31 - 1, ()).item() if stochastic else None
        return fp4.quantize(x, block, seed).dequantize()

    return round_trip


def gemms(x, w, d, remedy):
    """Y (T, n), dX (T, m) and dW (n, m) of X (T, m), W (n, m), D (T, n), T a multiple of 16, under
    a recipe's name or a function of REMEDIES. Gradients are rounded stochastically."""
    if callable(remedy):
        near, random, blocks = rounding(), rounding(stochastic=True), rounding((16, 16))
        y, dx = remedy(x, w, near, blocks), remedy(d, w.t(), random, blocks)
        return y, dx, remedy(d.t(), x.t(), random, near)
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = fp4.linear(x, w, remedy)
    return y.detach(), *torch.autograd.grad(y, (x, w), d)


def gemm_errors(got, exact):
    """Relative errors in the order of COLUMNS; varying: the mean over tokens taken off both."""

    def relative(a, b):
        return ((a - b).norm() / b.norm()).item()

    def both(a, b):
        return relative(a, b), relative(a - a.mean(0), b - b.mean(0))

    return *both(got[0], exact[0]), *both(got[1], exact[1]), relative(got[2], exact[2])


def remedy_errors(tensors, weights, rms):
    """{remedy: errors in the order of COLUMNS}, root mean squares over the linears, with a mean of
    `rms` RMS added to every X, as one that the model might have. What it adds to dW cancels in
    training, so the unit of wgrad's error is dW without it."""
    squares = {name: torch.zeros(len(COLUMNS), dtype=torch.float64) for name in REMEDIES}
    for linear, (x, d) in tensors.items():
        w, x, d = weights[linear], x[: len(x) // 16 * 16], d[: len(d) // 16 * 16]
        unit = (d.t() @ x).norm().item()
        x = x + added_mean(x, rms)
        exact = gemms(x, w, d, "fp32")
        for name, (remedy, _) in REMEDIES.items():
            torch.manual_seed(0)
            errors = torch.tensor(gemm_errors(gemms(x, w, d, remedy), exact), dtype=torch.float64)
            errors[-1] *= exact[2].norm().item() / unit
            squares[name] += errors.square() / len(tensors)
    return {name: square.sqrt().tolist() for name, square in squares.items()}


def first_tokens(x, w, length):
    """Of X, sequences of `length` tokens one after another: "along", the component of their first
    tokens along the mean, relative to the mean of the others'; and for each recipe of FIRST
    fprop's relative error on the first tokens, and on the others."""
    first = torch.arange(len(x), device=x.device) % length == 0
    along, y = x @ x.mean(0), x @ w.t()
    found = {"along": (along[first].mean() / along[~first].mean()).item()}
    for recipe in FIRST:
        error = fp4.linear(x, w, recipe).detach() - y
        found[recipe] = [(error[rows].norm() / y[rows].norm()).item() for rows in (first, ~first)]
    return found


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
    return [*(math.sqrt(part / norm) for part in parts), dot / math.sqrt(size * norm)]


def gradients(model, layers, ids, targets, recipe):
    """{parameter: gradient of the loss}, with this recipe in every block linear."""
    for layer in layers.values():
        layer.recipe = recipe
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(model(ids, targets), parameters)
    return dict(zip(names, grads, strict=True))


def gradient_errors(model, layers, ids, targets, seeds):
    """{recipe: {"whole": [error, bias, noise, cosine]}}. To nearest, the rounding in the forward
    pass is the same in every draw, so its error counts as bias, on this batch."""
    exact = gradients(model, layers, ids, targets, "fp32")
    result = {}
    for recipe in GRADIENTS:
        draws = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            draws.append(gradients(model, layers, ids, targets, recipe))
        pairs = ((torch.stack([d[n].flatten() for d in draws]), exact[n].flatten()) for n in exact)
        result[recipe] = {"whole": split_error(pairs)}
    return result


# ------------------------------------------------------------------------------------------------
# A model, its held-out text, and what its linears see.


def open_model(path, dataset, tokens, device):
    """A run's folder or checkpoint: the model in FP32, ids and targets (B, T) of about this many
    tokens of held-out text, evenly spaced, and the means to add, to a model that came from
    elsewhere its own alone."""
    model = GPT.load(path, device, "fp32")
    val = text_of(model.run, dataset, "val")
    length = min(model.config.block_size, 512, tokens) + 1
    windows = val.batch(val.spaced(max(1, tokens // (length - 1)), length), length).to(device)
    config = model.run["config"]
    trained_here = config.get("dataset") and not config.get("init")
    return model, windows[:, :-1], windows[:, 1:], ADDED if trained_here else ADDED[:1]


def capture(model, layers, ids, targets):
    """{linear: (X (T, m), D (T, n))}, exact, T the tokens of the batch."""
    tensors = {}

    def look(name):
        def hook(layer, inputs, output):
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda d: tensors.update({name: (x, d.flatten(0, -2))}))

        return hook

    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    gradients(model, layers, ids, targets, "fp32")
    for hook in hooks:
        hook.remove()
    return {name: tensors[name] for name in layers}  # backward visits them in reverse


def analyze(path, dataset, tokens, seeds, device):
    """One stage: all that tables and figures need."""
    model, ids, targets, added = open_model(path, dataset, tokens, device)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fp4.FP4Linear)}
    tensors = capture(model, layers, ids, targets)
    weights = {n: layer.weight.detach() for n, layer in layers.items()}
    linears = {n: {"X": diagnose(x), "D": diagnose(d)} for n, (x, d) in tensors.items()}

    largest = max(linears, key=lambda n: linears[n]["X"]["mean_share"])
    x = tensors[largest][0]
    mean = x.mean(0)
    first = 16 * mean.square().unfold(0, min(CROP, len(mean)), 16).sum(1).argmax().item()
    return {
        "name": path.parent.name if path.name == "checkpoint.pt" else path.name.removesuffix(".pt"),
        "tokens": ids.numel(),
        "linears": linears,
        "first": {n: first_tokens(x, weights[n], ids.shape[1]) for n, (x, _) in tensors.items()},
        "remedies": {f"{rms:g}": remedy_errors(tensors, weights, rms) for rms in added},
        "gradients": gradient_errors(model, layers, ids, targets, seeds),
        "largest": {
            "linear": largest,
            "first": first,
            "images": {"0": {"x": x[:CROP, first : first + CROP].tolist()}},
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
# Tables, from what --json keeps.


def over_blocks(values):
    """Of one measure in every block: the median, and the least and the largest; or, of pairs, the
    two medians."""
    if isinstance(values[0], list):
        return " → ".join(f"{statistics.median(v):.2g}" for v in zip(*values, strict=True))
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def kind_of(linear):
    """ffn.down of blocks.3.ffn.down."""
    return linear.split(".", 2)[2]


def table_of_measures(linears):
    kinds = {}
    for name, sides in linears.items():
        for side, measures in sides.items():
            kinds.setdefault((kind_of(name), side), []).append(measures)
    rows = []
    for key, every in kinds.items():
        rows.append((*key, *(over_blocks([m[n] for m in every]) for n in MEASURES)))
    return markdown(("linears", "", *(n.replace("_", " ") for n in MEASURES)), rows)


def table_of_massive_tokens(linears):
    columns = "X of", "massive tokens", "largest norm, medians", "share of the energy"
    rows = []
    for name, sides in linears.items():
        found = sides["X"].get("massive")
        if not found:
            continue
        tokens = ", ".join(map(str, found["tokens"][:4]))
        if len(found["tokens"]) > 4:
            tokens += ", ..."
        cells = [name, tokens, f"{found['to_median']:.1f}", f"{found['energy']:.3f}"]
        for measure, without in found["without"].items():
            with_all = sides["X"][measure]
            if isinstance(with_all, list):
                with_all = with_all[0]  # not centered
            cells.append(f"{with_all:.2g} → {without:.2g}")
        rows.append(cells)
    return markdown((*columns, *(n.replace("_", " ") for n in MEASURES)), rows)


def table_of_first_tokens(first):
    kinds = {}
    for name, found in first.items():
        kinds.setdefault(kind_of(name), []).append(found)
    names = list(found)
    rows = []
    for kind, every in kinds.items():
        rows.append((kind, *(over_blocks([f[n] for f in every]) for n in names)))
    return markdown(("linears", "first token's component along the mean", *names[1:]), rows)


def tables(stage):
    """The printed tables of a stage, in Markdown."""
    linears = stage["linears"]
    yield f"{stage['name']}, {stage['tokens']} tokens: medians over blocks (range)"
    yield table_of_measures(linears)
    if any(sides["X"].get("massive") for sides in linears.values()):
        yield "tokens with 4 times the RMS norm: all → without them"
        yield table_of_massive_tokens(linears)
    if "first" in stage:
        yield "fprop's relative error on the first token of a sequence → on the others, medians"
        yield table_of_first_tokens(stage["first"])
    for rms, errors in stage["remedies"].items():
        rows = [(n, *(f"{v:.4f}" for v in e), REMEDIES[n][1]) for n, e in errors.items()]
        yield f"relative error of each GEMM, {TITLES[rms]}"
        yield markdown(("remedy", *COLUMNS, "costs"), rows)
    rows = [(f"`{n}`", *(f"{v:.4f}" for v in e["whole"])) for n, e in stage["gradients"].items()]
    yield "the whole gradient"
    yield markdown(("recipe", "relative error", "bias", "noise", "cosine"), rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="path", help="see above")
    parser.add_argument("--dataset", help="a folder under data/, or a path to one (the run's)")
    parser.add_argument("--tokens", type=int, default=2048, help="of that text (2048)")
    parser.add_argument("--seeds", type=int, default=4, help="of the rounding, 2 or more (4)")
    parser.add_argument("--json", type=Path, help="keep the numbers there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.paths[0].suffix == ".json":
        stages = json.loads(args.paths[0].read_text())
    else:
        print(fp4.use_fast_path(torch.device(args.device)), flush=True)
        stages = []
        for path in args.paths:
            stage = analyze(path, args.dataset, args.tokens, args.seeds, args.device)
            stages.append(rounded(stage))
            shares = [v["X"]["mean_share"] for v in stages[-1]["linears"].values()]
            print(f"{stages[-1]['name']}: mean share {statistics.mean(shares):.3f}", flush=True)
        for stage in stages[:-1]:
            del stage["largest"]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(stages, separators=(",", ":")) + "\n")
    print("\n\n".join(tables(stages[-1])))


if __name__ == "__main__":
    main()
