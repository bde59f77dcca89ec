import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sbeval import config
from sbeval.errors import InputError
from sbeval.tables import table
from sbeval.tables.rows import Identity, Measurement, Provenance

RESULTS = Path(__file__).parents[3] / "results"
IDENTITY = Identity(
    family="toy",
    task="toy",
    model="tiny",
    attention="rope",
    options="",
    params=1000,
    train_len=256,
    eval_len=4096,
    seed=0,
)
PROVENANCE = Provenance(
    cell="toy-a",
    preset="quick",
    corpus="",
    tokenizer="",
    train_tokens=10**12,
    dtype="float32",
    device="cpu",
    backend="torch",
    # seven digits, an exponent, leading zeros: text that a guess would take for a number
    commit="0012e45",
    torch="2.11.0",
    triton="3.6.0",
    utc="2025-01-02T03:04:05Z",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    position: int | None = None
    lr: float | None = None
    split: str = ""


def rows(cell: str = "toy-a", values: tuple[float, ...] = (0.1 + 0.2, 5.0), **identity: Any) -> pd.DataFrame:
    measured = [
        Row(metric="loss", unit="nats/token", value=value, n=7, position=index, split="all, 'both' \"kinds\"")
        for index, value in enumerate(values)
    ]
    scored = Row(metric="accuracy", unit="1", value=1 / 3, stderr=1e-17, n=7, lr=3e-4)
    return table.frame(replace(IDENTITY, **identity), [*measured, scored], replace(PROVENANCE, cell=cell))


def test_columns_are_identity_then_measurement_then_provenance() -> None:
    names = table.columns(Row)
    assert names[:2] == ("family", "task") and names[8] == "seed"
    assert names[9:17] == ("metric", "unit", "value", "stderr", "n", "position", "lr", "split")
    assert names[17] == "cell" and names[-1] == "utc"
    assert tuple(rows().columns) == names


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    table.write(path, rows())
    back = table.read(path, required=table.columns(Row))
    loss, accuracy = back[back["metric"] == "loss"], back[back["metric"] == "accuracy"].iloc[0]
    assert list(loss["value"]) == [0.1 + 0.2, 5.0]
    assert (accuracy["value"], accuracy["stderr"], accuracy["lr"]) == (1 / 3, 1e-17, 3e-4)
    assert loss["stderr"].isna().all()
    assert list(loss["position"]) == [0, 1] and str(back["position"].dtype) == "Int64" and accuracy["position"] is pd.NA
    assert str(back["seed"].dtype) == "int64" and back["train_tokens"].iloc[0] == 10**12
    assert set(back["commit"]) == {"0012e45"} and set(back["options"]) == {""} and set(back["corpus"]) == {""}
    assert set(loss["split"]) == {"all, 'both' \"kinds\""}
    # what was read can be written: the same bytes
    first = path.read_bytes()
    table.write(path, back)
    assert path.read_bytes() == first


def test_write_replaces_the_cell_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    table.write(path, rows("b", (1.0, 2.0), seed=1))
    table.write(path, rows("a", (3.0,)))
    table.write(path, rows("b", (4.0,), seed=1))
    back = table.read(path)
    assert len(back) == 4
    assert list(back[back["metric"] == "loss"]["value"]) == [3.0, 4.0]
    assert set(back["cell"]) == {"a", "b"}


def test_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    cells = [rows(f"cell-{seed}", seed=seed) for seed in (2, 10, 1)]
    for name, order in (("one", cells), ("two", cells[::-1])):
        for cell in order:
            table.write(tmp_path / name, cell)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    # numbers are sorted as numbers
    assert list(dict.fromkeys(table.read(tmp_path / "one")["seed"])) == [1, 2, 10]


def test_a_new_factor_leaves_old_rows_readable(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    plain = Measurement(metric="loss", unit="nats/token", value=1.0, n=1)
    table.write(path, table.frame(IDENTITY, [plain], replace(PROVENANCE, cell="old")))
    table.write(path, rows("new"))
    back = table.read(path)
    assert tuple(back.columns) == table.columns(Row)
    assert back[back["cell"] == "old"]["position"].isna().all() and set(back["cell"]) == {"old", "new"}


def test_values_must_be_finite(tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="absent row"):
            rows(values=(value,))
    broken = rows()
    broken.loc[0, "value"] = math.nan
    with pytest.raises(AssertionError, match="absent row"):
        table.write(tmp_path / "toy.csv", broken)
    assert not (tmp_path / "toy.csv").exists()


def test_two_rows_for_one_number_are_refused(tmp_path: Path) -> None:
    twice = pd.concat([rows(), rows()], ignore_index=True)
    with pytest.raises(AssertionError, match="two rows for one number"):
        table.write(tmp_path / "toy.csv", twice)


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "half a line": (lambda text: text[:-60], r"toy\.csv:4: \d+ cells where the header has 31"),
    "half a word": (lambda text: text[:-4], r"toy\.csv:4: the last line is not ended"),
    "no number": (lambda text: text.replace("5.0", "five"), r"toy\.csv:4: 'five' in column 'value' is not a number"),
    "nan": (lambda text: text.replace("5.0", "nan"), r"toy\.csv:4: 'nan' in column 'value' is not a number"),
    "too large": (lambda text: text.replace("5.0", "1e999"), r"toy\.csv:4: '1e999' in column 'value' is not a number"),
    "no whole number": (lambda text: text.replace(",256,", ",25.6,"), r"toy\.csv:2: '25.6' in column 'train_len'"),
    "conflict": (lambda text: text.replace("toy,", "<<<<<<< HEAD\ntoy,", 1), r"toy\.csv:2: 1 cells where"),
    "open quote": (lambda text: text[:-1] + ',"\n\n', r"toy\.csv:4: .*fix or remove"),
    "no column": (lambda text: text.replace("cell", "sell", 1), "has no column 'cell'; it has: family, task, "),
    "a line in a name": (lambda text: text.replace(",cell,", ',"ce\nll",', 1), r"has no column 'cell'.*'ce\\nll'"),
    "twice": (lambda text: text.replace("task", "family", 1), "column 'family' is duplicated"),
    "empty": (lambda text: "", "is empty"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_one_line_and_stays_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "toy.csv"
    table.write(path, rows())
    change, message = DAMAGE[damage]
    before = change(path.read_text())
    assert before != path.read_text()
    path.write_text(before)
    for attempt in (
        lambda: table.read(path, required=table.columns(Row)),
        lambda: table.write(path, rows("b")),
    ):
        with pytest.raises(InputError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert path.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".lock") == ["toy.csv"]


def test_reading_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table .*absent.csv; "):
        table.read(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="cannot read"):
        table.read(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="cannot read"):
        table.read(tmp_path / "binary.csv")


def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    table.write(path, rows())
    expected = table.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(table.read(path), expected)


def test_numbers_checks_what_a_reader_counts_on() -> None:
    frame = pd.DataFrame(
        {"pairs": ["8", "16"], "lr": [1.0, 0.5], "bad": ["8", "x"], "gap": pd.array([1, None], "Int64")}
    )
    typed = table.numbers(frame, ["pairs", "lr"])
    assert list(typed["pairs"]) == [8, 16] and str(typed["pairs"].dtype) == "int64"
    assert list(typed["lr"]) == [1.0, 0.5]
    with pytest.raises(InputError, match="column 'bad' holds 'x', which is not a number"):
        table.numbers(frame, ["bad"])
    with pytest.raises(InputError, match="column 'gap' holds '', which is not a number"):
        table.numbers(frame, ["gap"])


WRITER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from sbeval.tables import table
path, writer = Path(sys.argv[1]), sys.argv[2]
rows = table.read(path)
(path.parent / f"ready-{writer}").touch()
while len(list(path.parent.glob("ready-*"))) < 2:
    time.sleep(0.01)
for index in range(15):
    table.write(path, rows.assign(cell=f"{writer}-{index}"))
"""


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    table.write(path, rows("first"))
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    back = table.read(path)
    assert set(back["cell"]) == {"first"} | {f"{name}-{index}" for name in "ab" for index in range(15)}
    assert len(back) == 31 * 3


def large(path: Path, count: int) -> None:
    """Write a table of `count` rows."""
    table.write(path, rows("first"))
    header, *lines = path.read_text().splitlines(keepends=True)
    numbered = (lines[index % 3].replace("first", f"cell-{index // 3}") for index in range(count))
    path.write_text(header + "".join(numbered))


def test_a_cell_is_stored_without_a_look_at_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.csv"
    table.keep(path, rows("a", seed=2))
    # the first cell is the table: whoever looks for one finds it
    assert path.exists() and not (tmp_path / "parts").exists()
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(table, "_load", lambda *_: pytest.fail("the table is read"))
        table.keep(path, rows("b", seed=1))
        table.keep(path, rows("a", (7.0,), seed=2))
    assert path.read_bytes() == whole
    # a run that was killed here lost nothing: readers find the new rows, and those of the cell that ran again
    back = table.read(path)
    assert sorted(back["cell"]) == ["a"] * 2 + ["b"] * 3 and 7.0 in set(back["value"])
    assert str(back["position"].dtype) == "Int64"
    table.assemble(path)
    assert not list((tmp_path / "parts").rglob("*.csv"))
    other = tmp_path / "other.csv"
    for cell in (rows("a", (7.0,), seed=2), rows("b", seed=1)):
        table.write(other, cell)
    assert path.read_bytes() == other.read_bytes()
    table.assemble(path)
    assert path.read_bytes() == other.read_bytes()


def test_writing_takes_the_parts_in_and_replaces_that_of_its_cell(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    for cell in ("a", "b", "c"):
        table.keep(path, rows(cell, seed=ord(cell)))
    table.write(path, rows("c", (9.0,), seed=99))
    assert sorted(table.read(path)["cell"]) == ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    assert not list((tmp_path / "parts").rglob("*.csv"))


def test_what_a_killed_process_left_among_the_parts_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    for cell in ("a", "b"):
        table.keep(path, rows(cell, seed=ord(cell)))
    (tmp_path / "parts" / "toy" / f".c.csv.{'0' * 32}.tmp").write_text("half")
    table.assemble(path)
    assert not (tmp_path / "parts" / "toy").exists() and sorted(set(table.read(path)["cell"])) == ["a", "b"]
    # somebody's own file stays
    table.keep(path, rows("d", seed=4))
    (tmp_path / "parts" / "toy" / "notes.txt").write_text("mine")
    table.assemble(path)
    assert [file.name for file in (tmp_path / "parts" / "toy").iterdir()] == ["notes.txt"]


def test_a_part_of_a_table_that_was_removed_does_not_hide_new_rows(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    for cell in ("a", "b"):
        table.keep(path, rows(cell, seed=ord(cell)))
    path.unlink()
    table.keep(path, rows("b", (9.0,), seed=99))
    assert 9.0 in set(table.read(path)["value"])


def test_a_damaged_part_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    table.keep(path, rows("a"))
    table.keep(path, rows("b", seed=1))
    part = tmp_path / "parts" / "toy" / "b.csv"
    part.write_text(part.read_text()[:-60])
    for attempt in (table.read, table.assemble):
        with pytest.raises(InputError, match=r"parts/toy/b\.csv:4: \d+ cells where"):
            attempt(path)
    assert part.exists()


def test_a_reader_sees_each_cell_while_a_run_adds_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.csv"
    table.keep(path, rows("a"))
    table.keep(path, rows("b", seed=1))
    load = table._load

    def meanwhile(file: Path, required: Any) -> pd.DataFrame:
        monkeypatch.setattr(table, "_load", load)
        table.assemble(path)
        return load(file, required)

    # between the list of parts and their reading
    monkeypatch.setattr(table, "_load", meanwhile)
    assert sorted(table.read(path)["cell"]) == ["a"] * 3 + ["b"] * 3


def test_a_large_table_is_read_fast_and_a_cell_stored_faster(tmp_path: Path) -> None:
    """By the time of this process, which does not count other processes."""
    path = tmp_path / "toy.csv"
    large(path, 60_000)
    start = time.process_time()
    assert len(table.read(path)) == 60_000
    # with Python's csv it is 4 s; a thirtieth of a second for the cell
    assert time.process_time() - start < 2
    start = time.process_time()
    table.keep(path, rows("new"))
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.3333333333333333", "17.0"), r"toy\.csv:2: '17\.0' in column 'value' is not a share, which is 0 to 1"),
        (("0.3333333333333333", "-1"), r"toy\.csv:2: '-1' in column 'value' is not a share"),
        (("1e-17", "-1e-17"), r"toy\.csv:2: '-1e-17' in column 'stderr' is a negative standard error"),
        ((",7,0,", ",0,0,"), r"toy\.csv:3: '0' in column 'n' is not a number of units"),
    ],
)
def test_a_number_that_no_run_writes_is_an_error(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "toy.csv"
    table.write(path, rows())
    before = path.read_text()
    assert before.count(change[0]) == 1
    path.write_text(before.replace(*change))
    with pytest.raises(InputError, match=message):
        table.read(path)


@pytest.mark.parametrize("value", ["0.0", "-12.5"])
def test_a_perplexity_is_above_zero(tmp_path: Path, value: str) -> None:
    """Its logarithm is what figures, comparisons and the report read."""
    path = tmp_path / "toy.csv"
    measured = Row(metric="word_perplexity", unit="perplexity", value=12.5, n=1)
    table.write(path, table.frame(IDENTITY, [measured], PROVENANCE))
    path.write_text(path.read_text().replace("12.5", value))
    with pytest.raises(
        InputError, match=rf"toy\.csv:2: '{value}' in column 'value' is not a perplexity, which is above 0"
    ):
        table.read(path)


def test_a_loss_may_be_any_number_and_a_share_a_bit_above_one(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    summed = Row(metric="weight", unit="1", value=1.0000002, n=1)
    table.write(path, table.frame(IDENTITY, [summed], PROVENANCE))
    table.write(path, rows("b", (-3.0, 99.0)))
    assert {-3.0, 99.0, 1.0000002} <= set(table.read(path)["value"])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("**/*.csv")), ids=lambda file: str(file.relative_to(RESULTS)))
def test_a_committed_table_is_written_as_it_is(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    found = table.read(copy)
    table.write(copy, found[found["cell"] == found["cell"].iloc[-1]])
    assert copy.read_bytes() == file.read_bytes()


def test_a_table_from_before_a_column_came_is_read_and_added_to(tmp_path: Path) -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Wider(Row):
        later: int | None = field(default=None, metadata=config.LATER)

    assert table.columns(Wider) != table.columns(Row) and table.required(Wider) == table.required(Row)
    path = tmp_path / "toy.csv"
    table.write(path, rows())
    assert len(table.read(path, table.required(Wider))) == 3
    new = Wider(metric="loss", unit="nats/token", value=1.0, n=7, later=5)
    table.write(path, table.frame(IDENTITY, [new], replace(PROVENANCE, cell="toy-b")))
    back = table.read(path, table.columns(Wider))
    assert len(back) == 4 and back.loc[back["later"].notna(), "cell"].tolist() == ["toy-b"]


def test_a_table_from_before_there_were_epochs_is_read_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "toy.csv"
    table.write(path, rows())
    old = pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns=["unique_tokens", "epochs"])
    old.to_csv(path, index=False)
    assert len(table.read(path, table.required(Row))) == 3
    new = Row(metric="loss", unit="nats/token", value=1.0, n=7)
    origin = replace(PROVENANCE, cell="toy-b", unique_tokens=2048, epochs=2.5)
    table.write(path, table.frame(IDENTITY, [new], origin))
    back = table.read(path, table.columns(Row))
    names = table.columns(Row)
    assert names[names.index("train_tokens") :][:3] == ("train_tokens", "unique_tokens", "epochs")
    known = back[back["epochs"].notna()]
    assert len(back) == 4 and known[["cell", "unique_tokens", "epochs"]].to_numpy().tolist() == [["toy-b", 2048, 2.5]]
