"""The attention maps as one HTML page to hover over: nothing is loaded from elsewhere, so it opens from a file."""

import html

import numpy as np
import pandas as pd

from sbeval.errors import InputError
from sbeval.plots.attention_map import MARKS, NAMES, POWER, TICKS, Map, Model, models, note

# of the largest weight, in light and dark; weight 0 is the page itself
BLUES = ("rgb(1,95,158)", "rgb(120,200,255)")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Attention maps</title>
<link rel="icon" href="data:,">
<style>
:root {{ --ink: #1b1b1b; --page: #ffffff; --panel: #f4f4f4; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --page: #161616; --panel: #222222; }} }}
body {{ margin: 0 auto; max-width: 1500px; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; }}
h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .5rem; }}
.maps {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; background: var(--panel); border-radius: .4rem; padding: .4rem; }}
.square, .square > div {{ height: 100%; }}
.square {{ aspect-ratio: 1; height: auto; }}
figcaption {{ font-size: .85rem; padding: .2rem .4rem; }}
</style>
<script>{library}</script>
</head>
<body>
<h1>Attention maps of repeated associative recall</h1>
<p>{note} Hover over a square, or tap it, for its tokens and its weight. {marks}</p>
{sections}
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {{
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  const blue = dark.matches ? "{dark}" : "{light}";
  const none = blue.replace("rgb(", "rgba(").replace(")", ",0)");
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {{
    Plotly.restyle(plot, {{colorscale: [[[0, none], [1, blue]]]}}, [0]);
    Plotly.relayout(plot, {{"font.color": ink}});
  }}
}}
function fit() {{
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {{
    Plotly.Plots.resize(plot);
    // on a narrow screen only keys have room for their names
    plot.names ??= [...plot.layout.xaxis.ticktext];
    const shown = [...plot.names.keys()].filter(i => plot.clientWidth > 550 || plot.names[i].startsWith("<b>"));
    const names = shown.map(i => plot.names[i]);
    Plotly.relayout(plot, {{
      "xaxis.tickvals": shown, "xaxis.ticktext": names, "yaxis.tickvals": shown, "yaxis.ticktext": names,
    }});
  }}
}}
dark.addEventListener("change", paint);
addEventListener("resize", fit);
paint();
fit();
</script>
</body>
</html>
"""


def page(table: pd.DataFrame) -> str:
    """The page, with a map for each layer and head of each model; InputError where plotly is not installed."""
    try:
        from plotly.io import to_html
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("format html needs the plotly package: pip install 'sbeval[html]'") from None
    found = models(table)
    sections = []
    for index, model in enumerate(found):
        figures = []
        for one in model.maps:
            plot = to_html(
                _figure(model, one), full_html=False, include_plotlyjs=False, validate=True,
                div_id=f"map-{index}-{one.layer}-{one.head}", config={"displayModeBar": False, "responsive": True},
            )  # fmt: skip
            figures.append(f"<figure><figcaption>{one.title}</figcaption><div class=square>{plot}</div></figure>")
        sections.append(f'<h2>{html.escape(model.name)}</h2>\n<div class="maps">{"".join(figures)}</div>')
    signs = {"circle-open": "&#9675;", "square-open": "&#9633;"}
    marks = ", ".join(f'<b style="color:{c}">{signs[shape]}</b> {NAMES[t]}' for t, (_, shape, c) in MARKS.items())
    return PAGE.format(
        library=get_plotlyjs(), note=html.escape(note(found)), marks=marks, sections="\n".join(sections),
        light=BLUES[0], dark=BLUES[1],
    )  # fmt: skip


def _figure(model: Model, one: Map) -> dict[str, object]:
    """What plotly draws of one head."""
    size = len(model.tokens)
    past = np.tri(size, dtype=bool)
    names = [f"<b>{token}</b>" if token < model.half else f"{token}" for token in model.tokens]
    ticks = {
        "tickvals": list(range(size)), "ticktext": names, "showgrid": False, "zeroline": False, "fixedrange": True,
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
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "dragmode": False,
        "margin": {"l": 45, "r": 5, "t": 50, "b": 45}, "hovermode": "closest",
        "xaxis": ticks | {"title": {"text": "key (token)"}, "tickangle": -90},
        "yaxis": ticks | {"title": {"text": "query (token)"}, "range": [size - 0.5, -0.5]},
    }  # fmt: skip
    return {"data": [heat, *marks], "layout": layout}


def _said(model: Model, one: Map, query: int, key: int) -> str:
    asked, seen = model.tokens[query], model.tokens[key]
    kind = next((f", the {target} value" for target in MARKS if (query, key) in model.targets[target]), "")
    return (
        f"query: {_token(model, asked)} at {query}<br>key: {_token(model, seen)} at {key}{kind}"
        f"<br>weight {one.weights[query, key]:.3f}"
    )


def _token(model: Model, token: int) -> str:
    return f"{'key' if token < model.half else 'value'} {token}"
