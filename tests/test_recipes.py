"""experiments/recipes.py: its defaults are the core, its choices are what they say, and the added
mean changes nothing but the rounding."""

import functools

import pytest
import torch
from helpers import (
    NVFP4_RECIPES,
    backward,
    grid_gradient,
    layer,
    offset_tensors,
    relative,
    saved_tensors,
)

import fp4
from experiments import recipes
from experiments.recipes import RECIPES, AddedMean, Variant, recipe_of

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("core", "variant"), [("fp4", Variant(split="none")), ("fp4_mean", Variant())]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_defaults_are_the_core_bit_for_bit(core, variant, dtype):
    one, other = layer(core), layer(variant)
    other.load_state_dict(one.state_dict())
    x, d = torch.randn(3, 23, 32).to(dtype) + 1, torch.randn(3, 23, 48).to(dtype)
    results = []
    for linear in (one, other):
        torch.manual_seed(2)
        results.append((*backward(linear, x, d), torch.rand(1)))  # and as many draws
    assert all(map(torch.equal, *results))


def test_the_rotation_of_signed_zeros_is_the_plain_one(monkeypatch):
    """By way of the kernels too: they round a matrix that is rotated already."""
    kernels = pytest.importorskip("kernels", reason="kernels.py needs Triton")
    x = torch.where(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) > 0, 0.0, -0.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variant, codes = RECIPES["fp4_hadamard"], []
    monkeypatch.setattr(fp4, "kernels", kernels, raising=False)
    for kernel_devices in (set(), {device.type}):
        monkeypatch.setattr(fp4, "KERNEL_DEVICES", kernel_devices)
        *_, column = recipes._split_quantize(x.to(device), variant, "none", False, True, None)
        codes.append(column.codes.cpu())
    assert torch.equal(*codes)


@every_recipe
def test_an_added_mean_changes_nothing_in_exact_arithmetic(exact, recipe):
    """Output and gradients with a mean of 4 RMS that only the rounding could see."""
    plain = layer(recipe, dtype=torch.float64)
    shifted = layer(AddedMean(plain.recipe, 4.0), dtype=torch.float64)
    shifted.load_state_dict(plain.state_dict())
    x, d = torch.randn(2, 17, 32).double(), torch.randn(2, 17, 48).double()
    for a, b in zip(backward(shifted, x, d), backward(plain, x, d), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_centering_makes_the_added_mean_invisible():
    """Errors against FP32 with a mean of 8 RMS added, relative to those without. dX never sees it:
    to the gradient the added mean is a constant."""
    x, d = torch.randn(256, 64), torch.randn(256, 48)
    ratio = {}
    for recipe in ("fp4", "fp4_mean", "fp4_mean_paper"):
        errors = []
        for rms in (0.0, 8.0):
            torch.manual_seed(0)
            linear = layer(recipe_of(recipe, rms), m=64, bias=False)
            torch.manual_seed(1)
            w = linear.weight.detach()
            wanted = x @ w.t(), d @ w, d.t() @ x
            got = backward(linear, x, d)
            errors.append([(a - b).norm().item() for a, b in zip(got, wanted, strict=True)])
        ratio[recipe] = [b / a for a, b in zip(*errors, strict=True)]
        assert abs(ratio[recipe][1] - 1) < 1e-6
    assert all(y > 5 and dw > 5 for y, _, dw in (ratio["fp4"], ratio["fp4_mean_paper"])), ratio
    assert all(abs(r - 1) < 0.02 for r in ratio["fp4_mean"]), ratio


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "median"},
        {"hadamard": True, "cross_terms": True},
        {"split_grad": False, "cross_terms": True},
        {"mean_format": "fp8"},
        {"split": "none", "cross_terms": True},
        {"split": "project", "cross_terms": True},
        {"massive": True, "cross_terms": True},
    ],
)
def test_choices_must_make_sense(wrong):
    with pytest.raises(ValueError, match=r"not|drop"):
        Variant(**wrong)


def wgrad_errors(mean):
    x, d, w = offset_tensors(mean, m=128, n=128)
    want, errors = d.double().t() @ x.double(), {}
    for recipe in RECIPES:
        linear = layer(recipe, 128, 128, bias=False)
        linear.weight.data = w
        errors[recipe] = relative(backward(linear, x, d)[2], want)
    return errors


def test_wgrad_error_order():
    e = wgrad_errors(4)
    order = ["fp32", "bf16", "fp4_mean", "fp4_svd", "fp4", "fp4_mean_paper"]
    assert sorted(order, key=e.get) == order
    assert e["fp4"] > 10 * e["fp4_mean"]
    assert e["fp4_mean_paper"] > 5 * e["fp4"]
    assert e["fp4_svd"] < e["fp4_hadamard"] < e["fp4_mean_paper"]
    # A rotation has nothing to add to centering here; two draws of noise differ by some percent.
    assert e["fp4_mean_hadamard"] == pytest.approx(e["fp4_mean"], rel=0.1)


def test_wgrad_without_a_mean():
    """Centering has nothing to win there, and loses nothing: all recipes are as good as fp4, but
    for noisier rounding."""
    e = wgrad_errors(0)
    gaussian = torch.randn(512, 512)
    nearest, noisy, unbiased = (
        relative(fp4.quantize(gaussian, **how).dequantize(), gaussian)
        for how in ({}, {"stochastic": True}, {"stochastic": True, "headroom": True})
    )
    assert (nearest, noisy) == (pytest.approx(0.0953, rel=0.01), pytest.approx(0.138, rel=0.01))
    for recipe in NVFP4_RECIPES:
        x = noisy if recipe == "fp4_mean_sr" else nearest
        d = unbiased if recipe == "fp4_mean_headroom" else noisy
        # two operands, over 16384 outputs
        assert e[recipe] == pytest.approx((x**2 + d**2) ** 0.5, rel=0.02), recipe


def test_what_the_ablations_change():
    """Each against fp4_mean, on integers whose means are exact: what it must and must not touch."""
    x, d = torch.randint(-8, 9, (64, 32)) + 8.0, grid_gradient(32, 48) + torch.randint(999, (48,))
    torch.manual_seed(0)
    linear = layer("fp4_mean", bias=False)
    w, mu, nu = linear.weight.detach(), x.mean(0, keepdim=True), d.mean(0, keepdim=True)
    residual = fp4.quantize(x - mu).dequantize()
    w_q, w_1d, w_t = (fp4.quantize(w, block=b).dequantize() for b in ((16, 16), (1, 16), (16, 1)))
    r = fp4.quantize(x - mu, block=(16, 1)).dequantize()
    s = d - nu
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-2)

    def run(recipe):
        linear.recipe = RECIPES[recipe]
        return backward(linear, x, d)

    nearest = fp4.quantize(mu).dequantize()
    for recipe, row, weight in (
        ("fp4_mean", mu, w),
        ("fp4_mean_row_bf16", mu.bfloat16().float(), w),
        ("fp4_mean_row_fp4", nearest, w),
        ("fp4_mean_row_weight", mu, w_q),
        ("fp4_mean_1d", mu, w),
    ):
        y, dx, dw = run(recipe)
        fprop, dgrad = (w_1d, w_t) if recipe == "fp4_mean_1d" else (w_q, w_q)
        close(y, row @ weight.t() + residual @ fprop.t())
        if recipe == "fp4_mean_row_fp4":
            continue  # nu is rounded stochastically
        nu_q = nu.bfloat16().float() if recipe == "fp4_mean_row_bf16" else nu
        close(dx, nu_q @ weight + s @ dgrad)
        close(dw, 64 * nu_q.t() @ row + s.t() @ r)
    assert not torch.equal(run("fp4_mean_row_fp4_sr")[0], run("fp4_mean_row_fp4")[0])
    assert not torch.equal(run("fp4_mean_row_fp4")[1], run("fp4_mean_row_fp4")[1])
    assert torch.equal(run("fp4_mean")[1], run("fp4_mean")[1])
    d, nu = s + 32, torch.full_like(nu, 32.0)  # which is rounded to itself
    close(run("fp4_mean_row_fp4")[2], 64 * nu.t() @ nearest + s.t() @ r)
    # the cross terms: nu' (1'R~), as S~ has no column sums here
    close(run("fp4_mean_cross")[2], run("fp4_mean")[2] + nu.t() @ r.sum(0, keepdim=True))


def test_a_rounded_mean_has_noise_of_its_own(monkeypatch):
    seeds, quantize = [], fp4.quantize
    monkeypatch.setattr(
        fp4, "quantize", lambda x, **how: seeds.append(how.get("seed")) or quantize(x, **how)
    )
    linear = layer("fp4_mean_row_fp4", bias=False)
    backward(linear, torch.randn(32, 32), torch.randn(32, 48))
    seeds = [int(seed) for seed in seeds if seed is not None]
    assert len(seeds) == len(set(seeds)) == 3  # of S by row, of S by column, of the mean


def test_x_alone_is_centered(monkeypatch):
    """D is rounded whole; its column sums, which meet mu in wgrad, are exact."""
    rounded, quantize = [], fp4.quantize
    monkeypatch.setattr(fp4, "quantize", lambda x, **how: rounded.append(x) or quantize(x, **how))
    linear, x, d = layer("fp4_mean_x", bias=False), torch.randn(32, 32) + 5, torch.randn(32, 48) + 5
    backward(linear, x, d)
    assert [torch.equal(t, d) for t in rounded if t.shape == d.shape] == [True, True]
    assert not any(torch.equal(t, x) for t in rounded)
    x = torch.full_like(x, 5.0)  # no residual
    assert (backward(linear, x, d)[2] - d.t() @ x).abs().max() < 32 * 10 * 5 * 32 * 2**-24


@pytest.mark.parametrize("how", ["mean", "project", "svd"])
def test_split_off(how, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    x = torch.randn(40, 24).double() + torch.randn(24)
    left, right, residual = recipes.split_off(x, how)
    assert torch.equal(residual, x - left * right)
    if how == "mean":
        assert torch.equal(left, torch.ones(40, 1).double())
        assert torch.equal(right[0], x.mean(0))
    elif how == "project":
        assert relative(right[0] * x.mean(0).norm(), x.mean(0)) < 1e-15
        assert (residual @ right.t()).abs().max() < 1e-14 and residual.mean(0).abs().max() < 1e-14
    else:
        u, s, v = torch.linalg.svd(x)
        # 8 iterations shrink the rest by (s1/s0)^16
        assert relative(left @ right, s[0] * u[:, :1] @ v[:1]) < 2 * (s[1] / s[0]) ** 16 * 10


@pytest.mark.parametrize("split", ["none", "mean", "project", "svd"])
def test_massive_tokens_multiply_the_unrounded_weight(split):
    """Their outputs are exact, the others what they are without them, and so is dW but for their
    part of it, which is exact too."""
    x, d = torch.randn(50, 32) + 1, torch.randn(50, 48)
    x[[3, 17]] *= 100
    rest = torch.ones(50, dtype=torch.bool)
    rest[[3, 17]] = False
    assert recipes.massive_tokens(x).tolist() == [3, 17]
    assert not len(recipes.massive_tokens(x[rest]))
    linear = layer(Variant(split=split, massive=True), bias=False)
    y, _, dw = backward(linear, x, d)
    torch.testing.assert_close(y[~rest], x[~rest] @ linear.weight.t())
    linear.recipe = Variant(split=split)
    torch.testing.assert_close(y[rest], backward(linear, x[rest], d[rest])[0])
    error = dw - d.t() @ x  # that of the rest: relative to the 100 times larger whole it is small
    assert error.norm() < 0.3 * (d[rest].t() @ x[rest]).norm()


@pytest.mark.parametrize("split", ["none", "mean", "project"])
def test_massive_tokens_change_nothing_in_exact_arithmetic(exact, split):
    x, d = torch.randn(50, 32).double() + 1, torch.randn(50, 48).double() + 1
    x[[3, 17]] *= 100
    for split_grad in (True, False):
        linear = layer(Variant(split, massive=True, split_grad=split_grad), dtype=torch.float64)
        got = backward(linear, x, d)
        linear.recipe = RECIPES["fp32"]
        for a, b in zip(got, backward(linear, x, d), strict=True):
            assert (a - b).abs().max() < 1e-9


def test_a_projection_has_no_cross_terms_left():
    """Whatever D is rounded to, dW's part along the mean is exact."""
    x, d = torch.randn(64, 32) + 3, torch.randn(64, 48)
    dw = backward(layer("fp4_project", bias=False), x, d)[2]
    u = torch.nn.functional.normalize(x.mean(0), dim=0)
    residual = x - x @ u[:, None] * u
    due = d.t() @ (x @ u)
    noise = fp4.quantize(residual, block=(16, 1)).dequantize() @ u  # R~ is not quite orthogonal
    assert (dw @ u - due).norm() < 2 * d.norm() * noise.norm() / 8 < 0.05 * due.norm()


def test_hadamard_cancels():
    a, b = torch.randn(40, 8).double(), torch.randn(40, 6).double()
    ra, rb = recipes.rotate_tokens(a), recipes.rotate_tokens(b)
    assert ra.shape == (48, 8)
    assert (ra.t() @ rb - a.t() @ b).abs().max() < 1e-12  # 48 terms of up to 10: 48 * 10 * 2^-53
    spike = torch.zeros(32, 1)
    spike[20] = 1
    assert torch.equal(recipes.rotate_tokens(spike).abs(), (torch.arange(32)[:, None] >= 16) / 4)


@pytest.mark.parametrize("recipe", ["fp4_hadamard", "fp4_mean_hadamard"])
def test_hadamard_comes_before_the_amax(recipe):
    x = torch.randn(32, 32) + 1
    x[5, 5] = 100
    saved = saved_tensors(layer(recipe, bias=False), x)
    residual = x - x.mean(0) if recipe == "fp4_mean_hadamard" else x
    want = fp4.quantize(recipes.rotate_tokens(residual), block=(16, 1))
    for t in want.tensors():
        assert any(s.dtype == t.dtype and torch.equal(s.float(), t.float()) for s in saved)


def test_the_added_mean_needs_no_buffer():
    """A model built on `meta` and given memory later has the same."""
    x = torch.randn(64, 32)
    here = layer(recipe_of("fp4", 4.0), bias=False)
    there = layer(recipe_of("fp4", 4.0), bias=False, device="meta").to_empty(device="cpu")
    there.load_state_dict(here.state_dict())
    assert list(here.state_dict()) == ["weight"] and not list(here.buffers())
    assert torch.equal(here(x), there(x))
    mean = here.recipe.mean(x)
    assert mean.square().mean().sqrt() == pytest.approx(4, rel=0.3)  # of 32 normal features
    assert torch.equal(mean, AddedMean(None, 1.0).mean(x) * 4)


def test_the_added_mean_is_for_nvfp4_alone():
    assert recipe_of("bf16", 4.0) is fp4.linear_bf16 and recipe_of("fp4", 0.0) is fp4.linear_fp4
    assert recipe_of("fp4_svd", 2.0) == AddedMean(RECIPES["fp4_svd"], 2.0)
