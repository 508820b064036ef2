"""tools/: models in and out, against transformers, gguf and compressed-tensors; stored means,
against their formula. Numbers first, then what is refused."""

import copy
import dataclasses
import functools
import json
import os
import pickle
import re
import stat
import sys

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import base
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from reference import relative
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import fp4
from data.shards import load, write_dataset
from data.tokenizer import BYTE, EOT, encode, encoding_of, get_encoding, prompt_ids, tokenizer_hash
from model import CHECKPOINT_FORMAT, GPT, ModelConfig
from tools import hf
from tools.stored_means import calibrate, calibrate_on, split_of

BYTES = get_encoding("bytes")
TOKENS = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
TEXT = "They'll  say 'tis\n\n\n1599'S the\u00a0year... \t\u2014 o'er naïve\r\n  café 漢字 🎭 "
Q8_0, Q4_1, F32 = (GGMLQuantizationType[name] for name in ("Q8_0", "Q4_1", "F32"))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def their_model(family, rope_theta=5e4, **changes):
    """A tiny model of transformers, with vectors that are not all ones or zeros."""
    torch.manual_seed(0)
    changes["rope_parameters"] = {"rope_theta": rope_theta, "rope_type": "default"}
    config = AutoConfig.for_model(
        family, vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        rms_norm_eps=1e-3, initializer_range=0.15, **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        p.data += torch.linspace(-0.5, 0.5, len(p)) if p.ndim == 1 else 0
    return model


def save_theirs(directory, model, **changes):
    """Save it in shards, with a tokenizer; changes: of config.json, None to delete a field."""
    model.save_pretrained(directory, max_shard_size="60KB")
    hf.transformers_tokenizer(BYTES).save_pretrained(directory)
    fields = json.loads((directory / "config.json").read_text()) | changes
    if "qwen" in fields["model_type"]:
        fields.setdefault("sliding_window", 64)  # which they do not use
    fields = {name: value for name, value in fields.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def save_ours(folder, name="bytes", **changes):
    """A run of a tiny model of ours, as train.py leaves it."""
    encoding = get_encoding(name)
    shape = {
        "vocab_size": -(-encoding.n_vocab // 64) * 64, "block_size": 32, "n_layer": 2,
        "head_dim": 16, "dim": 48, "ffn_dim": 80, "rope_theta": 5e5, "norm_eps": 1e-3,
    }  # fmt: skip
    config = ModelConfig(**shape | changes)
    model = GPT(config, torch.Generator().manual_seed(1))
    for p in model.parameters():  # so that logits spread, and norms are not all ones
        p.data = p.data * 10 if p.ndim == 2 else p.data + torch.linspace(-0.5, 0.5, len(p))
    folder.mkdir(parents=True)
    state = {"format": CHECKPOINT_FORMAT, "step": 7, "config": dataclasses.asdict(config)}
    state |= {"tokenizer": name, "tokenizer_hash": tokenizer_hash(encoding), "data": ""}
    torch.save(state | {"model": model.state_dict(), "optimizer": None}, folder / "checkpoint.pt")
    return folder


def add_to(directory, tensors):
    shard = max(directory.glob("*.safetensors"))
    save_file(load_file(shard) | tensors, shard)


def convert(command, source, target):
    hf.main([command, str(source), str(target)])
    return target


def assert_same_logits(ours, theirs, tokens=TOKENS):
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)


# Hugging Face directories.

OURS = [{}, {"tied": False}, {"qk_norm": False}, {"qk_norm": False, "qkv_bias": True}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_an_imported_model_has_transformers_logits(family, tied, dtype, tmp_path):
    theirs = their_model(family, tie_word_embeddings=tied).to(dtype)
    directory = save_theirs(tmp_path / "hf", theirs)
    assert len(list(directory.glob("*.safetensors"))) > 2
    ours = GPT.load(convert("from-hf", directory, tmp_path / "run"), precision="fp32")
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert ours.run["config"]["precision"] == "bf16" and ours.config.block_size == 512
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("changes", OURS, ids=str)
def test_an_exported_run_has_our_logits_and_comes_back_bit_for_bit(changes, tmp_path):
    ours = GPT.load(save_ours(tmp_path / "run", **changes), precision="fp32")
    directory = convert("to-hf", tmp_path / "run", tmp_path / "hf")
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert theirs.dtype == torch.float32 and not any(info.values()), info
    assert_same_logits(ours, theirs)
    again = GPT.load(convert("from-hf", directory, tmp_path / "again"))
    assert dataclasses.replace(again.config, precision="fp32") == ours.config
    for name, p in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
    assert again.run["tokenizer_hash"] == ours.run["tokenizer_hash"]


def test_fields_that_are_missing_or_change_no_logit(tmp_path):
    theirs = their_model("llama", rope_theta=1e4, tie_word_embeddings=False)
    gone = "rope_parameters", "head_dim", "mlp_bias", "attention_bias", "tie_word_embeddings"
    more = {  # as SmolLM2 has them
        "is_llama_config": True, "rope_interleaved": False, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "pretraining_tp": 1,
    }  # fmt: skip
    directory = save_theirs(tmp_path / "hf", theirs, **dict.fromkeys(gone), **more)
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"  # Llamas of 2023 have these
    add_to(directory, {buffer: torch.ones(8)})
    ours = GPT.load(convert("from-hf", directory, tmp_path / "run"), precision="fp32")
    assert_same_logits(ours, theirs)


def test_a_tied_head_may_be_in_the_file_too_if_it_is_the_same(tmp_path):
    theirs = their_model("qwen3", tie_word_embeddings=True)
    directory = save_theirs(tmp_path / "hf", theirs)
    head = theirs.model.embed_tokens.weight.clone()
    add_to(directory, {"lm_head.weight": head})
    ours = GPT.load(convert("from-hf", directory, tmp_path / "run"), precision="fp32")
    assert_same_logits(ours, theirs)
    head[0, 0] += 1
    add_to(directory, {"lm_head.weight": head})
    with pytest.raises(SystemExit, match=r"\Aerror: .*lm_head.weight is another\Z"):
        convert("from-hf", directory, tmp_path / "other")


def test_files_and_every_eos_survive_the_way_in_and_out(tmp_path):
    """And have the modes that the umask gives."""
    ends, before = [256, 3], os.umask(0o022)
    directory = save_theirs(tmp_path / "hf", their_model("llama"), eos_token_id=ends)
    generation = json.dumps({"eos_token_id": ends, "temperature": 0.6})
    (directory / "generation_config.json").write_text(generation)
    run = convert("from-hf", directory, tmp_path / "run")
    again = convert("to-hf", run, tmp_path / "again")
    os.umask(before)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (again / file).read_bytes() == (directory / file).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(again).generation_config.eos_token_id == ends
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == ends
    for path in (run, again, *run.rglob("*"), *again.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


@pytest.mark.parametrize("name", ["bytes", "plays"])
def test_an_exported_tokenizer_has_our_ids(name, tmp_path):
    directory = convert("to-hf", save_ours(tmp_path / "run", name), tmp_path / "hf")
    theirs, encoding = AutoTokenizer.from_pretrained(directory), get_encoding(name)
    ids = encoding.encode(TEXT + EOT, allowed_special="all")
    assert theirs(TEXT + EOT)["input_ids"] == ids and theirs.decode(ids) == TEXT + EOT
    assert theirs.bos_token_id == theirs.eos_token_id == encoding.eot_token
    assert len(theirs) == encoding.n_vocab
    assert AutoConfig.from_pretrained(directory).eos_token_id == encoding.eot_token


def test_a_llama_gets_its_bos_and_continues_as_transformers_does(tmp_path):
    letters = [chr(c) for c in range(97, 123)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, "▁t"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab, [("▁", "t")], add_bos_token=True)
    theirs = their_model("llama")
    directory = save_theirs(tmp_path / "hf", theirs)
    tokenizer.save_pretrained(directory)
    ours = GPT.load(convert("from-hf", directory, tmp_path / "run"), precision="fp32")
    encoding = encoding_of(ours.run["folder"], ours.run["tokenizer"], ours.run["tokenizer_hash"])
    for text in ("to be or naïve", ""):
        prompt = prompt_ids(encoding, text)
        batch = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
        assert prompt == batch["input_ids"][0].tolist() and prompt[0] == 1
        expected = theirs.generate(**batch, do_sample=False, max_new_tokens=8, eos_token_id=None)
        assert torch.equal(ours.generate(torch.tensor([prompt]), 8, temperature=0), expected)


# GGUF files.

PIECES = [*BYTE, "Ġt", "he", "Ġthe", *(f"<extra_{i}>" for i in range(59)), "<|end|>", "<|start|>"]


def write_gguf(file, model, tensors=(), **more):
    """A model of transformers as llama.cpp's converter writes it, the embedding in Q8_0, the other
    matrices in Q4_1. tensors, more: names of tensors, and metadata, to add."""
    config, family = model.config, model.config.model_type
    writer = GGUFWriter(file, family)
    metadata = {
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": config.head_dim,
        f"{family}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 319,
        "tokenizer.ggml.eos_token_id": 318,
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[bool] = writer.add_bool
    for name, value in (metadata | more).items():
        add[type(value)](name, value)
    writer.add_token_list(PIECES)
    writer.add_token_types([1] * 259 + [5] * 59 + [3] * 2)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    stems = {theirs: stem for stem, theirs in hf.GGUF_NAMES.items()}
    for name, p in model.state_dict().items():
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        prefix = f"blk.{block}." if "layers" in name else ""
        stem, end = (rest if prefix else name).rsplit(".", 1)
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        values, kind = p.numpy(), F32
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):  # llama.cpp's permutation
            pairs = values.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if p.ndim == 2:
            kind = Q8_0 if "embed" in stem else Q4_1
        tensor = quantize(values, kind)
        writer.add_tensor(f"{prefix}{stems[stem]}.{end}", tensor, raw_dtype=kind)
    for name in tensors:
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_gguf_file_has_the_weights_and_logits_that_transformers_reads(family, tied, tmp_path):
    theirs = their_model(family, tie_word_embeddings=tied)
    file = write_gguf(tmp_path / "model.gguf", theirs)
    ours = GPT.load(convert("from-hf", file, tmp_path / "run"), precision="fp32")
    state = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    for name, w in hf.to_transformers(ours).items():
        assert torch.equal(w, state[name]), name
    theirs.load_state_dict(state, strict=False)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    ("pre", "split", "bos"),
    [("default", ["Ġ", "Ġ12"], []), ("smollm", ["ĠĠ", "1", "2"], []), ("default", None, [319])],
)
def test_a_gguf_files_tokenizer(pre, split, bos, tmp_path):
    more = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": bool(bos)}
    file = write_gguf(tmp_path / "model.gguf", their_model("llama"), **more)
    directory = convert("to-hf", convert("from-hf", file, tmp_path / "run"), tmp_path / "hf")
    tokenizer, encoding = AutoTokenizer.from_pretrained(directory), get_encoding(tmp_path / "run")
    assert tokenizer.eos_token == "<|end|>" and len(tokenizer) == encoding.n_vocab == 320
    text = "at the\n\n  12 naïve<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text and ids[-1] == 318 and ids == encoding.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == ["a", "t", "Ġthe", "Ċ"]
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  12")
    assert split in (None, [piece for piece, _ in pieces])
    assert tokenizer.encode(text) == prompt_ids(encoding, text) == bos + ids


# NVFP4 directories.


K_AND_V_IN_ONE_BLOCK = {"head_dim": 8, "n_kv_head": 1}
NVFP4_OURS = [*OURS, K_AND_V_IN_ONE_BLOCK, {"precision": "fp4_1d"}, {"bf16_blocks": 1}]


@pytest.mark.parametrize("changes", NVFP4_OURS, ids=str)
def test_an_nvfp4_directory_decodes_to_our_rounded_weights(changes, tmp_path, monkeypatch):
    # compressed-tensors decodes into BF16, which is not exact
    exact = functools.partial(base.unpack_fp4_from_uint8, dtype=torch.float32)
    monkeypatch.setattr(base, "unpack_fp4_from_uint8", exact)
    run = save_ours(tmp_path / "run", **changes)
    directory = convert("to-nvfp4", run, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = fp4.convert(GPT.load(run), "fp32", keep="head")
    block = (1, 16) if "precision" in changes else (16, 16)
    for layer in ours.blocks[: 2 - changes.get("bf16_blocks", 0)].modules():
        if isinstance(layer, fp4.FP4Linear):
            layer.weight.data = fp4.quantize(layer.weight, block).dequantize()
    assert_same_logits(ours, theirs)


# Stored means.

STORABLE = "fp4", "fp4_mean", "fp4_project", "fp4_project_1d", "fp4_mean_1d", "fp4_hadamard"


def tokens_with_a_mean(count, features=64):
    mean = 3 * torch.randn(features, generator=torch.Generator().manual_seed(0))
    return torch.randn(count, features, generator=torch.Generator().manual_seed(1)) + mean


def one_layer(recipe="fp4_mean"):
    torch.manual_seed(2)
    return torch.nn.Sequential(fp4.FP4Linear(64, 48, recipe=recipe))


@pytest.mark.parametrize("recipe", STORABLE)
def test_a_layer_is_its_formula(recipe):
    """With the mean of all calibration text and twice its largest residual, on other text."""
    model, every = one_layer(recipe), tokens_with_a_mean(167)
    w, bias = model[0].weight.clone(), model[0].bias
    seen, x = every[:160], every[160:]
    assert calibrate(model, (part for part in seen.view(4, 40, 64))) == 1  # a generator, read twice
    mean = seen.mean(0, keepdim=True)
    u = mean / mean.norm()

    def split(x):  # what is kept out of the rounding
        if "project" in recipe:
            return (x @ u.t()) * u
        return mean.expand_as(x) * ("mean" in recipe)

    amax = 2 * (seen - split(seen)).abs().max()
    w4 = fp4.quantize(w, (1, 16) if recipe.endswith("1d") else (16, 16)).dequantize()
    with_amax = torch.cat([x - split(x), amax.expand(1, 64)])  # a row that sets the tensor's scale
    r4 = fp4.quantize(with_amax).dequantize()[:-1]
    # a mean of batches' sums is another sum, and may move a value to the next code
    assert relative(model(x), r4 @ w4.t() + split(x) @ w.t() + bias) < 1e-2
    torch.testing.assert_close(model[0].amax, amax, rtol=1e-5, atol=0)


@pytest.mark.parametrize("recipe", STORABLE)
def test_tokens_one_by_one_have_the_logits_of_the_whole_text(recipe, tmp_path):
    """In training a token's rounding depends on its batch. With stored means it does not."""
    model = GPT.load(save_ours(tmp_path / "run"), precision=recipe)
    write_dataset(tmp_path / "data", BYTES, {"train": encode(BYTES, [TEXT * 40])})
    ids, before = TOKENS[:, :8], model(TOKENS[:, :8])
    assert calibrate_on(model, load(tmp_path / "data", "train")) == 8
    whole, cache = model(ids), [[], []]
    steps = [model(ids[:, t : t + 1], cache=cache, start=t) for t in range(8)]
    assert relative(torch.cat(steps, 1), whole) < 1e-5
    assert 0 < relative(whole, before) < 0.6
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("recipe", ["fp4_mean", "fp4_project_1d"])
def test_the_kernels_multiply_as_plain_pytorch_does(recipe, monkeypatch):
    model, x = one_layer(recipe), tokens_with_a_mean(23)
    calibrate(model, [x])
    want = model(x)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(fp4, "KERNELS", device)
    model.to(device)
    for rows in (slice(None), slice(5, 6)):
        assert relative(model(x[rows].to(device)).cpu(), want[rows]) < 1e-5


def test_what_no_constant_can_stand_for_stays():
    variants = "svd", "mean_row_bf16", "mean_row_weight", "mean_sr", "mean_massive"
    for recipe in ("bf16", *(f"fp4_{variant}" for variant in variants)):
        model = one_layer(recipe)
        assert calibrate(model, [tokens_with_a_mean(9)]) == 0 and model[0].recipe == recipe
    model = one_layer()
    model[0].unused = fp4.FP4Linear(64, 48)
    assert calibrate(model, [tokens_with_a_mean(9)]) == 1
    assert type(model[0].unused) is fp4.FP4Linear


def test_only_what_a_constant_can_stand_for_is_stored():
    assert split_of("fp4_mean") == ("mean", (16, 16)) and split_of("fp4_1d") == ("none", (1, 16))
    assert split_of("fp4_project_1d") == ("project", (1, 16))
    changed = "svd", "mean_paper", "project_massive", "lowrank", "project_1d_46", "authors_mean"
    assert [split_of(f"fp4_{name}") for name in changed] == [None] * 6


def test_stored_means_can_be_pickled_and_refuse_what_would_leave_them_behind():
    model, x = one_layer(), tokens_with_a_mean(8)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, [x.index_fill(0, torch.tensor([3]), float("nan"))])
    assert type(model[0]) is fp4.FP4Linear
    calibrate(model, [x])
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        model(x)
    with pytest.raises(RuntimeError, match=r"\A.*load, then calibrate\Z"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(TypeError, match="cast the model before"):
        model.bfloat16()(x)


# What is refused, in one line, and nothing is written.

DIRECTORIES = {  # fields of a Llama's config.json: a part of the message
    "model_type is 'gemma2', our GPT has only llama, qwen2, qwen3": {"model_type": "gemma2"},
    "no attention_bias True": {"attention_bias": True},
    "no hidden_act 'gelu'": {"hidden_act": "gelu"},
    "no rope_scaling": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "no rope_parameters": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "no sliding_window 64": {"sliding_window": 64},
    "no layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    "no logit_softcap 30.0": {"logit_softcap": 30.0},
    "another shape: lm_head.weight": {"tie_word_embeddings": False},
    "tokenizer has 257 tokens, its embedding 256 rows": {"vocab_size": 256},
}
GGUF = {  # metadata, or names of tensors
    "no rope.scaling.type 'yarn'": {"llama.rope.scaling.type": "yarn"},
    "no rope.dimension_count 8 of its own": {"llama.rope.dimension_count": 8},
    "no expert_count 4": {"llama.expert_count": 4},
    "no tensor rope_freqs.weight": {"tensors": ["rope_freqs.weight"]},
    "another shape: model.layers.0.self_attn.q_proj.bias": {"tensors": ["blk.0.attn_q.bias"]},
    "tokenizer.ggml.pre 'tekken-2' is unknown": {"tokenizer.ggml.pre": "tekken-2"},
}


@pytest.mark.parametrize("message", [*DIRECTORIES, *GGUF])
def test_a_model_with_more_than_our_gpt_has_is_refused_by_name(message, tmp_path):
    theirs = their_model("llama", tie_word_embeddings=True)
    if message in GGUF:
        source = write_gguf(tmp_path / "model.gguf", theirs, **GGUF[message])
    else:
        source = save_theirs(tmp_path / "hf", theirs, **DIRECTORIES[message])
    with pytest.raises(SystemExit, match=rf"\Aerror: .*{re.escape(message)}.*\Z"):
        convert("from-hf", source, tmp_path / "new")
    assert list(tmp_path.iterdir()) == [source]


def test_what_the_command_line_refuses(tmp_path, monkeypatch):
    run, odd = save_ours(tmp_path / "run"), save_ours(tmp_path / "odd", qkv_bias=True)
    refusals = {
        "is there already. HINT": ["to-hf", run, odd],
        "there is no": ["to-hf", tmp_path / "nowhere", tmp_path / "x"],
        "is none of llama, qwen2, qwen3": ["to-hf", odd, tmp_path / "x"],
    }
    for message, argv in refusals.items():
        with pytest.raises(SystemExit, match=rf"\Aerror: .*{message}.*\Z"):
            convert(*argv)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "run"]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match=r"\Aerror: .*HINT: pip install -r requirements-dev.txt"):
        convert("to-nvfp4", run, tmp_path / "x")
