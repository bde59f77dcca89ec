"""A small configuration of needle: a tiny model and short texts."""

import dataclasses
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from sbeval.evaluation import ruler_tasks
from sbeval.evaluation.response_cache import Answers
from sbeval.models import config as model_config
from sbeval.sweep import cost
from sbeval.tasks.needle import Config

TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "hidden": 32, "tied": True}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts that a model was asked, a number for each batch."""
    counts: list[int] = []
    keep = Answers.keep

    def count(self: Answers, answers: Any) -> None:
        counts.append(len(answers))
        keep(self, answers)

    monkeypatch.setattr(Answers, "keep", count)
    return counts


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(model_config.SIZES, "tiny", TINY)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    # which times the machine
    monkeypatch.setattr(cost, "describe", lambda *_: "")
    # answers are long, and what a model says has tests of its own
    monkeypatch.setattr(
        ruler_tasks,
        "TASKS",
        {name: dataclasses.replace(task, new_tokens=8) for name, task in ruler_tasks.TASKS.items()},
    )
    folder = tmp_path / "texts"
    folder.mkdir()
    for role in ("train0", "test0"):
        (folder / f"{role}.txt").write_text(f"{role} says this and that. " * 9)
    essay = tmp_path / "essay.txt"
    essay.write_text("This is a sentence. Here is another one! Is it? It is the end, my friend. " * 20)
    return Config(
        attention=("rope",),
        size="tiny",
        train_len=8,
        eval_len=8,
        train_tokens=96,
        batch_tokens=16,
        corpus=str(folder),
        essays=str(essay),
        tasks=("niah_single_2",),
        lengths=(768, 1024),
        samples=5,
    )
