"""What runs add up to, and Markdown: what the scripts of this folder share."""

import contextlib
import json
import math
import statistics
from pathlib import Path

from cli import UserError


@contextlib.contextmanager
def results(path):
    """The JSON that a script kept with --json, for a block that uses it; UserError where there is
    none, or not what the block expects."""
    try:
        yield json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not what --json wrote: {type(error).__name__} {error}"
        ) from None


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(record):
    blocks, rate = record.get("bf16_blocks"), record.get("learning_rate")
    text = record["precision"] + (f", {blocks} block{'s' * (blocks > 1)} in bf16" if blocks else "")
    return text + (f", learning rate {rate:g}" if rate else "")


def summary(records, base):
    """A row for each label and added mean, of compare.py's records: over seeds the mean loss, its
    gap to bf16, and its difference to the label `base` at the same added mean. Gap and difference
    are paired by seed; errors are standard errors, NaN for one seed."""
    final, share = {}, {}
    for r in records:
        key = label(r), r["added_mean"]
        final.setdefault(key, {})[r["seed"]] = r["val"][-1][1]
        share.setdefault(key, []).append(r["mean_share"][-1][1])

    def paired(key, other):
        d = [loss - final[other][s] for s, loss in final[key].items() if s in final.get(other, {})]
        error = statistics.stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.nan
        return statistics.mean(d) if d else math.nan, error

    rows = []
    for key, losses in final.items():
        loss = statistics.mean(losses.values())
        gap, gap_error = paired(key, ("bf16", 0.0))
        to_base, to_base_error = paired(key, (base, key[1]))
        rows.append({
            "label": key[0], "added_mean": key[1], "seeds": len(losses), "loss": loss,
            "share": statistics.mean(share[key]), "gap": gap, "gap_error": gap_error,
            "percent": 100 * gap / (loss - gap), "percent_error": 100 * gap_error / (loss - gap),
            "to_base": to_base, "to_base_error": to_base_error,
        })  # fmt: skip
    return rows
