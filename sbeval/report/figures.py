"""Draw figures from result tables, for `sbeval plot`, without torch."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from sbeval import registry
from sbeval.errors import InputError, NothingToDraw, choose
from sbeval.plots import legend
from sbeval.report import html
from sbeval.runtime.files import prepare, remove_left, replacing
from sbeval.tables import check
from sbeval.tables.results import Results
from sbeval.tables.selection import beside
from sbeval.tables.table import read

# without dates and versions: redrawn from the same table, a file has the same bytes
FORMATS: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"Creator": None, "Producer": None, "CreationDate": None}},
    "png": {"metadata": {"Software": None}, "dpi": 200},
}


def draw_figures(
    results_dir: Path,
    names: Sequence[str] | None = None,
    formats: Iterable[str] = ("png", "pdf"),
    out_dir: Path | None = None,
    say: Callable[[str], None] = print,
    where: Iterable[str] = (),
    *,
    required: bool = True,
    like: pd.DataFrame | None = None,
) -> list[Path]:
    """Draw the named figures, or all whose table exists, and return the files, `out_dir`/<name>.<format>.

    A figure of several settings may have a file for each, <name>-<setting>.<format>.

    out_dir: `results_dir`/figures unless given. say: reports each figure that is skipped because it has no table, or
    none of its rows, and rows that are not what a run wrote. where: conditions `column=value` on rows. like: rows;
    their settings alone are drawn, with all methods. A figure that only some tables have rows for is left out where
    there are none, unless it is named. Raise InputError for an unknown name or format, a table that cannot be read, no
    table at all and, for a named figure, no table or, if `required`, none of its rows.
    """
    conditions = tuple(where)
    chosen = [choose("format", name, (*FORMATS, "html")) for name in formats]
    modules = {name: registry.figure(name) for name in names or registry.FIGURES}
    tables = dict.fromkeys(Results(results_dir).table(module.TABLE) for module in modules.values())
    if not names and not any(path.exists() for path in tables):
        raise InputError(f"there is no result table in {results_dir}; sbeval length-gen --preset quick makes one")
    folder = prepare(out_dir or Results(results_dir).figures)
    remove_left(folder)
    files = []
    for line in check.notes(path for path in tables if path.exists()):
        say(line)
    for name, module in modules.items():
        path = Results(results_dir).table(module.TABLE)
        if not names and not path.exists():
            say(f"{name}: skipped, no table {path}")
            continue
        table = read(path, required=module.COLUMNS)
        table = table if like is None else beside(table, like)
        rows = None if names else registry.gather(name, table, results_dir)
        if rows is not None and not registry.has_rows(name, rows):
            continue
        selected = _selected(table, path, conditions)
        try:
            if rows is None or conditions:
                rows = registry.gather(name, selected, results_dir)
            files += _draw(name, rows, folder, [suffix for suffix in chosen if suffix in FORMATS])
            if "html" in chosen:
                files.append(_write_page(module, rows, folder / f"{name}.html"))
        except NothingToDraw as error:
            if names and required:
                raise InputError(f"{path}: {error}") from None
            say(f"{name}: left out, {error}")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return files


def _selected(table: pd.DataFrame, path: Path, where: Iterable[str]) -> pd.DataFrame:
    """Return the rows that have the given values, each `column=value`; InputError where there are none."""
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise InputError(f"--where takes COLUMN=VALUE, such as seed=0; got {condition!r}")
        values = table[choose(f"column of {path}", column, table.columns)]
        numeric = pd.to_numeric(pd.Series([value]), errors="coerce").iloc[0]
        same = values == numeric if pd.api.types.is_numeric_dtype(values) else values == value
        if not same.fillna(False).any():
            known = ", ".join(f"{one}" for one in values.dropna().unique()[:8])
            raise InputError(f"{path} has no row with {condition}; {column} is {known}")
        table = table[same.fillna(False)]
    return table


def _write_page(module: registry.Figure, table: pd.DataFrame, file: Path) -> Path:
    text = html.figure(module.chart(legend.named(table)))
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def _draw(name: str, rows: pd.DataFrame, folder: Path, suffixes: list[str]) -> list[Path]:
    if not suffixes:
        return []
    files = []
    # fonts go into a pdf as outlines that editors and printers can read; a $ in a name begins no formula
    with matplotlib.rc_context({"pdf.fonttype": 42, "text.parse_math": False}):
        for setting, figure in registry.figures(name, legend.named(rows)).items():
            for suffix in suffixes:
                file = folder / f"{name}{setting}.{suffix}"
                with replacing(file) as temporary:
                    figure.savefig(temporary, format=suffix, **FORMATS[suffix])
                files.append(file)
    return files
