"""README's small figures show the numbers of the tables."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from sbeval.cli import documents_figures, documents_studies
from sbeval.tables.results import Results
from sbeval.tables.selection import needle_scores
from sbeval.tables.table import read

ROOT = Path(__file__).parents[3]


def test_a_panel_has_the_means_of_the_table() -> None:
    axes = Figure().subplots()
    documents_figures.figure5(ROOT / "results", axes)
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    table = read(Results(ROOT / "results").table("length_gen"))
    rows = table[
        (table["attention"] == "sliding_window") & (table["options"] == "") & (table["metric"] == "perplexity")
    ]
    at = rows[(rows["context_length"] == 65536) & rows["window"].isna()]["value"]
    drawn = np.asarray(lines["sliding window of 512"].get_ydata(), dtype=float)
    assert min(at) <= drawn[-1] <= max(at) and len(drawn) == 9
    assert {"stick-breaking", "RoPE", "ALiBi", "sliding window of 512"} <= set(lines)


def test_recall_has_no_cells_of_another_task() -> None:
    axes = Figure().subplots()
    documents_figures.figure3(ROOT / "results", axes)
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    table = read(Results(ROOT / "results").table("mqrar"))
    rows = table[(table["attention"] == "rope") & (table["kv_pairs"] == 32) & (table["heads"] == 1)]
    rows = rows[(rows["metric"] == "accuracy") & (rows["split"] == "all") & (rows["lr"] == 1e-3)]
    assert len(rows) == 3
    assert np.asarray(lines["RoPE"].get_ydata(), dtype=float)[0] == pytest.approx(rows["value"].mean())


def test_bars_are_where_the_head_that_retrieves_attends() -> None:
    axes = Figure().subplots()
    documents_figures.figure4(ROOT / "results", axes)
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in axes.containers[1::2]}
    assert set(heights) == {"stick-breaking", "RoPE"}
    for latest, stale in heights.values():
        assert 0 <= stale < latest <= 1 and latest + stale <= 1


def test_distant_text_has_the_methods_of_the_sentence_below_it() -> None:
    loss, change = documents_figures.distant_text(ROOT / "results").axes
    names = [str(line.get_label()) for line in loss.get_lines()]
    assert {"stick-breaking", "stick-breaking (logit offsets spread)", "RoPE", "sliding window of 512"} <= set(names)
    assert "NoPE" not in names and len(change.collections) >= 3


def test_needles_are_of_tasks_that_all_solved() -> None:
    rows = documents_studies.solved_needles(ROOT / "results")
    scores = needle_scores(rows)
    assert scores["solved"].all() and len(scores.groupby("task")) > 1
    assert len(set(scores.groupby("task")["cell"].nunique())) == 1
    figure = documents_figures.needles(ROOT / "results")
    shown = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert {"stick-breaking", "RoPE"} <= shown and not any("solved" in text for text in shown)


def test_each_is_drawn_and_committed(tmp_path: Path) -> None:
    files = documents_figures.draw(ROOT / "results", tmp_path)
    assert [file.stem for file in files] == [*documents_figures.FIGURES, *documents_figures.WIDE]
    committed = ROOT / "docs" / "figures"
    assert {file.name for file in files} == {file.name for file in committed.glob("*.png")}
    # of one size, so that they stand in a row
    assert len({imread(folder / file.name).shape for file in files[:3] for folder in (tmp_path, committed)}) == 1


@pytest.mark.parametrize("name", [*documents_figures.FIGURES, *documents_figures.WIDE])
def test_each_is_shown(name: str) -> None:
    assert f"docs/figures/{name}.png" in (ROOT / "README.md").read_text(encoding="utf-8")
