"""docs/columns.md has every column of every table, and is what the code generates."""

from pathlib import Path

import pandas as pd
import pytest

from sbeval import registry
from sbeval.cli import columns as page
from sbeval.tables import columns
from sbeval.tables.table import columns as names_of

ROOT = Path(__file__).parents[3]
TABLES = sorted((ROOT / "results").rglob("*.csv"))


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "columns.md").read_text(encoding="utf-8")
    assert written == page.page(), "write it: python -m sbeval.cli.columns > docs/columns.md"


def test_every_family_and_benchmark_has_metrics() -> None:
    assert set(columns.METRICS) == set(columns.FACTORS) == set(registry.TASKS) | set(page.BENCHMARKS)


def test_every_column_is_described() -> None:
    for family, row, options in page.tables():
        for name in names_of(row):
            assert columns.COMMON.get(name) or page.describe(family, name, options)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_metric_of_a_committed_table_is_described(path: Path) -> None:
    metrics = set(pd.read_csv(path, usecols=["metric"])["metric"])
    unknown = metrics - set(columns.METRICS[path.stem])
    # lm-eval's tasks have metrics of their own
    assert not unknown or path.stem == "few_shot"
