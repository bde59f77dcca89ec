"""The table of the terminal: means over seeds by task and length, and a mean over tasks where there are several."""

from pathlib import Path

import pandas as pd

from sbeval.tables import needle, table

RESULTS = Path(__file__).parents[3] / "results" / "retrieval" / "needle.csv"


def row(task: str, length: int, metric: str, value: float, **changes: object) -> dict[str, object]:
    same = {"attention": "rope", "options": "", "seed": 0, "depth_start": None, "status": ""}
    return same | {"task": task, "length": length, "metric": metric, "value": value} | changes


def cells(rows: list[dict[str, object]]) -> list[list[str]]:
    grid = needle.summary(pd.DataFrame(rows))
    return [[str(column._cells[index]) for column in grid.columns] for index in range(grid.row_count)]


def test_scores_are_means_over_seeds_beside_greedy_accuracy() -> None:
    rows = [row("vt", 512, "score", 0.25), row("vt", 512, "score", 0.75, seed=1), row("vt", 512, "greedy", 0.5)]
    assert cells([*rows, row("vt", 512, "score", 0.0, depth_start=10)]) == [["rope", "vt", "0.50 (0.50)"]]


def test_several_tasks_have_a_mean() -> None:
    rows = [
        row(task, 512, metric, value) for task, value in (("cwe", 0.2), ("vt", 0.6)) for metric in ("score", "greedy")
    ]
    assert cells(rows)[-1] == ["rope", "mean", "0.40 (0.40)"] and len(cells(rows)) == 3
    other = [one | {"options": "theta=1"} for one in rows]
    assert [line[0] for line in cells([*rows, *other])] == ["rope"] * 3 + ["rope:theta=1"] * 3


def test_tasks_may_have_other_lengths() -> None:
    """As qa_2, which does not fit short ones."""
    at = (("vt", 512), ("vt", 4096), ("qa_2", 4096))
    rows = [row(task, length, metric, 0.5) for task, length in at for metric in ("score", "greedy")]
    assert cells(rows) == [
        ["rope", "qa_2", "", "0.50 (0.50)"],
        ["rope", "vt", "0.50 (0.50)", "0.50 (0.50)"],
        ["rope", "mean", "", "0.50 (0.50)"],
    ]


def test_how_a_task_was_learned_is_by_seed_at_the_chosen_rates() -> None:
    def learned(seed: int, lr: float, tokens: float, chosen: int, ended: str) -> dict[str, object]:
        changes = {"seed": seed, "finetune_lr": lr, "chosen": chosen, "ended": ended}
        return row("vt", 512, "tokens_to_solve", tokens, **changes)

    rows = [row("vt", 512, "score", 0.5), row("vt", 512, "greedy", 0.5)]
    rows += [learned(0, 1e-3, 12.34e6, 1, "solved"), learned(0, 3e-3, 20e6, 0, "solved")]
    assert cells(rows) == [["rope", "vt", "12.3 M", "0.001", "0.50 (0.50)"]]
    rows += [learned(1, 3e-3, 150e6, 1, "budget")]
    assert cells(rows) == [["rope", "vt", "12.3 M, > 150 M", "0.001, 0.003", "0.50 (0.50)"]]
    assert ">: they were not" in str(needle.summary(pd.DataFrame(rows)).caption)


def test_models_of_other_settings_have_lines_of_their_own() -> None:
    rows: list[dict[str, object]] = []
    for tokens, value in ((384, 0.25), (768, 0.75)):
        rows += [row("vt", 512, metric, value, train_tokens=tokens) for metric in ("score", "greedy")]
        learned = {"finetune_lr": 1e-3, "chosen": 1, "ended": "solved", "train_tokens": tokens}
        rows.append(row("vt", 512, "tokens_to_solve", 1e6 * value, **learned))
    assert cells(rows) == [
        ["rope", "384", "vt", "0.25 M", "0.001", "0.25 (0.25)"],
        ["rope", "768", "vt", "0.75 M", "0.001", "0.75 (0.75)"],
    ]


def test_published_results_have_a_table() -> None:
    rows = table.read(RESULTS)
    grid = needle.summary(rows)
    tasks = rows.groupby(["attention", "options"])["task"].nunique()
    # of several tasks there is a mean
    assert grid.row_count == tasks.sum() + (tasks > 1).sum() > 0
