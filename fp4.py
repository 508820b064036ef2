"""The mean-centered linear layer in NVFP4, the heart of this repository. nvfp4.py has the format.

A linear layer is three matrix products (GEMMs). X is the input, T tokens by m features; W the
weight, n by m; D = dL/dY the gradient of the output, T by n; ᵀ is the transpose:

    fprop   Y  = X Wᵀ       contracts over features
    dgrad   dX = D W        contracts over output features
    wgrad   dW = Dᵀ X       contracts over tokens

NVFP4 stores an operand of such a product in 4.5 bits a value (arXiv 2509.25149, section 2):

    value          E2M1: sign, 2 exponent bits, 1 mantissa bit: 0 .5 1 1.5 2 3 4 6 and negatives
    block scale    E4M3, one for 16 neighbouring values along the axis that the GEMM contracts
    tensor scale   FP32, one per tensor, such that the largest block scale is 448, E4M3's maximum

So one large value costs its 15 neighbours their resolution. The activations of all tokens share a
component, their mean, and in large models it is reported to be large (arXiv 2603.10444). A feature
with a large mean sets the scale of its block in every row, and what tells tokens apart is rounded
coarsely. The remedy is one subtraction. With μ the mean
of X over its tokens, ν the mean of D, both rows, and 1 the column of T ones,

    X = 1 μ + R      D = 1 ν + S

    fprop   Y  = 1 (μ Wᵀ) + R~ W~ᵀ          ~ is "rounded to NVFP4"
    dgrad   dX = 1 (ν W)  + S~ W~
    wgrad   dW = T νᵀ μ   + S~ᵀ R~

Of X and D only the residuals R and S are rounded. Their columns add up to zero, so wgrad's cross
terms νᵀ (1ᵀ R) and (Sᵀ 1) μ are zero; rounded they would be noise, and are left out. The means stay
in FP32. In fprop and dgrad they meet the unrounded W, in a matrix-vector product: 1/T of the work
of the GEMM. There precision is cheap, and it counts: an error in a mean is the same for every token
and does not average out.

Blocks and rounding follow NVIDIA's recipe (arXiv 2509.25149), without its Hadamard transform. W is
rounded in 16 x 16 blocks, so that fprop and dgrad see the same numbers. For wgrad, which contracts
over tokens, X and D are rounded a second time, from the unrounded values, with blocks along tokens.
Gradients are rounded stochastically, all else to nearest. To backward, rounding is the identity.

On hardware without FP4 units this is emulated, exactly: E2M1 times E4M3 has at most 6 significant
bits and so fits BF16. A BF16 product with FP32 accumulation over such values, times the two tensor
scales at the end, is NVFP4 arithmetic up to the order of the FP32 sums. It cannot be faster than
BF16; FP4 tensor cores can. On a GPU kernels.py takes over, bit for bit, given the same mean.
"""

import importlib.util
import os
import sys

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nvfp4 import BLOCK, NVFP4, draw_seeds, fuse, quantize

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels.py on a CPU, to test it
KERNEL_DEVICES = {"cuda"} if torch.version.cuda else set()
KERNEL_DEVICES |= {"cpu"} if INTERPRET else set()
if KERNEL_DEVICES and importlib.util.find_spec("triton"):
    import kernels
else:
    KERNEL_DEVICES = set()

# ------------------------------------------------------------------------------------------------
# What a linear layer needs: three functions, here in plain PyTorch and in kernels.py in Triton.


def center_quantize(x, center, rowwise=True, columnwise=True, seeds=None, headroom=False):
    """x (T, m), less its mean over tokens if center is set, in NVFP4. Three results, None where not
    wanted:

    mean        (1, m), FP32
    rowwise     (T, m) in 1 x 16 blocks
    columnwise  (T, m) in 16 x 1 blocks, along tokens

    seeds: int32 (2,), one each, to round stochastically; None: to nearest. headroom: see
    `quantize`, of stochastic rounding alone."""
    x = x.float()
    mean = x.mean(0, keepdim=True) if center else None
    x = x - mean if center else x
    options = [{}, {}]
    if seeds is not None:
        options = [{"stochastic": True, "seed": seed, "headroom": headroom} for seed in seeds]
    row = quantize(x, **options[0]) if rowwise else None
    column = quantize(x, block=(16, 1), **options[1]) if columnwise else None
    return mean, row, column


def quantize_weight(w):
    """w (n, m) in NVFP4, in 16 x 16 blocks: the same numbers along either axis."""
    return quantize(w, block=(16, 16))


def gemm(a, b, dtype, row=None, column=None):
    """a b + column row, (M, N) in dtype, of NVFP4 a (M, K) and b (K, N), row (1, N) and column
    (M, 1), ones by default; without a row no such term. Accumulated in FP32."""
    y = _mm(a.values(), b.values()).mul_(a.tensor_scale * b.tensor_scale)
    if row is not None:
        y = y.add_(row) if column is None else y.addcmul_(column, row)
    return y.to(dtype)


def ops(device):
    """The module whose three functions run on a torch.device: kernels.py, or this one."""
    return kernels if device.type in KERNEL_DEVICES else sys.modules[__name__]


def backend(device):
    """Make FP4 fast on a torch.device; returns a line that says what runs there."""
    if device.type in KERNEL_DEVICES:
        return f"FP4: {kernels.backend()}"
    return fuse() if device.type == "cpu" else "FP4: plain PyTorch, slow, for want of Triton"


# ------------------------------------------------------------------------------------------------
# The linear layer. A recipe is a function of X (T, m) and W (n, m) that returns Y (T, n).


def _bf16(x):
    return x.bfloat16()


def _mm(a, b):
    """a @ b of operands exact in BF16, FP32 accumulation and result. On a CPU the arithmetic is
    FP32: the same products, and 300 times faster where the CPU has no BF16 units."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _LinearBF16(torch.autograd.Function):
    """The three GEMMs with BF16 operands: the baseline."""

    @staticmethod
    def forward(ctx, x, w):  # x (T, m), w (n, m)
        need_dx, need_dw = ctx.needs_input_grad
        x_b, w_b = _bf16(x), _bf16(w)
        ctx.save_for_backward(w_b if need_dx else None, x_b if need_dw else None)
        ctx.dtype = w.dtype
        return _mm(x_b, w_b.t()).to(x.dtype)  # (T, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):  # (T, n)
        w_b, x_b = ctx.saved_tensors
        d_b = _bf16(d)
        dx = None if w_b is None else _mm(d_b, w_b).to(d.dtype)  # (T, m)
        dw = None if x_b is None else _mm(d_b.t(), x_b).to(ctx.dtype)  # (n, m)
        return dx, dw


class _LinearFP4(torch.autograd.Function):
    """The three GEMMs with NVFP4 operands. center: the means of X and D are taken off before, and
    their products added after."""

    @staticmethod
    def forward(ctx, x, w, center):  # x (T, m), w (n, m)
        need_dx, need_dw, _ = ctx.needs_input_grad
        f = ops(x.device)
        mu, r_row, r_col = f.center_quantize(x, center, columnwise=need_dw)
        w_q = f.quantize_weight(w)

        # ------------ fprop: Y (T, n) = 1 (μ Wᵀ) + R~ W~ᵀ ------------
        y = f.gemm(r_row, w_q.t(), x.dtype, mu @ w.float().t() if center else None)

        for_dx = (w if center else None, *w_q.tensors(), w_q.codes_col) if need_dx else ()
        for_dw = (mu, *r_col.tensors()) if need_dw else ()  # instead of X: 4.5 bits a value
        ctx.save_for_backward(*for_dx, *for_dw)
        ctx.center, ctx.dtype = center, w.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d):  # (T, n)
        need_dx, need_dw, _ = ctx.needs_input_grad
        f, saved, (tokens, n) = ops(d.device), ctx.saved_tensors, d.shape
        seeds = draw_seeds(3, d.device)  # a third, so that recipes that round ν share the first two
        nu, s_row, s_col = f.center_quantize(d, ctx.center, need_dx, need_dw, seeds[:2])
        dx = dw = None

        # ------------ dgrad: dX (T, m) = 1 (ν W) + S~ W~ ------------
        if need_dx:
            w, *w_q, codes_col = saved[:5]
            w_q = NVFP4(*w_q, block=(16, 16), rows=n, codes_col=codes_col)
            dx = f.gemm(s_row, w_q, d.dtype, nu @ w.float() if ctx.center else None)

        # ------------ wgrad: dW (n, m) = T νᵀ μ + S~ᵀ R~ ------------
        if need_dw:
            mu, *r_col = saved[-4:]
            r_col = NVFP4(*r_col, block=(16, 1), rows=tokens)
            column = tokens * nu.t() if ctx.center else None
            dw = f.gemm(s_col.t(), r_col, ctx.dtype, mu, column)
        return dx, dw, None


def linear_fp32(x, w):
    return F.linear(x.float(), w.float()).to(x.dtype)


def linear_bf16(x, w):
    return _LinearBF16.apply(x, w)


def linear_fp4(x, w):
    return _LinearFP4.apply(x, w, False)


def linear_fp4_mean(x, w):
    return _LinearFP4.apply(x, w, True)


RECIPES = {
    "fp32": linear_fp32,
    "bf16": linear_bf16,
    "fp4": linear_fp4,
    "fp4_mean": linear_fp4_mean,
}


def _recipe(recipe):
    if callable(recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}, nor a function")
    return RECIPES[recipe]


def _check_widths(recipe, linear, name="FP4Linear"):
    n, m = linear.weight.shape
    if recipe not in (linear_fp32, linear_bf16) and (m % BLOCK or n % BLOCK):
        raise ValueError(
            f"{name}({m}, {n}): both must be multiples of {BLOCK}; change the width or keep this "
            "layer in bf16"
        )


class FP4Linear(torch.nn.Linear):
    """`nn.Linear` (..., in_features) -> (..., out_features) whose three GEMMs follow a recipe.

    recipe: a name in RECIPES, or a function of X and W as there. Weights and inputs are of any
    float dtype, taken in FP32; the output has the input's. Raises ValueError if a width is no
    multiple of 16, but for fp32 and bf16; RuntimeError for an input of another width, or not of
    floats. torch.autocast is off inside, as it would round the means; so would TF32. Rounding
    noise comes from the device's default generator, in backward."""

    def __init__(self, in_features, out_features, bias=True, recipe="fp4_mean", **kwargs):
        super().__init__(in_features, out_features, bias, **kwargs)
        self.recipe = _recipe(recipe)
        _check_widths(self.recipe, self)

    def forward(self, x):
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            due = f"(..., {self.in_features}) of floats"
            raise RuntimeError(f"input {tuple(x.shape)} of {x.dtype} is not {due}")
        tokens, w = x.reshape(-1, self.in_features), self.weight
        if not torch.is_grad_enabled():  # needs_input_grad is True there all the same
            tokens, w = tokens.detach(), w.detach()
        recipe = self.recipe if len(tokens) else linear_fp32  # nothing to round, nor to average
        with torch.autocast(x.device.type, enabled=False):
            y = recipe(tokens, w).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, {getattr(self.recipe, '__name__', self.recipe)}"


def convert(model, recipe="fp4_mean", keep=("lm_head",)):
    """Make every nn.Linear in a model, or the model itself, an FP4Linear, in place. Skips names
    that end in one of keep, and subclasses of nn.Linear. Parameters, hooks and modes stay;
    converting again changes the recipe. Returns the model; ValueError, and nothing is changed,
    where a width does not fit."""
    recipe, names = _recipe(recipe), {}
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in (torch.nn.Linear, FP4Linear):
            names.setdefault(module, []).append(name)
    kept = {m for m, aliases in names.items() if any(a.endswith(keep) for a in aliases)}
    linears = {m: aliases[0] for m, aliases in names.items() if m not in kept}
    for linear, name in linears.items():
        _check_widths(recipe, linear, name or "the model, nn.Linear")
    for linear in linears:
        linear.__class__, linear.recipe = FP4Linear, recipe
    return model


def mean_share(x):
    """||μ||² / E||x||² of x (..., m), a scalar tensor in [0, 1]: the share of the mean over tokens
    in the energy; NaN for zeros. About 1/T for T random tokens. arXiv 2603.10444 calls its
    square root R."""
    x = x.float().flatten(0, -2)
    return x.mean(0).square().sum() / x.square().sum(1).mean()
