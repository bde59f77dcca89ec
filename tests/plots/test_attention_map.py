"""The figure and the page hold the weights and marks of the table."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.plots import attention_map
from sbeval.report import html
from sbeval.report.figures import draw_figures

TOKENS = [1, 7, 2, 5, 1, 8, 1, 6]
SIZE = len(TOKENS)
LATEST, STALE = {(4, 1), (6, 5)}, {(6, 1)}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def weights(seed: int) -> npt.NDArray[np.float64]:
    found = np.tril(np.random.default_rng(seed).random((SIZE, SIZE)))
    return np.asarray((found / found.sum(1, keepdims=True)).round(4))


def cell(attention: str, seed: int = 0, layers: int = 2, heads: int = 1, cell: str = "") -> pd.DataFrame:
    common: dict[str, Any] = {
        "task": "mqrar",
        "model": f"{layers}x8",
        "attention": attention,
        "options": "",
        "seed": seed,
        "kv_pairs": 2,
        "seq_len": SIZE,
        "vocab_size": 10,
        "layers": layers,
        "heads": heads,
        "split": "",
        "target": "",
        "cell": cell or f"{attention}-{seed}",
    }
    rows: list[dict[str, Any]] = [
        common | {"metric": "token", "value": token, "key": key} for key, token in enumerate(TOKENS)
    ]
    rows.append(common | {"metric": "accuracy", "split": "stale", "value": 0.5 + seed / 8})
    for layer in range(1, layers + 1):
        for head in range(1, heads + 1):
            where = common | {"layer": layer, "head": head}
            for target, value in (("latest", 0.25), ("stale", 0.125)):
                rows.append(where | {"metric": "share", "split": "stale", "target": target, "value": value * layer})
            for (query, key), weight in np.ndenumerate(weights(seed + 10 * layer + head)):
                target = "latest" if (query, key) in LATEST else "stale" if (query, key) in STALE else ""
                if weight or target:
                    place = {"query": query, "key": key, "target": target}
                    rows.append(where | {"metric": "weight", "value": weight} | place)
    return pd.DataFrame(rows)


def table(*cells: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(cells, ignore_index=True)


def test_panels_hold_the_weights_and_the_marks() -> None:
    figure = attention_map.draw(table(cell("rope"), cell("stick_breaking", heads=2)))
    panels = [axis for axis in figure.axes if axis.get_images()]
    # stick-breaking first, a row a head and a column a layer; then rope
    order = [(layer, head) for head in (1, 2) for layer in (1, 2)] + [(1, 1), (2, 1)]
    assert len(panels) == len(order)
    for axis, (layer, head) in zip(panels, order, strict=True):
        shown = axis.get_images()[0].get_array()
        assert isinstance(shown, np.ma.MaskedArray)
        np.testing.assert_array_equal(shown.filled(0), weights(10 * layer + head))
        np.testing.assert_array_equal(shown.mask, np.triu(np.ones((SIZE, SIZE), dtype=bool), 1))
        marks = {str(line.get_label()): line for line in axis.get_lines()}
        for target, places in (("latest", LATEST), ("stale", STALE)):
            line = marks[attention_map.NAMES[target]]
            places_drawn = zip(np.asarray(line.get_ydata()), np.asarray(line.get_xdata()), strict=True)
            assert set(places_drawn) == places
        assert [text.get_text() for text in axis.get_xticklabels()] == [str(token) for token in TOKENS]
        assert axis.texts[0].get_text() == (
            f"layer {layer}, head {head}: {0.25 * layer:.2f} on latest, {0.125 * layer:.2f} on stale"
        )
    said = [text.get_text() for text in panels[0].texts]
    assert any("stick-breaking" in text and "accuracy 0.50" in text for text in said)


def test_of_several_seeds_the_first_is_drawn() -> None:
    (model,) = attention_map.models(table(cell("rope", 3), cell("rope", 1)))
    np.testing.assert_array_equal(model.maps[0].weights, weights(12))


@pytest.mark.parametrize("metric", ["share", "token", "weight"])
def test_a_model_that_lacks_a_metric_is_left_out(metric: str) -> None:
    rows = cell("rope")
    lacks = rows[rows["metric"] != metric]
    with pytest.raises(InputError, match="no model with rows of the metrics share, token, weight"):
        attention_map.draw(lacks)
    assert [model.name.split(",")[0] for model in attention_map.models(table(lacks, cell("alibi")))] == ["ALiBi"]


class Page(HTMLParser):
    """What a page loads, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        # namespaces and such are no loads
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "action")]


def plots(text: str) -> list[list[dict[str, Any]]]:
    """The data of each plot of a page."""
    scripts = re.findall('<script type="application/json">(.*?)</script>', text)
    return [json.loads(script)["data"] for script in scripts]


def values(x: list[Any]) -> npt.NDArray[np.float64]:
    return np.array(x, dtype=float)


def test_the_page_holds_the_same_and_loads_nothing() -> None:
    pytest.importorskip("plotly")
    chart = attention_map.chart(table(cell("rope"), cell("stick_breaking")))
    text = html.figure(chart)
    page = Page(text)
    assert all(load.startswith("data:") for load in page.loads) and "figure" in page.tags
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    found = plots(text)
    assert len(found) == text.count('role="group" aria-label="') == 4
    heat, latest, stale = found[3]
    z = values(heat["z"])
    np.testing.assert_allclose(np.nan_to_num(z) ** 2, weights(21), atol=2e-4)
    assert np.isnan(z[np.triu_indices(SIZE, 1)]).all()
    assert set(zip(values(latest["y"]), values(latest["x"]), strict=True)) == LATEST
    assert set(zip(values(stale["y"]), values(stale["x"]), strict=True)) == STALE
    assert (
        heat["text"][6][5]
        == f"query: key 1 at 6<br>key: value 8 at 5, the latest value<br>weight {weights(21)[6, 5]:.3f}"
    )
    assert "the stale value" in heat["text"][6][1] and heat["text"][0][1] == ""
    assert html.figure(chart) == text


def test_html_is_a_format_of_this_figure(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    rows = table(cell("rope")).assign(unit="1", stderr=None, n=1)
    rows.to_csv(tmp_path / "attention_map.csv", index=False)
    files = draw_figures(tmp_path, ["attention_map"], ["png", "html"])
    assert [file.name for file in files] == ["attention_map.png", "attention_map.html"]
    assert files[1].read_text().startswith("<!DOCTYPE html>")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_page_without_a_complaint(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    page = tmp_path / "page.html"
    page.write_text(html.figure(attention_map.chart(cell("rope"))))
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    # as a plot, not as source
    assert done.stdout.count('class="main-svg"') >= 2 and 'class="hm"' in done.stdout


def test_many_heads_are_wrapped_and_cut_to_those_with_most_weight_on_the_key() -> None:
    figure = attention_map.draw(table(cell("rope", layers=4, heads=4), cell("stick_breaking", layers=1)))
    figure.draw_without_rendering()
    panels = [axis for axis in figure.axes if axis.get_images()]
    # eight of sixteen, in two columns, and the other model's one
    assert len(panels) == attention_map.MOST + 1 and figure.get_figheight() < 5 * figure.get_figwidth()
    titles = [text.get_text() for axis in panels for text in axis.texts if text.get_text().startswith("layer")]
    # shares grow with the layer
    assert [title[:7] for title in titles[1:]] == ["layer 3"] * 4 + ["layer 4"] * 4
    extents = [panel.get_window_extent() for panel in panels]
    assert all(not a.overlaps(b) for index, a in enumerate(extents) for b in extents[:index])
    assert "Of each model the 8 heads" in attention_map.note(attention_map.models(cell("rope", layers=4, heads=4)))
