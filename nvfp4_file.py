"""NVFP4 as the package compressed-tensors stores it, its format `nvfp4-pack-quantized`: what
transformers, vLLM and SGLang read. hf.py writes it.

    weight_packed        uint8 (R, C/2), two codes a byte, the even column in the low nibble
    weight_scale         float8_e4m3fn (R, C/16), of 1 x 16 blocks
    weight_global_scale  FP32 (1,), one over our tensor scale: value = code * scale / global scale

(compressed_tensors 0.20.0, compressors/nvfp4 and quantization/lifecycle/forward_helpers.py.) The
scale of a 16 x 16 block stands in each of its 16 rows. Servers stack q, k and v, and gate and up,
and keep one global scale for a stack. Our model rounds the same stacks, so their parts agree.

Weights alone are in 4 bits, W4A16: servers decode them inside a kernel that multiplies in BF16, on
Blackwell too (vLLM; SGLang since its CompressedTensorsW4A16Fp4). W4A4 needs an input_global_scale
besides, a constant from calibration text (vLLM, compressed_tensors_w4a4_nvfp4.py). A run has none:
it scales each batch by its own amax. Nor would a server subtract the mean of fp4_mean.
"""

import torch

from cli import UserError
from nvfp4 import BLOCK, quantize


def config_fields(ignore):
    """The fields of config.json for linears in NVFP4, all but those whose names are in ignore."""
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK}
    weights |= {"symmetric": True, "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
        "ignore": ignore,
    }
    # compressed-tensors decodes into BF16, and a linear takes no other input then
    return {"torch_dtype": "bfloat16", "quantization_config": quantization}


def pack(parts, block):
    """{name: matrix (r, C)}, which are rounded as one stacked matrix (R, C), in blocks of 16 x 16
    or 1 x 16 -> {name_packed, name_scale, name_global_scale: the tensors above}. UserError if R or
    C is no multiple of 16."""
    stack = torch.cat(list(parts.values()))
    if any(width % BLOCK for width in stack.shape):
        shape = " x ".join(map(str, stack.shape))
        raise UserError(f"{' + '.join(parts)}: {shape} does not divide into blocks of {BLOCK}")
    q = quantize(stack, block=block)
    rows = [len(part) for part in parts.values()]
    scales = q.scales.repeat_interleave(block[0], 0)
    packed = {}
    for name, code, scale in zip(parts, q.codes.split(rows), scales.split(rows), strict=True):
        packed |= {f"{name}_packed": code, f"{name}_scale": scale}
        packed[f"{name}_global_scale"] = 1 / q.tensor_scale[None]
    return packed
