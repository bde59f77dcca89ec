"""The choice of a learning rate of fine-tuning; what a cell does with it is in test_needle_tuning."""

from pathlib import Path
from typing import Any

import pandas as pd

from sbeval.sweep import finished
from sbeval.sweep.cell import cell_id
from sbeval.tasks.needle import Config, cells, more
from sbeval.tasks.needle_choice import best, chosen_rates
from sbeval.tasks.needle_tuning import Tuned, Validation


def test_the_best_rate_solves_most_then_in_the_fewest_tokens() -> None:
    def tuned(lr: float, solved: dict[str, int], **held_out: float) -> Tuned:
        scores = {task: [Validation(1, 0.0, 64), Validation(2, score, 64)] for task, score in held_out.items()}
        same: dict[str, Any] = {"folder": Path(), "tasks": tuple(held_out), "tokens": 9, "copy_gain": 0.0}
        return Tuned(**same, lr=lr, scores=scores, solved_after=solved)

    none = tuned(1e-3, {}, a=0.9, b=0.9)
    one = tuned(2e-3, {"a": 5}, a=1.0, b=0.0)
    late, soon = tuned(3e-3, {"a": 7, "b": 8}, a=1.0, b=1.0), tuned(4e-3, {"a": 9, "b": 5}, a=1.0, b=1.0)
    assert best([none, one], 9) is one and best([one, late], 9) is late and best([late, soon], 9) is soon
    assert best([tuned(1e-3, {}, a=0.1), tuned(2e-3, {}, a=0.2)], 9).lr == 2e-3
    assert best([tuned(2e-3, {}, a=0.1), tuned(1e-3, {}, a=0.1)], 9).lr == 1e-3


def test_where_all_first_cells_failed_no_further_seeds_are_taught(tmp_path: Path) -> None:
    config = Config(
        finetune=1 << 20, finetune_lrs=(1e-3, 3e-3), seeds=(0, 1), attention=("rope",), tasks=("niah_single_2",)
    )
    results, lines = finished.results_of(cells(config), tmp_path), list[str]()
    assert results.empty and more(config, results, lines.append) == []
    line = "no learning rate has a result with seed 0; the other seeds are run once one has"
    assert lines == [f"needle rope: {line}"]


def test_scores_without_a_rate_leave_it_to_the_rows_of_fine_tuning() -> None:
    same = {"attention": "rope", "options": "", "seed": 0, "ended": "solved"}
    learned = [
        same | {"metric": "tokens_to_solve", "finetune_lr": rate, "chosen": chosen}
        for rate, chosen in ((1e-3, 0), (3e-3, 1))
    ]
    rows = pd.DataFrame([*learned, same | {"metric": "score"}])
    assert chosen_rates((1e-3, 3e-3), rows) == (3e-3,)
    # of an older version, which chose among no rates
    assert chosen_rates((1e-3, 3e-3), rows[rows["metric"] == "score"].assign(finetune_lr=None)) == (
        1e-3,
        3e-3,
    )


def test_where_no_rate_solved_a_task_those_that_did_not_diverge_are_taken() -> None:
    rates = {1e-3: "budget", 3e-3: "budget", 1.0: "diverged"}
    rows = [
        {"metric": "tokens_to_solve", "finetune_lr": rate, "chosen": int(rate == 1e-3), "ended": ended}
        for rate, ended in rates.items()
    ]
    assert chosen_rates(tuple(rates), pd.DataFrame(rows)) == (1e-3, 3e-3)


def test_each_branch_of_a_training_has_its_own_rate() -> None:
    config = Config(
        finetune=1 << 20, finetune_lrs=(1e-3, 3e-3), seeds=(0, 1), attention=("rope",), tasks=("niah_single_2",),
        schedule="wsd", branches=(1 << 16, 1 << 17),
    )  # fmt: skip
    rows = pd.DataFrame(
        {"cell": cell_id(cell), "metric": "tokens_to_solve", "ended": "solved", "finetune_lr": rate, "chosen": 1}
        for cell, rate in zip(cells(config), (1e-3, 3e-3), strict=True)
    )
    assert [(cell.seed, cell.config.finetune_lrs) for cell in more(config, rows)] == [(1, (1e-3,)), (1, (3e-3,))]
