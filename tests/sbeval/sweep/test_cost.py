"""Test estimates of cost, and durations in words."""

from pathlib import Path

import pytest
import torch

from sbeval.sweep import cost, graph
from sbeval.sweep.context import RunContext
from sbeval.tasks import length_gen, mqrar


def test_cost_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e9)
    monkeypatch.setitem(cost.EFFICIENCY, "cpu", (0.25, 0.5))
    cells = length_gen.cells(length_gen.Config())
    context = RunContext(results_dir=Path("results"), device=torch.device("cpu"))
    said = cost.describe(cells, context)
    hours = sum(step.flops for step in graph.steps(cells)) / 0.5e9 / 3600
    assert said.startswith("2 cells to run, ") and f"roughly {hours:.1f} to {2 * hours:.1f} h on cpu" in said
    assert cost.describe([], context) == "nothing to run"


def test_a_cost_is_least_and_most() -> None:
    assert cost.total([(1, 2), (3, 5)]) == (4, 7)
    assert [cost.span(*each) for each in ((60, 600), (180, 600), (5, 5))] == [
        "60 s to 10 min",
        "3 to 10 min",
        "5 s",
    ]
    narrow = mqrar.cells(mqrar.PRESETS["quick"])[0]
    gpu, cpu = (cost.seconds([narrow], {"float32": 1e12}, torch.device(name))[0] for name in ("cuda", "cpu"))
    assert gpu[1] / gpu[0] == pytest.approx(25) and cpu[1] / cpu[0] == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (172799, "48.0 h"),
        (172800, "2 days"),
        (400 * 86400, "400 days"),
        (958866 * 86400, "2,627 years"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert cost.in_words(seconds) == words
