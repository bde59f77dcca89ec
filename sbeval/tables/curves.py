"""Curves of training: loss of every step, held-out losses and scores, in results/curves/<cell>.parquet.

step  loss    validation_accuracy
99    7.3128
100   7.3041  0.0019
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
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


def at_same_tokens(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each seed's rows at all tokens, column `x`, at which another was measured too; between its own its value
    and standard error are linear in the logarithm of tokens, as losses nearly are.

    A method's line is where it has all of its seeds: their means at other steps each would be those of other seeds. One
    whose seeds share no range keeps its rows.
    """
    tokens, found = np.unique(rows["x"]), [rows[:0]]
    for _, method in rows.groupby(["attention", "options"], sort=False):
        seeds = [(of.iloc[:1], of.groupby("x")[["value", "stderr"]].mean()) for _, of in method.groupby("seed")]
        first, last = (max(own.index[0] for _, own in seeds), min(own.index[-1] for _, own in seeds))
        x = tokens[(tokens >= first) & (tokens <= last)]
        if not len(x):
            found.append(method)
        for of, own in seeds if len(x) else ():
            value, stderr = (np.interp(np.log(x), np.log(own.index), own[name]) for name in ("value", "stderr"))
            found.append(pd.concat([of] * len(x), ignore_index=True).assign(x=x, value=value, stderr=stderr))
    return pd.concat(found[1:] or found, ignore_index=True)
