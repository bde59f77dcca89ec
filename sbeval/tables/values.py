"""Values behind the rows of a table: one for each document, item, prompt or split, in results/values/<cell>.parquet.

A row of a table is a mean or a ratio over such units. Their values let one pair two models by document, resample, and
compute what the table has not. Long form, one number a row: `metric`, `unit_id`, `value`, and the family's factors.

    metric    unit_id   value      position_start  position_end
    nll_sum   book-17   310.8021   65              78
    tokens    book-17   13         65              78
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from sbeval.tables import parquet
from sbeval.tables.results import Results
from sbeval.tables.run_files import is_written

COLUMNS = ("metric", "unit_id", "value")


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
