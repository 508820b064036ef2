"""nvfp4.py against an independent reference, its own definitions, and known statistics."""

import concurrent.futures
import multiprocessing

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from helpers import BLOCKS, E2M1, INF, NAN, codes, lay_out, relative, same
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import nvfp4

E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
fixed = settings(derandomize=True, deadline=None)  # the same examples in every run

every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check(q, want):
    assert same(q.tensor_scale, want.tensor_scale)
    assert same(q.scales.float(), want.scales)
    assert same(q.dequantize(), want.dequantized)
    assert np.array_equal(codes(q).numpy(), want.codes)


def neighbours(x):
    return np.concatenate((x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(INF))))


# ------------------------------------------------------------------------------------------------
# The number format


@every_block
def test_codes_decode(block):
    codes = torch.arange(16, dtype=torch.uint8).expand(16, 16)
    codes = codes.t() if block == (16, 1) else codes
    scales = torch.ones(16 // block[0], 16 // block[1], dtype=torch.float8_e4m3fn)
    packed = nvfp4._pack(codes.contiguous(), block)
    v = nvfp4.NVFP4(packed, scales, torch.tensor(1.0), block, 16).values()
    assert same(v, torch.cat((E2M1, -E2M1))[codes.int()])


def e2m1_edges():
    """(value, code): every value, every midpoint, and the FP32 neighbours of both."""
    grid, nudge = E2M1.numpy(), np.float32(INF)
    for code, v in enumerate(grid):
        yield from ((v, code), (np.nextafter(v, nudge), code), (np.nextafter(v, -nudge), code))
    for code, tie in enumerate((grid[1:] + grid[:-1]) / 2):
        yield from ((np.nextafter(tie, -nudge), code), (np.nextafter(tie, nudge), code + 1))
        yield tie, code + code % 2


@every_block
@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_edges(block, sign):
    values, want = zip(*((v, c) for v, c in e2m1_edges() if v >= 0), strict=True)
    n = len(values)
    tile = torch.zeros(16 * n, 16)
    tile[::16, 0] = 6  # a block amax of 6 and a tensor amax of 2688: every factor is 1
    tile[1::16, 1] = tile[1::16, 0] = tile[::16, 1] = sign * torch.tensor(np.array(values))
    x = torch.cat((torch.full((16, 16), 2688.0), tile))
    x[17::16, 1] = 6  # row 1 holds (value, 6), row 0 (6, value): maxima along both axes
    q = nvfp4.quantize(x, block=block)
    want = torch.tensor(want, dtype=torch.uint8) + (8 if sign < 0 else 0)
    assert torch.equal(codes(q)[16::16, 1], want)
    assert torch.equal(codes(q)[17::16, 0], want)


def test_e4m3_round():
    edges = neighbours(np.concatenate((E4M3, (E4M3[1:] + E4M3[:-1]) / 2)))
    top = int(np.float32(448).view(np.int32))
    bits = np.random.default_rng(0).integers(0, top + 1, 1 << 22, dtype=np.int32)
    x = np.concatenate((edges[(edges >= 0) & (edges <= 448)], bits.view(np.float32)))
    want = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert same(nvfp4.e4m3_round(torch.from_numpy(x)), want)
    assert nvfp4.e4m3_round(torch.tensor(NAN)).isnan()


def test_products_are_exact_in_bf16():
    p = torch.cat((E2M1, -E2M1))[:, None] * torch.from_numpy(E4M3)
    assert torch.equal(p.bfloat16().float(), p)


@every_block
def test_nibble_order(block):
    x = torch.tensor([[0.5, 6.0], [6.0, 1.0]]).repeat(8, 8)  # codes 1 7 and 7 2, along both axes
    packed = nvfp4.quantize(x, block=block).codes
    want = torch.tensor([1 | 7 << 4, 7 | 2 << 4], dtype=torch.uint8).repeat(8)
    assert torch.equal(packed, (want if block[1] == 1 else want[:, None]).expand(packed.shape))


@every_block
def test_packing_round_trip(block):
    c = torch.randint(16, (48, 32), dtype=torch.uint8)
    packed = nvfp4._pack(c, block)
    assert packed.numel() == c.numel() // 2
    assert torch.equal(nvfp4._unpack(packed, block), c)


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


@settings(fixed, max_examples=400)
@given(
    matrices(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["contiguous", "transposed", "strided"]),
    st.booleans(),
)
def test_equals_reference(drawn, dtype, layout, headroom):
    x, block = drawn
    x = torch.from_numpy(x).to(dtype)
    q = nvfp4.quantize(lay_out(x, layout), block=block, headroom=headroom)
    check(q, reference.quantize(x.float().numpy(), block, headroom))


@settings(fixed, max_examples=200)
@given(
    arrays(np.float32, array_shapes(min_dims=1, max_dims=1, max_side=18).map(lambda s: (*s, 16))),
    st.sampled_from(BLOCKS),
)
def test_equals_reference_on_any_floats(x, block):  # infinities and NaN too
    check(nvfp4.quantize(torch.from_numpy(x), block=block), reference.quantize(x, block))


@every_block
@pytest.mark.parametrize("amax", [1e-45, 1e-38, 7.9e-36, 1e-5, 1, 3.4e38, INF])
def test_extreme_amax(block, amax):
    x = (torch.randn(32, 32).clamp(-1, 1).double() * min(amax, 3.4e38)).float()
    x[0, 0] = amax
    q = nvfp4.quantize(x, block=block)
    check(q, reference.quantize(x.numpy(), block))
    assert not q.dequantize().isnan().any()


@every_block
def test_zeros(block):
    q = nvfp4.quantize(torch.zeros(17, 32), block=block)
    assert q.tensor_scale == 0 and not q.scales.float().any() and not q.codes.any()
    assert torch.equal(q.dequantize(), torch.zeros(17, 32))


@every_block
@pytest.mark.parametrize("small", [0.0, 1e-30])  # 1e-30 of the amax: the block's scale underflows
def test_zero_scale(block, small):
    x = torch.randn(48, 48)
    x[16:32, 16:32] *= small
    q = nvfp4.quantize(x, block=block)
    assert not q.dequantize()[16:32, 16:32].any()
    check(q, reference.quantize(x.numpy(), block))


@every_block
def test_nan_marks_its_block_only(block):
    x = torch.randn(48, 48)
    clean = nvfp4.quantize(x, block=block).dequantize()
    x[20, 20] = NAN  # the tensor's amax lies elsewhere
    q = nvfp4.quantize(x, block=block)
    v = q.dequantize()
    inside = torch.zeros(48, 48, dtype=torch.bool)
    inside[20 // block[0] * block[0] :, 20 // block[1] * block[1] :][: block[0], : block[1]] = True
    assert v[inside].isnan().all() and (codes(q)[inside] == 7).all()
    assert torch.equal(v[~inside], clean[~inside])


@every_block
def test_the_amax_is_over_all_that_is_a_number(block):
    x = torch.randn(48, 48)
    x[20, 20], x[21, 21] = 100, NAN  # in one 16 x 16 block
    assert nvfp4.quantize(x, block=block).tensor_scale == torch.tensor(100.0) / torch.tensor(2688.0)


@every_block
def test_infinity(block):
    x = torch.randn(48, 48)
    x[20, 20], x[40, 40], x[0, 0] = INF, -INF, 0
    v = nvfp4.quantize(x, block=block).dequantize()
    assert v[20, 20] == INF and v[40, 40] == -INF and v[0, 0] == 0
    assert not v.isnan().any()


def test_division_is_one_rounding(monkeypatch):
    """2688.0 / tensor, reciprocal times scalar, gives other bits: fp4 must not. In BF16 ties are
    frequent, and every last bit counts."""
    x = [torch.randn(64, 64).bfloat16() for _ in range(128)]
    right = [reference.quantize(a.float().numpy(), (1, 16)) for a in x]
    for a, want in zip(x, right, strict=True):
        check(nvfp4.quantize(a), want)
    monkeypatch.setattr(reference, "encode_scale", lambda a: np.float32(1) / a * np.float32(2688))
    wrong = [reference.quantize(a.float().numpy(), (1, 16)) for a in x]
    assert not all(same(a.dequantized, b.dequantized) for a, b in zip(right, wrong, strict=True))


def test_weight_and_transpose_are_the_same_numbers():
    w = torch.randn(48, 80)
    q, t = nvfp4.quantize(w, block=(16, 16)), nvfp4.quantize(w.t(), block=(16, 16))
    assert torch.equal(codes(q), codes(t).t())
    assert torch.equal(q.scales.float(), t.scales.float().t())
    assert torch.equal(q.dequantize(), t.dequantize().t())


def test_token_blocks_are_row_blocks_of_the_transpose():
    x = torch.randn(48, 33)
    q, t = nvfp4.quantize(x, block=(16, 1)), nvfp4.quantize(x.t(), block=(1, 16))
    assert torch.equal(codes(q), codes(t).t())
    assert torch.equal(q.codes, t.codes.t())  # both packed along tokens
    assert torch.equal(q.scales.float(), t.scales.float().t())
    assert torch.equal(q.dequantize(), t.dequantize().t())


@pytest.mark.parametrize(
    ("shape", "block"),
    [((16, 17), (1, 16)), ((16, 8), (16, 16)), ((0, 16), (1, 16)), ((16,), (1, 16)),
     ((2, 16, 16), (1, 16)), ((16, 16), (16, 4))],
)  # fmt: skip
def test_quantize_names_what_does_not_fit(shape, block):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"block \(16, 4\)|shape \("):
        nvfp4.quantize(x, block=block)


def test_gaussian_error():
    x = torch.randn(1024, 1024)
    # .0953 for Gaussian data; a million elements fix the fourth digit
    assert relative(nvfp4.quantize(x).dequantize(), x) == pytest.approx(0.0953, abs=2e-4)


# ------------------------------------------------------------------------------------------------
# Stochastic rounding


def lowbias32(i):
    i = (i ^ i >> np.uint32(16)) * np.uint32(0x7FEB352D)
    i = (i ^ i >> np.uint32(15)) * np.uint32(0x846CA68B)
    return i ^ i >> np.uint32(16)


def noise(shape, block, seed):
    """16 bits of a hash for each of the two codes in a byte, the even one's the low ones."""
    rows, cols = shape
    key = lowbias32(np.array([seed % 2**32], np.uint32))
    hashes = lowbias32(np.arange(rows * cols // 2, dtype=np.uint32) ^ key)
    halves, axis = (hashes & np.uint32(0xFFFF), hashes >> np.uint32(16)), 2 - (block == (16, 1))
    shape = (rows // 2, cols) if axis == 1 else (rows, cols // 2)
    return np.stack([h.reshape(shape) for h in halves], axis).reshape(rows, cols).astype(np.int32)


def draw(n, seed):
    key = nvfp4._hash(torch.tensor(seed, dtype=torch.int32))
    return (nvfp4._noise((n // 16, 16), (1, 16), key).double().flatten() + 0.5) / 2**16


@every_block
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, -1, -(2**31)])
def test_noise_bits(block, seed):
    shape = 400, 496  # more bytes than 2^16, where the first shift begins to act
    got = nvfp4._noise(shape, block, nvfp4._hash(torch.tensor(seed, dtype=torch.int32)))
    assert torch.equal(got, torch.from_numpy(noise(shape, block, seed)))
    assert got.min() >= 0 and got.max() < 2**16


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_noise_statistics(seed):
    n, sigmas = 1 << 20, 5
    u = draw(n, seed)
    assert abs(u.mean() - 1 / 2) < sigmas * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < sigmas * (1 / 180 / n) ** 0.5  # E(u - 1/2)^4 - 1/12^2 = 1/180
    for half in (u[0::2], u[1::2]):
        for bit in range(16):
            ones = ((half * 2**16).long() >> bit & 1).double().mean()
            assert abs(ones - 1 / 2) < sigmas / 2 / len(half) ** 0.5, bit


@pytest.mark.parametrize("lag", [1, 2, 16, 256, 4096])
def test_noise_of_elements_is_uncorrelated(lag):
    n = 1 << 20
    u = draw(n, 3) - 0.5
    assert abs((u[lag:] * u[:-lag]).mean() * 12) < 5 / (n - lag) ** 0.5


def test_noise_within_a_byte_is_independent():
    """All pairs of the highest four bits of the halves are as frequent."""
    low, high = ((u * 16).long() for u in draw(1 << 20, 3).view(-1, 2).t())
    pairs, mean = torch.bincount(low * 16 + high, minlength=256), (1 << 19) / 256
    chi2 = ((pairs - mean) ** 2 / mean).sum()  # 255 degrees of freedom: 255 on average
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


def test_noise_of_seeds_is_uncorrelated():
    n = 1 << 20
    u, v = draw(n, 3) - 0.5, draw(n, 4) - 0.5
    assert abs((u * v).mean() * 12) < 5 / n**0.5


def test_sr_probability_is_that_of_the_distance():
    """Of every fraction of 16 bits as many of the 2^16 draws go up: all of the noise is used, and
    the bias of a value in between is that of rounding it to them, below 2^-17."""
    draws = torch.arange(2**16, dtype=torch.int32)
    for fraction in (0, 1, 2, 77, 2**15, 2**16 - 2, 2**16 - 1):
        x = torch.full((2**16 + 16, 16), 2.0 + fraction / 2**16)  # codes 4 and 5, at 2 and 3
        x[:, 0], x[-16:] = 6, 2688  # S_enc = 1, and so are the factors
        with pytest.MonkeyPatch.context() as patch:
            each = torch.cat((draws, draws[:16]))[:, None].expand(x.shape)
            patch.setattr(nvfp4, "_noise", lambda *_, each=each: each)
            q = nvfp4.quantize(x, stochastic=True, seed=0)
        up = codes(q)[: 2**16, 1:]
        assert ((up == 4) | (up == 5)).all() and ((up == 5).sum(0) == fraction).all()


@every_block
@pytest.mark.parametrize("headroom", [False, True])
def test_sr_moves_to_a_neighbour(block, headroom):
    x = torch.randn(70, 64)
    want = reference.quantize(x.numpy(), block, headroom)
    q = nvfp4.quantize(x, block=block, stochastic=True, seed=1, headroom=headroom)
    assert same(q.scales.float(), want.scales) and same(q.tensor_scale, want.tensor_scale)
    grid, y = E2M1.numpy(), np.abs(want.scaled.clip(-6, 6))
    low = (np.searchsorted(grid, y, side="right") - 1).clip(max=6)
    way = (y - grid[low]) / (grid[low + 1] - grid[low])  # 1 at 6
    up = noise(x.shape, block, 1) + np.rint(way * 2**16) >= 2**16
    assert np.array_equal(codes(q).numpy(), low + up + 8 * np.signbit(want.scaled))


@every_block
def test_sr_keeps_the_grid(block):
    x = E2M1[torch.randint(8, (64, 64))] * torch.randn(64, 64).sign()
    x[torch.arange(64)[:, None] % 16 == torch.arange(64) % 16] = -6  # in every block
    x[:16, :16] = 2688  # S_enc = 1 and, where the amax is 6, inverse = 1
    for seed in range(8):
        q = nvfp4.quantize(x, block=block, stochastic=True, seed=seed)
        assert torch.equal(q.dequantize(), x)


def test_sr_clamps_at_6():
    x = torch.zeros(2, 4096)
    x[0, 0] = 2688
    x[1] = 6.2  # 6.2 / 6 rounds to a scale of 1
    x[1, ::2] *= -1
    v = nvfp4.quantize(x, stochastic=True, seed=0).dequantize()
    assert torch.equal(v[1], 6 * x[1].sign())


def test_sr_is_unbiased_with_headroom():
    draws, x = 2048, torch.randn(32, 32)
    q = nvfp4.quantize(x.repeat(draws, 1), stochastic=True, seed=0, headroom=True)
    mean = q.dequantize().view(draws, *x.shape).double().mean(0)
    y = reference.quantize(x.numpy(), (1, 16), headroom=True).scaled
    assert np.abs(y).max() <= 6  # so that maxima are unbiased too
    unit = x.double() / torch.from_numpy(y)
    low = (torch.searchsorted(E2M1, torch.from_numpy(np.abs(y)), right=True) - 1).clamp(max=6)
    sigma = (E2M1[low + 1] - E2M1[low]) / 2 * unit / draws**0.5  # a draw is off by gap/2 at most
    assert ((mean - x).abs() <= 5 * sigma.abs()).all()


def slopes(headroom):
    """Of the rounded on the exact Gaussian values: of all, and of the block maxima."""
    x = torch.randn(4096, 512)
    q = nvfp4.quantize(x, stochastic=True, seed=0, headroom=headroom).dequantize().double()
    top = x.view(4096, -1, 16).abs().argmax(2, keepdim=True)
    x = x.double()
    xt, qt = (a.view(4096, -1, 16).gather(2, top) for a in (x, q))
    return (x * q).sum() / x.square().sum(), (xt * qt).sum() / xt.square().sum()


# A draw's error is about .16 of the RMS, so over 2 M values the slope's sigma is 1.1e-4; the maxima
# lie between 4 and 6, where sigma is at most half the gap, 1/4 of them: over 131072, 6.9e-4.
def test_sr_slope_with_headroom():
    all_, top = slopes(True)
    assert all_ == pytest.approx(1, abs=5 * 1.1e-4)
    assert top == pytest.approx(1, abs=5 * 6.9e-4)


def test_sr_slope_without_headroom():
    all_, top = slopes(False)
    assert all_ == pytest.approx(0.9965, abs=5 * 1.1e-4)
    assert top == pytest.approx(1 - 0.0116, abs=5 * 6.9e-4)


def test_sr_seeds():
    x = torch.randn(64, 64)

    def rounded(seed=None):
        return nvfp4.quantize(x, stochastic=True, seed=seed).codes

    assert torch.equal(rounded(1), rounded(torch.tensor(1, dtype=torch.int32)))
    assert not torch.equal(rounded(1), rounded(2))
    torch.manual_seed(5)
    first, second = rounded(), rounded()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(rounded(), first)


# ------------------------------------------------------------------------------------------------
# Fused passes, in processes of their own: `fuse` rebinds the passes of its process.


def bits(x, **kwargs):
    q = nvfp4.quantize(x, **kwargs)
    return [t.float() for t in (*q.tensors(), q.dequantize())]


@torch.no_grad()
def fused_and_plain():
    """What `fuse` says; whether each case has the same bits, on two threads and every time; the
    graphs a second shape adds."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    cases = []
    for shape in ((33, 80), (50, 48)):
        for block, dtype, seed in (
            ((1, 16), torch.bfloat16, 5),
            ((16, 1), torch.float32, None),
            ((16, 16), torch.float32, None),
        ):
            x = (torch.randn(shape) * 10 ** torch.randn(shape[0], 1)).to(dtype)
            x[:17, :16] = 0
            if block == (16, 16):
                x = torch.nn.Parameter(x[: shape[0] // 16 * 16])
            kwargs = {"stochastic": seed is not None, "seed": seed}
            cases.append((x, {"block": block, **kwargs}))
    plain = [bits(x, **kwargs) for x, kwargs in cases]
    line, equal, graphs = nvfp4.fuse(), [], []
    for (x, kwargs), want in zip(cases, plain, strict=True):
        again = [bits(x, **kwargs) for _ in range(30)]
        equal.append(all(torch.equal(a, b) for f in again for a, b in zip(f, want, strict=True)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return line, equal, graphs[5] - graphs[2]


def in_a_new_process(f):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(f).result(timeout=300)


def test_fused_passes_give_the_same_bits():
    line, equal, added = in_a_new_process(fused_and_plain)
    assert line == "FP4: passes fused by torch.compile"
    assert all(equal), equal
    assert added == 0  # or every weight shape costs seconds, until torch.compile gives up


def test_all_that_passes_over_a_tensor_is_fused():
    names = {name for name in vars(nvfp4) if not name.startswith("__")}  # nor torch.compile's own
    fusible = {name for name in names if hasattr(vars(nvfp4)[name], "__wrapped__")}
    assert fusible - {"quantize"} == {"_block_amax", "_block_scales", "_encode", "_decode"}


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before helps
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of which the line must not depend
    line, equal, _ = in_a_new_process(fused_and_plain)
    assert line.startswith("FP4: plain PyTorch") and "\n" not in line
    assert all(equal), equal


def test_a_compiler_that_fails_later(monkeypatch):
    """A full disk, say: one shape that compiled is no promise. Said once; the bits stay right."""
    x = torch.randn(32, 32)
    want = bits(x, block=(16, 1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvfp4, "_fused", True)
    monkeypatch.setattr(torch, "compile", lambda f, **_: full)
    fresh = nvfp4._fusible(nvfp4._encode.__wrapped__)  # compiles anew
    monkeypatch.setattr(nvfp4, "_encode", fresh)
    monkeypatch.setattr(nvfp4, "_block_amax", nvfp4._block_amax.__wrapped__)
    monkeypatch.setattr(nvfp4, "_block_scales", nvfp4._block_scales.__wrapped__)
    with pytest.warns(
        UserWarning, match="goes on in plain PyTorch, slowly: .*No space left"
    ) as said:
        got = [bits(x, block=(16, 1)) for _ in range(2)]
    assert len(said) == 1 and not nvfp4._fused
    for g in got:
        assert all(map(torch.equal, g, want))
