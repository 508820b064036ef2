r"""Evaluate runs: loss, bits per byte, last words and BLiMP's minimal pairs, in two precisions.

    python experiments/eval.py --out-dir out/nano-fp4 out/nano-fp4_mean
    python experiments/eval.py --out-dir out/nano-fp4 --blimp blimp/data \
        --lambada lambada_test_en.jsonl

Prints Markdown: a row for each run and precision, by default bf16 and the one it was trained in,
and with --blimp a row for each phenomenon. A number comes with its standard error over examples,
and then in parentheses its difference to the first row, with the standard error of the paired
difference: two models mostly fail at the same examples, so that one is the smaller.

    val loss      nats a token, over the same windows as train.py's
    bits per byte the same loss, comparable between tokenizers
    last word     in passages of the validation text, see `last_words`: right if greedy decoding
                  gives the whole word. The log of the perplexity is in nats a word; as a mean
                  it has a standard error
    LAMBADA       the same for the data of arXiv 1606.06031, after OpenAI's preprocessing
    BLiMP         share of pairs (arXiv 1912.00582) whose good sentence, after <|endoftext|>, has
                  the larger probability; a tie counts one half

In FP4 means and tensor scales are constants, measured before on training text (inference.py). With
--means batch, and always for recipes that need more than constants, such as fp4_svd, they are those
of the batch, as in training, and a score depends on it: so a batch holds sequences of one length,
without padding, and, where there are enough of them, as many tokens as a micro-step of the
training. The batches are the same at every call with the same arguments.
"""

import json
import math
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fp4
from checkpoint import load_model, text_for
from cli import Parser, number, script
from data.shards import UNREADABLE, DataError, load, open_text
from data.vocab import EOT, get_encoding
from experiments.recipes import RECIPES
from experiments.report import markdown
from inference import calibrate_on
from run import Config, World, seed_for

SOURCES = {
    "BLiMP": "the folder data of https://github.com/alexwarstadt/blimp",
    "LAMBADA": "lambada_test_en.jsonl of "
    "https://huggingface.co/datasets/EleutherAI/lambada_openai/tree/main/data",
}


def read_jsonl(path, pick):
    """[pick(record), ...] of a .jsonl file, also .xz or .gz, or of a folder or a tar file of them;
    DataError if it cannot be read, or if there is nothing."""
    path = Path(path)
    try:
        if path.is_dir():
            texts = [p.read_text(encoding="utf-8-sig") for p in sorted(path.glob("*.jsonl"))]
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                files = [m for m in tar if m.name.endswith(".jsonl")]
                texts = [tar.extractfile(m).read().decode("utf-8-sig") for m in files]
        else:
            with open_text(path) as file:
                texts = [file.read()]
        lines = [line for text in texts for line in text.split("\n") if line]  # U+2028 is no end
        records = [pick(json.loads(line)) for line in lines]
    except (*UNREADABLE, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {path}: {type(error).__name__} {error}") from None
    if not records:
        raise DataError(f"nothing in {path}: no .jsonl file, or empty ones")
    return records


def read_blimp(path, limit=None):
    """[(term, phenomenon, good, bad), ...], the first `limit` of each phenomenon, sorted by both
    names."""
    keys = "linguistics_term", "UID", "sentence_good", "sentence_bad"
    phenomena = {}
    for pair in read_jsonl(path, lambda r: tuple(r[k] for k in keys)):
        phenomena.setdefault(pair[:2], []).append(pair)
    return [pair for name in sorted(phenomena) for pair in phenomena[name][:limit]]


def read_lambada(path, limit=None):
    """[(context, " word"), ...] of records with a text, or with a context and a continuation."""

    def pick(r):
        text = r["text"] if "text" in r else f"{r['context']} {r['continuation']}"
        context, _, word = text.strip().rpartition(" ")
        return context.rstrip(), f" {word}"  # the space belongs to the word's first token

    return read_jsonl(path, pick)[:limit]


def last_words(text, limit=1000):
    """[(context, " word"), ...], the first `limit` passages of a text in LAMBADA's manner.

    A word of 4 letters or more before one of . , ; ! ? (a colon ends a speaker's name), if it has
    occurred in the same document among the 300 characters before, which are the context: it can be
    known, but not from the last few words alone. The same passages for all tokenizers."""
    passages = []
    for document in text.split(EOT):
        for word in re.finditer(r"(?<=\S) ([A-Za-z]{4,})(?=[.,;!?])", document):
            context = document[max(0, word.start() - 300) : word.start()].partition(" ")[2]
            if re.search(rf"\b{word[1]}\b", context, re.IGNORECASE):
                passages.append((context, word[0]))
    return passages[:limit]


def tokenize(encoding, context, target, block_size):
    """Two lists of ids. Of <|endoftext|> and context, what fits the block before the target, and
    one token if nothing does."""
    context = [encoding.eot_token, *encoding.encode_ordinary(context)]
    target = encoding.encode_ordinary(target)
    return context[-max(1, block_size + 1 - len(target)) :], target


@torch.no_grad()
def score(model, examples, batch_tokens):
    """The log-probability in nats of each target after its context, and whether each of its tokens
    is the likeliest, so that greedy decoding gives it: (N,) float64 and (N,) bool.

    examples: N pairs (context, target) of lists of ids, neither empty. batch_tokens: as many tokens
    a batch at most, and one sequence at least."""
    device = model.head.weight.device
    logp, exact = np.zeros(len(examples)), np.zeros(len(examples), bool)
    of_length = {}
    for i, (context, target) in enumerate(examples):
        of_length.setdefault(len(context) + len(target) - 1, []).append(i)
    for length, all_rows in of_length.items():
        size = max(1, batch_tokens // length)
        for start in range(0, len(all_rows), size):
            rows = all_rows[start : start + size]
            tokens = torch.tensor([examples[i][0] + examples[i][1] for i in rows], device=device)
            first = torch.tensor([len(examples[i][0]) - 1 for i in rows], device=device)
            in_context = torch.arange(length, device=device) < first[:, None]  # (B, T)
            logits, y = model(tokens[:, :-1]), tokens[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
            logp[rows] = -loss.double().masked_fill(in_context, 0).sum(1).cpu().numpy()
            exact[rows] = ((logits.argmax(-1) == y) | in_context).all(1).cpu().numpy()
    return logp, exact


def measure(model, config, blimp=(), lambada=(), batch_tokens=None, limit=None):
    """{column: (examples, values)} and the same for {phenomenon: ...}; values (N,), one an example,
    of which the mean is reported.

    config: the run's; blimp, lambada: see `read_blimp` and `read_lambada`; batch_tokens: by default
    those of a micro-step of the training; limit: of the passages of the validation text. Rounding
    noise is that of train.py's evaluation, so that a score repeats."""
    torch.manual_seed(seed_for(config, "evaluation"))
    batch_tokens = batch_tokens or config.batch_size // config.grad_accum * config.block_size
    val = load(config.dataset, "val")
    encoding = get_encoding(val.tokenizer)

    length = config.block_size + 1
    windows = val.batch(val.spaced(config.eval_windows, length), length).tolist()
    logp, _ = score(model, [(w[:1], w[1:]) for w in windows], batch_tokens)
    text = encoding.decode_bytes([t for w in windows for t in w[1:] if t != encoding.eot_token])
    bytes_per_token = val.bytes_per_token or len(text) / len(windows) / config.block_size
    columns = {
        "val loss": (windows, -logp / config.block_size),
        "bits per byte": (windows, -logp / config.block_size / math.log(2) / bytes_per_token),
    }

    def score_texts(examples):
        tokens = [tokenize(encoding, *e, config.block_size) for e in examples]
        return score(model, tokens, batch_tokens)

    passages = last_words(encoding.decode(val.shards[0][: 2**20].tolist()))[:limit]
    for name, examples in {"last word": passages, "LAMBADA": lambada}.items():
        if examples:
            logp, exact = score_texts(examples)
            columns[f"{name}, %"] = examples, 100.0 * exact
            columns[f"{name}, log perplexity"] = examples, -logp

    if not blimp:
        return columns, {}
    logp, _ = score_texts([("", sentence) for pair in blimp for sentence in pair[2:]])
    good, bad = logp.reshape(-1, 2).T
    right = 50 * (1 + np.sign(good - bad))  # in percent
    columns["BLiMP, %"] = blimp, right
    names = np.array([": ".join(pair[:2]) for pair in blimp])
    return columns, {str(name): (blimp, right[names == name]) for name in np.unique(names)}


def statistics(column, first=None):
    """[N, mean, its standard error], and, if first is another column of the same examples, the mean
    difference to it and the standard error of that, paired. For an accuracy p the standard error is
    sqrt(p (1 - p) / N)."""
    examples, values = column
    numbers = [values.mean(), values.std() / math.sqrt(len(values))]
    if first is not None and first is not column and first[0] == examples:
        numbers += statistics((examples, values - first[1]))[1:]
    return [len(values), *(round(float(x), 6) for x in numbers)]


def report(rows):
    """Markdown of rows {"run", "in", "columns": {name: statistics}, "phenomena": the same}."""

    def cell(numbers, digits):
        _, mean, error, *paired = (f"{x:.{digits}f}" for x in numbers)
        return f"{mean} ± {error}" + (
            f" ({numbers[3]:+.{digits}f} ± {paired[1]})" if paired else ""
        )

    names = dict.fromkeys(name for row in rows for name in row["columns"])
    lines = []
    for row in rows:
        cells = {n: cell(c, 1 if n.endswith("%") else 4) for n, c in row["columns"].items()}
        lines.append([f"`{row['run']}`", row["in"], *(cells.get(name, "") for name in names)])
    text = markdown(["run", "in", *names], lines)
    if rows[0]["phenomena"]:
        columns = ["BLiMP, %", *(f"`{row['run']}` in {row['in']}" for row in rows)]
        text += "\n\n" + markdown(columns, [
            [name, *(cell(row["phenomena"][name], 1) for row in rows)]
            for name in rows[0]["phenomena"]
        ])  # fmt: skip
    return text


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--out-dir", required=True, nargs="+", help="runs' folders, or Hugging Face directories"
    )
    parser.add_argument("--dataset", help="a folder under data/, or a path to one (the run's)")
    parser.add_argument("--windows", type=number(int), help="of validation text (the run's)")
    parser.add_argument("--block-size", type=number(int), help="(the run's, 512 at most)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["own", *RECIPES],
        metavar="RECIPE",
        help="names, own: that of the training (bf16 own)",
    )
    parser.add_argument(
        "--means",
        choices=("stored", "batch"),
        default="stored",
        help="and scales in FP4 (stored)",
    )
    parser.add_argument("--blimp", help="the folder of its .jsonl files, or a tar file of it")
    parser.add_argument("--lambada", help="its .jsonl file, also .xz or .gz")
    parser.add_argument("--limit", type=number(int), help="passages at most (all)")
    parser.add_argument("--pairs", type=number(int), help="pairs a phenomenon at most (--limit)")
    parser.add_argument(
        "--batch-tokens", type=number(int), help="(those of a micro-step of the training)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--json", type=Path, help="write `statistics` there: N, mean, error, and the paired two"
    )
    args = parser.parse_args(argv)
    blimp = read_blimp(args.blimp, args.pairs or args.limit) if args.blimp else ()
    lambada = read_lambada(args.lambada, args.limit) if args.lambada else ()
    device = World(args.device).device
    rows, first = [], None
    for run in args.out_dir:
        for precision in args.precision or ("bf16", "own"):
            model, origin = load_model(run, device, None if precision == "own" else precision)
            if not args.precision and precision == "own" and model.config.precision == "bf16":
                continue  # it was trained in bf16
            precision = model.config.precision
            line = fp4.backend(device) if precision.startswith("fp4") else ""
            print(f"{run} in {precision}", line, file=sys.stderr, flush=True)
            dataset, _ = text_for(run, origin, args.dataset)
            stored = args.means == "stored" and calibrate_on(run, model, origin, dataset)
            config = Config(**{**origin, "dataset": dataset})
            config.block_size = args.block_size or min(config.block_size, 512)
            config.eval_windows = args.windows or config.eval_windows
            parts = measure(model, config, blimp, lambada, args.batch_tokens, args.limit)
            first = first or parts
            columns, phenomena = (
                {name: statistics(column, base.get(name)) for name, column in part.items()}
                for part, base in zip(parts, first, strict=True)
            )
            row = {"run": run, "in": precision, "means": "stored" if stored else "batch"}
            rows.append({**row, "columns": columns, "phenomena": phenomena})
    print(report(rows))
    for name, source in SOURCES.items():
        if not getattr(args, name.lower()):
            print(f"\n{name} is left out. HINT: --{name.lower()} PATH, {source}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    script(main)
