"""NVFP4 from its definition, in numpy on the casts of ml_dtypes: fp4.py must equal it bit for bit.
All in FP32, one rounding an operation. Then what several test files share."""

import concurrent.futures
import dataclasses
import multiprocessing

import ml_dtypes
import numpy as np

import fp4

INF, NAN = float("inf"), float("nan")
FP32_MAX = np.finfo(np.float32).max
E2M1_TYPE, E4M3_TYPE = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


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
    scale = min(np.float32(2688) / amax, FP32_MAX)
    return scale if scale > 0 else np.float32(1)


@np.errstate(all="ignore")
def quantize(x, block):
    """x FP32 (R, C); R is padded to whole blocks with zeros."""
    bh, bw = block
    x = np.pad(x, ((0, -len(x) % bh), (0, 0)))
    blocks = x.reshape(len(x) // bh, bh, x.shape[1] // bw, bw)
    block_amax = np.abs(blocks).max((1, 3), keepdims=True)  # NaN where the block holds one
    amax = np.nan_to_num(np.abs(x), nan=0, posinf=np.inf).max()
    s_enc = encode_scale(amax)

    scale = np.minimum(block_amax * (s_enc * np.float32(1 / 6)), np.float32(448))
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    factor = np.minimum(1 / (scale * (1 / s_enc)), FP32_MAX)
    scaled = blocks * factor
    clipped = np.where(np.isnan(scaled), np.float32(6), np.clip(scaled, -6, 6))  # E2M1 has no NaN
    q = clipped.astype(ml_dtypes.float4_e2m1fn)

    tensor_scale = amax / np.float32(2688)
    value = q.astype(np.float32) * scale
    value = np.where(value == 0, value, value * tensor_scale)  # 0 times infinity stays 0
    codes, value, scaled = (a.reshape(x.shape) for a in (q.view(np.uint8), value, scaled))
    return Quantized(codes, scale[:, 0, :, 0], tensor_scale, value, scaled)


def codes(q):
    """Those of an NVFP4, one a byte, (R, C)."""
    return fp4.unpack(q.codes, axis=int(len(q.codes) == len(q.scales) * q.block[0]))


def same(a, b):
    """The same bits, signs of zeros included; any NaN equals any NaN."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    bits = (a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))
    return a.shape == b.shape and bool(bits.all())


def relative(a, b):
    """RMS error of a, by the RMS of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def backward(layer, x, d):
    """y, dX and dW of a layer, for the gradient d of its output. A seed may come before: all noise
    is drawn here."""
    x = x.detach().clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(d)
    return y.detach(), x.grad, layer.weight.grad


def in_a_new_process(function):
    """What a function of a test file returns there, where no conftest.py was read."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function).result(timeout=600)
