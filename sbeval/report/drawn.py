"""What a figure was drawn from, which its file states: `sbeval check` names one of results that are no longer there.

A file has, as a comment, which rows of the table it shows and a digest of them, and of the values and curves of their
cells where the figure reads these. Figures of versions without it are not checked, nor is how a version draws.
"""

import functools
import hashlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pandas as pd

from sbeval.errors import InputError, choose, reading
from sbeval.runtime.files import sha256
from sbeval.tables import table
from sbeval.tables.digests import row_digests
from sbeval.tables.results import Results
from sbeval.tables.selection import SHARED, beside

# columns that no figure shows: cells that run again with the same result change no figure
UNSEEN = ("commit", "torch", "triton", "utc")
# `urlencode` leaves none of the characters that end or escape a string in one of the formats
STATED = re.compile(rb"sbeval:(figure=[\w.~%&=+-]+);")
# formats of figures: those drawn unless others are given, and all
USUAL = ("png", "pdf")
FORMATS = (*USUAL, "html")


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a table that a figure shows.

    where: columns and values; of several values of one column a row has any. settings: values of SHARED of which a row
    has one; with none, all rows.
    """

    where: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, ...], ...] = ()

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the selected rows; InputError where the conditions select none."""
        if self.settings:
            rows = beside(rows, pd.DataFrame(self.settings, columns=list(SHARED)))
        return _where(rows, self.where)


def selection(where: Iterable[str] = (), like: pd.DataFrame | None = None) -> Selection:
    """Return the selection of rows that meet conditions `column=value`, in the settings of the rows `like`.

    Raise InputError for a condition without `=`.
    """
    settings = set() if like is None else set(zip(*(like[name].astype(str) for name in SHARED), strict=True))
    return Selection(tuple(_condition(text) for text in where), tuple(sorted(settings)))


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--where takes COLUMN=VALUE, such as seed=0; got {text!r}")
    return column, value


def _where(rows: pd.DataFrame, where: Iterable[tuple[str, str]]) -> pd.DataFrame:
    wanted: dict[str, pd.Series[bool]] = {}
    for column, value in where:
        values = rows[choose("column", column, rows.columns)]
        numeric = pd.to_numeric(pd.Series([value]), errors="coerce").iloc[0]
        same = (values == numeric if pd.api.types.is_numeric_dtype(values) else values == value).fillna(False)
        if not value:
            # of numbers an empty field is none
            same |= values.isna()
        if not same.any():
            known = ", ".join(f"{one}" for one in values.dropna().unique()[:8])
            raise InputError(f"no row with {column}={value}; {column} is {known}")
        wanted[column] = wanted[column] | same if column in wanted else same
    for same in wanted.values():
        rows = rows[same.loc[rows.index]]
    if wanted and rows.empty:
        raise InputError(f"no row with {' and '.join(f'{column}={value}' for column, value in where)}")
    return rows


@dataclass(frozen=True, slots=True)
class Origin:
    """What a figure was drawn from: rows of a table and, if `files`, values and curves of their cells; see `digest`."""

    figure: str
    table: str
    digest: str
    files: bool
    selection: Selection

    def stated(self) -> str:
        """Return it as a file states it: ASCII, the same for the same results, without paths."""
        named: list[tuple[str, Any]] = [("figure", self.figure), ("table", self.table), ("digest", self.digest)]
        named += [("files", int(self.files))]
        named += [("where", f"{column}={value}") for column, value in self.selection.where]
        named += [(name, value) for each in self.selection.settings for name, value in zip(SHARED, each, strict=True)]
        return f"sbeval:{urlencode(named)};"


def origin(file: Path) -> Origin | None:
    """Return what a file of a figure states; None where it states nothing. InputError where it cannot be read."""
    with reading(file):
        found = STATED.search(file.read_bytes())
    if not found:
        return None
    named: dict[str, list[str]] = {}
    for name, value in parse_qsl(found[1].decode(), keep_blank_values=True):
        named.setdefault(name, []).append(value)
    try:
        (figure,), (of,), (digested,), (files,) = (named[name] for name in ("figure", "table", "digest", "files"))
        settings = tuple(zip(*(named.get(name, []) for name in SHARED), strict=True))
        where = tuple(_condition(text) for text in named.get("where", ()))
    except (KeyError, ValueError):
        # of another version
        return None
    return Origin(figure, of, digested, files == "1", Selection(where, settings))


def digest(text: pd.DataFrame, results: Results, files: bool) -> str:
    """Return the digest of rows, as text, in any order, and of values and curves of their cells if `files`: 16
    hexadecimal digits."""
    parts = sorted(row_digests(text.drop(columns=list(UNSEEN), errors="ignore")))
    cells = sorted(set(text["cell"])) if files and "cell" in text else []
    paths = [path for cell in cells for path in (results.values(cell), results.curves(cell)) if path.exists()]
    parts += [f"{path.parent.name}/{path.name} {sha256(path)}" for path in paths]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(slots=True)
class Counts:
    """Counts of figures, each in one or several formats: of the results that are there, of others, and those that do
    not state what they were drawn from."""

    current: int = 0
    stale: int = 0
    unknown: int = 0

    def __str__(self) -> str:
        words = {"of these results": self.current, "of others": self.stale, "without a digest": self.unknown}
        return ", ".join(f"{count} {which}" for which, count in words.items() if count)


def stale(results: Results, counts: Counts) -> Iterator[str]:
    """Yield a line on each figure of a results folder that was drawn from other results than are there now, with the
    command that redraws it, and count in `counts`.

    A figure whose table cannot be read is left out: `check.folder` names the table.
    """
    files: dict[tuple[str, Origin | None], list[Path]] = {}
    for file in sorted(results.figures.glob("[!.]*")):
        if file.suffix[1:] in FORMATS and file.is_file():
            files.setdefault((file.stem, origin(file)), []).append(file)
    tables = functools.cache(functools.partial(_read, results))
    now = functools.cache(functools.partial(_now, tables, results))
    stated = [(of, now(of.table, of.files, of.selection), some) for (_, of), some in files.items() if of]
    old = [(of, some) for of, digested, some in stated if digested not in (None, of.digest)]
    current = {some[0].stem for of, digested, some in stated if digested == of.digest}
    others = {some[0].stem for _, some in old}
    unknown = {stem for stem, of in files if not of} - others
    counts.current, counts.stale, counts.unknown = len(current - others - unknown), len(others), len(unknown)
    for of, some in old:
        path, suffixes = results.table(of.table), ",".join(file.suffix[1:] for file in some)
        names = some[0] if len(some) == 1 else some[0].with_suffix(f".{{{suffixes}}}")
        if not path.exists():
            yield f"{names}: there is no {path}, from which it was drawn"
        else:
            what = f"rows, values or curves than the cells of {path} have" if of.files else f"rows than {path} has"
            # a figure of settings that the table no longer has is not drawn again
            yield f"{names}: drawn from other {what} now; {_command(of, some, results)} redraws it, or remove it"


def _read(results: Results, name: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Return the rows of a table as text and typed; None where it cannot be read."""
    try:
        text = table.text(results.table(name))
    except InputError:
        return None
    return text, table.typed(text)


def _now(
    read: Callable[[str], tuple[pd.DataFrame, pd.DataFrame] | None],
    results: Results,
    name: str,
    files: bool,
    selection: Selection,
) -> str | None:
    """Return the digest of what a selection of a table has now, empty without rows; None where it cannot be read."""
    if not results.table(name).exists():
        return ""
    if (rows := read(name)) is None:
        return None
    text, typed = rows
    try:
        return digest(text.loc[selection.of(typed).index], results, files)
    except InputError:
        return ""


def _command(of: Origin, files: list[Path], results: Results) -> str:
    """Return the command that draws files of one figure again."""
    words = ["sbeval", "plot", of.figure.replace("_", "-")]
    words += [word for column, value in of.selection.where for word in ("--where", f"{column}={value}")]
    if (formats := {file.suffix[1:] for file in files}) - set(USUAL):
        words += [word for name in sorted(formats) for word in ("--format", name)]
    return shlex.join([*words, "--results-dir", str(results.folder)])
