"""NVFP4, the number format: `quantize` rounds a matrix to it, an `NVFP4` holds the result.

    value          E2M1: sign, 2 exponent bits, 1 mantissa bit: 0 .5 1 1.5 2 3 4 6 and negatives
    block scale    E4M3 (3 mantissa bits, at most 448), one for 16 neighbouring values
    tensor scale   FP32, one per tensor, such that the largest block scale is 448

4 bits a value and 8 a block of 16 are 4.5 bits a value (arXiv 2509.25149, section 2). A block is
rounded in three steps, with S_enc = 2688 / amax, 2688 = 6 * 448, and amax the tensor's largest
magnitude:

    s = E4M3(block amax * S_enc / 6)      q = E2M1(x * S_enc / s)      x~ = q * s * amax / 2688

All is plain PyTorch, on any device. Rounding passes over memory three times: `_block_amax`,
`_block_scales` (on blocks, so 1/16 of a pass) and `_encode`; going back is `_decode`. `fuse`
compiles these four for a CPU.
"""

import dataclasses
import functools
import warnings

import torch
import torch.nn.functional as F

BLOCK = 16
BLOCKS = {(1, 16): (2,), (16, 1): (1,), (16, 16): (1, 3)}  # block: its axes in a `_tile`d matrix
E2M1_MAX, E4M3_MAX = 6.0, 448.0
FP32_MAX = torch.finfo(torch.float32).max
_fused = False  # set by `fuse`


def _fusible(f):
    """f, which torch.compile fuses on a CPU once `fuse` was called: the same bits, several times
    faster. Where the compiler fails, f as it stands."""
    compiled = functools.cache(lambda: torch.compile(f, dynamic=True, options={
        "cpp.vec_isa_ok": True, "cpp.dynamic_threads": True, "realize_opcount_threshold": 100,
    }))  # fmt: skip

    @functools.wraps(f)
    def run(x, *args):
        global _fused
        if _fused and x.device.type == "cpu" and not torch.compiler.is_compiling():
            try:
                return compiled()(x, *args)
            except Exception as error:  # compiler errors have no common type
                _fused = False
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"FP4 goes on in plain PyTorch, slowly: {reason}", stacklevel=2)
        return f(x, *args)

    return run


def _tile(x, block):
    """A view of x (R, C) in blocks: (R, C/16, 16), (R/16, 16, C) or (R/16, 16, C/16, 16)."""
    x = x.unflatten(1, (-1, BLOCK)) if block[1] == BLOCK else x
    return x.unflatten(0, (-1, BLOCK)) if block[0] == BLOCK else x


@_fusible
def _block_amax(x, block):
    """Per block, its axes kept: the largest magnitude (NaN if any is), and that without NaNs."""
    a, axes = _tile(x, block).abs(), BLOCKS[block]
    number = torch.where(a == a, a, 0.0)  # isnan is not vectorized, and five times slower
    return a.amax(axes, keepdim=True), number.amax(axes, keepdim=True)


def e4m3_round(x):
    """x in [0, 448], FP32, rounded to E4M3, ties to even, exactly: 3 mantissa bits, and below 2^-6
    a spacing of 2^-9. NaN stays NaN."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # x with its mantissa cleared
    spacing = power.clamp(min=2.0**-6) * 2.0**-3
    return torch.round(x / spacing) * spacing


def _tensor_scales(amax):
    """FP32 scalars: the tensor scale amax / 2688; S_enc = 2688 / amax, 1 for zeros; and 1 / S_enc,
    which differs from the first by a rounding.

    The operations and their order, here and below, are NVIDIA's, each one FP32 rounding. Divisions
    are tensor by tensor: PyTorch turns `2688.0 / tensor` into a reciprocal and a product, two
    roundings. Not fusible: of scalars, torch.compile lets every thread update the same one."""
    full = torch.full_like(amax, E2M1_MAX * E4M3_MAX)  # 2688
    encode = (full / amax).clamp(max=FP32_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    return amax / full, encode, 1 / encode


@_fusible
def _block_scales(block_amax, encode, decode, headroom):
    """Block scales, and the factors that map blocks into [-6, 6], FP32."""
    scale = block_amax * (encode * (1 / E2M1_MAX))
    if headroom:  # normal E4M3 rounds down by up to 1/17; with this no value then exceeds 6
        scale = scale * (17 / 16)
    scale = e4m3_round(scale.clamp(max=E4M3_MAX))
    return scale, (1 / (scale * decode)).clamp(max=FP32_MAX)


def _hash(i):
    """int32 -> int32: lowbias32 (C. Wellons, github.com/skeeto/hash-prospector)."""
    i = (i ^ (i >> 16 & 0xFFFF)) * 0x7FEB352D  # int32 wraps; the mask makes >> logical
    i = (i ^ (i >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return i ^ (i >> 16 & 0xFFFF)


def _noise(shape, block, key):
    """int32 in [0, 2^16), (R, C): a hash of its byte's index and the key has 16 bits for each of
    the two codes in the byte. Every device and every order of evaluation draws the same."""
    i = torch.arange(shape[0] * shape[1] // 2, dtype=torch.int32, device=key.device)
    axis, width = (1, shape[1]) if block[1] == 1 else (2, shape[1] // 2)  # neighbours in a byte
    hashes = _hash(i ^ key).view(-1, width)
    return torch.stack((hashes & 0xFFFF, hashes >> 16 & 0xFFFF), axis).view(shape)


@_fusible
def _encode(x, inverse, block, key):
    """4-bit codes, one a byte, in blocks: sign in bit 3 and magnitude 0..7, to nearest even if key
    is None. All codes of a NaN block are 7.

    Code min(2a, a + 2, a/2 + 4) is that of magnitude a: spacing is 1/2 up to 2, 1 up to 4, 2 up to
    6. Added to 2^23, whose last bit is 1, each line is rounded to even, and so is E2M1. Added to
    128, whose last bit is 2^-16, it has a fraction of 16 bits, the probability to go up, but for
    that last rounding, 2^-17: noise below 2^16 carries it. A code has no fraction, and stays."""
    y = _tile(x, block) * inverse
    y = torch.where(y == y, y, E2M1_MAX)
    a = torch.where(y.abs() < E2M1_MAX, y.abs(), E2M1_MAX)
    one = 2.0**23 if key is None else 128.0
    code = torch.minimum(torch.minimum(2 * a + one, a + (one + 2)), 0.5 * a + (one + 4))
    code = code.view(torch.int32)
    if key is not None:
        code = (code + _tile(_noise(x.shape, block, key), block)) >> 16
    return (code & 7 | y.view(torch.int32) >> 28 & 8).to(torch.uint8)  # -0.0 has its sign too


@_fusible
def _decode(codes, scale, block):
    """Codes (R, C), one a byte, times block scales, in blocks, FP32. The inverse of the three lines
    is max(c/2, c - 2, 2c - 8)."""
    codes = _tile(codes, block).to(torch.int32)
    c = (codes & 7).float()
    a = torch.maximum(torch.maximum(0.5 * c, c - 2), 2 * c - 8)
    return torch.where(codes > 7, -a, a) * scale


def _pack(codes, block):
    """Two codes a byte along the contraction axis, the even element in the low nibble."""
    if block[1] == 1:  # neighbours in a column
        return codes[0::2] | codes[1::2] << 4
    pairs = codes.contiguous().view(torch.int16)  # neighbours in a row
    return (pairs | pairs >> 4).to(torch.uint8)


def _unpack(packed, block):
    if block[1] == 1:
        return torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1)
    pairs = packed.to(torch.int16)
    return (pairs & 15 | (pairs & 0xF0) << 4).view(torch.uint8)


@dataclasses.dataclass(frozen=True)
class NVFP4:
    """A matrix (R, C) in NVFP4.

    codes         uint8 (R, C/2), or (R/2, C) for (16, 1) blocks: two codes a byte along the
                  contraction axis, the even element in the low nibble
    scales        float8_e4m3fn (R/bh, C/bw)
    tensor_scale  FP32 scalar, amax / 2688
    block         (bh, bw), one of BLOCKS
    rows          R before it was padded to a multiple of bh
    codes_col     for W from kernels: the codes again, packed along rows, (R/2, C)
    transposed    whether the matrix that is meant is the transpose of all this, (C, R)
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    block: tuple[int, int]
    rows: int
    codes_col: torch.Tensor | None = None
    transposed: bool = False

    def t(self):
        return dataclasses.replace(self, transposed=not self.transposed)

    def tensors(self):
        return self.codes, self.scales, self.tensor_scale

    def values(self):
        """E2M1 times block scale, without the tensor scale: BF16 on a GPU, FP32 on a CPU, exact in
        both."""
        scale = self.scales.float()
        for axis in BLOCKS[self.block]:
            scale = scale.unsqueeze(axis)
        codes = _unpack(self.codes, self.block)
        v = _decode(codes, scale, self.block).view(codes.shape)[: self.rows]
        v = v.bfloat16() if v.is_cuda else v
        return v.t() if self.transposed else v

    def dequantize(self):
        """FP32. With an infinite amax, zero stays zero and all else is infinite."""
        v = self.values().float()
        return torch.where(v == 0, v, v * self.tensor_scale)


@torch.no_grad()
def quantize(x, *, block=(1, 16), stochastic=False, seed=None, headroom=False, amax=None):
    """Round x to NVFP4.

    x           (R, C), of any float dtype and strides, taken in FP32; C a multiple of bw; zeros pad
                R to a multiple of bh
    block       (bh, bw), one of BLOCKS
    stochastic  round up or down at random, right on average given headroom; seed: an int, or an
                int32 scalar tensor, or None for one from PyTorch's default generator
    headroom    block scales 17/16 larger: else E4M3 rounds some down, values saturate at 6, and
                stochastic rounding is biased (slope .9966 on Gaussian data)
    amax        FP32 scalar tensor, the largest magnitude if that is known before: what is larger
                saturates. None: that of x

    Zero tensors and blocks give zeros; a NaN makes its block NaN, and no other. ValueError for a
    shape or block that does not fit. Arithmetic: Transformer Engine's reference quantizer, bit for
    bit."""
    if block not in BLOCKS:
        raise ValueError(f"block {block} is not one of {list(BLOCKS)}")
    if x.ndim != 2 or x.numel() == 0 or x.shape[1] % block[1] or not x.is_floating_point():
        raise ValueError(
            f"cannot quantize {x.dtype} of shape {tuple(x.shape)} in {block} blocks: not floats, "
            f"not a matrix, empty, or its columns no multiple of {block[1]}"
        )
    rows = x.shape[0]
    x = x.detach().float()  # a plain tensor: one compiled graph for weights and activations
    x = F.pad(x, (0, 0, 0, -rows % block[0])) if rows % block[0] else x
    key = None
    if stochastic:
        seed = draw_seeds(1, x.device)[0] if seed is None else seed
        key = _hash(torch.as_tensor(seed, dtype=torch.int32, device=x.device))
    block_amax, largest = _block_amax(x, block)
    tensor_scale, encode, decode = _tensor_scales(largest.amax() if amax is None else amax)
    scale, inverse = _block_scales(block_amax.flatten(), encode, decode, headroom)
    codes = _encode(x, inverse.view_as(block_amax), block, key).view(x.shape)
    scales = scale.to(torch.float8_e4m3fn).view(len(block_amax), -1)  # exact: e4m3_round was here
    return NVFP4(_pack(codes, block), scales, tensor_scale, block, rows)


def draw_seeds(n, device):
    """int32 (n,) from the device's default generator: rounding noise behaves like dropout, new at
    every call and reproducible through torch.manual_seed."""
    return torch.randint(2**31 - 1, (n,), dtype=torch.int32, device=device)


def fuse():
    """Make FP4 fast on a CPU: compile its passes, now for a first shape. Returns a line that says
    what runs; without a working C++ compiler that is plain PyTorch."""
    global _fused
    _fused = True
    torch._dynamo.config.recompile_limit = 64  # a graph for each block, rounding and layout
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize(torch.ones(32, 32), block=(16, 16))
    if _fused:
        return "FP4: passes fused by torch.compile"
    return f"FP4: plain PyTorch, slow, for want of a working C++ compiler ({caught[-1].message})"
