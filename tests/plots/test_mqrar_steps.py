"""Steps until recall is solved: which cells are points, which hollow, and the power by which steps grow."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.errors import NothingToDraw
from sbeval.plots import mqrar_steps
from sbeval.tables.mqrar import ONE_SLOPE

SIZES = {
    "model": "2x256", "vocab_size": 1024, "seq_len": 768, "task": "mqrar", "width": 256, "layers": 2, "heads": 1,
    "train_len": 768, "eval_len": 768, "preset": "h200", "dtype": "bfloat16", "schedule": "constant", "patience": 0,
    "n_back": 1,
}  # fmt: skip


def cell(pairs: int, steps: int, *, method: str = "rope", solved: bool = True, **other: Any) -> dict[str, Any]:
    of = {"attention": method, "options": "", "seed": 0, "lr": 1e-3, "max_steps": 6000, "metric": "steps"}
    ended = {"value": steps, "status": "solved" if solved else "plateau"}
    return SIZES | of | ended | {"kv_pairs": pairs} | other


def drawn(*rows: dict[str, Any]) -> list[tuple[str, list[float], list[float], bool]]:
    """Label, x, y and whether hollow, of each line of the only panel."""
    (axis,) = mqrar_steps.draw(pd.DataFrame(rows)).axes
    return [
        (
            str(line.get_label()).lstrip("_"),
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
            line.get_markerfacecolor() == "none",
        )
        for line in axis.get_lines()
    ]


def test_a_point_is_the_mean_of_seeds_at_the_soonest_rate() -> None:
    rows = [cell(pairs, 100 * pairs + seed, seed=seed) for pairs in (32, 64) for seed in (0, 2)]
    # slower, and a rate that solves one seed of two
    rows += [cell(32, 5000, lr=3e-3), cell(64, 10, lr=1e-2), cell(64, 900, lr=1e-2, seed=2, solved=False)]
    assert drawn(*rows) == [("RoPE", [32, 64], [3201, 6401], False)]


def test_a_cell_that_is_not_solved_is_hollow_at_its_longest() -> None:
    rows = [cell(32, 1000), cell(64, 2000), cell(96, 3000, solved=False), cell(96, 6000, lr=2e-3, solved=False)]
    # of another budget at a constant rate: the same cell went on
    rows += [cell(96, 12000, lr=2e-3, solved=False, max_steps=12000)]
    rows += [cell(128, 900), cell(128, 6000, seed=1, solved=False)]
    line, hollow, partly = drawn(*rows)
    assert line == ("RoPE", [32, 64], [1000, 2000], False)
    assert hollow[1:] == ([96, 128], [12000, 6000], True) and partly[1:] == ([128], [900], False)


def test_budgets_are_settings_where_the_schedule_depends_on_them() -> None:
    rows = [cell(pairs, pairs, max_steps=steps, schedule="cosine") for pairs in (32, 64) for steps in (100, 200)]
    assert len(mqrar_steps.settings(pd.DataFrame(rows))) == 2
    constant = pd.DataFrame(rows).assign(schedule="constant")
    assert len(mqrar_steps.settings(constant)) == 1


def test_numbers_of_heads_are_settings_whatever_pairs_they_have() -> None:
    rows = [cell(32, 300, heads=8), cell(64, 600, heads=8), cell(128, 900), cell(192, 1200)]
    found = mqrar_steps.settings(pd.DataFrame(rows))
    assert [(title, part["kv_pairs"].tolist()) for title, part in found] == [
        ("2x256 model, vocabulary of 1024, sequences of 768 tokens, 1 head", [128, 192]),
        ("2x256 model, vocabulary of 1024, sequences of 768 tokens, 8 heads", [32, 64]),
    ]


def test_the_power_of_pairs_is_fitted_from_three_numbers_of_them() -> None:
    rows = [cell(pairs, round(10 * pairs**1.5)) for pairs in (16, 64, 256)]
    chart = mqrar_steps.chart(pd.DataFrame(rows))
    assert "Power of pairs by which steps grow: RoPE 1.50." in chart.note and ONE_SLOPE not in chart.note
    (panel,) = chart.groups[0].panels
    assert panel.rows()["steps until solved"].tolist() == [640, 5120, 40960]
    two = mqrar_steps.chart(pd.DataFrame([*rows[:2], cell(16, 9, method="alibi")])).note
    assert "Power" not in two and ONE_SLOPE in two


def test_a_method_that_solves_nothing_is_named() -> None:
    rows = [cell(32, 10), cell(64, 20), cell(32, 99, method="nope", solved=False)]
    chart = mqrar_steps.chart(pd.DataFrame(rows))
    assert "Not solved by all seeds at any number of pairs: NoPE." in chart.note
    assert [look.label for look in chart.groups[0].panels[0].looks()] == ["RoPE"]
    assert chart.groups[0].panels[0].words().startswith("steps until solved by key-value pairs. RoPE")


def test_nothing_is_drawn_of_one_number_of_pairs_or_other_ages() -> None:
    for rows in ([cell(32, 10), cell(64, 10, solved=False)], [cell(32, 10, n_back=2), cell(64, 10, n_back=2)]):
        assert not mqrar_steps.has_rows(pd.DataFrame(rows))
        with pytest.raises(NothingToDraw, match="no method solves two or more"):
            mqrar_steps.draw(pd.DataFrame(rows))
    assert not mqrar_steps.has_rows(pd.DataFrame([cell(32, 10)]).drop(columns="status"))
