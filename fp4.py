"""A linear layer in 4 bits, with the mean of its tokens kept apart. The idea first, then the bits.

A linear layer is three matrix products (GEMMs). X is the input, T tokens by m features; W the
weight, n by m; D = dL/dY the gradient of the output, T by n; ᵀ is the transpose:

    fprop   Y  = X Wᵀ       contracts over features
    dgrad   dX = D W        contracts over output features
    wgrad   dW = Dᵀ X       contracts over tokens

NVFP4 stores an operand of such a product in 4.5 bits a value (arXiv 2509.25149, section 2):

    value          E2M1: sign, 2 exponent bits, 1 mantissa bit: 0 .5 1 1.5 2 3 4 6 and negatives
    block scale    E4M3: 3 mantissa bits, at most 448; one for 16 values along the contracted axis
    tensor scale   FP32: one for the tensor, such that its largest block scale is 448

The 16 values of a block share a scale, so one large value costs its 15 neighbours their resolution.
The activations of all tokens have a component in common, their mean, and in large models it is
large (arXiv 2603.10444). A feature with a large mean sets the scale of its block in every row, and
what tells tokens apart is rounded coarsely. One subtraction repairs this. With the means over
tokens, μ of X and ν of D, which are rows, and with 1 the column of T ones,

    X = 1 μ + R      D = 1 ν + S

    fprop   Y  = 1 (μ Wᵀ) + R~ W~ᵀ          ~ is "rounded to NVFP4"
    dgrad   dX = 1 (ν W)  + S~ W~
    wgrad   dW = T νᵀ μ   + S~ᵀ R~

Of X and D only the residuals R and S are rounded. The columns of a residual add up to zero. So
wgrad's cross terms νᵀ (1ᵀ R) and (Sᵀ 1) μ are zero before rounding and noise after it, and are left
out. The means stay in FP32, and in fprop and dgrad they meet the unrounded W. That is a product of
one row, 1/T of the GEMM's work, so precision is cheap there. It also counts there: an error in the
mean is the same for every token and does not average out.

T counts all tokens that a layer sees at once: those of a batch, or of a process's part of it. So
the rounding of a token depends on later tokens too, by the mean as by the tensor scale.

Blocks and rounding follow NVIDIA's recipe (arXiv 2509.25149), without its Hadamard transform:

- W is rounded once, in 16 x 16 blocks, so that fprop and dgrad see the same numbers.
- R and S are rounded twice, each time afresh: in blocks along features, and for wgrad, which
  contracts over tokens, in blocks along tokens. So R~ of wgrad is not R~ of fprop.
- Gradients are rounded stochastically, all else to nearest. To backward, rounding is the identity.

Hardware without FP4 units emulates this exactly. E2M1 times E4M3 has at most 6 significant bits, so
it fits BF16. A BF16 product of such values with FP32 sums, times the two tensor scales, is NVFP4
arithmetic up to the order of the sums. On a GPU kernels.py takes over: for the same mean, the same
codes.
"""

import dataclasses
import importlib.util
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = None  # the type of device whose tensors go to kernels.py
if importlib.util.find_spec("triton") and (INTERPRET or torch.version.cuda):
    import kernels

    KERNELS = "cpu" if INTERPRET else "cuda"

# ------------------------------------------------------------------------------------------------
# The linear layer: three GEMMs.


class LinearFP4(torch.autograd.Function):
    """Y = X Wᵀ on NVFP4 operands. center: the means are taken off before rounding, and their
    products added in full precision."""

    @staticmethod
    def forward(ctx, x, w, center):  # x (T, m), w (n, m)
        need_dx, need_dw, _ = ctx.needs_input_grad
        mu, r, r_t = center_quantize(x, center, columnwise=need_dw)
        w_q, w_t = quantize_weight(w)

        # ------------ fprop: Y (T, n) = 1 (μ Wᵀ) + R~ W~ᵀ ------------
        mean_y = mm(mu, w.float().t()) if center else None  # (1, n)
        y = gemm(r, w_q, x.dtype, right=mean_y)

        # dgrad will need W~, and wgrad R~: 4.5 bits a value are kept instead of X.
        saved_w = w_t.tensors() if need_dx else (None, None, None)
        saved_r = r_t.tensors() if need_dw else (None, None, None)
        ctx.save_for_backward(mu, w, *saved_w, *saved_r)
        ctx.center = center
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d):  # (T, n)
        need_dx, need_dw, _ = ctx.needs_input_grad
        mu, w, w_codes, w_scales, w_scale, r_codes, r_scales, r_scale = ctx.saved_tensors
        seeds = torch.randint(2**31 - 1, (2,), dtype=torch.int32, device=d.device)
        nu, s, s_t = center_quantize(d, ctx.center, need_dx, need_dw, seeds)
        dx = dw = None

        # ------------ dgrad: dX (T, m) = 1 (ν W) + S~ W~ ------------
        if need_dx:
            w_t = NVFP4(w_codes, w_scales, w_scale, (16, 16))  # W~ᵀ, (m, n)
            mean_dx = mm(nu, w.float()) if ctx.center else None  # (1, m)
            dx = gemm(s, w_t, d.dtype, right=mean_dx)

        # ------------ wgrad: dW (n, m) = T νᵀ μ + S~ᵀ R~ ------------
        if need_dw:
            r_t = NVFP4(r_codes, r_scales, r_scale, (1, 16))  # Rᵀ~, (m, T)
            column = len(d) * nu.t() if ctx.center else None  # (n, 1)
            dw = gemm(s_t, r_t, w.dtype, left=column, right=mu)
        return dx, dw, None


class LinearHigh(torch.autograd.Function):
    """The same three GEMMs on BF16 operands, the baseline, or on FP32 ones."""

    @staticmethod
    def forward(ctx, x, w, dtype):  # x (T, m), w (n, m)
        need_dx, need_dw, _ = ctx.needs_input_grad
        x_high, w_high = to_dtype(x, dtype), to_dtype(w, dtype)
        ctx.save_for_backward(x_high if need_dw else None, w_high if need_dx else None)
        ctx.dtypes = dtype, w.dtype
        return mm(x_high, w_high.t()).to(x.dtype)  # (T, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):  # (T, n)
        need_dx, need_dw, _ = ctx.needs_input_grad
        x_high, w_high = ctx.saved_tensors
        dtype, w_dtype = ctx.dtypes
        d_high = to_dtype(d, dtype)
        dx = dw = None
        if need_dx:
            dx = mm(d_high, w_high).to(d.dtype)  # (T, m)
        if need_dw:
            dw = mm(d_high.t(), x_high).to(w_dtype)  # (n, m)
        return dx, dw, None


RECIPES = {  # how a linear layer multiplies: an autograd Function of X, W and this argument
    "fp32": (LinearHigh, torch.float32),
    "bf16": (LinearHigh, torch.bfloat16),
    "fp4": (LinearFP4, False),
    "fp4_mean": (LinearFP4, True),
}

# ------------------------------------------------------------------------------------------------
# What the GEMMs need: three functions, here in plain PyTorch and in kernels.py in Triton.


def center_quantize(x, center, rowwise=True, columnwise=True, seeds=None):
    """x (T, m), less its mean over tokens if center is set, in NVFP4, ready for either contraction.
    What is not wanted is not computed. Returns

    mean   (1, m), FP32, or None
    r      (T, m), in blocks of 16 along features
    r_t    (m, T), the transpose, in blocks along tokens; zeros fill T up to a multiple of 16

    seeds: int32 (2,), to round stochastically, a seed for each direction; None: to nearest."""
    if x.device.type == KERNELS:
        mean, r, r_t = kernels.center_quantize(x, center, rowwise, columnwise, seeds)
        return mean, NVFP4(*r, (1, 16)), NVFP4(*r_t, (1, 16))
    x, mean, r, r_t = x.float(), None, None, None
    if center:
        mean = x.mean(0, keepdim=True)
        x = x - mean
    row_seed, column_seed = (None, None) if seeds is None else seeds
    if rowwise:
        r = quantize(x, (1, 16), row_seed)
    if columnwise:
        r_t = quantize(x, (16, 1), column_seed).t()
    return mean, r, r_t


def quantize_weight(w):
    """w (n, m) in NVFP4 in 16 x 16 blocks, for fprop, and its transpose (m, n), the same numbers,
    for dgrad."""
    if w.device.type == KERNELS:
        w_q, w_t = kernels.quantize_weight(w)
        return NVFP4(*w_q, (16, 16)), NVFP4(*w_t, (16, 16))
    w_q = quantize(w, (16, 16))
    return w_q, w_q.t()


def gemm(a, b, dtype, left=None, right=None):
    """a bᵀ + left right, (M, N) in dtype, accumulated in FP32.

    a, b    NVFP4 (M, K) and (N, K), in blocks along K
    right   FP32 (1, N), the mean's part, or None
    left    FP32 (M, 1), or None for ones"""
    if a.codes.device.type == KERNELS:
        return kernels.gemm(*a.tensors(), *b.tensors(), left, right, dtype)
    y = mm(a.values(), b.values().t()).mul_(a.tensor_scale * b.tensor_scale)
    if right is not None:
        y = y.add_(right) if left is None else y.addcmul_(left, right)
    return y.to(dtype)


def mm(a, b):
    """a @ b in FP32, of operands in FP32 or exact in BF16. A CPU multiplies in FP32: the same
    products, and 300 times faster where it has no BF16 units. Not under torch.autocast, which would
    round a mean to BF16."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def to_dtype(x, dtype):
    """x.to(dtype), also under torch.compile. The compiler drops a cast to BF16 that a cast back to
    FP32 follows, and the rounding with it; integer arithmetic it keeps."""
    if dtype == torch.bfloat16 and torch.compiler.is_compiling():
        bits = x.float().view(torch.int32)
        bits = bits + 0x7FFF + (bits >> 16 & 1)  # ties to even
        x = torch.where(x == x, (bits & -0x10000).view(torch.float32), torch.nan)
    return x.to(dtype)


# ------------------------------------------------------------------------------------------------
# The module, and the way into a model.


def recipe_named(name):
    """RECIPES[name]. A name that is not there is looked for in experiments/recipes.py, which adds
    its own to RECIPES; ValueError for one that is nowhere."""
    if name not in RECIPES and importlib.util.find_spec("experiments"):
        importlib.import_module("experiments.recipes")
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[name]


def linear(x, w, recipe):
    """Y (T, n) of X (T, m) and W (n, m), of any float dtypes, in X's dtype, by the recipe of this
    name. ValueError for a recipe or a width that does not fit."""
    check_widths(recipe, w, "linear")
    if not torch.is_grad_enabled():  # no_grad leaves needs_input_grad True
        x, w = x.detach(), w.detach()
    if len(x) == 0:  # an expert that gets no token: nothing to round, nor to average
        recipe = "fp32"
    function, argument = recipe_named(recipe)
    return function.apply(x, w, argument)


def check_widths(recipe, w, name):
    n, m = w.shape
    if recipe not in ("fp32", "bf16") and (m % 16 or n % 16):
        raise ValueError(f"{name}({m}, {n}): both must be multiples of 16. HINT: keep it in bf16")


class FP4Linear(nn.Linear):
    """`nn.Linear` (..., in_features) -> (..., out_features) whose three GEMMs follow the recipe of
    this name. Weights and inputs have any float dtype; the output has the input's. torch.autocast
    changes nothing. Rounding noise comes from the device's default generator, in backward.

    ValueError if a width is no multiple of 16 (fp32 and bf16 take any), or for an input of another
    width or not of floats; TypeError for DTensors."""

    def __init__(self, in_features, out_features, bias=True, recipe="fp4_mean", **kwargs):
        super().__init__(in_features, out_features, bias, **kwargs)
        recipe_named(recipe)
        check_widths(recipe, self.weight, "FP4Linear")
        self.recipe = recipe

    def forward(self, input):
        if input.shape[-1:] != (self.in_features,) or not input.is_floating_point():
            due = f"(..., {self.in_features}) of floats"
            raise ValueError(f"input {tuple(input.shape)} of {input.dtype} is not {due}")
        if hasattr(input, "device_mesh") or hasattr(self.weight, "device_mesh"):
            raise TypeError("FP4Linear takes no DTensor: each shard would have a mean of its own")
        y = linear(input.reshape(-1, self.in_features), self.weight, self.recipe)
        y = y.reshape(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.recipe}"


def convert(model, recipe="fp4_mean", keep=("head", "lm_head")):
    """Make every nn.Linear in a model, or the model itself, an FP4Linear, in place.

    keep: modules that stay as they are, with all that is in them: dotted names, or ends of them,
    such as layers.0. Parameters, hooks and modes stay; converting again changes the recipe. Returns
    the model, and warns of matrices in other modules, embeddings aside. ValueError, and nothing is
    changed, if a width does not fit, if a linear would not run our forward, or if there is none."""
    recipe_named(recipe)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    names = {}  # a shared module has several
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    linears, others = {}, {}  # modules: how many values their matrices have
    for module, aliases in names.items():
        kept = any(f".{part}." in f".{alias}." for part in keep for alias in aliases)
        if kept or isinstance(module, nn.Embedding):
            continue
        name = f"{aliases[0]}: {type(module).__name__}"
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        if isinstance(module, nn.TransformerEncoderLayer) and fast_path:
            hint = "torch.backends.mha.set_fastpath_enabled(False)"
            raise ValueError(f"{name} goes past its linears in evaluation. HINT: {hint}")
        if isinstance(module, nn.Linear):
            if type(module) not in (nn.Linear, FP4Linear) or "forward" in vars(module):
                hint = "convert before fully_shard, parametrize or accelerate, or keep it"
                raise ValueError(f"{name} has a forward of its own. HINT: {hint}")
            check_widths(recipe, module.weight, name)
            linears[module] = size
        elif size:
            others[name] = size
    if not linears:
        raise ValueError(f"no nn.Linear to convert. Other matrices: {', '.join(others) or 'none'}")
    if others:
        share = sum(linears.values()) / (sum(linears.values()) + sum(others.values()))
        left = ", ".join(list(others)[:3])
        warnings.warn(f"{share:.0%} of the matrices are converted, but not {left}", stacklevel=2)
    for layer in linears:
        layer.__class__, layer.recipe = FP4Linear, recipe
    return model


def mean_share(x):
    """||μ||² / E||x||² of x (..., m), a scalar tensor in [0, 1]: the part of the energy that the
    mean over tokens has. About 1/T for T random tokens; NaN for zeros. arXiv 2603.10444 calls its
    square root R."""
    x = x.float().flatten(0, -2)
    return x.mean(0).square().sum() / x.square().sum(1).mean()


# ------------------------------------------------------------------------------------------------
# The format.
#
# A block is rounded in three steps. With amax the largest magnitude of the tensor, 2688 = 6 * 448,
# S_enc = 2688 / amax and S_dec = 1 / S_enc,
#
#     s = E4M3(block amax * (S_enc * 1/6))      q = E2M1(x * (1 / (s * S_dec)))
#     x~ = q * s * (amax / 2688)
#
# each operation one FP32 rounding, in this order: NVIDIA's, of Transformer Engine's reference.

BLOCKS = {(1, 16): (2,), (16, 1): (1,), (16, 16): (1, 3)}  # block: its axes in an `in_blocks` view
FP32_MAX = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class NVFP4:
    """A matrix (R, C) in NVFP4.

    codes         uint8 (R, C/2) or (R/2, C): two codes a byte along one axis, the even element in
                  the low nibble; along the block, or in 16 x 16 blocks along either axis
    scales        float8_e4m3fn (R/bh, C/bw), one a block
    tensor_scale  FP32 scalar, amax / 2688
    block         (bh, bw), one of BLOCKS
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    block: tuple[int, int]

    def t(self):
        """The transpose, a view."""
        return NVFP4(self.codes.t(), self.scales.t(), self.tensor_scale, self.block[::-1])

    def tensors(self):
        return self.codes, self.scales, self.tensor_scale

    def values(self):
        """E2M1 times block scale, without the tensor scale: BF16 on a GPU, FP32 on a CPU, exact in
        both."""
        if self.codes.stride(0) < self.codes.stride(1):  # a transpose: decode in memory's order
            return self.t().values().t()
        rows = len(self.scales) * self.block[0]
        codes = unpack(self.codes, axis=int(len(self.codes) == rows))  # where rows are not halved
        scales = self.scales.float()
        for axis in BLOCKS[self.block]:
            scales = scales.unsqueeze(axis)
        v = decode(codes, scales, self.block).view(codes.shape)
        return v.bfloat16() if v.is_cuda else v

    def dequantize(self):
        """(R, C), FP32. With an infinite amax, zero stays zero and all else is infinite."""
        v = self.values().float()
        return torch.where(v == 0, v, v * self.tensor_scale)


@torch.no_grad()
def quantize(x, block=(1, 16), seed=None):
    """Round x (R, C), of any float dtype and strides, to NVFP4.

    block   (bh, bw), one of BLOCKS; C must be a multiple of bw; zeros fill R to a multiple of bh
    seed    None: to nearest, ties to even. An int32, or a scalar tensor of it: up or down at
            random, right on average, but for values above 6 after scaling, which saturate (slope
            .9965 on Gaussian data)

    Zero blocks give zeros; a NaN makes its block NaN, and no other. ValueError for what does not
    fit."""
    if block not in BLOCKS:
        raise ValueError(f"block {block} is not one of {list(BLOCKS)}")
    if x.ndim != 2 or x.numel() == 0 or x.shape[1] % block[1] or not x.is_floating_point():
        raise ValueError(
            f"cannot quantize {x.dtype} of shape {tuple(x.shape)} in {block} blocks: not floats, "
            f"not a matrix, empty, or its columns no multiple of {block[1]}"
        )
    x = x.detach().float()
    if len(x) % block[0]:
        x = F.pad(x, (0, 0, 0, -len(x) % block[0]))
    amaxes, amaxes_but_nan = block_amaxes(x, block)
    return quantize_scaled(x, block, amaxes, amaxes_but_nan.amax(), seed)


def quantize_scaled(x, block, amaxes, amax, seed=None):
    """The second half of `quantize`: x (R, C), FP32, of whole blocks, whose amaxes, and that of the
    tensor, are known."""
    tensor_scale, s_enc, s_dec = tensor_scales(amax)
    scales, factors = block_scales(amaxes.flatten(), s_enc, s_dec)
    key = None
    if seed is not None:
        key = hash32(torch.as_tensor(seed, dtype=torch.int32, device=x.device))
    codes = encode(x, factors.view_as(amaxes), block, key).view(x.shape)
    scales = scales.to(torch.float8_e4m3fn).view(len(amaxes), -1)  # exact: they are E4M3 values
    return NVFP4(pack(codes, axis=int(block[1] == 16)), scales, tensor_scale, block)


# ------------------------------------------------------------------------------------------------
# The bits. Four passes, which `use_fast_path` compiles for a CPU: block_amaxes, block_scales (over
# blocks, 1/16 of a pass) and encode for rounding; decode for the way back.


def in_blocks(x, block):
    """A view of x (R, C): (R, C/16, 16), (R/16, 16, C) or (R/16, 16, C/16, 16)."""
    x = x.unflatten(1, (-1, 16)) if block[1] == 16 else x
    return x.unflatten(0, (-1, 16)) if block[0] == 16 else x


def block_amaxes(x, block):
    """Two: the largest magnitude of each block, its axes kept, NaN if a value is, for the block's
    scale; and the same where a NaN counts as 0, for the tensor's scale."""
    a = in_blocks(x, block).abs()
    but_nan = torch.where(a == a, a, 0.0)  # isnan is not vectorized, and five times slower
    return a.amax(BLOCKS[block], keepdim=True), but_nan.amax(BLOCKS[block], keepdim=True)


def tensor_scales(amax):
    """FP32 scalars: the tensor scale amax / 2688; S_enc = 2688 / amax, 1 for zeros; and S_dec = 1 /
    S_enc, the tensor scale again, but for a rounding.

    The divisions are tensor by tensor: PyTorch makes 2688.0 / tensor a reciprocal and a product,
    two roundings. `use_fast_path` does not compile this: threads would share the scalars."""
    full = torch.full_like(amax, 2688.0)
    s_enc = (full / amax).clamp(max=FP32_MAX)
    s_enc = torch.where((amax == 0) | (s_enc == 0), 1.0, s_enc)
    return amax / full, s_enc, 1 / s_enc


def block_scales(amaxes, s_enc, s_dec):
    """Block scales, E4M3 values, and the factors that map blocks into [-6, 6]; FP32."""
    scales = e4m3_round((amaxes * (s_enc * (1 / 6))).clamp(max=448.0))
    return scales, (1 / (scales * s_dec)).clamp(max=FP32_MAX)


def e4m3_round(x):
    """x in [0, 448], FP32, rounded to E4M3, ties to even: 3 mantissa bits, and below 2^-6 steps of
    2^-9. NaN stays NaN."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # x with its mantissa cleared
    step = power.clamp(min=2.0**-6) * 2.0**-3
    return torch.round(x / step) * step


def encode(x, factors, block, key):
    """4-bit codes, one a byte, in blocks: sign in bit 3 and magnitude 0..7. key None: to nearest.
    All codes of a NaN block are 7.

    The code of magnitude a is the least of 2a, a + 2 and a/2 + 4: steps are 1/2 up to 2, 1 up to 4,
    2 up to 6. A sum with 2^23, whose last bit is worth 1, rounds each of these lines to even, which
    is E2M1's rounding. A sum with 128, whose last bit is worth 2^-16, keeps a fraction of 16 bits:
    2.3 gives 4.3, code 4 and .3. With noise in [0, 1) added it reaches 5 in 3 of 10 cases."""
    y = in_blocks(x, block) * factors
    y = torch.where(y == y, y, 6.0)
    a = torch.where(y.abs() < 6.0, y.abs(), 6.0)
    one = 2.0**23 if key is None else 128.0
    code = torch.minimum(torch.minimum(2 * a + one, a + (one + 2)), 0.5 * a + (one + 4))
    code = code.view(torch.int32)
    if key is not None:
        code = (code + in_blocks(noise(x.shape, block, key), block)) >> 16
    return (code & 7 | y.view(torch.int32) >> 28 & 8).to(torch.uint8)  # -0.0 has its sign too


def decode(codes, scales, block):
    """Codes (R, C), one a byte, times block scales, in blocks, FP32. The inverse of encode's three
    lines is the largest of c/2, c - 2 and 2c - 8."""
    codes = in_blocks(codes, block).to(torch.int32)
    c = (codes & 7).float()
    a = torch.maximum(torch.maximum(0.5 * c, c - 2), 2 * c - 8)
    return torch.where(codes > 7, -a, a) * scales


def noise(shape, block, key):
    """int32 in [0, 2^16), (R, C). A hash of the number of a word, four bytes, and the key, times an
    odd number for each byte, has 16 bits for each of the byte's two codes, so every device and
    every order of evaluation draws the same."""
    word = torch.arange(shape[0] * shape[1] // 8, dtype=torch.int32, device=key.device)
    byte = torch.arange(4, dtype=torch.int32, device=key.device)
    u = hash32(word ^ key)[:, None] * (byte * 0x3C6EF372 + 1)  # twice 2^32 / golden ratio
    low, high = u ^ u >> 16, u >> 16  # the product's high bits are its best
    axis = int(block[1] == 16)  # along which two codes share a byte
    pairs = [half.view(-1, shape[1] // (1 + axis)) & 0xFFFF for half in (low, high)]
    return torch.stack(pairs, axis + 1).view(shape)


def hash32(i):
    """int32 -> int32: lowbias32 (C. Wellons, github.com/skeeto/hash-prospector)."""
    i = (i ^ (i >> 16 & 0xFFFF)) * 0x7FEB352D  # int32 wraps; the mask makes >> logical
    i = (i ^ (i >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return i ^ (i >> 16 & 0xFFFF)


def pack(codes, axis):
    """Two codes a byte, of neighbours in a row (axis 1) or in a column (axis 0)."""
    even, odd = codes.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return even | odd << 4


def unpack(packed, axis):
    return torch.stack((packed & 15, packed >> 4), axis + 1).flatten(axis, axis + 1)


def use_fast_path(device):
    """Make FP4 fast on a torch.device; returns a line that says what runs there. A CPU's passes are
    compiled, with the same bits, which needs a C++ compiler; without one plain PyTorch goes on."""
    if device.type == KERNELS:
        return f"FP4: {kernels.backend()}"
    if device.type != "cpu":
        return "FP4: plain PyTorch, slow, for want of Triton"
    torch._dynamo.config.recompile_limit = 64  # a graph for each block, rounding and layout
    options = {
        "cpp.vec_isa_ok": True,
        "cpp.dynamic_threads": True,
        "realize_opcount_threshold": 100,
    }
    plain = {f.__name__: f for f in (block_amaxes, block_scales, encode, decode)}
    for name, f in plain.items():
        globals()[name] = torch.compile(f, dynamic=True, options=options)
    try:
        quantize(torch.ones(32, 32), (16, 16))
    except Exception as error:  # compiler errors have no common type
        globals().update(plain)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"FP4: plain PyTorch, slow, for want of a working C++ compiler ({reason})"
    return "FP4: passes fused by torch.compile"
