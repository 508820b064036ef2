"""More recipes for a linear layer, on fp4.py's parts: what `--precision` takes besides its four.

A recipe is a function of X (T, m) and W (n, m) that returns Y (T, n). `Variant` is one with every
choice open; its defaults are fp4_mean, bit for bit. A new recipe is a line in RECIPES, or, where
its GEMMs differ, a function of its own. With `AddedMean` a recipe sees a stronger mean.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import fp4
from nvfp4 import BLOCK, NVFP4, draw_seeds

SIGNS = 1, 1, -1, 1, -1, -1, 1, -1, -1, -1, 1, 1, -1, 1, -1, -1  # of `rotate_tokens`
CHOICES = {
    "split": ("none", "mean", "project", "svd"),
    "mean_format": ("fp32", "bf16", "nvfp4", "nvfp4_sr"),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A recipe: what is split off X and D before they are rounded, and what becomes of that part.

    X = left μ + R and D = left ν + S; for a mean, left is a column of ones. ValueError for
    choices that make no sense together."""

    split: str = "mean"  # none, mean, project or svd: see `split_off`; D is never projected
    massive: bool = False  # tokens of X with 4 times the RMS norm multiply the unrounded W
    split_grad: bool = True  # of X and D; else of X alone
    mean_format: str = "fp32"  # of μ and ν: fp32, bf16, nvfp4 (μ to nearest) or nvfp4_sr
    round_mean_weight: bool = False  # multiply them with the rounded W instead of W
    cross_terms: bool = False  # wgrad's mixed terms; zero for means before rounding, noise after
    hadamard: bool = False  # rotate both operands of wgrad along tokens first
    headroom: bool = False  # unbiased stochastic rounding, see `quantize`
    stochastic_x: bool = False  # round X stochastically too
    weight_1d: bool = False  # W in blocks of 16 along the contraction axis, other ones in dgrad

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {choices}")
        both = self.split in ("mean", "svd") and self.split_grad
        if self.cross_terms and (not both or self.hadamard or self.massive):
            raise ValueError(
                "cross_terms need X and D split alike, no rotation and no massive tokens: drop one"
            )

    def __call__(self, x, w):
        return _LinearVariant.apply(x, w, self)


RECIPES = fp4.RECIPES | {
    # arXiv 2603.10444, Eqs. 11 and 12 to the letter
    "fp4_mean_paper": Variant(mean_format="nvfp4", round_mean_weight=True, cross_terms=True),
    "fp4_hadamard": Variant(split="none", hadamard=True),  # arXiv 2509.25149
    "fp4_mean_hadamard": Variant(hadamard=True),
    "fp4_svd": Variant(split="svd", cross_terms=True),
    # what a real model needs beyond its mean
    "fp4_project": Variant(split="project"),
    "fp4_project_1d": Variant(split="project", weight_1d=True),
    "fp4_project_massive": Variant(split="project", massive=True),
    "fp4_mean_massive": Variant(massive=True),
    "fp4_1d": Variant(split="none", weight_1d=True),
    "fp4_svd_1d": Variant(split="svd", cross_terms=True, weight_1d=True),
    # fp4_mean with one choice changed: the ablations of compare.py
    "fp4_mean_row_bf16": Variant(mean_format="bf16"),
    "fp4_mean_row_fp4": Variant(mean_format="nvfp4"),
    "fp4_mean_row_fp4_sr": Variant(mean_format="nvfp4_sr"),
    "fp4_mean_row_weight": Variant(round_mean_weight=True),
    "fp4_mean_cross": Variant(cross_terms=True),
    "fp4_mean_x": Variant(split_grad=False),
    "fp4_mean_headroom": Variant(headroom=True),
    "fp4_mean_sr": Variant(stochastic_x=True),
    "fp4_mean_1d": Variant(weight_1d=True),
}


def massive_tokens(x):
    """(k,) the tokens of x (T, m) with more than 4 times the RMS norm."""
    energy = x.float().square().sum(1)
    return (energy > 16 * energy.mean()).nonzero().flatten()


def split_off(x, split, without=None):
    """x (T, m) as left (T, 1) times right (1, m) plus a residual (T, m), FP32: the three of them.
    without (k,): tokens that count as absent, zero in left and residual.

    none: left and right are None. mean: left is all ones, right the mean over tokens. project:
    right is the mean's direction, a unit row, and left the tokens' components along it. Of these
    two the residual's columns add up to zero. svd: the leading singular direction, by power
    iteration from the longest row."""
    x = x.float()
    present = x.new_ones(1, 1).expand(len(x), 1)  # no memory, like those of the core
    if without is not None:
        x, present = x.index_fill(0, without, 0), present.index_fill(0, without, 0)
    if split == "none":
        return None, None, x
    if split == "mean":
        right = x.sum(0, keepdim=True) / present.sum()
        return present, right, x - present * right
    if split == "project":
        right = F.normalize(x.sum(0, keepdim=True))
    else:
        right = x[x.square().sum(1).argmax()][None]
        for _ in range(8):
            right = F.normalize((x @ right.t()).t() @ x)
    left = x @ right.t()
    return left, right, x - left * right


def rotate_tokens(x):
    """x (T, m) -> (T padded to 16, m): every 16 tokens times one orthonormal Hadamard matrix with a
    fixed random sign per column (arXiv 2509.25149), in four rounds of sums and differences of
    neighbours. Both operands of wgrad get it, so it cancels in their product."""
    rows = F.pad(x, (0, 0, 0, -len(x) % BLOCK)).unflatten(0, (-1, BLOCK)).unbind(1)
    rows = [sign * row for sign, row in zip(SIGNS, rows, strict=True)]
    for _ in range(4):
        pairs = list(zip(rows[0::2], rows[1::2], strict=True))
        rows = [a + b for a, b in pairs] + [a - b for a, b in pairs]
    return (torch.stack(rows, 1) * 0.25).flatten(0, 1)


def _split_quantize(x, variant, split, rowwise, columnwise, seeds, without=None):
    """x (T, m) as left (T, 1), right (1, m), and the residual in NVFP4 by row and by column, each
    None where not wanted. seeds int32 (2,): round stochastically. without: see `split_off`."""
    center_quantize = fp4.ops(x.device).center_quantize
    noise = seeds, variant.headroom
    if split in ("none", "mean") and not variant.hadamard and without is None:
        mean, row, column = center_quantize(x, split == "mean", rowwise, columnwise, *noise)
        left = None if mean is None else mean.new_ones(1, 1).expand(len(x), 1)
        return left, mean, row, column
    left, right, r = split_off(x, split, without)
    row = center_quantize(r, False, True, False, *noise)[1] if rowwise else None
    r = rotate_tokens(r) if variant.hadamard else r
    column = center_quantize(r, False, False, True, *noise)[2] if columnwise else None
    return left, right, row, column


def _round_mean(mean, variant, seed):
    """A mean (1, m), FP32, as its own path sees it; seed None: to nearest."""
    if variant.mean_format == "fp32":
        return mean
    if variant.mean_format == "bf16":
        return fp4._bf16(mean).float()
    noise = {} if seed is None else {"stochastic": True, "headroom": variant.headroom, "seed": seed}
    return fp4.quantize(mean, **noise).dequantize()


class _LinearVariant(torch.autograd.Function):
    """fp4._LinearFP4 with the choices of a Variant."""

    @staticmethod
    def forward(ctx, x, w, variant):  # x (T, m), w (n, m)
        need_dx, need_dw, _ = ctx.needs_input_grad
        f, noisy_mean = fp4.ops(x.device), variant.mean_format == "nvfp4_sr"
        seeds = draw_seeds(3, x.device) if variant.stochastic_x or noisy_mean else None
        noise = seeds[:2] if variant.stochastic_x else None
        massive = massive_tokens(x) if variant.massive else None
        left, mu, r, r_col = _split_quantize(
            x, variant, variant.split, True, need_dw, noise, massive
        )
        if variant.weight_1d:
            _, w_q, w_col = f.center_quantize(w, False, columnwise=need_dx)
        else:
            w_q = w_col = f.quantize_weight(w)

        # ------------ fprop: Y (T, n) = left (μ Wᵀ) + R~ W~ᵀ ------------
        row = None
        if mu is not None:
            mu = _round_mean(mu, variant, seeds[2] if noisy_mean else None)
            row = mu @ (w_q.dequantize() if variant.round_mean_weight else w.float()).t()
        y = f.gemm(r, w_q.t(), x.dtype, row, left)
        if variant.massive:
            exact = x[massive].float()
            y[massive] = (exact @ w.float().t()).to(y.dtype)

        for_dx = (
            (w if mu is not None else None, *w_col.tensors(), w_col.codes_col) if need_dx else ()
        )
        for_massive = (massive, exact) if variant.massive else (None, None)
        for_dw = (*for_massive, left, mu, *r_col.tensors()) if need_dw else ()
        ctx.save_for_backward(*for_dx, *for_dw)
        ctx.variant, ctx.dtype, ctx.block = variant, w.dtype, w_col and w_col.block
        ctx.rows = r_col.rows if need_dw else 0
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d):  # (T, n)
        need_dx, need_dw, _ = ctx.needs_input_grad
        variant, saved, dx, dw = ctx.variant, ctx.saved_tensors, None, None
        f, seeds = fp4.ops(d.device), draw_seeds(3, d.device)
        split = variant.split if variant.split_grad else "none"
        split = "mean" if split == "project" else split
        left, nu, s, s_col = _split_quantize(d, variant, split, need_dx, need_dw, seeds[:2])
        nu = None if nu is None else _round_mean(nu, variant, seeds[2])

        # ------------ dgrad: dX (T, m) = left (ν W) + S~ W~ ------------
        if need_dx:
            w, *w_col, codes_col = saved[:5]
            w_col = NVFP4(*w_col, block=ctx.block, rows=d.shape[1], codes_col=codes_col)
            row = None
            if nu is not None:
                row = nu @ (w_col.dequantize() if variant.round_mean_weight else w.float())
            dx = f.gemm(s, w_col, d.dtype, row, left)

        # ------------ wgrad: dW (n, m) = νᵀ (left_dᵀ left_x) μ + S~ᵀ R~ ------------
        if need_dw:
            massive, exact, left_x, mu, *r_col = saved[-7:]
            r_col, outer = NVFP4(*r_col, block=(16, 1), rows=ctx.rows), None
            if mu is not None and (nu is None or variant.split == "project" or variant.massive):
                outer = d.float().t() @ left_x  # in full, with its part of the cross terms
            elif mu is not None:
                outer = nu.t() * (len(d) if split == "mean" else (left * left_x).sum())
            dw = f.gemm(s_col.t(), r_col, mu.dtype if variant.cross_terms else ctx.dtype, mu, outer)
            if variant.cross_terms:  # νᵀ (left_dᵀ R~) + (S~ᵀ left_x) μ
                dw.addmm_(nu.t(), left.t() @ r_col.dequantize())
                dw = dw.addmm_(s_col.t().dequantize() @ left_x, mu).to(ctx.dtype)
            if variant.massive:
                dw = dw + (d[massive].float().t() @ exact).to(dw.dtype)
        return dx, dw, None


# ------------------------------------------------------------------------------------------------
# The causal test: a mean as strong as we like.


@functools.cache
def _direction(features, device):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, generator=generator).to(device)


@dataclasses.dataclass(frozen=True)
class AddedMean:
    """A recipe that sees X with a mean added: a fixed random row of `rms` times the RMS of X, whose
    product with W is taken off the output. In exact arithmetic nothing changes, neither the output
    nor a gradient; what changes is what a mean of this strength does to the rounding."""

    recipe: object
    rms: float

    def mean(self, x):
        """What is added to every token of x (T, m): (m,), FP32, a constant to the gradient."""
        size = x.detach().float().square().mean().sqrt()
        return self.rms * size * _direction(x.shape[1], x.device).to(size.dtype)

    def __call__(self, x, w):
        mean = self.mean(x)
        return (self.recipe(x + mean, w) - F.linear(mean, w.float())).to(x.dtype)


def recipe_of(precision, added_mean=0.0):
    """The recipe of a name in RECIPES; where it rounds to NVFP4, with a mean of this many RMS
    added."""
    recipe = RECIPES[precision]
    return AddedMean(recipe, added_mean) if added_mean and precision.startswith("fp4") else recipe
