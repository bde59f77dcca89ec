"""Values of each item of lm-eval's tasks, behind its scores (see `sbeval.tables.values`).

metric            value of an item
acc, acc_norm     1 where the answer is right, else 0; so for each metric that lm-eval averages
log_probability   of the right answer, in nats: of several choices, of a continuation, or of a whole text
words, bytes      of a whole text, by which its log-probability is divided
"""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd

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
            found[metric] = value
    if task.OUTPUT_TYPE == "multiple_choice" and (right := _right(task, sample["doc"])) is not None:
        found["log_probability"] = sample["filtered_resps"][right][0]
    yield from found.items()


def _right(task: Any, item: Any) -> int | None:
    """Return the index of the right choice; None where several are right, or none of the choices."""
    right = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    choices = task.doc_to_choice(item)
    if isinstance(right, str):
        return choices.index(right) if right in choices else None
    return right if isinstance(right, int) and 0 <= right < len(choices) else None
