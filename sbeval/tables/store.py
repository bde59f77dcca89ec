"""Store the result of a cell: values, curves, run file, rows, in this order.

Rows are last: a cell that has rows has the rest. The run file has the digests of the others, so a reader knows which
rows, values and curves are what the run wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sbeval.tables import curves, provenance, table, values
from sbeval.tables.curves import Curves
from sbeval.tables.digests import row_digests
from sbeval.tables.results import Results


@dataclass(frozen=True, slots=True)
class Stored:
    """What a cell stores: contents of its run file, rows of its table, values behind them, curves of its training."""

    cell: str
    record: Mapping[str, Any]
    rows: pd.DataFrame | None = None
    values: pd.DataFrame | None = None
    curves: Curves = field(default_factory=dict)


def keep(results: Results, family: str, stored: Stored) -> None:
    """Store the result of a cell, replacing that of an earlier run; `table.assemble` adds its rows to the table."""
    cell, files = stored.cell, {}
    if stored.values is not None:
        files["values"] = values.write(results, cell, stored.values)
    if stored.curves:
        files["curves"] = curves.write(results, cell, stored.curves)
    rows = [] if stored.rows is None else sorted(row_digests(table.as_text(stored.rows)))
    provenance.write_run(results.run_file(cell), {**stored.record, "files": files, "rows": rows})
    # of an earlier run, which had some
    for path in (results.values(cell), results.curves(cell)):
        if path.parent.name not in files:
            path.unlink(missing_ok=True)
    if stored.rows is not None:
        table.keep(results.table(family), stored.rows)
