"""Triton kernels for fp4.py: column statistics, center and quantize, GEMM. The same bits anywhere.

fp4.py is the definition, and the plain twin of all that is here. Kernels save memory traffic. For a
T x m matrix in BF16, bytes an element:

    statistics          2 read: sums, minima and maxima of the columns, in two stages
    center + quantize   2 read, 0.5625 written for each of two directions of the blocks
    weights (FP32)      4 read twice, 1 written: one set of codes, packed along either axis
    GEMM                0.5625 read an operand, 2 written a result, the mean's part already in it
                        (by way of cuBLAS: 4 more an operand, and 18 a result with a mean)

NVFP4 needs a tensor's amax before it can round a single value, so vanilla FP4 reads X twice too.
Centering adds no pass: the columns' statistics give mean and extrema at once, and from these

    max |x - mu| = max over columns of max(colmax - mu, mu - colmin)

exactly, because FP32 subtraction is monotone. All that decides a bit is integer arithmetic or one
correctly rounded FP32 operation, in a fixed order. So Triton's interpreter on a CPU
(TRITON_INTERPRET=1), Ampere, Hopper and Blackwell agree; only a GEMM's order of summation and its
epilogue are the hardware's own. That excludes `/` (off by 2 ulp; `div_rn` is not), casts to BF16
and float8 that round (targets differ), and fused multiply-adds of products that are not exact.
The twin's mean is PyTorch's, in another order of summation; given one mean, all bits agree.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4 import NVFP4

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    np.seterr(all="ignore")  # 1 / 0 and infinities are meant
FP32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
STATISTICS = 1024, 128, 32  # columns of a program, parts of the tokens, columns in stage 2
QUANTIZE = 512, 2, 4  # columns of a program, tokens at a time, warps
FP4_CORES = 10, 12  # major versions of GPUs whose FP4 tensor cores `tl.dot_scaled` reaches
CUBLAS = 8, 9  # where codes are decoded for cuBLAS; `bench.py` times both, no GPU has been timed
GROUP = tl.constexpr(8)  # tiles of a GEMM that share an operand in L2
GEMM = {  # tile M, N, K, warps, stages by major version; 0: the interpreter
    0: (128, 128, 128, 4, 1),
    8: (128, 64, 64, 8, 3),
    9: (128, 128, 128, 8, 3),
    10: (128, 256, 256, 8, 3),
    12: (128, 64, 128, 8, 3),
}


def _cdiv(a, b):
    return -(-a // b)


# ------------------------------------------------------------------------------------------------
# Rounding, in registers.


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(i):
    return i.to(tl.float32, bitcast=True)


@triton.jit
def _hash(i):  # uint32 -> uint32: nvfp4._hash
    i = (i ^ (i >> 16)) * 0x7FEB352D
    i = (i ^ (i >> 15)) * 0x846CA68B
    return i ^ (i >> 16)


@triton.jit
def _decode_scale(byte):  # E4M3 bytes 0 to 126, int32 -> FP32
    subnormal = _float(byte | 0x4B000000) - 8388608.0  # 0x4B000000 is 2^23: (2^23 + byte) - 2^23
    normal = _float((byte << 20) + (120 << 23))  # exponent bias 7 -> 127
    return tl.where(byte < 8, subnormal * 0.001953125, normal)  # 2^-9


@triton.jit
def _block_scales(block_amax, table, HEADROOM: tl.constexpr):
    """FP32 amaxes of blocks -> E4M3 bytes (int32), factors into [-6, 6]. table: `_scale_table`."""
    s = block_amax * tl.load(table + 1)
    if HEADROOM:
        s = s * (17 / 16)
    s = tl.minimum(s, 448.0)
    power = tl.maximum(_float(_bits(s) & 0x7F800000), 0.015625)  # of two below s, at least 2^-6
    magic = power * 1048576.0  # 2^20 power has ulp power / 8, which is E4M3's spacing there
    s = (s + magic) - magic
    subnormal = _bits(s + 16384.0) & 7  # 2^14 has ulp 2^-9
    byte = tl.where(s < 0.015625, subnormal, (_bits(s) >> 20) - (120 << 3))  # bias 127 -> 7
    byte = tl.where(block_amax == block_amax, byte, 0x7F)
    return byte, tl.load(table + 2 + byte)


@triton.jit
def _encode(y, index, seed, STOCHASTIC: tl.constexpr):
    """Scaled values -> 4-bit codes, int32, on nvfp4._encode's three lines 2a, a + 2, a/2 + 4.
    Adding 2^23 rounds each to an integer, ties to even, and leaves it in the low bits. NaN: 7."""
    y = tl.where(y == y, y, 6.0)  # its sign, and what min makes of it, differ between machines
    a = tl.minimum(tl.abs(y), 6.0)
    if STOCHASTIC:
        exact = tl.minimum(tl.minimum(2 * a, a + 2), 0.5 * a + 4)
        code = exact.to(tl.int32)
        u = (_hash(index ^ _hash(seed)) & 0xFFFFFF).to(tl.int32).to(tl.float32) * 2.0**-24
        code += (u < exact - code.to(tl.float32)).to(tl.int32)
    else:
        lines = tl.minimum(2 * a + 8388608.0, a + 8388610.0)
        code = _bits(tl.minimum(lines, 0.5 * a + 8388612.0)) & 7
    return code | ((_bits(y) >> 28) & 8)


@triton.jit
def _pack_rows(c, M: tl.constexpr, K: tl.constexpr):  # (M, K) -> (M, K/2)
    low, high = tl.split(tl.reshape(c, (M, K // 2, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def _row_pairs(x, K: tl.constexpr):  # (16, K) -> its even rows and its odd ones, (8, K)
    return tl.split(tl.permute(tl.reshape(x, (8, 2, K)), (0, 2, 1)))


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
# row, a few tokens at a time, then, from cache, in blocks along tokens.


@triton.jit
def _residual(x, mean, i, j, rows, cols, CENTER: tl.constexpr):
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    r = tl.load(x + i.to(tl.int64)[:, None] * cols + j[None, :], mask=inside, other=0.0)
    r = r.to(tl.float32)
    if CENTER:
        r = tl.where(inside, r - tl.load(mean + j, mask=j < cols, other=0.0)[None, :], 0.0)
    return r


@triton.jit
def _center_quantize(
    x, mean, table, seeds, codes, scales, codes_t, scales_t, rows, cols, cols2, cols16,
    CENTER: tl.constexpr, ROWWISE: tl.constexpr, COLUMNWISE: tl.constexpr,
    STOCHASTIC: tl.constexpr, HEADROOM: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tiles, pid = tl.cdiv(cols, K), tl.program_id(0)
    i0, j0 = pid // tiles * 16, pid % tiles * K
    j, j2, j16 = (
        j0 + tl.arange(0, K),
        j0 // 2 + tl.arange(0, K // 2),
        j0 // 16 + tl.arange(0, K // 16),
    )
    seed, seed_t = tl.zeros((), tl.uint32), tl.zeros((), tl.uint32)
    if STOCHASTIC:
        seed = tl.load(seeds).to(tl.uint32, bitcast=True)
        seed_t = tl.load(seeds + 1).to(tl.uint32, bitcast=True)

    for t in tl.range(0, 16 if ROWWISE else 0, STEP):
        i = i0 + t + tl.arange(0, STEP)
        y = tl.reshape(_residual(x, mean, i, j, rows, cols, CENTER), (STEP, K // 16, 16))
        block_amax = _float(tl.max(_bits(y) & 0x7FFFFFFF, axis=2))  # as integers NaN is the largest
        byte, inverse = _block_scales(block_amax, table, HEADROOM)
        y = tl.reshape(y * tl.expand_dims(inverse, 2), (STEP, K))
        row, index = i.to(tl.int64)[:, None], (i[:, None] * cols + j[None, :]).to(tl.uint32)
        packed = _pack_rows(_encode(y, index, seed, STOCHASTIC), STEP, K)
        tl.store(codes + row * cols2 + j2, packed, mask=(row < rows) & (j2 < cols2)[None, :])
        byte = byte.to(tl.uint8)
        tl.store(scales + row * cols16 + j16, byte, mask=(row < rows) & (j16 < cols16)[None, :])

    if COLUMNWISE:
        i = i0 + tl.arange(0, 16)
        r = _residual(x, mean, i, j, rows, cols, CENTER)
        block_amax = _float(tl.max(_bits(r) & 0x7FFFFFFF, axis=0))
        byte, inverse = _block_scales(block_amax, table, HEADROOM)
        index = (i[:, None] * cols + j[None, :]).to(tl.uint32)
        low, high = _row_pairs(_encode(r * inverse[None, :], index, seed_t, STOCHASTIC), K)
        row = (i0 // 2 + tl.arange(0, 8)).to(tl.int64)[:, None]
        packed = (low | (high << 4)).to(tl.uint8)
        tl.store(codes_t + row * cols + j, packed, mask=(j < cols)[None, :])
        tl.store(scales_t + i0 // 16 * cols + j, byte.to(tl.uint8), mask=j < cols)


@triton.jit
def _quantize_weight(w, table, codes, codes_t, scales, n, m, m2, m16, K: tl.constexpr):
    """W (n, m) in 16 x 16 blocks, packed along rows for fprop and along columns for dgrad."""
    tiles, pid = tl.cdiv(m, K), tl.program_id(0)
    i0, j0 = pid // tiles * 16, pid % tiles * K
    i, j = i0 + tl.arange(0, 16), j0 + tl.arange(0, K)
    j2, j16 = j0 // 2 + tl.arange(0, K // 2), j0 // 16 + tl.arange(0, K // 16)
    r = _residual(w, None, i, j, n, m, False)
    block_amax = tl.reshape(tl.max(_bits(r) & 0x7FFFFFFF, axis=0), (K // 16, 16))
    byte, inverse = _block_scales(_float(tl.max(block_amax, axis=1)), table, False)
    y = tl.reshape(r, (16, K // 16, 16)) * tl.expand_dims(tl.expand_dims(inverse, 0), 2)
    c = _encode(tl.reshape(y, (16, K)), None, None, False)
    row = i.to(tl.int64)[:, None]
    tl.store(codes + row * m2 + j2, _pack_rows(c, 16, K), mask=(j2 < m2)[None, :])
    low, high = _row_pairs(c, K)
    row = (i0 // 2 + tl.arange(0, 8)).to(tl.int64)[:, None]
    tl.store(codes_t + row * m + j, (low | (high << 4)).to(tl.uint8), mask=(j < m)[None, :])
    tl.store(scales + i0 // 16 * m16 + j16, byte.to(tl.uint8), mask=j16 < m16)


# ------------------------------------------------------------------------------------------------
# GEMM: out (M, N) = a bᵀ times both tensor scales, plus left (M) times right (N): the mean's
# broadcast row in fprop and dgrad, its rank-one update in wgrad. 2 M N K FLOPs.


@triton.jit
def _decode(codes, scales, M: tl.constexpr, K2: tl.constexpr, DTYPE: tl.constexpr):
    """Codes (M, K2), scale bytes (M, K2/8) -> values of the even and of the odd elements (M, K2).
    E2M1's three bits, put across FP16's exponent and mantissa, are its value times 2^-14."""
    s = scales.to(tl.int32)
    s = tl.where(s == 0x7F, float("nan"), _decode_scale(s) * 16384.0)
    s = tl.reshape(tl.broadcast_to(tl.expand_dims(s, 2), (M, K2 // 8, 8)), (M, K2))
    c = codes.to(tl.uint16)
    even = ((c & 7) << 9 | (c & 8) << 12).to(tl.float16, bitcast=True)
    odd = ((c & 0x70) << 5 | (c & 0x80) << 8).to(tl.float16, bitcast=True)
    return (even.to(tl.float32) * s).to(DTYPE), (odd.to(tl.float32) * s).to(DTYPE)


@triton.jit
def _load_nvfp4(
    codes, scales, m, k, K2, stride_m, stride_k, scale_m, scale_k,
    ROWS: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes and scale bytes of rows m and columns k to k + BK, 0 beyond 2 K2. ROWS share scales."""
    k2, k16 = k // 2 + tl.arange(0, BK // 2), k // 16 + tl.arange(0, BK // 16)
    codes += m.to(tl.int64)[:, None] * stride_m + k2.to(tl.int64)[None, :] * stride_k
    scales += (m // ROWS).to(tl.int64)[:, None] * scale_m + k16.to(tl.int64)[None, :] * scale_k
    if EVEN:
        return tl.load(codes), tl.load(scales)
    inside, inside_s = (k2 < K2)[None, :], (k16 < K2 // 8)[None, :]
    return tl.load(codes, mask=inside, other=0), tl.load(scales, mask=inside_s, other=0)


@triton.jit
def _bf16_bits(x):  # FP32 -> BF16 as uint16, ties to even; the interpreter's cast truncates
    i = x.to(tl.uint32, bitcast=True)
    i = tl.where(x == x, i + 0x7FFF + (i >> 16 & 1), 0x7FC00000)
    return (i >> 16).to(tl.uint16)


@triton.jit
def _gemm(
    a, a_scales, b, b_scales, scale_a, scale_b, left, right, out, M, N, K2,
    a_m, a_k, as_m, as_k, b_n, b_k, bs_n, bs_k, left_m, right_n,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, RANK_ONE: tl.constexpr, BF16: tl.constexpr,
    NATIVE: tl.constexpr, DTYPE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid, down, across = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP * across)  # of GROUP rows of tiles
    height = tl.minimum(down - group * GROUP, GROUP)
    pm, pn = group * GROUP + pid % height, pid % (GROUP * across) // height
    m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    m_in, n_in = m % M, n % N  # wrapped, so that loads need no mask; what is beyond is not stored
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, 2 * K2, BK):
        ac, asc = _load_nvfp4(a, a_scales, m_in, k, K2, a_m, a_k, as_m, as_k, A_ROWS, BK, EVEN)
        bc, bsc = _load_nvfp4(b, b_scales, n_in, k, K2, b_n, b_k, bs_n, bs_k, B_ROWS, BK, EVEN)
        if NATIVE:
            asc = asc.to(tl.float8e4nv, bitcast=True)
            bsc = bsc.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(ac, asc, "e2m1", tl.trans(bc), bsc, "e2m1", acc)
        else:  # contracts the even columns, then the odd ones, so that nothing is interleaved
            a_even, a_odd = _decode(ac, asc, BM, BK // 2, DTYPE)
            b_even, b_odd = _decode(bc, bsc, BN, BK // 2, DTYPE)
            acc = tl.dot(a_even, tl.trans(b_even), acc)
            acc = tl.dot(a_odd, tl.trans(b_odd), acc)
    y = acc * (tl.load(scale_a) * tl.load(scale_b))
    if RANK_ONE:
        y += tl.load(left + m_in * left_m)[:, None] * tl.load(right + n_in * right_n)[None, :]
    out += m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, _bf16_bits(y) if BF16 else y, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _decode_matrix(
    codes, scales, out, M, K2, c_m, c_k, s_m, s_k, o_m, o_k,
    ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """For cuBLAS: 0.5625 bytes an element read, 2 written."""
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BK
    c, s = _load_nvfp4(codes, scales, m % M, k, K2, c_m, c_k, s_m, s_k, ROWS, BK, False)
    even, odd = _decode(c, s, BM, BK // 2, tl.float32)
    y = tl.reshape(tl.join(_bf16_bits(even), _bf16_bits(odd)), (BM, BK))
    k += tl.arange(0, BK)
    out += m.to(tl.int64)[:, None] * o_m + k.to(tl.int64)[None, :] * o_k
    tl.store(out, y, mask=(m < M)[:, None] & (k < 2 * K2)[None, :])


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
    _center_quantize[(_cdiv(rows, 16) * _cdiv(cols, K),)](
        x, mean, table, seeds, *out, rows, cols, cols // 2, cols // 16, center, rowwise, columnwise,
        seeds is not None, headroom, K, step, num_warps=warps,
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
    mean, codes, scales, codes_t, scales_t, scale = center_quantize_op(
        x, center, rowwise, columnwise, seeds, headroom and seeds is not None
    )
    row = NVFP4(codes, scales.view(torch.float8_e4m3fn), scale, (1, 16), len(x))
    column = NVFP4(codes_t, scales_t.view(torch.float8_e4m3fn), scale, (16, 1), len(x))
    return mean[None] if center else None, row if rowwise else None, column if columnwise else None


@torch.library.custom_op("nanofp4::quantize_weight", mutates_args=())
def quantize_weight_op(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_weight` in tensors: codes (n, m/2), the same codes packed along rows (n/2, m),
    scales (n/16, m/16), tensor scale ()."""
    _check(w, (16, 16))
    codes, codes_t, scales, _ = _like_quantize_weight(w)
    w, (n, m), (K, _, warps) = w.contiguous(), w.shape, QUANTIZE
    with torch.cuda.device_of(w):
        _, table = statistics(w, False)
        _quantize_weight[(n // 16 * _cdiv(m, K),)](
            w, table, codes, codes_t, scales, n, m, m // 2, m // 16, K, num_warps=warps
        )
    return codes, codes_t, scales, table[0].clone()


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
    codes, codes_t, scales, scale = quantize_weight_op(w)
    return NVFP4(codes, scales.view(torch.float8_e4m3fn), scale, (16, 16), len(w), codes_t)


def _major_version():
    return 0 if INTERPRET else triton.runtime.driver.active.get_current_target().arch // 10


def gemm_fused(a, a_scales, b, b_scales, scale_a, scale_b, left, right, dtype):
    """`gemm_op` in one kernel."""
    (M, K2), N, version = a.shape, len(b), _major_version()
    tile = GEMM.get(version, GEMM[8])
    BM, BN, BK, warps, stages = tile if 2 * K2 % tile[2] == 0 else GEMM[8]  # masked loads: smaller
    out = a.new_empty((M, N), dtype=dtype)
    bf16, rank_one = dtype == torch.bfloat16, right is not None
    strides = *a.stride(), *a_scales.stride(), *b.stride(), *b_scales.stride()
    strides += (left.stride(0), right.stride(0)) if rank_one else (0, 0)
    _gemm[(_cdiv(M, BM) * _cdiv(N, BN),)](
        a, a_scales, b, b_scales, scale_a, scale_b, left, right,
        out.view(torch.uint16) if bf16 else out, M, N, K2, *strides,
        M // len(a_scales), N // len(b_scales), rank_one, bf16, version in FP4_CORES,
        tl.float32 if INTERPRET else tl.bfloat16, 2 * K2 % BK == 0, BM, BN, BK,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def decode(codes, scales):
    """Codes (M, K/2), scales (M, K/16) or (M/16, K/16), of any strides -> their values without the
    tensor scale, BF16 (M, K), exactly, in the same order in memory."""
    M, K2 = codes.shape
    out = codes.new_empty((M, 2 * K2), dtype=torch.bfloat16)
    if codes.stride(0) == 1:
        out = out.view(-1, M).t()
    _decode_matrix[_cdiv(M, 64), _cdiv(K2, 32)](
        codes, scales, out.view(torch.uint16), M, K2, *codes.stride(), *scales.stride(),
        *out.stride(), M // len(scales), 64, 64, num_warps=4,
    )  # fmt: skip
    return out


def gemm_cublas(a, a_scales, b, b_scales, scale_a, scale_b, left, right, dtype):
    """`gemm_op` by cuBLAS, on operands decoded to BF16."""
    y = torch.mm(decode(a, a_scales), decode(b, b_scales).t(), out_dtype=torch.float32)
    scale, out = scale_a * scale_b, y if dtype == y.dtype else torch.empty_like(y, dtype=dtype)
    if right is None:
        return torch.mul(y, scale, out=out)
    return torch.addcmul(y.mul_(scale), left[:, None], right, out=out)


def backend():
    """What multiplies the codes on this machine, in words."""
    if INTERPRET:
        return "Triton's interpreter"
    if _major_version() in FP4_CORES:
        return "Triton, FP4 tensor cores"
    return f"Triton, codes decoded to BF16{', cuBLAS' if _major_version() in CUBLAS else ''}"


@torch.library.custom_op("nanofp4::gemm", mutates_args=())
def gemm_op(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, scale_a: Tensor, scale_b: Tensor,
    left: Tensor | None, right: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """a bᵀ plus left times right, (M, N), in dtype (BF16 or FP32), accumulated in FP32.

    a, b           codes (M, K/2), (N, K/2); scales (., K/16), or with 16 x 16 blocks (./16, K/16)
    scale_a, _b    tensor scales (), FP32
    left, right    FP32 (M,) and (N,), of any strides, or None
    On Blackwell the packed codes are multiplied. Elsewhere they are decoded to BF16, exactly: in
    a pass of its own before cuBLAS, or inside the kernel."""
    with torch.cuda.device_of(a):
        variant = gemm_cublas if _major_version() in CUBLAS else gemm_fused
        return variant(a, a_scales, b, b_scales, scale_a, scale_b, left, right, dtype)


@gemm_op.register_fake
def _(a, a_scales, b, b_scales, scale_a, scale_b, left, right, dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)  # len() would fix the size


def along(q, axis):
    """Codes and scale bytes of an NVFP4, this axis last, along which its codes must be packed."""
    scales = q.scales.view(torch.uint8)
    if bool(axis) != q.transposed:
        return q.codes, scales
    return (q.codes if q.codes_t is None else q.codes_t).t(), scales.t()


def gemm(a, b, dtype, left=None, right=None):
    """`fp4.gemm`: (M, K) by (K, N), both packed along K."""
    part = (None, None) if right is None else (left[:, 0], right[0])
    high = dtype if dtype == torch.bfloat16 else torch.float32
    scales = a.tensor_scale, b.tensor_scale
    return gemm_op(*along(a, 1), *along(b, 0), *scales, *part, high).to(dtype)
