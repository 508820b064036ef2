"""What fp4.py claims. The format first: its tables, bit for bit against an independent reference,
and the statistics of its rounding. Then the linear layer: its algebra, its GEMMs on operands of the
reference, what it rounds and keeps. Last the ways into a model."""

import copy

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from reference import E4M3, INF, NAN, backward, codes, in_a_new_process, relative, same
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import fp4

E2M1 = torch.from_numpy(reference.E2M1)
BLOCKS = list(fp4.BLOCKS)
every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)
fixed = settings(derandomize=True, deadline=None)  # the same examples in every run


def check(q, want):
    assert same(q.tensor_scale, want.tensor_scale)
    assert same(q.scales.float(), want.scales)
    assert same(q.dequantize(), want.dequantized)
    assert np.array_equal(codes(q).numpy(), want.codes)


# ------------------------------------------------------------------------------------------------
# The format: tables


@every_block
def test_codes_decode(block):
    table = torch.arange(16, dtype=torch.uint8).expand(16, 16)  # code j in column j
    scales = torch.ones(16 // block[0], 16 // block[1], dtype=torch.float8_e4m3fn)
    packed = fp4.pack(table.contiguous(), axis=int(block[1] == 16))
    q = fp4.NVFP4(packed, scales, torch.tensor(1.0), block)
    assert same(q.values(), torch.cat((E2M1, -E2M1)).expand(16, 16))


def edges(grid):
    """Every value, every midpoint, and the FP32 neighbours of both."""
    points = np.concatenate((grid, (grid[1:] + grid[:-1]) / 2))
    return np.concatenate((points, np.nextafter(points, -INF), np.nextafter(points, INF)))


@every_block
@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_edges(block, sign):
    values = torch.from_numpy(sign * edges(reference.E2M1))
    tiles = values[:, None, None].repeat(1, 16, 16)
    tiles[:, range(16), range(16)] = 6  # in every block
    x = torch.cat((torch.full((16, 16), 2688.0), tiles.flatten(0, 1)))
    q = fp4.quantize(x, block)
    assert (q.scales[16 // block[0] :].float() == 1).all()  # so that only E2M1 rounds
    check(q, reference.quantize(x.numpy(), block))


def test_e4m3_round():
    points = edges(E4M3)
    top = int(np.float32(448).view(np.int32))
    bits = np.random.default_rng(0).integers(0, top + 1, 1 << 22, dtype=np.int32)
    x = np.concatenate((points[(points >= 0) & (points <= 448)], bits.view(np.float32)))
    want = x.astype("float8_e4m3fn").astype(np.float32)
    assert same(fp4.e4m3_round(torch.from_numpy(x)), want)
    assert fp4.e4m3_round(torch.tensor(NAN)).isnan()


def test_products_are_exact_in_bf16():
    p = torch.cat((E2M1, -E2M1))[:, None] * torch.from_numpy(E4M3)
    assert torch.equal(p.bfloat16().float(), p)


@every_block
def test_nibble_order(block):
    x = torch.tensor([[0.5, 6.0], [6.0, 1.0]]).repeat(8, 8)  # codes 1 7 and 7 2, along both axes
    packed = fp4.quantize(x, block).codes
    want = torch.tensor([1 | 7 << 4, 7 | 2 << 4], dtype=torch.uint8).repeat(8)
    assert torch.equal(packed, (want if block[1] == 1 else want[:, None]).expand(packed.shape))


@every_block
def test_transpose_is_a_view(block):
    x = torch.randn(48, 32)
    q, t = fp4.quantize(x, block), fp4.quantize(x.t(), block[::-1])
    assert q.t().codes.data_ptr() == q.codes.data_ptr()
    assert torch.equal(q.t().dequantize(), t.dequantize())
    assert torch.equal(q.t().t().dequantize(), q.dequantize())


# ------------------------------------------------------------------------------------------------
# quantize, bit for bit


@st.composite
def matrices(draw):
    """x (R, C) FP32 of mixed magnitudes with zeros of both signs and subnormals; a block."""
    block = draw(st.sampled_from(BLOCKS))
    rows = draw(st.integers(1, 70))
    cols = draw(st.integers(1, 5)) * 16 if block[1] == 16 else draw(st.integers(1, 80))
    lo, hi = sorted(draw(st.tuples(st.integers(-44, 38), st.integers(-44, 38))))
    by = draw(st.sampled_from([(1, 1), (rows, 1), (1, cols), (rows, cols)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((rows, cols)) * 10.0 ** rng.uniform(lo, hi, by)
    x *= rng.random((rows, cols)) >= draw(st.sampled_from([0, 0.5, 0.99]))
    with np.errstate(over="ignore"):
        return x.astype(np.float32), block


def lay_out(x, layout):
    """The same values under other strides."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        return x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    return x


@settings(fixed, max_examples=400)
@given(
    matrices(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["contiguous", "transposed", "strided"]),
)
def test_equals_reference(drawn, dtype, layout):
    x, block = drawn
    x = torch.from_numpy(x).to(dtype)
    check(fp4.quantize(lay_out(x, layout), block), reference.quantize(x.float().numpy(), block))


@settings(fixed, max_examples=200)
@given(
    arrays(np.float32, array_shapes(min_dims=1, max_dims=1, max_side=18).map(lambda s: (*s, 16))),
    st.sampled_from(BLOCKS),
)
def test_equals_reference_on_any_floats(x, block):  # infinities and NaN too
    check(fp4.quantize(torch.from_numpy(x), block), reference.quantize(x, block))


@every_block
@pytest.mark.parametrize("amax", [0, 1e-45, 1e-38, 7.9e-36, 1e-5, 1, 3.4e38, INF])
def test_extreme_amax(block, amax):
    x = (torch.randn(48, 48).clamp(-1, 1).double() * min(amax, 3.4e38)).float()
    x[0, 0] = amax
    x[16:32, 16:32] = 0
    x[32:, 32:] *= 1e-30  # their scales underflow, unless the amax is infinite
    q = fp4.quantize(x, block)
    v = q.dequantize()
    check(q, reference.quantize(x.numpy(), block))
    assert not v.isnan().any() and not v[16:32, 16:32].any()
    assert amax == INF or not v[32:, 32:].any()


@every_block
def test_nan_marks_its_block_only(block):
    x = torch.randn(48, 48)
    clean = fp4.quantize(x, block).dequantize()
    x[20, 20] = NAN  # the tensor's amax lies elsewhere
    q = fp4.quantize(x, block)
    v = q.dequantize()
    inside = torch.zeros(48, 48, dtype=torch.bool)
    inside[20 // block[0] * block[0] :, 20 // block[1] * block[1] :][: block[0], : block[1]] = True
    assert v[inside].isnan().all() and (codes(q)[inside] == 7).all()
    assert torch.equal(v[~inside], clean[~inside])


def test_division_is_one_rounding():
    """2688.0 / tensor, reciprocal times scalar, gives other bits. In BF16 ties are frequent, and
    every last bit counts."""
    for x in torch.randn(128, 64, 64).bfloat16():
        check(fp4.quantize(x), reference.quantize(x.float().numpy(), (1, 16)))


def test_gaussian_error():
    x = torch.randn(1024, 1024)
    # .0953 for Gaussian data; a million elements fix the fourth digit
    assert relative(fp4.quantize(x).dequantize(), x) == pytest.approx(0.0953, abs=2e-4)


# ------------------------------------------------------------------------------------------------
# Stochastic rounding


def lowbias32(i):
    i = (i ^ i >> np.uint32(16)) * np.uint32(0x7FEB352D)
    i = (i ^ i >> np.uint32(15)) * np.uint32(0x846CA68B)
    return i ^ i >> np.uint32(16)


def noise(shape, block, seed):
    """A hash for four bytes, times an odd number for each. Of this product the odd one of a byte's
    two codes gets the high 16 bits, the even one the low 16 bits, xor the high ones."""
    rows, cols = shape
    key = lowbias32(np.array([seed % 2**32], np.uint32))
    byte = np.arange(rows * cols // 2, dtype=np.uint32)
    products = lowbias32(byte // 4 ^ key) * (byte % 4 * np.uint32(0x3C6EF372) + np.uint32(1))
    low, high = products & np.uint32(0xFFFF), products >> np.uint32(16)
    halves, axis = (low ^ high, high), 2 - (block == (16, 1))
    shape = (rows // 2, cols) if axis == 1 else (rows, cols // 2)
    return np.stack([h.reshape(shape) for h in halves], axis).reshape(rows, cols).astype(np.int32)


def draw(n, seed):
    """n of fp4's draws, as uniform numbers in (0, 1)."""
    key = fp4.hash32(torch.tensor(seed, dtype=torch.int32))
    return (fp4.noise((n // 16, 16), (1, 16), key).double().flatten() + 0.5) / 2**16


@every_block
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, -1, -(2**31)])
def test_noise_bits(block, seed):
    shape = 1600, 496  # more words than 2^16, where the first shift begins to act
    got = fp4.noise(shape, block, fp4.hash32(torch.tensor(seed, dtype=torch.int32)))
    assert torch.equal(got, torch.from_numpy(noise(shape, block, seed)))
    assert got.min() >= 0 and got.max() < 2**16


def test_noise_statistics():
    n, sigmas = 1 << 20, 5
    u, other = draw(n, 3), draw(n, 4)
    assert abs(u.mean() - 1 / 2) < sigmas * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < sigmas * (1 / 180 / n) ** 0.5  # E(u - 1/2)^4 - 1/12^2 = 1/180
    halves = u.view(-1, 2).t()  # of a byte
    for bit in range(16):
        ones = ((halves * 2**16).long() >> bit & 1).double().mean(1)
        assert ((ones - 1 / 2).abs() < sigmas / 2 / (n / 2) ** 0.5).all(), bit
    low, high = (halves * 16).long()  # all pairs are as frequent
    pairs, mean = torch.bincount(low * 16 + high, minlength=256), n / 2 / 256
    chi2 = ((pairs - mean) ** 2 / mean).sum()  # 255 degrees of freedom: 255 on average
    assert abs(chi2 - 255) < sigmas * (2 * 255) ** 0.5
    u, other = u - 0.5, other - 0.5
    for lag in (*range(1, 16), 256, 4096):  # 8 codes share a hash
        assert abs((u[lag:] * u[:-lag]).mean() * 12) < sigmas / (n - lag) ** 0.5
    assert abs((u * other).mean() * 12) < sigmas / n**0.5


def test_sr_probability_is_that_of_the_distance(monkeypatch):
    """Of every fraction of 16 bits as many of the 2^16 draws go up: all of the noise is used."""
    draws = torch.arange(2**16, dtype=torch.int32)
    draws = torch.cat((draws, draws[:16]))[:, None].expand(-1, 16)
    monkeypatch.setattr(fp4, "noise", lambda *_: draws)
    for fraction in (0, 1, 2, 77, 2**15, 2**16 - 2, 2**16 - 1):
        x = torch.full((2**16 + 16, 16), 2.0 + fraction / 2**16)  # codes 4 and 5, at 2 and 3
        x[:, 0], x[-16:] = 6, 2688  # S_enc = 1, and so are the factors
        up = codes(fp4.quantize(x, seed=0))[: 2**16, 1:]
        assert ((up == 4) | (up == 5)).all() and ((up == 5).sum(0) == fraction).all()


@every_block
def test_sr_moves_to_a_neighbour(block):
    x = torch.randn(80, 64)
    want = reference.quantize(x.numpy(), block)
    q = fp4.quantize(x, block, seed=1)
    assert same(q.scales.float(), want.scales) and same(q.tensor_scale, want.tensor_scale)
    grid, y = reference.E2M1, np.abs(want.scaled.clip(-6, 6))
    low = (np.searchsorted(grid, y, side="right") - 1).clip(max=6)
    way = (y - grid[low]) / (grid[low + 1] - grid[low])  # 1 at 6
    up = noise(x.shape, block, 1) + np.rint(way * 2**16) >= 2**16
    assert np.array_equal(codes(q).numpy(), low + up + 8 * np.signbit(want.scaled))


def test_sr_slope():
    """Of the rounded on the exact Gaussian values. E4M3 rounds some scales down, and the largest
    values of their blocks saturate: all values lose .35%, the maxima of blocks 1.16%."""
    x = torch.randn(4096, 512)
    q = fp4.quantize(x, seed=0).dequantize().double()
    top = x.view(4096, -1, 16).abs().argmax(2, keepdim=True)
    x = x.double()
    x_top, q_top = (a.view(4096, -1, 16).gather(2, top) for a in (x, q))
    # A draw's error is about .16 of the RMS, so over 2 M values the slope's sigma is 1.1e-4; the
    # maxima lie between 4 and 6, where sigma is at most half the step, 1/4 of them: over 131072,
    # 6.9e-4.
    assert (x * q).sum() / x.square().sum() == pytest.approx(0.9965, abs=5 * 1.1e-4)
    assert (x_top * q_top).sum() / x_top.square().sum() == pytest.approx(0.9884, abs=5 * 6.9e-4)


# ------------------------------------------------------------------------------------------------
# Compiled, in processes of their own: `use_fast_path` rebinds the passes of its process.


def bits(x, *args):
    q = fp4.quantize(x, *args)
    return [t.float() for t in (*q.tensors(), q.dequantize())]


@torch.no_grad()
def fused_and_plain():
    """What `use_fast_path` says; whether each case has the same bits, on two threads and every
    time; the graphs that a second shape adds."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    cases = []
    for rows, cols in ((33, 80), (50, 48)):
        x = torch.randn(rows, cols) * 10 ** torch.randn(rows, 1)
        x[:17, :16] = 0
        cases.append((x.bfloat16(), (1, 16), 5))
        cases.append((x, (16, 1), None))
        cases.append((nn.Parameter(x[: rows // 16 * 16]), (16, 16), None))
    plain = [bits(*case) for case in cases]
    line, equal, graphs = fp4.use_fast_path(torch.device("cpu")), [], []
    for case, want in zip(cases, plain, strict=True):
        again = [bits(*case) for _ in range(30)]
        equal.append(all(torch.equal(a, b) for f in again for a, b in zip(f, want, strict=True)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return line, equal, graphs[5] - graphs[2]


def test_fused_passes_give_the_same_bits():
    line, equal, added = in_a_new_process(fused_and_plain)
    assert line == "FP4: passes fused by torch.compile"
    assert all(equal), equal
    assert added == 0  # or every weight shape costs seconds, until torch.compile gives up


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before helps
    monkeypatch.setenv("CXX", "/nonexistent")
    line, equal, _ = in_a_new_process(fused_and_plain)
    assert line.startswith("FP4: plain PyTorch") and "\n" not in line
    assert all(equal), equal


def round_trip(x):
    return fp4.to_dtype(x, torch.bfloat16).float()


def test_rounding_to_bf16_survives_the_compiler():
    """torch.compile drops a cast to BF16 and back."""
    x = torch.cat((torch.randn(1000), 1 + torch.arange(512) / 2**9, torch.tensor([0.0, INF, NAN])))
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # as GPUs make it
    x = torch.cat((x, -x, 3e38 * x, 1e-38 * x, nan))
    assert same(torch.compile(round_trip)(x), x.bfloat16().float())


def test_a_compiled_bf16_layer_is_bf16():
    layer, x, d = fp4.FP4Linear(64, 48, False, "bf16"), torch.randn(32, 64), torch.randn(32, 48)
    want = backward(layer, x, d)
    layer.recipe = "fp32"
    fp32 = backward(layer, x, d)
    layer.recipe = "bf16"
    got = backward(torch.compile(layer), x, d)
    for a, b, c in zip(got, want, fp32, strict=True):
        assert relative(a, b) < 1e-6 and relative(a, c) > 1e-3


# ------------------------------------------------------------------------------------------------
# The linear layer: its algebra, and its GEMMs


every_recipe = pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp4", "fp4_mean"])
every_nvfp4 = pytest.mark.parametrize("recipe", ["fp4", "fp4_mean"])
main_recipes = pytest.mark.parametrize("recipe", ["bf16", "fp4", "fp4_mean"])


def linear(recipe, m=32, n=48, bias=False):
    return fp4.FP4Linear(m, n, bias, recipe)


@pytest.fixture
def exact(monkeypatch):
    """Nothing is rounded but to FP32, so that only the algebra is left."""

    def quantize(x, block, seed=None):
        return fp4.NVFP4(x.detach(), x.detach(), torch.ones(()), block)

    monkeypatch.setattr(fp4, "quantize", quantize)
    monkeypatch.setattr(fp4.NVFP4, "values", lambda q: q.codes)
    monkeypatch.setattr(fp4, "to_dtype", lambda x, dtype: x)


@every_recipe
def test_algebra_is_a_linear_layer(exact, recipe):
    """Every product has at most 48 terms, and a mean and the column sums of a residual 34, each
    rounded to FP32. So a result is off by at most 2^-24 (48 + 2 * 34 + 8) times its terms'
    magnitudes, of a matrix |μ| + |R| where it is split."""
    layer = linear(recipe, bias=True)
    x, d = torch.randn(2, 17, 32) + 3, torch.randn(2, 17, 48) - 1
    got = *backward(layer, x, d), layer.bias.grad
    plain = nn.Linear(32, 48, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    want = *backward(plain, x.double(), d.double()), plain.bias.grad
    x, d, w = x.double().flatten(0, 1), d.double().flatten(0, 1), plain.weight.detach().abs()
    x, d = (x.mean(0).abs() + (x - x.mean(0)).abs(), d.mean(0).abs() + (d - d.mean(0)).abs())
    sizes = (x @ w.t() + 1).view(2, 17, 48), (d @ w).view(2, 17, 32), d.t() @ x, d.sum(0)
    for a, b, size in zip(got, want, sizes, strict=True):
        assert ((a - b).abs() <= 124 * 2**-24 * size).all()


def product(*pairs):
    """The sum of products a @ b in FP64, and how far FP32 may be from it: a rounding a term, and a
    few for scales and sums."""
    pairs = [tuple(np.asarray(o, np.float64) for o in pair) for pair in pairs]
    terms = sum(a.shape[1] for a, _ in pairs)
    size = sum(np.abs(a) @ np.abs(b) for a, b in pairs)
    return sum(a @ b for a, b in pairs), (terms + 8) * 2.0**-24 * size


def on_the_grid(rows, cols):
    """E2M1 values, with a 6 in every block."""
    x = E2M1[torch.randint(8, (rows, cols))] * torch.randn(rows, cols).sign()
    x[torch.arange(rows)[:, None] % 16 == torch.arange(cols) % 16] = 6
    return x


@every_nvfp4
def test_gemms_of_reference_operands(recipe):
    """One W for fprop and dgrad; wgrad's X rounded from the original; the means' own path. D and -D
    are on the grid and cancel, so that noise and centering leave them as they are."""
    layer, x, d = linear(recipe), torch.randn(64, 32) + 2, on_the_grid(32, 48)
    d = torch.cat((d, -d))
    got, w, d = backward(layer, x, d), layer.weight.detach().numpy(), d.numpy()
    w_q = reference.quantize(w, (16, 16)).dequantized
    mu = x.mean(0, keepdim=True).numpy() * (recipe == "fp4_mean")
    r, ones = x.numpy() - mu, np.ones((64, 1))
    rows, columns = (reference.quantize(r, block).dequantized for block in ((1, 16), (16, 1)))
    want = (
        product((rows, w_q.T), (ones @ mu, w.T)),
        product((d, w_q)),
        product((d.T, columns), (d.T @ ones, mu)),
    )
    for a, (b, bound) in zip(got, want, strict=True):
        assert (np.abs(a.numpy() - b) <= bound).all()


def test_bf16_rounds_every_operand():
    layer, x, d = linear("bf16", 24, 40), torch.randn(64, 24), torch.randn(64, 40)  # of any width
    got = backward(layer, x, d)
    x, d, w = (t.bfloat16().float() for t in (x, d, layer.weight.detach()))
    want = product((x, w.t())), product((d, w)), product((d.t(), x))
    for a, (b, bound) in zip(got, want, strict=True):
        assert (np.abs(a.numpy() - b) <= bound).all()


@pytest.mark.parametrize("tokens", [1, 64])
def test_what_all_tokens_share_is_exact(tokens):
    """No residual is left, and the means meet the unrounded weight."""
    mu, nu = (torch.randint(-9, 9, (1, n)).float() for n in (32, 48))
    layer = linear("fp4_mean")
    y, dx, dw = backward(layer, mu.expand(tokens, 32), nu.expand(tokens, 48))
    w = layer.weight.detach()
    assert torch.equal(y, (mu @ w.t()).expand(tokens, 48))
    assert torch.equal(dx, (nu @ w).expand(tokens, 32))
    assert torch.equal(dw, tokens * nu.t() @ mu)


@every_recipe
@pytest.mark.parametrize("shape", [(17, 32), (0, 32), (2, 0, 32)])
def test_zeros_give_zeros(recipe, shape):
    """No tokens too: an expert of a mixture may get none."""
    x, d = torch.zeros(shape), torch.zeros(*shape[:-1], 48)
    for got, want in zip(backward(linear(recipe), x, d), (d, x, torch.zeros(48, 32)), strict=True):
        assert torch.equal(got, want)


@every_recipe
def test_nan_stays_visible(recipe):
    layer, x = linear(recipe, bias=True), torch.randn(32, 32)
    x[3, 5] = NAN
    x.requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert y[3].isnan().all() and x.grad[3].isnan().all()
    assert layer.weight.grad.isnan().any(1).all() and layer.bias.grad.isnan().all()


# ------------------------------------------------------------------------------------------------
# What it rounds, multiplies and keeps


@pytest.fixture
def work(monkeypatch):
    """What is rounded, as (values, block, seed), and the shapes of all products."""
    done = {"rounded": [], "products": []}
    plain_quantize, plain_mm = fp4.quantize, fp4.mm

    def quantize(x, block=(1, 16), seed=None):
        done["rounded"].append((x, block, seed))
        return plain_quantize(x, block, seed)

    def mm(a, b):
        done["products"].append((len(a), b.shape[1]))
        return plain_mm(a, b)

    monkeypatch.setattr(fp4, "quantize", quantize)
    monkeypatch.setattr(fp4, "mm", mm)
    return done


@every_nvfp4
def test_what_is_rounded_how(work, recipe):
    layer, x, d = linear(recipe), torch.randn(16, 32) + 1, torch.randn(16, 48) + 1
    backward(layer, x, d)
    if recipe == "fp4_mean":
        x, d = x - x.mean(0), d - d.mean(0)
    due = [(x, (1, 16)), (x, (16, 1)), (layer.weight, (16, 16)), (d, (1, 16)), (d, (16, 1))]
    for (got, block, _), want in zip(work["rounded"], due, strict=True):
        assert torch.equal(got, want[0]) and block == want[1]
    seeds = [seed for *_, seed in work["rounded"]]
    assert seeds[:3] == [None, None, None]  # X and W to nearest
    assert seeds[3] != seeds[4]  # D with noise, another in each direction
    work["rounded"].clear()
    with torch.no_grad():
        layer(x)
    assert [block for _, block, _ in work["rounded"]] == [(1, 16), (16, 16)]


@main_recipes
def test_only_what_a_gradient_needs_is_rounded_multiplied_and_kept(recipe, work):
    """W frozen, as under LoRA; an input that needs no gradient; neither."""
    d, grads, kept, saved = torch.randn(64, 48), {}, {}, []

    def keep(t):
        saved.append(t.nbytes)
        return t

    for dx, dw in ((True, True), (True, False), (False, True), (False, False)):
        torch.manual_seed(0)
        layer, x = linear(recipe), torch.randn(64, 32, requires_grad=dx)
        layer.weight.requires_grad_(dw)
        work |= {"rounded": [], "products": []}
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(x)
        if dx or dw:
            torch.manual_seed(1)
            y.backward(d)
        grads[dx, dw], kept[dx, dw] = (x.grad, layer.weight.grad), sum(saved)
        due = [(64, 48)] + [(64, 32)] * dx + [(48, 32)] * dw
        if recipe == "fp4_mean":
            due += [(1, 48)] + [(1, 32)] * dx  # of the means
        assert sorted(work["products"]) == sorted(due)
        due = [(1, 16)] * (1 + dx) + [(16, 1)] * 2 * dw + [(16, 16)]
        due = [] if recipe == "bf16" else due
        assert sorted(block for _, block, _ in work["rounded"]) == sorted(due)
    for (dx, dw), got in grads.items():
        for wanted, a, b in zip((dx, dw), got, grads[True, True], strict=True):
            assert torch.equal(a, b) if wanted else a is None
    assert kept[True, True] > max(kept[True, False], kept[False, True]) and not kept[False, False]


@every_nvfp4
def test_backward_keeps_4_and_a_half_bits_a_value(recipe):
    """Of X its rounded transpose, and of W: nothing in FP32 but the mean."""
    tokens, m, n, kept = 256, 128, 64, {}
    layer, x = linear(recipe, m, n), torch.randn(tokens, m, requires_grad=True)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    assert x.untyped_storage().data_ptr() not in kept
    del kept[layer.weight.untyped_storage().data_ptr()]  # W itself, for the mean: a reference
    weight = m * n // 2 + m * n // 256
    mean = 4 * m if recipe == "fp4_mean" else 0
    assert sum(kept.values()) == 4.5 / 8 * tokens * m + weight + mean + 2 * 4  # 2 tensor scales


@every_nvfp4
def test_gradients_draw_new_noise(recipe):
    layer, x, d = linear(recipe), torch.randn(32, 32), torch.randn(32, 48)
    torch.manual_seed(3)
    y1, dx1, dw1 = backward(layer, x, d)
    y2, dx2, dw2 = backward(layer, x, d)
    assert torch.equal(y1, y2)
    assert not torch.equal(dx1, dx2) and not torch.equal(dw1, dw2)
    torch.manual_seed(3)
    _, dx3, dw3 = backward(layer, x, d)
    assert torch.equal(dx1, dx3) and torch.equal(dw1, dw3)


# ------------------------------------------------------------------------------------------------
# Any input, under anything


@main_recipes
@pytest.mark.parametrize(
    ("tokens", "layout", "weight", "dtype"),
    [
        (1, "contiguous", torch.float32, torch.float32),
        (17, "strided", torch.float32, torch.bfloat16),
        (32, "transposed", torch.bfloat16, torch.bfloat16),
        (33, "transposed", torch.float32, torch.float32),
        (17, "contiguous", torch.float64, torch.float16),
        (32, "strided", torch.bfloat16, torch.float64),
    ],
)
def test_any_tokens_strides_and_dtypes(recipe, tokens, layout, weight, dtype):
    """What FP32 gives, to the order of its sums and the last cast; to fp32, FP64 adds nothing."""
    layer = linear(recipe, bias=True).to(weight)
    x, d = torch.randn(tokens, 32).to(dtype), torch.randn(tokens, 48).to(dtype)
    torch.manual_seed(1)
    got = backward(layer, lay_out(x, layout), lay_out(d, layout))
    torch.manual_seed(1)
    want = backward(copy.deepcopy(layer).float(), x.float(), d.float())
    for a, b, due in zip(got, want, (dtype, dtype, weight), strict=True):
        assert (a.dtype, a.shape) == (due, b.shape) and b.any()
        assert relative(a, b) <= 2 * max(torch.finfo(due).eps, 2**-20)


@every_recipe
def test_autocast_changes_nothing(recipe):
    """Neither forward nor backward, which runs wherever the user calls it."""
    layer, x, d = linear(recipe), torch.randn(32, 32) + 1, torch.randn(32, 48) + 1
    torch.manual_seed(1)
    want = backward(layer, x, d)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = backward(layer, x, d)
    assert all(map(torch.equal, got, want))
    assert torch.equal(layer(input=x), want[0])  # as nn.Linear names it


# ------------------------------------------------------------------------------------------------
# Centering


def varying(y):
    """What tells the tokens apart."""
    y = y.double()
    return y - y.mean(0)


def test_centering_keeps_what_tells_tokens_apart():
    """X with a mean of 4 standard deviations. Operands in 1 x 16 blocks: .410 plain and .135 =
    (2 * .0953^2)^.5 centered. How far the plain error is from .410 depends on the draw of the 256
    means: .39 to .43. The layer's W, in 16 x 16 blocks, has an error of .11, not .0953."""
    x, w = torch.randn(512, 256) + 4 * torch.randn(256), torch.randn(256, 256) / 16
    want = varying(x.double() @ w.double().t())
    w_q = fp4.quantize(w).dequantize().double()
    plain, centered = (
        relative(varying(fp4.quantize(r).dequantize().double() @ w_q.t()), want)
        for r in (x, x - x.mean(0))
    )
    assert plain == pytest.approx(0.410, abs=0.02)
    assert centered == pytest.approx(0.135, abs=0.002)  # 65536 outputs over 256 terms: 1%
    assert relative(varying(fp4.linear(x, w, "fp4")), want) > 0.38
    assert relative(varying(fp4.linear(x, w, "fp4_mean")), want) < 0.15


def test_residual_does_not_see_an_offset():
    x = torch.randint(-8, 9, (64, 32)).float()  # integers: sums and the mean of 64 are exact
    offset = 2.0 ** torch.randint(0, 9, (32,))
    _, r, r_t = fp4.center_quantize(x, True)
    _, s, s_t = fp4.center_quantize(x + offset, True)
    assert r.codes.any()
    for a, b in zip((*r.tensors(), *r_t.tensors()), (*s.tensors(), *s_t.tensors()), strict=True):
        assert torch.equal(a.float(), b.float())


def test_mean_share():
    """Mean 3/4 of the energy, exactly; and of nothing in common about 1 / T."""
    x = torch.randn(64, 32)
    x = (x - x.mean(0)) / x.std(0, unbiased=False) + 3**0.5
    assert fp4.mean_share(x).item() == pytest.approx(0.75, rel=1e-5)
    assert fp4.mean_share(x.view(4, 16, 32)) == fp4.mean_share(x)  # over all tokens of a batch
    assert fp4.mean_share(torch.randn(1000, 512)).item() == pytest.approx(1e-3, rel=0.1)


# ------------------------------------------------------------------------------------------------
# The ways into a model


def network():
    return nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48)),
            "free": nn.Linear(32, 16, bias=False),
            "lm_head": nn.Linear(32, 17),
        }
    )


def test_convert():
    model, calls = network(), []
    model["twice"] = nn.Sequential(model.free)
    model = nn.ModuleDict({"alias": nn.Sequential(model.lm_head), **model}).eval()
    model.free.register_forward_hook(lambda *_: calls.append("hook"))
    before = dict(model.named_parameters())
    assert fp4.convert(model, "fp4") is model
    assert type(model.body[0]) is type(model.free) is fp4.FP4Linear
    assert model.body[0].recipe == "fp4" and "fp4" in repr(model.body[0])
    assert type(model.alias[0]) is nn.Linear  # what lm_head names, and keeps
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in after)
    assert not any(m.training for m in model.modules())
    assert model.twice(torch.randn(4, 32)).shape == (4, 16) and calls == ["hook"]
    assert fp4.convert(model, "bf16").twice[0].recipe == "bf16"


def test_convert_keeps_modules_by_name_with_all_that_is_in_them():
    model = fp4.convert(network(), "bf16", keep="lm_head")
    assert type(model.free) is fp4.FP4Linear and type(model.lm_head) is nn.Linear
    model = fp4.convert(network(), "bf16", keep=["head", "body"])
    assert type(model.lm_head) is fp4.FP4Linear and type(model.body[0]) is nn.Linear
    assert type(fp4.convert(network(), "bf16", keep=()).lm_head) is fp4.FP4Linear


def test_convert_is_all_or_nothing():
    offloaded = nn.Linear(32, 48)
    offloaded.forward = offloaded.forward  # as accelerate's device_map and offload leave it
    weight_norm = nn.utils.parametrizations.weight_norm
    for free, message in (
        (offloaded, "free: Linear has a forward of its own"),
        (weight_norm(nn.Linear(32, 48)), "free: ParametrizedLinear has a forward of its own"),
        (weight_norm(linear("bf16")), "free: ParametrizedFP4Linear has a forward of its own"),
        (nn.Linear(24, 48), r"free: Linear\(24, 48\).*16"),
    ):
        model = network()
        model.free = free
        with pytest.raises(ValueError, match=message):
            fp4.convert(model, "fp4")
        assert type(model.body[0]) is nn.Linear
        fp4.convert(model, "fp4", keep=("free", "lm_head"))
        assert model.body[0].recipe == "fp4"


def test_convert_refuses_an_encoder_that_goes_past_its_linears():
    """In evaluation, torch's own layer reads the weights of its linears, and never calls them."""
    encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match="goes past its linears in evaluation"):
        fp4.convert(encoder, "fp4", keep="out_proj")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.warns(UserWarning, match="self_attn"):
            fp4.convert(encoder, "fp4", keep="out_proj")
        x = torch.randn(2, 16, 32)
        with torch.no_grad():
            assert torch.equal(encoder.eval()(x), encoder.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_convert_says_what_is_no_linear():
    """GPT-2's Conv1D, the experts of a mixture; here a convolution stands for them."""
    model = nn.ModuleDict({"embedding": nn.Embedding(64, 32), "mlp": nn.Conv1d(32, 48, 1)})
    with pytest.raises(ValueError, match=r"no nn.Linear to convert.*mlp: Conv1d"):
        fp4.convert(model)
    model["attention"] = nn.Linear(32, 16)
    with pytest.warns(UserWarning, match="25% of the matrices are converted, but not mlp"):
        fp4.convert(model)


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_tensors_are_refused_by_name(mesh):
    """Of a tensor of several processes each would see its own mean, and its own amax."""
    layer, x = linear("fp4"), torch.randn(4, 32)
    with torch.no_grad(), pytest.raises(TypeError, match="no DTensor"):
        layer(distribute_tensor(x, mesh))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh))
    with pytest.raises(TypeError, match="no DTensor"):
        layer(x)
    with pytest.raises(ValueError, match=r"FSDPLinear has a forward of its own.*fully_shard"):
        fp4.convert(fully_shard(nn.Linear(32, 48), mesh=mesh))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear("fp5"), "'fp5' is not one of fp32, bf16, fp4, fp4_mean"),
        (lambda: fp4.convert(network(), "fp5"), "'fp5' is not one of fp32, bf16, fp4, fp4_mean"),
        (lambda: linear("fp4", 24, 32), r"FP4Linear\(24, 32\).*16"),
        (lambda: linear("fp4", 32, 40), r"FP4Linear\(32, 40\).*16"),
        (lambda: fp4.linear(torch.ones(4, 32), torch.ones(40, 32), "fp4"), r"\(32, 40\).*16"),
        (lambda: linear("fp4")(torch.ones(2, 4, 16)), r"\(2, 4, 16\).*\(\.\.\., 32\) of floats"),
        (lambda: linear("bf16")(torch.ones(4, 32).long()), r"int64.*\(\.\.\., 32\) of floats"),
        (lambda: fp4.quantize(torch.ones(16, 16), (16, 4)), r"block \(16, 4\)"),
        (lambda: fp4.quantize(torch.ones(16, 8), (16, 16)), r"cannot quantize .*\(16, 8\)"),
        (lambda: fp4.quantize(torch.ones(0, 16)), r"cannot quantize .*\(0, 16\)"),
        (lambda: fp4.quantize(torch.ones(16)), r"cannot quantize .*\(16,\)"),
        (lambda: fp4.quantize(torch.ones(16, 16).long()), "cannot quantize torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
