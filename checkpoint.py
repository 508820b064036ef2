"""A run's folder: checkpoints, metrics, and the models that come out of them or go in."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import torch

from cli import UserError, is_a
from data.shards import AUTOMATIC, load, prepare_if_missing
from data.vocab import default_out, get_encoding, token_bytes
from hf import is_hf, load_hf
from memory import local_part
from model import GPT, ModelConfig
from run import Config, check_values

CHECKPOINT_FORMAT = "nanofp4 checkpoint 1"
FREE_ON_RESUME = {
    "out_dir", "device", "compile", "shard", "recompute",
    "max_steps", "eval_interval", "log_interval", "keep",
}  # fmt: skip


def write_text(path, text):
    """Atomic, as `save`."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def save(path, state):
    """Atomic: the old checkpoint stays until the new one is whole and on disk."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot save {path}: {error}; the checkpoint before it stays") from None


def read_checkpoint(path, device="cpu", mmap=False):
    """A checkpoint of ours as a dict; nothing in it is executed. mmap: tensors are read when they
    are used. UserError for anything else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception:  # what a broken pickle raises has no common type
        raise UserError(f"{path} is cut short or not a checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    kinds = {"step": int, "config": dict, "model": dict, "optimizer": (dict, type(None))}
    for name, kind in kinds.items():
        if not isinstance(state.get(name, ...), kind):
            raise UserError(f"{path} has no {name}, or none that fits")
    defaults = dataclasses.asdict(Config())  # for knobs that are younger than the checkpoint
    state["config"] = defaults | check_values(path, state["config"])
    return state


def load_weights(path, state, model):
    """The weights of a checkpoint into a model of its config, sharded or not; UserError if they do
    not fit."""
    have = model.state_dict()
    try:
        model.load_state_dict({k: local_part(v, have.get(k)) for k, v in state["model"].items()})
    except (RuntimeError, TypeError):
        raise UserError(f"{path}: its weights do not fit its config") from None


def read_metrics(folder):
    """The records of a run's metrics.jsonl: what is damaged, or torn by a kill, is left out."""
    path, records = Path(folder) / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            numbers = isinstance(record, dict) and all(is_a(v, float) for v in record.values())
            if numbers and "step" in record:
                records.append(record)
    return records


def load_model(path, device="cpu", precision=None):
    """The model of a run's folder, of one checkpoint or of a Hugging Face directory, in its own
    (a directory's: bf16) or another precision, in evaluation mode, and the run's config as a dict;
    a directory's is that of a run that starts from it, without a dataset."""
    path = Path(path)
    if is_hf(path):
        model, _ = load_hf(path, precision or "bf16", device)
        shape = dataclasses.asdict(model.config)
        return model, dataclasses.asdict(Config(**shape, dataset="", init=str(path.resolve())))
    state = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, device)
    config = ModelConfig(
        **{f.name: state["config"][f.name] for f in dataclasses.fields(ModelConfig)}
    )
    config.precision = precision or config.precision
    config.check()
    model = GPT(config).to(device)
    load_weights(path, state, model)
    return model.eval(), state["config"]


def encoding_of(config):
    """The encoding (data/vocab.py) of the dataset in a run's config, or of its Hugging Face
    directory; UserError for a model that came without one."""
    if config["dataset"]:
        return get_encoding(load(config["dataset"], "val").tokenizer)
    if config["init"]:
        return get_encoding(config["init"])
    raise UserError("this model came from elsewhere, and its tokenizer is none of ours")


def check_tokenizer(origin, dataset, tokens):
    """UserError if a dataset's Tokens are of another tokenizer than the model's whose config
    `load_model` gave, if that has one."""
    try:
        encoding = encoding_of(origin)
    except UserError:
        return
    if token_bytes(encoding) != token_bytes(get_encoding(tokens.tokenizer)):
        name = dataset if dataset in AUTOMATIC else "shakespeare"
        out = default_out(f"data/{name}/prepare.py", encoding.name).name
        raise UserError(
            f"{dataset} has tokens of {tokens.tokenizer}, and {origin['init']} reads those of "
            f"{encoding.name}. HINT: python data/{name}/prepare.py --tokenizer {encoding.name}, "
            f"and then --dataset {out}"
        )


def text_for(path, origin, dataset=None, split="val"):
    """The name of a dataset, by default the run's own, and the Tokens of a part of it, for the
    model of `path`, whose config is origin."""
    dataset = dataset or origin["dataset"]
    if not dataset:
        raise UserError(f"{path} has no dataset of its own. HINT: --dataset")
    prepare_if_missing(dataset)
    tokens = load(dataset, split)
    check_tokenizer(origin, dataset, tokens)
    return dataset, tokens


def initial_weights(config, tokens):
    """The weights of the model in config.init, which must have the tokenizer of `tokens`."""
    model, origin = load_model(config.init)
    check_tokenizer({**origin, "init": config.init}, config.dataset, tokens)
    return model.state_dict()


def resume_run(out, config, model, optimizer, world):
    """Load the checkpoint in `out`: its step, and the metrics before it. What is lost of those is
    said, and no reason to stop."""
    # of processes that keep a part each, no device nor host needs to hold the whole
    device = "cpu" if config.shard else world.device
    state = read_checkpoint(out / "checkpoint.pt", device, mmap=config.shard)
    now, then = dataclasses.asdict(config), state["config"]
    changed = [k for k in now if k not in FREE_ON_RESUME and now[k] != then.get(k)]
    if changed:
        pairs = ", ".join(f"{k} {then.get(k)} is not {now[k]}" for k in changed)
        raise UserError(f"the checkpoint has another config: {pairs}. HINT: use another --out-dir")
    load_weights(out / "checkpoint.pt", state, model)
    if state["optimizer"]:  # else weights that came from elsewhere
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            moments = {
                i: {name: local_part(value, parameters[i]) for name, value in values.items()}
                for i, values in state["optimizer"]["state"].items()
            }
            optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        except (ValueError, LookupError):
            raise UserError(
                f"{out}/checkpoint.pt: its optimizer's state does not fit its config"
            ) from None
    step = state["step"]
    metrics = [m for m in read_metrics(out) if m["step"] < step]
    lost = step - sum("loss" in m for m in metrics)
    if lost:
        world.print(
            f"{out}/metrics.jsonl has lost {lost} of {step} steps: loss.png will have a gap"
        )
    return step, metrics
