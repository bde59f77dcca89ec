"""Rows of the benchmarks, and how they come into the results folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sbeval.bench.problems import Sizes
from sbeval.config import LATER, digest_of
from sbeval.runtime import device as devices
from sbeval.tables import provenance, store, table
from sbeval.tables.results import Results
from sbeval.tables.rows import Identity, Measurement, method_of
from sbeval.tables.store import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Sizes, Measurement):
    """Factors: the problem, `sequences` packed into a row, `epsilon` of skipping, and `logit_mean` where inputs are not
    standard normal."""

    sequences: int
    epsilon: float | None = None
    logit_mean: float | None = field(default=None, metadata=LATER)


def keep(
    attention: str,
    backend: str,
    family: str,
    rows: Sequence[Row],
    device: torch.device,
    dtype: str,
    results_dir: Path,
    config: object,
    *,
    model: str = "",
    params: int = 0,
) -> None:
    """Write the run file, then the rows."""
    step = rows[0].step
    method, options = method_of(attention)
    cell = f"{family}-{step}-{method}-{backend}-{digest_of([attention, backend, dtype, model, config])}"
    origin = provenance.collect(
        cell=cell,
        preset="",
        corpus="",
        tokenizer="",
        train_tokens=0,
        dtype=dtype,
        device=str(device),
        device_name=devices.describe(device),
        backend=backend,
    )
    record = provenance.run_record(config=config, provenance=origin, status="finished")
    identity = Identity(
        family=family,
        task=step,
        model=model,
        attention=method,
        options=options,
        params=params,
        train_len=rows[0].queries,
        eval_len=rows[0].keys,
        seed=0,
    )
    results = Results(results_dir)
    store.keep(results, family, Stored(cell, record, table.frame(identity, rows, origin)))
    table.assemble(results.table(family))
