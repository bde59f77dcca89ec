"""The table of the terminal, and the labels of columns."""

from pathlib import Path

from sbeval.tables import table
from sbeval.tables.mqrar import DEPARTURES, LEGEND, ONE_SLOPE, cautions
from sbeval.tasks import mqrar

RESULTS = Path(__file__).parents[3] / "results" / "mqrar.csv"


def test_the_table_says_what_would_decide_a_cell_that_is_not_solved() -> None:
    rows = table.read(RESULTS)
    cell = rows[(rows["metric"] == "solved") & (rows["status"] == "solved")]["cell"].iloc[0]
    shown = mqrar.FAMILY.summary(rows[rows["cell"] == cell])
    assert shown.caption == LEGEND
    (steps,) = rows[(rows["cell"] == cell) & (rows["metric"] == "steps")]["value"]
    (column,) = [column for column in shown.columns if column.header == "steps"]
    assert list(column.cells) == [f"{steps:,.0f}"]
    for ended in ("budget", "plateau"):
        other = rows[(rows["metric"] == "solved") & (rows["status"] == ended)]["cell"].iloc[0]
        caption = str(mqrar.FAMILY.summary(rows[rows["cell"].isin([cell, other])]).caption)
        # the words of the column `ended` stand beside those of the other columns
        assert caption.startswith(f"{LEGEND[:-1]}; {ended}: ") and "more --steps" in caption


def test_what_qualifies_rows_is_below_them() -> None:
    rows = table.read(RESULTS)
    alibi = rows["attention"] == "alibi"
    assert cautions(rows[~alibi]) == [] and cautions(rows) == [ONE_SLOPE]
    assert cautions(rows[alibi].assign(heads=8)) == []
    assert ONE_SLOPE in str(mqrar.FAMILY.summary(rows).caption)
    caption = str(mqrar.FAMILY.summary(rows[~alibi].assign(preset="author")).caption)
    assert all(departure in caption for departure in DEPARTURES)


def test_the_documents_list_the_departures() -> None:
    text = " ".join((RESULTS.parents[1] / "docs" / "tasks.md").read_text().replace("\n  ", " ").split())
    assert [departure for departure in DEPARTURES if departure not in text.replace("`", "")] == []
