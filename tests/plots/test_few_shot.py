from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer

from sbeval.errors import InputError
from sbeval.plots import few_shot

COMMON: dict[str, Any] = {
    "model": "25m",
    "options": "",
    "params": 25_000_000,
    "train_len": 2048,
    "train_tokens": 10**8,
    "eval_len": 2048,
    "seed": 0,
    "part": "",
    "filter": "",
    "shots": 0,
    "n": 100,
    "stderr": 0.05,
    "corpus": "books",
    "preset": "paper",
}
SCORES = {("rope", "arc_easy"): 0.3, ("rope", "copa"): 0.5, ("alibi", "arc_easy"): 0.4, ("alibi", "copa"): 0.7}


def table(**others: Any) -> pd.DataFrame:
    chance = {"arc_easy": 0.25, "copa": 0.5}
    return pd.DataFrame(
        COMMON | {"attention": name, "task": task, "metric": "acc", "value": value, "chance": chance[task]} | others
        for (name, task), value in SCORES.items()
    )


def points(axis: Axes) -> dict[str, dict[float, float]]:
    """Scores of each method, by their height."""
    found = {}
    for container in axis.containers:
        assert isinstance(container, ErrorbarContainer)
        line = container.lines[0]
        assert line is not None
        x, y = (np.asarray(data, dtype=float) for data in (line.get_xdata(), line.get_ydata()))
        found[str(container.get_label())] = dict(zip(y.round().tolist(), x.tolist(), strict=True))
    return found


def test_scores_and_chance_stand_where_they_are() -> None:
    (axis,) = few_shot.draw(table()).axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["arc_easy (0) acc", "copa (0) acc"]
    found = points(axis)
    assert found["RoPE"] == pytest.approx({0: 30, 1: 50}) and found["ALiBi"] == pytest.approx({0: 40, 1: 70})
    lines = [line.get_segments() for line in axis.collections if isinstance(line, LineCollection)]
    ticks = [segments[0] for segments in lines if len(segments) == 1]
    assert [(tick[0][0], tick[1][0]) for tick in ticks] == [(25, 25), (50, 50)]


def test_bars_are_intervals_over_items() -> None:
    figure = few_shot.draw(table())
    container = figure.axes[0].containers[0]
    assert isinstance(container, ErrorbarContainer)
    low, high = container.lines[2][0].get_segments()[0][:, 0]
    # the 97.5 % quantile of Student's t for 100 items
    assert high - low == pytest.approx(2 * 1.984 * 5, rel=1e-3)
    said = "95 % interval over items. In brackets: examples in the prompt."
    assert any(said in " ".join(text.get_text().split()) for text in figure.texts)


def test_models_have_panels_of_their_own() -> None:
    both = pd.concat([table(), table(model="350m"), table(model="x/llama", attention="hf", options="llama")])
    assert len(few_shot.draw(both).axes) == 3


def test_perplexities_are_not_drawn() -> None:
    with pytest.raises(InputError, match="no scores in percent"):
        few_shot.draw(table(metric="word_perplexity"))


def test_models_that_overfit_are_named() -> None:
    rows = table(status="overfit")
    assert "above its lowest): RoPE, ALiBi." not in few_shot.draw(table()).get_supxlabel()
    assert "above its lowest): ALiBi, RoPE." in few_shot.draw(rows).get_supxlabel().replace("\n", " ")
    assert "above its lowest): ALiBi, RoPE." in few_shot.chart(rows).note
