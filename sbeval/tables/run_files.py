"""The runs behind a result table: the origin of its numbers, from its rows and their run files."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sbeval.errors import InputError
from sbeval.runtime.files import sha256
from sbeval.tables.commands import fewest
from sbeval.tables.privacy import shared_argv
from sbeval.tables.provenance import read_run
from sbeval.tables.results import Results

COLUMNS = ("cell", "preset", "seed", "corpus", "dtype", "device", "commit", "torch", "triton", "utc")
# what `origin` lists, in this order
WORDS = {
    "commit": "commit {}",
    "device": "{}",
    "dtype": "{}",
    "torch": "torch {}",
    "triton": "triton {}",
    "python": "Python {}",
    "seed": "seed {}",
    "corpus": "{}",
}


@dataclass(frozen=True, slots=True)
class Runs:
    """A row for each cell, by name, the command lines that produced them, and the fewest that make the same rows."""

    cells: pd.DataFrame
    commands: list[str]
    again: list[str]

    def origin(self) -> str:
        """Return the origin of the numbers in a line; what differs between runs is a list."""
        values_of = {name: [str(value) for value in sorted(set(self.cells[name])) if str(value)] for name in WORDS}
        parts = [WORDS[name].format(", ".join(values)) for name, values in values_of.items() if values]
        return "; ".join([f"{len(self.cells)} run{'s' * (len(self.cells) > 1)}", *parts])


def gather(table: pd.DataFrame, folder: Path) -> Runs:
    """Collect the runs of a table, whose run files are in `folder`; without a run file, its entries are empty."""
    cells = table[list(COLUMNS)].drop_duplicates("cell").sort_values("cell")
    records = [_record(folder / f"{cell}.json") for cell in cells["cell"]]
    digests = [str(record.get("corpus_digest", "")) for record in records]
    texts = zip(cells["corpus"], digests, strict=True)
    commands = [command_line(record.get("argv", [])) for record in records]
    cells = cells.assign(
        corpus=[f"{corpus} ({digest})" if digest else corpus for corpus, digest in texts],
        python=[str(record.get("versions", {}).get("python", "")) for record in records],
    )
    again = fewest(record.get("argv", []) for record in records)
    return Runs(cells, sorted({command for command in commands if command}), again)


def is_written(results: Results, cell: str, path: Path) -> bool:
    """Return whether the run of a cell wrote `path`, its file of values or curves, by the digest in its run file.

    A file without a run file is taken as it is. Raise InputError for one that is missing, damaged or of another run.
    """
    run = results.run_file(cell)
    if not run.exists():
        return path.exists()
    digest = read_run(run).get("files", {}).get(path.parent.name)
    if digest is None and not path.exists():
        return False
    if not path.exists():
        raise InputError(f"{path} is missing, which the run of {cell} wrote: restore it, or run the cell again")
    if sha256(path) != digest:
        raise InputError(f"{path} is not what the run of {cell} wrote: restore it, or run the cell again")
    return True


def command_line(argv: list[str]) -> str:
    """Return a recorded command line as typed; that of a module begins with `python -m`."""
    if not argv:
        return ""
    program = ["python", "-m", "sbeval"] if argv[0] == "__main__.py" else argv[:1]
    # run files of earlier versions hold these as they were given
    return " ".join(map(_quoted, [*program, *shared_argv(argv[1:])]))


def _quoted(word: str) -> str:
    """Quote a word for a shell, which expands `~/`."""
    return f"~/{shlex.quote(word[2:])}" if word.startswith("~/") and word != "~/" else shlex.quote(word)


def _record(path: Path) -> dict[str, Any]:
    return read_run(path) if path.exists() else {}
