"""Fine-tuning on prompts: none is of the test, and it starts from the trained model."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sbeval.evaluation.ruler_prompts import Prompt, Writer
from sbeval.models import config as model_config
from sbeval.models.decoder import Decoder
from sbeval.sweep import finished, scheduler
from sbeval.sweep.context import RunContext
from sbeval.tasks.needle import Cell, Config, cells
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State

TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "hidden": 32, "tied": True}


CPU = torch.device("cpu")


def run(config: Config, results: Path, *, force: bool = False) -> list[Cell]:
    grid = cells(config)
    context = RunContext(results_dir=results, device=CPU, force=force)
    assert scheduler.run(grid, context, preset="quick", console=Console(file=io.StringIO()))
    return grid


def save(folder: Path, attention: str = "stick_breaking", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    decoder = Decoder(model_config.ModelConfig(vocab_size=257, attention=attention, **TINY))
    checkpoint.save(folder, decoder, State(finished=True), training={"length": 768})
    return folder


def test_fine_tuning_prompts_are_not_in_the_test(
    config: Config, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[bool, list[Prompt]] = {False: [], True: []}
    prompts = Writer.prompts

    def keep(self: Writer, *arguments: Any, use: str = "test", **others: Any) -> list[Prompt]:
        found = prompts(self, *arguments, use=use, **others)
        written[use == "train"] += found
        return found

    monkeypatch.setattr(Writer, "prompts", keep)
    given = dataclasses.replace(
        config,
        checkpoint=str(save(tmp_path / "model")),
        tasks=("niah_single_1", "niah_single_2"),
        lengths=(768,),
        finetune=768 * 12,
        batch_tokens=768 * 4,
    )
    found = run(given, tmp_path / "results")
    tests, lessons = ({item.tokens.tobytes() for item in written[kind]} for kind in (False, True))
    assert len(tests) == 10 and len(lessons) == 12 and not tests & lessons
    values = [{value for item in written[kind] for value in item.references} for kind in (False, True)]
    assert not values[0] & values[1]
    # both tasks are asked of one model that was trained on both
    assert len(list((tmp_path / "results" / "checkpoints").iterdir())) == 1 and sum(asked) == 10
    rows = finished.results_of(found, tmp_path / "results")
    assert (rows["finetune_tokens"] == 768 * 12).all() and (rows["train_len"] == 768).all()


def test_fine_tuning_starts_from_the_model_and_changes_it(config: Config, tmp_path: Path) -> None:
    # what was trained is whole steps
    given = dataclasses.replace(
        config,
        checkpoint=str(save(tmp_path / "model")),
        lengths=(768,),
        finetune=768 * 8 + 5,
        batch_tokens=768 * 4,
        finetune_lr=1e-12,
    )
    (still,) = run(given, tmp_path / "results")
    (tuned,) = run(dataclasses.replace(given, finetune_lr=1e-2), tmp_path / "results")
    (plain,) = run(dataclasses.replace(given, finetune=0), tmp_path / "results")
    found = [finished.results_of([cell], tmp_path / "results").set_index("metric") for cell in (plain, still, tuned)]
    first, same, other = (float(rows[rows["depth_start"].isna()]["value"]["log_probability"]) for rows in found)
    assert same == pytest.approx(first, rel=1e-4) and other > first + 1
    assert [set(rows["finetune_tokens"]) for rows in found] == [{0}, {768 * 8}, {768 * 8}]
