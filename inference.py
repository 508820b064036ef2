"""Inference in 4 bits: what training measures in every batch, measured once and kept.

In training the mean is that of the batch at hand. For inference that is a burden: a token's result
then depends on its neighbours, and a token that comes alone is its own mean. But texts of one form
have nearly the same mean, so a constant serves. With a stored mean μ, and its direction u = μ/|μ|,

    fp4_mean      Y = R~ W~ᵀ + μ Wᵀ            R = X - μ        μ Wᵀ is a bias: it costs nothing
    fp4_project   Y = R~ W~ᵀ + (X u)(u Wᵀ)     R = X - (X u) u
    fp4           Y = R~ W~ᵀ                   R = X

The tensor scale of R is stored too, and W is rounded once. So a layer's result for a token is its
own, whatever comes with it.
"""

import dataclasses
import sys

import torch
import torch.nn.functional as F

import fp4
from checkpoint import text_for
from experiments.recipes import Variant

VARIANTS = {fp4.linear_fp4: Variant(split="none"), fp4.linear_fp4_mean: Variant()}
WINDOWS, LENGTH = 8, 512  # of training text that `calibrate_on` reads
MARGIN = 2  # times the largest magnitude seen, as larger ones saturate; costs no precision in E4M3


@dataclasses.dataclass(frozen=True)
class Stored:
    """A recipe for one layer (fp4.py), forward only: right (1, m) is the mean or its direction, row
    (1, n) its product with W, both None if nothing is split off; amax () of the residual, FP32; w
    is W in NVFP4, the layer's own is not read again. RuntimeError where a gradient is wanted."""

    project: bool
    right: torch.Tensor | None
    row: torch.Tensor | None
    amax: torch.Tensor
    w: fp4.NVFP4

    def __call__(self, x, w):
        if x.requires_grad or w.requires_grad:
            raise RuntimeError("stored means are for inference. HINT: with torch.no_grad()")
        left, r = residual(x, self.right, self.project)
        r = fp4.quantize(r, amax=self.amax)
        return fp4.ops(x.device).gemm(r, self.w.t(), x.dtype, self.row, left)

    def __repr__(self):
        return "stored"


def residual(x, right, project):
    """x (T, m) as left (T, 1) times right (1, m) plus a residual: left, None for ones, and that."""
    x = x.float()
    if right is None:
        return None, x
    left = x @ right.t() if project else None
    return left, x - (right if left is None else left * right)


def variant_of(recipe):
    """The Variant that a recipe is, if constants can serve for what it splits off, else None."""
    variant = VARIANTS.get(recipe, recipe)
    if not isinstance(variant, Variant) or variant.split == "svd" or variant.mean_format != "fp32":
        return None
    more = variant.massive or variant.stochastic_x or variant.round_mean_weight
    return None if more else variant


@torch.no_grad()
def calibrate(model, batches):
    """Give every FP4Linear of a model, in place and on its device, means and scales of these
    batches: a list of token ids (B, T), of text like that to come. Training is over then. A recipe
    that splits off what no constant can be, such as fp4_svd, stays, and so does a layer that saw
    nothing. Returns how many layers were changed; ValueError for activations that are not finite.
    """
    layers = [m for m in model.modules() if isinstance(m, fp4.FP4Linear) and variant_of(m.recipe)]
    right = {}

    def collect(see):
        """{layer: [see(layer, x), ...]}, x (T, m) its input of a batch."""
        seen = {}

        def look(layer, inputs):
            seen.setdefault(layer, []).append(see(layer, inputs[0].flatten(0, -2).float()))

        hooks = [layer.register_forward_pre_hook(look) for layer in layers]
        for ids in batches:
            model(ids)
        for hook in hooks:
            hook.remove()
        return seen

    def largest(layer, x):
        project = variant_of(layer.recipe).split == "project"
        return residual(x, right[layer], project)[1].abs().amax()

    for layer, sums in collect(lambda _, x: (x.sum(0), len(x))).items():
        total, tokens = (sum(part) for part in zip(*sums, strict=True))
        mean, split = (total / tokens)[None], variant_of(layer.recipe).split
        right[layer] = {"none": None, "mean": mean, "project": F.normalize(mean)}[split]
    for layer, seen in collect(largest).items():
        amax = MARGIN * torch.stack(seen).amax()
        if not amax.isfinite():
            raise ValueError("an activation is not finite: there is no mean to store")
        variant, w, mu = variant_of(layer.recipe), layer.weight.float(), right[layer]
        w_q = fp4.quantize(w, block=(1, 16) if variant.weight_1d else (16, 16))
        row = None if mu is None else mu @ w.t()
        layer.recipe = Stored(variant.split == "project", mu, row, amax, w_q)
    return len(right)


def calibrate_on(path, model, origin, dataset=None):
    """`calibrate` the model that `load_model` made of `path` on training text of a dataset, by
    default the run's own; returns the number of layers changed, UserError if there is no text."""
    if not any(variant_of(m.recipe) for m in model.modules() if isinstance(m, fp4.FP4Linear)):
        return 0
    name, tokens = text_for(path, origin, dataset, "train")
    print(f"FP4: means and scales of {name}, {WINDOWS} x {LENGTH} tokens at most", file=sys.stderr)
    length = min(model.config.block_size, LENGTH)
    windows = tokens.batch(tokens.spaced(WINDOWS, length), length)
    return calibrate(model, windows.to(model.head.weight.device).split(2))
