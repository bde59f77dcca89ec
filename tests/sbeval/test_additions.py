"""A method, a task and a figure are added from outside the package, by a module and a line in the registry each."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from sbeval import registry
from sbeval.cli import main
from sbeval.kernels import softmax
from sbeval.models.config import parse_attention

ADDITIONS = Path(__file__).parent / "additions"
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ADDITIONS))
    monkeypatch.setitem(registry.ATTENTION, "toy", "toy_method")
    monkeypatch.setitem(registry.TASKS, "toy", "toy_task")
    monkeypatch.setitem(registry.FIGURES, "toy", "toy_figure")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
    out = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        main.main()
    assert not ended.value.code, out.getvalue()
    return out.getvalue()


def test_a_method_is_its_equation() -> None:
    module = __import__("toy_method")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    expected = module.reference(q, k, v, scale=0.5, temperature=2.0)
    torch.testing.assert_close(module.attention(q, k, v, scale=0.5, temperature=2.0), expected)
    torch.testing.assert_close(softmax.reference(q, k, v, scale=0.25), expected)
    name, options = parse_attention("toy:temperature=2")
    mixer = registry.method(name).Mixer(options, heads=2, kv_heads=2, head_dim=4, width=8, scale=0.5)
    torch.testing.assert_close(mixer(q, k, v, q.flatten(2)), expected)


def test_a_task_runs_with_a_method_and_leaves_rows_figures_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text('toy: {attention: ["toy:temperature=2", rope], seeds: [0, 1], steps: 3}')
    results = tmp_path / "results"
    assert "Toy accuracy" in run(monkeypatch, "run", study, "--device", "cpu", "--results-dir", results)
    table = pd.read_csv(results / "toy.csv", keep_default_na=False)
    assert set(zip(table["attention"], table["options"], table["seed"], strict=True)) == {
        (name, options, seed) for name, options in (("toy", "temperature=2.0"), ("rope", "")) for seed in (0, 1)
    }
    assert len(list((results / "runs").iterdir())) == 4 and (results / "figures" / "toy.png").exists()
    run(monkeypatch, "plot", "toy", "--format", "html", "--results-dir", results)
    assert "repeating the first token" in (results / "figures" / "toy.html").read_text()
    # finished cells are not run again
    before = (results / "toy.csv").read_bytes()
    run(monkeypatch, "run", study, "--device", "cpu", "--results-dir", results)
    assert (results / "toy.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["toy_method", "toy_task", "toy_figure"])
def test_contributing_says_how_many_lines_a_minimal_one_takes(name: str) -> None:
    lines = len((ADDITIONS / f"{name}.py").read_text().splitlines())
    stated = re.search(rf"{name}\.py`, (\d+) lines", CONTRIBUTING.read_text())
    assert stated and int(stated[1]) == lines
