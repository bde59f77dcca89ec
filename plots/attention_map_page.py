"""The attention maps as one HTML page to hover over: nothing is loaded from elsewhere, so it opens from a file."""

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sbeval.plots import style
from sbeval.plots.attention_map import MARKS, NAMES, POWER, TICKS, Map, Model, models, note
from sbeval.plots.chart import Chart, Group
from sbeval.report import page as pages

SIGNS = {"circle-open": "○", "square-open": "□"}


@dataclass(frozen=True, slots=True)
class Head:
    """The map of one layer and head, as a panel of a page."""

    model: Model
    map: Map

    @property
    def title(self) -> str:
        return self.map.title

    @property
    def css(self) -> str:
        return "height: auto; aspect-ratio: 1"

    def looks(self) -> list[style.Look]:
        return []

    def rows(self) -> pd.DataFrame:
        """What the head does over the test set; the example's weights are in the result table."""
        return pd.DataFrame([
            {"layer": self.map.layer, "head": self.map.head, "target": target, "mean weight": weight}
            for target, weight in (("latest", self.map.latest), ("stale", self.map.stale))
        ])  # fmt: skip

    def words(self) -> str:
        return f"{self.model.name}. Map of attention weights by query and key; {self.title}, mean over the test set."

    def plotly(self) -> dict[str, Any]:
        return _figure(self.model, self.map)


def chart(table: pd.DataFrame) -> Chart:
    """The maps as a figure among others."""
    found = models(table)
    groups = [Group(model.name, [Head(model, one) for one in model.maps]) for model in found]
    sentence = (
        "Attention weight (0 to 1) of every key at every query of one example: at a query whose key was assigned "
        "again, does a head look at the latest value or at a stale one?"
    )
    marks = ", ".join(f"{SIGNS[shape]} {NAMES[target]}" for target, (_, shape, _) in MARKS.items())
    return Chart("Attention maps", sentence, groups, f"{note(found)} {marks}.")


def page(table: pd.DataFrame) -> str:
    """The page, with a map for each layer and head of each model; InputError where plotly is not installed."""
    found = models(table)
    sections = []
    for model in found:
        figures = [
            f"<figure class=panel><figcaption>{head.title}</figcaption>"
            f"{pages.plot(head.plotly(), head.words(), head.css)}</figure>"
            for head in (Head(model, one) for one in model.maps)
        ]
        sections.append(f'<h2>{html.escape(model.name)}</h2>\n<div class="panels">{"".join(figures)}</div>')
    marks = ", ".join(f'<b style="color:{c}">{SIGNS[shape]}</b> {NAMES[t]}' for t, (_, shape, c) in MARKS.items())
    body = (
        f"<main><h1>Attention maps of repeated associative recall</h1>\n<p>{html.escape(note(found))} Hover over a "
        f"square, or tap it, for its tokens and its weight. {marks}</p>\n{''.join(sections)}</main>"
    )
    return pages.document("Attention maps", body)


def _figure(model: Model, one: Map) -> dict[str, Any]:
    """What plotly draws of one head."""
    size = len(model.tokens)
    past = np.tri(size, dtype=bool)
    names = [f"<b>{token}</b>" if token < model.half else f"{token}" for token in model.tokens]
    ticks = {
        "tickvals": list(range(size)), "ticktext": names, "showgrid": False, "zeroline": False,
        "range": [-0.5, size - 0.5], "tickfont": {"size": 7}, "tickangle": 0,
    }  # fmt: skip
    heat = {
        "type": "heatmap", "zmin": 0, "zmax": 1, "hoverinfo": "text", "hoverongaps": False,
        "z": [[round(float(w) ** POWER, 4) if past[q, k] else None for k, w in enumerate(row)]
              for q, row in enumerate(one.weights)],
        "text": [[_said(model, one, q, k) if past[q, k] else "" for k in range(size)] for q in range(size)],
        "colorbar": {
            "tickvals": [tick**POWER for tick in TICKS], "ticktext": [f"{tick:g}" for tick in TICKS], "thickness": 8,
            "orientation": "h", "y": 1.01, "yanchor": "bottom", "outlinewidth": 0, "tickfont": {"size": 9},
        },
    }  # fmt: skip
    marks = [
        {
            "type": "scatter", "mode": "markers", "hoverinfo": "skip", "showlegend": False, "name": NAMES[target],
            "x": [k for _, k in model.targets[target]], "y": [q for q, _ in model.targets[target]],
            "marker": {"symbol": shape, "color": colour, "size": 8, "line": {"width": 1.5}},
        }
        for target, (_, shape, colour) in MARKS.items()
    ]  # fmt: skip
    layout = {
        "margin": {"l": 45, "r": 5, "t": 50, "b": 45},
        "xaxis": ticks | {"title": {"text": "key (token)"}, "tickangle": -90},
        "yaxis": ticks | {"title": {"text": "query (token)"}, "range": [size - 0.5, -0.5]},
    }  # fmt: skip
    return {"data": [heat, *marks], "layout": layout, "shaded": True, "sparse": True}


def _said(model: Model, one: Map, query: int, key: int) -> str:
    asked, seen = model.tokens[query], model.tokens[key]
    kind = next((f", the {target} value" for target in MARKS if (query, key) in model.targets[target]), "")
    return (
        f"query: {_token(model, asked)} at {query}<br>key: {_token(model, seen)} at {key}{kind}"
        f"<br>weight {one.weights[query, key]:.3f}"
    )


def _token(model: Model, token: int) -> str:
    return f"{'key' if token < model.half else 'value'} {token}"
