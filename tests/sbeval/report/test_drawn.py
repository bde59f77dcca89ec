"""Figures state what they were drawn from, and those of other results than the folder has are named."""

import dataclasses
import importlib.util
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.report import drawn
from sbeval.report.drawn import Counts, Origin, Selection
from sbeval.report.figures import draw_figures
from sbeval.tables import table
from sbeval.tables.results import Results

COMMITTED = Path(__file__).parents[3] / "results"
FOLDERS = sorted({path.parent for path in COMMITTED.glob("**/figures")})
# a small folder of committed results with curves of recall
FOLDER = "plateau-causes"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    ignored = shutil.ignore_patterns("figures", "values")
    return Results(Path(shutil.copytree(COMMITTED / FOLDER, tmp_path / FOLDER, ignore=ignored)))


def draw(results: Results, *names: str, formats: tuple[str, ...] = ("png",), where: tuple[str, ...] = ()) -> list[Path]:
    return draw_figures(results.folder, names, formats, where=where)


def found(results: Results) -> list[str]:
    return list(drawn.stale(results, Counts()))


def counted(results: Results) -> str:
    list(drawn.stale(results, counts := Counts()))
    return str(counts)


def rewrite(results: Results, changed: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = results.table("mqrar")
    rows = changed(table.read(path))
    path.unlink()
    table.write(path, rows)


def without(column: str, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda rows: rows[rows[column] != value]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_committed_figures_show_the_committed_results(folder: Path) -> None:
    assert list(drawn.stale(Results(folder), counts := Counts())) == []
    assert counts.current > 0 and (counts.stale, counts.unknown) == (0, 0)


def test_a_figure_of_other_rows_is_named_with_the_command_that_redraws_it(results: Results) -> None:
    # all of those that `sbeval plot` draws
    formats = drawn.FORMATS if importlib.util.find_spec("plotly") else drawn.USUAL
    files = draw(results, "mqrar", formats=formats)
    assert len(files) == len(formats) and found(results) == [] and counted(results) == "1 of these results"
    rewrite(results, without("seed", 2))
    (line,) = found(results)
    name, _, command = line.partition(f": drawn from other rows than {results.table('mqrar')} has now; ")
    assert name == f"{results.figures}/mqrar.{{{','.join(sorted(formats))}}}"
    given = "".join(f" --format {each}" for each in sorted(formats)) if "html" in formats else ""
    assert command == f"sbeval plot mqrar{given} --results-dir {results.folder} redraws it, or remove it"
    assert counted(results) == "1 of others"
    # one of its files, then all
    draw(results, "mqrar")
    assert ".png" not in found(results)[0] and "mqrar." in found(results)[0]
    draw(results, "mqrar", formats=formats)
    assert found(results) == []


@pytest.mark.parametrize(("column", "seen"), [("value", True), ("stderr", True), ("utc", False), ("commit", False)])
def test_what_no_figure_shows_does_not_count(results: Results, column: str, seen: bool) -> None:
    draw(results, "mqrar")
    other = 0.25 if seen else "1"
    rewrite(results, lambda rows: rows.assign(**{column: rows[column].mask(rows["split"] == "all", other)}))
    assert bool(found(results)) == seen


def test_order_and_parts_and_a_new_column_do_not_count(results: Results) -> None:
    draw(results, "mqrar")
    path = results.table("mqrar")
    rows = table.read(path)
    last = rows["cell"] == rows["cell"].iloc[-1]
    path.unlink()
    table.write(path, rows[~last].assign(later=""))
    assert len(found(results)) == 1
    table.keep(path, rows[last])
    assert found(results) == []


def test_a_figure_depends_on_the_curves_that_it_shows(results: Results) -> None:
    draw(results, "recall_curves", "mqrar")
    cells = table.read(results.table("mqrar"))["cell"].unique()
    results.curves(cells[0]).write_bytes(results.curves(cells[1]).read_bytes())
    (line,) = found(results)
    assert "recall_curves.png: drawn from other rows, values or curves than the cells of" in line
    assert line.endswith(f"{results.table('mqrar')} have now; {redraw(results, 'recall-curves')}")


def redraw(results: Results, *words: str) -> str:
    return f"{shlex.join(['sbeval', 'plot', *words, '--results-dir', str(results.folder)])} redraws it, or remove it"


def test_a_condition_without_a_value_selects_empty_fields() -> None:
    rows = pd.DataFrame({"number": [1.0, None], "whole": pd.array([1, None], "Int64"), "text": ["a", ""]})
    for name in rows:
        assert drawn.selection([f"{name}="]).of(rows).index.to_list() == [1]
        assert drawn.selection([f"{name}={rows[name][0]}"]).of(rows).index.to_list() == [0]
    with pytest.raises(InputError, match="no row with number="):
        drawn.selection(["number="]).of(rows[:1])


def test_a_figure_of_some_rows_is_of_those(results: Results) -> None:
    draw(results, "mqrar", where=("attention=rope", "seed=0", "seed=1"))
    rewrite(results, without("attention", "alibi"))
    assert found(results) == []
    rewrite(results, lambda rows: rows[(rows["attention"] != "rope") | (rows["seed"] != 1)])
    given = ["--where", "attention=rope", "--where", "seed=0", "--where", "seed=1"]
    assert found(results)[0].endswith(redraw(results, "mqrar", *given))
    # none of its rows is left
    rewrite(results, without("attention", "rope"))
    assert found(results)[0].endswith(redraw(results, "mqrar", *given))


def test_a_figure_of_a_command_is_of_its_settings(results: Results) -> None:
    rows = table.read(results.table("mqrar"))
    other = rows.assign(preset="other", cell="other-" + rows["cell"])
    draw_figures(results.folder, ["mqrar"], ["png"], like=rows)
    rewrite(results, lambda rows: pd.concat([rows, other]))
    assert found(results) == []
    # as one of the whole table is not
    draw(results, "mqrar_splits")
    rewrite(results, without("preset", "other"))
    assert ["mqrar_splits.png" in line for line in found(results)] == [True]
    rewrite(results, without("seed", 2))
    assert len(found(results)) == 2


def test_a_figure_that_is_drawn_no_more_is_to_be_removed(results: Results) -> None:
    (file,) = draw(results, "mqrar")
    # a setting that had a figure of its own
    file.rename(results.figures / "mqrar-six-heads.png")
    rewrite(results, without("seed", 2))
    draw(results, "mqrar")
    (line,) = found(results)
    assert "mqrar-six-heads.png: " in line and line.endswith("redraws it, or remove it")
    results.table("mqrar").unlink()
    assert [line.partition(": ")[2] for line in found(results)] == [
        f"there is no {results.table('mqrar')}, from which it was drawn"
    ] * 2


def test_pictures_that_state_nothing_are_counted_and_not_named(results: Results) -> None:
    (file,) = draw(results, "mqrar")
    picture = file.read_bytes()
    file.with_name("own.png").write_bytes(picture.replace(b"sbeval:figure", b"sbeval:picture"))
    # as a later version may state it
    file.with_name("later.png").write_bytes(picture.replace(b"&digest=", b"&sha256="))
    file.with_name("where.png").write_bytes(picture.replace(b"&files=0;", b"&files=0&where=seed;"))
    file.with_name("notes.txt").write_text("sbeval:figure=mqrar;")
    file.with_name("folder.png").mkdir()
    assert found(results) == [] and counted(results) == "1 of these results, 3 without a digest"


def test_a_table_that_cannot_be_read_says_nothing_of_figures(results: Results) -> None:
    draw(results, "mqrar")
    with results.table("mqrar").open("a") as file:
        file.write("torn")
    assert found(results) == [] and counted(results) == ""


def test_what_is_stated_is_read_again(tmp_path: Path) -> None:
    where = (("attention", "package.a;b(c)\\$<x>"), ("device", "NVIDIA H200 – 1"), ("options", ""))
    settings = (("m", "512", "", "quick"), ("m", "2048", "books", ""))
    stated = Origin("a_figure", "table", "0123456789abcdef", True, Selection(where, settings))
    text = stated.stated()
    assert text.isascii() and not set(text) & set("()\\<>\"' \n")
    (tmp_path / "a.pdf").write_text(f"before({text})after;")
    assert drawn.origin(tmp_path / "a.pdf") == stated
    plain = dataclasses.replace(stated, files=False, selection=Selection())
    (tmp_path / "a.pdf").write_text(plain.stated())
    assert drawn.origin(tmp_path / "a.pdf") == plain
    with pytest.raises(InputError, match="cannot read .*nowhere"):
        drawn.origin(tmp_path / "nowhere.png")
