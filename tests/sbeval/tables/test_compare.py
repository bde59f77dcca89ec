"""Two folders side by side: which rows are the same, what a difference's interval is, what only one has."""

import io
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from sbeval.errors import InputError
from sbeval.tables import compare, table, values
from sbeval.tables.compare import Compared
from sbeval.tables.results import Results
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
    cell="toy",
    preset="quick",
    corpus="books",
    tokenizer="bytes",
    train_tokens=10,
    dtype="float32",
    device="cpu",
    backend="torch",
    commit="0012e45",
    torch="2.11.0",
    triton="3.6.0",
    utc="2025-01-02T03:04:05Z",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    position: int | None = None
    status: str = ""


def write(
    folder: Path,
    seeds: dict[int, float],
    *,
    metric: str = "loss",
    unit: str = "1",
    stderr: float | None = None,
    n: int = 9,
    **origin: Any,
) -> None:
    """A cell for each seed, of one number at position 8."""
    folder.mkdir(exist_ok=True)
    identity = replace(IDENTITY, attention=origin.pop("attention", "rope"), options=origin.pop("options", ""))
    for seed, value in seeds.items():
        row = Row(metric=metric, unit=unit, value=value, stderr=stderr, n=n, position=8, status=f"{value}")
        cell = replace(PROVENANCE, cell=f"{identity.attention}{identity.options}{seed}{origin}", **origin)
        table.write(folder / "toy.csv", table.frame(replace(identity, seed=seed), [row], cell))


def compared(tmp_path: Path) -> Compared:
    (one,) = compare.compare(tmp_path / "a", tmp_path / "b")
    return one


def numbers(tmp_path: Path) -> dict[str, Any]:
    (row,) = compared(tmp_path).both.to_dict("records")
    return {str(name): value for name, value in row.items()}


def test_one_seed_has_the_interval_of_both_errors(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0}, stderr=0.3)
    write(tmp_path / "b", {0: 2.0}, stderr=0.4, device="another", commit="another")
    found = numbers(tmp_path)
    assert (found["A"], found["B"], found["difference"], found["seeds"]) == (1.0, 2.0, 1.0, "")
    # 2.306: the 97.5 % quantile of Student's t for 9 units
    assert found["high"] - 1.0 == pytest.approx(2.306 * 0.5, rel=1e-3) and not found["beyond"]
    assert pd.isna(found["ratio"])
    write(tmp_path / "b", {0: 2.2}, stderr=0.4, device="another", commit="another")
    found = numbers(tmp_path)
    assert found["beyond"] and found["low"] > 0 and 0.025 < found["p"] < 0.05


def test_how_often_a_text_was_read_tells_no_numbers_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0}, unique_tokens=1000, epochs=0.01)
    write(tmp_path / "b", {0: 2.0}, unique_tokens=2000, epochs=0.005)
    assert numbers(tmp_path)["difference"] == 1.0
    # nor does a table from before that was known
    path = tmp_path / "a" / "toy.csv"
    pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns=["unique_tokens", "epochs"]).to_csv(
        path, index=False
    )
    assert numbers(tmp_path)["difference"] == 1.0


def test_seeds_are_not_pairs_and_their_deviation_is_pooled(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0, 1: 2.0, 2: 3.0})
    write(tmp_path / "b", {0: 1.5, 7: 3.5})
    found = numbers(tmp_path)
    # standard deviations 1 with two degrees of freedom and 1.41 with one: 1.15 with three, quantile 3.182
    assert found["seeds"] == "3 and 2" and found["difference"] == pytest.approx(0.5)
    assert found["high"] - 0.5 == pytest.approx(3.182 * (4 / 3) ** 0.5 * (1 / 3 + 1 / 2) ** 0.5, rel=1e-3)
    assert not found["beyond"]
    # another method, measured alike, adds degrees of freedom
    for folder in ("a", "b"):
        write(tmp_path / folder, {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}, attention="alibi")
    wide = found["high"] - found["low"]
    (row,) = compared(tmp_path).both.query("attention == 'rope'").to_dict("records")
    assert row["high"] - row["low"] < wide
    assert all(rows.empty for rows in compared(tmp_path).only)


def test_perplexities_are_compared_as_logarithms(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 10.0, 1: 40.0}, metric="perplexity")
    write(tmp_path / "b", {0: 40.0, 1: 160.0}, metric="perplexity")
    found = numbers(tmp_path)
    assert (found["A"], found["B"]) == pytest.approx((20.0, 80.0))
    assert found["low"] > -20.0


def test_marks_are_corrected_for_the_number_of_methods(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0}, stderr=0.01)
    write(tmp_path / "b", {0: 1.035}, stderr=0.01)
    alone = numbers(tmp_path)
    assert alone["beyond"] and 0.025 < alone["p"] < 0.05
    for folder in ("a", "b"):
        write(tmp_path / folder, {0: 1.0}, attention="alibi", stderr=0.01)
    both = compared(tmp_path).both.set_index("attention")
    assert not both.loc["rope", "beyond"] and both.loc["rope", "p"] == pytest.approx(2 * alone["p"])


def test_without_errors_there_is_no_interval_and_no_mark(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 4.0}, unit="ms")
    write(tmp_path / "b", {0: 3.0}, unit="ms")
    found = numbers(tmp_path)
    assert pd.isna(found["low"]) and not found["beyond"] and found["ratio"] == 0.75


@pytest.mark.parametrize(("unit", "ratio"), [("TFLOP/s", 2.0), ("s", 2.0), ("nats/token", None), ("bits/byte", None)])
def test_ratios_are_of_times_and_rates(unit: str, ratio: float | None, tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0}, unit=unit)
    write(tmp_path / "b", {0: 2.0}, unit=unit)
    found = numbers(tmp_path)["ratio"]
    assert found == ratio if ratio else pd.isna(found)


def store(folder: Path, metric: str, each: list[float], names: str = "abcd") -> None:
    """Values of four units of a single cell, whose row is their mean."""
    write(folder, {0: sum(each) / 4}, metric=metric, stderr=0.25, n=4)
    rows = table.read(folder / "toy.csv")
    units = pd.DataFrame({"metric": metric, "unit_id": list(names), "value": each, "position": 8})
    values.write(Results(folder), rows["cell"].iloc[0], units)


def test_numbers_with_the_same_units_are_paired(tmp_path: Path) -> None:
    """Units that differ by far more than the folders do."""
    store(tmp_path / "a", "loss", [1.0, 2.0, 3.0, 4.0])
    store(tmp_path / "b", "loss", [1.1, 2.2, 3.2, 4.1])
    found = numbers(tmp_path)
    # differences 0.1, 0.2, 0.2, 0.1; 3.182: Student's t with three degrees of freedom
    half = 3.182 * math.sqrt(4 * 0.05**2 / 3 / 4)
    assert (found["low"], found["high"]) == pytest.approx((0.15 - half, 0.15 + half), rel=1e-3)
    assert found["beyond"] and found["pairs"] == 4
    shown = compare.render(tmp_path / "a", tmp_path / "b", "markdown")
    assert isinstance(shown, str) and "| 4 in pairs |" in shown
    assert "toy: 1 numbers in both, 1 apart (*: p < 0.05, Holm over methods), 1 in pairs of the same units" in shown
    # other units
    store(tmp_path / "b", "loss", [1.1, 2.2, 3.2, 4.1], "abce")
    found = numbers(tmp_path)
    assert found["pairs"] == 0 and not found["beyond"]
    assert "in pairs" not in str(compare.render(tmp_path / "a", tmp_path / "b", "markdown"))


def test_shares_of_the_same_units_are_paired(tmp_path: Path) -> None:
    store(tmp_path / "a", "score", [0.0, 0.0, 1.0, 1.0])
    store(tmp_path / "b", "score", [0.0, 1.0, 1.0, 1.0])
    paired = numbers(tmp_path)
    store(tmp_path / "b", "score", [0.0, 1.0, 1.0, 1.0], "efgh")
    alone = numbers(tmp_path)
    assert paired["pairs"] == 4 and alone["pairs"] == 0 and paired["difference"] == alone["difference"] == 0.25
    assert alone["low"] < paired["low"] < 0 < paired["high"] < alone["high"]


def test_where_a_row_comes_from_counts_only_where_it_must(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0}, backend="triton")
    write(tmp_path / "b", {0: 2.0}, backend="torch")
    assert len(compared(tmp_path).both) == 1
    # now one folder has both, and neither is the other
    write(tmp_path / "b", {0: 3.0}, backend="triton")
    one = compared(tmp_path)
    assert one.both[["A", "B"]].to_numpy().tolist() == [[1.0, 3.0]]
    assert len(one.only[0]) == 0 and one.only[1]["value"].tolist() == [2.0]


def test_an_older_table_with_numbers_that_differ_in_origin_alone(tmp_path: Path) -> None:
    """It lacks columns of origin, and the last of them, the cell, tells its rows apart."""
    write(tmp_path / "a", {0: 1.0})
    write(tmp_path / "a", {0: 2.0}, preset="other")
    write(tmp_path / "b", {0: 3.0}, preset="other")
    path = tmp_path / "a" / "toy.csv"
    text = pd.read_csv(path, dtype=str, keep_default_na=False)
    text.drop(columns=["unique_tokens", "epochs"]).to_csv(path, index=False)
    one = compared(tmp_path)
    assert one.both[["A", "B"]].to_numpy().tolist() == [[2.0, 3.0]] and one.only[0]["value"].tolist() == [1.0]


@pytest.mark.parametrize("style", compare.FORMATS)
def test_tables_without_rows(tmp_path: Path, style: str) -> None:
    write(tmp_path / "a", {0: 1.0})
    path = tmp_path / "a" / "toy.csv"
    path.write_text(f"{path.read_text().splitlines()[0]}\n")
    shown = compare.render(tmp_path / "a", tmp_path / "a", style)
    assert not isinstance(shown, str) or "0 numbers in both" in shown or shown.startswith("family,task,model,")


def test_options_are_never_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0})
    write(tmp_path / "b", {0: 1.0}, options="theta=5.0")
    one = compared(tmp_path)
    assert one.both.empty and [len(rows) for rows in one.only] == [1, 1]


def test_a_column_that_one_folder_has_empty_tells_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0})
    write(tmp_path / "b", {0: 1.5})
    path = tmp_path / "b" / "toy.csv"
    text = pd.read_csv(path, dtype=str, keep_default_na=False)
    text.drop(columns="position").to_csv(path, index=False)
    assert numbers(tmp_path)["difference"] == 0.5
    text.assign(position="").to_csv(path, index=False)
    assert numbers(tmp_path)["difference"] == 0.5
    text.assign(position="8.0").to_csv(path, index=False)
    assert numbers(tmp_path)["difference"] == 0.5
    text.assign(position="9").to_csv(path, index=False)
    assert compared(tmp_path).both.empty


def test_committed_results_are_like_themselves(tmp_path: Path) -> None:
    for one in compare.compare(RESULTS, RESULTS):
        read = table.read(RESULTS / f"{one.family}.csv")
        # every row is in one number, over seeds where there are several
        assert sum(int(seeds or 1) for seeds in one.both["seeds"]) == len(read) > 0
        assert not one.both["beyond"].any() and (one.both["difference"] == 0).all()
        assert all(rows.empty for rows in one.only)
    shutil.copy(RESULTS / "mqrar.csv", tmp_path)
    families = {one.family: one for one in compare.compare(RESULTS, tmp_path)}
    assert len(families["kernel"].only[0]) == len(table.read(RESULTS / "kernel.csv"))
    assert families["kernel"].both.empty and families["mqrar"].only[0].empty


def test_what_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0}, stderr=0.1, unit="s")
    write(tmp_path / "b", {0: 2.0}, stderr=0.1, unit="s")
    write(tmp_path / "a", {0: 1.0, 1: 3.0}, attention="stick_breaking", options="remainder=none")
    write(tmp_path / "b", {0: 1.0, 2: 3.0}, attention="stick_breaking", options="remainder=none")
    write(tmp_path / "b", {0: 1.0}, attention="alibi")
    write(tmp_path / "a", {0: 1.0}, attention="nope")
    shown = compare.render(tmp_path / "a", tmp_path / "b", "markdown")
    assert isinstance(shown, str)
    assert "| rope | loss s |  | 1 | 2 | +1 [+0.67, +1.3] | 2.000 | * |" in shown.splitlines()
    assert "toy: 2 numbers in both, 1 apart (*: p < 0.05, Holm over methods)" in shown.splitlines()
    assert "toy: 1 only in B (toy tiny alibi: 1)" in shown.splitlines()
    console = Console(file=io.StringIO(), width=120)
    console.print(compare.render(tmp_path / "a", tmp_path / "b", "terminal"))
    assert isinstance(console.file, io.StringIO)
    assert "+1 [+0.67, +1.3]" in console.file.getvalue() and "1 only in A" in console.file.getvalue()
    text = compare.render(tmp_path / "a", tmp_path / "b", "csv")
    assert isinstance(text, str)
    rows = pd.read_csv(io.StringIO(text))
    assert len(rows) == 4 and rows["A"].notna().sum() == 3 and rows["B"].notna().sum() == 3
    assert rows.set_index("attention").loc["rope", "high"] == pytest.approx(1 + 2.306 * 0.02**0.5, rel=1e-3)


def test_mistakes(tmp_path: Path) -> None:
    write(tmp_path / "a", {0: 1.0})
    with pytest.raises(InputError, match="no-such-folder has no result table .*: give the results folder of a run"):
        compare.render(tmp_path / "a", tmp_path / "no-such-folder", "csv")
    with pytest.raises(InputError, match="unknown format 'latex'"):
        compare.render(tmp_path / "a", tmp_path / "a", "latex")
    (tmp_path / "a" / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"notes\.csv is not a table of sbeval"):
        compare.render(tmp_path / "a", tmp_path / "a", "csv")
