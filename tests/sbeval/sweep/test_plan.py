"""The plan of a study: its trainings, their cost, and their sum."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sbeval.cli import main
from sbeval.data import sources
from sbeval.models import decoder
from sbeval.sweep import cost, plan, study_file
from sbeval.sweep.context import RunContext
from sbeval.tasks import length_gen


def run(*arguments: object) -> tuple[Any, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", "run", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    return ended.value.code, out.getvalue(), err.getvalue()


def test_a_dry_run_says_the_plan_and_writes_nothing(study: Path, tmp_path: Path) -> None:
    code, out, err = run(study, "--set", "mqrar.preset=h200", "--device", "cpu", "--results-dir", tmp_path, "--dry-run")
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    rows = {cells[1].strip(): cells for line in out.splitlines() if len(cells := line.split("│")) > 3}
    # cells, then models; of the further seeds as many as there can be
    counts = {name: (cells[2].strip(), cells[4].strip()) for name, cells in rows.items()}
    assert counts == {
        "text": ("", ""),
        "training": ("", "2"),
        "length_gen": ("3", ""),
        "needle": ("2", ""),
        "flip_flop": ("2", "2"),
        "mqrar": ("360", "360"),
        "all": ("367", "364"),
    }
    assert "left out: attention_map, diagnostics, few_shot" in out


def test_names_are_whole_where_hours_are_many(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e7)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(study, "--set", "mqrar.preset=h200", "--device", "cpu", "--results-dir", tmp_path, "--dry-run")
    first = {cells[1].strip() for line in out.splitlines() if len(cells := line.split("│")) > 3}
    assert {"length_gen", "training", "mqrar"} <= first and "…" not in out


def test_a_plan_adds_up(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e9)
    monkeypatch.setitem(cost.EFFICIENCY, "cpu", (0.25, 0.5))
    parts = study_file.parts(study_file.read(str(study)), lambda said: "float32")
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    lines = {line.name: line for line in plan.lines(parts, context)}
    shape = length_gen.cells(parts[0].config)[0].model(257)
    weights = 2 * decoder.n_parameters(shape)
    assert lines["training"].disk == 4 * weights and lines["training"].models == 2
    for line in lines.values():
        assert line.hours == pytest.approx((line.flops / 0.5e9 / 3600, line.flops / 0.25e9 / 3600))
    # bytes are kept in two each
    files = sum(path.stat().st_size for path in (study.parent / "texts").iterdir())
    assert lines["text"].disk == 2 * files == 2 * sum(sources.size(str(study.parent / "texts")) or ())
    monkeypatch.setattr(plan, "likely_tokens", lambda *_, **__: None)
    assert {line.name: line for line in plan.lines(parts, context)}["text"].disk is None
    assert "unknown" in plan._words(plan._all(plan.lines(parts, context)))


def test_what_branches_share_keeps_its_optimizer(study: Path, tmp_path: Path) -> None:
    wsd = ("models.schedule=wsd", "models.batch_tokens=32", "models.train_len=16", "models.branches=[64, 128]")
    parts = study_file.parts(study_file.read(str(study), wsd), lambda said: "float32")
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"))
    lines = {line.name: line for line in plan.lines(parts, context)}
    shape = length_gen.cells(parts[0].config)[0].model(257)
    # of two methods or seeds, two decays each, and two trunks with two moments beside the weights
    assert lines["training"].models == 8
    assert lines["training"].disk == 4 * (4 + 3 * 4) * decoder.n_parameters(shape)
