"""What several test files share."""

import numpy as np
import torch

import fp4
import nvfp4
from experiments.recipes import RECIPES

BLOCKS = [(1, 16), (16, 1), (16, 16)]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NVFP4_RECIPES = [name for name in RECIPES if name.startswith("fp4")]
INF, NAN = float("inf"), float("nan")


def codes(q):
    return nvfp4._unpack(q.codes, q.block)[: q.rows]


def same(a, b):
    """The same bits, signs of zeros included; any NaN equals any NaN."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a.shape == b.shape and bool(
        ((a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))).all()
    )


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def varying(y):
    """What tells the tokens apart."""
    return y - y.mean(0)


def lay_out(x, layout):
    """The same values under other strides."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        return x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    return x


def layer(recipe, m=32, n=48, bias=True, **kwargs):
    return fp4.FP4Linear(m, n, bias, RECIPES.get(recipe, recipe), **kwargs)


def backward(linear, x, d):
    """y, dX, dW."""
    x = x.clone().requires_grad_()
    linear.weight.grad = None
    y = linear(x)
    y.backward(d)
    return y.detach(), x.grad, linear.weight.grad


def saved_tensors(linear, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    return saved


def offset_tensors(mean, tokens=512, m=256, n=256):
    """X and D with standard deviation 1 around a column mean of `mean` standard deviations; W."""
    x = torch.randn(tokens, m) + mean * torch.randn(m)
    d = torch.randn(tokens, n) + mean * torch.randn(n)
    return x, d, torch.randn(n, m) / m**0.5


def grid_gradient(half, n):
    """(2 half, n) E2M1 values with a 6 in every block and a column sum of zero: stochastic rounding
    and centering leave them as they are."""
    d = E2M1[torch.randint(8, (half, n))] * torch.randn(half, n).sign()
    d[torch.arange(half)[:, None] % 16 == torch.arange(n) % 16] = 6
    return torch.cat((d, -d))
