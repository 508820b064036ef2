"""Inference in 4 bits: what training measures in every batch, measured once and kept.

In training the mean is that of the batch at hand. For inference that is a burden. A token's result
then depends on its neighbours, and a token that comes alone is its own mean. But texts of one kind
have nearly the same mean, so a constant serves. With a stored mean μ, and its direction u = μ / |μ|,

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
    """What `calibrate` makes of an FP4Linear: (..., m) -> (..., n), forward only.

    right         FP32 (1, m), the mean or its direction, or None if nothing is split off
    row           FP32 (1, n), right Wᵀ, or None
    amax          FP32 scalar, by which all residuals are scaled
    codes, scales, tensor_scale    W in NVFP4, for the blocks in `block`; W itself is gone

    RuntimeError where a gradient is wanted, and from load_state_dict: stored means belong to the
    weights with which they were measured. TypeError after a cast such as model.half()."""

    def forward(self, input):
        wanted = input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if wanted and torch.is_grad_enabled():
            raise RuntimeError("stored means are for inference. HINT: with torch.no_grad()")
        if self.amax.dtype != torch.float32:
            raise TypeError("stored means are FP32. HINT: cast the model before it is calibrated")
        x = input.reshape(-1, self.in_features)
        left, r = split_off(x, self.right, self.project)
        amaxes, _ = fp4.block_amaxes(r, (1, 16))
        r = fp4.quantize_scaled(r, (1, 16), amaxes, self.amax)
        w = fp4.NVFP4(self.codes, self.scales, self.tensor_scale, self.block)
        y = fp4.gemm(r, w, input.dtype, left, self.row)
        y = y.reshape(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _load_from_state_dict(self, *args):
        raise RuntimeError("stored means belong to other weights. HINT: load, then calibrate")

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.recipe}"


def split_off(x, right, project):
    """x (T, m) as left (T, 1) times right (1, m) plus a residual: left, None for ones, and the
    residual, FP32."""
    x = x.float()
    if right is None:
        return None, x
    if not project:
        return None, x - right
    left = fp4.mm(x, right.t())
    return left, x - left * right


def split_of(recipe):
    """What the recipe of this name splits off X, none, mean or project, and the blocks of its W; or
    (None, None) if no constants can stand for that."""
    function, argument = fp4.recipe_named(recipe)
    if function is fp4.LinearFP4:
        return "mean" if argument else "none", (16, 16)
    split = getattr(argument, "split", None)
    if split not in ("none", "mean", "project") or argument.mean_format != "fp32":
        return None, None
    if argument.massive or argument.stochastic_x or argument.round_mean_weight:
        return None, None
    return split, (1, 16) if argument.weight_1d else (16, 16)


@torch.no_grad()
def calibrate(model, batches):
    """Make every FP4Linear of a model a StoredMeanLinear, in place, with the means and scales of
    these batches: inputs of the model, of the kind that is to come, such as token ids (B, T).

    Training is over then. Layers that saw nothing stay as they are, and so do those whose recipe
    splits off what no constant can be, such as fp4_svd. Returns how many were changed. ValueError,
    and nothing is changed, for activations that are not finite."""
    batches = list(batches)  # they are read twice
    splits = {}
    for layer in model.modules():
        if isinstance(layer, fp4.FP4Linear) and split_of(layer.recipe)[0]:
            splits[layer], _ = split_of(layer.recipe)

    def collect(measure):
        """{layer: [measure(layer, x), ...]}, x (T, m) its input in a batch, FP32."""
        seen = {}

        def look(layer, inputs):
            x = inputs[0].reshape(-1, layer.in_features).float()
            seen.setdefault(layer, []).append(measure(layer, x))

        hooks = [layer.register_forward_pre_hook(look) for layer in splits]
        for batch in batches:
            model(batch)
        for hook in hooks:
            hook.remove()
        return seen

    def sums(layer, x):
        return torch.cat((x.sum(0), x.new_tensor([len(x)])))  # the last one counts tokens

    right = {}
    for layer, seen in collect(sums).items():
        total = torch.stack(seen).sum(0)
        mean = total[None, :-1] / total[-1]
        right[layer] = {"none": None, "mean": mean, "project": F.normalize(mean)}[splits[layer]]

    def largest(layer, x):
        return split_off(x, right[layer], splits[layer] == "project")[1].abs().amax()

    amax = {layer: MARGIN * torch.stack(seen).amax() for layer, seen in collect(largest).items()}
    if not all(value.isfinite() for value in amax.values()):
        raise ValueError("an activation is not finite: there is no mean to store")
    for layer in right:
        store(layer, right[layer], amax[layer])
    return len(right)


def store(layer, right, amax):
    """Make one FP4Linear a StoredMeanLinear."""
    split, block = split_of(layer.recipe)
    w = layer.weight.float()
    row = None if right is None else fp4.mm(right, w.t())
    w_q = fp4.quantize(w, block)
    del layer.weight
    layer.__class__, layer.block, layer.project = StoredMeanLinear, block, split == "project"
    constants = {"right": right, "row": row, "amax": amax}
    constants |= {"codes": w_q.codes, "scales": w_q.scales, "tensor_scale": w_q.tensor_scale}
    for name, value in constants.items():
        layer.register_buffer(name, value)


def calibrate_on(model, tokens):
    """`calibrate` a GPT on windows of data.shards.Tokens, of training text in the model's own
    tokens. Returns the number of layers changed."""
    length = min(model.config.block_size, LENGTH)
    windows = tokens.batch(tokens.spaced(WINDOWS, length), length)
    return calibrate(model, windows.to(model.head.weight.device).split(2))
