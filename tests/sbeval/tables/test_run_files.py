"""The origin of a table: one line on its runs, and the commands that made it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.tables import provenance, run_files
from sbeval.tables.results import Results

ROW = {
    "preset": "quick",
    "seed": 0,
    "corpus": "books",
    "dtype": "float32",
    "device": "cpu",
    "commit": "c0ffee",
    "torch": "2.13.0",
    "triton": "",
    "utc": "2026-01-01T00:00:00+00:00",
    "value": 1.0,
}


@pytest.fixture
def table() -> pd.DataFrame:
    """Two cells, the first with two rows."""
    cells = ({"cell": "b", "seed": 1}, {"cell": "b", "seed": 1, "value": 2.0}, {"cell": "a", "dtype": "bfloat16"})
    return pd.DataFrame([ROW | cell for cell in cells])


def write(folder: Path, cell: str, **entries: object) -> None:
    provenance.write_run(Results(folder).run_file(cell), {"status": "finished", **entries})


def test_the_origin_lists_what_differs(table: pd.DataFrame, tmp_path: Path) -> None:
    write(tmp_path, "a", argv=["sbeval", "mqrar"], corpus_digest="12ab", versions={"python": "3.11.7"})
    write(tmp_path, "b", argv=["__main__.py", "mqrar", "--corpus", "my books"], versions={"python": "3.12.0"})
    runs = run_files.gather(table, Results(tmp_path).runs)
    assert runs.cells["cell"].tolist() == ["a", "b"]
    assert runs.origin() == (
        "2 runs; commit c0ffee; cpu; bfloat16, float32; torch 2.13.0; Python 3.11.7, 3.12.0; seed 0, 1; "
        "books, books (12ab)"
    )
    assert runs.commands == ["python -m sbeval mqrar --corpus 'my books'", "sbeval mqrar"]
    assert runs.again == ["sbeval mqrar", "sbeval mqrar --corpus 'my books'"]


def test_without_run_files_the_rows_alone_are_the_origin(table: pd.DataFrame, tmp_path: Path) -> None:
    runs = run_files.gather(table[table["cell"] == "a"], tmp_path)
    assert runs.origin() == "1 run; commit c0ffee; cpu; bfloat16; torch 2.13.0; seed 0; books"
    assert runs.commands == [] and run_files.command_line([]) == ""


def test_a_file_is_of_the_run_whose_digest_it_has(tmp_path: Path) -> None:
    results = Results(tmp_path)
    path = results.values("a")
    assert not run_files.is_written(results, "a", path)
    path.parent.mkdir()
    path.write_bytes(b"values")
    # there is no run file that could know better
    assert run_files.is_written(results, "a", path)
    write(tmp_path, "a", files={"values": "another digest"})
    with pytest.raises(InputError, match="is not what the run of a wrote: restore it, or run the cell again"):
        run_files.is_written(results, "a", path)
    path.unlink()
    with pytest.raises(InputError, match="is missing, which the run of a wrote"):
        run_files.is_written(results, "a", path)


def test_published_run_files_have_their_command() -> None:
    folder = Path(__file__).parents[3] / "results" / "quick" / "runs"
    path = next(folder.glob("mqrar-*.json"))
    assert run_files.command_line(json.loads(path.read_text())["argv"]).split()[2:5] == ["sbeval", "run", "quick"]
