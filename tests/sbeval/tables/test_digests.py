"""Test the digests of rows: of what is written, not of how a table lays it out."""

import pandas as pd

from sbeval.tables.digests import row_digests

ROWS = pd.DataFrame({"cell": ["a", "a", "b"], "value": ["0.5", "0.25", "0.5"], "split": ["", "all", "é\n"]}, dtype=str)


def test_each_row_has_a_digest_that_any_cell_changes() -> None:
    found = row_digests(ROWS)
    assert len(set(found)) == 3 and all(len(digest) == 10 and int(digest, 16) >= 0 for digest in found)
    for name in ROWS.columns:
        changed = ROWS.copy()
        changed.loc[1, name] = "x"
        assert [one == other for one, other in zip(row_digests(changed), found, strict=True)] == [True, False, True]


def test_blank_columns_and_the_order_of_columns_do_not_count() -> None:
    assert row_digests(ROWS[["split", "value", "cell"]].assign(later="")) == row_digests(ROWS)
    # another name of a column is another row
    assert set(row_digests(ROWS.rename(columns={"split": "test"}))[1:]).isdisjoint(row_digests(ROWS)[1:])
    assert row_digests(ROWS[:0]) == []


def test_digests_stay_what_they_are() -> None:
    # run files that are committed have them
    assert row_digests(ROWS) == ["5b63289534", "68238911f4", "ae9be9916f"]
