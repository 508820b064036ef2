"""Triton kernels for fp4.py: column statistics, center and quantize; gemm.py has the products.

fp4.py is the definition, and the plain twin of all that is here. Kernels save memory traffic. For a
T x m matrix in BF16, bytes an element:

    statistics          2 read: sums, minima and maxima of the columns, in two stages
    center + quantize   2 read, 0.5625 written for each of two directions of the blocks
    weights (FP32)      4 read twice, 1 written: one set of codes, packed along either axis

NVFP4 needs a tensor's amax before it can round a single value, so vanilla FP4 reads X twice too.
Centering adds no pass: the columns' statistics give mean and extrema at once, and from these

    max |x - μ| = max over columns of max(colmax - μ, μ - colmin)

exactly, because FP32 subtraction is monotone. All that decides a bit is integer arithmetic or one
correctly rounded FP32 operation, in a fixed order. So Triton's interpreter on a CPU
(TRITON_INTERPRET=1), Ampere, Hopper and Blackwell agree. That excludes `/` (off by 2 ulp; `div_rn`
is not), casts to BF16 and float8 that round (targets differ), and fused multiply-adds of products
that are not exact. Blackwell's cast to E2M1 is exact: to nearest even, at most 6, NaN to 6. The
twin's mean is PyTorch's, in another order of summation; given one mean, all bits agree.

`bench.py --resources` counts the instructions of the rounding. On Hopper they take as long as its
bytes, and it takes longer than either (experiments/README.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemm import INTERPRET, _cdiv, _decode_scale, _float, backend, gemm, has_fp4
from nvfp4 import NVFP4

__all__ = ["backend", "center_quantize", "gemm", "quantize_weight"]  # what fp4.py takes
FP32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
STATISTICS = 1024, 128, 32  # columns of a program, parts of the tokens, columns in stage 2
QUANTIZE = 512, 16 if INTERPRET else 4, 4  # columns of a program, tokens at a time, warps

# ------------------------------------------------------------------------------------------------
# Rounding, in registers.


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _hash(i):  # uint32 -> uint32: nvfp4._hash
    return _hash_rest(i ^ (i >> 16))


@triton.jit
def _hash_rest(i):
    i = i * 0x7FEB352D
    i = (i ^ (i >> 15)) * 0x846CA68B
    return i ^ (i >> 16)


@triton.jit
def _largest(a, b):
    """The larger magnitude, as its bits: of integers NaN is the largest. On a GPU a maximum drops
    NaN if not told to keep it, in the interpreter never."""
    return _bits(tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _block_scales(largest, table, HEADROOM: tl.constexpr):
    """From amaxes of blocks, as their bits: E4M3 bytes, int32; factors into [-6, 6]; and a mask of
    the sign bit, 0 for NaN, whose sign differs between machines. table: `_scale_table`."""
    s = _float(largest) * tl.load(table + 1)
    if HEADROOM:
        s = s * (17 / 16)
    s = tl.minimum(s, 448.0)
    power = tl.maximum(_float(_bits(s) & 0x7F800000), 0.015625)  # of two below s, at least 2^-6
    magic = power * 1048576.0  # 2^20 power has ulp power / 8, which is E4M3's spacing there
    s = (s + magic) - magic
    subnormal = _bits(s + 16384.0) & 7  # 2^14 has ulp 2^-9
    byte = tl.where(s < 0.015625, subnormal, (_bits(s) >> 20) - (120 << 3))  # bias 127 -> 7
    nan = largest > 0x7F800000
    byte = tl.where(nan, 0x7F, byte)
    return byte, tl.load(table + 2 + byte), tl.where(nan, 0, -0x80000000)


@triton.jit
def _nibble(y, sign, noise, STOCHASTIC: tl.constexpr):
    """Scaled values -> 4-bit codes, the highest bits of uint32, on nvfp4._encode's lines. They are
    compared as integers: Hopper takes the least of three at once, and NaN is above all numbers."""
    a, one = tl.abs(y), 128.0 if STOCHASTIC else 8388608.0
    steep, unit, flat = 2 * a + one, a + (one + 2), 0.5 * a + (one + 4)
    code = tl.minimum(steep.to(tl.int32, bitcast=True), unit.to(tl.int32, bitcast=True))
    code = tl.minimum(code, flat.to(tl.int32, bitcast=True))
    if STOCHASTIC:
        code = (tl.minimum(code, 0x43070000) << 12) + noise  # 128 + 7
    else:
        code = tl.minimum(code, 0x4B000007) << 28  # 2^23 + 7
    return (code | (y.to(tl.int32, bitcast=True) & sign)).to(tl.uint32)


@triton.jit
def _encode(low, high, sign, index, key, STOCHASTIC: tl.constexpr, FP4: tl.constexpr):
    """Scaled values (M, N, P) of low and of high nibbles -> bytes (M, N, P). The first's index in
    the tensor is `index` (M, N, 1), a multiple of P. sign: of `_block_scales`. FP4: in hardware."""
    if FP4 and not STOCHASTIC:
        byte = tl.inline_asm_elementwise(
            "{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, $2, $1; cvt.u32.u8 $0, c; }",
            "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        u_low, u_high = None, None
        if STOCHASTIC:
            u = index.to(tl.uint32) ^ key  # the indices differ in bits that the first shift drops
            u = (u ^ (u >> 16)) ^ tl.arange(0, low.shape[2]).to(tl.uint32)[None, None, :]
            u = _hash_rest(u)
            u_low = ((u << 12) & 0x0FFFFFFF).to(tl.int32)  # 16 bits, below the code's
            u_high = (u >> 4).to(tl.int32)  # 16, and further down some that move nothing
        low, high = _nibble(low, sign, u_low, STOCHASTIC), _nibble(high, sign, u_high, STOCHASTIC)
        byte = ((high & 0xF0000000) | (low >> 4)) >> 24
    return byte.to(tl.uint8)


# ------------------------------------------------------------------------------------------------
# Column statistics. Stage 1: a program adds up one part of the tokens, row after row, each thread
# its own columns. Stage 2: a program adds the parts of its columns in pairs, and writes the mean
# and the largest magnitude of the residual in its strip of columns.


@triton.jit
def _column_parts(x, parts, rows, cols, part_rows, BLOCK: tl.constexpr):
    part, j = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    first = part * part_rows
    row = x + first.to(tl.int64) * cols + j
    for _ in tl.range(first, tl.minimum(first + part_rows, rows), loop_unroll_factor=8):
        v = tl.load(row, mask=j < cols, other=0.0).to(tl.float32)
        row += cols
        total += v
        low = tl.minimum(low, tl.where(v == v, v, float("inf")))
        high = tl.maximum(high, tl.where(v == v, v, float("-inf")))
    out = parts + part * 3 * cols + j
    tl.store(out, total, mask=j < cols)
    tl.store(out + cols, low, mask=j < cols)
    tl.store(out + 2 * cols, high, mask=j < cols)


@triton.jit
def _column_stats(
    parts, mean, amax, rows, cols, CENTER: tl.constexpr, P: tl.constexpr, HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = parts + tl.arange(0, P)[:, None] * 3 * cols + j[None, :]
    inside = (j < cols)[None, :]
    low = tl.min(tl.load(cell + cols, mask=inside, other=0.0), axis=0)
    high = tl.max(tl.load(cell + 2 * cols, mask=inside, other=0.0), axis=0)
    if CENTER:
        total = tl.load(cell, mask=inside, other=0.0)
        for n in tl.static_range(1, HALVINGS + 1):  # tl.sum's order is not the same everywhere
            halves = tl.reshape(total, (2, P >> n, BLOCK))
            a, b = tl.split(tl.permute(halves, (1, 2, 0)))
            total = a + b
        mu = tl.div_rn(tl.reshape(total, (BLOCK,)), rows * 1.0)
        tl.store(mean + j, mu, mask=j < cols)
        low, high = mu - low, high - mu
    else:
        low = -low
    largest = tl.maximum(tl.where(low > 0, low, 0.0), tl.where(high > 0, high, 0.0))  # no NaN
    tl.store(amax + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def _scale_table(amax, table, n, N: tl.constexpr):
    """From n partial amaxes a tensor's table, FP32 (130,): [0] tensor scale, [1] factor from a
    block's amax to its scale, [2 + byte] factor into [-6, 6] for each scale byte, NaN for NaN's.
    With it no block needs a division."""
    i = tl.arange(0, N)
    largest = tl.max(tl.load(amax + i, mask=i < n, other=0.0), axis=0)
    encode = tl.minimum(tl.div_rn(2688.0, largest), FP32_MAX)
    encode = tl.where((largest == 0) | (encode == 0), 1.0, encode)
    tl.store(table, tl.div_rn(largest, 2688.0))
    tl.store(table + 1, encode * (1 / 6))
    byte = tl.arange(0, 128)
    inverse = tl.div_rn(1.0, _decode_scale(byte) * tl.div_rn(1.0, encode))
    inverse = tl.where(byte == 0x7F, float("nan"), tl.minimum(inverse, FP32_MAX))
    tl.store(table + 2 + byte, inverse)


# ------------------------------------------------------------------------------------------------
# Center and quantize. A program takes 16 tokens of its columns, and rounds them in blocks along the
# row, a few tokens at a time, then, from cache, in blocks along tokens. Either time a thread holds
# all 16 values of a block, so that threads exchange nothing. EVEN: no tile is cut off.


@triton.jit
def _pairs(x, at, inside, P: tl.constexpr, EVEN: tl.constexpr):
    """P pairs of neighbours in a row of x, from pair `at` (M, N, 1) on: the even values and the
    odd, (M, N, P), FP32. x points to floats, or, two BF16 at once, to int32."""
    if x.dtype.element_ty == tl.int32:
        x += at + tl.arange(0, P)[None, None, :]
        v = tl.load(x) if EVEN else tl.load(x, mask=inside, other=0)
        even, odd = _float(v << 16), _float(v & -0x10000)
    else:
        x += at * 2 + tl.arange(0, 2 * P)[None, None, :]
        v = tl.load(x) if EVEN else tl.load(x, mask=inside, other=0.0)
        even, odd = _even_odd(v.to(tl.float32))
    return even, odd


@triton.jit
def _even_odd(y):  # (M, N, 2P) -> (M, N, P) twice
    return tl.split(tl.reshape(y, (y.shape[0], y.shape[1], y.shape[2] // 2, 2)))


@triton.jit
def _residual(x, mean, at, inside, P: tl.constexpr, CENTER: tl.constexpr, EVEN: tl.constexpr):
    """`_pairs` of x less those of the mean; 0 outside."""
    even, odd = _pairs(x, at, inside, P, EVEN)
    if CENTER:
        even, odd = even - mean[0], odd - mean[1]
        if not EVEN:
            even, odd = tl.where(inside, even, 0.0), tl.where(inside, odd, 0.0)
    return even, odd


@triton.jit
def _center_quantize(
    x, mean, table, seeds, codes, scales, codes_col, scales_col, rows, cols,
    CENTER: tl.constexpr, ROWWISE: tl.constexpr, COLUMNWISE: tl.constexpr,
    STOCHASTIC: tl.constexpr, HEADROOM: tl.constexpr, FP4: tl.constexpr, EVEN: tl.constexpr,
    K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tiles, pid = tl.cdiv(cols, K), tl.program_id(0)
    i0, j0, cols2, cols16 = pid // tiles * 16, pid % tiles * K, cols // 2, cols // 16
    tile = i0.to(tl.int64) * cols16 + j0 // 16
    x += tile * (8 if x.dtype.element_ty == tl.int32 else 16)
    mean += j0
    key, mean_a, mean_b = None, None, None

    if ROWWISE:
        if STOCHASTIC:
            key = _hash(tl.load(seeds).to(tl.uint32, bitcast=True))
        codes, scales, first = codes + tile * 8, scales + tile, (tile * 8).to(tl.int32)
        block = tl.arange(0, K // 16)[None, :, None]  # its first half is a, the second b
        inside_j = j0 + block * 16 < cols
        if CENTER:
            mean_a = _pairs(mean, block * 8, inside_j, 4, EVEN)
            mean_b = _pairs(mean, block * 8 + 4, inside_j, 4, EVEN)
        for t in tl.static_range(0, 16, STEP):
            i = (t + tl.arange(0, STEP))[:, None, None]
            at, inside = i * cols2 + block * 8, (i0 + i < rows) & inside_j
            a0, a1 = _residual(x, mean_a, at, inside, 4, CENTER, EVEN)
            b0, b1 = _residual(x, mean_b, at + 4, inside, 4, CENTER, EVEN)
            largest = tl.max(tl.maximum(_largest(a0, a1), _largest(b0, b1)), 2, keep_dims=True)
            byte, inverse, sign = _block_scales(largest, table, HEADROOM)
            to = i * cols16 + block
            index = first + to * 8
            a = _encode(a0 * inverse, a1 * inverse, sign, index, key, STOCHASTIC, FP4)
            b = _encode(b0 * inverse, b1 * inverse, sign, index + 4, key, STOCHASTIC, FP4)
            c = tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (STEP, K // 16, 8))
            tl.store(codes + (to * 8 + tl.arange(0, 8)[None, None, :]), c, mask=inside)
            tl.store(scales + to, byte.to(tl.uint8), mask=inside)

    if COLUMNWISE:
        if STOCHASTIC:
            key = _hash(tl.load(seeds + 1).to(tl.uint32, bitcast=True))
        tile = (i0 // 2).to(tl.int64) * cols + j0
        codes_col, first = codes_col + tile, tile.to(tl.int32)
        quad, lane = tl.arange(0, K // 4)[None, :, None], tl.arange(0, 4)[None, None, :]
        inside_j = j0 + quad * 4 < cols
        if CENTER:
            mean_a = _pairs(mean, quad * 2, inside_j, 2, EVEN)
        largest, r = tl.zeros((1, K // 4, 4), tl.int32), ()
        for i in tl.static_range(16):
            at, inside = i * cols2 + quad * 2, (i0 + i < rows) & inside_j
            a0, a1 = _residual(x, mean_a, at, inside, 2, CENTER, EVEN)
            r += (tl.reshape(tl.join(a0, a1), (1, K // 4, 4)),)
            if i % 2:
                largest = tl.maximum(largest, _largest(r[i - 1], r[i]))
        byte, inverse, sign = _block_scales(largest, table, HEADROOM)
        for i in tl.static_range(8):
            to = i * cols + quad * 4
            a, b = r[2 * i] * inverse, r[2 * i + 1] * inverse
            c = _encode(a, b, sign, first + to, key, STOCHASTIC, FP4)
            tl.store(codes_col + (to + lane), c, mask=inside_j)
        to = i0 // 16 * cols + (j0 + quad * 4 + lane)
        tl.store(scales_col + to, byte.to(tl.uint8), mask=inside_j)


@triton.jit
def _quantize_weight(
    w, table, codes, codes_col, scales, cols,
    FP4: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """W (n, m) in 16 x 16 blocks, packed along rows for fprop and along columns for dgrad."""
    tiles, pid = tl.cdiv(cols, K), tl.program_id(0)
    i0, j0 = pid // tiles * 16, pid % tiles * K
    quad, n = tl.arange(0, K // 4)[None, :, None], tl.arange(0, 4)[None, None, :]
    n2, inside = tl.arange(0, 2)[None, None, :], j0 + quad * 4 < cols
    w += i0.to(tl.int64) * cols + j0
    largest, r = tl.zeros((1, K // 4, 4), tl.int32), ()
    for i in tl.static_range(16):
        at = w + (i * cols + quad * 4 + n)
        r += (tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0),)
        if i % 2:
            largest = tl.maximum(largest, _largest(r[i - 1], r[i]))
    largest = tl.max(tl.reshape(largest, (K // 16, 16)), 1, keep_dims=True)
    byte, inverse, sign = _block_scales(largest, table, False)
    block = tl.arange(0, K // 16)[:, None]
    to = i0 // 16 * (cols // 16) + (j0 // 16 + block)
    tl.store(scales + to, byte.to(tl.uint8), mask=j0 + block * 16 < cols)
    inverse = tl.reshape(tl.broadcast_to(inverse, (K // 16, 4)), (1, K // 4, 1))
    sign = tl.reshape(tl.broadcast_to(sign, (K // 16, 4)), (1, K // 4, 1))
    for i in tl.static_range(0, 16, 2):
        a, b = r[i] * inverse, r[i + 1] * inverse
        to = codes_col + (((i0 + i) // 2) * cols + (j0 + quad * 4 + n))
        tl.store(to, _encode(a, b, sign, None, None, False, FP4), mask=inside)
        to = codes + ((i0 + i) * (cols // 2) + (j0 // 2 + quad * 2 + n2))
        a0, a1 = _even_odd(a)
        tl.store(to, _encode(a0, a1, sign, None, None, False, FP4), mask=inside)
        b0, b1 = _even_odd(b)
        tl.store(to + cols // 2, _encode(b0, b1, sign, None, None, False, FP4), mask=inside)


# ------------------------------------------------------------------------------------------------
# The operators, registered so that torch.compile need not look inside, and on them fp4.py's three
# functions.


def _check(x, block):
    if x.ndim != 2 or x.numel() == 0 or any(n % b for n, b in zip(x.shape, block, strict=True)):
        raise ValueError(f"cannot quantize shape {tuple(x.shape)} in {block} blocks")


def statistics(x, center):
    """x (rows, cols) -> mean (cols,) or, not centered, (0,), and the residual's `_scale_table`."""
    rows, cols = x.shape
    block, parts, strip = STATISTICS
    parts = min(parts, triton.next_power_of_2(_cdiv(rows, 16)))
    partial = x.new_empty((parts, 3, cols), dtype=torch.float32)
    mean = x.new_empty(cols if center else 0, dtype=torch.float32)
    amax = x.new_empty(_cdiv(cols, strip), dtype=torch.float32)
    table = x.new_empty(130, dtype=torch.float32)
    part_rows, halvings = _cdiv(rows, parts), parts.bit_length() - 1
    _column_parts[_cdiv(cols, block), parts](x, partial, rows, cols, part_rows, block, num_warps=4)
    _column_stats[(len(amax),)](
        partial, mean, amax, rows, cols, center, parts, halvings, strip, num_warps=8
    )
    _scale_table[(1,)](amax, table, len(amax), triton.next_power_of_2(len(amax)), num_warps=4)
    return mean, table


def round_residual(x, mean, table, rowwise, columnwise, seeds, headroom):
    """What `center_quantize_op` returns, given the statistics of x."""
    (rows, cols), center = x.shape, len(mean) > 0
    out = _like_center_quantize(x, center, rowwise, columnwise, seeds, headroom)[1:-1]
    K, step, warps = QUANTIZE
    if x.dtype == torch.bfloat16:  # two at once, at addresses that are multiples of 4
        x = (x if x.data_ptr() % 4 == 0 else x.clone()).view(-1).view(torch.int32)
    _center_quantize[(_cdiv(rows, 16) * _cdiv(cols, K),)](
        x, mean, table, seeds, *out, rows, cols, center, rowwise, columnwise, seeds is not None,
        headroom, has_fp4(), rows % 16 == 0 and cols % K == 0, K, step, num_warps=warps,
        maxnreg=128,  # so that an SM holds 16 warps
    )  # fmt: skip
    return mean, *out, table[0].clone()


@torch.library.custom_op("nanofp4::center_quantize", mutates_args=())
def center_quantize_op(
    x: Tensor, center: bool, rowwise: bool, columnwise: bool, seeds: Tensor | None, headroom: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`center_quantize` in tensors: mean (m,); codes (T, m/2) and scales (T, m/16); columnwise,
    with T padded to 16, codes (T/2, m) and scales (T/16, m); tensor scale (). What is not wanted
    has no elements."""
    _check(x, (1, 16))
    x = x.contiguous()
    with torch.cuda.device_of(x):  # where Triton launches
        mean, table = statistics(x, center)
        return round_residual(x, mean, table, rowwise, columnwise, seeds, headroom)


@center_quantize_op.register_fake
def _like_center_quantize(x, center, rowwise, columnwise, seeds, headroom):
    (rows, cols), byte, fp32 = x.shape, torch.uint8, torch.float32
    row, column = rows if rowwise else 0, _cdiv(rows, 16) if columnwise else 0
    return (
        x.new_empty(cols if center else 0, dtype=fp32),
        x.new_empty((row, cols // 2), dtype=byte),
        x.new_empty((row, cols // 16), dtype=byte),
        x.new_empty((column * 8, cols), dtype=byte),
        x.new_empty((column, cols), dtype=byte),
        x.new_empty((), dtype=fp32),
    )


def center_quantize(x, center, rowwise=True, columnwise=True, seeds=None, headroom=False):
    """`fp4.center_quantize`. ValueError for a shape that does not fit."""
    mean, codes, scales, codes_col, scales_col, scale = center_quantize_op(
        x, center, rowwise, columnwise, seeds, headroom and seeds is not None
    )
    row = NVFP4(codes, scales.view(torch.float8_e4m3fn), scale, (1, 16), len(x))
    column = NVFP4(codes_col, scales_col.view(torch.float8_e4m3fn), scale, (16, 1), len(x))
    return mean[None] if center else None, row if rowwise else None, column if columnwise else None


@torch.library.custom_op("nanofp4::quantize_weight", mutates_args=())
def quantize_weight_op(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_weight` in tensors: codes (n, m/2), the same codes packed along rows (n/2, m),
    scales (n/16, m/16), tensor scale ()."""
    _check(w, (16, 16))
    codes, codes_col, scales, _ = _like_quantize_weight(w)
    w, (n, m), (K, _, warps) = w.contiguous(), w.shape, QUANTIZE
    with torch.cuda.device_of(w):
        _, table = statistics(w, False)
        _quantize_weight[(n // 16 * _cdiv(m, K),)](
            w, table, codes, codes_col, scales, m, has_fp4(), m % K == 0, K, num_warps=warps
        )
    return codes, codes_col, scales, table[0].clone()


@quantize_weight_op.register_fake
def _like_quantize_weight(w):
    n, m = w.shape
    return (
        w.new_empty((n, m // 2), dtype=torch.uint8),
        w.new_empty((n // 2, m), dtype=torch.uint8),
        w.new_empty((n // 16, m // 16), dtype=torch.uint8),
        w.new_empty((), dtype=torch.float32),
    )


def quantize_weight(w):
    """`fp4.quantize_weight`, with its codes packed along either axis. ValueError for a shape that
    is no multiple of 16."""
    codes, codes_col, scales, scale = quantize_weight_op(w)
    return NVFP4(codes, scales.view(torch.float8_e4m3fn), scale, (16, 16), len(w), codes_col)
