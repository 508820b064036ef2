"""The experiments: recipes first, then what compares, analyzes, evaluates and draws them."""

import functools
import json
import lzma
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import tokenizers
import torch
import torch.nn.functional as F
from reference import relative

import fp4
import train
from data.shards import load, write_dataset
from data.tokenizer import EOT, FolderEncoding, encode, get_encoding
from experiments import analyze, authors, compare, figures, loop, origin, positions, recipes
from experiments import eval as evaluation
from experiments.project import bf16, project_quantize
from experiments.recipes import VARIANTS, LinearVariant, Variant, split_off
from model import GPT

RECIPES = [*fp4.RECIPES]
RESULTS = figures.HERE / "results"
SIX = Variant(split="project", weight_1d=True, four_over_six=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(recipe, x, d, w):
    """y, dX and dW under the recipe of this name, or under a Variant."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    torch.manual_seed(1)
    if isinstance(recipe, Variant):
        y = LinearVariant.apply(x, w, recipe)
    else:
        y = fp4.linear(x, w, recipe)
    return y.detach(), *torch.autograd.grad(y, (x, w), d)


def close(a, b, tolerance=1e-2):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance)


def nvfp4(x, block=(1, 16)):
    """x rounded to NVFP4 to nearest, and back, by the reference in numpy."""
    return torch.from_numpy(reference.quantize(x.numpy(), block).dequantized)[: len(x)]


# Recipes: their algebra. Without rounding each one is nn.Linear.


@pytest.fixture
def exact(monkeypatch):
    """Every rounding is the identity: codes are the values themselves."""

    def quantize(x, block=(1, 16), *_, seed=None):
        padded = F.pad(x.float(), (0, 0, 0, -len(x) % block[0]))
        return fp4.NVFP4(padded, torch.ones(1, 1), torch.ones(()), block)

    monkeypatch.setattr(fp4.NVFP4, "values", lambda self: self.codes)
    monkeypatch.setattr(fp4, "quantize", quantize)
    monkeypatch.setattr(fp4, "quantize_scaled", quantize)
    monkeypatch.setattr(fp4, "to_dtype", lambda x, dtype: x.float())
    monkeypatch.setattr(recipes, "round_as_authors", lambda x, *_: x.float())
    monkeypatch.setattr(recipes, "four_over_six", lambda x, block, amaxes, amax: amaxes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_rounding_is_a_linear_layer(name, exact):
    """There are at most T + m + n terms in a sum and operations before it, each with an error of
    2^-24. A product of two norms bounds what is summed; of the parts that X and D split into there
    are four such products."""
    x, d, w = normal(40, 80) + 1, normal(40, 48, seed=1) + 1, normal(48, 80, seed=2)
    if "massive" in name:
        x[[3, 17]] *= 20
    seen = x + recipes.added_mean(x, float(name[-1]) if "_plus" in name else 0)
    wanted = x.double() @ w.double().t(), d.double() @ w.double(), d.double().t() @ x.double()
    factors = (seen, w), (d, w.t()), (d.t(), seen.t())
    for got, want, (a, b) in zip(run(name, x, d, w), wanted, factors, strict=True):
        bound = 4 * (40 + 80 + 48) * 2**-24 * a.norm(dim=1).max() * b.norm(dim=1).max()
        assert (got.double() - want).abs().max() < bound < 0.02 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("own", "mine"), [("fp4", Variant("none")), ("fp4_mean", Variant())])
def test_the_defaults_are_the_heart_bit_for_bit(own, mine, dtype):
    x, d, w = (normal(*shape).to(dtype) + 1 for shape in ((23, 32), (23, 48), (48, 32)))
    results = [(*run(recipe, x, d, w), torch.rand(1)) for recipe in (own, mine)]
    assert all(map(torch.equal, *results))  # and as many random draws


@pytest.mark.parametrize("name", RECIPES)
def test_zeros_constants_and_single_tokens_stay_finite(name):
    token, d, w = torch.arange(32.0)[None], normal(16, 48), normal(48, 32)
    for x in (torch.zeros(16, 32), token.expand(16, 32), token, torch.zeros(0, 32)):
        for result in run(name, x, d[: len(x)], w) + run(name, x, 0 * d[: len(x)], w):
            assert result.isfinite().all()


def test_choices_must_make_sense():
    cross = {"cross_terms": True}
    wrong = [{"split": "median"}, {"mean_format": "fp8"}, cross | {"split": "project"}]
    wrong += [
        {"four_over_six": True},
        cross | {"hadamard": True},
        cross | {"massive": True},
        cross | {"split_grad": False},
    ]
    for choices in wrong:
        with pytest.raises(ValueError, match=r"^Variant\("):
            Variant(**choices)


# Recipes: their numerics, which exact arithmetic does not notice.


def grid_gradient(half, n):
    """(2 half, n) E2M1 values with a 6 in every block and a column sum of zero: stochastic rounding
    and centering leave them as they are."""
    d = torch.from_numpy(reference.E2M1)[torch.randint(8, (half, n))] * torch.randn(half, n).sign()
    d[torch.arange(half)[:, None] % 16 == torch.arange(n) % 16] = 6
    return torch.cat((d, -d))


def test_operands_are_those_of_the_reference():
    """Each recipe on integers whose means are exact: what it must and what it must not touch."""
    x, s, nu = torch.randint(16, (64, 32)) + 0.0, grid_gradient(32, 48), torch.randint(999, (1, 48))
    w, mu, nu = normal(48, 32), x.mean(0, keepdim=True), nu.float()
    r, r_t = nvfp4(x - mu), nvfp4(x - mu, (16, 1))
    w_q, w_1d, w_t = nvfp4(w, (16, 16)), nvfp4(w), nvfp4(w, (16, 1))
    for name, mean, mean_d, weight, fprop, dgrad in (
        ("fp4_mean_row_bf16", mu.bfloat16().float(), nu.bfloat16().float(), w, w_q, w_q),
        ("fp4_mean_row_weight", mu, nu, w_q, w_q, w_q),
        ("fp4_mean_1d", mu, nu, w, w_1d, w_t),
    ):
        y, dx, dw = run(name, x, s + nu, w)
        close(y, mean @ weight.t() + r @ fprop.t())
        close(dx, mean_d @ weight + s @ dgrad)
        close(dw, 64 * mean_d.t() @ mean + s.t() @ r_t)
    close(run("fp4_1d", x, s, w)[0], nvfp4(x) @ w_1d.t())
    # ν is rounded stochastically; one of equal values is rounded to itself
    y, _, dw = run("fp4_mean_row_fp4", x, s + 32, w)
    close(y, nvfp4(mu) @ w.t() + r @ w_q.t())
    close(dw, 64 * torch.full((48, 1), 32.0) @ nvfp4(mu) + s.t() @ r_t)
    assert not torch.equal(run("fp4_mean_row_fp4_sr", x, s + 32, w)[0], y)
    # cross terms: νᵀ (1ᵀ R~), as S~ has no column sums here
    cross = nu.t() @ r_t.sum(0, keepdim=True)
    close(run("fp4_mean_cross", x, s + nu, w)[2], run("fp4_mean", x, s + nu, w)[2] + cross, 0.1)
    # D is not centered, but rounded as by fp4, and its exact column sums meet μ
    x = torch.full_like(x, 5.0)  # no residual
    _, dx, dw = run("fp4_mean_x", x, s + nu, w)
    assert torch.equal(dx, run("fp4", x, s + nu, w)[1])
    close(dw, (s + nu).t() @ x, 1)


@pytest.mark.parametrize("split", ["project", "svd"])
def test_what_is_split_off_and_that_the_residual_is_rounded(split):
    x, w = normal(64, 32) + normal(32, seed=1), normal(48, 32)
    left, right, residual = split_off(x, split)
    close(residual, x - left * right, 1e-5)  # one rounding, where here are two
    if split == "project":
        assert relative(right[0] * x.mean(0).norm(), x.mean(0)) < 1e-6
        assert max((residual @ right.t()).abs().max(), residual.mean(0).abs().max()) < 1e-5
    else:
        u, s, v = torch.linalg.svd(x)
        # 8 iterations shrink the rest by (s1/s0)^16
        assert relative(left @ right, s[0] * u[:, :1] @ v[:1]) < 20 * (s[1] / s[0]) ** 16 + 1e-5
    rounded = nvfp4(residual)
    if split == "project":
        left, right, r, _ = project_quantize(x)
        rounded = r.dequantize()
    y = fp4.linear(x, w, f"fp4_{split}_1d")
    close(y, left @ (right @ w.t()) + rounded @ nvfp4(w).t(), 1e-4)


def test_a_projection_in_bf16_loses_nothing():
    """What the factors lose the residual has, and its error does not grow, though the bound of its
    amax is loose where one token is large."""
    x = normal(333, 64) + 3 * normal(64, seed=1)
    x[7] *= 50
    left, right, r, r_t = project_quantize(x)
    assert torch.equal(left, bf16(left)) and torch.equal(right, bf16(right))
    exact_left, exact_right, exact = split_off(x, "project")
    assert relative(left, exact_left) < 2**-8 and relative(right, exact_right) < 2**-8
    residual = x - left * right
    assert 6 * residual.abs().max() < r.tensor_scale * 2688 < 7 * residual.abs().max()
    rest = torch.arange(333) >= 16  # in no block with that token
    least = relative(fp4.quantize(exact).dequantize()[rest], exact[rest])
    for rounded in (r.dequantize(), r_t.dequantize().t()[:333]):
        assert relative(rounded[rest], residual[rest]) < 1.02 * least


def test_more_directions_are_those_of_an_svd():
    """The mean's, and of what is left the leading ones, for singular values that fall as 2^-i: two
    iterations shrink the rest by 2^-4."""
    u, v = torch.linalg.qr(normal(64, 33)).Q, torch.linalg.qr(normal(48, 33, seed=1)).Q
    x = (u - u.mean(0)) * 0.5 ** torch.arange(33.0) @ v.t() + 3 * normal(48, seed=2)
    left, right, residual = split_off(x, "project", directions=5)
    close(right @ right.t(), torch.eye(5), 1e-5)
    close(left @ right + residual, x, 1e-5)
    assert relative(right[0] * x.mean(0).norm(), x.mean(0)) < 1e-6
    assert residual.mean(0).abs().max() < 1e-5  # so wgrad has no cross terms
    rest = x - x @ right[:1].t() * right[:1]
    best = torch.linalg.svdvals(rest)[4:].norm()
    assert best <= residual.norm() * (1 + 1e-5) < 1.1 * best
    w = normal(48, 48)
    y = fp4.linear(x, w, "fp4_project16_1d")
    left, right, residual = split_off(x, "project", directions=16)
    close(y, left @ (right @ w.t()) + nvfp4(residual) @ nvfp4(w).t(), 1e-3)


def test_four_over_six_takes_the_better_of_two_scales():
    """Both by hand, from the reference in numpy: a block's largest value is 6 or 4, and block
    scales are at most 256, or 384 for 4."""
    x = normal(32, 64)
    x[0, 0] = 50
    for block in ((1, 16), (16, 1), (16, 16)):
        got = recipes.quantize(x, block, SIX)
        amaxes, _ = fp4.block_amaxes(x, block)
        unit = np.float32(50 * 448 / 256) / np.float32(2688)
        errors, blocks = [], fp4.in_blocks(x, block).numpy()
        for top in (6, 4):
            scales = (amaxes.numpy() / top / unit).astype(reference.E4M3_TYPE).astype(np.float32)
            values = (blocks / (scales * unit)).clip(-6, 6).astype(reference.E2M1_TYPE)
            values = values.astype(np.float32) * scales * unit
            errors.append(((values - blocks) ** 2).sum(fp4.BLOCKS[block]))
        error = (fp4.in_blocks(got.dequantize(), block).numpy() - blocks) ** 2
        np.testing.assert_allclose(error.sum(fp4.BLOCKS[block]), np.minimum(*errors), rtol=1e-4)
        chosen = (errors[1] < errors[0]).mean()
        assert got.scales.float().max() in (256, 384)
        assert 0.1 < chosen < 0.9 or block == (16, 16)
    w = normal(48, 64)
    left, right, residual = split_off(x, "project")
    r, w_q = (recipes.quantize(a, (1, 16), SIX) for a in (residual, w))
    y = left @ (right @ w.t()) + r.dequantize() @ w_q.dequantize().t()
    close(fp4.linear(x, w, "fp4_project_1d_46"), y, 1e-3)


@pytest.mark.parametrize("center", [False, True])
def test_the_authors_recipe_in_numpy(center):
    """Of what github.com/sii-research/Metis computes, on D whose values are all codes, which its
    stochastic rounding leaves as they are."""

    def rounded(x):
        blocks = x.reshape(len(x), -1, 16)
        scales = np.abs(blocks).max(2, keepdims=True) / np.float32(6) + np.float32(1e-9)
        codes = (blocks / scales).astype(reference.E2M1_TYPE).astype(np.float32)
        unit = scales.max() / np.float32(448)
        decoded = (scales / unit).astype(reference.E4M3_TYPE).astype(np.float32) * unit
        return (codes * decoded).reshape(x.shape)

    x, w, s = normal(64, 32) + 3, normal(48, 32), grid_gradient(32, 48)
    nu = torch.randint(999, (1, 48)) * center + 0.0
    mean = x.mean(0, keepdim=True).numpy() * center
    x_q, w_q = mean + rounded(x.numpy() - mean), rounded(w.numpy())
    d_q = (nu + s).numpy()
    y, dx, dw = run("fp4_authors_mean" if center else "fp4_authors", x, s + nu, w)
    close(y, torch.from_numpy(x_q @ w_q.T), 1e-4)
    close(dx, torch.from_numpy(d_q @ w_q), 1e-2)
    close(dw, torch.from_numpy(d_q.T @ x_q), 0.5 if center else 1e-2)  # of sums of 64 x 999 x 3
    d = normal(64, 48)
    y = fp4.linear(x.requires_grad_(), w, "fp4_authors")
    assert not torch.equal(*(torch.autograd.grad(y, x, d, retain_graph=True)[0] for _ in range(2)))
    draws = [recipes.round_as_authors(d, center, torch.tensor(i)) for i in range(256)]
    assert relative(sum(draws) / 256, d) < 0.05 < relative(draws[0], d)  # scales are off by 1/16


def test_a_branch_changes_no_function_and_trains():
    layer = fp4.FP4Linear(64, 48, recipe="fp32")
    model, x = torch.nn.Sequential(layer), normal(8, 64)
    wanted, w = model(x), layer.weight.detach().clone()
    recipes.add_branches(model, rank=4)
    close(model(x), wanted, 1e-5)
    assert relative(model[0].layer.weight, w) < 1
    rest = torch.linalg.svdvals(w)[4:].norm()
    assert model[0].layer.weight.norm().item() == pytest.approx(rest.item(), rel=1e-4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_rotation_is_orthonormal_and_comes_before_the_rounding():
    x, d = normal(40, 32), normal(40, 48, seed=1)
    x[5, 5] = 100  # the amax before it is rotated
    rotated = recipes.rotate_tokens(x)
    close(rotated.t() @ recipes.rotate_tokens(d), d.t().mm(x).t(), 48 * 400 * 2**-23)
    ones = recipes.rotate_tokens(torch.ones(16, 1)).abs()
    assert (ones.min(), ones.max()) == (0.5, 2.5)  # with these signs
    *_, r_t = recipes.split_quantize(x, Variant("none", hadamard=True), "none", True, True, None)
    assert torch.equal(r_t.t().dequantize(), nvfp4(rotated, (16, 1)))


def test_every_stochastic_rounding_has_noise_of_its_own(monkeypatch):
    seeds, quantize = [], fp4.quantize_scaled

    def watch(x, block, amaxes, amax, seed=None):
        seeds.append(seed)
        return quantize(x, block, amaxes, amax, seed)

    monkeypatch.setattr(fp4, "quantize_scaled", watch)
    variant = Variant(mean_format="nvfp4_sr", stochastic_x=True, headroom=True)
    run(variant, *map(normal, (32,) * 3, (32,) * 3))
    drawn = [int(seed) for seed in seeds if seed is not None]
    assert len(set(drawn)) == len(drawn) == 6  # R and S along features and tokens, μ and ν


def test_headroom_rounds_right_on_average():
    """The slope of rounded values over true ones, in 16 draws, each with an error of .0005. No
    value is beyond 6, where it would saturate."""
    x = normal(512, 512)
    for block in ((1, 16), (16, 1)):
        draws = [recipes.quantize(x, block, Variant(headroom=True), seed) for seed in range(16)]
        mean = sum(draw.dequantize() for draw in draws) / 16
        assert ((mean * x).sum() / x.square().sum()).item() == pytest.approx(1, abs=5e-4)
        largest = 6 * draws[0].scales.float() * draws[0].tensor_scale  # that a block can hold
        amaxes, _ = fp4.block_amaxes(x, block)
        assert (largest >= amaxes.view_as(largest) * (1 - 2**-20)).all()


@pytest.mark.parametrize("split", ["mean", "project"])
def test_massive_tokens_multiply_the_unrounded_weight(split):
    """Their outputs are exact, the others what they are without them, and so is dW but for their
    part of it, which is exact too."""
    x, d, w = normal(50, 32) + 1, normal(50, 48, seed=1), normal(48, 32)
    x[[3, 17]] *= 100
    rest = torch.ones(50, dtype=torch.bool)
    rest[[3, 17]] = False
    assert not len(recipes.massive_tokens(torch.tensor([3.9] + [1.0] * 49)[:, None]))
    assert len(recipes.massive_tokens(torch.tensor([5.0] + [1.0] * 49)[:, None])) == 1
    y, _, dw = run(f"fp4_{split}_massive", x, d, w)
    close(y[~rest], x[~rest] @ w.t(), 1e-3)
    left, right, residual = split_off(x[rest], split)
    w_q = fp4.quantize(w, (16, 16)).dequantize()
    close(y[rest], left @ (right @ w.t()) + nvfp4(residual) @ w_q.t(), 1e-4)
    error = dw - d.t() @ x  # that of the rest: relative to the 100 times larger whole it is small
    assert error.norm() < 0.3 * (d[rest].t() @ x[rest]).norm()


def test_the_errors_of_wgrad():
    """Without a mean centering has nothing to win, and loses nothing: an error is that of two
    operands, .0953 to nearest, .138 stochastically, or .153 with headroom, over 16,384 outputs.
    With a mean of 4 standard deviations what is split off decides."""
    found = {}
    for mean in (0, 4):
        x = normal(512, 128) + mean * normal(128, seed=1)
        d = normal(512, 128, seed=2) + mean * normal(128, seed=3)
        for name in ("bf16", "fp4", "fp4_mean", *VARIANTS):
            found[mean, name] = relative(run(name, x, d, normal(128, 128))[2], d.t() @ x)
    alike = [n for n, v in VARIANTS.items() if v.directions == 1 and not v.four_over_six]
    for name in ("fp4", "fp4_mean", *alike):
        of_x = 0.138 if name == "fp4_mean_sr" else 0.0953
        of_d = 0.153 if name == "fp4_mean_headroom" else 0.138
        assert found[0, name] == pytest.approx(math.hypot(of_x, of_d), rel=0.03), name
    order = ["bf16", "fp4_mean", "fp4_svd", "fp4", "fp4_mean_paper"]
    assert sorted(order, key=lambda name: found[4, name]) == order
    assert found[4, "fp4"] > 10 * found[4, "fp4_mean"]
    assert found[4, "fp4_mean_paper"] > 5 * found[4, "fp4"]


def test_centering_makes_the_added_mean_invisible():
    """Errors with a mean of 8 RMS added, relative to those without. dX never sees it."""
    x, d, w = normal(256, 64) + 0.3, normal(256, 48, seed=1), normal(48, 64, seed=2)
    exact = x @ w.t(), d @ w, d.t() @ x
    for name in ("fp4", "fp4_mean", "fp4_mean_paper"):
        own, added = (map(relative, run(n, x, d, w), exact) for n in (name, f"{name}_plus8"))
        of_y, of_dx, of_dw = (b / a for a, b in zip(own, added, strict=True))
        assert abs(of_dx - 1) < 1e-6
        if name == "fp4_mean":
            assert max(abs(of_y - 1), abs(of_dw - 1)) < 0.02
        else:
            assert min(of_y, of_dw) > 5
    added, share = recipes.added_mean(x, 2.0), fp4.mean_share(x)
    assert 1.8 < added.norm() / 8 / x.square().mean().sqrt() < 2.2  # of 64 normal features
    assert torch.equal(2 * added, recipes.added_mean(x, 4.0))
    assert abs(fp4.mean_share(x + added) - (share + 4) / (1 + 4)) < 0.03  # as compare.py says


# compare.py, once for all that follows: two precisions of a tiny model.

BYTES = get_encoding("bytes")
TEXT = "The old king sat on the hill. A cat saw the king, and the king saw a cat; then it ran. "
TINY = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "dim": 32, "ffn_dim": 48}
TINY |= {"block_size": 32, "batch_size": 4, "warmup_steps": 2, "eval_windows": 4}
TOY = {"seeds": 1, "steps": 2, "base": "bf16", "flags": {"keep": True}}
TOY["settings"] = compare.grid(["fp4_mean"], [4.0])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a comparison: toy.json, tiny.json, plays-bytes, compare/tiny-2/RUN. Read only.
    The passes stay plain: compiling them takes longer."""
    folder = tmp_path_factory.mktemp("toy")
    tokens = encode(BYTES, [TEXT * 40, EOT])
    write_dataset(folder / "plays-bytes", BYTES, {"train": tokens, "val": tokens})
    (folder / "tiny.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "none")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(fp4, "use_fast_path", lambda device: "plain passes")
        patch.setattr(compare, "OUT", folder)
        patch.setattr(compare, "PLAYS", folder / "plays-bytes")
        patch.setitem(compare.EXPERIMENTS, "toy", TOY)
        compare.main(["toy", "--preset", f"{folder}/tiny.json", "--json", f"{folder}/toy.json"])
        yield folder


def test_what_is_finished_is_not_run_again_and_the_json_has_its_table(toy, monkeypatch, capsys):
    bf16, plus = json.loads((toy / "toy.json").read_text())["runs"]
    assert [step for step, _ in plus["val"]] == [0, 1, 2] and plus["added_mean"] == 4
    own, added = (r["mean_share"][0][1] for r in (bf16, plus))  # of the same weights
    assert added == pytest.approx((own + 16) / 17, abs=1e-3)
    config = json.loads((toy / "compare/tiny-2/fp4_mean-4-1/config.json").read_text())
    assert config["precision"] == "fp4_mean_plus4"

    calls, argv = [], ["toy", "--preset", f"{toy}/tiny.json"]
    monkeypatch.setattr(compare, "call", lambda *argv: calls.append(argv))
    compare.main(argv)
    printed = capsys.readouterr().out
    compare.main([f"{toy}/toy.json"])
    assert printed.endswith(capsys.readouterr().out) and "| `fp4_mean` | 4 | 0.9" in printed
    assert not calls
    monkeypatch.setattr(compare, "evaluations", lambda out: [])
    with pytest.raises(SystemExit, match="tiny-2/bf16-0-1 was interrupted"):
        compare.main(argv)
    assert calls[0][:2] == ("train.py", "--resume")
    monkeypatch.setitem(TOY["flags"], "grad_accum", 2)
    with pytest.raises(SystemExit, match="was run with another grad_accum"):
        compare.main(argv)


def test_summary_by_hand():
    def record(precision, added_mean, seed, loss, **more):
        setting = {"precision": precision, "added_mean": added_mean, "seed": seed, **more}
        return setting | {"val": [[0, 9.0], [5, loss]], "mean_share": [[0, 0.9], [5, 0.5]]}

    rows = compare.summary([
        record("bf16", 0.0, 1, 2.0), record("fp4", 4.0, 1, 2.5), record("fp4_mean", 4.0, 1, 2.2),
        record("bf16", 0.0, 2, 3.0), record("fp4", 4.0, 2, 3.3), record("fp4_mean", 4.0, 2, 3.1),
        record("fp4", 4.0, 3, 9.0), record("fp4_mean", 4.0, 1, 2.1, bf16_blocks=2),
    ], "fp4")  # fmt: skip
    bf16, plain, mean, blocks = rows
    assert [r["seeds"] for r in rows] == [2, 3, 2, 1] and bf16["gap"] == 0
    assert (plain["gap"], plain["gap_error"]) == pytest.approx((0.4, 0.1))
    assert (plain["loss"], mean["percent"], mean["share"]) == pytest.approx((14.8 / 3, 6, 0.5))
    assert (mean["to_base"], mean["to_base_error"]) == pytest.approx((-0.25, 0.05))
    assert (blocks["label"], round(blocks["to_base"], 9)) == ("fp4_mean, 2 blocks in bf16", -0.4)
    assert "| +6.00 ± 2.00 | -0.2500 ± 0.0500 |" in compare.table(rows, "fp4")


@pytest.mark.parametrize("name", ["added_mean", "natural", "ablations", "train_on", "directions"])
def test_committed_results_are_those_of_the_listed_settings(name):
    stored, listed = json.loads((RESULTS / f"{name}.json").read_text()), compare.EXPERIMENTS[name]
    made = [*compare.runs(name, stored["preset"], listed["seeds"], stored["steps"])]
    committed = [{k: r[k] for k in r if k not in ("val", "mean_share")} for r in stored["runs"]]
    assert [setting for setting, _ in made] == committed
    assert all(fields["precision"] in RECIPES for _, fields in made)


# analyze.py


@pytest.mark.parametrize("shape", [(200, 32), (44, 48)])
def test_measures_against_numpy(shape):
    x = normal(*shape).double() + 0.1 * normal(shape[1], seed=1)
    x[:, 3] += 5
    found, a, mean = analyze.diagnose(x), x.numpy(), x.numpy().mean(0)
    assert found.pop("massive") == {}
    _, s, v = np.linalg.svd(a, full_matrices=False)
    top = np.argsort(-abs(a).ravel())[: math.ceil(a.size / 1000)]
    values, means = a.ravel()[top], np.broadcast_to(mean, shape).ravel()[top]
    assert found == pytest.approx({
        "mean_share": mean @ mean / (a**2).sum(1).mean(),
        "alignment": abs(v[0] @ mean) / np.linalg.norm(mean),
        "leading_share": s[0] ** 2 / (s**2).sum(),
        "top_explained": (means * values).sum() / (values**2).sum(),
    })  # fmt: skip
    spiked = torch.cat((x, torch.zeros(2, shape[1])))
    spiked[-2:, 7] = torch.tensor([4000.0, -5000.0])
    massive, median = analyze.diagnose(spiked)["massive"], spiked.norm(dim=1).median().item()
    assert massive["tokens"] == [len(x), len(x) + 1] and massive["energy"] > 0.99
    assert massive["to_median"] == pytest.approx(5000 / median)
    assert massive["without"] == pytest.approx(found)


X, W, D = normal(128, 64) - normal(128, 64).mean(0), normal(48, 64, seed=1), normal(128, 48, seed=2)


def errors(x, remedy):
    torch.manual_seed(0)
    exact = x @ W.t(), D @ W, D.t() @ x
    found = analyze.gemm_errors(analyze.gemms(x, W, D, remedy), exact)
    return dict(zip(analyze.COLUMNS, found, strict=True))


def test_only_what_splits_it_off_removes_a_mean_in_all_features():
    x = X + 4 * normal(64, seed=3)
    removing = {"mean", "projection", "both", "mean in FP4", "rank-1 SVD", "mean + Hadamard"}
    for name, (how, _) in analyze.REMEDIES.items():
        ratio = errors(x, how)["fprop varying"] / errors(x, "fp4")["fprop varying"]
        assert ratio < 0.5 if name in removing else ratio > 0.8, name
        if callable(how):  # an emulation: without rounding it is exact
            close(how(x, W, lambda a, *_: a, lambda b, *_: b), x @ W.t(), 1e-3)
    # without a remedy an emulation is the real code; gradients have other random numbers
    emulated = errors(x, lambda a, b, round_a, round_b: round_a(a) @ round_b(b).t())
    assert emulated["fprop"] == pytest.approx(errors(x, "fp4")["fprop"], rel=1e-4)
    assert emulated == pytest.approx(errors(x, "fp4"), rel=0.1)


def test_a_projection_leaves_first_tokens_without_the_mean_as_they_are():
    first = torch.arange(128) % 32 == 0
    x = torch.where(first[:, None], 0.1 * X, 0.1 * X + 4 * normal(64, seed=3))
    found, y = analyze.first_tokens(x, W, 32), x @ W.t()
    error = nvfp4(x) @ nvfp4(W, (16, 16)).t() - y
    due = [error[t].norm().item() / y[t].norm().item() for t in (first, ~first)]
    assert found["fp4"] == pytest.approx(due, rel=1e-4) and abs(found["along"]) < 0.1
    assert found["fp4_mean"][0] > 5 * found["fp4"][0] > 3 * found["fp4_project"][0]


def test_errors_are_root_mean_squares_and_a_mean_moves_no_unit():
    pair = {"a": (X, D), "b": (X + recipes.added_mean(X, 4.0), D)}
    both = analyze.remedy_errors(pair, {"a": W, "b": W}, 0.0)["mean"]
    one, two = (errors(x, "fp4_mean") for x, _ in pair.values())
    due = [math.hypot(one[column], two[column]) / 2**0.5 for column in analyze.COLUMNS]
    assert both == pytest.approx(due, rel=1e-4)
    added = analyze.remedy_errors({"a": (X, D)}, {"a": W}, 4.0)
    assert added["mean"][4] == pytest.approx(one["wgrad"], rel=0.02)
    assert added["none"][4] > 2 * errors(X, "fp4")["wgrad"]


def test_errors_by_hand():
    y = torch.tensor([[1.0, 5.0], [3.0, 5.0]])  # over tokens: 1 and -1 about (2, 5)
    shifted = analyze.gemm_errors((y + 3, 2 * y, 0 * y), (y, y, y))
    assert shifted == pytest.approx((6 / math.sqrt(60), 0, 1, 1, 1))
    exact, bias = normal(4000), 0.3 * normal(4000, seed=1)
    draws, norm = exact + bias + 0.5 * normal(5, 4000, seed=2), exact.norm().item()
    halves = [(draws[:, :999], exact[:999]), (draws[:, 999:], exact[999:])]
    error, b, n, cosine = analyze.split_error(halves)
    assert b == pytest.approx(bias.norm().item() / norm, rel=0.03)
    assert n == pytest.approx(0.5 * math.sqrt(4000) / norm, rel=0.03)
    assert error == pytest.approx(math.hypot(b, n))
    each = [np.corrcoef(d, exact)[0, 1] for d in draws.numpy()]
    assert cosine == pytest.approx(np.mean(each), abs=0.002)


def test_stages_are_analyzed_stored_and_printed_again(toy, tmp_path, capsys):
    path = toy / "compare/tiny-2/bf16-0-1"
    small = ["--tokens", "64", "--seeds", "2", "--device", "cpu", "--json", f"{tmp_path}/a.json"]
    analyze.main([f"{path}/step-0.pt", str(path), *small])
    printed, stages = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert [s["name"] for s in stages] == ["step-0", "bf16-0-1"] and "largest" not in stages[0]
    analyze.main([f"{tmp_path}/a.json"])
    assert printed.endswith(capsys.readouterr().out)
    # what is captured gives the weights' gradients; and no two draws are the same
    model, ids, targets, _ = analyze.open_model(path, None, 64, "cpu")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fp4.FP4Linear)}
    captured = analyze.capture(model, layers, ids, targets)
    exact = analyze.gradients(model, layers, ids, targets, "fp32")
    assert all(torch.allclose(d.t() @ x, exact[f"{n}.weight"]) for n, (x, d) in captured.items())
    assert min(errors["whole"][2] for errors in stages[1]["gradients"].values()) > 0.01


# eval.py


def test_scores_by_hand(toy):
    """Of a model whose logits are a row of a table, that of the last token."""
    table = torch.zeros(257, 257)
    table[:, ord("x")] = -5
    table[BYTES.eot_token, ord("t")] = -9  # before a sentence's first token
    table[:, ord(" ")] = 20
    table[list(b" kin"), list(b"king")] = 40  # after letters of "king" the next one
    model, shapes = torch.nn.Embedding.from_pretrained(table), []
    model.register_forward_hook(lambda _, inputs, logits: shapes.append(logits.shape[:2]))
    model.head = torch.nn.Linear(1, 1)  # where score finds the device
    pairs = ("the cat", "the xat"), ("it", "it"), ("the cat", "xhe cat")
    blimp = [("a", uid, *pair) for uid, pair in zip("bbc", pairs, strict=True)]
    lambada = [("they saw a", " king"), ("they had it", " cat"), ("they saw a", " kin")]
    settings = {"windows": 8, "block_size": 64, "batch_tokens": 128, "lambada": lambada}
    val = load(toy / "plays-bytes", "val")
    columns, phenomena = evaluation.measure(model, val, BYTES, **settings, blimp=blimp)
    nats = columns["val loss"][1]
    assert columns["bits per byte"][1] == pytest.approx(nats / math.log(2), rel=1e-3)  # but for EOT
    assert columns["BLiMP, %"][1].tolist() == [100, 50, 0]
    found = {name: values.tolist() for name, (_, values) in phenomena.items()}
    assert found == {"a: b": [100, 50], "a: c": [0]}
    assert columns["LAMBADA, %"][1].tolist() == [100, 0, 100]
    nats = columns["LAMBADA, log perplexity"][1]
    assert nats == pytest.approx([0, 80, 0], abs=1e-4)  # "c" 40, "a" and "t" 20 each
    # a length a batch, no padding, 128 tokens at most
    assert shapes == [(2, 64)] * 4 + [(2, 15), (1, 14), (4, 7), (2, 2)]


def test_a_byte_level_target_is_tokenized_as_by_itself():
    encoding, text = get_encoding("plays"), f'HAMLET:\nTo be, or not: {EOT} 12 "the'
    context = [encoding.eot_token, *encoding.encode_ordinary(text)]
    for word in (" hill", " Laertes", " don't", " naïve"):
        target = encoding.encode_ordinary(word)
        assert evaluation.tokenize(encoding, text, word, 1000) == (context, target)
        fits = context[len(target) - 13 :]
        assert evaluation.tokenize(encoding, text, word, 12) == (fits, target)
    assert len(evaluation.tokenize(encoding, "To be", text, 3)[0]) == 1  # the target fills it


def test_a_sentencepiece_target_is_cut_from_the_whole_text(tmp_path):
    """As in Llama: a space before the text, spaces spelled ▁, and a BOS that goes before a context
    instead of <|endoftext|>. By itself " king" would be ▁ and ▁king."""
    pieces = "<unk>", "<s>", "</s>", "▁the", "▁king", "▁the▁queen", "▁", "."
    model = tokenizers.models.Unigram([(piece, -1.0 - i) for i, piece in enumerate(pieces)], 0)
    tokenizer, normalizers = tokenizers.Tokenizer(model), tokenizers.normalizers
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    bos = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**bos)
    tokenizer.save(f"{tmp_path}/tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    encoding = FolderEncoding(tmp_path)
    assert encoding.encode_ordinary(" king") == [6, 4]
    assert evaluation.tokenize(encoding, "the king", " the.", 9) == ([1, 3, 4], [3, 7])
    assert evaluation.tokenize(encoding, "", "the king", 9) == ([1], [3, 4])
    assert evaluation.tokenize(encoding, "the", " queen", 9) == ([1], [5])  # it spans the seam


def test_blimp_and_lambada_are_read(tmp_path):
    keys = "linguistics_term", "UID", "sentence_good", "sentence_bad"
    pairs = [("n", uid, f"the cat {i}", f"the xat {i}") for uid in "ab" for i in "12"]
    lines = [json.dumps(dict(zip(keys, pair, strict=True))) for pair in pairs]
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp/b.jsonl").write_text("\n".join(lines[2:]) + "\n")
    (tmp_path / "blimp/a.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8-sig")
    archive = shutil.make_archive(f"{tmp_path}/blimp", "xztar", tmp_path / "blimp")
    for path in (tmp_path / "blimp", archive):
        assert sorted(evaluation.read_blimp(path)) == pairs
    assert evaluation.read_blimp(tmp_path / "blimp", 1) == pairs[::2]
    text = '{"text": "I saw  a\u2028king\\n"}\n{"context": "“Stop,” he", "continuation": "said"}\n'
    (tmp_path / "l.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    due = [("I saw", " a\u2028king"), ("“Stop,” he", " said")]  # U+2028 ends no line in JSON
    assert evaluation.read_lambada(tmp_path / "l.jsonl.xz") == due
    assert evaluation.read_lambada(tmp_path / "l.jsonl.xz", 1) == due[:1]


def test_standard_errors_are_paired():
    a, b = (100.0 * (normal(400, seed=i).numpy() > i) for i in (0, 1))
    examples, p = list(range(400)), a.mean() / 100
    due = 400, 100 * p, 100 * math.sqrt(p * (1 - p) / 400)
    assert evaluation.statistics((examples, a)) == pytest.approx(due, abs=1e-5)
    paired = evaluation.statistics((examples, b), ([*examples], a))
    assert paired[3:] == pytest.approx([(b - a).mean(), (b - a).std() / 20], abs=1e-5)
    assert len(evaluation.statistics((examples, b), (examples[::-1], a))) == 3


def test_runs_are_evaluated_as_train_py_did(toy, tmp_path):
    runs = [f"{toy}/compare/tiny-2/{name}-1" for name in ("bf16-0", "fp4_mean-4")]
    argv = ["--out-dir", *runs, "--device", "cpu", "--json", f"{tmp_path}/e.json"]
    evaluation.main([*argv, "--means", "batch"])
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [r["in"] for r in rows] == ["bf16", "bf16", "fp4_mean_plus4"]
    stored = json.loads((toy / "toy.json").read_text())["runs"]
    bf16, _, plus = (r["columns"]["val loss"] for r in rows)
    for (n, mean, *_), r in zip((bf16, plus), stored, strict=True):
        assert n == 4 and mean == pytest.approx(r["val"][-1][1], abs=2e-5)
    evaluation.main([*argv, "--precision", "fp4_mean", "fp4_svd"])
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [r["means"] for r in rows[:2]] == ["stored", "batch"]
    run = {"folder": "R", "config": {}, "tokenizer": "plays", "tokenizer_hash": "another"}
    with pytest.raises(SystemExit, match="has tokens of bytes, R reads those of plays"):
        evaluation.text_of(run, toy / "plays-bytes", "val")


# figures.py


def test_every_committed_figure_is_drawn_from_a_folder(tmp_path):
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    records = [{"step": i, "loss": i} for i in range(25)] + [{"step": 10, "val_loss": 8}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    curves = {"train": [[5, 4.5], [15, 14.5]], "val": [[10, 8]]}  # means of ten steps
    assert figures.loss_curves(tmp_path) == curves
    figures.main([str(tmp_path)])
    committed = {path.name for path in (figures.HERE / "assets").iterdir()}
    assert {path.name for path in tmp_path.glob("*.png")} == committed


# loop.py


def test_the_loop_is_that_of_train_py(toy):
    """Weights and losses, bit for bit; and the presets."""
    for precision in ("bf16-0-1", "fp4_mean-4-1"):
        folder = toy / f"compare/tiny-2/{precision}"
        config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
        model = GPT(config, loop.generator_for(config, "init"))
        due = [m["val_loss"] for m in compare.evaluations(folder)]
        for step in loop.train(model, config):
            assert loop.evaluate(model, config) == due[step]
            saved = torch.load(folder / f"step-{step}.pt")["model"]
            assert all(torch.equal(w, saved[name]) for name, w in model.state_dict().items())
        assert step == 2
    assert loop.PURPOSES == train.PURPOSES
    for preset, values in train.PRESETS.items():
        if preset in loop.PRESETS:
            of_train = vars(train.Config(**values))
            own = vars(loop.settings(preset, dataset=values.get("dataset", "shakespeare")))
            assert own == {name: of_train[name] for name in own}


# positions.py


def test_groups_of_predicted_tokens_by_hand():
    """Two sequences; of the first the last two tokens are the last word."""
    ids = [[9, *[1, 2] * 8, 3, 1], [9, 4, 3]]
    share = np.array([0, 0.5, 5e-4, 5e-5, 1e-4, 0, 0, 0, 0, 0])
    masks = positions.groups(ids, [2, 1], share)
    where = {name: mask.nonzero()[0].tolist() for name, mask in masks.items()}
    assert where["all tokens"] == [*range(20)]
    assert where["last word"] == [16, 17, 19]
    assert where["last word, in the passage before"] == [17] and where["last word, new"] == [16, 19]
    assert where["last word, rare"] == [16, 19]
    assert where["others, rare"] == [] and where["others, between"] == [*range(1, 16, 2), 18]
    assert where["others, frequent"] == [*range(0, 16, 2)]
    assert where["others, after 1 to 15 tokens"] == [*range(15), 18]
    assert where["others, after 16 to 63"] == [15]
    passage = np.repeat([0, 1], [18, 2])
    values = np.arange(20.0)
    n, mean, error = positions.statistics(values, masks["last word"], passage)
    assert (n, mean) == (3, pytest.approx(52 / 3, abs=1e-4))
    sums = 16 + 17 - 2 * 52 / 3, 19 - 52 / 3  # deviations add up within a passage
    assert error == pytest.approx(math.hypot(*sums) / 3, abs=1e-4)


def test_token_losses_are_those_of_single_sequences(toy):
    """And a first token that is kept exact has bf16's logits, the others not, under fp4."""
    folder = toy / "compare/tiny-2/bf16-0-1"
    ids = [[1, 5, 7, 5], [2, 4, 6], [3, 1, 2, 9]]
    model = GPT.load(folder, precision="bf16")
    wanted = [F.cross_entropy(model(torch.tensor([s[:-1]]))[0], torch.tensor(s[1:]),
                              reduction="none") for s in ids]  # fmt: skip
    wanted = torch.cat(wanted).detach().numpy()
    np.testing.assert_allclose(positions.token_losses(model, ids, 8), wanted, atol=1e-5)
    tokens = torch.tensor([[1, 5, 7]])
    fp32, rounded = GPT.load(folder, precision="fp32"), GPT.load(folder, precision="fp4")
    layers = {n: m for n, m in rounded.named_modules() if isinstance(m, fp4.FP4Linear)}
    positions.keep_first(rounded, {n: m.weight.detach() for n, m in layers.items()})
    difference = (rounded(tokens) - fp32(tokens)).abs().amax(2)[0]
    assert difference[0] < 1e-5 < 1e-3 < difference[1:].min()


# authors.py


def test_the_authors_runs_with_and_without_a_branch(toy, monkeypatch, tmp_path, capsys):
    """Before training a branch changes nothing but what is rounded; each run is made once."""
    monkeypatch.setattr(authors, "OUT", tmp_path)
    small = TINY | {"dataset": str(toy / "plays-bytes"), "vocab_size": 320, "max_steps": 2}
    monkeypatch.setitem(authors.CHANGES, "nano", small)
    exact = [authors.run("nano", "fp32", branch, 1) for branch in (False, True)]
    assert [step for step, _ in exact[0]] == [0, 1, 2]
    assert exact[0][0] == pytest.approx(exact[1][0], abs=1e-5) and exact[0][2] != exact[1][2]
    authors.main(["nano", "--json", f"{tmp_path}/all.json"])
    runs = len(list(tmp_path.glob("nano-*.json")))
    monkeypatch.setattr(authors, "run", None)
    authors.main(["nano", "--json", f"{tmp_path}/all.json"])
    records = json.loads((tmp_path / "all.json").read_text())
    assert len({r["val"][-1][1] for r in records}) == runs == 5  # no two recipes alike
    assert capsys.readouterr().out.endswith(authors.table(records, "nano") + "\n")
    authors.main([f"{tmp_path}/all.json"])
    assert authors.table(records, "nano") in capsys.readouterr().out


def test_the_authors_table_by_hand():
    val = {"bf16": [2, 1], "fp4_authors": [2.5, 1.25]}
    records = [
        {"preset": "nano", "precision": name, "branch": False, "seed": seed,
         "val": [[0, first + seed], [60, last]]}
        for name, (first, last) in val.items() for seed in (1, 2)
    ]  # fmt: skip
    lines = authors.table([*records, {"preset": "smollm2"}], "nano").splitlines()
    assert lines[0] == "| precision | branch | step 0 | step 60 |"
    assert lines[2:] == ["| `bf16` |  | 3.500 | 1.000 |", "| `fp4_authors` |  | +0.500 | +0.250 |"]


# origin.py


def test_given_frequencies_are_a_constant_of_the_logits(toy):
    tokens = load(toy / "plays-bytes", "train")
    p = origin.frequencies(tokens, 320)
    counts = np.bincount(encode(BYTES, [TEXT * 40, EOT]), minlength=320)
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert p.tolist() == pytest.approx(((counts + 1) / (counts.sum() + 320)).tolist())
    config = loop.settings("micro", **TINY, vocab_size=320)
    given = origin.BiasedGPT(config, loop.generator_for(config, "init"), p.log())
    plain, ids = GPT(config, loop.generator_for(config, "init")), torch.randint(257, (2, 33))
    assert torch.equal(given(ids[:, :-1]), plain(ids[:, :-1]) + p.log())
    assert given.state_dict().keys() == plain.state_dict().keys()
    loss = F.cross_entropy(given(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert given(ids[:, :-1], ids[:, 1:]) == loss


def test_what_a_mean_says_by_hand():
    """Of a head that knows the frequencies, and hidden states whose mean says them twice over."""
    torch.manual_seed(1)
    p = torch.softmax(2 * normal(64), 0)
    config = loop.settings("micro", **TINY, vocab_size=64)
    model, hidden, targets = GPT(config), normal(50, 32), torch.randint(64, (50,))
    hidden[:, 0] = 2
    with torch.no_grad():
        model.head.weight[:, 0] = p.log()
        model.head.weight[:, 1:] = 0
    found = origin.at_the_head(model, hidden, targets, p)
    assert (found["correlation"], found["unweighted"]) == pytest.approx((1, 1))
    assert (found["slope"], found["random"]) == pytest.approx((2, 1))
    logits = {"as it is": 2 * p.log(), "without": 0 * p, "frequencies": p.log()}
    due = {name: F.cross_entropy(x.expand(50, 64), targets).item() for name, x in logits.items()}
    assert found["loss"] == pytest.approx(due)
    x, w = p.log().numpy(), p.numpy() / p.numpy().sum()
    logits = normal(64, seed=3)
    cov = np.cov(x, logits.numpy(), aweights=w, ddof=0)
    due = cov[0, 1] / math.sqrt(cov[0, 0] * cov[1, 1]), cov[0, 1] / cov[0, 0]
    assert origin.fit(logits, p, p) == pytest.approx(due, rel=1e-4)


def test_runs_are_measured_kept_and_printed_again(toy, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(origin, "OUT", tmp_path)
    monkeypatch.setitem(origin.VOCABULARIES, "plays", (str(toy / "plays-bytes"), [], 2, 3))
    small = {**TINY, "learning_rate": 2e-3, "max_steps": 2, "steps": (0, 2)}
    trained = origin.run("plays", "bf16", "plain", 1, **small)
    assert trained["step"] == [0, 2] and {*trained["share"]} == {*origin.KINDS, "norm"}
    # shares and loss are train.py's, of a run of the same shape, seed and batches
    of_train, _ = json.loads((toy / "toy.json").read_text())["runs"]
    assert trained["loss"]["bf16"] == pytest.approx(
        [of_train["val"][i][1] for i in (0, 2)], abs=1e-5
    )
    given = origin.run("plays", "bf16", "frequencies", 1, **small)
    assert given["loss"]["bf16"][0] < trained["loss"]["bf16"][0] - 1  # knows them from the start
    linears = np.mean([trained["share"][kind] for kind in origin.KINDS], 0)
    assert linears == pytest.approx([of_train["mean_share"][i][1] for i in (0, 2)], abs=1e-4)
    assert trained["loss"]["fp4"] != trained["loss"]["bf16"] != trained["loss"]["fp4_mean"]

    calls, run = [], origin.run

    def run_small(**setting):
        calls.append(setting)
        return run(**setting, **small)

    monkeypatch.setattr(origin, "run", run_small)
    monkeypatch.setattr(origin, "SMOLLM2", toy / "compare/tiny-2/bf16-0-1")
    argv = ["--vocab", "plays", "--seed", "1", "--dataset", str(toy / "plays-bytes")]
    monkeypatch.setattr(origin, "far_end", functools.partial(origin.far_end, windows=2, length=32))
    origin.main([*argv, "--json", f"{tmp_path}/o.json"])
    printed = capsys.readouterr().out
    origin.main([f"{tmp_path}/o.json"])
    assert printed.endswith(capsys.readouterr().out) and "| frequencies | 2 |" in printed
    assert len(calls) == 6
    stored = json.loads((tmp_path / "o.json").read_text())
    assert stored["runs"][0]["loss"]["bf16"] == pytest.approx(trained["loss"]["bf16"], rel=1e-3)
    assert len(stored["smollm2"]["stream"]["share"]) == 2
    assert stored["smollm2"]["stream"]["cosine"][-1] == pytest.approx(1)


def test_tables_of_the_readme_are_those_of_the_results():
    """Findings 4, 5 and 6: their rows, made again."""
    text = (figures.HERE / "README.md").read_text()

    def gap(value, digits=3):
        return f"{value:+.{digits}f}".replace("0.", ".", 1)

    stored = json.loads((RESULTS / "directions.json").read_text())
    first = {compare.label(r): r["val"][0][1] for r in stored["runs"]}
    rows = {r["label"]: r for r in compare.summary(stored["runs"], stored["base"])}
    for name in rows.keys() - {"bf16"}:
        trained = gap(rows[name]["gap"])
        if rows[name]["seeds"] > 1:
            trained += f" ± {gap(rows[name]['gap_error'])[1:]}"
        closed = f" {1 - rows[name]['gap'] / rows['fp4']['gap']:.0%} " if name != "fp4" else " "
        row = f" | {gap(first[name] - first['bf16'])} | {trained} |{closed}|"
        assert re.search(rf"^\| \**`{name}`.*{re.escape(row)}", text, re.M), row

    runs = json.loads((RESULTS / "authors.json").read_text())
    for preset in ("smollm2", "nano"):
        bf16, *others = [[loss for _, loss in r["val"]] for r in runs if r["preset"] == preset]
        gaps = [[loss - base for loss, base in zip(run, bf16, strict=True)] for run in others]
        if preset == "nano":
            vanilla, branch, mean, both = (gap(row[-1]) for row in gaps)
            assert f"{vanilla}, {mean}, {branch}, {both} in this order" in " ".join(text.split())
            continue
        for row in gaps:
            closed = f" {1 - row[-1] / gaps[0][-1]:.0%} " if row is not gaps[0] else " "
            assert f"| {' | '.join(map(gap, row))} |{closed}|" in text

    found = json.loads((RESULTS / "positions.json").read_text())
    groups = "last word", "others, frequent", "others, between", "others, rare"
    for group in groups:
        cells = [(found[group][way][1], found[group][way][2]) for way in positions.WAYS[1:]]
        cells = (f"{gap(mean, 2)} ± {gap(error, 2)[1:]}" for mean, error in cells)
        assert f"| {found[group]['bf16'][0]:,} | {' | '.join(cells)} |" in text
