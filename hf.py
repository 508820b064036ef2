"""A run as a Hugging Face Qwen3ForCausalLM directory, and such a directory as a run.

    python export.py to-hf out/nano-fp4_mean hf/nano
    python export.py from-hf hf/nano out/nano-again

What to-hf writes (config.json, model.safetensors, a tokenizer) loads without this project:
AutoModelForCausalLM.from_pretrained("hf/nano"). Weights are the FP32 master weights, bit for bit,
and transformers multiplies them unquantized, like our precision fp32. nanofp4.json beside them is
the run's own config, for the way back.

What from-hf writes is a run at step 0: sample.py takes it, and train.py --resume, with new moments.
A model that was not ours comes without one of our tokenizers, so neither does then.

to-hf needs transformers, for the tokenizer: requirements-dev.txt.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.shards import DataError
from data.vocab import EOT, PATTERN
from model import GPT, ModelConfig
from sample import encoding_of, load_model
from train import CHECKPOINT_FORMAT, Config, RunError, make_optimizer, read_config, save

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


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from None


def load_hf(directory, precision="bf16", device="cpu"):
    """A Qwen3ForCausalLM's directory -> (GPT of that precision, config.json as a dict).

    Weights come from model.safetensors, or from the shards of model.safetensors.index.json; FP32,
    BF16 or FP16 there, FP32 here. RunError where a file is missing or broken, and for what our GPT
    cannot express.
    """
    directory = Path(directory)
    about = read_json(directory / "config.json")
    for name, due in FIXED.items():
        if about.get(name, due) != due:
            raise RunError(f"{directory}: {name} is {about[name]!r}, our GPT has only {due!r}")
    key = "rope_parameters" if about.get("rope_parameters") else "rope_scaling"  # v5's, and before
    rope = {"rope_theta": about.get("rope_theta"), "rope_type": "default", **(about.get(key) or {})}
    theta = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        raise RunError(f"{directory}: {key} is {about[key]!r}, our GPT has only rope_theta")
    values = {"tie_word_embeddings": False, **about, "rope_theta": theta}
    missing = [name for name in FIELDS.values() if values.get(name) is None]
    if missing:
        raise RunError(f"{directory}/config.json has no {', '.join(missing)}")
    shape = {ours: values[name] for ours, name in FIELDS.items()}
    model = GPT(ModelConfig(precision=precision, **shape))

    files, theirs = ["model.safetensors"], {}
    if (directory / "model.safetensors.index.json").exists():
        index = read_json(directory / "model.safetensors.index.json")
        files = sorted(set(index["weight_map"].values()))
    for file in files:
        try:
            theirs |= load_file(directory / file)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot read {directory / file}: {error}") from None
    if model.config.tied:
        theirs.pop("lm_head.weight", None)  # some files have it twice
    due = {name: t.shape for name, t in to_qwen3(model.state_dict(), model.config).items()}
    odd = due.items() ^ {name: t.shape for name, t in theirs.items()}.items()
    if odd:
        raise RunError(f"{directory}: missing, unknown or of another shape: {min(odd)[0]}")
    model.load_state_dict(from_qwen3(theirs, model.config))  # into FP32
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
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    (directory / "nanofp4.json").write_text(json.dumps(config, indent=2) + "\n")


def from_hf(directory, out_dir):
    """Write a Hugging Face directory as a run: its own if it came from one, else a bf16 one."""
    model, _ = load_hf(directory)
    own = directory / "nanofp4.json"
    run = read_config(own) if own.exists() else {"precision": "bf16", "dataset": ""}
    shape = {name: getattr(model.config, name) for name in FIELDS}
    config = Config(**{**run, **shape, "out_dir": str(out_dir)})
    state = {
        "format": CHECKPOINT_FORMAT,
        "step": 0,
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
        "optimizer": make_optimizer(model, config).state_dict(),
    }
    out_dir.mkdir(parents=True)
    save(out_dir / "checkpoint.pt", state)
    (out_dir / "config.json").write_text(json.dumps(state["config"], indent=2) + "\n")
    (out_dir / "metrics.jsonl").touch()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("direction", choices=["to-hf", "from-hf"])
    parser.add_argument("source", type=Path, help="to-hf: a run's folder; from-hf: a directory")
    parser.add_argument("target", type=Path, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    if args.target.exists():
        raise RunError(f"{args.target} is there already. HINT: name another folder")
    {"to-hf": to_hf, "from-hf": from_hf}[args.direction](args.source, args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    try:
        main()
    except (RunError, DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}. HINT: pip install -r requirements-dev.txt")
