r"""Evaluate runs: loss, bits per byte, LAMBADA and BLiMP, in two precisions.

    python -m experiments.eval --out-dir out/nano-fp4 out/nano-fp4_mean
    python -m experiments.eval --out-dir out/smollm2 --dataset shakespeare-smollm2 \
        --precision bf16 fp4 fp4_mean --blimp blimp/data --lambada lambada_test_en.jsonl

Prints Markdown: a row for each run and precision, by default bf16 and the one it was trained in. A
number comes with its standard error over examples, and then in parentheses its difference to the
first row, with the standard error of the paired difference: two models mostly fail at the same
examples, so that one is the smaller. --json has each of BLiMP's phenomena too.

    val loss      nats a token, over the same windows as train.py's
    bits per byte the same loss, comparable between tokenizers
    LAMBADA       (arXiv 1606.06031, after OpenAI's preprocessing) the last word of a passage: right
                  if greedy decoding gives the whole word. The log of the perplexity is in nats a
                  word; as a mean it has a standard error
    BLiMP         share of pairs (arXiv 1912.00582) whose good sentence has the larger probability;
                  a tie counts one half

In FP4 means and tensor scales are constants, measured before on training text
(tools/stored_means.py). With --means batch, and always for recipes that need more than constants,
such as fp4_svd, they are those of the batch, and a score depends on it. So a batch holds sequences
of one length, without padding, and as many tokens as a micro-step of the training if there are.
"""

import argparse
import json
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fp4
from data.shards import load, open_text
from data.tokenizer import encoding_of
from experiments.compare import markdown
from model import GPT, load_checkpoint
from tools.stored_means import calibrate_on

# ------------------------------------------------------------------------------------------------
# Texts.


def read_jsonl(path):
    """The records of a .jsonl file, also .xz or .gz, or of all that a folder or a tar file has;
    SystemExit if there are none."""
    path = Path(path)
    if path.is_dir():
        texts = [file.read_text(encoding="utf-8-sig") for file in sorted(path.glob("*.jsonl"))]
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.name.endswith(".jsonl")]
            texts = [tar.extractfile(m).read().decode("utf-8-sig") for m in members]
    else:
        with open_text(path) as file:
            texts = [file.read()]
    records = [json.loads(line) for text in texts for line in text.split("\n") if line]
    if not records:
        raise SystemExit(f"error: nothing in {path}: no .jsonl file, or empty ones")
    return records


def read_blimp(path, limit=None):
    """[(term, phenomenon, good, bad), ...], the first `limit` of each phenomenon."""
    phenomena = {}
    for r in read_jsonl(path):
        pair = r["linguistics_term"], r["UID"], r["sentence_good"], r["sentence_bad"]
        phenomena.setdefault(pair[:2], []).append(pair)
    return [pair for pairs in phenomena.values() for pair in pairs[:limit]]


def read_lambada(path, limit=None):
    """[(context, " word"), ...] of records with a text, or with a context and a continuation."""
    passages = []
    for r in read_jsonl(path):
        text = r["text"] if "text" in r else f"{r['context']} {r['continuation']}"
        context, _, word = text.strip().rpartition(" ")
        passages.append((context.rstrip(), f" {word}"))  # the space belongs to the word's token
    return passages[:limit]


def tokenize(encoding, context, target, block_size):
    """Two lists of ids: what comes before the target, and the target.

    Context and target are tokenized as one text, as a model reads them. The target begins where the
    tokens of that text part from those of the context alone. (By itself it would be a text of its
    own, before which SentencePiece puts a space.) A token that spans the seam is the target's.

    Before the context comes what the tokenizer itself puts before a text, such as Llama's BOS, or
    else <|endoftext|>. Of both together the last that fit the block before the target stay, and one
    token if nothing does."""
    alone = encoding.encode_ordinary(context)
    whole = encoding.encode_ordinary(context + target)
    seam = 0
    while seam < min(len(alone), len(whole)) and alone[seam] == whole[seam]:
        seam += 1
    before = (getattr(encoding, "prefix", []) or [encoding.eot_token]) + whole[:seam]
    target_ids = whole[seam:]
    return before[-max(1, block_size + 1 - len(target_ids)) :], target_ids


# ------------------------------------------------------------------------------------------------
# Scores.


def batches(sequences, batch_tokens):
    """The numbers of sequences of one length that go together, without padding: lists, as many as
    have batch_tokens inputs at most, and one sequence at least."""
    of_length = {}
    for i, sequence in enumerate(sequences):
        of_length.setdefault(len(sequence) - 1, []).append(i)
    for length, members in of_length.items():
        size = max(1, batch_tokens // length)
        yield from (members[i : i + size] for i in range(0, len(members), size))


@torch.no_grad()
def score(model, examples, batch_tokens):
    """The log-probability in nats of each target after its context, and whether each of its tokens
    is the likeliest, so that greedy decoding gives it: (N,) float64 and (N,) bool.

    examples: N pairs (context, target) of lists of ids, neither empty. batch_tokens: as many tokens
    a batch at most, and one sequence at least."""
    device = model.head.weight.device
    logp, exact = np.zeros(len(examples)), np.zeros(len(examples), bool)
    for batch in batches([context + target for context, target in examples], batch_tokens):
        tokens = torch.tensor([examples[i][0] + examples[i][1] for i in batch], device=device)
        target_start = torch.tensor([len(examples[i][0]) - 1 for i in batch], device=device)
        logits, y = model(tokens[:, :-1]), tokens[:, 1:]
        in_context = torch.arange(y.shape[1], device=device) < target_start[:, None]  # (B, T)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        logp[batch] = -loss.double().masked_fill(in_context, 0).sum(1).cpu().numpy()
        exact[batch] = ((logits.argmax(-1) == y) | in_context).all(1).cpu().numpy()
    return logp, exact


def measure(model, val, encoding, *, windows, block_size, batch_tokens, blimp=(), lambada=()):
    """{column: (examples, values)} and the same for {phenomenon: ...}; values (N,), one an example,
    of which the mean is reported.

    val: data.shards.Tokens; windows: how many, of block_size tokens; blimp, lambada: see
    `read_blimp` and `read_lambada`. Rounding noise is the same at every call."""
    torch.manual_seed(0)
    ids = val.batch(val.spaced(windows, block_size + 1), block_size + 1).tolist()
    logp, _ = score(model, [(w[:1], w[1:]) for w in ids], batch_tokens)
    loss = -logp / block_size
    text = encoding.decode_bytes([t for w in ids for t in w[1:] if t != encoding.eot_token])
    bytes_per_token = val.bytes_per_token or len(text) / windows / block_size
    columns = {
        "val loss": (ids, loss),
        "bits per byte": (ids, loss / math.log(2) / bytes_per_token),
    }

    def score_texts(examples):
        tokens = [tokenize(encoding, *example, block_size) for example in examples]
        return score(model, tokens, batch_tokens)

    if lambada:
        logp, exact = score_texts(lambada)
        columns["LAMBADA, %"] = lambada, 100.0 * exact
        columns["LAMBADA, log perplexity"] = lambada, -logp
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


def cell(numbers, digits):
    """`statistics` as text."""
    _, mean, error, *paired = (f"{x:.{digits}f}" for x in numbers)
    text = f"{mean} ± {error}"
    if paired:
        text += f" ({numbers[3]:+.{digits}f} ± {paired[1]})"
    return text


def report(rows):
    """Markdown of rows {"run", "in", "columns": {name: statistics}}."""
    names = dict.fromkeys(name for row in rows for name in row["columns"])
    lines = []
    for row in rows:
        cells = {n: cell(c, 1 if n.endswith("%") else 4) for n, c in row["columns"].items()}
        lines.append([f"`{row['run']}`", row["in"], *(cells.get(name, "") for name in names)])
    return markdown(["run", "in", *names], lines)


# ------------------------------------------------------------------------------------------------


def text_of(run, dataset, split):
    """data.shards.Tokens of this dataset, or if it is None of the run's own. run: GPT.load's
    model.run. SystemExit where there is none, or its tokenizer is not the run's."""
    folder, dataset = run["folder"], dataset or run["config"].get("dataset")
    if not dataset:
        raise SystemExit(f"error: {folder} has no dataset of its own. HINT: --dataset")
    tokens = load(dataset, split)
    if tokens.tokenizer_hash != run["tokenizer_hash"]:
        raise SystemExit(
            f"error: {dataset} has tokens of {tokens.tokenizer}, {folder} reads those of "
            f"{run['tokenizer']}. HINT: --dataset"
        )
    return tokens


def evaluate(out_dir, precision, args, blimp, lambada):
    """`measure` of a run in this precision, and what its means are, stored or batch."""
    model = GPT.load(out_dir, args.device, precision)
    run, config = model.run, model.run["config"]  # of an imported model its shape alone
    val = text_of(run, args.dataset, "val")
    encoding = encoding_of(run["folder"], run["tokenizer"], run["tokenizer_hash"])
    line, means = "", "batch"
    if precision.startswith("fp4"):
        line = fp4.use_fast_path(torch.device(args.device))
        if args.means == "stored" and calibrate_on(model, text_of(run, args.dataset, "train")):
            means = "stored"
    print(f"{out_dir} in {precision}", line, file=sys.stderr, flush=True)
    block_size = args.block_size or min(model.config.block_size, 512)
    sequences = config.get("batch_size", 16) // config.get("grad_accum", 1)
    parts = measure(
        model,
        val,
        encoding,
        windows=args.windows or config.get("eval_windows", 128),
        block_size=block_size,
        batch_tokens=args.batch_tokens or sequences * block_size,
        blimp=blimp,
        lambada=lambada,
    )
    return parts, means


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out-dir", required=True, nargs="+", help="runs' folders")
    parser.add_argument("--dataset", help="a folder under data/, or a path to one (the run's)")
    parser.add_argument("--windows", type=int, help="of validation text (the run's)")
    parser.add_argument("--block-size", type=int, help="(the run's, 512 at most)")
    parser.add_argument("--precision", nargs="+", help="own: that of the training (bf16 own)")
    parser.add_argument("--means", choices=("stored", "batch"), default="stored", help="(stored)")
    parser.add_argument("--blimp", help="folder data of https://github.com/alexwarstadt/blimp")
    parser.add_argument("--lambada", help="its .jsonl, see huggingface.co/datasets/EleutherAI")
    parser.add_argument("--limit", type=int, help="passages of LAMBADA at most (all)")
    parser.add_argument("--pairs", type=int, help="pairs a phenomenon at most (--limit)")
    parser.add_argument("--batch-tokens", type=int, help="(those of a micro-step of the training)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write `statistics` there")
    args = parser.parse_args(argv)
    blimp = read_blimp(args.blimp, args.pairs or args.limit) if args.blimp else ()
    lambada = read_lambada(args.lambada, args.limit) if args.lambada else ()
    rows, first = [], None
    for out_dir in args.out_dir:
        own = load_checkpoint(out_dir)["config"]["precision"]
        names = [own if name == "own" else name for name in args.precision or ("bf16", "own")]
        for precision in dict.fromkeys(names):
            parts, means = evaluate(out_dir, precision, args, blimp, lambada)
            first = first or parts
            columns, phenomena = (
                {name: statistics(column, base.get(name)) for name, column in part.items()}
                for part, base in zip(parts, first, strict=True)
            )
            row = {"run": out_dir, "in": precision, "means": means}
            rows.append(row | {"columns": columns, "phenomena": phenomena})
    print(report(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
