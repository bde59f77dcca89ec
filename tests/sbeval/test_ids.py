"""Ids of committed cells: each run file's configuration, rebuilt, gives the name of that very file."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from sbeval import registry
from sbeval.sweep.cell import cell_id

RESULTS = Path(__file__).parents[2] / "results"
# families without committed results yet
NEW = ("diagnostics",)
RUNS = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("**/runs/*.json"))}


@pytest.mark.parametrize("family", registry.TASKS)
def test_committed_run_files_are_of_the_cells_that_their_configs_describe(family: str) -> None:
    runs = {path.stem: record["config"] for path, record in RUNS.items() if path.name.startswith(f"{family}-")}
    assert bool(runs) == (family not in NEW), "every other family has committed results"
    assert {name: _rebuilt(family, config) for name, config in runs.items()} == {name: name for name in runs}


def _rebuilt(family: str, recorded: dict[str, Any]) -> str:
    """Id of the cell with the options that a run file records; options that it predates are at their default."""
    module = importlib.import_module(registry.TASKS[family])
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded["config"].items()}
    assert recorded["family"] == family
    return cell_id(module.Cell(config=module.Config(**options)))
