"""Values behind the rows of a table: one for each document, item, prompt or split, in results/values/<cell>.parquet.

A row of a table is a mean or a ratio over such units. Their values let one pair two models by document, resample, and
compute what the table has not. Long form, one number a row: `metric`, `unit_id`, `value`, and the family's factors.

    metric    unit_id   value      position_start  position_end
    nll_sum   book-17   310.8021   65              78
    tokens    book-17   13         65              78
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from sbeval.tables import parquet
from sbeval.tables.results import Results
from sbeval.tables.run_files import is_written
from sbeval.tables.statistics import Floats

COLUMNS = ("metric", "unit_id", "value")
# counts of each example, of hits and of positions, (n,) each, and the factors of their row
Split = tuple[Floats, Floats, Mapping[str, Any]]


def write(results: Results, cell: str, values: pd.DataFrame) -> str:
    """Write the values of a cell, replacing those of an earlier run, and return the digest for its run file.

    values: columns COLUMNS, then factors; `value` is finite.
    """
    assert tuple(values.columns[: len(COLUMNS)]) == COLUMNS, f"values begin with {COLUMNS}, not {list(values.columns)}"
    assert len(values) and np.isfinite(values["value"].astype(float)).all(), "no data is an absent row, not NaN"
    typed = values.assign(unit_id=values["unit_id"].map(str), value=values["value"].astype(float))
    return parquet.write(results.values(cell), typed)


def read(results: Results, cells: Iterable[str]) -> pd.DataFrame:
    """Return the values of cells, with a column `cell` in front; cells without values are left out.

    Raise InputError for a file that is missing or not as the cell's run wrote it.
    """
    frames = [pd.DataFrame(columns=["cell", *COLUMNS])]
    for cell in dict.fromkeys(cells):
        path = results.values(cell)
        if is_written(results, cell, path):
            frame = parquet.read(path)
            frame.insert(0, "cell", cell)
            frames.append(frame)
    return pd.concat(frames[1:] or frames, ignore_index=True)


def counted(
    splits: Iterable[Split], hits: str, scored: str, *, by_example: bool = False, **factors: Any
) -> pd.DataFrame:
    """Return the counts of each split in all, with an empty `unit_id`.

    by_example: of the first split, which is the whole evaluation, return those of each example, by its number.
    """
    parts = []
    for number, (right, count, split) in enumerate(splits):
        each = by_example and number == 0
        units = [str(unit) for unit in range(len(count))] if each else [""]
        for metric, counts in ((hits, right), (scored, count)):
            values = counts if each else [counts.sum()]
            parts.append(pd.DataFrame({"metric": metric, "unit_id": units, "value": values, **split, **factors}))
    return joined(parts)


def joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return values with different factors as one frame: a factor is blank where a part has none."""
    frame = pd.concat(parts, ignore_index=True)
    # blanks make whole numbers floats
    whole = [
        name
        for name in frame.columns
        if name != "value" and frame[name].dtype == "float64" and (frame[name].dropna() % 1 == 0).all()
    ]
    return frame.astype(dict.fromkeys(whole, "Int64"))
