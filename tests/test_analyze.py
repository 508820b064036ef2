"""analyze.py: its diagnostics against numpy and known answers, its remedies on a made-up mean, and
all of it on a tiny checkpoint and on what is exported of it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from helpers import relative

import fp4
import hf
import train
from checkpoint import load_model
from cli import UserError
from data.shards import write_dataset
from data.vocab import encode, get_encoding
from experiments import analyze
from experiments.recipes import AddedMean

RESULTS = Path(analyze.__file__).parent / "results"
BYTES = get_encoding("bytes")
TINY = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "dim": 32, "ffn_dim": 48}
TINY |= {"block_size": 32, "batch_size": 4, "max_steps": 4, "eval_interval": 2, "eval_windows": 4}
SMALL = ["--tokens", "64", "--seeds", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(fp4, "fuse", lambda: "plain passes")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny run with step-0.pt, step-2.pt and step-4.pt. Read only."""
    folder = tmp_path_factory.mktemp("run")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran"]
    tokens = encode(BYTES, [" ".join(np.random.default_rng(0).choice(words, 3000))])
    write_dataset(folder / "data", BYTES, {"train": tokens[:8000], "val": tokens[8000:]})
    (folder / "tiny.json").write_text(json.dumps({**TINY, "dataset": str(folder / "data")}))
    argv = ["--preset", str(folder / "tiny.json"), "--out-dir", str(folder), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4, "fuse", lambda: "plain passes")
        train.main([*argv, "--precision", "bf16", "--keep"])
    return folder


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def known_mean(mean):
    """(256, 32), mean exactly `mean` and variance exactly 1 in every column."""
    x = normal(256, 32).double()
    return (x - x.mean(0)) / x.std(0, correction=0) + mean


# Diagnostics.


def test_the_share_of_a_known_mean():
    x = known_mean(4.0)
    found = analyze.diagnose(x)
    assert found["mean_share"] == pytest.approx(16 / 17, rel=1e-6)
    assert found["R"] == pytest.approx(math.sqrt(16 / 17), rel=1e-6)
    assert analyze.diagnose(x - 4)["mean_share"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(200, 32), (20, 48)])
def test_the_leading_singular_value_and_vector(shape):
    x = normal(*shape).double() + 0.1 * normal(shape[1], seed=1)
    _, s, v = np.linalg.svd(x.numpy(), full_matrices=False)
    mean = x.numpy().mean(0)
    cosine = abs(v[0] @ mean) / np.linalg.norm(mean)
    assert 0.1 < cosine < 0.99
    assert analyze.leading_share(x) == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=1e-9)
    assert analyze.mean_alignment(x) == pytest.approx(cosine, rel=1e-7)


def test_what_the_mean_explains_of_the_largest_magnitudes():
    x = normal(300, 32).double()
    x[:, 3] += 5
    a, mean = x.numpy(), x.numpy().mean(0)
    top = sorted(((abs(a[i, j]), i, j) for i in range(300) for j in range(32)), reverse=True)[:10]
    explained = sum(mean[j] * a[i, j] for _, i, j in top) / sum(v * v for v, *_ in top)
    assert 0.4 < explained < 0.9
    assert analyze.top_explained(x) == pytest.approx(explained, rel=1e-9)
    outlier = known_mean(0.0)
    outlier[0, 0] = 1000.0  # the mean of its column is 1000 / 256
    assert analyze.top_explained(outlier, 1e-6) == pytest.approx(1 / 256, rel=0.01)


def test_mean_cosine():
    x = normal(12, 8).double() + 0.5
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(12) for j in range(12) if i != j]
    assert analyze.mean_cosine(x) == pytest.approx(np.mean(pairs), rel=1e-9)


def paper_isoscore(x):
    """Algorithm 1 of arXiv 2108.07344, step by step."""
    variances = np.linalg.eigvalsh(np.cov(x.T))  # after PCA the covariance is diagonal
    n = len(variances)
    normed = variances * np.sqrt(n) / np.linalg.norm(variances)
    defect = np.linalg.norm(normed - np.ones(n)) / np.sqrt(2 * (n - np.sqrt(n)))
    used = (n - defect**2 * (n - np.sqrt(n))) ** 2 / n**2  # the fraction of dimensions
    return (n * used - 1) / (n - 1)


@pytest.mark.parametrize("shape", [(500, 16), (10, 24)])
def test_isoscore(shape):
    x = normal(*shape).double() * torch.linspace(0.1, 3, shape[1])
    x -= x.mean(0)
    assert 0.1 < paper_isoscore(x.numpy()) < 0.9
    assert analyze.isoscore(x) == pytest.approx(paper_isoscore(x.numpy()), rel=1e-9)


def test_isoscore_of_all_directions_and_of_one():
    eye = torch.eye(16).double()
    assert analyze.isoscore(torch.cat((eye, -eye))) == pytest.approx(1)
    assert analyze.isoscore(normal(50, 1).double() * normal(16, seed=1)) == pytest.approx(0)


def test_the_codes_of_a_known_matrix():
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat((values, -values)).repeat(4, 1)
    x[1, 8] = 0.0  # two codes for zero: one -0 less
    due = torch.full((16,), 4 / 64)
    due[0], due[8] = 5 / 64, 3 / 64
    assert torch.equal(analyze.code_shares(x), due)
    p = due.numpy()
    assert analyze.code_entropy(x) == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-6)


def test_codes_and_scales_against_the_reference():
    x = normal(32, 64) * torch.logspace(-2, 2, 32)[:, None]
    due = reference.quantize(x.numpy(), (1, 16))
    shares = np.bincount(due.codes.ravel(), minlength=16) / x.numel()
    assert analyze.code_shares(x).numpy() == pytest.approx(shares)
    due = np.log2(due.scales[due.scales > 0]).std()
    assert due > 2 and analyze.scale_spread(x) == pytest.approx(due, rel=1e-5)


def test_diagnoses_come_before_and_after_centering():
    mean = torch.tensor([4.0, -4.0]).repeat(16)
    x = known_mean(mean)
    d = analyze.diagnose(x)
    assert d["mean_cosine"][0] > 0.9 and abs(d["mean_cosine"][1]) < 0.01
    assert d["leading_share"][0] > 16 / 17 and d["leading_share"][1] < 0.1
    assert d["isoscore"][0] < 0.01 and d["isoscore"][1] > 0.8
    assert d["amax"] == pytest.approx([y.abs().max().item() for y in (x, x - mean)])


# Remedies.


@pytest.fixture(scope="module")
def operands():
    """X (128, 64), W (48, 64), D (128, 48) without a mean."""
    x = normal(128, 64)
    return x - x.mean(0), normal(48, 64, seed=1), normal(128, 48, seed=2)


def errors(operands, name):
    torch.manual_seed(0)
    exact = operands[0] @ operands[1].t(), operands[2] @ operands[1], operands[2].t() @ operands[0]
    got = analyze.gemms(*operands, analyze.REMEDIES[name][0])
    return dict(zip(analyze.COLUMNS, analyze.gemm_errors(got, exact), strict=True))


def test_the_emulation_without_a_remedy_is_the_real_code(operands):
    def none(a, b, round_a, round_b):
        return round_a(a) @ round_b(b).t()

    exact = analyze.gemms(*operands, "fp32")
    emulated, real = analyze.gemms(*operands, none), analyze.gemms(*operands, "fp4")
    torch.testing.assert_close(emulated[0], real[0])
    a, b = (analyze.gemm_errors(got, exact) for got in (emulated, real))
    assert a == pytest.approx(b, rel=0.1)  # gradients: of equal size, from other random numbers


@pytest.mark.parametrize("name", [n for n, (how, _) in analyze.REMEDIES.items() if callable(how)])
def test_an_emulated_remedy_is_exact_without_rounding(name):
    a, b = normal(32, 128), normal(48, 128, seed=1)
    product = analyze.REMEDIES[name][0](a, b, lambda x, *_: x, lambda x, *_: x)
    torch.testing.assert_close(product, a @ b.t(), rtol=1e-5, atol=1e-4)


def test_zigzag_deals_the_columns_evenly():
    order = analyze.zigzag(torch.arange(64.0))
    assert sorted(order.tolist()) == list(range(64))
    blocks = order.view(4, 16)
    assert blocks[0, :4].tolist() == [63, 56, 55, 48] and blocks[3, :4].tolist() == [60, 59, 52, 51]
    assert blocks.sum(1).tolist() == [16 * 31.5] * 4


def test_rotate_spreads_a_value_over_its_16_columns():
    x = torch.zeros(4, 48)
    x[1, 20] = 4.0
    r = analyze.rotate(x)
    assert r[1, 16:32].abs().tolist() == [1.0] * 16 and r.count_nonzero() == 16
    y = normal(8, 48)
    torch.testing.assert_close(analyze.rotate(y).norm(dim=1), y.norm(dim=1))


def test_gemm_errors_of_known_products():
    y = torch.tensor([[1.0, 5.0], [3.0, 5.0]])  # over tokens: 1 and -1 about (2, 5)
    shifted = analyze.gemm_errors((y + 3, 2 * y, 0 * y), (y, y, y))
    assert shifted == pytest.approx((6 / math.sqrt(60), 0, 1, 1, 1))


def test_only_what_splits_it_off_removes_a_mean_in_all_features(operands):
    x, w, d = operands
    biased = x + 4 * normal(64, seed=3), w, d
    found = {name: errors(biased, name) for name in analyze.REMEDIES}
    removing = {"mean", "projection", "both", "mean in FP4", "rank-1 SVD", "mean + Hadamard"}
    for name in removing:
        assert found[name]["fprop varying"] < 0.5 * found["none"]["fprop varying"]
    for name in set(found) - removing:
        assert found[name]["fprop varying"] > 0.8 * found["none"]["fprop varying"]
    assert found["mean"]["fprop"] < 0.3 * found["mean in FP4"]["fprop"]
    assert found["mean"]["wgrad"] < 0.3 * found["none"]["wgrad"]
    dgrads = [e["dgrad"] for e in found.values()]  # W and D have no mean
    assert max(dgrads) < 1.3 * min(dgrads)


def test_hot_channels_put_back_the_error_of_the_channels_with_most_of_it(operands):
    x, w, _ = operands
    x, hot = x.clone(), torch.tensor([5])  # 1% of 64 features: one
    x[:, 5] *= 30

    def coarse(a, *_):
        return (a / 4).round() * 4

    y = analyze.hot_channels(x, w, coarse, coarse)
    rest = x.index_fill(1, hot, 0), w.index_fill(1, hot, 0)
    torch.testing.assert_close(
        y, x[:, hot] @ w[:, hot].t() + coarse(rest[0]) @ coarse(rest[1]).t(), rtol=1e-5, atol=1e-3
    )


def test_outlier_columns_and_scales_per_channel_help_against_one_large_feature(operands):
    x, w, d = operands
    spiked = x.index_fill(1, torch.tensor(5), 0.0) + 100 * normal(128, 1) * (torch.arange(64) == 5)
    quiet = torch.arange(64) != 5  # what the outlier's neighbours contribute
    exact = (spiked * quiet) @ w.t()
    lost = {}
    for name in ("none", "outlier columns", "per channel"):
        how = analyze.REMEDIES[name][0]
        y = analyze.gemms(spiked, w * quiet, d, how)[0]
        lost[name] = ((y - exact).norm() / exact.norm()).item()
    assert lost["none"] > 1.5 * max(lost["outlier columns"], lost["per channel"])


def test_errors_are_root_mean_squares_over_linears_and_the_added_mean_is_the_recipes(operands):
    x, w, d = operands
    biased = x + AddedMean(None, 4.0).mean(x)
    assert fp4.mean_share(biased) > 0.9
    both = analyze.remedy_errors({"a": (x, d), "b": (biased, d)}, {"a": w, "b": w}, 0.0)
    one, two = errors((x, w, d), "mean"), errors((biased, w, d), "mean")
    due = [math.sqrt((one[c] ** 2 + two[c] ** 2) / 2) for c in analyze.COLUMNS]
    assert both["mean"] == pytest.approx(due, rel=1e-4)
    added = analyze.remedy_errors({"a": (x, d)}, {"a": w}, 4.0)
    assert added["mean"][:4] == pytest.approx(list(two.values())[:4], rel=1e-4)
    # it moves neither the residuals nor the unit of wgrad's error
    still = analyze.remedy_errors({"a": (x, d)}, {"a": w}, 0.0)
    assert added["mean"][4] == pytest.approx(still["mean"][4], rel=0.02)
    assert added["none"][4] > 2 * still["none"][4]


def test_the_error_of_first_tokens_that_lack_the_mean(operands):
    """Subtraction hands them the mean, with its sign turned; a projection does not."""
    x, w, _ = operands
    x = 0.1 * x + 4 * normal(64, seed=3)
    first = torch.arange(128) % 32 == 0
    x[first] = 0.1 * operands[0][first]
    found = analyze.first_tokens(x, w, 32)
    u = torch.nn.functional.normalize(x.mean(0), dim=0)
    assert found["along"] == pytest.approx(((x @ u)[first].mean() / (x @ u)[~first].mean()).item())
    y = fp4.quantize(x).dequantize() @ fp4.quantize(w, block=(16, 16)).dequantize().t()
    due = [relative(y[rows], (x @ w.t())[rows]) for rows in (first, ~first)]
    assert found["fp4"] == pytest.approx(due, rel=1e-4)
    assert found["fp4_mean"][0] > 5 * found["fp4"][0] and found["fp4_mean"][1] < found["fp4"][1] / 5
    assert found["fp4_project"][0] < 1.5 * found["fp4"][0]
    assert found["fp4_project"][1] < found["fp4"][1] / 5


# Gradients.


def test_bias_and_noise_of_known_draws():
    exact, bias = normal(4000), 0.3 * normal(4000, seed=1)
    draws = exact + bias + 0.5 * normal(5, 4000, seed=2)
    error, b, n, cosine = analyze.split_error([(draws, exact)])
    norm = exact.norm().item()
    assert b == pytest.approx(bias.norm().item() / norm, rel=0.03)
    assert n == pytest.approx(0.5 * math.sqrt(4000) / norm, rel=0.03)
    one = (draws - exact).square().sum(1).mean().sqrt().item() / norm
    assert error == pytest.approx(one, rel=1e-6) == pytest.approx(math.hypot(b, n))
    each = [np.corrcoef(d, exact)[0, 1] for d in draws.numpy()]
    assert cosine == pytest.approx(np.mean(each), abs=0.002)
    halves = [(draws[:, :999], exact[:999]), (draws[:, 999:], exact[999:])]
    assert analyze.split_error(halves) == pytest.approx((error, b, n, cosine))


def test_noise_alone_is_not_taken_for_bias():
    exact = normal(100)
    squares = [
        analyze.split_error([(exact + normal(2, 100, seed=s), exact)])[1] ** 2 for s in range(1, 40)
    ]
    assert np.mean(squares) < 0.15  # ||mean error||^2 alone would give 0.5


def opened(run):
    model, ids, targets, _ = analyze.open_model(run / "step-2.pt", None, 64, "cpu")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fp4.FP4Linear)}
    return model, layers, ids, targets


def test_captured_tensors_give_the_weight_gradients(run):
    model, layers, ids, targets = opened(run)
    seen = analyze.capture(model, layers, ids, targets)
    model(ids, targets).backward()
    assert list(seen) == list(layers) and len(layers) == 8
    for name, (x, d) in seen.items():
        assert x.shape[0] == d.shape[0] == 64
        torch.testing.assert_close(d.t() @ x, layers[name].weight.grad)


def test_gradient_errors(run, monkeypatch):
    monkeypatch.setattr(analyze, "GRADIENTS", ("fp32", "fp4_mean"))
    found = analyze.gradient_errors(*opened(run), 2)
    assert found["fp32"]["whole"] == pytest.approx([0, 0, 0, 1], abs=1e-6)
    flat = {}
    for precision in ("fp32", "fp4_mean"):
        model = load_model(run / "step-2.pt", precision=precision)[0]
        *_, ids, targets = opened(run)
        flat[precision] = []
        for seed in range(2):
            torch.manual_seed(seed)
            model.zero_grad()
            model(ids, targets).backward()
            flat[precision].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact = flat["fp32"][0]
    one = [((g - exact).norm() / exact.norm()).item() for g in flat["fp4_mean"]]
    assert found["fp4_mean"]["whole"][0] == pytest.approx(np.sqrt(np.mean(np.square(one))))
    assert found["fp4_mean"]["blocks.1.ffn.down"][0] > 0.01 and one[0] > 0.01


# The whole tool.


def test_two_stages_are_analyzed_stored_and_printed_again(run, tmp_path, capsys):
    out = tmp_path / "results" / "a.json"
    paths = [str(run / "step-0.pt"), str(run / "checkpoint.pt")]
    committed = (RESULTS / "analysis.json").read_bytes()
    analyze.main([*paths, *SMALL, "--json", str(out)])
    printed = capsys.readouterr().out
    stages = json.loads(out.read_text())
    assert [s["name"] for s in stages] == ["step-0", run.name] and stages[0]["tokens"] == 64
    assert "largest" not in stages[0] and out.stat().st_size < 60_000
    last = stages[1]
    shares = {n: v["X"]["mean_share"] for n, v in last["linears"].items()}
    assert max(shares, key=shares.get) == last["largest"]["linear"] and len(shares) == 8
    kinds = ["attention.qkv", "attention.out", "ffn.gate_up", "ffn.down"]
    assert all(name in printed for name in [*analyze.REMEDIES, *analyze.GRADIENTS, *kinds])
    low, high = sorted(shares[f"blocks.{i}.ffn.down"] for i in (0, 1))
    row = f"| ffn.down | X | {(low + high) / 2:.2g} ({low:.2g} to {high:.2g}) | "
    assert row in printed
    assert f"{last['remedies']['4']['mean'][1]:.4f}" in printed
    x, strong = (np.array(last["largest"]["images"][rms]["x"]) for rms in "04")
    mean = np.array(last["largest"]["mean"])
    assert x.shape == (64, 32) and mean == pytest.approx(x.mean(0), abs=2e-3)
    assert np.abs(strong - x).max() > 4 * np.sqrt((x**2).mean())
    assert strong - strong.mean(0) == pytest.approx(x - x.mean(0), abs=3e-4)
    assert last["largest"]["images"]["0"]["share"] == max(shares.values())
    assert last["largest"]["images"]["4"]["share"] > 0.9

    analyze.main([str(out)])
    again = capsys.readouterr().out
    assert again.splitlines()[:4] == printed.splitlines()[3:7]
    assert again.count("|") == printed.count("|") and "e mean of 4" not in again
    assert (RESULTS / "analysis.json").read_bytes() == committed


def test_a_hugging_face_directory(run, tmp_path, capsys):
    """The numbers of the run that it was made of, but for the added mean."""
    hf.main(["to-hf", str(run), str(tmp_path / "hf")])
    data, stages = ["--dataset", str(run / "data")], []
    for i, argv in enumerate(([str(run)], [str(tmp_path / "hf"), *data])):
        analyze.main([*argv, *SMALL, "--json", str(tmp_path / f"{i}.json")])
        stages += json.loads((tmp_path / f"{i}.json").read_text())
    ours, theirs = stages
    assert theirs["name"] == "hf" and theirs["linears"] == ours["linears"]
    assert theirs["gradients"] == ours["gradients"]
    assert theirs["remedies"] == {"0": ours["remedies"]["0"]}
    assert theirs["largest"]["images"] == {"0": ours["largest"]["images"]["0"]}


def test_massive_tokens_are_named_and_left_out(run, tmp_path, monkeypatch, capsys):
    x = known_mean(4.0)
    assert analyze.diagnose(x)["massive"] == {}
    spiked = torch.cat((x, torch.zeros(2, 32).double()))
    spiked[256, 7], spiked[257, 7] = 3000.0, -5000.0
    found = analyze.diagnose(spiked)
    massive = found["massive"]
    assert massive["tokens"] == [256, 257] and massive["energy"] > 0.99
    median = spiked.norm(dim=1).median().item()
    assert massive["to_median"] == pytest.approx(5000 / median, rel=1e-6)
    assert found["mean_share"] < 0.01
    due = {name: analyze.diagnose(x)[name] for name in massive["without"]}
    due["leading_share"] = due["leading_share"][0]
    assert massive["without"] == pytest.approx(due, rel=1e-6)

    tensors = analyze.capture

    def spike(*args):
        seen = tensors(*args)
        seen["blocks.1.ffn.down"][0][[3, 40]] *= 100
        return seen

    monkeypatch.setattr(analyze, "capture", spike)
    analyze.main([str(run), *SMALL])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "| 3, 40 |" in line)
    assert row.startswith("| blocks.1.ffn.down | ") and row.count(" → ") == 4


def test_errors_of_the_user(run, tmp_path):
    hf.main(["to-hf", str(run), str(tmp_path / "hf")])
    folder, data = str(tmp_path / "hf"), str(run / "data")
    (broken := tmp_path / "broken.json").write_text("{}")
    stored = str(RESULTS / "analysis.json")
    plays = get_encoding("plays")
    tokens = encode(plays, ["To be, or not to be. " * 40])
    write_dataset(tmp_path / "plays", plays, {"train": tokens, "val": tokens})
    for argv, message in {
        (): "required: path",
        (folder,): r"has no dataset of its own\. HINT: --dataset",
        (folder, "--dataset", str(tmp_path / "plays")): "has tokens of plays",
        (folder, "--dataset", str(tmp_path / "nowhere")): "nowhere",
        (str(tmp_path / "none.pt"),): "no checkpoint at",
        (str(run), "--seeds", "1"): "--seeds: 1 is not",
        (str(run), "--tokens", "0"): "--tokens: 0 is not",
        (stored, "--seeds", "2"): "takes no other argument",
        (stored, str(run)): "takes no other argument",
        (stored, "--dataset", data): "takes no other argument",
        (str(tmp_path / "none.json"),): "cannot read .*none.json",
        (str(broken),): "is not what --json wrote",
    }.items():
        with pytest.raises(UserError, match=message):
            analyze.main(argv)


def test_an_error_is_one_line(tmp_path):
    argv = [sys.executable, analyze.__file__, tmp_path / "none.json"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot read ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["[]", '[{"remedies": {}}]', "{}", "3", "x"])
def test_a_json_of_another_kind_is_one_line(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not what --json wrote"):
        analyze.main([str(tmp_path / "x.json")])
