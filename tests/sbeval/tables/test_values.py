"""Test values and curves: exact, small, of the run that wrote them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.tables import curves, provenance, store, values
from sbeval.tables.results import Results
from sbeval.tables.store import Stored

FRAME = pd.DataFrame(
    {
        "metric": ["nll_sum", "tokens", "nll_sum"],
        "unit_id": ["book-17", "book-17", "book-2"],
        "value": [0.1 + 0.2, 13.0, 1e-300],
        "eval_len": [64, 64, 128],
        "window": pd.array([None, 8, None], "Int64"),
        "split": ["all", None, "é,\n"],
    }
)
CURVES = {"loss": [(1, 7.4209), (2, 6.1), (3, 5.0)], "held_out_loss": [(2, 1 / 3)], "validation_accuracy": []}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path)


def kept(results: Results, **changes: object) -> None:
    options: dict[str, object] = {"values": FRAME, "curves": CURVES}
    store.keep(results, "toy", Stored("a", {"status": "finished"}, **{**options, **changes}))  # type: ignore[arg-type]


def test_values_are_read_as_they_were_written(results: Results) -> None:
    values.write(results, "a", FRAME)
    back = values.read(results, ["a", "b", "a"])
    assert list(back.columns) == ["cell", *FRAME.columns] and set(back["cell"]) == {"a"}
    assert back["value"].tolist() == FRAME["value"].tolist()
    assert back["window"].tolist() == [pd.NA, 8, pd.NA] and back["eval_len"].tolist() == [64, 64, 128]
    assert back["split"].tolist()[::2] == ["all", "é,\n"] and pd.isna(back["split"][1])
    assert values.read(results, []).columns.tolist() == ["cell", *values.COLUMNS]


def test_several_cells_are_one_frame(results: Results) -> None:
    values.write(results, "a", FRAME)
    values.write(results, "b", FRAME.drop(columns=["window", "split"]))
    back = values.read(results, ["a", "b"])
    assert back["cell"].tolist() == ["a"] * 3 + ["b"] * 3 and back["window"].isna().sum() == 5


@pytest.mark.parametrize("decimals", [1, 4, 5, 17])
def test_numbers_are_exact_whatever_their_decimals(results: Results, decimals: int) -> None:
    numbers = np.round(np.random.default_rng(0).normal(scale=1000, size=5000), decimals)
    values.write(results, "a", pd.DataFrame({"metric": "x", "unit_id": "1", "value": numbers}))
    assert (values.read(results, ["a"])["value"] == numbers).all()
    # recorded losses take two bytes a step, not eight
    per_number = results.values("a").stat().st_size / len(numbers)
    assert per_number < 4 if decimals <= 4 else per_number > 4


def test_values_that_are_no_numbers_are_refused(results: Results) -> None:
    with pytest.raises(AssertionError, match="absent row"):
        values.write(results, "a", FRAME.assign(value=[1.0, np.nan, 2.0]))
    with pytest.raises(AssertionError, match="begin with"):
        values.write(results, "a", FRAME.drop(columns="unit_id"))


def test_curves_are_read_as_they_were_written(results: Results) -> None:
    curves.write(results, "a", CURVES)
    back = curves.read(results, ["a", "b"])
    assert list(back.columns) == list(curves.COLUMNS)
    for name, points in CURVES.items():
        mine = back[back["metric"] == name]
        assert list(zip(mine["step"], mine["value"], strict=True)) == points
    assert curves.read(results, []).columns.tolist() == list(curves.COLUMNS)


@pytest.mark.parametrize("kind", ["values", "curves"])
def test_what_the_run_did_not_write_is_refused(results: Results, kind: str) -> None:
    reader = values.read if kind == "values" else curves.read
    kept(results)
    assert len(reader(results, ["a"])) > 0
    path = results.folder / kind / "a.parquet"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole.replace(b"PAR1", b"PAR2"), whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{kind}/a.parquet is not what the run of a wrote"):
            reader(results, ["a"])
    path.unlink()
    with pytest.raises(InputError, match=f"{kind}/a.parquet is missing"):
        reader(results, ["a"])


def test_what_no_run_file_knows_is_read_or_refused_in_a_line(results: Results) -> None:
    values.write(results, "a", FRAME)
    assert len(values.read(results, ["a"])) == 3
    results.values("a").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot read .*a.parquet") as caught:
        values.read(results, ["a"])
    assert "\n" not in str(caught.value)


def test_a_run_without_values_leaves_none_of_an_earlier_run(results: Results) -> None:
    kept(results)
    kept(results, values=None, curves={})
    assert not results.values("a").exists() and not results.curves("a").exists()
    assert values.read(results, ["a"]).empty and curves.read(results, ["a"]).empty


def test_a_run_file_that_was_changed_is_refused(results: Results) -> None:
    kept(results)
    path = results.run_file("a")
    record = json.loads(path.read_text())
    assert record["digest"] and set(record["files"]) == {"values", "curves"} and record["rows"] == []
    assert "digest" not in provenance.read_run(path)
    path.write_text(path.read_text().replace("finished", "failed"))
    with pytest.raises(InputError, match="a.json is not as it was written"):
        provenance.read_run(path)
