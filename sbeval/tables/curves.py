"""Curves of training: loss of every step, held-out losses and scores, in results/curves/<cell>.parquet.

step  loss    validation_accuracy
99    7.3128
100   7.3041  0.0019
"""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from sbeval.tables import parquet
from sbeval.tables.results import Results
from sbeval.tables.run_files import is_written

# (step, value) of each metric
Curves = Mapping[str, Sequence[tuple[int, float]]]
COLUMNS = ("cell", "metric", "step", "value")


def write(results: Results, cell: str, curves: Curves) -> str:
    """Write the curves of a cell, replacing those of an earlier run, and return the digest for its run file."""
    series = {name: pd.Series(dict(points), dtype="float64") for name, points in curves.items() if points}
    frame = pd.DataFrame(series).sort_index().rename_axis("step").reset_index()
    return parquet.write(results.curves(cell), frame)


def read(results: Results, cells: Iterable[str]) -> pd.DataFrame:
    """Return the curves of cells in long form, COLUMNS; cells without curves are left out.

    Raise InputError for a file that is missing or not as the cell's run wrote it.
    """
    frames = [pd.DataFrame(columns=list(COLUMNS))]
    for cell in dict.fromkeys(cells):
        path = results.curves(cell)
        if is_written(results, cell, path):
            long = parquet.read(path).melt("step", var_name="metric").dropna(subset="value")
            frames.append(long.assign(cell=cell)[list(COLUMNS)])
    return pd.concat(frames[1:] or frames, ignore_index=True)
