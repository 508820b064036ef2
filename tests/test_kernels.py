"""Every kernel against its plain twin in fp4.py, bit for bit: on a GPU if there is one, else in
Triton's interpreter. And what the compiler makes of them for GPUs that are not there."""

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from reference import INF, NAN, backward, in_a_new_process, relative

import fp4
from data.shards import write_dataset
from data.tokenizer import encode, get_encoding
from experiments import project
from model import GPT, ModelConfig
from tools import bench

kernels = pytest.importorskip("kernels", reason="kernels.py needs Triton")

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_kernels(monkeypatch):
    """FP4Linear takes the kernels on this machine's device."""
    monkeypatch.setattr(fp4, "KERNELS", DEVICE.type)


def matrix(rows, cols, dtype=torch.float32, seed=0):
    """Tokens with a mean, features of very different size."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-8, 8, (cols,), generator=g))
    mean = 3 * torch.randn(cols, generator=g)
    return ((torch.randn(rows, cols, generator=g) + mean) * size).to(dtype)


def same(got, want):
    """The same bits, any NaN equal to any NaN; of one tensor, or of several."""
    if isinstance(want, torch.Tensor):
        assert reference.same(got.cpu().float(), want.cpu().float())
        return
    for a, b in zip(got, want, strict=True):
        same(a, b)


def round_both(x, center=False, seeds=None):
    """x by the kernels: mean, and codes, scales and tensor scale in either direction; and by the
    twin, given the kernels' mean."""
    seeds = None if seeds is None else torch.tensor(seeds, dtype=torch.int32)
    there = None if seeds is None else seeds.to(DEVICE)
    mean, *got = kernels.center_quantize(x.to(DEVICE), center, True, True, there)
    r = x.float() - mean.cpu() if center else x.float()
    _, *wanted = fp4.center_quantize(r, False, seeds=seeds)
    return mean, got, [q.tensors() for q in wanted]


# ------------------------------------------------------------------------------------------------
# Statistics


def in_order(x, parts, rows):
    """Column means in the kernel's order, FP32: a part row after row, then the parts in halves."""
    total = np.zeros((parts, x.shape[1]), np.float32)
    for i, row in enumerate(x.float().numpy()):
        total[i // rows] += row
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return torch.from_numpy(total[0] / np.float32(len(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (15, 48), (32, 32), (100, 1040), (1100, 16)])
def test_mean_and_amax(rows, cols, dtype):
    x = matrix(rows, cols, dtype)
    mean, table = (t.cpu() for t in kernels.statistics(x.to(DEVICE), True))
    chunks = math.ceil(rows / 32)
    parts = 2 ** math.ceil(math.log2(min(math.ceil(512 / math.ceil(cols / 256)), chunks)))
    part_rows = 32 * math.ceil(chunks / parts)
    same(mean, in_order(x, parts, part_rows))
    # sums of a part's rows, of log2(parts) halves, and one division, each within 2^-24
    roundings = part_rows + math.log2(parts) + 1
    error = (mean.double() - x.double().mean(0)).abs()
    assert (error <= roundings * 2.0**-24 * x.double().abs().mean(0)).all()
    amax = (x.float() - mean).abs().max()
    same(table[0], amax / torch.tensor(2688.0))
    nothing, table = kernels.statistics(x.to(DEVICE), False)
    assert len(nothing) == 0
    same(table[0], x.float().abs().max() / torch.tensor(2688.0))


# ------------------------------------------------------------------------------------------------
# Center and quantize, weights


@pytest.mark.parametrize("seeds", [None, (2**31 - 1, -8)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("center", [False, True], ids=["", "center"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (16, 16), (17, 48), (33, 528), (32, 1024)])
def test_center_quantize(rows, cols, center, seeds):
    """The last shape in whole tiles, two across: without masks."""
    others = [torch.float16, torch.float64] if rows == 17 else []
    for dtype in (torch.float32, torch.bfloat16, *others):
        _, got, want = round_both(matrix(rows, cols, dtype), center, seeds)
        same(got, want)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (48, 80), (32, 1040), (144, 16), (16, 512)])
def test_quantize_weight(n, m):
    for dtype in (torch.float32, torch.float16):
        w = matrix(n, m, dtype)
        w_q, w_t = kernels.quantize_weight(w.to(DEVICE))
        same(w_q, fp4.quantize(w, (16, 16)).tensors())
        same(w_t, fp4.quantize(w.t(), (16, 16)).tensors())


def test_only_what_is_wanted_is_rounded():
    x, seeds = matrix(33, 48).to(DEVICE), torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    _, *both = kernels.center_quantize(x, True, True, True, seeds)
    _, r, nothing = kernels.center_quantize(x, True, True, False, seeds)
    assert nothing[0].numel() == nothing[1].numel() == 0
    _, nothing, r_t = kernels.center_quantize(x, True, False, True, seeds)
    assert nothing[0].numel() == nothing[1].numel() == 0
    same([r, r_t], both)


def test_the_largest_noise_leaves_a_code_alone():
    """What is exactly a code stays it, also where all 16 bits of the noise are ones."""
    seed = 409  # the first that has such noise in both halves of a byte
    key = fp4.hash32(torch.tensor(seed, dtype=torch.int32))
    ones = fp4.noise((64, 64), (1, 16), key) == 0xFFFF
    assert ones[:, ::2].any() and ones[:, 1::2].any()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = magnitudes[(torch.arange(64)[:, None] + torch.arange(64)) % 8]
    _, got, _ = round_both(x, seeds=(seed, seed))
    _, nearest, _ = round_both(x)
    same(got, nearest)


def test_any_place_in_memory():
    """BF16 is read in pairs, which an odd address splits."""
    x = matrix(17, 48, torch.bfloat16).to(DEVICE)
    odd = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    row = torch.cat((x[:1], x[:1, :1]), 1)[:, :48]  # contiguous to PyTorch, with a stride of 49
    for other, same_values in ((odd, x), (row, x[:1]), (x.t().contiguous().t(), x)):
        _, *got = kernels.center_quantize(other, False, True, True, None)
        _, *want = kernels.center_quantize(same_values, False, True, True, None)
        same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
def test_magnitudes(scale, dtype):
    """Subnormals too, which a cast from BF16 would make 0 in the interpreter."""
    x = (matrix(32, 64) / matrix(32, 64).abs().max() * scale).to(dtype)
    x[:16, :16] = 0
    x[20, 3] = -0.0
    for center, seeds in ((False, None), (False, (3, 4)), (True, None)):
        mean, got, want = round_both(x, center, seeds)
        same(got, want)
    same(mean[0], in_order(x, 1, 32))


def test_every_e4m3_scale_and_tie():
    """Blocks whose amaxes run through E4M3 and its midpoints, values through E2M1's."""
    grid = torch.arange(126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = torch.cat((grid, (grid[1:] + grid[:-1]) / 2)).sort().values  # 251
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 5.5, -0.25, -1.25, -5, 1, 2, 3, 4])
    x = torch.cat((grid[:, None] * ties, torch.full((1, 16), 2688.0)))  # S_enc = 1
    _, got, want = round_both(x)
    same(got, want)


@pytest.mark.parametrize("seeds", [None, (7, -8)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("center", [False, True], ids=["", "center"])
def test_nan_and_inf(bad, center, seeds):
    """What is not a number marks its block and nothing else: scale NaN, codes 7. The tensor's amax
    is taken over all that is a number, in a NaN's block too."""
    for largest in (1e6, -1e6):
        x = matrix(48, 64)
        x[14, 20], x[17, 20], x[40:, 5] = largest, bad, -bad
        mean, got, want = round_both(x, center, seeds)
        same(got, want)
        r = x - mean.cpu() if center else x
        assert not center or not mean[0, 20].isfinite()
        for blocks, (codes, scales, scale) in zip((r, r.t()), got, strict=True):
            hit = blocks.isnan().unflatten(1, (-1, 16)).any(2)
            assert torch.equal(scales.float().cpu().isnan(), hit)
            same(scale, r.nan_to_num(0, INF, -INF).abs().max() / torch.tensor(2688.0))
            codes = fp4.unpack(codes.cpu(), axis=1)
            assert (codes[hit.repeat_interleave(16, 1)] == 7).all()


@pytest.mark.parametrize("seeds", [None, (7, -8)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (17, 48), (33, 528), (32, 1024)])
def test_project_quantize(rows, cols, seeds, on_kernels):
    """Given the statistics and left, all bits are the twin's; left is X uᵀ in BF16."""
    seeds = None if seeds is None else torch.tensor(seeds, dtype=torch.int32, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        x = matrix(rows, cols, dtype).to(DEVICE)
        left, u, *got = project.project_quantize(x, seeds=seeds)
        mean = kernels.column_parts(x)[0][:, 0].sum(0) / rows
        want_u, bound = project.direction(mean, x.float().abs().amax(0))
        same(u[0], want_u)
        exact = x.double() @ want_u.double()
        assert ((left[:, 0] - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * exact.abs().max()).all()
        assert torch.equal(left, left.bfloat16().float())
        want = project.round_rest(x, left, u, bound, True, True, seeds)
        same([t for q in got for t in q.tensors()], [t for q in want for t in q.tensors()])
        _, _, r, nothing = project.project_quantize(x, columnwise=False, seeds=seeds)
        assert nothing is None
        same(r.tensors(), got[0].tensors())


# ------------------------------------------------------------------------------------------------
# GEMM


@functools.cache
def operands(tokens, m, n):
    """Those of fprop, dgrad and wgrad, by the kernels: (codes, scales, tensor scale) twice."""
    x, d, w = matrix(tokens, m, seed=1), matrix(tokens, n, seed=3), matrix(n, m, seed=2)
    _, r, r_t = kernels.center_quantize(x.to(DEVICE), False, True, True, None)
    _, s, s_t = kernels.center_quantize(d.to(DEVICE), False, True, True, None)
    w_q, w_t = kernels.quantize_weight(w.to(DEVICE))
    return (r, w_q), (s, w_t), (s_t, r_t)


def values(codes, scales, tensor_scale):
    """FP64, on the CPU."""
    block = (16, 16) if 16 * len(scales) == len(codes) else (1, 16)
    return fp4.NVFP4(codes, scales, tensor_scale, block).dequantize().double().cpu()


def raw(a, b):
    """The arguments of `gemm_op`."""
    return a[0], a[1].view(torch.uint8), b[0], b[1].view(torch.uint8), a[2], b[2]


@pytest.mark.parametrize("variant", ["gemm_fused", "gemm_cublas"])
@pytest.mark.parametrize("part", ["", "row", "outer product"])
@pytest.mark.parametrize(
    ("tokens", "m", "n"), [(1, 16, 16), (33, 80, 48), (130, 144, 272), (150, 16, 48)]
)
def test_gemm(tokens, m, n, part, variant, monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.float() @ b.float())  # no cuBLAS
    if tokens == 150:  # with tiles of 16 x 16 more than a group has
        for version, (*_, K, warps, stages) in kernels.GEMM_TILES.items():
            monkeypatch.setitem(kernels.GEMM_TILES, version, (16, 16, K, warps, stages))
    gemm = getattr(kernels, variant)
    for a, b in operands(tokens, m, n):
        p, q = values(*a), values(*b).t()
        left = torch.randn(len(p)) if part == "outer product" else torch.ones(len(p))
        right = torch.randn(q.shape[1]) if part else torch.zeros(q.shape[1])
        outer = left[:, None].double() * right
        want, size = p @ q + outer, p.abs() @ q.abs() + outer.abs()
        left = left.to(DEVICE) if part == "outer product" else None
        right = right.to(DEVICE) if part else None
        got = gemm(*raw(a, b), left, right, torch.float32)
        # K products and sums, each within 2^-24, in any order, and the epilogue; tensor cores
        # truncate sums where FP32 units round
        bound = (p.shape[1] + 4) * 2.0 ** (-24 if DEVICE.type == "cpu" else -22)
        assert ((got.double().cpu() - want).abs() <= bound * size).all()
        if variant == "gemm_fused":
            same(gemm(*raw(a, b), left, right, torch.bfloat16), got.bfloat16())


def test_left_may_be_expanded_and_dtypes():
    (a, b), *_ = operands(20, 32, 48)
    right = torch.randn(48, 2, device=DEVICE).t()[1:]
    plain = kernels.gemm(*a, *b, None, None, torch.float32)
    ones = torch.ones(1, 1, device=DEVICE).expand(20, 1), torch.ones(20, 2, device=DEVICE)[:, 1:]
    for left in (None, *ones):
        got = kernels.gemm(*a, *b, left, right, torch.float32)
        assert torch.allclose(got, plain + right, rtol=1e-6, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        same(kernels.gemm(*a, *b, None, None, dtype), plain.to(dtype))


def test_what_does_not_fit_is_refused():
    for shape in ((0, 16), (16, 24), (16,)):
        with pytest.raises(ValueError, match="cannot quantize shape"):
            kernels.center_quantize(torch.ones(shape), False, True, True, None)
        with pytest.raises(ValueError, match="cannot quantize shape"):
            kernels.quantize_weight(torch.ones(shape).t())
    _, (s, w_t), (s_t, r_t) = operands(64, 32, 48)
    turned = r_t[0].t(), r_t[1].t(), r_t[2]
    for a, b in ((s, turned), (turned, w_t), (turned, turned), (s_t, turned)):
        with pytest.raises(ValueError, match="not packed along the last axis"):
            kernels.gemm(*a, *b, None, None, torch.float32)


def test_decode_every_code_and_scale():
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1)
    scales = torch.arange(128, dtype=torch.uint8)[:, None].expand(128, 32)
    want = fp4.NVFP4(codes, scales.view(torch.float8_e4m3fn), torch.ones(()), (1, 16)).values()
    same(kernels.decode(codes.to(DEVICE), scales.contiguous().to(DEVICE)), want)
    turned = kernels.decode(codes.t().contiguous().t().to(DEVICE), scales.to(DEVICE))
    same(turned, want)
    assert turned.stride() == (1, 128)  # the order of its codes


def test_bf16_rounding():
    """The last step of a GEMM, on ties, both neighbours, infinities and NaN."""
    one = torch.tensor([1.0, 2**-8, -(2**-8), 2**-7, 3 * 2**-8, INF, NAN, 3.4e38, 1e-40])
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # as GPUs make it
    right = torch.cat((one, 1 + one, (1 + one).nextafter(torch.tensor(INF)), -one, nan))
    right = torch.nn.functional.pad(right, (0, -len(right) % 16)).to(DEVICE)
    zero = torch.zeros(len(right), 8, dtype=torch.uint8, device=DEVICE)
    unit = torch.ones((), device=DEVICE)
    args = zero[:1], zero[:1, :1], zero, zero[:, :1].contiguous(), unit, unit, unit[None], right
    same(kernels.gemm_fused(*args, torch.bfloat16)[0], right.bfloat16())


# ------------------------------------------------------------------------------------------------
# The layer and the model


def test_layer(monkeypatch):
    """A step by the kernels and by the twin, with noise of the same seeds; every recipe."""
    fp4.recipe_named("fp4_project_1d")  # imports those of experiments
    recipes = [name for name in fp4.RECIPES if re.fullmatch(r"fp4(?!.*(plus|project\d)).*", name)]
    assert len(recipes) > 12
    cases = [(recipe, torch.bfloat16) for recipe in recipes]
    for recipe, dtype in (*cases, ("fp4", torch.float32), ("fp4_mean", torch.float32)):
        layer = fp4.FP4Linear(48, 16, False, recipe, device=DEVICE)
        x = matrix(22, 48, dtype, 1).view(2, 11, 48).to(DEVICE)
        d = matrix(22, 16, dtype, 2).view(2, 11, 16).to(DEVICE)
        steps = []
        for device in (DEVICE.type, None):
            monkeypatch.setattr(fp4, "KERNELS", device)
            torch.manual_seed(5)
            steps.append(backward(layer, x, d))
        # FP32 sums in another order, and a mean that so may round a code elsewhere
        exact = dtype is torch.float32 and DEVICE.type == "cpu"
        for got, want in zip(*steps, strict=True):
            assert relative(got, want) <= (1e-5 if exact else 4e-3), recipe


def test_compiles_once_for_any_number_of_tokens(on_kernels):
    layers = fp4.FP4Linear(48, 32), torch.nn.GELU(), fp4.FP4Linear(32, 16)
    model = torch.nn.Sequential(*layers).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (20, 48, 33):
        x = matrix(tokens, 48).to(DEVICE).requires_grad_()
        got, want = compiled(x), model(x)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-4 * want.abs().max().item())
        torch.autograd.grad(got.sum(), (x, *model.parameters()))  # with other noise
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_operators_are_registered_right():
    checks = "test_schema", "test_faketensor"
    x, seeds = matrix(33, 48).to(DEVICE), torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    for args in ((x, True, True, True, seeds), (x.bfloat16(), False, False, True, None)):
        torch.library.opcheck(kernels.center_quantize_op, args, test_utils=checks)
        torch.library.opcheck(project.project_quantize_op, (x, *args[2:]), test_utils=checks)
    w = matrix(32, 48).to(DEVICE)
    torch.library.opcheck(kernels.quantize_weight_op, (w,), test_utils=checks)
    args = *raw(*operands(20, 32, 48)[2]), None, None, torch.bfloat16
    torch.library.opcheck(kernels.gemm_op, args, test_utils=checks)


def test_model_step(on_kernels, monkeypatch):
    """A GPT through the kernels, also compiled whole without graph breaks, and without them."""
    heads = {"n_head": 2, "n_kv_head": 1, "head_dim": 16}
    config = ModelConfig(vocab_size=64, block_size=12, n_layer=1, dim=32, ffn_dim=48, **heads)
    model = GPT(config, torch.Generator().manual_seed(0)).to(DEVICE)
    tokens = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(forward):
        torch.manual_seed(2)
        loss = forward(tokens[:, :-1], tokens[:, 1:])
        return loss.item(), torch.autograd.grad(loss, list(model.parameters()))

    loss, grads = run(model)
    again, compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert loss == again and all(map(torch.equal, grads, compiled))
    monkeypatch.setattr(fp4, "KERNELS", None)
    want, wanted = run(model)
    assert abs(loss - want) < (1e-5 if DEVICE.type == "cpu" else 1e-3)  # a GPU's are BF16
    for a, b in zip(grads, wanted, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()  # sums' order may move a value to the next code


UNSAMPLED = "import train; train.GPT.generate = lambda self, tokens, *_: tokens; train.main()"


def train(out, **flags):
    """The losses of a run of train.py, and what it printed."""
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 3000)
    tokens = encode(get_encoding("bytes"), [" ".join(words)])
    parts = {"train": tokens[:8000], "val": tokens[8000:]}
    write_dataset(out / "data", get_encoding("bytes"), parts)
    flags |= {
        "n_layer": 1, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "dim": 32, "ffn_dim": 48,
        "warmup_steps": 1, "eval_windows": 1, "eval_interval": flags["max_steps"],
        "dataset": out / "data", "out_dir": out / "run",
    }  # fmt: skip
    line = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [sys.executable, "-c", UNSAMPLED, *line]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [r.get("loss", r.get("val_loss")) for r in map(json.loads, records)], result.stdout


def test_training_in_the_interpreter(tmp_path, monkeypatch):
    """A real step of train.py through the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    losses, said = train(tmp_path, device="cpu", max_steps=1, batch_size=1, block_size=16)
    assert "FP4: Triton's interpreter" in said
    assert losses == pytest.approx([math.log(320)] * 3, rel=0.05)  # of a vocabulary of 257, padded


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA GPU")
def test_training_on_the_gpu(tmp_path):
    """200 steps on the GPU follow the CPU's. On a CPU two seeds of the noise differ by up to 6% in
    the steep part and by .0006 at the end; bf16 differs by 14% in the steep part."""
    flags = {"max_steps": 200, "learning_rate": 1e-2, "batch_size": 16, "block_size": 32}
    (want, _), (got, _) = (train(tmp_path / d, device=d, **flags) for d in ("cpu", "cuda"))
    smooth = (np.convolve(losses, np.ones(20) / 20, "valid") for losses in (got, want))
    np.testing.assert_allclose(*smooth, rtol=0.1)
    assert abs(got[-1] - want[-1]) < 0.01


# ------------------------------------------------------------------------------------------------
# What the compiler makes of them. Triton compiles for a GPU that need not be there, if its driver
# is replaced; that is done in a process of its own, where kernels.py is not interpreted.


def launches(arch):
    """(case, launcher, arguments): all launchers, on inputs as in training."""

    def byte(*shape):
        return torch.zeros(shape, dtype=torch.uint8)

    x, w = torch.zeros(4096, 1024, dtype=torch.bfloat16), torch.zeros(1024, 1024)
    seeds, one, row = torch.zeros(2, dtype=torch.int32), torch.ones(()), torch.zeros(1024)
    r, r_t = (byte(4096, 512), byte(4096, 64)), (byte(2048, 1024).t(), byte(256, 1024).t())
    w_q, w_t = (byte(1024, 512), byte(64, 64)), (byte(512, 1024).t(), byte(64, 64).t())
    odd = byte(33, 40), byte(33, 5), byte(48, 40), byte(3, 5)
    mean = one, one, one.expand(4096), row
    if arch in (90, 100):
        yield "nearest", kernels.center_quantize, (x, True, True, True, None)
    yield "stochastic", kernels.center_quantize, (x, True, True, True, seeds)
    if arch == 90:  # it takes the compiler long
        yield "project", project.project_quantize, (x[:33, :80], True, True, seeds)  # with masks
    yield "weight", kernels.quantize_weight, (w,)
    yield "fprop", kernels.gemm_fused, (*r, *w_q, *mean, torch.bfloat16)
    yield "dgrad", kernels.gemm_fused, (*r, *w_t, *mean, torch.bfloat16)
    yield "wgrad", kernels.gemm_fused, (*r_t, *r_t, one, one, row, row, torch.float32)
    yield "odd", kernels.gemm_fused, (*odd, one, one, None, None, torch.bfloat16)
    yield "rows", kernels.decode, r
    yield "columns", kernels.decode, r_t


LOADS = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "v2.b32": 8, "v2.b64": 16, "v4.b32": 16}  # bytes
NOT_ALU = r"FADD|FMUL|FFMA|HFMA2|HADD2|HMUL2|IMAD|I2F|F2I|F2F|MUFU|LD|ST|SHFL|BAR|MEMBAR|FENCE|"
NOT_ALU += r"U[A-Z]|R2UR|CS2R|S2|BRA|EXIT|NOP|WARPSYNC|BSSY|BSYNC|DEPBAR|CALL|RET"


def describe(kernel):
    """What a kernel needs and does, from its PTX and its machine code. Instructions: those of a
    lane for an element, where there is no loop and a program rounds 16 x ROUND_COLUMNS."""
    ptx, code = kernel.asm["ptx"], kernel.asm["sass"]
    verbs = re.findall(r"\t(?:@!?U?P\w+ )?([A-Z]\w+)", code)
    widths = [LOADS[w] for w in re.findall(r"ld\.global\.(?:\w+::\w+\.)*([\w.]+)", ptx)]
    widths += [int(n, 16) for n in re.findall(r"cp\.async\.c.*?, (0x\w+),", ptx)]
    lanes = 32 * kernel.metadata.num_warps / (16 * kernels.ROUND_COLUMNS)
    return {
        "registers": max(map(int, re.findall(r"\bR(\d+)\b", code))) + 3,  # two are ptxas's own
        "shared": kernel.metadata.shared,
        "spills": sum(verb.startswith(("LDL", "STL")) for verb in verbs),
        "load": max(widths),
        "tensor cores": re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S+", ptx),
        "loops": verbs.count("BRA") - 1,  # one is the jump to itself that follows the code
        "instructions": lanes * len(verbs),
        "ALU": lanes * sum(not re.match(NOT_ALU, verb) for verb in verbs),
    }


def compile_all(arch):
    """{(kernel, case): what `describe` says}."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched, launch = [], JITFunction.run

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    def compile_only(self, *args, **kwargs):
        launched.append((self.fn.__name__, launch(self, *args, **{**kwargs, "warmup": True})))

    driver.set_active(Driver())
    JITFunction.run = compile_only
    fp4.KERNELS = "cpu"
    table = {}
    for case, launcher, args in launches(arch):
        launched.clear()
        launcher(*args)
        table |= {(name, case): describe(kernel) for name, kernel in launched}
    return table


@pytest.mark.parametrize(
    ("arch", "verbs", "instructions"),  # of rounding an element, and those of the ALU
    [
        (80, ["mma.sync", "bf16.bf16"], {}),
        (90, ["wgmma", "bf16.bf16"], {"nearest": (29, 14), "stochastic": (36, 18)}),
        (100, ["tcgen05.mma", "kind::mxf4nvf4.block_scale", "scale_vec::4X"],
         {"nearest": (16, 16), "stochastic": (42, 42)}),
        (120, ["mma.sync", "kind::mxf4nvf4.block_scale", "e2m1.e2m1.f32.ue4m3"],
         {"stochastic": (42, 42)}),
    ],
)  # fmt: skip
def test_compiles(arch, verbs, instructions):
    """To tensor cores, wide loads and no spills; and so few instructions that memory bounds the
    rounding, or nearly."""
    table = in_a_new_process(functools.partial(compile_all, arch))
    assert {name for name, _ in table} - {"_make_table", "_project_quantize"} == {
        "_column_parts", "_column_stats", "_center_quantize", "_quantize_weight", "_gemm",
        "_decode_matrix",
    }  # fmt: skip
    assert arch != 90 or ("_project_quantize", "project") in table
    for (name, case), row in table.items():
        assert row["spills"] == 0, (name, case)
        assert row["shared"] <= (227 if arch in (90, 100) else 99) * 1024  # sm_86, sm_120: 99 KB
        narrow = name.startswith(("_column", "_make")) or case in ("odd", "project")
        assert row["load"] >= 8 or narrow, (name, case)
        assert name != "_gemm" or all(v in " ".join(row["tensor cores"]) for v in verbs)
    for case, (total, alu) in instructions.items():
        row = table["_center_quantize", case]
        assert row["loops"] == 0
        assert row["instructions"] <= total and row["ALU"] <= alu, row
        assert row["registers"] <= 96  # 20 warps on an SM


def test_report(tmp_path):
    """Of tiny sizes; one part that fails or never ends does not stop the others."""
    command = [sys.executable, "-m", "tools.bench", "--report", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    parts = dict(re.findall(r"^(\w+) +[\d.]+ s  exit (.*)$", result.stdout, re.MULTILINE))
    assert {"machine", "kernels", "test_rest"} < set(parts), result.stderr
    assert set(parts.values()) == {"0"}, parts
    assert all((tmp_path / f"{name}.log").stat().st_size > 100 for name in parts)
    said = (tmp_path / "steps_nano.log").read_text()
    assert said.count(" True\n") == 4 and "False" not in said  # fused and plain are the same
    assert re.search(r"^fp4_mean +[\d.]+ +[\d,]+ +- +- +-$", said, re.MULTILINE)
    junit = (tmp_path / "test_rest.xml").read_text()
    assert 'failures="0"' in junit and 'tests="0"' not in junit


def test_a_report_goes_on(tmp_path, monkeypatch, capsys):
    """Past a part that is out of time, and one that cannot start."""
    bench.report(tmp_path, before=None, limit=0)
    assert capsys.readouterr().out.count("exit out of time") == 4
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    bench.report(tmp_path, before=tmp_path)
    assert capsys.readouterr().out.count("exit 1\n") == len(list(tmp_path.glob("*.log"))) == 5
