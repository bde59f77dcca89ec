"""The figure of diagnostics: which rows its panels have."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import diagnostics

COMMON: dict[str, Any] = {
    "model": "25m",
    "options": "",
    "params": 25_000_000,
    "train_len": 512,
    "train_tokens": 10**8,
    "eval_len": 2048,
    "n": 16,
    "stderr": 0.1,
    "corpus": "books",
    "task": "books",
    "tokenizer": "bpe:8192",
    "preset": "h200",
    "dtype": "bfloat16",
    "lr": 2e-3,
    "optimizer": "adamw",
    "batch_tokens": 131072,
    "schedule": "cosine",
    "distance": float("nan"),
    "layer": float("nan"),
    "heads": "",
}


def table() -> pd.DataFrame:
    rows = []
    for attention, seed, seen in [
        (name, seed, seen) for name in ("rope", "alibi") for seed in (0, 1) for seen in (1, 4)
    ]:
        of = COMMON | {"attention": attention, "seed": seed, "tokens_seen": seen * 10**6}
        rows += [of | {"metric": "copy_gain", "distance": d, "value": seen + seed + d / 1000} for d in (64, 256, 1024)]
        rows += [of | {"metric": "passage_gain", "distance": d, "value": d / 1000} for d in (128, 4096)]
        rows.append(of | {"metric": "in_context_score", "value": -seen})
        # a head of its own is not drawn
        rows.append(of | {"metric": "prefix_matching", "distance": 64, "value": 9, "layer": 1})
        rows += [
            of | {"metric": "prefix_matching", "distance": 64, "value": value, "heads": heads}
            for heads, value in (("mean", 0.1), ("highest", 0.2))
        ]
    return pd.DataFrame(rows)


def panel(figure: Figure, title: str) -> Axes:
    return next(axis for axis in figure.axes if title in [text.get_text() for text in axis.texts])


def points(axis: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axis.get_lines() if line.get_label() == label]
    x, y = (np.asarray(data, dtype=float) for data in (line.get_xdata(), line.get_ydata()))
    return list(zip(x.tolist(), y.round(6).tolist(), strict=True))


def test_panels_have_the_means_of_seeds_by_tokens_and_by_distance() -> None:
    figure = diagnostics.draw(table())
    # in millions of tokens, at one distance
    assert points(panel(figure, "copy of 256 random tokens"), "RoPE") == [(1, 1.756), (4, 4.756)]
    assert points(panel(figure, "copy of random tokens"), "ALiBi") == [(64, 4.564), (256, 4.756), (1024, 5.524)]
    assert points(panel(figure, "copy of 64 tokens of text"), "RoPE") == [(128, 0.128), (4096, 4.096)]
    assert points(panel(figure, "best induction head"), "RoPE") == [(1, 0.2), (4, 0.2)]
    assert points(panel(figure, "loss at 500 − loss at 50"), "RoPE") == [(1, -1), (4, -4)]
    # weights were not read
    assert sum(not axis.axison for axis in figure.axes) == 3


def test_a_shorter_distance_is_named() -> None:
    rows = table()
    figure = diagnostics.draw(rows[rows["distance"] != 256])
    assert points(panel(figure, "copy of 64 random tokens"), "RoPE") == [(1, 1.564), (4, 4.564)]


def test_a_line_is_of_the_same_seeds_throughout() -> None:
    rows = table()
    late = rows[rows["tokens_seen"] == 4_000_000]
    rows = pd.concat([rows, late.assign(tokens_seen=16_000_000, value=late["value"] + 10)])
    # of RoPE one seed was not measured after 4 M tokens, and the other also after 64 M
    mine, step = rows["attention"] == "rope", rows["tokens_seen"]
    last = rows[mine & (rows["seed"] == 0) & (step == 16_000_000)].assign(tokens_seen=64_000_000)
    rows = pd.concat([rows[~(mine & (rows["seed"] == 1) & (step == 4_000_000))], last])
    found = points(panel(diagnostics.draw(rows), "copy of 256 random tokens"), "RoPE")
    # half of the way by the logarithm of tokens
    assert found == [(1, 1.756), (4, round(((4.256) + (2.256 + 15.256) / 2) / 2, 6)), (16, 14.756)]
    page = diagnostics.chart(rows).groups[0].panels[0].rows()
    assert page[page["method"] == "RoPE"][diagnostics.SEEN].tolist() == [1, 4, 16]


def test_a_model_of_unknown_training_is_drawn_by_distance_alone() -> None:
    figure = diagnostics.draw(table().assign(tokens_seen=0))
    assert points(panel(figure, "copy of 64 tokens of text"), "RoPE") == [(128, 0.128), (4096, 4.096)]
    assert not any("best induction head" in text.get_text() for axis in figure.axes for text in axis.texts)


def test_the_page_has_the_same_lines() -> None:
    chart = diagnostics.chart(table())
    (over, end) = chart.groups
    assert [one.title for one in over.panels] == [
        "copy of 256 random tokens",
        "best induction head",
        "loss at 500 − loss at 50",
    ]
    assert [one.title for one in end.panels] == ["copy of random tokens", "copy of 64 tokens of text"]
    assert over.title.endswith("over training") and "gain (nats per token)" in over.panels[0].words()


def test_a_table_without_such_rows_is_an_error() -> None:
    with pytest.raises(InputError, match="no rows with one of the metrics copy_gain"):
        diagnostics.draw(table().assign(metric="loss"))
