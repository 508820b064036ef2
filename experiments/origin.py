"""Where the mean comes from: train small models with the frequencies of tokens given to the head.

    python -m experiments.origin --json experiments/results/origin.json
    python -m experiments.origin --vocab plays --precision bf16      a part of the same runs
    python -m experiments.origin experiments/results/origin.json     the tables again

The hypothesis: the first thing that a language model learns is how frequent each token is. A head
without a bias can say that only by a vector that all positions share, which is the mean. The test:
add to the logits a constant, the log frequency of each token in the training text.

A run is out/origin/VOCAB-PRECISION-HEAD-SEED.json. What is finished is not run again. Then SmolLM2,
the far end, is measured as it is, and its logits are compared with the same frequencies. It needs
    python -m tools.hf smollm2 out/smollm2
    python -m data.shakespeare.prepare --tokenizer out/smollm2
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fp4
from data.shards import load
from experiments.compare import markdown
from experiments.loop import batch, evaluate, generator_for, once, settings, train
from model import GPT

OUT = Path("out/origin")
VOCABULARIES = {  # a dataset of the plays, how it is made, the last step of a run, and the seeds
    "plays": ("shakespeare", [], 400, 3),
    "bytes": ("out/plays-bytes", ["--tokenizer", "bytes", "--out", "out/plays-bytes"], 400, 3),
    "smollm2": ("shakespeare-smollm2", ["--tokenizer", "out/smollm2"], 200, 1),  # a large head
}
PRECISIONS = "bf16", "fp4", "fp4_mean"
STEPS = 0, 10, 25, 50, 75, 100, 150, 200, 300, 400
KINDS = "qkv", "out", "gate_up", "down"  # linears; beside them "norm", the output of the last norm
SMOLLM2 = "out/smollm2"


class BiasedGPT(GPT):
    """A GPT with a constant (vocab_size,), FP32, added to its logits. It is not trained."""

    def __init__(self, config, generator, constant):
        super().__init__(config, generator)
        self.register_buffer("constant", constant, persistent=False)

    def forward(self, tokens, targets=None, cache=None, start=0):
        logits = super().forward(tokens, None, cache, start) + self.constant
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def frequencies(tokens, vocab_size):
    """Of each token (vocab_size,), FP32: its share of a text, every count plus one."""
    counts = torch.ones(vocab_size, dtype=torch.float64)
    for shard in tokens.shards:
        counts += torch.from_numpy(np.bincount(shard, minlength=vocab_size))
    return (counts / counts.sum()).float()


def fit(logits, p, weights):
    """Of a vector of logits (vocab_size,), a line in log frequency: correlation and slope."""
    weights = weights.double() / weights.double().sum()
    x, y = (v.double() - weights @ v.double() for v in (p.log(), logits))
    cross = (weights * x) @ y
    x_energy, y_energy = weights @ x**2, weights @ y**2
    return (cross / (x_energy * y_energy).sqrt()).item(), (cross / x_energy).item()


def at_the_head(model, hidden, targets, p):
    """What the mean of the last norm's outputs (T, dim) says, with the frequencies p (vocab_size,):

    correlation, slope  of the mean's logits over log frequency, tokens weighted by frequency
    unweighted          that correlation, tokens weighted alike
    random              root mean square of the first, for random directions in the mean's place
    loss                before targets (T,): as it is; without the mean; and, if the model has no
                        constant, with log frequencies in the place of the mean's logits
    """
    head, mean = model.head.weight, hidden.mean(0)
    directions = torch.randn(100, len(mean), generator=torch.Generator().manual_seed(0))
    alike = torch.ones_like(p)
    found = dict(zip(("correlation", "slope"), fit(head @ mean, p, p), strict=True))
    found["unweighted"] = fit(head @ mean, p, alike)[0]
    found["random"] = statistics.mean(fit(head @ v, p, p)[0] ** 2 for v in directions) ** 0.5
    logits = hidden @ head.t() + getattr(model, "constant", 0.0)
    without = logits - head @ mean
    texts = {"as it is": logits, "without": without}
    if not isinstance(model, BiasedGPT):
        texts["frequencies"] = without + p.log()
    return found | {"loss": {k: F.cross_entropy(v, targets).item() for k, v in texts.items()}}


# ------------------------------------------------------------------------------------------------
# Small models, from scratch.


def grid(vocabularies=tuple(VOCABULARIES), precisions=PRECISIONS, seeds=(1, 2, 3)):
    """Settings of runs: bf16 with every vocabulary, 4 bits with that of the plays."""
    for vocab in vocabularies:
        for precision in precisions:
            if precision != "bf16" and vocab != "plays":
                continue
            for seed in seeds[: VOCABULARIES[vocab][-1]]:
                for head in ("plain", "frequencies"):
                    yield {"vocab": vocab, "precision": precision, "head": head, "seed": seed}


@torch.no_grad()
def measure(model, config, p):
    """Of a model at one moment, with the frequencies p (vocab_size,):

    share      the mean's, in each kind of linear, over blocks, and in the output of the last norm
    embedding  the mean's share of the embedding's rows that the text has
    at_head    what that mean says: see `at_the_head`
    loss       of validation text, of a bf16 model with fp4 and fp4_mean, too
    """
    shares, last = {}, []

    def look(name):
        def hook(_, inputs, output):
            x = output if name == "norm" else inputs[0]
            shares.setdefault(name, []).append(fp4.mean_share(x).item())
            last[:] = [x]

        return hook

    layers = [m for m in model.modules() if isinstance(m, fp4.FP4Linear)]
    seen = {n: m for n, m in model.named_modules() if m in layers or n == "norm"}
    hooks = [m.register_forward_hook(look(n.split(".")[-1])) for n, m in seen.items()]
    val = load(config.dataset, "val")
    starts = val.spaced(config.batch_size, config.block_size + 1)
    ids, targets = batch(val, starts, config, "cpu")
    model(ids)
    for hook in hooks:
        hook.remove()

    losses = {}
    for recipe in PRECISIONS if config.precision == "bf16" else (config.precision,):
        for layer in layers:
            layer.recipe = recipe
        losses[recipe] = evaluate(model, config)
    for layer in layers:
        layer.recipe = config.precision
    return {
        "share": {name: statistics.mean(values) for name, values in shares.items()},
        "embedding": fp4.mean_share(model.embedding.weight[p > p.min()]).item(),
        "at_head": at_the_head(model, last[0].flatten(0, 1), targets.flatten(), p),
        "loss": losses,
    }


def run(vocab, precision, head, seed, preset="micro", steps=STEPS, **changes):
    """Train one model, and measure it at these steps: {"step": [...], "share": {"qkv": [...], ...},
    "embedding": [...], "at_head": {...}, "loss": {"bf16": [...], ...}}."""
    dataset, _, last, _ = VOCABULARIES[vocab]
    tokens = load(dataset, "train")
    size = -(-tokens.vocab_size // 64) * 64
    if vocab == "smollm2":
        changes = {"eval_windows": 32} | changes
    fields = {"dataset": dataset, "vocab_size": size, "precision": precision, "seed": seed}
    config, p = settings(preset, **fields | changes), frequencies(tokens, size)
    generator = generator_for(config, "init")
    if head == "frequencies":
        model = BiasedGPT(config, generator, p.log())
    else:
        model = GPT(config, generator)
    moments = []
    for step in train(model, config):
        if step in steps:
            moments.append({"step": step} | measure(model, config, p))
        if step == min(last, max(steps)):
            break
    return gather(moments)


def gather(records):
    """A dict of lists of a list of dicts, however deep."""
    if isinstance(records[0], dict):
        return {name: gather([r[name] for r in records]) for name in records[0]}
    return records


def rounded(record):
    """A JSON value with every float to four decimals."""
    return json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 4))


def finish(setting):
    """The record of a run, which is trained if it was not yet."""
    path = OUT / ("-".join(str(v) for v in setting.values()) + ".json")
    record = once(path, lambda: setting | rounded(run(**setting)))
    print(path, flush=True)
    return record


# ------------------------------------------------------------------------------------------------
# A real model, as it is.


@torch.no_grad()
def far_end(path, dataset, windows=4, length=512):
    """Of a trained model, on windows of a dataset's validation text, with frequencies of its
    training text:

    share    the mean's, in the output of the last norm
    at_head  what that mean says: see `at_the_head`
    stream   of the input of each block, and of the last one's output, first tokens aside: the
             mean's share, its cosine to the last one, and the part of its energy in its largest two
             features
    """
    model = GPT.load(path, precision="bf16")
    p = frequencies(load(dataset, "train"), model.config.vocab_size)
    stream, last = [], []
    for layer in [*model.blocks, model.norm]:
        layer.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0][:, 1:]))
    model.norm.register_forward_hook(lambda _, inputs, output: last.append(output))
    val = load(dataset, "val")
    window = val.batch(val.spaced(windows, length + 1), length + 1)
    model(window[:, :-1])
    moments = []
    final = stream[-1].flatten(0, 1).mean(0)
    for x in stream:
        mean = x.flatten(0, 1).mean(0)
        energy = mean.square()
        moments.append({
            "share": fp4.mean_share(x).item(),
            "cosine": F.cosine_similarity(mean, final, 0).item(),
            "two features": (energy.topk(2).values.sum() / energy.sum()).item(),
        })  # fmt: skip
    return {
        "dataset": dataset,
        "tokens": windows * length,
        "share": fp4.mean_share(last[0]).item(),
        "at_head": at_the_head(model, last[0].flatten(0, 1), window[:, 1:].flatten(), p),
        "stream": gather(moments),
    }


# ------------------------------------------------------------------------------------------------
# Tables.


def over_seeds(runs, vocab, precision, head, *path):
    """(steps, values (seeds, steps)) of one measure of the runs of one kind: a path such as
    "share", "qkv"; "linears" for the mean over kinds of linears."""
    values = []
    for r in runs:
        if (r["vocab"], r["precision"], r["head"]) != (vocab, precision, head):
            continue
        value, steps = r, r["step"]
        for name in path:
            if name == "linears":
                value = np.mean([value[kind] for kind in KINDS], 0)
            else:
                value = value[name]
        values.append(value)
    return (steps, np.array(values)) if values else ([], np.empty((0, 0)))


def show(stored):
    """Print a table for each vocabulary: means over seeds, and ± the standard error."""

    def cell(values, digits=2):
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
        return f"{values.mean():.{digits}f} ± {error:.{digits}f}".replace(" ± nan", "")

    runs = stored["runs"]
    measures = {
        "linears": (("share", "linears"), 3), "last norm": (("share", "norm"), 3),
        "embedding": (("embedding",), 3), "slope": (("at_head", "slope"), 2),
        "loss": (("loss", "bf16"), 3),
    }  # fmt: skip
    for vocab in dict.fromkeys(r["vocab"] for r in runs):
        rows = []
        for head in ("plain", "frequencies"):
            columns = [over_seeds(runs, vocab, "bf16", head, *m) for m, _ in measures.values()]
            losses = [over_seeds(runs, vocab, "bf16", head, "loss", k)[1] for k in PRECISIONS]
            for i, step in enumerate(columns[0][0]):
                digits = [d for _, d in measures.values()]
                cells = [cell(v[:, i], d) for (_, v), d in zip(columns, digits, strict=True)]
                cells += [cell((loss - losses[0])[:, i], 4) for loss in losses[1:]]
                rows.append((head, str(step), *cells))
        print(f"\n{vocab}, trained in bf16: share of the mean; loss; the same weights rounded\n")
        print(markdown(("head", "step", *measures, "fp4", "fp4_mean"), rows))
    rows = []
    for head in ("plain", "frequencies"):
        steps, base = over_seeds(runs, "plays", "bf16", head, "loss", "bf16")
        gaps = []
        for name in PRECISIONS[1:]:
            _, losses = over_seeds(runs, "plays", name, head, "loss", name)
            if len(losses) == len(base):
                gaps.append(losses - base)
        if len(gaps) == 2:
            gaps.append(gaps[1] - gaps[0])
            rows += [(head, str(s), *(cell(g[:, i], 4) for g in gaps)) for i, s in enumerate(steps)]
    if rows:
        print("\nplays, trained in 4 bits: loss minus bf16's of the same seed\n")
        print(markdown(("head", "step", "fp4", "fp4_mean", "fp4_mean minus fp4"), rows))
    if found := stored.get("smollm2"):
        print("\nSmolLM2:", {k: v for k, v in found.items() if k != "stream"})
        columns = [[f"{v:.2f}" for v in values] for values in found["stream"].values()]
        blocks = map(str, range(len(columns[0])))
        print(markdown(("block", *found["stream"]), zip(blocks, *columns, strict=True)))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stored", nargs="?", type=Path, help="a .json file to print the tables of")
    parser.add_argument("--vocab", nargs="+", choices=VOCABULARIES, default=[*VOCABULARIES])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--dataset", default="shakespeare-smollm2", help="SmolLM2's text")
    parser.add_argument("--json", type=Path, help="keep the numbers there")
    args = parser.parse_args(argv)
    if args.stored:
        show(json.loads(args.stored.read_text()))
        return
    print(fp4.use_fast_path(torch.device("cpu")), flush=True)
    for vocab in args.vocab:
        dataset, flags, *_ = VOCABULARIES[vocab]
        folder = Path(dataset) if "/" in dataset else Path("data", dataset)
        if not (folder / "meta.json").exists():
            subprocess.run([sys.executable, "-m", "data.shakespeare.prepare", *flags], check=True)
    stored = {"runs": [finish(s) for s in grid(args.vocab, args.precision, args.seed)]}
    if args.json:
        stored["smollm2"] = rounded(far_end(SMOLLM2, args.dataset))
        lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in stored["runs"])
        rest = json.dumps(stored["smollm2"], separators=(",", ":"))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(f'{{"smollm2":{rest},\n"runs":[\n{lines}\n]}}\n')
    show(stored)


if __name__ == "__main__":
    main()
