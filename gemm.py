"""Triton kernels for fp4.py's `gemm`: the product of packed NVFP4 operands.

    Y (M, N) = A (M, K) B (K, N)  +  left (M, 1) right (1, N)           2 M N K FLOPs

left and right are the mean's part: in fprop and dgrad a column of ones times a row, in wgrad the
rank-one update. It is added in registers. Bytes: 0.5625 read an element of A and B, 2 or 4 written
a result; by way of cuBLAS 4 more an operand, and 18 a result with a mean.

The decoded values are exact, so only the order of summation is the hardware's own.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    np.seterr(all="ignore")  # 1 / 0 and infinities are meant
FP4_CORES = 10, 12  # major versions of GPUs whose FP4 tensor cores `tl.dot_scaled` reaches
CUBLAS = 8, 9  # where codes are decoded for cuBLAS: 2 to 3 times as fast on an H200, 8 not timed
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
# The kernels.


@triton.jit
def _float(i):
    return i.to(tl.float32, bitcast=True)


@triton.jit
def _decode_scale(byte):  # E4M3 bytes 0 to 126, int32 -> FP32
    subnormal = _float(byte | 0x4B000000) - 8388608.0  # 0x4B000000 is 2^23: (2^23 + byte) - 2^23
    normal = _float((byte << 20) + (120 << 23))  # exponent bias 7 -> 127
    return tl.where(byte < 8, subnormal * 0.001953125, normal)  # 2^-9


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
# Their launchers, and the operator, registered so that torch.compile need not look inside.


def _major_version():
    return 0 if INTERPRET else triton.runtime.driver.active.get_current_target().arch // 10


def has_fp4():
    """Whether this machine's tensor cores, and its casts, know E2M1."""
    return _major_version() in FP4_CORES


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
        M // len(a_scales), N // len(b_scales), rank_one, bf16, has_fp4(),
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
    if has_fp4():
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
    return (q.codes if q.codes_col is None else q.codes_col).t(), scales.t()


def gemm(a, b, dtype, row=None, column=None):
    """`fp4.gemm`: (M, K) by (K, N), both packed along K."""
    (a_codes, a_scales), left, right = along(a, 1), None, None
    if row is not None:
        ones = row.new_ones(1, 1).expand(len(a_codes), 1)
        left, right = (ones if column is None else column)[:, 0], row[0]
    high = dtype if dtype == torch.bfloat16 else torch.float32
    scales = a.tensor_scale, b.tensor_scale
    return gemm_op(a_codes, a_scales, *along(b, 0), *scales, left, right, high).to(dtype)
