"""The task against its rules, written a second time as one pass from the left."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from sbeval.data.recall import Recall
from sbeval.models.decoder import Decoder
from sbeval.runtime.progress import Progress
from sbeval.sweep import finished, scheduler
from sbeval.sweep.cell import cell_id
from sbeval.sweep.context import RunContext
from sbeval.sweep.family import Say, unsaid
from sbeval.tables import table
from sbeval.tables.mqrar import LEGEND
from sbeval.tasks import mqrar, recall_data
from sbeval.tasks.recall_data import generate
from sbeval.tasks.synthetic import TEST_SEED, VALIDATION_SEED


def batches_of(cell: mqrar.Cell) -> recall_data.Batches:
    config = cell.config
    return recall_data.Batches(cell.task, config.seeds[0], config.batch, config.stored_rows, torch.device("cpu"))


def test_training_never_draws_the_same_batch_twice() -> None:
    cell = mqrar.cells(mqrar.PRESETS["quick"])[0]
    fresh = batches_of(cell)
    assert torch.equal(fresh[5].tokens, fresh[5].tokens)
    assert not torch.equal(fresh[5].tokens, fresh[6].tokens)
    # several steps are drawn together
    again = batches_of(cell)
    for step in (40, 3, 17, 16, 5):
        drawn = generate(cell.task, again.seed, again.rows(step))
        for name in ("tokens", "targets", "stale", "distance"):
            assert torch.equal(getattr(again[step], name), getattr(drawn, name)), (step, name)


def test_sweeps_over_pairs_share_compiled_code() -> None:
    cells = mqrar.cells(mqrar.PRESETS["h200"])
    capacities = {cell.task.kv_pairs: cell.training().capacity for cell in cells}
    assert all((capacities[pairs] or 0) >= Recall(vocab_size=1024, kv_pairs=pairs).scored(64) for pairs in capacities)
    assert len(set(capacities.values())) == 2


def test_training_validation_and_test_draw_apart() -> None:
    def batches(seed: int, attention: str) -> recall_data.Batches:
        (cell,) = mqrar.cells(mqrar.Config(attention=(attention,), seeds=(seed,)))
        return batches_of(cell)

    task = batches(0, "rope").task
    held_out = [recall_data.held_out(task, seed, 64, torch.device("cpu")) for seed in (TEST_SEED, VALIDATION_SEED)]
    apart = [batches(0, "rope")[0], batches(1, "rope")[0], *held_out]
    for one, other in itertools.combinations(apart, 2):
        assert one.tokens.shape == other.tokens.shape and not torch.equal(one.tokens, other.tokens)
    # all methods learn from the same examples
    assert torch.equal(batches(0, "alibi")[0].tokens, apart[0].tokens)


def test_a_batch_without_labels_teaches_nothing(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_pairs": (2,), "widths": (16,), "vocab_size": 64, "seq_len": 8, "test_rows": 200}
    (cell,) = mqrar.cells(mqrar.Config(attention=("rope",), n_back=(3,), batch=1, steps=3, **sizes))
    with Progress() as progress:
        outcome = cell.run(RunContext(results_dir=tmp_path, device=torch.device("cpu")), progress)
    assert outcome.curves["loss"] == [(1, 0.0), (2, 0.0), (3, 0.0)]


def test_training_ends_when_validation_says_so(tmp_path: Path) -> None:
    config = mqrar.Config(
        attention=("rope",),
        kv_pairs=(2,),
        widths=(16,),
        vocab_size=32,
        seq_len=16,
        batch=2,
        steps=9,
        check_every=3,
        test_rows=12,
        stop_accuracy=0.0,
    )
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    with Progress() as progress:
        stopped, never = (
            mqrar.cells(dataclasses.replace(config, stop_accuracy=accuracy))[0].run(context, progress)
            for accuracy in (0.0, 2.0)
        )
    assert (stopped.train_tokens, never.train_tokens) == (3 * 2 * 16, 9 * 2 * 16)
    assert stopped.curves["loss"] == never.curves["loss"][:3]
    ends = [row.status for outcome in (stopped, never) for row in outcome.rows if isinstance(row, mqrar.Row)]
    assert {end for end in ends if end} == {"solved", "budget"}
    found = {(row.metric, row.split): row for row in stopped.rows if isinstance(row, mqrar.Row)}
    assert (found["accuracy", "all"].n, found["validation_accuracy", "all"].n) == (12, 4)


def test_the_optimizer_makes_another_cell_and_its_rows_say_so(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_pairs": (2,), "widths": (16,), "vocab_size": 32, "seq_len": 16, "test_rows": 12}
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    losses = {}
    for optimizer in ("adamw", "muon"):
        (cell,) = mqrar.cells(
            mqrar.Config(attention=("rope",), batch=2, steps=3, optimizer=optimizer, init_std=0.5, **sizes)
        )
        with Progress() as progress:
            outcome = cell.run(context, progress)
        assert {row.optimizer for row in outcome.rows if isinstance(row, mqrar.Row)} == {optimizer}
        losses[cell_id(cell)] = [loss for _, loss in outcome.curves["loss"]]
    # the first loss is before any update
    adamw, muon = (np.asarray(found) for found in losses.values())
    assert adamw[0] == muon[0] and (adamw[1:] != muon[1:]).all()


def test_options_of_the_block_reach_recall(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_pairs": (2,), "widths": (16,), "vocab_size": 32, "seq_len": 16, "test_rows": 12}
    specs = ("rope:qkv_bias=true", "stick_breaking:head_norm=true,init_std=0.02", "rope")
    grid = mqrar.cells(mqrar.Config(attention=specs, batch=2, steps=3, init_std=0.5, heads=2, **sizes))
    shapes = [cell.model() for cell in grid]
    # the spec is before --init-std
    assert [(shape.qkv_bias, shape.head_norm, shape.init_std) for shape in shapes] == [
        (True, False, 0.5),
        (False, True, 0.02),
        (False, False, 0.5),
    ]
    with Progress() as progress:
        outcome = grid[0].run(RunContext(results_dir=tmp_path, device=torch.device("cpu")), progress)
    assert (outcome.identity.attention, outcome.identity.options) == ("rope", "qkv_bias=true")
    # two layers, and biases for the queries, keys and values of a width of 16
    assert outcome.identity.params == Decoder(shapes[2]).n_parameters() + 2 * 3 * 16


def test_grid_of_cells() -> None:
    config = mqrar.Config(
        attention=("rope", "rope:theta=10000", "stick_breaking:remainder=none"), seeds=(0, 1), kv_pairs=(4, 8)
    )
    cells = mqrar.cells(config)
    names = [spec for spec in ("rope", "stick_breaking:remainder=none,logit_scale=1.5") for _ in (4, 8)]
    assert [cell.attention for cell in cells] == names * 2
    assert len(cells) == len(set(cells)) == 8


def test_a_stored_set_is_seen_once_an_epoch_in_another_order() -> None:
    (cell,) = mqrar.cells(mqrar.Config(attention=("rope",), batch=4, stored_rows=10))
    batches = batches_of(cell)
    seen = torch.cat([batches.rows(step) for step in range(5)])
    first, second = seen[:10].tolist(), seen[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert torch.equal(batches[2].tokens, generate(cell.task, batches.seed, batches.rows(2)).tokens)


def test_how_training_stands() -> None:
    config = mqrar.Config(stop_accuracy=0.9, patience=300)

    def ends(*scores: float) -> str:
        return mqrar.status(config, [(100 * (i + 1), score) for i, score in enumerate(scores)])

    assert ends() == ends(0.0, 0.004) == ends(0.1, 0.1, 0.102) == "budget"
    assert ends(0.1, 0.95) == ends(0.9, 0.0, 0.0, 0.0, 0.9) == "solved"
    assert ends(0.1, 0.1, 0.1, 0.104) == ends(0.0, 0.0, 0.0) == "plateau"
    # progress in small steps counts once it adds up
    assert ends(0.1, 0.104, 0.107, 0.11) == "budget"
    assert mqrar.status(dataclasses.replace(config, patience=0), [(10**6, 0.1)]) == "budget"


def found(rate: float, validation: float, steps: int, test: float, seed: int = 0) -> list[dict[str, object]]:
    same = {
        "attention": "rope",
        "options": "",
        "seed": seed,
        "kv_pairs": 8,
        "width": 64,
        "n_back": 1,
        "lr": rate,
        "vocab_size": 128,
        "split": "all",
    }
    values = {"validation_accuracy": validation, "steps": steps, "accuracy": test}
    return [same | {"metric": metric, "value": value} for metric, value in values.items()]


def further(config: mqrar.Config, rows: list[dict[str, object]], say: Say = unsaid) -> list[tuple[str, float, int]]:
    cells = mqrar.more(config, pd.DataFrame(rows), say)
    return [(cell.attention, cell.config.lrs[0], cell.config.seeds[0]) for cell in cells]


def test_further_seeds_run_at_the_rate_that_validation_chooses() -> None:
    config = mqrar.Config(attention=("rope", "nope"), lrs=(1e-3, 2e-3, 3e-3), seeds=(0, 1, 2), stop_accuracy=0.7)
    first = mqrar.cells(config)
    assert {(cell.config.lrs[0], cell.config.seeds[0]) for cell in first} == {(rate, 0) for rate in config.lrs}
    # at most at every rate
    assert len(mqrar.more(config, None)) == 12
    # two solve it, and the faster tests worst; nope diverged everywhere and has no accuracy
    rows, lines = found(1e-3, 0.5, 100, 0.9) + found(2e-3, 0.7, 100, 0.1) + found(3e-3, 0.7, 200, 0.9), list[str]()
    assert further(config, rows, lines.append) == [("rope", 2e-3, 1), ("rope", 2e-3, 2)]
    line = "no learning rate has a result with seed 0; the other seeds are run once one has"
    assert lines == [f"mqrar nope 8 pairs width 64: {line}"]
    one_rate = dataclasses.replace(config, lrs=(1e-3,))
    assert len(mqrar.cells(one_rate)) == 6 and further(one_rate, rows) == []


def test_where_no_rate_solves_the_task_further_seeds_run_at_all() -> None:
    """The best of accuracies at chance is noise. The third rate diverged."""
    config = mqrar.Config(attention=("rope",), lrs=(1e-3, 2e-3, 3e-3), seeds=(0, 1), stop_accuracy=0.9)
    rows = found(1e-3, 0.11, 100, 0.1) + found(2e-3, 0.12, 100, 0.1)
    assert sorted(further(config, rows)) == [("rope", 1e-3, 1), ("rope", 2e-3, 1)]


def test_a_cell_that_diverges_has_a_row_that_says_so(tmp_path: Path) -> None:
    config = mqrar.Config(
        attention=("rope",),
        kv_pairs=(2,),
        widths=(16,),
        vocab_size=32,
        seq_len=16,
        batch=2,
        steps=20,
        lrs=(1e30,),
        test_rows=12,
    )
    (cell,) = mqrar.cells(config)
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    assert not scheduler.run([cell], context, preset="quick", console=Console(quiet=True))
    rows = table.read(tmp_path / "mqrar.csv")
    assert rows[["metric", "value", "status"]].to_numpy().tolist() == [["solved", 0.0, "diverged"]]
    assert "the loss is nan" in (tmp_path / "runs" / f"{cell_id(cell)}.json").read_text()
    assert mqrar.FAMILY.summary(rows).row_count == 1 and mqrar.FAMILY.summary(rows).caption == LEGEND
    # such a cell is tried again
    assert finished.unfinished([cell], tmp_path) == [cell]
