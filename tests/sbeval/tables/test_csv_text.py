"""Test that the fast reader of CSV files reads what Python's strict `csv` reads."""

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbeval.errors import InputError
from sbeval.tables import csv_text

RESULTS = Path(__file__).parents[3] / "results"
PIECES = st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "a", "é", " ", "1.5", "\0", "\ufeff"])


def strictly(text: str) -> list[list[str]] | None:
    """Rows by Python's csv; None where they are none of a whole table."""
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError):
        return None
    whole = text.endswith("\n") and text.strip() and len(set(header)) == len(header)
    return rows if whole and all(len(row) == len(header) for row in rows) else None


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(PIECES, max_size=14))
def test_any_text_is_read_as_by_csv(pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    text = "x,y\n" + "".join(pieces) + "\n"
    path.write_bytes(text.encode())
    expected = strictly(text)
    if expected is None:
        with pytest.raises(InputError):
            csv_text.read(path)
    else:
        assert csv_text.read(path).to_numpy().tolist() == expected


@pytest.mark.parametrize("cells", ['"a,b","c\nd"', '"a ""b""",c', '"",', ",", '"é",1e-5'])
def test_quoted_cells_need_no_slow_reader(cells: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.csv"
    path.write_text(f"x,y\n{cells}\n")
    expected = strictly(path.read_text())
    monkeypatch.setattr(csv_text, "_checked", lambda *_: pytest.fail("read by csv"))
    assert csv_text.read(path).to_numpy().tolist() == expected


@pytest.mark.parametrize(
    "text", ['x,y\n"a"b,c\n', 'x,y\n"a,b\n', "x,y\na\n", "x,y\n\n", "\nx,y\na,b\n", "x,y\na,b", "x,x\na,b\n"]
)
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"toy\.csv:[12]: "):
        csv_text.read(path)


def test_lines_are_those_on_which_rows_begin(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    csv_text.write(path, pd.DataFrame({"x": ["a", "b\n\nb", "c"], "y": ["1", "2", "3"]}))
    assert csv_text.lines(path) == [2, 3, 6]


def test_committed_tables_are_read_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(RESULTS.glob("**/*.csv"))
    slow = [csv_text._checked(file, file.read_text())[:2] for file in files]
    monkeypatch.setattr(csv_text, "_checked", lambda *_: pytest.fail("read by csv"))
    for file, (header, rows) in zip(files, slow, strict=True):
        found = csv_text.read(file)
        assert list(found.columns) == header and found.to_numpy().tolist() == rows
