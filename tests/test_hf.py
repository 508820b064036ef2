"""Hugging Face directories against transformers, ids against tiktoken, and what is refused."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiktoken_ext.openai_public import r50k_pat_str
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fp4
import hf
import train
from checkpoint import CHECKPOINT_FORMAT, encoding_of, load_model, read_checkpoint, save
from cli import UserError
from data.shards import write_dataset
from data.vocab import EOT, PATTERN, encode, get_encoding
from model import GPT, ModelConfig
from run import Config

BYTES, PLAYS = get_encoding("bytes"), get_encoding("plays")
TOKENS = torch.randint(4096, (3, 32), generator=torch.Generator().manual_seed(0))
QWEN3 = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.2,
}


def save_run(out, encoding=PLAYS, **changes):
    """A run of a tiny model with random weights, as train.py leaves it; returns its folder."""
    tokens = encode(encoding, ["It was the nightingale, and not the lark. " * 40])
    write_dataset(out / "data", encoding, {"train": tokens, "val": tokens})
    config = Config(**{
        "precision": "fp4_mean", "vocab_size": -(-encoding.n_vocab // 64) * 64, "block_size": 32,
        "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "dim": 48, "ffn_dim": 80,
        "batch_size": 2, "eval_windows": 2, "max_steps": 2, "dataset": str(out / "data"),
        "rope_theta": 5e5, "norm_eps": 1e-3, **changes,
    })  # fmt: skip
    model = GPT(config, torch.Generator().manual_seed(1))
    for p in model.parameters():  # so that logits spread, and norms are not all ones
        p.data = p.data * 10 if p.ndim == 2 else p.data + torch.linspace(-0.5, 0.5, len(p))
    state = {"format": CHECKPOINT_FORMAT, "step": 7, "optimizer": None}
    state["config"] = dataclasses.asdict(config)
    save(out / "checkpoint.pt", {**state, "model": model.state_dict()})
    return out


@pytest.fixture(
    scope="module",
    params=[
        {"tied": True},
        {"tied": False},
        {"qk_norm": False, "rope_factor": 8.0},
        {"qk_norm": False, "qkv_bias": True},
    ],
    ids=["tied", "untied", "llama", "qwen2"],
)
def exported(request, tmp_path_factory):
    """(run, its Hugging Face directory). Read only."""
    run = save_run(tmp_path_factory.mktemp("run"), **request.param)
    hf.main(["to-hf", str(run), str(run / "hf")])
    return run, run / "hf"


def foreign(family, **changes):
    """A small model of transformers whose vectors are not all ones or zeros."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**QWEN3, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        p.data += torch.linspace(-0.5, 0.5, len(p)) if p.ndim == 1 else 0
    return model


@pytest.fixture
def qwen3(tmp_path):
    """The directory of a small Qwen3 that transformers wrote, in one file."""
    foreign("qwen3").save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


@pytest.fixture
def llama(tmp_path):
    """The like of a Llama, whose config.json says as little as Llama 2's."""
    foreign("llama", head_dim=8).save_pretrained(tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    about = json.loads(config.read_text())
    for name in ("head_dim", "rope_parameters", "tie_word_embeddings", "attention_bias"):
        del about[name]
    config.write_text(json.dumps(about))
    return tmp_path / "llama"


def change(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same_logits(ours, theirs, tokens):
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)


def test_transformers_has_the_logits_of_a_run(exported):
    run, directory = exported
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert theirs.dtype == torch.float32 and not any(info.values()), info
    ours, config = load_model(run, precision="fp32")
    family = "qwen3" if config["qk_norm"] else "qwen2" if config["qkv_bias"] else "llama"
    assert type(theirs).__name__ == family.capitalize() + "ForCausalLM"
    assert_same_logits(ours, theirs, TOKENS)


def test_there_and_back_is_the_same_run(exported, tmp_path):
    run, directory = exported
    hf.main(["from-hf", str(directory), str(tmp_path / "run")])
    old, new = (read_checkpoint(path / "checkpoint.pt") for path in (run, tmp_path / "run"))
    assert new["config"] == {**old["config"], "out_dir": str(tmp_path / "run")}
    assert (
        new["step"] == 0 and new["optimizer"] is None and new["model"].keys() == old["model"].keys()
    )
    assert all(torch.equal(new["model"][k], old["model"][k]) for k in old["model"])


def test_a_run_from_there_trains_on(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(fp4, "fuse", lambda: "plain passes")
    out = tmp_path / "run"
    hf.main(["from-hf", str(exported[1]), str(out)])
    start = read_checkpoint(out / "checkpoint.pt")["model"]
    train.main(["--resume", "--out-dir", str(out), "--device", "cpu"])
    end = read_checkpoint(out / "checkpoint.pt")
    assert end["step"] == 2 and (out / "loss.png").exists()
    drift = (end["model"]["norm.weight"] - start["norm.weight"]).abs().max()
    assert 0 < drift < 0.01  # a few steps of AdamW from there, not from an initialization


def test_switches_that_no_family_has_are_one_line(tmp_path):
    run = save_run(tmp_path / "run", qkv_bias=True)
    with pytest.raises(UserError, match=r"\A.*qk_norm.*qkv_bias.* none of qwen3, llama, qwen2\Z"):
        hf.main(["to-hf", str(run), str(tmp_path / "hf")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_sharded_foreign_model_has_transformers_logits(family, tied, dtype, tmp_path):
    torch.manual_seed(0)
    theirs = foreign(family, tie_word_embeddings=tied)
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours, about = hf.load_hf(tmp_path, "fp32")
    assert about["max_position_embeddings"] == ours.config.block_size == 32
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert_same_logits(
        ours, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), TOKENS % 97
    )


def test_configs_from_before_transformers_5(qwen3):
    expected = hf.load_hf(qwen3, "fp32")[0](TOKENS % 97)
    about = json.loads((qwen3 / "config.json").read_text())
    del about["rope_parameters"], about["tie_word_embeddings"]
    (qwen3 / "config.json").write_text(json.dumps(about))
    change(qwen3, rope_theta=1000000, rope_scaling=None)
    assert torch.equal(hf.load_hf(qwen3, "fp32")[0](TOKENS % 97), expected)


def test_a_tied_head_may_be_in_the_file_too(qwen3):
    weights = load_file(qwen3 / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, qwen3 / "model.safetensors")
    change(qwen3, tie_word_embeddings=True)
    model = hf.load_hf(qwen3)[0]
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"attention_bias": True},
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "linear"}},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        {"head_dim": None},
    ],
    ids=str,
)
def test_what_our_model_cannot_express_is_refused_by_name(qwen3, values):
    change(qwen3, **values)
    with pytest.raises(UserError, match=list(values)[-1]):
        hf.load_hf(qwen3)


ROPE = {**hf.LLAMA3, "factor": 8.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    "values",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {**ROPE, "original_max_position_embeddings": 4096}},
        {"rope_scaling": {**ROPE, "high_freq_factor": 2.0}},
        {"rope_scaling": {**ROPE, "factor": None}, "factor": 0},
        {"rope_scaling": {**ROPE, "factor": "8"}, "factor": 0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_our_llama_cannot_express_is_refused_by_name(llama, values):
    change(llama, **values)
    with pytest.raises(UserError, match=rf"\A.*config\.json.* {list(values)[-1]}\b.*\Z"):
        hf.load_hf(llama)


@pytest.mark.parametrize("kind", ["gemma2", None, ["llama"], 3], ids=str)
def test_another_model_type_is_told_those_that_work(llama, kind):
    change(llama, model_type=kind)
    with pytest.raises(UserError, match=r"\A.* model_type is .* qwen3, llama, qwen2\Z"):
        hf.load_hf(llama)


def test_a_llama_may_leave_its_defaults_to_transformers(llama):
    ours, _ = hf.load_hf(llama, "fp32")
    assert ours.config.head_dim == 8 and ours.config.rope_theta == 10000 and not ours.config.tied
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert_same_logits(ours, theirs, TOKENS % 97)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_llama_3s_scaling_is_read_from_both_places(llama, name):
    change(llama, **{name: ROPE})
    config = hf.load_hf(llama)[0].config
    assert (config.rope_theta, config.rope_factor) == (5e5, 8.0)


def test_the_architecture_is_all_of_a_config_but_the_recipe(llama):
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert hf.read_architecture(llama).keys() == fields - {"precision", "bf16_blocks", "added_mean"}


def test_widths_no_multiple_of_16_need_a_high_precision(tmp_path):
    foreign("llama", hidden_size=36).save_pretrained(tmp_path)
    hf.load_hf(tmp_path, "bf16")
    with pytest.raises(UserError, match=r"\A.*config\.json: .*\(36, .* multiples of 16.*\Z"):
        hf.load_hf(tmp_path, "fp4_mean")


def test_a_directory_is_told_from_a_run(qwen3, tmp_path):
    hf.main(["from-hf", str(qwen3), str(tmp_path / "run")])
    assert hf.is_hf(qwen3) and hf.is_hf(str(qwen3))
    for other in (tmp_path / "run", tmp_path, qwen3 / "config.json", tmp_path / "nowhere"):
        assert not hf.is_hf(other)
    (qwen3 / "config.json").write_text((qwen3 / "config.json").read_text()[:-9])
    assert hf.is_hf(qwen3)  # and load_hf says what is wrong with it


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", "four"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 0),
        ("num_attention_heads", [6]),
        ("num_key_value_heads", 6.0),
        ("num_key_value_heads", {}),
        ("head_dim", -16),
        ("hidden_size", 48.5),
        ("intermediate_size", "80"),
        ("vocab_size", 0),
        ("vocab_size", False),
        ("max_position_embeddings", "32"),
        ("tie_word_embeddings", "no"),
        ("tie_word_embeddings", 1),
        ("rms_norm_eps", "1e-3"),
        ("rms_norm_eps", math.nan),
        ("rope_parameters", [1e6]),
        ("rope_parameters", "default"),
        ("rope_parameters", 0),
        ("rope_scaling", "linear"),
        ("architectures", 1),
        ("hidden_act", ["silu"]),
        ("model_type", None),
    ],
    ids=repr,
)
def test_a_value_of_another_type_is_one_line_with_file_and_field(qwen3, name, value):
    change(qwen3, **{name: value})
    with pytest.raises(UserError, match=rf"\A.*config\.json.* {name} .*\Z"):
        hf.load_hf(qwen3)


@pytest.mark.parametrize("theta", ["1e6", True, -1.0, math.inf, [1], None], ids=repr)
@pytest.mark.parametrize("before", [False, True])
def test_a_rope_theta_of_another_type_is_one_line(qwen3, before, theta):
    rope = {"rope_parameters": None} if before else {"rope_parameters": {"rope_theta": theta}}
    change(qwen3, rope_theta=theta, **rope)
    with pytest.raises(UserError, match=r"\A.*config\.json.* rope_theta\b.*\Z"):
        hf.load_hf(qwen3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_key_value_heads": 4}, "config.json: bad head split"),
        ({"head_dim": 15}, "config.json: bad head split"),
        ({"vocab_size": 10**12}, "another shape: lm_head"),
        ({"vocab_size": 10**18}, "config.json: sizes beyond"),
        ({"hidden_size": 10**30}, "config.json: sizes beyond"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_one_line_and_take_no_memory(qwen3, values, message):
    change(qwen3, **values)
    with pytest.raises(UserError, match=rf"\A.*{message}.*\Z"):
        hf.load_hf(qwen3)


@pytest.mark.parametrize("text", ["[]", '"config"', "4", "null"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "nanofp4.json"])
def test_a_json_file_that_is_no_object_is_named(qwen3, tmp_path, file, text):
    (qwen3 / file).write_text(text)
    with pytest.raises(UserError, match=rf"\A.*{file} is not a JSON object\Z"):
        hf.main(["from-hf", str(qwen3), str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_byte_order_mark_is_no_part_of_json(qwen3):
    file = qwen3 / "config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert hf.load_hf(qwen3)[0].config.n_layer == 2


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": None}, {"weight_map": ["model.safetensors"]}]
    + [{"weight_map": {"norm.weight": file}} for file in (4, None, ["x.safetensors"], "", "..")],
    ids=str,
)
def test_an_index_without_file_names_is_one_line(qwen3, index):
    (qwen3 / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\A.*model\.safetensors\.index\.json: weight_map .*\Z"):
        hf.load_hf(qwen3)


@pytest.mark.parametrize(
    "there", ["../x.safetensors", "{}/x.safetensors", "a.safetensors/../../x.safetensors"]
)
def test_an_index_reads_nothing_outside_its_folder(qwen3, there, monkeypatch):
    (qwen3 / "a.safetensors").mkdir()
    (qwen3 / "model.safetensors").rename(qwen3.parent / "x.safetensors")
    table = {"weight_map": {"model.norm.weight": there.format(qwen3.parent)}}
    (qwen3 / "model.safetensors.index.json").write_text(json.dumps(table))
    monkeypatch.setattr(hf, "load_file", lambda path: pytest.fail(f"reads {path}"))
    with pytest.raises(UserError, match=r"index\.json: weight_map names .*x\.safetensors"):
        hf.load_hf(qwen3)


def without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


V, Q = (f"model.layers.1.self_attn.{x}_proj" for x in "vq")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        (f"{V}.weight", lambda w: without(w, f"{V}.weight")),
        (f"{Q}.bias", lambda w: w | {f"{Q}.bias": torch.ones(96)}),
        (f"{V}.weight", lambda w: w | {f"{V}.weight": torch.ones(48, 47)}),
        ("lm_head.weight", lambda w: without(w, "lm_head.weight")),
    ],
    ids=["missing", "unknown", "misshapen", "headless"],
)
def test_weights_that_are_not_those_of_the_config_are_refused(qwen3, name, spoil):
    file = qwen3 / "model.safetensors"
    save_file(spoil(load_file(file)), file)
    with pytest.raises(UserError, match=name):
        hf.load_hf(qwen3)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_and_broken_files_are_named(qwen3, file):
    whole = (qwen3 / file).read_bytes()
    (qwen3 / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=file):
        hf.load_hf(qwen3)
    (qwen3 / file).unlink()
    with pytest.raises(UserError, match=file):
        hf.load_hf(qwen3)


def test_a_foreign_model_becomes_a_run_without_text(qwen3, tmp_path):
    hf.main(["from-hf", str(qwen3), str(tmp_path / "run")])
    model, config = load_model(tmp_path / "run", precision="fp32")
    assert torch.equal(model(TOKENS % 97), hf.load_hf(qwen3, "fp32")[0](TOKENS % 97))
    with pytest.raises(UserError, match="tokenizer"):
        encoding_of(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp5"}, "precision 'fp5' is not one of"),
        ({"precision": 4}, "precision 4 is no str"),
        ({"seed": True}, "seed True is no int"),
        ({"batch_size": 0}, "batch_size 0 is not a finite number above 0"),
        ({"bf16_blocks": 3}, "bf16_blocks 3 is more than n_layer 2"),
        ({"colour": "red"}, "unknown name 'colour'"),
    ],
    ids=str,
)
def test_a_config_of_ours_that_cannot_work_is_one_line(qwen3, tmp_path, values, message):
    (qwen3 / "nanofp4.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"\A.*nanofp4\.json: {message}.*\Z"):
        hf.main(["from-hf", str(qwen3), str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line(exported, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(UserError, match=r"\Acannot save .*model\.safetensors: .*No space.*\Z"):
        hf.main(["to-hf", str(exported[0]), str(tmp_path / "hf")])
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_nothing_is_overwritten(tmp_path):
    (tmp_path / "here").mkdir()
    argv = [sys.executable, "hf.py", "from-hf", str(tmp_path), str(tmp_path / "here")]
    done = subprocess.run(argv, cwd=Path(hf.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "is there already" in done.stderr
    assert not any((tmp_path / "here").iterdir())


@pytest.fixture(scope="module", params=[BYTES, PLAYS], ids=["bytes", "plays"])
def tokenizers(request, tmp_path_factory):
    """(tiktoken's encoding, transformers' tokenizer) of one name."""
    run = save_run(tmp_path_factory.mktemp("run"), request.param)
    hf.main(["to-hf", str(run), str(run / "hf")])
    for part in ("model.safetensors", "nanofp4.json"):
        (run / "hf" / part).unlink()
    return request.param, AutoTokenizer.from_pretrained(run / "hf")


GPT2 = tiktoken.Encoding(  # GPT-2's pattern in tiktoken's words; its ranks would be a download
    "gpt2", pat_str=r50k_pat_str, mergeable_ranks=PLAYS._mergeable_ranks, special_tokens={EOT: 4095}
)
PIECES = [t.decode() for i in range(4095) if (t := PLAYS.decode_single_token_bytes(i)).isascii()]


@given(st.lists(st.text(max_size=4) | st.sampled_from([EOT, *PIECES])).map("".join))
@example("They'll  say 'tis\n\n\n1599'S the\u00a0year... \t\u2014 o'er naïve\r\n  café 漢字 🎭 ")
@settings(deadline=None, max_examples=300)
def test_transformers_has_tiktokens_ids(tokenizers, text):
    encoding, theirs = tokenizers
    ids = encoding.encode(text, allowed_special="all")
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    if encoding is PLAYS:
        assert GPT2.encode(text, allowed_special="all") == ids


def test_the_pattern_is_gpt2s_also_where_no_token_of_ours_depends_on_it(exported):
    written = json.loads((exported[1] / "tokenizer.json").read_text())
    assert written["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": PATTERN}


def test_the_special_token_begins_and_ends_texts(tokenizers):
    encoding, theirs = tokenizers
    assert theirs.bos_token_id == theirs.eos_token_id == encoding.eot_token
    assert len(theirs) == encoding.n_vocab
