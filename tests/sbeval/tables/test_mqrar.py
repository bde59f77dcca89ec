"""The table of the terminal, and the labels of columns."""

from pathlib import Path

from sbeval.tables import table
from sbeval.tables.mqrar import LEGEND
from sbeval.tasks import mqrar

RESULTS = Path(__file__).parents[3] / "results" / "mqrar.csv"


def test_the_table_says_what_would_decide_a_cell_that_is_not_solved() -> None:
    rows = table.read(RESULTS)
    cell = rows[(rows["metric"] == "solved") & (rows["status"] == "solved")]["cell"].iloc[0]
    assert mqrar.FAMILY.summary(rows[rows["cell"] == cell]).caption == LEGEND
    for ended in ("budget", "plateau"):
        other = rows[(rows["metric"] == "solved") & (rows["status"] == ended)]["cell"].iloc[0]
        caption = str(mqrar.FAMILY.summary(rows[rows["cell"].isin([cell, other])]).caption)
        # the words of the column `ended` stand beside those of the other columns
        assert caption.startswith(f"{LEGEND[:-1]}; {ended}: ") and "more --steps" in caption
