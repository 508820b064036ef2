"""NVFP4 from its definition, in numpy on the casts of ml_dtypes: fp4.py must equal it bit for bit.

All in FP32, one rounding an operation."""

import dataclasses

import ml_dtypes
import numpy as np

FLT_MAX = np.finfo(np.float32).max
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclasses.dataclass
class Quantized:
    codes: np.ndarray  # uint8 (R, C), one a byte; 7 throughout a NaN block
    scales: np.ndarray  # FP32 (R/bh, C/bw), E4M3 values
    tensor_scale: np.float32
    dequantized: np.ndarray  # FP32 (R, C)
    scaled: np.ndarray  # FP32 (R, C): the values before they are clamped and rounded to E2M1


def encode_scale(amax):
    """S_enc: one true division."""
    if amax == 0:
        return np.float32(1)
    scale = min(np.float32(2688) / amax, FLT_MAX)
    return scale if scale > 0 else np.float32(1)


@np.errstate(all="ignore")
def quantize(x, block, headroom=False):
    """x FP32 (R, C); R is padded to whole blocks with zeros and cut again."""
    (rows, cols), (bh, bw) = x.shape, block
    x = np.pad(x, ((0, -rows % bh), (0, 0)))
    blocks = x.reshape(len(x) // bh, bh, cols // bw, bw)
    block_amax = np.abs(blocks).max((1, 3), keepdims=True)  # NaN where the block holds one
    amax = np.nan_to_num(np.abs(x), nan=0, posinf=np.inf).max()
    encode = encode_scale(amax)

    target = block_amax * (encode * np.float32(1 / 6))
    if headroom:
        target = target * np.float32(17 / 16)
    scale = np.minimum(target, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    inverse = np.minimum(1 / (scale * (1 / encode)), FLT_MAX)
    scaled = blocks * inverse
    clipped = np.where(np.isnan(scaled), np.float32(6), np.clip(scaled, -6, 6))  # E2M1 has no NaN
    q = clipped.astype(ml_dtypes.float4_e2m1fn)

    tensor_scale = amax / np.float32(2688)
    value = q.astype(np.float32) * scale
    value = np.where(value == 0, value, value * tensor_scale)  # 0 times infinity stays 0
    codes, value, scaled = (a.reshape(x.shape)[:rows] for a in (q.view(np.uint8), value, scaled))
    return Quantized(codes, scale[:, 0, :, 0], tensor_scale, value, scaled)
