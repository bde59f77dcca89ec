"""Parquet files of numbers, as small as they can be without losing a digit.

Numbers that have four decimals or fewer, such as counts and recorded losses, are stored as decimals, others as float64.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # likewise

from sbeval.errors import InputError, first_line
from sbeval.runtime.files import replacing, sha256, storing

# decimals, and the bound below which a float64 with so many is a decimal of 18 digits, exactly
SCALE, LARGEST = 4, 1e9
LEVEL = 19


def write(path: Path, frame: pd.DataFrame) -> str:
    """Write a frame of text, whole numbers and float64 atomically, create its folder, and return the file's SHA-256.

    NaN and other blanks become null.
    """
    columns = {str(name): _packed(frame[name]) for name in frame.columns}
    text = [name for name, column in columns.items() if pa.types.is_string(column.type)]
    encodings = {
        name: "PLAIN" if pa.types.is_floating(column.type) else "DELTA_BINARY_PACKED"
        for name, column in columns.items()
        if name not in text
    }
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(
            pa.table(columns),
            temporary,
            compression="zstd",
            compression_level=LEVEL,
            use_dictionary=text,
            column_encoding=encodings,
            store_decimal_as_integer=True,
            store_schema=False,
        )
        # of what is about to be there: a reader never finds the file with another digest
        return sha256(temporary)


def read(path: Path) -> pd.DataFrame:
    """Read a file that `write` wrote: text, int64 (Int64 with blanks) and float64, NaN for a blank.

    Raise InputError when the file is missing or cannot be read.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None
    return pd.DataFrame({name: _unpacked(table[name]) for name in table.column_names})


def _packed(column: "pd.Series[Any]") -> pa.Array:
    if pd.api.types.is_integer_dtype(column.dtype):
        return pa.array(column, pa.int64())
    if not pd.api.types.is_float_dtype(column.dtype):
        return pa.array(column, pa.string())
    values = column.to_numpy(dtype=np.float64)
    known = values[~np.isnan(values)]
    assert np.isfinite(known).all(), f"an infinite {column.name}"
    array = pa.array(values, pa.float64(), from_pandas=True)
    if (np.round(known, SCALE) == known).all() and (np.abs(known) < LARGEST).all():
        return array.cast(pa.decimal128(18, SCALE))
    return array


def _unpacked(column: pa.ChunkedArray) -> "pd.Series[Any]":
    if pa.types.is_decimal(column.type):
        # the cast is off by a bit here and there, which rounding mends
        return pd.Series(np.round(column.cast(pa.float64()).to_numpy(), SCALE))
    if pa.types.is_integer(column.type) and column.null_count:
        whole: pd.Series[Any] = column.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
        return whole
    plain: pd.Series[Any] = column.to_pandas()
    return plain
