"""More recipes for a linear layer, on fp4.py's parts: what --precision takes besides fp4's four.

`Variant` is a recipe with every choice open; its defaults are fp4_mean, bit for bit. A new recipe
is a line in VARIANTS, or, where its GEMMs differ, an autograd Function of its own in fp4.RECIPES. A
name begins with fp4 if the recipe rounds to NVFP4. The recipes that end in _plus4 and _plus8 see X
with a strong mean added, which the rounding feels and nothing else.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import fp4
from experiments.project import project_quantize

SIGNS = 1, 1, -1, 1, -1, -1, 1, -1, -1, -1, 1, 1, -1, 1, -1, -1  # of `rotate_tokens`
SPLITS = "none", "mean", "project", "svd"
MEAN_FORMATS = "fp32", "bf16", "nvfp4", "nvfp4_sr"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A recipe: what is split off X and D before they are rounded, and what becomes of that part.

        X = left μ + R      D = left ν + S

    For a mean, left is the column of ones. ValueError for choices that make no sense together."""

    split: str = "mean"  # none, mean, project or svd, see `split_off`; D is never projected
    directions: int = 1  # of a projection: μ's direction, and the leading ones of the rest
    massive: bool = False  # tokens of X with 4 times the RMS norm multiply the unrounded W
    split_grad: bool = True  # split D too, not X alone
    mean_format: str = "fp32"  # of μ and ν: fp32, bf16, nvfp4 (μ to nearest) or nvfp4_sr
    round_mean_weight: bool = False  # μ and ν multiply W~ instead of W
    cross_terms: bool = False  # wgrad's mixed terms; zero for means before rounding, noise after
    hadamard: bool = False  # rotate both operands of wgrad along tokens first
    headroom: bool = False  # unbiased stochastic rounding, see `quantize`
    four_over_six: bool = False  # of rounding to nearest, see `four_over_six`
    stochastic_x: bool = False  # round X stochastically too
    weight_1d: bool = False  # W in blocks of 16 along the contraction, other ones in dgrad

    def __post_init__(self):
        if self.split not in SPLITS or self.mean_format not in MEAN_FORMATS:
            raise ValueError(f"{self}: split is one of {SPLITS}, mean_format of {MEAN_FORMATS}")
        split_alike = self.split in ("mean", "svd") and self.split_grad
        if self.cross_terms and (not split_alike or self.hadamard or self.massive):
            raise ValueError(f"{self}: cross_terms need X and D split alike, and nothing else")
        if self.four_over_six and not self.weight_1d:
            raise ValueError(f"{self}: four_over_six needs weight_1d")

    @property
    def projects(self):
        """Whether X is split by `project_quantize`, where left is exact in BF16."""
        more = self.directions > 1 or self.massive or self.hadamard
        return self.split == "project" and not (more or self.stochastic_x or self.four_over_six)


# ------------------------------------------------------------------------------------------------
# The parts of a Variant.


def draw_seeds(device):
    """Seeds of two stochastic roundings, int32 (2,), as fp4.LinearFP4 draws them."""
    return torch.randint(2**31 - 1, (2,), dtype=torch.int32, device=device)


def massive_tokens(x):
    """The numbers (k,) of the tokens of x (T, m) that have more than 4 times the RMS norm."""
    energy = x.float().square().sum(1)
    return (energy > 16 * energy.mean()).nonzero().flatten()


def split_off(x, split, massive=None, directions=1):
    """x (T, m) as left (T, k) times right (k, m) plus a residual (T, m), all FP32.

    none      left and right are None
    mean      left is all ones, right the mean over tokens
    project   right is the mean's direction, a unit row, below it the k - 1 leading directions of
              the rest, and left the tokens' components along them
    svd       right is the leading singular direction, by power iteration from the longest row

    The columns of the residual add up to zero after mean and project. massive (k,): tokens that
    count as absent, with zeros in left and in the residual."""
    x = x.float()
    present = x.new_ones(len(x), 1)
    if massive is not None:
        x = x.index_fill(0, massive, 0)
        present = present.index_fill(0, massive, 0)
    if split == "none":
        return None, None, x
    if split == "mean":
        right = x.sum(0, keepdim=True) / present.sum()
        return present, right, x - present * right
    if split == "project":
        right = F.normalize(x.sum(0, keepdim=True))
        if directions > 1:
            right = torch.cat((right, leading_directions(x, right, directions - 1)))
    else:
        right = x[x.square().sum(1).argmax()][None]
        for _ in range(8):
            right = F.normalize(fp4.mm(fp4.mm(x, right.t()).t(), x))
    left = fp4.mm(x, right.t())
    return left, right, add_product(x, left, right, -1)


def add_product(x, left, right, sign=1):
    """x plus or minus left times right, all FP32, in one pass; not under torch.autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.addmm(x, left, right, alpha=sign)


def leading_directions(x, mean, k):
    """Nearly the k leading right singular vectors of what x (T, m) has beside a direction, mean
    (1, m): orthonormal rows (k, m), orthogonal to it too, by two subspace iterations from random
    rows, always the same."""

    def orthonormal(columns):
        return torch.linalg.qr(torch.cat((mean.t(), columns), 1)).Q[:, 1:]

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape[1], k, generator=generator, dtype=torch.float32)
    columns = orthonormal(start.to(x.device))
    for _ in range(2):
        columns = orthonormal(fp4.mm(x.t(), fp4.mm(x, columns)))
    return columns.t()


def rotate_tokens(x):
    """x (T, m) -> (T padded to 16, m): every 16 tokens times an orthonormal Hadamard matrix whose
    columns have fixed random signs (arXiv 2509.25149). Both operands of wgrad get it, so it cancels
    in their product. The matrix is four rounds of sums and differences of neighbours."""
    tokens = F.pad(x, (0, 0, 0, -len(x) % 16)).unflatten(0, (-1, 16)).unbind(1)
    tokens = [sign * token for sign, token in zip(SIGNS, tokens, strict=True)]
    for _ in range(4):
        pairs = list(zip(tokens[0::2], tokens[1::2], strict=True))
        tokens = [a + b for a, b in pairs] + [a - b for a, b in pairs]
    return (torch.stack(tokens, 1) * 0.25).flatten(0, 1)


def quantize(x, block, variant, seed=None):
    """fp4.quantize with two more choices. In plain PyTorch on every device, as the kernels do not
    know them. x is FP32.

    headroom        stochastic rounding is right on average: block scales are 17/16 times as large.
                    E4M3 rounds a scale down by 1/17 of it at most, so no value comes out above 6
                    and saturates
    four_over_six   a block's largest value becomes 6 or 4, see `four_over_six`"""
    x = F.pad(x, (0, 0, 0, -len(x) % block[0]))
    amaxes, numbers = fp4.block_amaxes(x, block)
    amax = numbers.amax()
    if variant.headroom and seed is not None:
        amaxes = amaxes * (17 / 16)
    if variant.four_over_six and seed is None:
        amax = amax * (448 / 256)  # block scales up to 256: half as large again they fit in E4M3
        amaxes = four_over_six(x, block, amaxes, amax)
    return fp4.quantize_scaled(x, block, amaxes, amax, seed)


def four_over_six(x, block, amaxes, amax):
    """The amaxes to scale blocks by, half as large again where x is rounded better so: then the
    block's largest value becomes 4, not 6, and the values below it can be 3/4 of it, where they had
    2/3 and 1 (arXiv 2512.02010). Better: by the sum of squared errors."""
    _, s_enc, s_dec = fp4.tensor_scales(amax)
    errors = []
    for factor in (1.0, 1.5):
        scales, factors = fp4.block_scales((amaxes * factor).flatten(), s_enc, s_dec)
        codes = fp4.encode(x, factors.view_as(amaxes), block, None).view(x.shape)
        error = fp4.decode(codes, scales.view_as(amaxes) * s_dec, block) - fp4.in_blocks(x, block)
        errors.append(error.square().sum(fp4.BLOCKS[block], keepdim=True))
    return torch.where(errors[1] < errors[0], 1.5 * amaxes, amaxes)


def split_quantize(x, variant, split, rowwise, columnwise, seeds, massive=None):
    """fp4.center_quantize with a Variant's choices. Of x (T, m)

    left, right   (T, k) and (k, m), FP32, or None: see `split_off`
    r             the residual in NVFP4 (T, m), in blocks along features
    r_t           its transpose (m, T), in blocks along tokens"""
    if split == "project" and variant.projects:
        return project_quantize(x, rowwise, columnwise)
    changed = variant.hadamard or massive is not None or rounds_otherwise(variant, seeds)
    if split in ("none", "mean") and not changed:
        mean, r, r_t = fp4.center_quantize(x, split == "mean", rowwise, columnwise, seeds)
        left = None if mean is None else mean.new_ones(len(x), 1)
        return left, mean, r, r_t

    left, right, residual = split_off(x, split, massive, variant.directions)
    along_tokens = rotate_tokens(residual) if variant.hadamard else residual
    r, r_t = quantize_both(residual, along_tokens, variant, rowwise, columnwise, seeds)
    return left, right, r, r_t


def rounds_otherwise(variant, seeds):
    """Whether `quantize`, with seeds or without, differs from fp4.quantize."""
    return variant.four_over_six if seeds is None else variant.headroom


def quantize_both(x, along_tokens, variant, rowwise, columnwise, seeds):
    """x in blocks along features, and the transpose of along_tokens in blocks along tokens: NVFP4,
    or None where not wanted."""
    if not rounds_otherwise(variant, seeds) and along_tokens is x:
        return fp4.center_quantize(x, False, rowwise, columnwise, seeds)[1:]
    if not rounds_otherwise(variant, seeds):
        _, r, _ = fp4.center_quantize(x, False, rowwise, False, seeds)
        _, _, r_t = fp4.center_quantize(along_tokens, False, False, columnwise, seeds)
        return r, r_t
    row_seed, column_seed = (None, None) if seeds is None else seeds
    r = quantize(x.float(), (1, 16), variant, row_seed) if rowwise else None
    if not columnwise:
        return r, None
    return r, quantize(along_tokens.float(), (16, 1), variant, column_seed).t()


def quantize_weight(w, variant, need_dx):
    """w (n, m) in NVFP4 for fprop, and for dgrad, if it is needed, its transpose."""
    if not variant.weight_1d:
        return fp4.quantize_weight(w)
    return quantize_both(w, w, variant, True, need_dx, None)


def round_mean(mean, mean_format, stochastic):
    """A mean (1, m), FP32, as its own products see it, FP32 again."""
    if mean is None or mean_format == "fp32":
        return mean
    if mean_format == "bf16":
        return fp4.to_dtype(mean, torch.bfloat16).float()
    seed = None
    if stochastic:
        seed = torch.randint(2**31 - 1, (), dtype=torch.int32, device=mean.device)
    return fp4.quantize(mean, seed=seed).dequantize()


def times_weight(mean, w, w_q, variant):
    """The part of a GEMM that was split off: mean (k, m) times Wᵀ, of w or of its rounded w_q
    (n, m)."""
    if mean is None:
        return None
    if variant.round_mean_weight:
        w = w_q.dequantize()
    return fp4.mm(mean, w.float().t())


def gemm(a, b, dtype, left, right):
    """fp4.gemm for left (M, k) and right (k, N) of any k."""
    if right is None or len(right) == 1:
        return fp4.gemm(a, b, dtype, left, right)
    return add_product(fp4.gemm(a, b, torch.float32), left, right).to(dtype)


class LinearVariant(torch.autograd.Function):
    """fp4.LinearFP4 with the choices of a Variant."""

    @staticmethod
    def forward(ctx, x, w, variant):  # x (T, m), w (n, m)
        need_dx, need_dw, _ = ctx.needs_input_grad
        seeds = draw_seeds(x.device) if variant.stochastic_x else None
        massive = massive_tokens(x) if variant.massive else None
        left, mu, r, r_t = split_quantize(x, variant, variant.split, True, need_dw, seeds, massive)
        mu = round_mean(mu, variant.mean_format, stochastic=variant.mean_format == "nvfp4_sr")
        w_q, w_t = quantize_weight(w, variant, need_dx)

        # ------------ fprop: Y (T, n) = left (μ Wᵀ) + R~ W~ᵀ ------------
        y = gemm(r, w_q, x.dtype, left, times_weight(mu, w, w_q, variant))
        x_massive = None
        if variant.massive:
            x_massive = x[massive].float()
            y[massive] = fp4.mm(x_massive, w.float().t()).to(y.dtype)

        saved_w = w_t.tensors() if need_dx else (None, None, None)
        saved_r = r_t.tensors() if need_dw else (None, None, None)
        ctx.save_for_backward(w, *saved_w, left, mu, *saved_r, massive, x_massive)
        ctx.variant = variant
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d):  # (T, n)
        need_dx, need_dw, _ = ctx.needs_input_grad
        w, w_codes, w_scales, w_scale, left_x, mu, *saved_x = ctx.saved_tensors
        r_codes, r_scales, r_scale, massive, x_massive = saved_x
        variant = ctx.variant
        split = variant.split if variant.split_grad else "none"
        split = "mean" if split == "project" else split
        seeds = draw_seeds(d.device)
        left_d, nu, s, s_t = split_quantize(d, variant, split, need_dx, need_dw, seeds)
        nu = round_mean(nu, variant.mean_format, stochastic=True)
        dx = dw = None

        # ------------ dgrad: dX (T, m) = left (ν W) + S~ W~ ------------
        if need_dx:
            block = (1, 16) if variant.weight_1d else (16, 16)
            w_t = fp4.NVFP4(w_codes, w_scales, w_scale, block)  # W~ᵀ, (m, n)
            dx = fp4.gemm(s, w_t, d.dtype, left_d, times_weight(nu, w.t(), w_t, variant))

        # ------------ wgrad: dW (n, m) = νᵀ (left_dᵀ left_x) μ + S~ᵀ R~ ------------
        if need_dw:
            r_t = fp4.NVFP4(r_codes, r_scales, r_scale, (1, 16))  # Rᵀ~, (m, T)
            column = None
            if mu is not None and (nu is None or variant.split == "project" or variant.massive):
                # in full, with its part of the cross terms
                bf16 = variant.projects and d.dtype == torch.bfloat16
                column = fp4.mm(d.t(), left_x.bfloat16() if bf16 else left_x)
            elif mu is not None:
                column = nu.t() * (left_d * left_x).sum()  # (n, 1)
            dtype = torch.float32 if variant.cross_terms else w.dtype
            dw = gemm(s_t, r_t, dtype, column, mu)
            if variant.cross_terms:  # νᵀ (left_dᵀ R~) + (S~ᵀ left_x) μ
                r_sums = fp4.mm(r_t.dequantize()[:, : len(d)], left_d)  # (m, 1)
                s_sums = fp4.mm(s_t.dequantize()[:, : len(d)], left_x)  # (n, 1)
                dw = (dw + nu.t() * r_sums.t() + s_sums * mu).to(w.dtype)
            if variant.massive:
                dw = dw + fp4.mm(d[massive].float().t(), x_massive).to(dw.dtype)
        return dx, dw, None


# ------------------------------------------------------------------------------------------------
# What the paper's authors ran, read from code that is inferred to be theirs
# (github.com/sii-research/Metis, commit 3c2e72e, Metis/bitlinear.py and quant.py).


class LinearAuthors(torch.autograd.Function):
    """Each of X, W and D is rounded once, with center X and D around their means, and these numbers
    meet in all three GEMMs. So the means meet W~, wgrad has all four terms, and in dgrad and wgrad
    blocks lie across the contraction: no FP4 tensor core can run this."""

    @staticmethod
    def forward(ctx, x, w, center):  # x (T, m), w (n, m)
        x_q, w_q = round_as_authors(x, center), round_as_authors(w)
        ctx.save_for_backward(x_q, w_q)
        ctx.center, ctx.dtype = center, w.dtype
        return fp4.mm(x_q, w_q.t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):  # (T, n)
        x_q, w_q = ctx.saved_tensors
        d_q = round_as_authors(d, ctx.center, draw_seeds(d.device)[0])
        return fp4.mm(d_q, w_q).to(d.dtype), fp4.mm(d_q.t(), x_q).to(ctx.dtype), None


def round_as_authors(x, center=False, seed=None):
    """x (R, C) as its mean plus a residual in 4 bits, FP32, in blocks of 16 along C. Codes are of
    scales in FP32, and decoded with scales rounded to E4M3, of which the largest is 448."""
    x, block = x.float(), (1, 16)
    mean = x.mean(0, keepdim=True) if center else torch.zeros_like(x[:1])
    amaxes, _ = fp4.block_amaxes(x - mean, block)
    scales = amaxes / 6 + 1e-9
    key = None if seed is None else fp4.hash32(seed)
    codes = fp4.encode(x - mean, 1 / scales, block, key).view(x.shape)
    unit = scales.max() / 448
    return mean + fp4.decode(codes, fp4.e4m3_round(scales / unit) * unit, block).view(x.shape)


class LowRankBranch(nn.Module):
    """U (s * (V x)) + layer(x). The leading singular part U s V of the layer's W is split off once,
    when this module is made, and trains in full precision beside the rest."""

    def __init__(self, layer, rank=16):
        super().__init__()
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        self.u, self.s = nn.Parameter(u[:, :rank].contiguous()), nn.Parameter(s[:rank].clone())
        self.v = nn.Parameter(v[:rank].contiguous())
        self.layer = layer
        with torch.no_grad():
            layer.weight -= (self.u * self.s) @ self.v

    def forward(self, x):
        return F.linear(F.linear(x, self.v) * self.s, self.u) + self.layer(x)


def add_branches(model, rank=16):
    """A LowRankBranch around every FP4Linear of a model, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, fp4.FP4Linear):
                setattr(parent, name, LowRankBranch(child, rank))


# ------------------------------------------------------------------------------------------------
# The causal test: a mean as strong as we like.


def added_mean(x, rms):
    """A fixed random row (m,), FP32, of `rms` times the RMS of x (T, m), a constant to the
    gradient."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape[1], dtype=torch.float32, generator=generator).to(x.device)
    return rms * x.detach().float().square().mean().sqrt() * direction


class LinearAddedMean:
    """A recipe that sees X with a mean added, whose product with W is taken off the output. In
    exact arithmetic nothing changes, neither the output nor a gradient; what changes is what a mean
    of this strength does to the rounding. The product is elementwise, which autocast leaves
    alone."""

    @staticmethod
    def apply(x, w, argument):
        recipe, rms = argument
        mean = added_mean(x, rms)
        return (fp4.linear(x + mean, w, recipe) - (w.float() * mean).sum(1)).to(x.dtype)


# ------------------------------------------------------------------------------------------------

VARIANTS = {
    # arXiv 2603.10444, Eqs. 11 and 12 to the letter
    "fp4_mean_paper": Variant(mean_format="nvfp4", round_mean_weight=True, cross_terms=True),
    "fp4_hadamard": Variant(split="none", hadamard=True),  # arXiv 2509.25149
    "fp4_mean_hadamard": Variant(hadamard=True),
    "fp4_svd": Variant(split="svd", cross_terms=True),
    # what a real model needs beyond its mean
    "fp4_project": Variant(split="project"),
    "fp4_project_1d": Variant(split="project", weight_1d=True),
    "fp4_lowrank": Variant(split="project", directions=48, weight_1d=True),
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
for k in (2, 4, 8, 16, 32, 64):
    VARIANTS[f"fp4_project{k}_1d"] = dataclasses.replace(VARIANTS["fp4_lowrank"], directions=k)
for name in ("fp4_project_1d", "fp4_project16_1d", "fp4_project32_1d"):
    VARIANTS[f"{name}_46"] = dataclasses.replace(VARIANTS[name], four_over_six=True)
fp4.RECIPES |= {name: (LinearVariant, variant) for name, variant in VARIANTS.items()}
fp4.RECIPES |= {"fp4_authors": (LinearAuthors, False), "fp4_authors_mean": (LinearAuthors, True)}

# A mean is added in these recipes, by so many RMS: added_mean and ablations of compare.py.
ADDED = dict.fromkeys(("fp4", "fp4_mean", "fp4_mean_paper", "fp4_hadamard", "fp4_svd"), (4, 8))
ADDED |= {f"fp4_mean_row_{path}": (4,) for path in ("bf16", "fp4", "fp4_sr", "weight")}
ADDED |= {"fp4_mean_cross": (4,), "fp4_mean_x": (4,)}
for name, strengths in ADDED.items():
    for rms in strengths:
        fp4.RECIPES[f"{name}_plus{rms}"] = LinearAddedMean, (name, rms)
