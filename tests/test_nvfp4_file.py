"""to-nvfp4 against compressed-tensors, its quantizer and its decoder, and against transformers'
logits on what it decodes; and what is refused."""

import functools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_hf import TOKENS, assert_same_logits, foreign, save_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import fp4
import hf
import train
from checkpoint import load_model
from cli import UserError
from nvfp4_file import pack

pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")
from compressed_tensors.compressors.nvfp4 import base
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

NVFP4A16 = preset_name_to_scheme("NVFP4A16", ["Linear"])
STACKS = (
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
)


def to_nvfp4(source, directory):
    hf.main(["to-nvfp4", str(source), str(directory)])
    return directory


@pytest.fixture(
    scope="module",
    params=[
        {"precision": "fp4", "tied": True},
        {"tied": False},
        {"qk_norm": False, "rope_factor": 8.0},
        {"qk_norm": False, "qkv_bias": True, "tied": False},
        {"head_dim": 8, "n_kv_head": 1},
        {"precision": "fp4_1d"},
        {"bf16_blocks": 1},
    ],
    ids=["tied", "untied", "llama", "qwen2", "k and v in one block", "1 x 16", "a bf16 block"],
)
def written(request, tmp_path_factory):
    """(run, its directory in NVFP4). Read only."""
    run = save_run(tmp_path_factory.mktemp("run"), **request.param)
    return run, to_nvfp4(run, run / "hf")


@pytest.fixture
def decode_in_fp32(monkeypatch):
    """compressed-tensors decodes into BF16 otherwise."""
    unpack = functools.partial(base.unpack_fp4_from_uint8, dtype=torch.float32)
    monkeypatch.setattr(base, "unpack_fp4_from_uint8", unpack)


def with_rounded_weights(source):
    """Our model in FP32, but for the weights of the linears that its recipe rounds."""
    model, origin = load_model(source, precision="fp32")
    block = (1, 16) if origin["precision"] == "fp4_1d" else (16, 16)
    fp4.convert(model, "fp32")
    for layer in model.blocks[: model.config.n_layer - model.config.bf16_blocks]:
        fp4.convert(layer, lambda x, w: F.linear(x, fp4.quantize(w, block=block).dequantize()))
    return model


def assert_their_logits_are_ours(source, directory, tokens=TOKENS):
    theirs, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same_logits(with_rounded_weights(source), theirs, tokens)


def test_transformers_has_the_logits_of_rounded_weights(written, decode_in_fp32):
    assert_their_logits_are_ours(*written)


def test_a_trained_run(tmp_path, monkeypatch, decode_in_fp32):
    monkeypatch.setattr(fp4, "fuse", lambda: "plain passes")
    hf.main(["to-hf", str(save_run(tmp_path / "start", precision="fp4")), str(tmp_path / "hf")])
    hf.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")])
    train.main(["--resume", "--out-dir", str(tmp_path / "run"), "--device", "cpu"])
    to_nvfp4(tmp_path / "run", tmp_path / "nvfp4")
    assert_their_logits_are_ours(tmp_path / "run", tmp_path / "nvfp4")


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_foreign_directory(family, tmp_path, decode_in_fp32):
    foreign(family).bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    hf.main(["to-hf", str(save_run(tmp_path / "run")), str(tmp_path / "ours")])
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "hf")
    to_nvfp4(tmp_path / "hf", tmp_path / "nvfp4")
    assert_their_logits_are_ours(tmp_path / "hf", tmp_path / "nvfp4", TOKENS % 97)


def test_a_run_and_its_own_directory_give_the_same_files(tmp_path):
    run = save_run(tmp_path / "run")
    hf.main(["to-hf", str(run), str(tmp_path / "hf")])
    to_nvfp4(run, tmp_path / "a")
    to_nvfp4(tmp_path / "hf", tmp_path / "b")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_it_runs_as_it_loads_by_default_in_bf16(tmp_path):
    run = save_run(tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(to_nvfp4(run, tmp_path / "hf"))
    with torch.no_grad():
        logits, expected = theirs(TOKENS).logits, with_rounded_weights(run)(TOKENS)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).square().mean() < 0.03**2 * expected.square().mean()


def of(name, stored):
    """What is stored of a weight, by the names that compressed-tensors has for it in a module."""
    return {f"weight{end}": stored[name + end] for end in ("_packed", "_scale", "_global_scale")}


def stacks(run, directory):
    """Per stack of linears that is rounded: {name: its FP32 weight}, {name: what is stored}."""
    model, _ = load_model(run)
    config, ours = model.config, hf.to_transformers(model.state_dict(), model.config)
    stored = load_file(directory / "model.safetensors")
    for i in range(config.n_layer - config.bf16_blocks):
        for stack in STACKS:
            names = [f"model.layers.{i}.{part}.weight" for part in stack]
            yield {name: ours[name] for name in names}, {name: of(name, stored) for name in names}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def test_their_quantizer_makes_our_codes_of_our_scales(written):
    for weights, stored in stacks(*written):
        for name, tensors in stored.items():
            scales = {"weight_scale": tensors["weight_scale"].float()}
            scales["weight_global_scale"] = tensors["weight_global_scale"]
            theirs = base.NVFP4PackedCompressor.compress(
                {"weight": weights[name], **scales}, NVFP4A16
            )
            assert_same_tensors(theirs, tensors)


def test_their_scales_of_1_x_16_blocks_are_ours(tmp_path):
    run = save_run(tmp_path / "run", precision="fp4_1d")
    for weights, stored in stacks(run, to_nvfp4(run, tmp_path / "hf")):
        whole = torch.cat(list(weights.values()))
        divisor = generate_gparam(whole.min(), whole.max())
        for name, tensors in stored.items():
            torch.testing.assert_close(tensors["weight_global_scale"], divisor, rtol=1e-6, atol=0)
            blocks = weights[name].unflatten(1, (-1, 16))
            scales, _ = calculate_qparams(
                blocks.amin(-1), blocks.amax(-1), NVFP4A16.weights, global_scale=divisor
            )
            assert torch.equal(scales.float(), tensors["weight_scale"].float())


def test_a_stack_has_one_global_scale(written):
    for _, stored in stacks(*written):
        assert len({tensors["weight_global_scale"].item() for tensors in stored.values()}) == 1


def test_all_but_the_rounded_linears_is_as_to_hf_writes_it(written, tmp_path):
    run, directory = written
    hf.main(["to-hf", str(run), str(tmp_path / "hf")])
    whole, stored = (load_file(x / "model.safetensors") for x in (tmp_path / "hf", directory))
    for weights, tensors in stacks(run, directory):
        for name in weights:
            del whole[name]
            for end in tensors[name]:
                del stored[name.removesuffix("weight") + end]
    assert_same_tensors(whole, stored)
    abouts = [json.loads((x / "config.json").read_text()) for x in (tmp_path / "hf", directory)]
    kept = [name.removesuffix(".weight") for name in whole if "_proj.weight" in name]
    ignored = abouts[1].pop("quantization_config")["ignore"]
    assert sorted(ignored) == sorted(["lm_head", *kept])
    assert abouts[1] == {**abouts[0], "torch_dtype": "bfloat16"}


def test_the_config_is_their_preset(written):
    about = json.loads((written[1] / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(about)
    (group,) = config.config_groups.values()
    assert config.format == "nvfp4-pack-quantized" and config.quantization_status == "compressed"
    assert group.targets == ["Linear"] and group.input_activations is None
    assert about["config_groups"]["group_0"]["weights"].items() <= dict(NVFP4A16.weights).items()


def test_zeros_are_zeros(decode_in_fp32):
    parts = {"a.weight": torch.zeros(16, 32), "b.weight": torch.zeros(32, 32)}
    packed = pack(parts, (16, 16))
    for name, zeros in parts.items():
        decoded = base.NVFP4PackedCompressor.decompress(of(name, packed), NVFP4A16)
        assert torch.equal(decoded["weight"], zeros)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"dim": 40}, r"q_proj.weight \+ .*v_proj.weight: 128 x 40"),
        ({"ffn_dim": 72}, "down_proj.weight: 48 x 72"),
        ({"head_dim": 10, "n_kv_head": 1}, r"q_proj.weight \+ .*v_proj.weight: 60 x 48"),
    ],
    ids=str,
)
def test_widths_that_are_no_multiple_of_16_are_one_line(tmp_path, widths, message):
    run = save_run(tmp_path / "run", precision="bf16", **widths)
    with pytest.raises(UserError, match=rf"\A.*{message} does not divide into blocks of 16\Z"):
        to_nvfp4(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_writing_needs_no_compressed_tensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    to_nvfp4(save_run(tmp_path / "run"), tmp_path / "hf")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=r"\A.*hf is there already.*\Z"):
        to_nvfp4(save_run(tmp_path / "run"), tmp_path / "hf")
    assert not list((tmp_path / "hf").iterdir())


@pytest.mark.parametrize("command", ["from-hf", "to-hf", "to-nvfp4"])
def test_our_own_reader_refuses_it_in_one_line(tmp_path, command):
    directory = to_nvfp4(save_run(tmp_path / "run"), tmp_path / "hf")
    with pytest.raises(
        UserError, match=r"\A.*config\.json: quantization_config: packed .*HINT.*\Z"
    ):
        hf.main([command, str(directory), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
