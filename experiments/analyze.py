"""The mean in a trained model, what FP4 makes of it, and what each remedy does about it.

    python experiments/analyze.py RUN/step-200.pt RUN/step-2000.pt   stages of a training (--keep)
    python experiments/analyze.py hf/smollm2 --dataset shakespeare-smollm2 --tokens 1024 --seeds 2
                                                                     a Hugging Face directory
    python experiments/analyze.py experiments/results/analysis.json  tables again, no model

All is measured on one batch of held-out text, on the exact input X (T, m) and output gradient
D (T, n) of every block linear, in FP32: what their mean over tokens is and does, also without the
tokens of massive norm, the error that each remedy leaves in each GEMM, and the error of the whole
FP4 gradient, split into bias and noise. For our own small models some is repeated with a strong
mean added. The tables of the last stage are printed; --json keeps the numbers, and figures.py draws
them.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fp4
from checkpoint import load_model, text_for
from cli import Parser, UserError, number, script
from experiments.recipes import RECIPES, AddedMean, massive_tokens, rotate_tokens
from experiments.report import markdown, results
from nvfp4 import _unpack, quantize
from run import World

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
    codes = _unpack(quantize(x).codes, (1, 16))
    return torch.bincount(codes.flatten(), minlength=16) / codes.numel()


def code_entropy(x):
    """Bits a code carries, of 4."""
    return -torch.special.xlogy(p := code_shares(x), p).sum().item() / math.log(2)


def scale_spread(x):
    """The standard deviation of log2 of NVFP4's nonzero block scales: octaves."""
    scales = quantize(x).scales.float()
    return scales[scales > 0].log2().std(correction=0).item()


WITHOUT = {
    "mean_share": lambda x: fp4.mean_share(x).item(),
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
        "without": {name: measure(rest) for name, measure in WITHOUT.items()},
    }


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
    share = fp4.mean_share(x).item()
    return {
        "mean_share": share,
        "R": math.sqrt(share),
        "alignment": mean_alignment(x),
        "top_explained": top_explained(x),
        **{name: [f(x), f(x - x.mean(0))] for name, f in pairs.items()},
        "massive": massive(x),
    }


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
    return lambda x, block=block: quantize(x, block=block, stochastic=stochastic).dequantize()


def gemms(x, w, d, remedy):
    """Y (T, n), dX (T, m) and dW (n, m) of X (T, m), W (n, m), D (T, n), T a multiple of 16, under
    a recipe's name or a function of REMEDIES. Gradients are rounded stochastically."""
    if callable(remedy):
        near, random, blocks = rounding(), rounding(stochastic=True), rounding((16, 16))
        y, dx = remedy(x, w, near, blocks), remedy(d, w.t(), random, blocks)
        return y, dx, remedy(d.t(), x.t(), random, near)
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = RECIPES[remedy](x, w)
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
        x = x + AddedMean(None, rms).mean(x)
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
        error = RECIPES[recipe](x, w).detach() - y
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
    return [math.sqrt(p / norm) for p in parts] + [dot / math.sqrt(size * norm)]


def gradients(model, layers, ids, targets, recipe):
    """{parameter: gradient of the loss}, with this recipe in every block linear."""
    for layer in layers.values():
        layer.recipe = RECIPES[recipe]
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


def open_model(path, dataset, tokens, device):
    """A checkpoint, a run's folder or a Hugging Face directory: the model in FP32, ids and targets
    (B, T) of about this many tokens of held-out text, evenly spaced, and the means to add: of a
    model that came from elsewhere its own alone."""
    model, origin = load_model(path, device, "fp32")
    _, val = text_for(path, origin, dataset)
    length = min(model.config.block_size, 512, tokens) + 1
    rows = val.batch(val.spaced(max(1, tokens // (length - 1)), length), length).to(device)
    return model, rows[:, :-1], rows[:, 1:], ADDED[:1] if origin["init"] else ADDED


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
    codes, images = {}, {}
    for rms in added:
        y = x + AddedMean(None, rms).mean(x)
        codes[f"{rms:g}"] = [code_shares(y).tolist(), code_shares(y - y.mean(0)).tolist()]
        crop = y[:CROP, first : first + CROP].tolist()
        images[f"{rms:g}"] = {"share": fp4.mean_share(y).item(), "x": crop}
    return {
        "name": path.parent.name if path.name == "checkpoint.pt" else path.name.removesuffix(".pt"),
        "tokens": ids.numel(),
        "linears": linears,
        "first": {n: first_tokens(x, weights[n], ids.shape[1]) for n, (x, _) in tensors.items()},
        "remedies": {f"{rms:g}": remedy_errors(tensors, weights, rms) for rms in added},
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
# Tables, from what --json keeps.


def over_blocks(values):
    """Of one measure in every block: the median, and the least and the largest; or, of pairs, the
    two medians."""
    if isinstance(values[0], list):
        return " → ".join(f"{statistics.median(v):.2g}" for v in zip(*values, strict=True))
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def tables(stage):
    """The printed tables of a stage, in Markdown."""
    kinds, rows = {}, []
    for name, sides in stage["linears"].items():
        for side, measures in sides.items():
            kinds.setdefault((name.split(".", 2)[2], side), []).append(measures)
    names = [n for n in measures if n != "massive"]
    for key, every in kinds.items():
        rows.append((*key, *(over_blocks([m[n] for m in every]) for n in names)))
    yield f"{stage['name']}, {stage['tokens']} tokens: medians over blocks (range), or → centered"
    yield markdown(("linears", "", *(n.replace("_", " ") for n in names)), rows)
    rows = []
    for name, sides in stage["linears"].items():
        if found := sides["X"].get("massive"):
            which = ", ".join(map(str, found["tokens"][:4])) + ", ..." * (len(found["tokens"]) > 4)
            numbers = f"{found['to_median']:.1f}", f"{found['energy']:.3f}"
            pairs = ((sides["X"][n], v) for n, v in found["without"].items())
            pairs = ((a[0] if isinstance(a, list) else a, b) for a, b in pairs)
            rows.append((name, which, *numbers, *(f"{a:.2g} → {b:.2g}" for a, b in pairs)))
    if rows:
        columns = "X of", "massive tokens", "largest norm, medians", "share of the energy"
        without = (n.replace("_", " ") for n in WITHOUT)
        yield "tokens with 4 times the RMS norm: all → without them"
        yield markdown((*columns, *without), rows)
    kinds = {}
    for name, found in stage.get("first", {}).items():
        kinds.setdefault(name.split(".", 2)[2], []).append(found)
    if kinds:
        names = list(found)
        yield "fprop's relative error on the first token of a sequence → on the others, medians"
        rows = [
            (k, *(over_blocks([f[n] for f in every]) for n in names)) for k, every in kinds.items()
        ]
        yield markdown(("linears", "first token's component along the mean", *names[1:]), rows)
    for rms, errors in stage["remedies"].items():
        rows = [(n, *(f"{v:.4f}" for v in e), REMEDIES[n][1]) for n, e in errors.items()]
        yield f"relative error of each GEMM, {TITLES[rms]}"
        yield markdown(("remedy", *COLUMNS, "costs"), rows)
    rows = []
    for recipe, errors in stage["gradients"].items():
        worst = max(stage["linears"], key=lambda n: errors[n][0])
        rows.append((f"`{recipe}`", *(f"{v:.4f}" for v in errors["whole"])))
        rows[-1] += (f"{worst} {errors[worst][0]:.4f}",)
    yield "the whole gradient"
    yield markdown(("recipe", "relative error", "bias", "noise", "cosine", "worst linear"), rows)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="path", help="see above")
    parser.add_argument("--dataset", help="a folder under data/, or a path to one (the run's)")
    parser.add_argument("--tokens", type=number(int, 16), default=2048, help="of that text (2048)")
    parser.add_argument("--seeds", type=number(int, 2), default=4, help="of the rounding (4)")
    parser.add_argument("--json", type=Path, help="keep the numbers there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    args = parser.parse_args(argv)
    path = args.paths[0]
    if path.suffix == ".json":
        if args != parser.parse_args([str(path)]):
            raise UserError(f"{path} holds numbers: it takes no other argument")
        with results(path) as stages:
            print("\n\n".join(tables(stages[-1])))
    else:
        device, stages = World(args.device).device, []
        print(fp4.backend(device), flush=True)
        for path in args.paths:
            stages.append(analyze(path, args.dataset, args.tokens, args.seeds, device))
            shares = [v["X"]["mean_share"] for v in stages[-1]["linears"].values()]
            print(f"{stages[-1]['name']}: mean share {statistics.mean(shares):.3f}", flush=True)
        for stage in stages[:-1]:
            del stage["largest"]
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rounded(stages), separators=(",", ":")) + "\n")
        print("\n\n".join(tables(stages[-1])))


if __name__ == "__main__":
    script(main)
