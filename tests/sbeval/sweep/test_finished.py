"""Test which committed cells count as finished; those of a sweep are in test_scheduler."""

import dataclasses
from pathlib import Path

from sbeval.sweep import finished
from sbeval.sweep.cell import cell_id
from sbeval.tasks import length_gen

RESULTS = Path(__file__).parents[3] / "results"


def test_committed_results_are_those_of_the_presets() -> None:
    """With the README's command committed cells count as finished: no option behind them has changed its meaning."""
    scaled = [f"rope:scaling=ntk,factor={factor}" for factor in (2, 4, 8, 16)]
    lengths = dataclasses.replace(
        length_gen.PRESETS["figure5"],
        attention=("stick_breaking", "rope", "nope", "alibi", "forgetting", *scaled),
        documents=16,
        windows=1,
        window=(2048,),
        dtype="bfloat16",
        corpus="books",
    )
    cells = length_gen.cells(lengths)
    assert len(cells) == 18
    assert finished.unfinished(cells, RESULTS) == []
    assert all((RESULTS / "runs" / f"{cell_id(cell)}.json").is_file() for cell in cells)
