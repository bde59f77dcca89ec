"""Draw figures from result tables, for `sbeval plot`, without torch."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from sbeval import registry
from sbeval.errors import InputError, NothingToDraw, choose
from sbeval.plots import legend
from sbeval.report import drawn, html
from sbeval.runtime.files import prepare, remove_left, replacing
from sbeval.tables import check, csv_text, table
from sbeval.tables.results import Results

# how figures are saved: without dates and versions, so that redrawn from the same table a file has the same bytes
SAVED: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"Creator": None, "Producer": None, "CreationDate": None}},
    "png": {"metadata": {"Software": None}, "dpi": 200},
}
# entries of the metadata that state what a file was drawn from; pdf has few names
STATED_AS = {"pdf": "Keywords", "png": "Comment"}


def draw_figures(
    results_dir: Path,
    names: Sequence[str] | None = None,
    formats: Iterable[str] = drawn.USUAL,
    out_dir: Path | None = None,
    say: Callable[[str], None] = print,
    where: Iterable[str] = (),
    *,
    required: bool = True,
    like: pd.DataFrame | None = None,
) -> list[Path]:
    """Draw the named figures, or all whose table exists, and return the files, `out_dir`/<name>.<format>.

    A figure of several settings may have a file for each, <name>-<setting>.<format>.

    out_dir: `results_dir`/figures unless given. say: reports each figure that is skipped because it has no table, none
    of its rows or a damaged file, and rows that are not what a run wrote. where: conditions `column=value` on
    rows; of several on one column, a row meets any. like: rows; their settings alone are drawn, with all methods. A
    figure that only some tables have rows for is left out where there are none, unless it is named. Raise InputError
    for an unknown name or format, no table or no figure at all and, for a named figure, a table that cannot be read, no
    table or, if `required`, none of its rows.
    """
    selection = drawn.selection(where, like)
    chosen = [choose("format", name, drawn.FORMATS) for name in formats]
    modules = {name: registry.figure(name) for name in names} if names else registry.all_figures(say)
    tables = dict.fromkeys(Results(results_dir).table(module.TABLE) for module in modules.values())
    if not names and not any(path.exists() for path in tables):
        raise csv_text.nothing(results_dir)
    if missing := [path for path in tables if names and not path.exists()]:
        raise csv_text.absent(missing[0])
    folder = prepare(out_dir or Results(results_dir).figures, "folder of figures", "--out")
    remove_left(folder)
    files, errors, noted = [], [], set[Path]()
    for name, module in modules.items():
        path = Results(results_dir).table(module.TABLE)
        if not names and not path.exists():
            say(f"{name}: skipped, no table {path}")
            continue
        try:
            text = table.text(path, required=module.COLUMNS)
            if path not in noted:
                noted.add(path)
                for line in check.notes([path]):
                    say(line)
            selected = selection.of(table.typed(text))
            rows = registry.gather(name, selected, results_dir)
            if not names and not registry.has_rows(name, rows):
                continue
            beside = hasattr(module, "gather")
            digest = drawn.digest(text.loc[selected.index], Results(results_dir), beside)
            origin = drawn.Origin(name, module.TABLE, digest, beside, selection)
            files += _draw(origin, rows, folder, [suffix for suffix in chosen if suffix in SAVED])
            if "html" in chosen:
                files.append(_write_page(origin, module, rows, folder / f"{name}.html"))
        except NothingToDraw as error:
            if names and required:
                raise InputError(f"{path}: {error}") from None
            say(f"{name}: left out, {error}")
        except InputError as error:
            # what cannot read the table names it
            failed = error if str(path) in str(error) else InputError(f"{path}: {error}")
            if names:
                raise failed from None
            errors.append(failed)
            say(f"{name}: skipped, {failed}")
    if errors and not files:
        raise errors[0]
    return files


def _write_page(origin: drawn.Origin, module: registry.Figure, rows: pd.DataFrame, file: Path) -> Path:
    text = html.figure(module.chart(legend.named(rows)))
    with replacing(file) as temporary:
        temporary.write_text(f"{text}<!-- {origin.stated()} -->\n", encoding="utf-8")
    return file


def _draw(origin: drawn.Origin, rows: pd.DataFrame, folder: Path, suffixes: list[str]) -> list[Path]:
    if not suffixes:
        return []
    files = []
    # fonts go into a pdf as outlines that editors and printers can read; a $ in a name begins no formula
    with matplotlib.rc_context({"pdf.fonttype": 42, "text.parse_math": False}):
        for setting, figure in registry.figures(origin.figure, legend.named(rows)).items():
            for suffix in suffixes:
                file = folder / f"{origin.figure}{setting}.{suffix}"
                options = SAVED[suffix]
                metadata = {**options["metadata"], STATED_AS[suffix]: origin.stated()}
                with replacing(file) as temporary:
                    figure.savefig(temporary, format=suffix, **{**options, "metadata": metadata})
                files.append(file)
    return files
