"""Multi-query repeated associative recall: accuracy by the number of key-value pairs, and what older values cost."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sbeval.errors import InputError
from sbeval.plots import style
from sbeval.table import numbers

TABLE = "mqrar"
ALWAYS = ("model", "vocab_size", "seq_len")
OTHERS = ("task", "width", "layers", "heads", "train_len", "eval_len", "preset", "dtype")
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", "kv_pairs", "lr", "split", *ALWAYS, *OTHERS)
CHANCE: dict[str, Any] = {"color": style.MARK, "linewidth": 1.0, "linestyle": ":"}
# a recalled value is fresh when it is its key's first, stale when the key had another before
KINDS = {"fresh": "fresh: the key's first value", "stale": "stale: the key had another"}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table, one row of panels for each setting in which the same number of pairs was measured.

    Left: accuracy over all queries, with the chance level. Right: queries for fresh values beside those for stale ones.
    Of several learning rates the one with the best validation accuracy is drawn.
    """
    table = table[table["metric"].isin(["accuracy", "validation_accuracy"])]
    table = best_rates(numbers(table, ["kv_pairs", "vocab_size", "lr"]))
    if not (table["split"] == "all").any():
        raise InputError("there are no rows with metric 'accuracy' and split 'all' to draw")
    looks = style.looks(table)
    panels = style.panels(table, ALWAYS, OTHERS, within=["kv_pairs"])
    figure, axes = style.pairs(len(panels), share_y=True)
    spreads: list[pd.DataFrame] = []
    for (title, rows), (left, right) in zip(panels, axes, strict=True):
        style.title(left, title)
        spreads += _overall(left, rows[rows["split"] == "all"], looks)
        spreads += _pairs(right, rows[rows["split"].isin(list(KINDS))], looks)
    style.finish(figure, [look.handle() for look in looks.values()], style.explain(spreads, "bars", "sequences"))
    return figure


def best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each method and setting, the accuracy rows of the learning rate with the best validation accuracy.

    The best is that of the highest mean over seeds, of equals the smallest. Where one rate was tried it stays; several
    without validation accuracy are an InputError: the test score must not choose.
    """
    by = ["attention", "options", "kv_pairs", *ALWAYS, *OTHERS]
    kept = []
    for key, rows in table.groupby(by, dropna=False):
        validation = rows[(rows["metric"] == "validation_accuracy") & (rows["split"] == "all")]
        if len(validation):
            rows = rows[rows["lr"] == validation.groupby("lr")["value"].mean().idxmax()]
        if rows["lr"].nunique() > 1:
            rates = ", ".join(f"{rate:g}" for rate in sorted(rows["lr"].unique()))
            raise InputError(
                f"{key[0]} with {key[2]:g} key-value pairs has the learning rates {rates} and no validation_accuracy "
                "to choose by; run the cells again or leave one rate"
            )
        kept.append(rows)
    rows = pd.concat(kept) if kept else table
    return rows[rows["metric"] == "accuracy"]


def _overall(axis: Axes, rows: pd.DataFrame, looks: dict[style.Method, style.Look]) -> list[pd.DataFrame]:
    style.label(axis, "key-value pairs", "accuracy (all queries)")
    counts = sorted(rows["kv_pairs"].unique())
    spreads = []
    for place, (method, look) in enumerate(looks.items()):
        spread = style.spread(style.method(rows, method), ["kv_pairs"])
        # with a single number of pairs the methods would lie on one another
        x = spread["kv_pairs"] * 2 ** (_dodge(place, len(looks)) if len(counts) == 1 else 0)
        _bars(axis, x, spread, look)
        axis.plot(x, spread["mean"], label=look.label, **look.line())
        spreads.append(spread)
    style.ticks(axis, counts)
    if len(counts) == 1:
        axis.set_xlim(counts[0] * 2**-0.5, counts[0] * 2**0.5)
    values = sorted({size - size // 2 for size in rows["vocab_size"]})
    chances = [axis.axhline(1 / value, label=f"chance, 1/{value}", **CHANCE) for value in values]
    style.key(axis, chances)
    return spreads


def _pairs(axis: Axes, rows: pd.DataFrame, looks: dict[style.Method, style.Look]) -> list[pd.DataFrame]:
    """Draw fresh and stale accuracy of a method side by side, joined: the slope is what older values cost."""
    if rows.empty:
        axis.set_axis_off()
        return []
    style.label(axis, "key-value pairs", "accuracy (fresh, stale queries)")
    counts = sorted(rows["kv_pairs"].unique())
    half = 0.2 / len(looks)
    spreads = []
    for place, (method, look) in enumerate(looks.items()):
        for kv_pairs, both in style.method(rows, method).groupby("kv_pairs"):
            spread = style.spread(both, ["split"])
            middle = counts.index(kv_pairs) + _dodge(place, len(looks))
            x = spread["split"].map({"fresh": middle - half, "stale": middle + half})
            axis.plot(x, spread["mean"], color=look.colour, linewidth=1.0, zorder=2)
            _bars(axis, x, spread, look)
            for at, split, mean in zip(x, spread["split"], spread["mean"], strict=True):
                axis.plot([at], [mean], label=f"{look.label}, {split}", **look.line() | _fill(split, look.colour))
            spreads.append(spread)
    axis.set_xticks(range(len(counts)), [f"{count}" for count in counts])
    axis.grid(False, axis="x")
    for index in range(0, len(counts), 2) if len(counts) > 1 else ():
        axis.axvspan(index - 0.5, index + 0.5, color="0.96", zorder=0)
    axis.set_xlim(-0.5, len(counts) - 0.5)
    dot: dict[str, Any] = {"color": style.MARK, "marker": "o", "markersize": 4, "linestyle": "none"}
    style.key(axis, [Line2D([], [], label=KINDS[kind], **dot | _fill(kind, style.MARK)) for kind in KINDS])
    return spreads


def _bars(axis: Axes, x: "pd.Series[float]", spread: pd.DataFrame, look: style.Look) -> None:
    """Draw the spread as upright bars, within what an accuracy can be."""
    axis.vlines(x, spread["low"].clip(lower=0), spread["high"].clip(upper=1), color=look.colour, linewidth=1.0)


def _fill(kind: str, colour: str) -> dict[str, Any]:
    return {"markerfacecolor": colour if kind == "fresh" else "white"}


def _dodge(place: int, count: int) -> float:
    """Spread `count` methods over four fifths of the unit around 0."""
    return 0.8 * ((place + 0.5) / count - 0.5)
