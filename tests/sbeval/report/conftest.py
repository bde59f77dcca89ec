"""Made-up result tables."""

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import pytest

Row = dict[str, Any]
COMMON: Row = {
    "options": "",
    "seed": 0,
    "stderr": 0.0,
    "n": 100,
    "preset": "paper",
    "corpus": "books",
    "tokenizer": "bpe:8192",
    "dtype": "bfloat16",
    "device": "a card",
    "model": "1b",
    "params": 10**9,
    "train_tokens": 10**10,
    "train_len": 2048,
    "eval_len": 16384,
    "task": "",
}


@pytest.fixture
def frame() -> Callable[..., pd.DataFrame]:
    """A table of rows, which share the keywords and, where they have no other, COMMON."""

    def build(rows: Iterable[Row], **common: Any) -> pd.DataFrame:
        return pd.DataFrame([COMMON | common | row for row in rows])

    return build


@pytest.fixture
def perplexities(frame: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """Perplexities by context, {method: {context: values of the seeds}}, of models old enough unless told otherwise.

    Canaries, with two seeds each, are added for methods that are not given: a sliding window and NoPE behind RoPE.
    """

    def build(values: dict[str, dict[int, list[float]]], *, canaries: bool = True, **common: Any) -> pd.DataFrame:
        at = next(iter(values["rope"]))
        last = list(values["rope"])[-1]
        level = values["rope"][at][0]
        behind = {"sliding_window": 1.03 * level, "nope": 1.06 * level}
        grown = {name: {at: [value] * 2, last: [value] * 2} for name, value in behind.items()}
        rows = [
            {
                "attention": name,
                "context_length": context,
                "seed": seed,
                "value": value,
                "cell": f"{name}-{seed}-{common}",
            }
            for name, contexts in ((grown if canaries else {}) | values).items()
            for context, seeds in contexts.items()
            for seed, value in enumerate(seeds)
        ]
        return frame(rows, metric="perplexity", **common)

    return build
