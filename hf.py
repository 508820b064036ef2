"""A run as a Hugging Face Qwen3ForCausalLM directory, and such a directory as a run.

    python hf.py to-hf out/nano-fp4_mean hf/nano
    python hf.py from-hf hf/nano out/nano-again

What to-hf writes (config.json, model.safetensors, a tokenizer) loads without this project:
AutoModelForCausalLM.from_pretrained("hf/nano"). Weights are the FP32 master weights, bit for bit,
and transformers multiplies them unquantized, like our precision fp32. nanofp4.json beside them is
the run's own config, for the way back.

What from-hf writes is a run at step 0: sample.py takes it, and train.py --resume, with new moments.
A model that was not ours comes without one of our tokenizers, so neither does then.

to-hf needs transformers, for the tokenizer: requirements-dev.txt.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli import Parser, UserError, is_a, script, why_not
from data.vocab import EOT, PATTERN
from model import GPT, ModelConfig
from run import CHECKPOINT_FORMAT, Config, encoding_of, load_model, read_config, read_json, save

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
FIXED = {  # the only values that our GPT can express
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
}
BLOCK = {  # our parameter: theirs, which it stacks
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention.out": ["self_attn.o_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "ffn.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn.down": ["mlp.down_proj"],
}


def names(config):
    """{our parameter: [theirs, which it stacks]} of a whole model."""
    head = "model.embed_tokens" if config.tied else "lm_head"
    table = {"embedding": ["model.embed_tokens"], "norm": ["model.norm"], "head": [head]}
    for i in range(config.n_layer):
        for ours, theirs in BLOCK.items():
            table[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return {f"{k}.weight": [f"{name}.weight" for name in v] for k, v in table.items()}


def from_qwen3(theirs, config):
    """A Qwen3ForCausalLM's state dict -> ours, in its dtype."""
    return {
        name: torch.cat([theirs[part] for part in parts]) for name, parts in names(config).items()
    }


def to_qwen3(ours, config):
    """Our state dict -> a Qwen3ForCausalLM's, views into ours. A tied head is left out."""
    heads = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    theirs = {}
    for name, parts in names(config).items():
        rows = heads if name.endswith("qkv.weight") else len(ours[name]) // len(parts)
        theirs |= zip(parts, ours[name].split(rows), strict=True)
    return theirs


def read_config_json(path, precision):
    """A Qwen3ForCausalLM's config.json -> (ModelConfig of that precision, the file as a dict).

    UserError, naming the field, for what is no such config or is more than our GPT can express.
    """
    about = read_json(path)
    for name, due in FIXED.items():
        if about.get(name, due) != due:
            raise UserError(f"{path}: {name} is {about[name]!r}, our GPT has only {due!r}")
    theta = about.get("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5's, and before
        rope = {} if about.get(name) is None else about[name]
        plain = isinstance(rope, dict) and not rope.keys() - {"rope_theta", "rope_type"}
        if not plain or rope.get("rope_type", "default") != "default":
            raise UserError(f"{path}: {name} is {rope!r}, our GPT has only rope_theta")
        theta = rope.get("rope_theta", theta)
    values = {"tie_word_embeddings": False, **about, "rope_theta": theta}
    missing = [name for name in FIELDS.values() if values.get(name) is None]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}")
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    for ours, name in FIELDS.items():
        value, kind = values[name], types[ours]
        if not is_a(value, kind):
            raise UserError(f"{path}: {name} {value!r} is no {kind.__name__}")
        if kind is not bool and (problem := why_not(value)):
            raise UserError(f"{path}: {name} {value} {problem}")
    shape = {ours: values[name] for ours, name in FIELDS.items()}
    return ModelConfig(precision=precision, **shape), about


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
    """A Qwen3ForCausalLM's directory -> (GPT of that precision, config.json as a dict).

    Weights come from model.safetensors, or from the shards of model.safetensors.index.json; FP32,
    BF16 or FP16 there, FP32 here. UserError where a file is missing or broken, and for what our
    GPT cannot express.
    """
    directory = Path(directory)
    path = directory / "config.json"
    config, about = read_config_json(path, precision)
    try:
        with torch.device("meta"):  # no memory yet for sizes that the weights may not have
            due = {k: t.shape for k, t in to_qwen3(GPT(config).state_dict(), config).items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except (RuntimeError, TypeError):
        raise UserError(f"{path}: sizes beyond those of any tensor") from None
    theirs = read_weights(directory)
    if config.tied:
        theirs.pop("lm_head.weight", None)  # some files have it twice
    odd = due.items() ^ {k: t.shape for k, t in theirs.items()}.items()
    if odd:
        raise UserError(f"{directory}: missing, unknown or of another shape: {min(odd)[0]}")
    model = GPT(config)
    model.load_state_dict(from_qwen3(theirs, config))  # into FP32
    return model.to(device).eval(), about


def to_hf(out_dir, directory):
    """Write a run's checkpoint as a Hugging Face directory, with its tokenizer."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    model, config = load_model(out_dir)
    encoding = encoding_of(config)
    converter = TikTokenConverter(pattern=PATTERN)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # no file, no stale cache
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=EOT, eos_token=EOT
    )
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), encoding.eot_token)
    shape = {theirs: config[ours] for ours, theirs in FIELDS.items()}
    about = FIXED | shape | ids | {"torch_dtype": "float32"}
    directory.mkdir(parents=True)
    tokenizer.save_pretrained(directory)
    weights = to_qwen3(model.state_dict(), model.config)
    try:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    except SafetensorError as error:  # also what the system refuses
        raise UserError(f"cannot save {directory}/model.safetensors: {error}") from None
    (directory / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    (directory / "nanofp4.json").write_text(json.dumps(config, indent=2) + "\n")


def from_hf(directory, out_dir):
    """Write a Hugging Face directory as a run: its own if it came from one, else a bf16 one."""
    model, _ = load_hf(directory)
    own = directory / "nanofp4.json"
    run = read_config(own) if own.exists() else {"precision": "bf16", "dataset": ""}
    shape = {name: getattr(model.config, name) for name in FIELDS}
    config = Config(**{**run, **shape, "out_dir": str(out_dir)})
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


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("direction", choices=["to-hf", "from-hf"])
    parser.add_argument("source", type=Path, help="to-hf: a run's folder; from-hf: a directory")
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    if args.target.exists():
        raise UserError(f"{args.target} is there already. HINT: name another folder")
    {"to-hf": to_hf, "from-hf": from_hf}[args.direction](args.source, args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    script(main)
