"""Test that what no run wrote is found: rows, run files, values and curves."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sbeval.cli import main
from sbeval.errors import InputError
from sbeval.tables import check, provenance, store, table
from sbeval.tables.check import Checked
from sbeval.tables.results import Results
from sbeval.tables.rows import Identity, Measurement, Provenance
from sbeval.tables.store import Stored

COMMITTED = Path(__file__).parents[3] / "results"
IDENTITY = Identity(
    family="toy", task="t", model="m", attention="rope", options="", params=1, train_len=1, eval_len=1, seed=0
)
ORIGIN = provenance.collect(
    cell="a", preset="", corpus="", tokenizer="", train_tokens=0, dtype="float32", device="cpu", backend="torch"
)
VALUES = pd.DataFrame({"metric": ["correct"], "unit_id": ["1"], "value": [1.0]})


def keep(results: Results, cell: str, origin: Provenance = ORIGIN, count: int = 3) -> None:
    measured = [Measurement(metric=f"m{index}", unit="1", value=0.125 + index, n=4) for index in range(count)]
    rows = table.frame(replace(IDENTITY, seed=ord(cell)), measured, replace(origin, cell=cell))
    store.keep(results, "toy", Stored(cell, {"status": "finished"}, rows, VALUES, {"loss": [(1, 0.5)]}))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    results = Results(tmp_path)
    for cell in "abc":
        keep(results, cell)
    table.assemble(results.table("toy"))
    return results


def faults(results: Results) -> list[str]:
    return list(check.folder(results, Checked()))


def edit(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert text.count(old) >= count
    path.write_text(text.replace(old, new, count))


def test_what_runs_wrote_is_as_written_before_and_after_it_goes_into_the_table(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for cell in "abc":
        keep(results, cell)
        assert faults(results) == []
    table.assemble(results.table("toy"))
    checked = Checked()
    assert list(check.folder(results, checked)) == []
    assert checked == Checked(tables=1, rows=9, cells=3, files=6, unknown=0)
    # cells of other runs change nothing, nor does a column that comes later
    keep(results, "d")
    wider = table.read(results.table("toy")).assign(later="")
    results.table("toy").unlink()
    table.write(results.table("toy"), wider)
    assert faults(results) == []


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "value": (lambda path: edit(path, "0.125", "0.126"), "toy.csv: a: 1 of 3 rows are not what its run wrote (line 2)"),
    "seed": (lambda path: edit(path, f",{ord('b')},", ",7,"), "toy.csv: b: 1 of 3 rows are not"),
    "as a spreadsheet writes it": (lambda path: edit(path, "0.125", ".125", 3), "toy.csv: c: 1 of 3 rows are not"),
    "a row twice": (lambda path: path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n"), "c: "),
    "a row less": (
        lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1])),
        "toy.csv: c: 1 row that its run wrote is missing",
    ),
    "a cell less": (
        lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3])),
        "c.json: 3 rows that its run wrote are in no table",
    ),
    "another cell": (lambda path: edit(path, ",a,", ",x,", 3), "x.json is missing, which rows of a table name"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_no_run_wrote_are_named(results: Results, change: str) -> None:
    edited, message = CHANGES[change]
    edited(results.table("toy"))
    found = faults(results)
    assert any(message in line for line in found), found
    assert all("\n" not in line and str(results.folder) in line for line in found)


def test_a_number_that_no_run_writes_is_a_fault_too(results: Results) -> None:
    edit(results.table("toy"), ",4,", ",0,")
    assert "toy.csv:2: '0' in column 'n'" in faults(results)[0]


def test_files_that_no_run_wrote_are_named(results: Results) -> None:
    results.values("a").write_bytes(results.values("a").read_bytes()[:-1])
    results.curves("b").unlink()
    edit(results.run_file("c"), "finished", "failed")
    (results.folder / "values" / "x.parquet").touch()
    found = faults(results)
    assert len(found) == 4
    for message in ("values/a.parquet is not what the run", "curves/b.parquet is missing", "c.json is not as it was"):
        assert sum(message in line for line in found) == 1
    assert found[-1].endswith("values/x.parquet has no run file")


def test_rows_from_before_there_were_digests_are_not_checked(results: Results) -> None:
    record = provenance.read_run(results.run_file("a"))
    provenance.write_run(results.run_file("a"), {name: record[name] for name in record if name != "rows"})
    edit(results.table("toy"), "0.125", "0.126")
    checked = Checked()
    assert list(check.folder(results, checked)) == [] and checked.unknown == 1


def test_notes_are_short(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for cell in "abcdefgh":
        keep(results, cell)
    table.assemble(path := results.table("toy"))
    assert check.notes([path]) == []
    edit(path, "0.125", "0.5", 8)
    found = check.notes([path])
    assert len(found) == 6 and "3 more cells, which sbeval check" in found[-1]


def test_a_table_that_cannot_be_read_is_an_error_of_its_readers(results: Results) -> None:
    edit(results.table("toy"), "0.125", "x")
    with pytest.raises(InputError, match="'x' in column 'value'"):
        check.notes([results.table("toy")])
    assert "'x' in column 'value'" in faults(results)[0]


# a folder of committed results with recall, of which some is solved
FOLDER = "plateau-causes"


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(COMMITTED / FOLDER, tmp_path / FOLDER, ignore=shutil.ignore_patterns("figures")))


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A copy of results, in which somebody changed a number of MQRAR."""
    folder = copied(tmp_path)
    edit(folder / "mqrar.csv", "validation_accuracy,1,0.99", "validation_accuracy,1,0.98")
    return folder


WRONG = f"{FOLDER}/mqrar.csv: mqrar-"


def code(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["sbeval", *arguments])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("command", [["check"], ["plot", "mqrar", "--format", "png", "--out", "OUT"], ["report"]])
def test_commands_say_what_no_run_wrote(
    edited: Path,
    tmp_path: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == ["report"]:
        pytest.importorskip("plotly")
        command = ["report", "--out", str(tmp_path / "report.html")]
    command = [str(tmp_path) if word == "OUT" else word for word in command]
    assert code([*command, "--results-dir", str(edited)], monkeypatch) == (command == ["check"])
    out = capsys.readouterr().out
    assert out.count(WRONG) == 1 and re.search(r"1 of \d+ rows are not what its run wrote \(line 55\)", out)
    assert code([*command, "--results-dir", str(copied(tmp_path / "unedited"))], monkeypatch) == 0
    assert WRONG not in capsys.readouterr().out


NOT_A_SHARE, NOT_WRITTEN = "is not a share", "rows are not what its run wrote (line 2)"


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("value", "17", NOT_A_SHARE),
        ("value", "-1", NOT_A_SHARE),
        ("stderr", "-0.1", "is a negative standard error"),
        ("n", "0", "is not a number of units"),
        ("value", "0.123", NOT_WRITTEN),
        ("seed", "77", NOT_WRITTEN),
    ],
)
def test_no_command_takes_a_changed_cell_for_a_result(
    column: str, value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What no run can write is an error; what it could have, and did not, is said."""
    pytest.importorskip("plotly")
    folder = copied(tmp_path)
    path = folder / "mqrar.csv"
    header, first, *rest = path.read_text().splitlines(keepends=True)
    names, cells = header.split(","), first.split(",")
    assert cells[names.index("metric")] == "accuracy"
    cells[names.index(column)] = value
    path.write_text("".join([header, ",".join(cells), *rest]))
    for command, fails in (
        (f"plot mqrar --format png --out {tmp_path} --results-dir {folder}", 2),
        (f"report --out {tmp_path / 'report.html'} --results-dir {folder}", 2),
        (f"compare {folder} {COMMITTED / FOLDER} --format csv", 2),
        (f"check --results-dir {folder}", 1),
    ):
        ended = code(command.split(), monkeypatch)
        found = capsys.readouterr()
        lines = [line for line in (found.out + found.err).splitlines() if "mqrar.csv" in line and told in line]
        assert len(lines) == 1, (command, found)
        assert ended == (fails if told != NOT_WRITTEN or command.startswith("check") else 0), command


def test_compare_says_what_no_run_wrote(
    edited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(["compare", str(edited), str(COMMITTED / FOLDER), "--format", "csv"], monkeypatch) == 0
    found = capsys.readouterr()
    assert found.err.count(WRONG) == 1 and WRONG not in found.out


FOLDERS = sorted({path.parent for path in COMMITTED.glob("**/*.csv")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_committed_results_are_what_runs_wrote(folder: Path) -> None:
    checked = Checked()
    assert list(check.folder(Results(folder), checked)) == [] and checked.rows > 0


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder .*nowhere"):
        list(check.folder(Results(tmp_path / "nowhere"), Checked()))
    with pytest.raises(InputError, match="there is no result table in .*: give the --results-dir of a run"):
        list(check.folder(Results(tmp_path), Checked()))
