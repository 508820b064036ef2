"""Inference in 4 bits: what training measures in every batch, measured once and kept.

In training the mean is that of the batch at hand. For inference that is a burden. A token's result
then depends on its neighbours, and a token that comes alone is its own mean. But texts of one kind
have nearly the same mean, so a constant serves. With a stored mean μ and its direction u = μ / |μ|,

    fp4_mean      Y = R~ W~ᵀ + μ Wᵀ             R = X - μ         μ Wᵀ is a bias: it costs nothing
    fp4_project   Y = R~ W~ᵀ + (X uᵀ)(u Wᵀ)     R = X - (X uᵀ) u
    fp4           Y = R~ W~ᵀ                    R = X

The tensor scale of R is stored too, and W is rounded once. So a token's result is its own, whatever
comes with it.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fp4

WINDOWS, LENGTH = 8, 512  # how much training text `calibrate_on` reads, in tokens
MARGIN = 2  # times the largest residual seen: larger ones saturate. It costs E4M3 no precision.


class StoredMeanLinear(nn.Module):
    """What `calibrate` makes of an FP4Linear: (..., m) -> (..., n), forward only. W is gone; its
    NVFP4 codes and scales are buffers, and so are

    right   FP32 (1, m), the mean or its direction, or None if nothing is split off
    row     FP32 (1, n), right Wᵀ, or None
    amax    FP32 scalar, which scales all residuals

    RuntimeError where a gradient is wanted, and from load_state_dict, as all this belongs to one
    W. TypeError after a cast such as model.half()."""

    def forward(self, input):
        trains = input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trains and torch.is_grad_enabled():
            raise RuntimeError("stored means are for inference. HINT: with torch.no_grad()")
        if self.amax.dtype != torch.float32:
            raise TypeError("stored means are FP32. HINT: cast the model before calibrating it")
        x = input.reshape(-1, self.in_features)
        left, r = split_off(x, self.split, self.right)
        amaxes, _ = fp4.block_amaxes(r, (1, 16))
        r_q = fp4.quantize_scaled(r, (1, 16), amaxes, self.amax)
        scales = self.scales.view(torch.float8_e4m3fn)
        w_q = fp4.NVFP4(self.codes, scales, self.tensor_scale, self.block)
        y = fp4.gemm(r_q, w_q, input.dtype, left, self.row)
        y = y.reshape(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _load_from_state_dict(self, *args):
        raise RuntimeError("stored means belong to other weights. HINT: load, then calibrate")

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.recipe}"


def split_off(x, split, right):
    """x (T, m) as left (T, 1) times right (1, m) plus a residual (T, m): left, None for ones, and
    the residual, FP32."""
    x = x.float()
    if split == "none":
        return None, x
    if split == "mean":
        return None, x - right
    left = fp4.mm(x, right.t())
    return left, x - left * right


def split_of(recipe):
    """What the recipe of this name splits off X, none, mean or project, and the blocks of its W.
    None if no constant can stand for what it splits off."""
    function, argument = fp4.recipe_named(recipe)
    if function is fp4.LinearFP4:
        return "mean" if argument else "none", (16, 16)
    split = getattr(argument, "split", None)
    if split not in ("none", "mean", "project") or argument.mean_format != "fp32":
        return None
    if argument.massive or argument.stochastic_x or argument.round_mean_weight:
        return None
    if argument.directions > 1 or argument.four_over_six:
        return None
    return split, (1, 16) if argument.weight_1d else (16, 16)


@torch.no_grad()
def calibrate(model, batches):
    """Make the FP4Linears of a model StoredMeanLinears, in place, with the means and scales of
    these batches: inputs like those to come, such as token ids (B, T). Training is over then.

    Layers that see nothing stay as they are, and so do those whose recipe splits off what is no
    constant, such as fp4_svd. Returns how many were changed. ValueError, and nothing is changed,
    for activations that are not finite."""
    batches = list(batches)  # a generator could not be read twice
    layers = [m for m in model.modules() if isinstance(m, fp4.FP4Linear) and split_of(m.recipe)]
    totals, rights, amaxes = {}, {}, {}

    def watch(look):
        hooks = [layer.register_forward_pre_hook(look) for layer in layers]
        for batch in batches:
            model(batch)
        for hook in hooks:
            hook.remove()

    def add_up(layer, inputs):
        x = inputs[0].reshape(-1, layer.in_features).float()
        total, count = totals.get(layer, (0, 0))
        totals[layer] = total + x.sum(0, keepdim=True), count + len(x)

    def find_largest(layer, inputs):
        x = inputs[0].reshape(-1, layer.in_features)
        _, r = split_off(x, split_of(layer.recipe)[0], rights[layer])
        amax = r.abs().amax()
        amaxes[layer] = torch.maximum(amax, amaxes.get(layer, amax))

    watch(add_up)
    for layer, (total, count) in totals.items():
        split, _ = split_of(layer.recipe)
        mean = total / count
        rights[layer] = {"none": None, "mean": mean, "project": F.normalize(mean)}[split]
    watch(find_largest)
    if not all(amax.isfinite() for amax in amaxes.values()):
        raise ValueError("an activation is not finite: there is no mean to store")
    for layer, amax in amaxes.items():
        store(layer, rights[layer], MARGIN * amax)
    return len(amaxes)


def store(layer, right, amax):
    """Make one FP4Linear a StoredMeanLinear."""
    layer.split, layer.block = split_of(layer.recipe)
    w = layer.weight.float()
    w_q = fp4.quantize(w, layer.block)
    del layer.weight
    layer.__class__ = StoredMeanLinear
    layer.register_buffer("right", right)
    layer.register_buffer("row", None if right is None else fp4.mm(right, w.t()))
    layer.register_buffer("amax", amax)
    layer.register_buffer("codes", w_q.codes)
    layer.register_buffer("scales", w_q.scales.view(torch.uint8))  # pickle cannot load float8
    layer.register_buffer("tensor_scale", w_q.tensor_scale)


def calibrate_on(model, tokens):
    """`calibrate` a GPT on windows of data.shards.Tokens, which are training text in the model's
    own tokens; returns the number of layers changed."""
    length = min(model.config.block_size, LENGTH)
    windows = tokens.batch(tokens.spaced(WINDOWS, length), length)
    return calibrate(model, windows.to(model.head.weight.device).split(2))
