"""Stored means and scales: against the formula, alone or in a batch, and by the command line."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fp4
import inference
import sample
from cli import UserError
from data.shards import write_dataset
from data.vocab import encode, get_encoding
from experiments.recipes import RECIPES, AddedMean
from inference import Stored, calibrate
from model import GPT
from run import Config
from tests.test_eval import TEXT, config_of, model_of, save_run

STORABLE = "fp4", "fp4_mean", "fp4_project", "fp4_project_1d", "fp4_mean_1d", "fp4_hadamard"


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.no_grad():
        yield


@pytest.fixture
def data(tmp_path):
    bytes_ = get_encoding("bytes")
    tokens = encode(bytes_, [TEXT * 40])
    write_dataset(tmp_path / "data", bytes_, {"train": tokens, "val": tokens})
    return str(tmp_path / "data")


def batches(n=3, time=24):
    return torch.randint(256, (n, 2, time), generator=torch.Generator().manual_seed(3))


def tokens_of(rows, features, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=g) + 3 * torch.randn(features, generator=g)


class Layers(torch.nn.Module):
    """A layer alone, as a model of `calibrate`."""

    def __init__(self, recipe):
        super().__init__()
        self.layer = fp4.FP4Linear(64, 48, recipe=RECIPES[recipe])

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("recipe", STORABLE)
def test_a_layer_is_its_formula(recipe):
    """With means of all calibration text, twice its largest residual, and other text to come."""
    model, every = Layers(recipe), tokens_of(167, 64)
    seen, x = every[:160].view(4, 40, 64), every[160:]
    w = model.layer.weight.detach()
    assert calibrate(model, list(seen)) == 1
    rows, mean = seen.flatten(0, 1), seen.mean((0, 1))[None]
    if recipe in ("fp4", "fp4_hadamard"):
        split = torch.zeros_like
    elif "project" in recipe:
        u = mean / mean.norm()

        def split(x):
            return (x @ u.t()) * u
    else:

        def split(x):
            return mean.expand_as(x)

    amax = 2 * (rows - split(rows)).abs().max()
    w4 = fp4.quantize(w, block=(1, 16) if recipe.endswith("1d") else (16, 16)).dequantize()
    r = x - split(x)
    r4 = fp4.quantize(torch.cat([r, amax.expand(1, 64)])).dequantize()[:-1]
    want = r4 @ w4.t() + split(x) @ w.t() + model.layer.bias
    # a mean of batches' means is another sum, and may move a value to the next code
    assert (model(x) - want).norm() < 1e-2 * want.norm()
    assert torch.allclose(model.layer.recipe.amax, amax, rtol=1e-5)


@pytest.mark.parametrize("recipe", STORABLE)
def test_a_token_does_not_depend_on_its_batch(recipe):
    model, x = Layers(recipe), tokens_of(33, 64)
    x[5] *= 20  # sets the scale of the batch's tensor
    apart = torch.cat([model(row[None]) for row in x])
    assert (apart - model(x)).norm() > 0.01 * apart.norm()  # as in training
    calibrate(model, [x])
    apart = torch.cat([model(row[None]) for row in x])
    assert torch.allclose(apart, model(x), rtol=1e-5, atol=1e-5 * apart.abs().max().item())


def test_tokens_one_by_one_give_the_logits_of_the_whole_text(data):
    """Which fp4_mean without stored means does not: a token alone is its own mean."""
    ids, errors = batches(1, 8)[0], []
    for store in (True, False):
        model, cache = model_of(config_of(data, "fp4_mean")), [[], []]
        if store:
            calibrate(model, list(batches()))
        with torch.no_grad():
            whole = model(ids)
            steps = [model(ids[:, t : t + 1], cache=cache, start=t) for t in range(8)]
        errors.append((torch.cat(steps, 1) - whole).norm() / whole.norm())
    assert errors[0] < 1e-5 and errors[1] > 1e-2


def test_what_needs_more_than_constants_stays(data):
    config = config_of(data, "fp4_svd")
    model = GPT(config)
    assert calibrate(model, list(batches())) == 0
    mixed = GPT(dataclasses.replace(config, precision="fp4_mean", bf16_blocks=1))
    assert calibrate(mixed, list(batches())) == 4
    kinds = [[isinstance(m.recipe, Stored) for m in b.modules() if hasattr(m, "recipe")]
             for b in mixed.blocks]  # fmt: skip
    assert kinds == [[True] * 4, [False] * 4]
    added = AddedMean(RECIPES["fp4_mean"], 4.0)
    for name in ("fp4_mean_paper", "fp4_mean_sr", "fp4_mean_massive", "bf16", "fp32"):
        assert inference.variant_of(RECIPES[name]) is None
    assert inference.variant_of(added) is None


def test_hooks_are_gone_and_the_logits_are_near(data):
    model = model_of(config_of(data, "fp4_mean"))
    ids = batches(1)[0]
    before = model(ids)
    calibrate(model, list(batches()))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert (model(ids) - before).norm() < 0.4 * before.norm()  # .25; without the mean's path .65


def test_batches_count_by_their_tokens_and_a_layer_that_saw_none_stays():
    x = tokens_of(60, 64)
    apart, whole = Layers("fp4_mean"), Layers("fp4_mean")
    whole.load_state_dict(apart.state_dict())
    apart.unused = fp4.FP4Linear(64, 48)
    assert calibrate(apart, [x[:50], x[50:]]) == calibrate(whole, [x]) == 1
    assert torch.allclose(apart.layer.recipe.right, whole.layer.recipe.right, atol=1e-5)
    assert apart.unused.recipe is fp4.linear_fp4_mean
    assert "stored" in repr(apart) and "tensor" not in repr(apart)


def test_what_calibrate_refuses():
    model, x = Layers("fp4_mean"), tokens_of(8, 64)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, [x.index_fill(0, torch.tensor([3]), float("nan"))])
    calibrate(model, [x])
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model(x)


def test_a_known_amax_is_that_of_a_larger_tensor():
    x = torch.randn(32, 64)
    big = torch.cat([x, torch.full((16, 64), 9.0)])
    for block in ((1, 16), (16, 1), (16, 16)):
        q, want = fp4.quantize(x, block=block, amax=torch.tensor(9.0)), fp4.quantize(
            big, block=block
        )  # fmt: skip
        assert torch.equal(q.dequantize(), want.dequantize()[:32])
        assert torch.equal(q.tensor_scale, want.tensor_scale)
    assert F.relu(fp4.quantize(x, amax=torch.tensor(1.0)).dequantize()).max() == 1  # saturates


def test_the_command(data, tmp_path, capsys, monkeypatch):
    """sample.py stores means of the run's training text, or of another dataset's, and decodes."""
    run, calls = save_run(tmp_path / "run", config_of(data, "fp4_mean")), []

    def calibrate_on(path, model, origin, dataset):
        inference.calibrate_on(path, model, origin, dataset)
        layers = [m for m in model.modules() if isinstance(m, fp4.FP4Linear)]
        calls.append((path, dataset, sum(isinstance(m.recipe, Stored) for m in layers)))

    monkeypatch.setattr(sample, "calibrate_on", calibrate_on)
    argv = ["--out-dir", run, "--prompt", "The king", "--tokens", "5"]
    for more in ([], ["--dataset", data]):
        sample.main(argv + more)
        assert capsys.readouterr().out.startswith("The king")
    assert calls == [(run, None, 8), (run, data, 8)]


def test_a_directory_without_text(data, tmp_path):
    model = model_of(config_of(data, "fp4_mean"))
    with pytest.raises(UserError, match="HINT: --dataset"):
        inference.calibrate_on("hf/model", model, dataclasses.asdict(Config()) | {"dataset": ""})
    model = model_of(config_of(data, "bf16"))
    inference.calibrate_on("hf/model", model, {"dataset": ""})  # nothing to calibrate
