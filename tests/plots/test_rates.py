"""The figure of learning rates: a panel for each optimizer and batch, a point for each seed."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.plots import rates

COMMON: dict[str, Any] = {
    "task": "books", "model": "25m", "corpus": "books", "tokenizer": "bpe:8192", "preset": "figure5", "dtype": "x",
    "train_len": 2048, "eval_len": 65536, "context_length": 2048, "metric": "perplexity", "options": "",
    "train_tokens": 10**8, "batch_tokens": 131072, "schedule": "cosine", "optimizer": "adamw",
}  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3)


def table() -> pd.DataFrame:
    rows = [
        COMMON | {"attention": name, "seed": seed, "lr": rate, "value": float(np.exp(3 + place + seed / 10 + rate))}
        for place, name in enumerate(("rope", "stick_breaking"))
        for seed in (0, 1)
        for rate in RATES
    ]
    muon = [row | {"optimizer": "muon", "batch_tokens": 32768, "value": row["value"] / 2} for row in rows]
    # one rate is no curve
    other = [row | {"corpus": "plays"} for row in rows if row["lr"] == 1e-3]
    return pd.DataFrame([*rows, *muon, *other])


def test_a_panel_an_optimizer_and_a_point_a_seed() -> None:
    figure = rates.draw(table())
    adamw, muon = figure.axes
    (heading, name), (other,) = ([text.get_text() for text in axis.texts] for axis in figure.axes)
    assert heading == "25m model, trained at length 2048, books"
    assert (name, other) == ("AdamW, 131,072 tokens a step", "Muon, 32,768 tokens a step")
    assert adamw.get_ylim() == muon.get_ylim()
    for axis, less in ((adamw, 0.0), (muon, np.log(2))):
        means: dict[int, Any] = {}
        points: dict[int, Any] = {}
        for line in axis.get_lines():
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            (points if line.get_linestyle() == "None" else means)[len(means)] = (x, y)
        for (x, y), place in zip(means.values(), (1, 0), strict=True):
            assert x.tolist() == list(RATES)
            assert y == pytest.approx(3.05 + place + np.array(RATES) - less)
        assert [len(x) for x, _ in points.values()] == [6, 6]
        assert [text.get_text() for text in axis.get_xticklabels()] == ["0.0005", "0.001", "0.002"]


def test_given_models_have_no_rate() -> None:
    given = dict.fromkeys(("lr", "batch_tokens", "schedule", "optimizer"), "")
    rows = table().assign(**given)
    assert not rates.has_rows(rows)
    # beside trained ones the column has numbers, and none for them
    both = pd.concat([table(), rows.assign(lr=np.nan, batch_tokens=np.nan)])
    assert rates.has_rows(both) and len(rates.draw(both).axes) == 2


def test_a_rate_that_diverges_flattens_no_other() -> None:
    rows = table()
    rows = rows[rows["optimizer"] == "adamw"].copy()
    stick = rows["attention"] == "stick_breaking"
    rows["value"] = rows["value"].mask(stick, 0.95 * np.exp(3)).mask(stick & (rows["lr"] == RATES[-1]), np.exp(9))
    figure = rates.draw(rows)
    low, high = figure.axes[0].get_ylim()
    assert high - low <= rates.SHOWN + 0.07
    assert str(figure.get_supxlabel()).endswith(". stick-breaking leaves the panels.")


def test_the_page_has_the_same_numbers() -> None:
    chart = rates.chart(table())
    rows = chart.groups[0].panels[0].rows()
    mine = rows[rows["method"] == "RoPE"]["loss (nats per token)"].to_numpy()
    assert mine == pytest.approx(3.05 + np.array(RATES))
    assert chart.note == "Points: up to 2 seeds; lines: means of those at all rates."


def test_a_line_is_of_the_seeds_that_all_rates_have() -> None:
    """At the best rate there is a second seed, which is worse by 0.1."""
    rows = table()
    rows = rows[(rows["seed"] == 0) | (rows["lr"] == RATES[1])]
    line = rates.chart(rows).groups[0].panels[0].rows().query("method == 'RoPE'")
    assert line["loss (nats per token)"].to_numpy() == pytest.approx(3 + np.array(RATES))


def test_a_table_of_one_rate_has_no_such_figure() -> None:
    one = table()
    one = one[one["lr"] == 1e-3]
    assert not rates.has_rows(one) and not rates.has_rows(one.drop(columns="lr")) and rates.has_rows(table())
    with pytest.raises(InputError, match="no models that differ in their learning rate alone"):
        rates.draw(one)
