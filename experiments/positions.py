r"""Which predictions does a recipe lose? The loss of every token of LAMBADA, minus that in bf16.

    python -m experiments.positions --out-dir out/smollm2 --dataset shakespeare-smollm2 \
        --lambada lambada_test_en.jsonl --json experiments/results/positions.json
    python -m experiments.positions experiments/results/positions.json    the table, no model

Means and tensor scales are stored, as in eval.py. "first": the first token of each sequence
multiplies the unrounded W in all linears. A token is rare or frequent by its share of all contexts.
Prints Markdown; ± is the standard error over passages of the paired difference.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fp4
from data.tokenizer import encoding_of
from experiments.compare import markdown
from experiments.eval import batches, read_lambada, text_of, tokenize
from model import GPT, load_checkpoint
from tools.stored_means import calibrate_on

WAYS = "bf16", "fp4", "fp4 first", "fp4_mean", "fp4_mean first", "fp4_project_1d"
RARE, FREQUENT = 1e-4, 1e-3  # shares of a token


def groups(ids, targets, share):
    """{group: mask of the predicted tokens (N,), of all sequences one after another}.

    ids: lists of token ids; targets: how many at the end of each are its last word; share (V,): of
    each token in text at large."""
    before = np.concatenate([np.arange(1, len(s)) for s in ids])
    left = np.concatenate([np.arange(len(s) - 1, 0, -1) for s in ids])  # tokens, this one included
    last = left <= np.repeat(targets, [len(s) - 1 for s in ids])
    seen = np.concatenate([[s[i] in s[:i] for i in range(1, len(s))] for s in ids])
    share = share[np.concatenate([s[1:] for s in ids])]
    return {
        "all tokens": np.ones(len(before), bool),
        "last word": last,
        "last word, in the passage before": last & seen,
        "last word, new": last & ~seen,
        "last word, rare": last & (share < RARE),
        "others, rare": ~last & (share < RARE),
        "others, between": ~last & (share >= RARE) & (share <= FREQUENT),
        "others, frequent": ~last & (share > FREQUENT),
        "others, after 1 to 15 tokens": ~last & (before < 16),
        "others, after 16 to 63": ~last & (before >= 16) & (before < 64),
        "others, after 64 and more": ~last & (before >= 64),
    }


@torch.no_grad()
def token_losses(model, ids, batch_tokens=4096):
    """In nats, of every token but the first of each sequence, one after another: (N,)."""
    losses = [None] * len(ids)
    for batch in batches(ids, batch_tokens):
        tokens = torch.tensor([ids[i] for i in batch])
        logits = model(tokens[:, :-1]).transpose(1, 2)
        loss = F.cross_entropy(logits, tokens[:, 1:], reduction="none")
        for i, row in zip(batch, loss.double().numpy(), strict=True):
            losses[i] = row
    return np.concatenate(losses)


def keep_first(model, weights):
    """From now on the first token of a sequence multiplies these weights {name: W}, unrounded."""

    def exact(w):
        def hook(layer, inputs, y):
            return torch.cat((F.linear(inputs[0][:, :1], w), y[:, 1:]), 1)

        return hook

    for name, w in weights.items():
        model.get_submodule(name).register_forward_hook(exact(w))


def measure(args):
    """{group: {way: [tokens, mean, standard error]}}: bf16's loss, then differences to it."""
    run = load_checkpoint(args.out_dir)
    encoding = encoding_of(run["folder"], run["tokenizer"], run["tokenizer_hash"])
    passages = read_lambada(args.lambada)
    pairs = [tokenize(encoding, *passage, 512) for passage in passages[: args.limit]]
    ids = [context + word for context, word in pairs]
    values = {}
    for way in WAYS:
        recipe, *first = way.split()
        model = GPT.load(args.out_dir, "cpu", recipe)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, fp4.FP4Linear)}
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        if recipe != "bf16":
            calibrate_on(model, text_of(model.run, args.dataset, "train"))
        if first:
            keep_first(model, weights)
        values[way] = token_losses(model, ids) - values.get("bf16", 0)
        print(f"{way}: {values[way].mean():.3f}", flush=True)
    contexts = [t for context, _ in passages for t in encoding.encode_ordinary(context)]
    share = np.bincount(contexts, minlength=model.config.vocab_size) / len(contexts)
    passage = np.repeat(np.arange(len(ids)), [len(s) - 1 for s in ids])
    masks = groups(ids, [len(word) for _, word in pairs], share)
    return {
        group: {way: statistics(v, mask, passage) for way, v in values.items()}
        for group, mask in masks.items()
        if mask.any()
    }


def statistics(values, mask, passage):
    """[tokens, mean of values (N,) where mask is set, its standard error over passages]."""
    mean = values[mask].mean()
    sums = np.bincount(passage[mask], values[mask] - mean)
    error = np.sqrt(np.square(sums).sum()) / mask.sum()
    return [int(mask.sum()), round(float(mean), 4), round(float(error), 4)]


def table(result):
    lines = []
    for group, ways in result.items():
        n, bf16, _ = ways["bf16"]
        cells = [f"{m:+.2f} ± {e:.2f}" for way, (_, m, e) in ways.items() if way != "bf16"]
        lines.append((group, str(n), f"{bf16:.2f}", *cells))
    return markdown(("predicted", "tokens", "`bf16`", *(f"`{way}`" for way in WAYS[1:])), lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path, help="a file that --json wrote")
    parser.add_argument("--out-dir", help="the run's folder")
    parser.add_argument("--dataset", help="a folder under data/, or a path to one (the run's)")
    parser.add_argument("--lambada", help="its .jsonl, see huggingface.co/datasets/EleutherAI")
    parser.add_argument("--limit", type=int, default=300, help="passages (300)")
    parser.add_argument("--json", type=Path, help="keep the numbers there")
    args = parser.parse_args(argv)
    if args.results:
        result = json.loads(args.results.read_text())
    else:
        print(fp4.use_fast_path(torch.device("cpu")), flush=True)
        result = measure(args)
    if args.json:
        lines = (f"{json.dumps(group)}: {json.dumps(row)}" for group, row in result.items())
        args.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(table(result))


if __name__ == "__main__":
    main()
