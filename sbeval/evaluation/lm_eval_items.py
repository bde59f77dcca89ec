"""Values of each item of lm-eval's tasks, behind its scores (see `sbeval.tables.values`).

metric            value of an item
acc, acc_norm     1 where the answer is right, else 0; so for each metric that lm-eval averages
log_probability   of the right answer, in nats: of several choices, of a continuation, or of a whole text
answer_bytes      UTF-8 bytes of that answer as the model reads it, with the space before it; not for whole texts
words, bytes      of a whole text, by which its log-probability is divided

`gold_bits_per_byte` is the cost of right answers: no chance floor, and it moves in models that guess.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd

from sbeval.evaluation import lm_eval_choices
from sbeval.tables import statistics
from sbeval.tables.statistics import Estimate

# a text's metrics, which lm-eval calculates from its log-probability and one of these
AMOUNTS = {"word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}
COLUMNS = ("metric", "unit_id", "value", "part", "filter")
# as of losses by step
DECIMALS = 4


def values(name: str, tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Return the values of all items, with the factors `part` and `filter` of their rows.

    name: of the benchmark. samples: lm-eval's, by task. `unit_id` is an item's number in its task.
    """
    rows = [
        (metric, str(sample["doc_id"]), value, "" if task == name else task, _filter(sample))
        for task, some in samples.items()
        for sample in some
        for metric, value in _numbers(tasks[task], sample)
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.assign(value=frame["value"].astype(float).round(DECIMALS))


def gold_bits_per_byte(frame: pd.DataFrame, parts: Collection[str]) -> Estimate | None:
    """Return the bits of all right answers of these parts over their bytes; None where no answer is known.

    frame: as `values` returns it. Errors are over items.
    """
    mine = frame[frame["part"].isin(parts) & frame["metric"].isin(["log_probability", "answer_bytes"])]
    items = mine.pivot_table("value", ["part", "unit_id"], "metric", aggfunc="first")
    if "answer_bytes" not in items or (items := items.dropna()).empty:
        return None
    bits, size = (items[name].to_numpy(dtype=float) for name in ("log_probability", "answer_bytes"))
    return statistics.ratio(-bits / math.log(2), size)


def _filter(sample: Mapping[str, Any]) -> str:
    return "" if sample["filter"] == "none" else str(sample["filter"])


def _numbers(task: Any, sample: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an item; metrics of another kind, such as pairs for an F1 over all items, have none."""
    found: dict[str, float] = {}
    for metric in sample["metrics"]:
        value = sample[metric]
        if metric in AMOUNTS:
            found["log_probability"], found[AMOUNTS[metric]] = value
        elif metric == "perplexity":
            found["log_probability"] = value
        elif isinstance(value, Real):
            found[metric] = float(value)
    right = [0] if task.OUTPUT_TYPE == "loglikelihood" else []
    if task.OUTPUT_TYPE == "multiple_choice":
        right = lm_eval_choices.right(task, sample["doc"])
    # of several none is the answer
    if len(right) == 1:
        found["log_probability"] = sample["filtered_resps"][right[0]][0]
        found["answer_bytes"] = len(sample["arguments"][right[0]][1].encode())
    yield from found.items()
