"""Triton kernels for fp4.py: column statistics, center and quantize, GEMM. Tensors in, tensors out.

fp4.py is the definition, and has the plain twin of everything here. Kernels save memory traffic.
Bytes an element, for X (T, m) in BF16:

    statistics          2 read: sums, minima and maxima of the columns, in two stages
    center + quantize   2 read, 0.5625 written for each of two directions of the blocks
    weights (FP32)      4 read twice, 1 written: one set of codes, packed along either axis
    GEMM                0.5625 read for each operand, 2 or 4 written for the result

NVFP4 needs a tensor's amax before it can round a single value, so vanilla FP4 reads X twice too.
Centering adds no pass. The columns' statistics give mean and extrema at once, and from these

    max |x - μ| = max over columns of max(colmax - μ, μ - colmin)

exactly, because FP32 subtraction is monotone.

All that decides a bit is integer arithmetic or one correctly rounded FP32 operation, in a fixed
order. So Triton's interpreter on a CPU (TRITON_INTERPRET=1), Ampere, Hopper and Blackwell agree.
For codes and scales that excludes `/`, which is off by 2 ulp (`div_rn` is not), Triton's casts to
BF16 and float8, where targets differ, and fused multiply-adds of inexact products. PTX's own casts
do as fp4.py does: to E4M3 (from sm_89 on) and E2M1 (Blackwell), to nearest even, at most 448 or 6.
The twin's mean is PyTorch's, in another order of summation; given one mean, all bits agree. In a
GEMM the decoded values are exact, and the order of summation is the hardware's own.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
if INTERPRET:
    from triton.runtime import interpreter

    np.seterr(all="ignore")  # 1 / 0 and infinities are meant
    options = interpreter.InterpreterOptions(sanitize_overflow=False)  # integers wrap, as is meant
    interpreter.interpreter_builder.options = options
FP32_MAX = tl.constexpr(torch.finfo(torch.float32).max)

# Tiles. What a program of each kernel takes.
PART_ROWS, PART_COLUMNS, PART_PROGRAMS, STAT_COLUMNS = 32, 256, 512, 32
ROUND_COLUMNS, ROUND_WARPS = 512, 4
ROUND_TOKENS = 16 if INTERPRET else 4
GROUP = tl.constexpr(8)  # rows of tiles of a GEMM that share an operand in L2
GEMM_TILES = {  # of the GPU's major version: M, N, K, warps, stages; 0: the interpreter
    0: (128, 128, 128, 4, 1),
    8: (128, 64, 64, 8, 3),
    9: (128, 128, 128, 8, 3),
    10: (128, 256, 256, 8, 3),
    12: (128, 64, 128, 8, 3),
}
FP4_CORES = 10, 12  # major versions of GPUs whose FP4 tensor cores `tl.dot_scaled` reaches
CUBLAS = 8, 9  # where codes are decoded for cuBLAS: an H200 (9) is 2 to 3 times as fast so

# ------------------------------------------------------------------------------------------------
# Rounding, in registers.


def device_function(f):
    """What kernels call. The interpreter would patch tl at every call, for half of its time."""
    return f if INTERPRET else triton.jit(f)


@device_function
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@device_function
def _float(i):
    return i.to(tl.float32, bitcast=True)


@device_function
def _hash(i):
    """uint32 -> uint32: fp4.hash32."""
    i = (i ^ (i >> 16)) * 0x7FEB352D
    i = (i ^ (i >> 15)) * 0x846CA68B
    return i ^ (i >> 16)


@device_function
def _larger(a, b):
    """The larger magnitude, as int32 bits, so that NaN is above all numbers. On a GPU a maximum
    drops NaN if not told to keep it, in the interpreter never."""
    return _bits(tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL))


@device_function
def _block_scales(amaxes, table, CASTS: tl.constexpr):
    """From amaxes of blocks, as their bits: E4M3 bytes, int32; factors into [-6, 6]; and a mask of
    eight codes' signs, 0 for NaN, whose sign differs between machines. table: `_scale_table`. The
    cast takes the place of 13 instructions a block."""
    s = _float(amaxes) * tl.load(table + 1)
    if CASTS >= 1:
        byte = tl.inline_asm_elementwise(
            """{ .reg .b16 two; cvt.rn.satfinite.e4m3x2.f32 two, 0f00000000, $1;
            cvt.u32.u16 $0, two; }""",
            constraints="=r,f",
            args=[s],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        power = tl.maximum(_float(_bits(tl.minimum(s, 448.0)) & 0x7F800000), 0.015625)
        magic = power * 1048576.0  # 2^20 power has ulp power / 8, the step of fp4.e4m3_round
        s = (tl.minimum(s, 448.0) + magic) - magic
        subnormal = _bits(s + 16384.0) & 7  # 2^14 has ulp 2^-9
        byte = tl.where(s < 0.015625, subnormal, (_bits(s) >> 20) - (120 << 3))  # bias 127 -> 7
        byte = tl.where(amaxes > 0x7F800000, 0x7F, byte)
    return byte, tl.load(table + 2 + byte), tl.where(byte == 0x7F, 0, 0x88888888).to(tl.uint32)


@device_function
def _word(low, high, signs, number, key, STOCHASTIC: tl.constexpr, CASTS: tl.constexpr):
    """Scaled values (N, 4) of low and of high nibbles -> four bytes of codes, int32 (N,), word
    `number` of the tensor. signs: of `_block_scales`, (N,).

    Codes join the word as `_code` has them, one instruction each, and what they have too much comes
    off once a word. So do the signs, with three bits of the exponent, which a mask drops at the
    end. CASTS: see `_casts`."""
    y, z = _four(low), _four(high)
    if CASTS == 2 and not STOCHASTIC:
        word = tl.inline_asm_elementwise(
            """{ .reg .b8 a, b, c, d;
            cvt.rn.satfinite.e2m1x2.f32 a, $5, $1; cvt.rn.satfinite.e2m1x2.f32 b, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 c, $7, $3; cvt.rn.satfinite.e2m1x2.f32 d, $8, $4;
            mov.b32 $0, {a, b, c, d}; }""",
            constraints="=r,f,f,f,f,f,f,f,f",
            args=[y[0], y[1], y[2], y[3], z[0], z[1], z[2], z[3]],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        noise_low, noise_high = None, None
        if STOCHASTIC:  # fp4.noise
            lane = tl.arange(0, 4).to(tl.uint32)[None, :]
            u = _hash(number.to(tl.uint32) ^ key)[:, None] * (lane * 0x3C6EF372 + 1)
            noise_low, noise_high = (u ^ u >> 16) & 0xFFFF, u >> 16
        c, d = _four(_code(low, noise_low, STOCHASTIC)), _four(_code(high, noise_high, STOCHASTIC))
        word, sign = tl.zeros_like(c[0]), tl.zeros_like(c[0])
        for k in tl.static_range(1, -1, -1):  # two bytes' codes at a time, in halves of the word
            word = word * 16 + _halves(d[k], d[k + 2], STOCHASTIC)
            word = word * 16 + _halves(c[k], c[k + 2], STOCHASTIC)
        word += 0x88888D00 if STOCHASTIC else 0x05000000  # beside the codes the sums had -this
        for k in tl.static_range(3, -1, -1):
            sign = sign << 4 | z[k].to(tl.uint32, bitcast=True) >> 28  # and 3 bits of the exponent
            sign = sign << 4 | y[k].to(tl.uint32, bitcast=True) >> 28
        word = (word | sign & signs).to(tl.int32, bitcast=True)
    return word


@device_function
def _halves(a, b, STOCHASTIC: tl.constexpr):
    """The 16 bits of two codes, where `_code` has them, as one uint32."""
    return a >> 16 | b & 0xFFFF0000 if STOCHASTIC else a + (b << 16)


@device_function
def _code(y, noise, STOCHASTIC: tl.constexpr):
    """Scaled values -> codes 0..7, and 2^23 or, rounded with noise, 128's bits above them, by the
    three lines of fp4.encode. They are compared as integers: Hopper takes the least of three at
    once, adds noise and clamps at once, and NaN is above all numbers."""
    a, one = tl.abs(y), 128.0 if STOCHASTIC else 8388608.0
    code = tl.minimum(_bits(2 * a + one), _bits(a + (one + 2)))
    code = tl.minimum(code, _bits(0.5 * a + (one + 4))).to(tl.uint32)
    if STOCHASTIC:
        return tl.minimum(code + noise, 0x4307FFFF)  # 128 + 7
    return tl.minimum(code, 0x4B000007)  # 2^23 + 7


@device_function
def _four(v):
    """(N, 4), or (M, N, 2, 2), -> four tensors, in order."""
    if len(v.shape) == 2:
        v = tl.reshape(v, (v.shape[0], 2, 2))
    v02, v13 = tl.split(v)
    v0, v2 = tl.split(v02)
    v1, v3 = tl.split(v13)
    return v0, v1, v2, v3


# ------------------------------------------------------------------------------------------------
# Column statistics. Stage 1: a program adds up one part of the tokens, row after row, each thread
# its own columns. Stage 2: a program adds the parts of its columns in pairs, and writes the mean;
# the last one to finish knows the largest magnitude of the residual, and makes the table.


@device_function
def _pairs(x, pair, inside):
    """Pairs of neighbours in a row of x: the even values and the odd, FP32; 0 outside. x points to
    int32, two BF16, or to int64, two FP32."""
    v = tl.load(x + pair, mask=inside, other=0)
    if x.dtype.element_ty == tl.int32:
        even, odd = v << 16, v & -0x10000
    else:
        even, odd = v.to(tl.int32), (v >> 32).to(tl.int32)
    return _float(even), _float(odd)


@triton.jit
def _column_parts(x, parts, state, T, m, part_tokens, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    strip, part = tl.program_id(0), tl.program_id(1)
    if strip + part == 0:
        tl.store(state + tl.arange(0, 2), 0)
    pair = strip * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    inside = pair < m // 2
    zero = tl.zeros((BLOCK // 2, 2), tl.float32)
    stats = zero, zero + float("inf"), zero + float("-inf")
    start = part * part_tokens
    stop = tl.maximum(tl.minimum(start + part_tokens, T), start)
    row, even = x + start.to(tl.int64) * (m // 2), start + (stop - start) // ROWS * ROWS
    for _ in range(start, even, ROWS):
        rows = ()
        for _ in tl.static_range(ROWS):  # all are under way before the first is needed
            rows += (tl.join(*_pairs(row, pair, inside)),)
            row += m // 2
        for i in tl.static_range(ROWS):
            stats = _add_row(stats, rows[i])
    for _ in range(even, stop):
        stats = _add_row(stats, tl.join(*_pairs(row, pair, inside)))
        row += m // 2
    out = parts + part * 3 * m + (2 * pair[:, None] + tl.arange(0, 2)[None, :])
    for i in tl.static_range(3):
        tl.store(out + i * m, stats[i], mask=inside[:, None])


@device_function
def _add_row(stats, v):
    total, low, high = stats
    if INTERPRET:  # elsewhere a minimum drops NaN by itself
        low = tl.minimum(low, tl.where(v == v, v, float("inf")))
        high = tl.maximum(high, tl.where(v == v, v, float("-inf")))
    else:
        low, high = tl.minimum(low, v), tl.maximum(high, v)
    return total + v, low, high


@triton.jit
def _column_stats(
    parts, mean, state, table, T, m,
    CENTER: tl.constexpr, PARTS: tl.constexpr, HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = parts + tl.arange(0, PARTS)[:, None] * 3 * m + j[None, :]
    inside = (j < m)[None, :]
    low = tl.min(tl.load(cell + m, mask=inside, other=0.0), axis=0)
    high = tl.max(tl.load(cell + 2 * m, mask=inside, other=0.0), axis=0)
    if CENTER:
        total = tl.load(cell, mask=inside, other=0.0)
        for n in tl.static_range(1, HALVINGS + 1):  # tl.sum's order is not the same everywhere
            halves = tl.reshape(total, (2, PARTS >> n, BLOCK))
            a, b = tl.split(tl.permute(halves, (1, 2, 0)))
            total = a + b
        mu = tl.div_rn(tl.reshape(total, (BLOCK,)), T * 1.0)
        tl.store(mean + j, mu, mask=j < m)
        low, high = mu - low, high - mu
    else:
        low = -low
    largest = tl.maximum(tl.where(low > 0, low, 0.0), tl.where(high > 0, high, 0.0))  # no NaN
    tl.atomic_max(state, _bits(tl.max(largest, axis=0)))
    if tl.atomic_add(state + 1, 1) == tl.num_programs(0) - 1:
        _scale_table(_float(tl.atomic_max(state, 0)), table)


@device_function
def _scale_table(amax, table):
    """From a tensor's amax its table, FP32 (130,): [0] tensor scale, [1] factor from a block's amax
    to its scale, [2 + byte] factor into [-6, 6] for each scale byte, NaN for NaN's. With it no
    block needs a division."""
    s_enc = tl.minimum(tl.div_rn(2688.0, amax), FP32_MAX)
    s_enc = tl.where((amax == 0) | (s_enc == 0), 1.0, s_enc)
    tl.store(table, tl.div_rn(amax, 2688.0))
    tl.store(table + 1, s_enc * (1 / 6))
    byte = tl.arange(0, 128)
    factor = tl.div_rn(1.0, _decode_scale(byte) * tl.div_rn(1.0, s_enc))
    factor = tl.where(byte == 0x7F, float("nan"), tl.minimum(factor, FP32_MAX))
    tl.store(table + 2 + byte, factor)


# ------------------------------------------------------------------------------------------------
# Center and quantize. A program takes 16 tokens of its columns. It rounds them in blocks along
# tokens, with all 16 loads under way at once, and then, read again from cache, in blocks along
# features, a few tokens at a time. Shapes are chosen so that in both passes a thread holds whole
# blocks, and threads exchange nothing. EVEN: no tile is cut off. sm_90 needs 27 instructions an
# element to nearest and 34 stochastically, both directions together.


@device_function
def _residual(x, mean, left, pair, inside, CENTER: tl.constexpr, EVEN: tl.constexpr):
    """`_pairs` of x less those of the mean, or `left` times them; 0 outside."""
    even, odd = _pairs(x, pair, inside)
    if CENTER:
        if left is not None:
            even, odd = even - left * mean[0], odd - left * mean[1]
        else:
            even, odd = even - mean[0], odd - mean[1]
        if not EVEN:
            even, odd = tl.where(inside, even, 0.0), tl.where(inside, odd, 0.0)
    return even, odd


@device_function
def _round_rows(
    x, mean, left, table, seed, codes, scales, token, feature, T, m,
    CENTER: tl.constexpr, STOCHASTIC: tl.constexpr, CASTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """In blocks along features: codes (T, m/8), eight a word, scales (T, m/16). A thread takes a
    block, its halves a and b. x and mean point to the tile."""
    key, mean_a, mean_b, part = None, None, None, None
    if STOCHASTIC:
        key = _hash(tl.load(seed).to(tl.uint32, bitcast=True))
    tile = token.to(tl.int64) * (m // 16) + feature // 16
    codes, scales, first = codes + tile * 2, scales + tile, (tile * 2).to(tl.int32)
    thread = tl.arange(0, STEP * BLOCK // 16)
    row, block = thread // (BLOCK // 16), thread % (BLOCK // 16)
    inside_m = (feature + block * 16 < m) | EVEN
    four, two = tl.arange(0, 4)[None, :], tl.arange(0, 2)[None, :]
    pair = block[:, None] * 8 + four
    if CENTER:
        mean_a = _pairs(mean, pair, inside_m[:, None])
        mean_b = _pairs(mean, pair + 4, inside_m[:, None])
    for t in tl.static_range(0, 16, STEP):
        i = t + row
        inside = (inside_m & (token + i < T)) | EVEN
        pair = (i * (m // 2) + block * 8)[:, None] + four
        if left is not None:
            part = tl.load(left + token + i, mask=inside, other=0.0)[:, None]
        a = _residual(x, mean_a, part, pair, inside[:, None], CENTER, EVEN)
        b = _residual(x, mean_b, part, pair + 4, inside[:, None], CENTER, EVEN)
        amaxes = tl.max(tl.maximum(_larger(a[0], a[1]), _larger(b[0], b[1])), 1)
        byte, factor, signs = _block_scales(amaxes, table, CASTS)
        offs = i * (m // 16) + block
        factor, number = factor[:, None], first + offs * 2
        a = _word(a[0] * factor, a[1] * factor, signs, number, key, STOCHASTIC, CASTS)
        b = _word(b[0] * factor, b[1] * factor, signs, number + 1, key, STOCHASTIC, CASTS)
        tl.store(codes + ((offs * 2)[:, None] + two), tl.join(a, b), mask=inside[:, None])
        tl.store(scales + offs, byte.to(tl.uint8), mask=inside)


@device_function
def _round_columns(
    x, mean, left, table, seed, codes, scales, token, feature, T, m,
    CENTER: tl.constexpr, STOCHASTIC: tl.constexpr, CASTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In blocks along tokens: codes (T/2, m/4), two tokens of 4 features a word, scales (T/16, m).
    A thread takes 4 features. x and mean point to the tile."""
    N: tl.constexpr = BLOCK // 4
    key, mean_a, part = None, None, None
    tile = (token // 2).to(tl.int64) * (m // 4) + feature // 4
    codes, first = codes + tile, tile.to(tl.int32)
    quad = tl.arange(0, N)
    inside_m = (feature + quad * 4 < m) | EVEN
    pair = quad[:, None] * 2 + tl.arange(0, 2)[None, :]
    if CENTER:
        mean_a = _pairs(mean, pair, inside_m[:, None])
    r, amaxes = (), tl.zeros((N, 4), tl.int32)
    for i in tl.static_range(16):
        inside = (inside_m & (token + i < T)) | EVEN
        if left is not None:
            part = tl.load(left + token + i, mask=token + i < T, other=0.0)
        a = _residual(x, mean_a, part, i * (m // 2) + pair, inside[:, None], CENTER, EVEN)
        r += (tl.reshape(tl.join(a[0], a[1]), (N, 4)),)
        if i % 2:
            amaxes = tl.maximum(amaxes, _larger(r[i - 1], r[i]))
    byte, factor, signs = _block_scales(amaxes, table, CASTS)
    s = _four(signs)
    signs = (s[0] & 0xFF) | (s[1] & 0xFF00) | (s[2] & 0xFF0000) | (s[3] & 0xFF000000)
    if STOCHASTIC:
        key = _hash(tl.load(seed).to(tl.uint32, bitcast=True))
    for i in tl.static_range(8):
        a, b, number = r[2 * i] * factor, r[2 * i + 1] * factor, i * (m // 4) + quad
        word = _word(a, b, signs, first + number, key, STOCHASTIC, CASTS)
        tl.store(codes + number, word, mask=inside_m)
    offs = token // 16 * m + feature + (quad * 4)[:, None] + tl.arange(0, 4)[None, :]
    tl.store(scales + offs, byte.to(tl.uint8), mask=inside_m[:, None])


@triton.jit
def _center_quantize(
    x, mean, table, seeds, codes, scales, codes_t, scales_t, T, m,
    CENTER: tl.constexpr, ROWWISE: tl.constexpr, COLUMNWISE: tl.constexpr,
    STOCHASTIC: tl.constexpr, CASTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    strips, pid = tl.cdiv(m, BLOCK), tl.program_id(0)
    token, feature = pid // strips * 16, pid % strips * BLOCK
    x += token.to(tl.int64) * (m // 2) + feature // 2
    mean += feature // 2
    seed_t = None
    if STOCHASTIC:
        seed_t = seeds + 1
    if COLUMNWISE:
        _round_columns(
            x, mean, None, table, seed_t, codes_t, scales_t, token, feature, T, m,
            CENTER, STOCHASTIC, CASTS, EVEN, BLOCK,
        )  # fmt: skip
    if ROWWISE:
        _round_rows(
            x, mean, None, table, seeds, codes, scales, token, feature, T, m,
            CENTER, STOCHASTIC, CASTS, EVEN, BLOCK, STEP,
        )  # fmt: skip


@triton.jit
def _quantize_weight(
    w, table, codes, codes_t, scales, m,
    CASTS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W (n, m) in 16 x 16 blocks, packed along m for fprop, codes (n, m/4), four columns in 16
    bits, and along n for dgrad, codes_t (n/2, m/4), two rows of 4 columns a word. A thread takes 4
    columns."""
    N: tl.constexpr = BLOCK // 16
    strips, pid = tl.cdiv(m, BLOCK), tl.program_id(0)
    row, column = pid // strips * 16, pid % strips * BLOCK
    block = tl.arange(0, N)[:, None]
    quad = block * 4 + tl.arange(0, 4)[None, :]
    inside = (column + quad * 4 < m) | EVEN
    pair = quad[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    w += row.to(tl.int64) * (m // 2) + column // 2
    r, amaxes = (), tl.zeros_like(pair)
    for i in tl.static_range(16):
        r += (_pairs(w, i * (m // 2) + pair, inside[:, :, None]),)
        amaxes = tl.maximum(amaxes, _larger(r[i][0], r[i][1]))
    byte, factor, signs = _block_scales(tl.max(tl.max(amaxes, 2), 1, keep_dims=True), table, CASTS)
    offs = row // 16 * (m // 16) + column // 16 + block
    tl.store(scales + offs, byte.to(tl.uint8), mask=column + block * 16 < m)
    factor = factor[:, :, None]
    for i in tl.static_range(0, 16, 2):
        a0, a1 = r[i][0] * factor, r[i][1] * factor  # even and odd columns
        b0, b1 = r[i + 1][0] * factor, r[i + 1][1] * factor
        word = _word(tl.join(a0, a1), tl.join(b0, b1), signs, None, None, False, CASTS)
        tl.store(codes_t + ((row + i) // 2 * (m // 4) + column // 4 + quad), word, mask=inside)
        low = tl.permute(tl.join(a0, b0), (0, 1, 3, 2))
        high = tl.permute(tl.join(a1, b1), (0, 1, 3, 2))
        word = _word(low, high, signs, None, None, False, CASTS)
        out = codes + ((row + i) * (m // 4) + column // 4 + quad)
        tl.store(out, word.to(tl.int16), mask=inside)
        tl.store(out + m // 4, (word >> 16).to(tl.int16), mask=inside)


# ------------------------------------------------------------------------------------------------
# GEMM: Y (M, N) = A (M, K) Bᵀ + left (M, 1) right (1, N), 2 M N K FLOPs. left right is the mean's
# part: in fprop and dgrad a column of ones times a row, in wgrad the rank-one update.


@device_function
def _decode_scale(byte):
    """E4M3 bytes 0 to 126, int32 -> FP32."""
    subnormal = _float(byte | 0x4B000000) - 8388608.0  # 0x4B000000 is 2^23: (2^23 + byte) - 2^23
    normal = _float((byte << 20) + (120 << 23))  # exponent bias 7 -> 127
    return tl.where(byte < 8, subnormal * 0.001953125, normal)  # 2^-9


@device_function
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


@device_function
def _load_nvfp4(
    codes, scales, offs_m, k, K2, stride_m, stride_k, scale_stride_m, scale_stride_k,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes and scale bytes of rows offs_m and columns k to k + BLOCK_K, 0 beyond 2 K2. ROWS share
    scales."""
    k2, k16 = k // 2 + tl.arange(0, BLOCK_K // 2), k // 16 + tl.arange(0, BLOCK_K // 16)
    row, block_row = offs_m.to(tl.int64)[:, None], (offs_m // ROWS).to(tl.int64)[:, None]
    codes += row * stride_m + k2.to(tl.int64)[None, :] * stride_k
    scales += block_row * scale_stride_m + k16.to(tl.int64)[None, :] * scale_stride_k
    if EVEN:
        return tl.load(codes), tl.load(scales)
    inside, inside_s = (k2 < K2)[None, :], (k16 < K2 // 8)[None, :]
    return tl.load(codes, mask=inside, other=0), tl.load(scales, mask=inside_s, other=0)


@device_function
def _bf16_bits(x):
    """FP32 -> BF16 as uint16, ties to even; the interpreter's cast truncates."""
    i = x.to(tl.uint32, bitcast=True)
    i = tl.where(x == x, i + 0x7FFF + (i >> 16 & 1), 0x7FC00000)
    return (i >> 16).to(tl.uint16)


@triton.jit
def _gemm(
    a, a_scales, b, b_scales, a_scale, b_scale, left, right, out, M, N, K2,
    stride_am, stride_ak, stride_asm, stride_ask, stride_bn, stride_bk, stride_bsn, stride_bsk,
    stride_left, stride_right,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, RANK_ONE: tl.constexpr, BF16: tl.constexpr,
    NATIVE: tl.constexpr, DTYPE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid, down, across = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    pid_m, pid_n = group * GROUP + pid % height, pid % (GROUP * across) // height  # any order does
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m, n = offs_m % M, offs_n % N  # wrapped: loads need no mask, and what is beyond is not stored
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, 2 * K2, BLOCK_K):
        a_codes, a_bytes = _load_nvfp4(
            a, a_scales, m, k, K2, stride_am, stride_ak, stride_asm, stride_ask,
            A_ROWS, BLOCK_K, EVEN,
        )  # fmt: skip
        b_codes, b_bytes = _load_nvfp4(
            b, b_scales, n, k, K2, stride_bn, stride_bk, stride_bsn, stride_bsk,
            B_ROWS, BLOCK_K, EVEN,
        )  # fmt: skip
        if NATIVE:
            a_bytes = a_bytes.to(tl.float8e4nv, bitcast=True)
            b_bytes = b_bytes.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(a_codes, a_bytes, "e2m1", tl.trans(b_codes), b_bytes, "e2m1", acc)
        else:  # contracts the even columns, then the odd ones, so that nothing is interleaved
            a_even, a_odd = _decode(a_codes, a_bytes, BLOCK_M, BLOCK_K // 2, DTYPE)
            b_even, b_odd = _decode(b_codes, b_bytes, BLOCK_N, BLOCK_K // 2, DTYPE)
            acc = tl.dot(a_even, tl.trans(b_even), acc)
            acc = tl.dot(a_odd, tl.trans(b_odd), acc)
    y = acc * (tl.load(a_scale) * tl.load(b_scale))
    if RANK_ONE:
        column, row = tl.load(left + m * stride_left), tl.load(right + n * stride_right)
        y += column[:, None] * row[None, :]
    out += offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out, _bf16_bits(y) if BF16 else y, mask=inside)


@triton.jit
def _decode_matrix(
    codes, scales, out, M, K2,
    stride_m, stride_k, scale_stride_m, scale_stride_k, out_stride_m, out_stride_k,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For cuBLAS: 0.5625 bytes an element read, 2 written."""
    offs_m, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_K
    c, s = _load_nvfp4(
        codes, scales, offs_m % M, k, K2, stride_m, stride_k, scale_stride_m, scale_stride_k,
        ROWS, BLOCK_K, False,
    )  # fmt: skip
    even, odd = _decode(c, s, BLOCK_M, BLOCK_K // 2, tl.float32)
    y = tl.reshape(tl.join(_bf16_bits(even), _bf16_bits(odd)), (BLOCK_M, BLOCK_K))
    offs_k = k + tl.arange(0, BLOCK_K)
    row, column = offs_m.to(tl.int64)[:, None], offs_k.to(tl.int64)[None, :]
    inside = (offs_m < M)[:, None] & (offs_k < 2 * K2)[None, :]
    tl.store(out + row * out_stride_m + column * out_stride_k, y, mask=inside)


# ------------------------------------------------------------------------------------------------
# Launchers. Those that fp4.py calls are registered as operators, so that torch.compile need not
# look inside.


def _major_version():
    return 0 if INTERPRET else triton.runtime.driver.active.get_current_target().arch // 10


def _casts():
    """Which exact casts of FP32 this machine has: 0 none, 1 to E4M3, 2 to E2M1 too."""
    arch = 0 if INTERPRET else triton.runtime.driver.active.get_current_target().arch
    return (arch >= 89) + (arch // 10 in FP4_CORES)


def has_fp4():
    """Whether this machine's tensor cores, and its casts, know E2M1."""
    return _major_version() in FP4_CORES


def backend():
    """What multiplies the codes on this machine, in words."""
    if INTERPRET:
        return "Triton's interpreter"
    if has_fp4():
        return "Triton, FP4 tensor cores"
    return f"Triton, codes decoded to BF16{', cuBLAS' if _major_version() in CUBLAS else ''}"


def _check(x, block):
    if x.ndim != 2 or x.numel() == 0 or any(n % b for n, b in zip(x.shape, block, strict=True)):
        raise ValueError(f"cannot quantize shape {tuple(x.shape)} in {block} blocks")


def _as_pairs(x):
    """x, contiguous, as `_pairs` reads it; elsewhere in memory where an address must be even."""
    x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    x = x if x.data_ptr() % (2 * x.element_size()) == 0 else x.clone()
    return x.view(-1).view(torch.int32 if x.dtype == torch.bfloat16 else torch.int64)


def column_parts(x):
    """x (T, m) -> sum, minimum and maximum of each column in each part of the tokens, FP32
    (parts, 3, m), minima and maxima without NaN; and the state that `_column_stats` needs."""
    T, m = x.shape
    strips, chunks = triton.cdiv(m, PART_COLUMNS), triton.cdiv(T, PART_ROWS)
    parts = triton.next_power_of_2(min(triton.cdiv(PART_PROGRAMS, strips), chunks))
    partial = x.new_empty((parts, 3, m), dtype=torch.float32)
    state = x.new_empty(2, dtype=torch.int32)  # bits of the amax, and how many programs are done
    _column_parts[strips, parts](
        _as_pairs(x), partial, state, T, m, part_tokens=triton.cdiv(chunks, parts) * PART_ROWS,
        ROWS=PART_ROWS, BLOCK=PART_COLUMNS, num_warps=4, maxnreg=128,  # for all ROWS at once
    )  # fmt: skip
    return partial, state


def statistics(x, center):
    """x (T, m) -> mean (m,) or, not centered, (0,), and the residual's `_scale_table`."""
    T, m = x.shape
    partial, state = column_parts(x)
    mean = x.new_empty(m if center else 0, dtype=torch.float32)
    table = x.new_empty(130, dtype=torch.float32)
    _column_stats[(triton.cdiv(m, STAT_COLUMNS),)](
        partial, mean, state, table, T, m,
        CENTER=center, PARTS=len(partial), HALVINGS=len(partial).bit_length() - 1,
        BLOCK=STAT_COLUMNS, num_warps=8,
    )  # fmt: skip
    return mean, table


def round_residual(x, mean, table, rowwise, columnwise, seeds):
    """What `center_quantize_op` returns, given the statistics of x."""
    T, m = x.shape
    center = len(mean) > 0
    _, codes, scales, codes_t, scales_t, _ = _like_center_quantize(
        x, center, rowwise, columnwise, seeds
    )
    bf16 = x.dtype == torch.bfloat16
    _center_quantize[(triton.cdiv(T, 16) * triton.cdiv(m, ROUND_COLUMNS),)](
        _as_pairs(x), mean.view(torch.int64), table, seeds,
        codes.view(torch.int32), scales, codes_t.view(torch.int32), scales_t, T, m,
        CENTER=center, ROWWISE=rowwise, COLUMNWISE=columnwise,
        STOCHASTIC=seeds is not None, CASTS=_casts(),
        EVEN=T % 16 == 0 and m % ROUND_COLUMNS == 0,
        BLOCK=ROUND_COLUMNS, STEP=ROUND_TOKENS,
        num_warps=ROUND_WARPS, maxnreg=96 if bf16 else 128,  # an SM holds 20 warps, or 16
    )  # fmt: skip
    return mean, codes, scales, codes_t, scales_t, table[0]


@torch.library.custom_op("nanofp4::center_quantize", mutates_args=())
def center_quantize_op(
    x: Tensor, center: bool, rowwise: bool, columnwise: bool, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (T, m) -> mean (m,); codes (T, m/2) and scales (T, m/16); columnwise, with T padded to 16,
    codes (T/2, m) and scales (T/16, m); tensor scale (). What is not wanted has no elements.
    ValueError for a shape that does not fit."""
    _check(x, (1, 16))
    x = x.contiguous()
    with torch.cuda.device_of(x):  # where Triton launches
        mean, table = statistics(x, center)
        return round_residual(x, mean, table, rowwise, columnwise, seeds)


@center_quantize_op.register_fake
def _like_center_quantize(x, center, rowwise, columnwise, seeds):
    T, m = x.shape
    rows = T if rowwise else 0
    blocks = triton.cdiv(T, 16) if columnwise else 0
    return (
        x.new_empty(m if center else 0, dtype=torch.float32),
        x.new_empty((rows, m // 2), dtype=torch.uint8),
        x.new_empty((rows, m // 16), dtype=torch.uint8),
        x.new_empty((blocks * 8, m), dtype=torch.uint8),
        x.new_empty((blocks, m), dtype=torch.uint8),
        x.new_empty((), dtype=torch.float32),
    )


def center_quantize(x, center, rowwise, columnwise, seeds):
    """`fp4.center_quantize`: mean (1, m) or None, and codes, scales and tensor scale of r and of
    r_t, each packed along its last axis."""
    mean, codes, scales, codes_t, scales_t, tensor_scale = center_quantize_op(
        x, center, rowwise, columnwise, seeds
    )
    mean = mean[None] if center else None
    scales, scales_t = scales.view(torch.float8_e4m3fn), scales_t.view(torch.float8_e4m3fn)
    return mean, (codes, scales, tensor_scale), (codes_t.t(), scales_t.t(), tensor_scale)


@torch.library.custom_op("nanofp4::quantize_weight", mutates_args=())
def quantize_weight_op(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w (n, m) -> codes (n, m/2), the same codes packed along n (n/2, m), scales (n/16, m/16),
    tensor scale (). ValueError for a shape that is no multiple of 16."""
    _check(w, (16, 16))
    codes, codes_t, scales, _ = _like_quantize_weight(w)
    w = w.contiguous()
    n, m = w.shape
    with torch.cuda.device_of(w):
        _, table = statistics(w, False)
        _quantize_weight[(n // 16 * triton.cdiv(m, ROUND_COLUMNS),)](
            _as_pairs(w), table, codes.view(torch.int16), codes_t.view(torch.int32), scales, m,
            CASTS=_casts(), EVEN=m % ROUND_COLUMNS == 0, BLOCK=ROUND_COLUMNS,
            num_warps=ROUND_WARPS,
        )  # fmt: skip
    return codes, codes_t, scales, table[0]


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
    """`fp4.quantize_weight`: codes, scales and tensor scale of W~ and of W~ᵀ, each packed along its
    last axis."""
    codes, codes_t, scales, tensor_scale = quantize_weight_op(w)
    scales = scales.view(torch.float8_e4m3fn)
    return (codes, scales, tensor_scale), (codes_t.t(), scales.t(), tensor_scale)


def gemm_fused(a, a_scales, b, b_scales, a_scale, b_scale, left, right, dtype):
    """`gemm_op` in one kernel."""
    (M, K2), N = a.shape, len(b)
    tile = GEMM_TILES.get(_major_version(), GEMM_TILES[8])
    if 2 * K2 % tile[2]:
        tile = GEMM_TILES[8]  # smaller, for loads with masks
    BLOCK_M, BLOCK_N, BLOCK_K, warps, stages = tile
    out = a.new_empty((M, N), dtype=dtype)
    bf16, rank_one = dtype == torch.bfloat16, right is not None
    if rank_one and left is None:
        left = right.new_ones(1).expand(M)
    _gemm[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)](
        a, a_scales, b, b_scales, a_scale, b_scale, left, right,
        out.view(torch.uint16) if bf16 else out, M, N, K2,
        *a.stride(), *a_scales.stride(), *b.stride(), *b_scales.stride(),
        stride_left=left.stride(0) if rank_one else 0,
        stride_right=right.stride(0) if rank_one else 0,
        A_ROWS=M // len(a_scales), B_ROWS=N // len(b_scales), RANK_ONE=rank_one, BF16=bf16,
        NATIVE=has_fp4(), DTYPE=tl.float32 if INTERPRET else tl.bfloat16,
        EVEN=2 * K2 % BLOCK_K == 0,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
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
    _decode_matrix[triton.cdiv(M, 64), triton.cdiv(K2, 32)](
        codes, scales, out.view(torch.uint16), M, K2,
        *codes.stride(), *scales.stride(), *out.stride(),
        ROWS=M // len(scales), BLOCK_M=64, BLOCK_K=64, num_warps=4,
    )  # fmt: skip
    return out


def gemm_cublas(a, a_scales, b, b_scales, a_scale, b_scale, left, right, dtype):
    """`gemm_op` by cuBLAS, on operands decoded to BF16: 4 bytes an element of each more, and 8 of
    the result, or, with left, 16."""
    y = torch.mm(decode(a, a_scales), decode(b, b_scales).t(), out_dtype=torch.float32)
    scale, out = a_scale * b_scale, y if dtype == y.dtype else torch.empty_like(y, dtype=dtype)
    if right is None:
        return torch.mul(y, scale, out=out)
    if left is None:
        return torch.addcmul(right, y, scale, out=out)
    return torch.addcmul(y.mul_(scale), left[:, None], right, out=out)


@torch.library.custom_op("nanofp4::gemm", mutates_args=())
def gemm_op(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, a_scale: Tensor, b_scale: Tensor,
    left: Tensor | None, right: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """a bᵀ plus left times right, (M, N), in dtype (BF16 or FP32), accumulated in FP32.

    a, b              codes (M, K/2), (N, K/2); scales, uint8 (., K/16) or (./16, K/16)
    a_scale, b_scale  tensor scales (), FP32
    left, right       FP32 (M,) and (N,), of any strides, or None; left: None for ones too
    On Blackwell the packed codes are multiplied. Elsewhere they are decoded to BF16, exactly: in
    a pass of its own before cuBLAS, or inside the kernel."""
    with torch.cuda.device_of(a):
        variant = gemm_cublas if _major_version() in CUBLAS else gemm_fused
        return variant(a, a_scales, b, b_scales, a_scale, b_scale, left, right, dtype)


@gemm_op.register_fake
def _like_gemm(a, a_scales, b, b_scales, a_scale, b_scale, left, right, dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)  # len() would fix the size


def gemm(a, a_scales, a_scale, b, b_scales, b_scale, left, right, dtype):
    """`fp4.gemm` of codes, scales and tensor scales. ValueError for codes that are not packed along
    the contraction, 8 bytes of them to a scale."""
    if a.shape[1] != 8 * a_scales.shape[1] or b.shape[1] != 8 * b_scales.shape[1]:
        raise ValueError(
            f"codes {tuple(a.shape)}, {tuple(b.shape)}: not packed along the last axis"
        )
    left = None if left is None else left[:, 0]
    right = None if right is None else right[0]
    high = dtype if dtype == torch.bfloat16 else torch.float32
    a_scales, b_scales = a_scales.view(torch.uint8), b_scales.view(torch.uint8)
    return gemm_op(a, a_scales, b, b_scales, a_scale, b_scale, left, right, high).to(dtype)
