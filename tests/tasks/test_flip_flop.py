"""The language against its rule, read from the left; chances, errors and what a cell leaves."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.sweep import scheduler
from sbeval.sweep.context import RunContext
from sbeval.tables import table, values
from sbeval.tables.results import Results
from sbeval.tables.selection import flip_flop_errors
from sbeval.tasks import flip_flop
from sbeval.tasks.flip_flop import Config

TINY = Config(
    attention=("rope", "stick_breaking"),
    seeds=(0,),
    lrs=(1e-3, 1e-2),
    seq_len=16,
    batch=4,
    steps=4,
    check_every=2,
    test_rows=30,
    width=8,
)


def test_when_training_ends() -> None:
    config = dataclasses.replace(TINY, stop_error=0.01, patience=200)
    assert flip_flop.status(config, []) == "budget"
    assert flip_flop.status(config, [(100, 0.5), (200, 0.01)]) == "solved"
    assert flip_flop.status(config, [(100, 0.3), (200, 0.4), (300, 0.3)]) == "plateau"
    assert flip_flop.status(config, [(100, 0.3), (200, 0.2), (300, 0.3)]) == "budget"
    assert flip_flop.status(TINY, [(100, 0.3), (9000, 0.3)]) == "budget"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    context = RunContext(results_dir=folder, device=torch.device("cpu"))
    assert scheduler.run(flip_flop.cells(TINY), context, preset="quick", console=Console(quiet=True))
    return folder


def test_cells_leave_rows(results: Path) -> None:
    rows = table.read(results / "flip_flop.csv", table.columns(flip_flop.Row))
    assert rows["cell"].nunique() == 4
    tests = rows[(rows["metric"] == "error_rate") & rows["distance_start"].isna()]
    assert {test: set(group["p_ignore"]) for test, group in tests.groupby("test")} == {
        "in_distribution": {0.8},
        "sparse": {0.98},
        "dense": {0.1},
        "validation": {0.8},
    }
    assert tests["value"].between(0, 1).all()
    assert set(rows.loc[rows["metric"] == "solved", "status"]) == {"budget"}
    found = values.read(Results(results), rows["cell"]).fillna({"distance_start": 0})
    counts = found.pivot(index=["cell", "test", "distance_start"], columns="metric", values="value")
    errors = rows[(rows["metric"] == "error_rate") & (rows["test"] != "validation")].fillna({"distance_start": 0})
    of = counts.loc[list(errors[["cell", "test", "distance_start"]].itertuples(index=False, name=None))]
    assert len(of) == len(counts) and of["reads"].tolist() == errors["reads"].tolist()
    assert (of["wrong"] / of["reads"]).tolist() == pytest.approx(errors["value"].tolist())


def test_the_summary_stands_beside_published_figures(results: Path) -> None:
    rows = table.read(results / "flip_flop.csv")
    console = Console(width=160)
    with console.capture() as shown:
        console.print(flip_flop.summary(rows))
    lines = shown.get().splitlines()
    ours = flip_flop_errors(rows)
    assert ours.groupby("attention")["lr"].nunique().to_dict() == {"rope": 1, "stick_breaking": 1}
    mine = next(line for line in lines if "rope" in line and "here" in line)
    wanted = ours[(ours["attention"] == "rope") & (ours["test"] == "sparse")]["value"].item()
    assert f"{100 * wanted:.3g}" in mine
    assert any("rope" in line and "published" in line and "40.3" in line for line in lines)
    assert any("path" in line and "0.0001" in line for line in lines)
    assert any("2505.16381" in line for line in lines)


def test_a_cell_that_diverges_is_in_the_table(tmp_path: Path) -> None:
    cell = flip_flop.cells(dataclasses.replace(TINY, lrs=(1e-3,)))[0]
    outcome = cell.failed("diverged", RunContext(results_dir=tmp_path, device=torch.device("cpu")))
    assert [(row.metric, row.value) for row in outcome.rows] == [("solved", 0.0)]
    assert outcome.identity.params > 0
    rows = pd.DataFrame([dataclasses.asdict(outcome.identity) | dataclasses.asdict(row) for row in outcome.rows])
    shown = list(flip_flop.summary(rows).columns[1].cells)
    assert shown[0] == "1 diverged" and set(shown[1:]) == {"published"}


def test_the_model_is_that_of_the_published_table() -> None:
    for name in ("small", "h200", "paper"):
        config = flip_flop.PRESETS[name]
        assert (config.seq_len, config.p_ignore, config.p_sparse, config.p_dense) == (512, 0.8, 0.98, 0.1)
        shape = flip_flop.cells(config)[0].model()
        assert (shape.layers, shape.heads, shape.width) == (1, 2, 64)
    assert len(flip_flop.cells(flip_flop.PRESETS["h200"])) == 5 * 3 * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seq_len": 15}, "seq_len"),
        ({"p_ignore": 1.5}, "p_ignore"),
        ({"batch": 0}, "batch"),
        ({"heads": 3}, "heads"),
        ({"patience": -1}, "patience"),
        ({"attention": ("ropee",)}, "did you mean 'rope'"),
    ],
)
def test_what_cannot_be_run_is_said(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        flip_flop.cells(dataclasses.replace(TINY, **change))  # type: ignore[arg-type]
