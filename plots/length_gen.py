"""Length generalisation: loss by position in the document, and perplexity by context length."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbeval.errors import InputError
from sbeval.plots import style
from sbeval.table import numbers

TABLE = "length_gen"
ALWAYS = ("model", "train_len", "corpus")
OTHERS = ("task", "eval_len", "tokenizer", "preset", "train_tokens", "dtype")
FACTORS = ("position_start", "position_end", "context_length")
COLUMNS = ("attention", "options", "seed", "metric", "value", "stderr", *ALWAYS, *OTHERS, *FACTORS)
# under every method the first tokens of a document are hard to predict: shown, they would set the scale
FIRST_SHOWN = 1 / 16
# perplexities further apart than this are drawn on a logarithmic axis
WIDE = 8
# a line with more points than this has markers on some of them
MARKED = 12


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table, one row of panels for each model, training length and corpus.

    Left: L(i), the mean loss of bins of positions (counted from 1), at the bin's geometric middle, from a sixteenth of
    the training length on. Right: perplexity over the first tokens of a document, by how many.
    """
    table = table[table["metric"].isin(["loss", "perplexity"])]
    if table.empty:
        raise InputError("there are no rows with metric 'loss' or 'perplexity' to draw")
    looks = style.looks(table)
    panels = style.panels(table, ALWAYS, OTHERS)
    figure, axes = style.pairs(len(panels))
    spreads: list[pd.DataFrame] = []
    for (title, rows), (left, right) in zip(panels, axes, strict=True):
        style.title(left, title)
        train_len = int(rows["train_len"].iloc[0])
        spreads += _losses(left, rows[rows["metric"] == "loss"], looks, train_len)
        spreads += _perplexities(right, rows[rows["metric"] == "perplexity"], looks, train_len)
    style.finish(figure, [look.handle() for look in looks.values()], style.explain(spreads, "bands", "documents"))
    return figure


def _losses(
    axis: Axes, rows: pd.DataFrame, looks: dict[style.Method, style.Look], train_len: int
) -> list[pd.DataFrame]:
    style.label(axis, "position in the document (tokens)", "loss (nats per token)")
    rows = numbers(rows, ["position_start", "position_end"])
    rows = rows.assign(end=rows["position_end"] - 1)
    rows = rows[rows["end"] > FIRST_SHOWN * min(train_len, rows["end"].max())]
    return _lines(axis, rows.assign(x=np.sqrt(rows["position_start"] * rows["end"])), looks, train_len)


def _perplexities(
    axis: Axes, rows: pd.DataFrame, looks: dict[style.Method, style.Look], train_len: int
) -> list[pd.DataFrame]:
    style.label(axis, "context length (tokens)", "perplexity (per token)")
    # perplexity over windows of whole documents has no context length
    rows = numbers(rows[rows["context_length"].notna()], ["context_length"])
    if len(rows) and rows["value"].max() > WIDE * rows["value"].min():
        style.decades(axis)
    return _lines(axis, rows.assign(x=rows["context_length"], end=rows["context_length"]), looks, train_len)


def _lines(axis: Axes, rows: pd.DataFrame, looks: dict[style.Method, style.Look], train_len: int) -> list[pd.DataFrame]:
    """Draw a line and a band for each method; a panel without rows stays out."""
    if rows.empty:
        axis.set_axis_off()
        return []
    spreads = []
    for place, (method, look) in enumerate(looks.items()):
        spread = style.spread(style.method(rows, method), ["x"])
        # of many points every few have a marker, not where another method has its own
        every = math.ceil(len(spread) / MARKED) or 1
        marked = (place * every // len(looks), every)
        axis.plot(spread["x"], spread["mean"], label=look.label, markevery=marked, **look.line())
        axis.fill_between(spread["x"], spread["low"], spread["high"], color=look.colour, alpha=0.2, linewidth=0)
        spreads.append(spread)
    style.octaves(axis, min(rows["x"].min(), train_len), max(rows["end"].max(), train_len), train_len)
    style.training_length(axis, train_len)
    return spreads
