"""Digests of rows of tables, which a run file has of each row of its cell."""

import hashlib

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
import pyarrow.compute as pc  # type: ignore[import-untyped]  # likewise


def row_digests(text: pd.DataFrame) -> list[str]:
    """Return the digest of each row of cells as they are written, ten hexadecimal digits.

    Blank cells and the order of columns do not count: a table with a column more has the same rows.
    """
    named, none = [], _large("")
    for name in sorted(map(str, text.columns)):
        cells = pa.array(text[name], pa.large_string())
        filled = pc.binary_join_element_wise(_large(f"{name}="), cells, none)
        named.append(pc.if_else(pc.equal(cells, none), None, filled))
    rows = pc.binary_join_element_wise(*named, _large("\n"), null_handling="skip")
    return [hashlib.sha256(row.encode()).hexdigest()[:10] for row in rows.to_pylist()]


def _large(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())
