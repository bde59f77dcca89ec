"""Learning curves of recall: validation accuracy by step, seeds and their means."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from sbeval.errors import NothingToDraw
from sbeval.plots import recall_curves
from sbeval.tables import curves
from sbeval.tables.results import Results

COMMON: dict[str, Any] = {
    "task": "mqrar", "model": "2x64", "options": "", "train_len": 64, "eval_len": 64, "preset": "quick", "stderr": 0.01,
    "seq_len": 64, "vocab_size": 65, "width": 64, "layers": 2, "heads": 1, "dtype": "float32", "split": "all",
}  # fmt: skip
# of two seeds; stick-breaking's first is solved, and ends, at step 100
SCORES = {
    "stick_breaking": ([(100, 1.0)], [(100, 0.5), (200, 0.75)]),
    "rope": ([(100, 0.25), (200, 0.5)], [(100, 0.25), (200, 0.25), (300, 1.0)]),
}


def cell(
    folder: Path, attention: str, seed: int, pairs: int = 8, *, lr: float = 1e-3, best: float = 0.9
) -> pd.DataFrame:
    """Write the curves of a cell and return its rows."""
    name = f"{attention}-{pairs}-{seed}-{lr}"
    curves.write(Results(folder), name, {"loss": [(1, 3.0)], recall_curves.METRIC: SCORES[attention][seed]})
    of = COMMON | {"attention": attention, "kv_pairs": pairs, "seed": seed, "lr": lr, "cell": name}
    return pd.DataFrame([of | {"metric": metric, "value": best} for metric in ("accuracy", "validation_accuracy")])


def table(folder: Path, *pairs: int) -> pd.DataFrame:
    return pd.concat([cell(folder, name, seed, at) for name in SCORES for seed in (0, 1) for at in pairs or (8,)])


def lines(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of the lines with a label, which are the means."""
    return {
        str(line.get_label()): [(x, y) for x, y in np.asarray(line.get_xydata(), dtype=float).tolist()]
        for line in axis.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def test_means_of_seeds_of_which_the_solved_keep_their_accuracy(tmp_path: Path) -> None:
    rows = recall_curves.gather(table(tmp_path), tmp_path)
    assert recall_curves.has_rows(rows)
    figure = recall_curves.draw(rows)
    (axis,) = figure.axes
    assert lines(axis) == {
        "stick-breaking": [(100, 0.75), (200, 0.875)],
        "RoPE": [(100, 0.25), (200, 0.375), (300, 0.75)],
    }
    # and one faint line of each seed, as long as its training
    assert sorted(np.size(line.get_xdata()) for line in axis.get_lines() if line.get_alpha()) == [1, 2, 2, 3]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("steps of training", "validation accuracy")
    assert figure.get_supxlabel() == "Means of up to 2 seeds; faint: seeds, each until its training ended."
    chart = recall_curves.chart(rows)
    drawn = chart.groups[0].panels[0].rows()
    assert drawn.loc[drawn["method"] == "RoPE", recall_curves.Y].tolist() == [0.25, 0.375, 0.75]


def test_each_number_of_pairs_has_a_panel(tmp_path: Path) -> None:
    figure = recall_curves.draw(recall_curves.gather(table(tmp_path, 8, 16), tmp_path))
    titles = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert [title for title in titles if "pairs" in title] == ["8 pairs", "16 pairs"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["validation accuracy", ""]


def test_the_best_rate_is_drawn(tmp_path: Path) -> None:
    worse = cell(tmp_path, "rope", 0, lr=1e-2, best=0.1)
    rows = recall_curves.gather(pd.concat([table(tmp_path), worse]), tmp_path)
    assert set(rows["lr"]) == {1e-3}


def test_one_method_or_no_curves_have_no_such_figure(tmp_path: Path) -> None:
    assert not recall_curves.has_rows(recall_curves.gather(cell(tmp_path, "rope", 0), tmp_path))
    none = recall_curves.gather(table(tmp_path), tmp_path / "elsewhere")
    assert not recall_curves.has_rows(none)
    with pytest.raises(NothingToDraw, match="no validation accuracies"):
        recall_curves.draw(none)
    no_accuracies = table(tmp_path).assign(metric="solved")
    assert not recall_curves.has_rows(recall_curves.gather(no_accuracies, tmp_path))
