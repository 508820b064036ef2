"""The projection of `fp4_project_1d` inside the rounding kernel, and its twin in plain PyTorch.

    X = left u + R      u: the mean's direction, a unit row; left = X uᵀ, what tokens have along it

Both factors are rounded to BF16, and R takes up what that changes. So left times u is exact in
FP32, and a fused multiply-add cannot differ from a product and a difference; and left meets D in
BF16 tensor cores. NVFP4 needs the amax of R before it rounds the first value, but a bound will do,
and the columns' largest magnitudes e, which the statistics know, give one:

    |R| <= |X| + |left| |u| <= e + (e |u|ᵀ) |u|

A tensor scale that is k times too large costs nothing that is normal in E4M3: block scales keep 3
bits down to 2^-6, 28,672 times below the largest.

Bytes an element, for X in BF16: statistics 2 read, rounding 2 read from memory and twice 2 from
cache, 0.5625 written for each direction. A program owns 16 tokens in full: it adds up X uᵀ, 4.1
instructions an element on sm_90, and then rounds strip by strip, 32; `fp4_mean` needs 27.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

import fp4

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    import kernels
    from kernels import _as_pairs, _bf16_bits, _casts, _pairs, _round_columns, _round_rows

    @triton.jit
    def _make_table(amax, table):
        kernels._scale_table(tl.load(amax), table)

    @triton.jit
    def _project_quantize(
        x, u, left, table, seeds, codes, scales, codes_t, scales_t, T, m,
        ROWWISE: tl.constexpr, COLUMNWISE: tl.constexpr, STOCHASTIC: tl.constexpr,
        CASTS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        token, i = tl.program_id(0) * 16, tl.arange(0, 16)
        pair = tl.arange(0, BLOCK // 2)[None, :]
        x += token.to(tl.int64) * (m // 2)
        dots = tl.zeros((16, BLOCK // 2), tl.float32)
        for feature in range(0, m, BLOCK):
            inside = (feature + 2 * pair < m) | EVEN
            row = _pairs(u + feature // 2, pair, inside)
            inside &= (token + i < T)[:, None] | EVEN
            v = _pairs(x + feature // 2, i[:, None] * (m // 2) + pair, inside)
            dots += v[0] * row[0] + v[1] * row[1]
        bits = _bf16_bits(tl.sum(dots, 1)).to(tl.int32) << 16
        tl.store(left + token + i, bits.to(tl.float32, bitcast=True), mask=token + i < T)
        tl.debug_barrier()  # all threads read it
        seed_t = None
        if STOCHASTIC:
            seed_t = seeds + 1
        for feature in range(0, m, BLOCK):
            if COLUMNWISE:
                _round_columns(
                    x + feature // 2, u + feature // 2, left, table, seed_t, codes_t, scales_t,
                    token, feature, T, m, True, STOCHASTIC, CASTS, EVEN, BLOCK,
                )  # fmt: skip
            if ROWWISE:
                _round_rows(
                    x + feature // 2, u + feature // 2, left, table, seeds, codes, scales,
                    token, feature, T, m, True, STOCHASTIC, CASTS, EVEN, BLOCK, STEP,
                )  # fmt: skip


def project_quantize(x, rowwise=True, columnwise=True, seeds=None):
    """x (T, m) -> left (T, 1) and u (1, m), FP32 of BF16 values, and the residual in NVFP4: r
    (T, m), in blocks along features, and r_t (m, T), in blocks along tokens, as
    `fp4.center_quantize` gives them."""
    if x.device.type != fp4.KERNELS:
        x = x.float()
        mean, largest = x.mean(0), torch.where(x == x, x.abs(), 0.0).amax(0)
        u, bound = direction(mean, largest)
        left = bf16(fp4.mm(x, u[:, None]))
        return left, u[None], *round_rest(x, left, u[None], bound, rowwise, columnwise, seeds)
    left, u, codes, scales, codes_t, scales_t, tensor_scale = project_quantize_op(
        x, rowwise, columnwise, seeds
    )
    e4m3 = torch.float8_e4m3fn
    r = fp4.NVFP4(codes, scales.view(e4m3), tensor_scale, (1, 16))
    r_t = fp4.NVFP4(codes_t.t(), scales_t.view(e4m3).t(), tensor_scale, (1, 16))
    return left[:, None], u[None], r if rowwise else None, r_t if columnwise else None


@torch.library.custom_op("nanofp4::project_quantize", mutates_args=())
def project_quantize_op(
    x: Tensor, rowwise: bool, columnwise: bool, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (T, m) -> left (T,), u (m,), and what `kernels.center_quantize_op` returns of the rest."""
    x = x.contiguous()
    T, m = x.shape
    left, _, codes, scales, codes_t, scales_t, _ = _like_project_quantize(
        x, rowwise, columnwise, seeds
    )
    with torch.cuda.device_of(x):  # where Triton launches
        partial, _ = kernels.column_parts(x)
        largest = torch.maximum(-partial[:, 1].amin(0), partial[:, 2].amax(0)).clamp(min=0)
        u, bound = direction(partial[:, 0].sum(0) / T, largest)
        table = x.new_empty(130, dtype=torch.float32)
        _make_table[(1,)](bound, table)
        even = T % 16 == 0 and m % kernels.ROUND_COLUMNS == 0
        _project_quantize[(triton.cdiv(T, 16),)](
            _as_pairs(x), u.view(torch.int64), left, table, seeds,
            codes.view(torch.int32), scales, codes_t.view(torch.int32), scales_t, T, m,
            ROWWISE=rowwise, COLUMNWISE=columnwise, STOCHASTIC=seeds is not None, CASTS=_casts(),
            EVEN=even, BLOCK=kernels.ROUND_COLUMNS, STEP=kernels.ROUND_TOKENS,
            num_warps=kernels.ROUND_WARPS,
            maxnreg=128 if even and kernels._major_version() == 9 else None,  # else it would spill
        )  # fmt: skip
    return left, u, codes, scales, codes_t, scales_t, table[0]


@project_quantize_op.register_fake
def _like_project_quantize(x, rowwise, columnwise, seeds):
    left = x.new_empty(x.shape[0], dtype=torch.float32)
    u, *rest = kernels._like_center_quantize(x, True, rowwise, columnwise, seeds)
    return left, u, *rest


def direction(mean, largest):
    """From the columns' means and largest magnitudes (m,): u (m,), and a bound of |X - left u|."""
    u = bf16(F.normalize(mean, dim=0))
    bound = largest + (largest * u.abs()).sum() * u.abs()
    return u, bound.amax() * (1 + 2**-6)  # for left's rounding


def round_rest(x, left, u, amax, rowwise, columnwise, seeds):
    """x - left u in NVFP4, in either direction, with the tensor scale of this amax."""
    x = x.float() - left * u
    row_seed, column_seed = (None, None) if seeds is None else seeds
    r = r_t = None
    if rowwise:
        amaxes, _ = fp4.block_amaxes(x, (1, 16))
        r = fp4.quantize_scaled(x, (1, 16), amaxes, amax, row_seed)
    if columnwise:
        x = F.pad(x, (0, 0, 0, -len(x) % 16))
        amaxes, _ = fp4.block_amaxes(x, (16, 1))
        r_t = fp4.quantize_scaled(x, (16, 1), amaxes, amax, column_seed).t()
    return r, r_t


def bf16(x):
    """FP32, rounded to BF16."""
    return fp4.to_dtype(x, torch.bfloat16).float()
