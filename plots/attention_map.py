"""Attention maps: the weights of one example in every layer and head, with the latest and the stale values marked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from sbeval.errors import NothingToDraw
from sbeval.plots import legend, style
from sbeval.plots.chart import Chart, Group
from sbeval.tables import intervals
from sbeval.tables.selection import ATTENTION_MAP
from sbeval.tables.table import numbers

TABLE = "attention_map"
COLUMNS = (
    "attention",
    "options",
    "model",
    "seed",
    "cell",
    "metric",
    "value",
    *ATTENTION_MAP,
    "layers",
    "heads",
    "layer",
    "head",
    "target",
    "split",
    "query",
    "key",
)
# marks of the two kinds of assignment: matplotlib's marker, plotly's symbol, a letter like it, and the colour
MARKS = {"latest": ("o", "circle-open", "○", legend.COLOURS[2]), "stale": ("s", "square-open", "□", legend.COLOURS[1])}
NAMES = {"latest": "latest value of the key (right)", "stale": "stale value (wrong)"}
FUTURE = "0.94"
TOKEN_PT = 3.2
# weights are shown on a scale of their square roots, on which small ones can be seen
POWER, TICKS = 0.5, (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)

# maps beside each other whose titles are legible, and maps of a model that one figure has
MOST_COLUMNS, MOST = 2, 8

Floats = npt.NDArray[np.float64]
Position = tuple[int, int]
# metrics without which there is no map of a model
NEEDED = ("share", "token", "weight")


@dataclass(frozen=True, slots=True)
class Map:
    """One head: its weights, query by key, and its mean weights on latest and stale values over the test set."""

    layer: int
    head: int
    weights: Floats
    latest: float
    stale: float

    @property
    def title(self) -> str:
        return f"layer {self.layer}, head {self.head}: {self.latest:.2f} on latest, {self.stale:.2f} on stale"


@dataclass(frozen=True, slots=True)
class Model:
    """One model's maps of the example; `targets` are the (query, key) positions of each mark."""

    name: str
    half: int  # the first value token
    tokens: list[int]
    targets: dict[str, list[Position]]
    maps: list[Map]


def models(table: pd.DataFrame) -> list[Model]:
    """Return the models of a table, by setting and method; of several seeds the lowest."""
    table = table[table["metric"].isin(["accuracy", *NEEDED])]
    found = table[table["metric"].isin(NEEDED)].groupby("cell")["metric"].nunique()
    table = table[table["cell"].isin(found.index[found == len(NEEDED)])]
    if table.empty:
        raise NothingToDraw(f"there is no model with rows of the metrics {', '.join(NEEDED)} to draw")
    looks = legend.looks(table)
    drawn = []
    for _, setting in table.groupby(ATTENTION_MAP):
        for method, look in looks.items():
            for name, rows in intervals.method(setting, method).groupby("model"):
                rows = rows[rows["seed"] == rows["seed"].min()]
                for _, cell in rows.groupby("cell"):
                    drawn.append(_model(cell, look.label, str(name)))
    return drawn


def _model(rows: pd.DataFrame, label: str, name: str) -> Model:
    tokens = numbers(rows[rows["metric"] == "token"], ["key", "value"]).sort_values("key")["value"].tolist()
    weights = numbers(rows[rows["metric"] == "weight"], ["layer", "head", "query", "key"])
    first = weights[(weights["layer"] == 1) & (weights["head"] == 1)]
    targets = {
        target: [(int(q), int(k)) for q, k in first.loc[first["target"] == target, ["query", "key"]].to_numpy()]
        for target in MARKS
    }
    accuracy = rows[(rows["metric"] == "accuracy") & (rows["split"] == "stale")]["value"].mean()
    share = rows[rows["metric"] == "share"]
    maps = []
    for layer, head in weights[["layer", "head"]].drop_duplicates().sort_values(["layer", "head"]).to_numpy():
        of_head = weights[(weights["layer"] == layer) & (weights["head"] == head)]
        dense = np.zeros((len(tokens), len(tokens)))
        dense[of_head["query"], of_head["key"]] = of_head["value"]
        mine = share[(share["layer"] == layer) & (share["head"] == head)].groupby("target")["value"].mean()
        maps.append(Map(int(layer), int(head), dense, float(mine["latest"]), float(mine["stale"])))
    half = int(rows["vocab_size"].iloc[0]) // 2
    title = f"{label}, model {name}: accuracy {accuracy:.2f} at queries with stale values"
    return Model(title, half, [int(token) for token in tokens], targets, maps)


def draw(table: pd.DataFrame) -> Figure:
    """Draw a panel for each layer (columns) and head of each model (rows)."""
    drawn = models(table)
    columns = min(MOST_COLUMNS, max(each.layer for model in drawn for each in model.maps))
    lines = [(model, line) for model in drawn for line in _lines(model, columns)]
    side = style.WIDTH_IN / columns
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.08, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=(style.WIDTH_IN, (side + 0.15) * len(lines) + 1.0), layout=layout)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    norm, colours = PowerNorm(POWER, 0, 1), sns.color_palette("Blues", as_cmap=True)
    for row, (model, line) in zip(axes, lines, strict=True):
        for axis, one in zip(row, line, strict=True):
            if one is None:
                axis.set_axis_off()
                continue
            _panel(axis, model, one, norm, colours, 72 * side / len(model.tokens))
        style.title(row[0], model.name)
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, location="bottom", shrink=0.5, aspect=40, ticks=TICKS, pad=0.01
    )
    bar.set_label("attention weight", fontsize=style.TEXT_PT)
    bar.ax.set_xticklabels([f"{tick:g}" for tick in TICKS], fontsize=style.SMALL_PT)
    style.finish(figure, list(_handles()), note(drawn))
    return figure


def shown(model: Model) -> list[Map]:
    """Return the maps that are drawn: of many those with the most weight on values of the key, by layer and head."""
    most = sorted(model.maps, key=lambda one: one.latest + one.stale, reverse=True)[:MOST]
    return sorted(most, key=lambda one: (one.layer, one.head))


def _lines(model: Model, columns: int) -> list[list[Map | None]]:
    """Return rows of maps: a row for each head and a column for each layer, or as many as fit where layers do not."""
    maps = shown(model)
    if max(each.layer for each in model.maps) > columns:
        filled = [*maps, *[None] * (-len(maps) % columns)]
        return [list(filled[start : start + columns]) for start in range(0, len(filled), columns)]
    at = {(each.head, each.layer): each for each in maps}
    return [[at.get((head, layer)) for layer in range(1, columns + 1)] for head in sorted({one.head for one in maps})]


def note(drawn: list[Model]) -> str:
    """Return what a reader must know beside the maps."""
    cut = any(len(model.maps) > MOST for model in drawn)
    heads = f" Of each model the {MOST} heads with the most weight on values of the key." if cut else ""
    # with a remainder that goes elsewhere, the label says so
    remainder = any("stick" in model.name and "remainder=" not in model.name for model in drawn)
    return (
        "One test example; tokens as numbers, keys bold. Weights in titles: mean over the test set."
        + heads
        + (" Stick-breaking's diagonal is the remainder." if remainder else "")
    )


def _panel(axis: Axes, model: Model, one: Map, norm: PowerNorm, colours: Any, points: float) -> None:
    """Draw one head; a square of the map is about `points` wide."""
    size = len(model.tokens)
    future = np.triu(np.ones((size, size), dtype=bool), 1)
    axis.set_facecolor(FUTURE)
    # an image in the file, but never smoothed
    axis.imshow(np.ma.masked_where(future, one.weights), cmap=colours, norm=norm, interpolation="none")
    for target, (marker, _, _, colour) in MARKS.items():
        places = np.array(model.targets[target]).reshape(-1, 2)
        axis.plot(
            places[:, 1],
            places[:, 0],
            linestyle="none",
            marker=marker,
            markersize=1.3 * points,
            markeredgewidth=0.6,
            markeredgecolor=colour,
            markerfacecolor="none",
            label=NAMES[target],
        )
    style.label(axis, "key (token)", "query (token)")
    axis.annotate(
        one.title, (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points", fontsize=style.SMALL_PT
    )
    axis.set_xticks(range(size), [str(token) for token in model.tokens], fontsize=TOKEN_PT, rotation=90)
    axis.set_yticks(range(size), [str(token) for token in model.tokens], fontsize=TOKEN_PT)
    axis.tick_params(length=1, width=0.3, pad=1)
    for text, token in zip((*axis.get_xticklabels(), *axis.get_yticklabels()), 2 * model.tokens, strict=True):
        text.set(**{"color": "black", "fontweight": "bold"} if token < model.half else {"color": "0.45"})


def _handles() -> Iterator[Line2D]:
    for target, (marker, _, _, colour) in MARKS.items():
        yield Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            markersize=5,
            markeredgecolor=colour,
            markerfacecolor="none",
            label=NAMES[target],
        )


@dataclass(frozen=True, slots=True)
class Head:
    """The map of one layer and head as a panel of a page."""

    model: Model
    map: Map

    @property
    def title(self) -> str:
        return self.map.title

    @property
    def css(self) -> str:
        return "height: auto; aspect-ratio: 1"

    def looks(self) -> list[legend.Look]:
        return []

    def rows(self) -> pd.DataFrame:
        """Return the head's means over the test set; the example's weights are in the result table."""
        means = {"target": ["latest", "stale"], "mean weight": [self.map.latest, self.map.stale]}
        return pd.DataFrame({"layer": self.map.layer, "head": self.map.head, **means})

    def words(self) -> str:
        return f"{self.model.name}. Map of attention weights by query and key; {self.title}, mean over the test set."

    def plotly(self) -> dict[str, Any]:
        return _plotly(self.model, self.map)


def chart(table: pd.DataFrame) -> Chart:
    """Return the interactive figure, a panel for each layer and head."""
    drawn = models(table)
    groups = [Group(model.name, [Head(model, one) for one in shown(model)]) for model in drawn]
    sentence = (
        "Attention weight (0 to 1) of every key at every query of one example: at a query whose key was assigned "
        "again, does a head attend to the latest value or to a stale one?"
    )
    marks = ", ".join(f"{letter} {NAMES[target]}" for target, (_, _, letter, _) in MARKS.items())
    return Chart("Attention maps", sentence, groups, f"{note(drawn)} {marks}.")


def _plotly(model: Model, one: Map) -> dict[str, Any]:
    """Return data and layout of one head for plotly."""
    size = len(model.tokens)
    past = np.tri(size, dtype=bool)
    names = [f"<b>{token}</b>" if token < model.half else f"{token}" for token in model.tokens]
    ticks = {
        "tickvals": list(range(size)),
        "ticktext": names,
        "showgrid": False,
        "zeroline": False,
        "range": [-0.5, size - 0.5],
        "tickfont": {"size": 7},
        "tickangle": 0,
    }
    heat = {
        "type": "heatmap",
        "zmin": 0,
        "zmax": 1,
        "hoverinfo": "text",
        "hoverongaps": False,
        "z": [
            [round(float(w) ** POWER, 4) if past[q, k] else None for k, w in enumerate(row)]
            for q, row in enumerate(one.weights)
        ],
        "text": [[_hover(model, one, q, k) if past[q, k] else "" for k in range(size)] for q in range(size)],
        "colorbar": {
            "tickvals": [tick**POWER for tick in TICKS],
            "ticktext": [f"{tick:g}" for tick in TICKS],
            "thickness": 8,
            "orientation": "h",
            "y": 1.01,
            "yanchor": "bottom",
            "outlinewidth": 0,
            "tickfont": {"size": 9},
        },
    }
    marks = [
        {
            "type": "scatter",
            "mode": "markers",
            "hoverinfo": "skip",
            "showlegend": False,
            "name": NAMES[target],
            "x": [k for _, k in model.targets[target]],
            "y": [q for q, _ in model.targets[target]],
            "marker": {"symbol": symbol, "color": colour, "size": 8, "line": {"width": 1.5}},
        }
        for target, (_, symbol, _, colour) in MARKS.items()
    ]
    layout = {
        "margin": {"l": 45, "r": 5, "t": 50, "b": 45},
        "xaxis": ticks | {"title": {"text": "key (token)"}, "tickangle": -90},
        "yaxis": ticks | {"title": {"text": "query (token)"}, "range": [size - 0.5, -0.5]},
    }
    return {"data": [heat, *marks], "layout": layout, "shaded": True, "sparse": True}


def _hover(model: Model, one: Map, query: int, key: int) -> str:
    kind = next((f", the {target} value" for target in MARKS if (query, key) in model.targets[target]), "")
    from_token, to_token = _token(model, model.tokens[query]), _token(model, model.tokens[key])
    return f"query: {from_token} at {query}<br>key: {to_token} at {key}{kind}<br>weight {one.weights[query, key]:.3f}"


def _token(model: Model, token: int) -> str:
    return f"{'key' if token < model.half else 'value'} {token}"
