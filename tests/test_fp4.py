"""The linear layer: its algebra in exact arithmetic, its GEMMs on operands of the reference
quantizer, what it saves, and what it refuses. Every recipe passes what every recipe must."""

import copy
import pickle

import numpy as np
import pytest
import reference
import torch
from helpers import (
    BLOCKS,
    NAN,
    NVFP4_RECIPES,
    backward,
    grid_gradient,
    lay_out,
    layer,
    offset_tensors,
    relative,
    saved_tensors,
    varying,
)

import fp4
from experiments import recipes
from experiments.recipes import RECIPES, Variant

every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_nvfp4 = pytest.mark.parametrize("recipe", NVFP4_RECIPES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------
# The recipes and the linear layer


@every_recipe
def test_algebra_is_a_linear_layer(exact, recipe):
    fp4_linear = layer(recipe, dtype=torch.float64)
    linear = torch.nn.Linear(32, 48, dtype=torch.float64)
    linear.load_state_dict(fp4_linear.state_dict())
    x, d = torch.randn(2, 17, 32).double() + 3, torch.randn(2, 17, 48).double() - 1
    got, want = ((*backward(f, x, d), f.bias.grad) for f in (fp4_linear, linear))
    for a, b in zip(got, want, strict=True):
        # sums of at most 48 terms of up to about 100: 48 * 100 * 2^-53 = 5e-13
        assert (a - b).abs().max() < 1e-10


@every_recipe
def test_gradcheck(exact, recipe):
    linear = layer(recipe, 16, 16, dtype=torch.float64)
    x = torch.randn(3, 16).double().requires_grad_()

    def f(x, weight, bias):
        return torch.func.functional_call(linear, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(f, (x, linear.weight, linear.bias))


@every_recipe
@pytest.mark.parametrize("tokens", [1, 15, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens(recipe, tokens, dtype):
    linear = layer(recipe)
    x, d = torch.randn(1, tokens, 32).to(dtype), torch.randn(1, tokens, 48).to(dtype)
    y, dx, dw = backward(linear, x, d)
    assert (y.shape, y.dtype) == (d.shape, dtype)
    assert (dx.shape, dx.dtype) == (x.shape, dtype)
    assert (dw.shape, dw.dtype) == (linear.weight.shape, torch.float32)
    for t in (y, dx, dw):
        assert t.isfinite().all() and t.any()


def test_one_token_is_all_mean():
    linear = layer("fp4_mean", bias=False)
    x, d = torch.randn(1, 32), torch.randn(1, 48)
    y, dx, dw = backward(linear, x, d)
    w = linear.weight.detach()
    assert torch.equal(y, x @ w.t())
    assert torch.equal(dx, d @ w)
    assert torch.equal(dw, d.t() @ x)


@every_nvfp4
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(recipe, layout):
    linear, x, d = layer(recipe), torch.randn(32, 32), torch.randn(32, 48)
    torch.manual_seed(1)
    want = backward(linear, x, d)
    torch.manual_seed(1)
    got = backward(linear, lay_out(x, layout), lay_out(d, layout))
    for a, b in zip(got, want, strict=True):
        # strides may change the order of FP32 sums, of at most 48 terms, but no rounding to FP4
        assert (a - b).abs().max() <= 48 * 2**-24 * b.abs().max() * 48**0.5


def gemm(*operands):
    """The sum of products a @ b in FP64, and how far FP32 may be from it."""
    operands = [tuple(np.asarray(o, np.float64) for o in pair) for pair in operands]
    terms = sum(a.shape[1] for a, _ in operands)
    exact, size = (sum(f(a) @ f(b) for a, b in operands) for f in (lambda a: a, np.abs))
    return exact, (terms + 8) * 2.0**-24 * size  # a rounding a term, a few for scales and sums


@pytest.mark.parametrize("recipe", ["fp4", "fp4_mean", "fp4_mean_paper"])
def test_gemms_of_reference_operands(recipe):
    """One W for fprop and dgrad; wgrad's X rounded from the original; the mean's own path."""
    linear, x, d = layer(recipe, bias=False), torch.randn(64, 32) + 2, grid_gradient(32, 48)
    got, w, d = backward(linear, x, d), linear.weight.detach().numpy(), d.numpy()
    w_q = reference.quantize(w, (16, 16)).dequantized
    mu = x.mean(0, keepdim=True).numpy() * (recipe != "fp4")
    mean_w = w
    residual, ones = x.numpy() - mu, np.ones((64, 1), np.float32)
    if recipe == "fp4_mean_paper":
        mu, mean_w = reference.quantize(mu, (1, 16)).dequantized, w_q
    by_row, by_col = (reference.quantize(residual, b).dequantized for b in ((1, 16), (16, 1)))
    want = (
        gemm((by_row, w_q.T), (ones @ mu, mean_w.T)),
        gemm((d, w_q)),
        gemm((d.T, by_col), (d.T @ ones, mu)),
    )
    for a, (b, bound) in zip(got, want, strict=True):
        assert (np.abs(a.numpy() - b) <= bound).all()


def test_mean_of_the_gradient_meets_the_exact_weight():
    linear, x = layer("fp4_mean", bias=False), torch.randn(64, 32) + 2
    nu = torch.randint(-9, 9, (1, 48)).float()
    _, dx, dw = backward(linear, x, nu.repeat(64, 1))  # no residual is left
    assert torch.equal(dx, (nu @ linear.weight.detach()).expand(64, 32))
    assert torch.equal(dw, 64 * nu.t() @ x.mean(0, keepdim=True))


@pytest.mark.parametrize("headroom", [False, True])
def test_what_is_rounded_how(monkeypatch, headroom):
    calls, quantize = [], fp4.quantize

    def spy(x, block=(1, 16), stochastic=False, headroom=False, seed=None, **kwargs):
        calls.append((block, stochastic, headroom, seed))
        return quantize(
            x, block=block, stochastic=stochastic, headroom=headroom, seed=seed, **kwargs
        )

    monkeypatch.setattr(fp4, "quantize", spy)
    recipe = Variant(headroom=True) if headroom else "fp4_mean"
    backward(layer(recipe), torch.randn(16, 32), torch.randn(16, 48))
    nearest = [call[:3] for call in calls if not call[1]]
    assert sorted(nearest) == [(b, False, False) for b in BLOCKS]  # X, X for wgrad, W
    noisy = [call for call in calls if call[1]]
    assert sorted(call[:3] for call in noisy) == [(b, True, headroom) for b in BLOCKS[:2]]  # D
    assert noisy[0][3] != noisy[1][3]


@every_nvfp4
def test_gradients_draw_new_noise(recipe):
    linear, x, d = layer(recipe), torch.randn(32, 32), torch.randn(32, 48)
    torch.manual_seed(3)
    y1, dx1, dw1 = backward(linear, x, d)
    y2, dx2, dw2 = backward(linear, x, d)
    noisy = recipe in ("fp4_mean_sr", "fp4_mean_row_fp4_sr")
    assert torch.equal(y1, y2) is not noisy
    assert not torch.equal(dx1, dx2) and not torch.equal(dw1, dw2)
    torch.manual_seed(3)
    _, dx3, dw3 = backward(linear, x, d)
    assert torch.equal(dx1, dx3) and torch.equal(dw1, dw3)


@every_recipe
def test_nan_stays_visible(recipe):
    linear, x = layer(recipe), torch.randn(32, 32)
    x[3, 5] = NAN
    x.requires_grad_()
    y = linear(x)
    y.square().sum().backward()
    assert y[3].isnan().all() and x.grad[3].isnan().all()
    assert linear.weight.grad.isnan().any(1).all() and linear.bias.grad.isnan().all()


@every_recipe
def test_zeros_give_zeros(recipe):
    y, dx, dw = backward(layer(recipe, bias=False), torch.zeros(17, 32), torch.zeros(17, 48))
    assert not y.any() and not dx.any() and not dw.any()
    assert not (y.isnan().any() or dx.isnan().any() or dw.isnan().any())


@pytest.mark.parametrize(("m", "n"), [(24, 32), (32, 40)])
def test_features_must_fill_blocks(m, n):
    with pytest.raises(ValueError, match=rf"{m}, {n}.*16"):
        layer("fp4", m, n)
    layer("bf16", m, n)


# ------------------------------------------------------------------------------------------------
# Centering


def test_centering_keeps_what_tells_tokens_apart():
    """Operands in 1 x 16 blocks: .410 plain and .135 = (2 * .0953^2)^.5 centered. How far the plain
    error is from .410 depends on the draw of the 256 means: .39 to .43."""
    x, _, w = offset_tensors(4)
    want = varying(x.double() @ w.double().t())
    w_q = fp4.quantize(w).dequantize().double()
    plain, centered = (
        relative(varying(fp4.quantize(r).dequantize().double() @ w_q.t()), want)
        for r in (x, recipes.split_off(x, "mean")[2])
    )
    assert plain == pytest.approx(0.410, abs=0.02)
    assert centered == pytest.approx(0.135, abs=0.002)  # 131072 outputs over 256 terms: 1%


def test_fprop_varying_error():
    """As above through the layer, whose W in 16 x 16 blocks has an error of .11, not .0953."""
    x, _, w = offset_tensors(4)
    want, errors = varying(x.double() @ w.double().t()), {}
    for recipe in ("fp4", "fp4_mean"):
        linear = layer(recipe, 256, 256, bias=False)
        linear.weight.data = w
        errors[recipe] = relative(varying(linear(x).detach().double()), want)
    assert errors["fp4"] > 0.38
    assert errors["fp4_mean"] < 0.15


@every_block
def test_residual_does_not_see_an_offset(block):
    x = torch.randint(-8, 9, (64, 32)).float()  # integers: sums and the mean of 64 are exact
    offset = 2.0 ** torch.randint(0, 9, (32,))
    a, b = (fp4.quantize(recipes.split_off(t, "mean")[2], block=block) for t in (x, x + offset))
    assert a.codes.any()
    for s, t in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(s.float(), t.float())


@every_nvfp4
def test_backward_keeps_4_and_a_half_bits_a_value(recipe):
    tokens, m, n = 256, 128, 64
    linear = layer(recipe, m, n)
    x = torch.randn(tokens, m, requires_grad=True)
    storages = {t.untyped_storage().data_ptr(): t for t in saved_tensors(linear, x)}
    assert x.untyped_storage().data_ptr() not in storages
    storages.pop(linear.weight.untyped_storage().data_ptr(), None)  # needed by the mean alone
    kept = sum(t.untyped_storage().nbytes() for t in storages.values())
    variant = RECIPES[recipe]
    variant = (
        variant if isinstance(variant, Variant) else Variant("none" if recipe == "fp4" else "mean")
    )
    block = (16, 1) if variant.weight_1d else (16, 16)
    weight = sum(t.nbytes for t in fp4.quantize(linear.weight, block=block).tensors())
    ones = variant.split == "mean" and not variant.massive  # a single 1 stands for them
    rows = 0 if variant.split == "none" else 4 * m + (0 if ones else 4 * tokens)
    assert kept - weight <= 4.5 / 8 * tokens * m + rows + 64  # 64: scalars


# ------------------------------------------------------------------------------------------------
# What a user may do with it


@every_recipe
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_dtypes(recipe, weight, dtype):
    """Master weights of any dtype, rounded from there: what FP32 gives, to the last cast."""
    linear = layer(recipe).to(weight)
    x, d = torch.randn(2, 17, 32).to(dtype), torch.randn(2, 17, 48).to(dtype)
    torch.manual_seed(1)
    got = backward(linear, x, d)
    torch.manual_seed(1)
    want = backward(copy.deepcopy(linear).float(), x.float(), d.float())
    for a, b, due in zip(got, want, (dtype, dtype, weight), strict=True):
        assert a.dtype == due
        # FP32 sums and one cast; to fp32, FP64 adds nothing
        eps = max(torch.finfo(due).eps, torch.finfo(dtype).eps, 2**-20)
        assert (a.double() - b.double()).norm() <= 2 * eps * b.double().norm()


@every_recipe
def test_another_width_is_refused_as_by_nn_linear(recipe):
    for shape in ((4, 64), (64,), (2, 4, 16), (0, 16)):
        for linear in (layer(recipe), torch.nn.Linear(32, 48)):
            with pytest.raises(RuntimeError, match=rf"{shape[-1]}"):
                linear(torch.randn(shape))
    assert layer(recipe)(torch.randn(32)).shape == (48,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_float_is_refused(dtype):
    with pytest.raises(RuntimeError, match="of floats"):
        layer("fp4")(torch.ones(4, 32).to(dtype))
    with pytest.raises(RuntimeError, match="of floats"):
        layer("fp4")(torch.tensor(1.0))
    with pytest.raises(ValueError, match="not floats"):
        fp4.quantize(torch.ones(16, 16).to(dtype))


@every_recipe
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_tokens(recipe, shape):
    """An expert of a mixture may get none."""
    linear, x = layer(recipe), torch.randn(shape, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 48) and x.grad.shape == shape
    assert not linear.weight.grad.any() and not linear.bias.grad.any()


@pytest.fixture
def work(monkeypatch):
    """The GEMMs and roundings of a step, counted."""
    done = {"gemms": 0, "mms": 0, "rounded": []}
    gemm, mm, quantize = fp4.gemm, fp4._mm, fp4.quantize

    def count(name, f):
        def spy(*args, **kwargs):
            done[name] += 1
            return f(*args, **kwargs)

        return spy

    monkeypatch.setattr(fp4, "gemm", count("gemms", gemm))
    monkeypatch.setattr(fp4, "_mm", count("mms", mm))
    monkeypatch.setattr(
        fp4, "quantize", lambda x, block=(1, 16), **kw: done["rounded"].append(block)
        or quantize(x, block=block, **kw)
    )  # fmt: skip
    return done


@pytest.mark.parametrize("recipe", ["bf16", "fp4", "fp4_mean", "fp4_svd", "fp4_mean_hadamard"])
def test_only_what_a_gradient_needs_is_rounded_saved_and_multiplied(recipe, work):
    """W frozen, as under LoRA; an input that needs no gradient; neither."""
    tokens, m, n = 64, 32, 48
    d, size, grads = torch.randn(tokens, n), {}, {}
    for dx, dw in ((True, True), (True, False), (False, True), (False, False)):
        torch.manual_seed(0)
        linear = layer(recipe, m, n, bias=False)
        linear.weight.requires_grad_(dw)
        x = torch.randn(tokens, m, requires_grad=dx)
        work |= {"gemms": 0, "mms": 0, "rounded": []}
        saved = saved_tensors(linear, x) if dx or dw else []
        size[dx, dw] = sum(t.nbytes for t in saved if t.data_ptr() != linear.weight.data_ptr())
        torch.manual_seed(1)
        work |= {"gemms": 0, "mms": 0, "rounded": []}
        y = linear(x)
        if dx or dw:
            y.backward(d)
        grads[dx, dw] = x.grad, linear.weight.grad
        assert work["mms"] == 1 + dx + dw
        if recipe != "bf16":
            assert work["gemms"] == 1 + dx + dw
            due = [(1, 16)] * (1 + dx) + [(16, 1)] * 2 * dw + [(16, 16)]
            assert sorted(work["rounded"]) == sorted(due)
    both = grads[True, True]
    for (dx, dw), got in grads.items():
        for wanted, a, b in zip((dx, dw), got, both, strict=True):
            assert torch.equal(a, b) if wanted else a is None
    assert size[True, True] == size[True, False] + size[False, True] and size[True, False] > 0
    assert size[False, False] == 0


@every_nvfp4
def test_no_grad_rounds_nothing_for_backward(recipe, work):
    with torch.no_grad():
        layer(recipe)(torch.randn(16, 32))
    weight_1d = getattr(RECIPES[recipe], "weight_1d", False)
    assert work["rounded"][:2] == [(1, 16), (1, 16) if weight_1d else (16, 16)]
    assert set(work["rounded"][2:]) <= {(1, 16)}  # of the mean


def network():
    return torch.nn.ModuleDict(
        {
            "body": torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.LayerNorm(48)),
            "free": torch.nn.Linear(32, 16, bias=False),
            "lm_head": torch.nn.Linear(32, 17),
        }
    )


def test_convert():
    model = network()
    before = dict(model.named_parameters())
    assert fp4.convert(model, "fp4") is model
    assert type(model.body[0]) is type(model.free) is fp4.FP4Linear
    assert model.body[0].recipe is fp4.RECIPES["fp4"] and "fp4" in repr(model.body[0])
    assert type(model.lm_head) is torch.nn.Linear
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[k] is before[k] for k in after)
    assert model.free(torch.randn(4, 32)).shape == (4, 16)
    assert fp4.convert(model, "bf16").free.recipe is fp4.RECIPES["bf16"]
    assert pickle.loads(pickle.dumps(model)).free.recipe is fp4.linear_bf16


def test_convert_takes_names_as_they_are():
    model = fp4.convert(network(), "bf16", keep="lm_head")
    assert type(model.free) is fp4.FP4Linear and type(model.lm_head) is torch.nn.Linear
    model = fp4.convert(network(), "bf16", keep=["free", "body.0"])
    assert type(model.free) is type(model.body[0]) is torch.nn.Linear
    assert type(fp4.convert(network(), "bf16", keep=()).lm_head) is fp4.FP4Linear


def test_convert_leaves_hooks_modes_and_shared_modules():
    model, calls = network(), []
    model["twice"] = torch.nn.Sequential(model.free)
    model = torch.nn.ModuleDict({"alias": torch.nn.Sequential(model.lm_head), **model})
    model.free.register_forward_hook(lambda *_: calls.append("hook"))
    fp4.convert(model.eval(), "fp4")
    assert model.twice[0] is model.free and type(model.free) is fp4.FP4Linear
    assert type(model.alias[0]) is torch.nn.Linear  # what lm_head names, and keeps
    assert not any(m.training for m in model.modules())
    model.twice(torch.randn(4, 32))
    assert calls == ["hook"]


def test_convert_a_linear_itself():
    linear = torch.nn.Linear(32, 48)
    assert fp4.convert(linear, "fp4") is linear and type(linear) is fp4.FP4Linear
    with pytest.raises(ValueError, match=r"24, 48.*16"):
        fp4.convert(torch.nn.Linear(24, 48))


def test_convert_is_all_or_nothing():
    model = network()
    model["odd"] = torch.nn.Linear(24, 48)
    with pytest.raises(ValueError, match=r"odd\(24, 48\).*16"):
        fp4.convert(model, "fp4")
    assert not any(isinstance(m, fp4.FP4Linear) for m in model.modules())
    with pytest.raises(ValueError, match="'fp5' is not one of fp32, bf16, fp4, fp4_mean"):
        fp4.convert(model, "fp5")
    with pytest.raises(ValueError, match=r"5 is not one of .* nor a function"):
        fp4.convert(model, 5)
    with pytest.raises(ValueError, match="'fp5' is not one of"):
        fp4.FP4Linear(32, 48, recipe="fp5")


@every_recipe
def test_autocast_changes_nothing(recipe):
    linear, x, d = layer(recipe), torch.randn(32, 32), torch.randn(32, 48)
    torch.manual_seed(1)
    want = backward(linear, x, d)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(x.requires_grad_())
    got.backward(d)
    assert torch.equal(got, want[0]) and torch.equal(x.grad, want[1])


@every_recipe
def test_a_converted_bf16_model_trains(recipe):
    """What from_pretrained gives for a BF16 checkpoint."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16))
    fp4.convert(model.bfloat16(), RECIPES[recipe])
    model(torch.randn(8, 32).bfloat16()).square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.any() for p in model.parameters())


def test_mean_share():
    """Mean 3/4 of the energy, exactly; and of nothing in common about 1 / T."""
    x = torch.randn(64, 32)
    x = (x - x.mean(0)) / x.std(0, unbiased=False) + 3**0.5
    assert fp4.mean_share(x).item() == pytest.approx(0.75, rel=1e-5)
    assert fp4.mean_share(x.view(4, 16, 32)) == fp4.mean_share(x)  # over all tokens of a batch
    assert fp4.mean_share(torch.randn(1000, 512)).item() == pytest.approx(1e-3, rel=0.1)
