"""Diagnostics of a training: when they are taken, that they change nothing, and the rows that they become."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pandas as pd
import platformdirs
import pytest
import torch

from sbeval.errors import InputError
from sbeval.evaluation import diagnostics as readings
from sbeval.evaluation.diagnostics import Size
from sbeval.models import config as model_config
from sbeval.runtime.distributed import ALONE
from sbeval.runtime.progress import Progress
from sbeval.sweep.cell import Outcome, cell_id
from sbeval.sweep.context import RunContext
from sbeval.tasks import diagnostics, length_gen, text_training
from sbeval.tasks.diagnostics import Config, Row, cells
from sbeval.training import checkpoint
from sbeval.training.stepper import Stepper
from sbeval.training.trainer import Trainer

TINY = {"width": 16, "layers": 2, "heads": 2, "hidden": 32, "tied": True}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(model_config.SIZES, "tiny", TINY)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    # as if this training were long enough
    monkeypatch.setattr(readings, "plan", lambda shape, length, tokens, times: (times, Size(128, 8)))
    folder = tmp_path / "texts"
    folder.mkdir()
    generator = random.Random(0)
    for number in range(4):
        for role in ("train", "test", "valid"):
            (folder / f"{role}{number}.txt").write_text("".join(generator.choices("abcdefgh ", k=1400)))
    return Config(
        attention=("rope",),
        size="tiny",
        train_len=32,
        train_tokens=64 * 10,
        batch_tokens=64,
        corpus=str(folder),
        diagnostics=3,
        longest=256,
    )


@pytest.fixture
def progress() -> Iterator[Progress]:
    with Progress() as shown:
        yield shown


def run(config: Any, results: Path, progress: Progress, family: Any = diagnostics) -> Outcome:
    (cell,) = family.cells(config)
    outcome: Outcome = cell.run(RunContext(results_dir=results, device=torch.device("cpu")), progress)
    return outcome


def of(outcome: Outcome, metric: str, **factors: Any) -> list[Row]:
    found = [row for row in outcome.rows if isinstance(row, Row) and row.metric == metric]
    return [row for row in found if all(getattr(row, name) == value for name, value in factors.items())]


def test_a_training_is_diagnosed_at_even_times_and_at_its_end(
    config: Config, tmp_path: Path, progress: Progress
) -> None:
    outcome = run(config, tmp_path / "results", progress)
    # ten steps of 64 tokens, a diagnosis every four
    assert [row.tokens_seen for row in of(outcome, "copy_gain", distance=64)] == [256, 512, 640]
    # longer distances at the end alone
    gains = of(outcome, "passage_gain")
    assert [(row.tokens_seen, row.distance) for row in gains] == [(256, 128), (512, 128), (640, 128), (640, 256)]
    assert len(of(outcome, "in_context_score")) == 3 and outcome.measured["diagnosis_seconds"]
    assert outcome.train_tokens == 640 and outcome.identity.family == "diagnostics"


def test_heads_are_summed_up_over_training_and_listed_at_its_end(
    config: Config, tmp_path: Path, progress: Progress
) -> None:
    outcome = run(config, tmp_path / "results", progress)
    listed = of(outcome, "prefix_matching", heads="")
    assert [(row.tokens_seen, row.layer, row.head) for row in listed] == [
        (640, layer, head) for layer in (1, 2) for head in (1, 2)
    ]
    summed = {(row.tokens_seen, row.heads): row for row in of(outcome, "prefix_matching") if row.heads}
    assert list(summed) == [(seen, heads) for seen in (256, 512, 640) for heads in ("mean", "highest")]
    each = [row.value for row in listed]
    assert summed[640, "mean"].value == pytest.approx(sum(each) / 4) and summed[640, "highest"].value == max(each)
    # every head at every time is in the values
    values = outcome.values
    assert values is not None and list(values.columns[:3]) == ["metric", "unit_id", "value"]
    prefix = values[values["metric"] == "prefix_matching"]
    assert prefix.groupby("tokens_seen").size().to_dict() == {256: 4, 512: 4, 640: 4}
    assert set(prefix["unit_id"]) == {"1.1", "1.2", "2.1", "2.2"}


def test_readings_are_those_of_the_model(config: Config, tmp_path: Path, progress: Progress) -> None:
    outcome = run(config, tmp_path / "results", progress)
    (folder,) = (tmp_path / "results" / "checkpoints").glob("[!.]*")
    given = run(dataclasses.replace(config, checkpoint=str(folder)), tmp_path / "other", progress)
    # a checkpoint brings the diagnoses of its training
    unknown: dict[str, Any] = {"lr": None, "optimizer": "", "batch_tokens": None, "schedule": ""}
    assert (
        given.rows == [dataclasses.replace(cast(Any, row), **unknown) for row in outcome.rows]
        and given.train_tokens == 0
    )
    for state in checkpoint.load_state(folder).diagnoses[-1:]:
        assert state["step"] == 10
    # and without these the finished model is read
    plain = run(dataclasses.replace(config, diagnostics=0), tmp_path / "plain", progress)
    assert {row.tokens_seen for row in plain.rows} == {640}  # type: ignore[attr-defined]
    ours, theirs = (
        {(row.metric, row.distance, row.heads): row.value for row in one.rows if row.tokens_seen == 640}  # type: ignore[attr-defined]
        for one in (plain, outcome)
    )
    assert ours.keys() == theirs.keys()
    # the same weights, on more rows
    assert ours["passage_gain", 256, ""] == pytest.approx(theirs["passage_gain", 256, ""], abs=1e-6)


def test_diagnoses_change_no_training(config: Config, tmp_path: Path, progress: Progress) -> None:
    config = dataclasses.replace(config, attention=("forgetting",))
    with_them = run(config, tmp_path / "results", progress)
    without = run(dataclasses.replace(config, diagnostics=0), tmp_path / "results", progress)
    assert with_them.curves == without.curves and with_them.curves["loss"]
    # one that was trained without has nothing to show, so it is another training
    assert len(list((tmp_path / "results" / "checkpoints").glob("[!.]*"))) == 2
    assert of(with_them, "gate_half_life", heads="mean", tokens_seen=640)[0].value > 0


def test_length_gen_shares_the_training(
    config: Config, tmp_path: Path, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {name: getattr(config, name) for name in length_gen.Config.__dataclass_fields__ if hasattr(config, name)}
    run(length_gen.Config(**trained, eval_len=64), tmp_path / "results", progress, length_gen)
    monkeypatch.setattr(Stepper, "run", None)
    assert [row.tokens_seen for row in of(run(config, tmp_path / "results", progress), "copy_gain", distance=64)]


def test_ids_without_diagnostics_stay() -> None:
    ids = {cell_id(length_gen.cells(length_gen.Config(diagnostics=times))[0]) for times in (0, 0, 20)}
    assert len(ids) == 2 and cell_id(length_gen.cells(length_gen.Config())[0]) in ids


def test_an_interrupted_training_is_not_diagnosed_twice(
    config: Config, tmp_path: Path, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = text_training.train_config

    def saved_at_every_interval(*given: Any, **options: Any) -> Any:
        return dataclasses.replace(original(*given, **options), checkpoint_seconds=0.0)

    monkeypatch.setattr(text_training, "train_config", saved_at_every_interval)
    whole = run(config, tmp_path / "whole", progress)
    step = Stepper.run

    def interrupted(self: Stepper, batch: Any, number: int) -> Any:
        if number == 9:
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(Stepper, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "results", progress)
    monkeypatch.setattr(Stepper, "run", step)
    resumed = run(config, tmp_path / "results", progress)
    assert [row.tokens_seen for row in of(resumed, "copy_gain", distance=64)] == [256, 512, 640]
    assert resumed.rows == whole.rows


@pytest.mark.parametrize("wrong", [{"longest": 100}, {"longest": 10**6}, {"diagnostics": -1}])
def test_configs_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Config(**wrong)  # type: ignore[arg-type]  # each is of its field's type


def test_sharded_training_has_no_diagnostics(config: Config) -> None:
    (cell,) = cells(config)
    with pytest.raises(InputError, match="--diagnostics does not support --shard"):
        Trainer(
            cell.model(300),
            cell.training(),
            None,  # type: ignore[arg-type]  # not reached
            None,
            torch.device("cpu"),
            dataclasses.replace(ALONE, size=2),
            shard=True,
        )


def test_text_that_is_too_short_for_all_probes_of_text(config: Config, tmp_path: Path, progress: Progress) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    for name, count in ("train0.txt", 900), ("test0.txt", 100):
        (folder / name).write_text("some " * (count // 5))
    outcome = run(dataclasses.replace(config, corpus=str(folder)), tmp_path / "results", progress)
    # random tokens and reach are left
    assert {row.metric for row in outcome.rows} == {"copy_gain", "prefix_matching", "weight_beyond", "mean_distance"}


def test_the_terminals_table_has_gains_by_distance(config: Config, tmp_path: Path, progress: Progress) -> None:
    outcome = run(config, tmp_path / "results", progress)
    table = pd.DataFrame([dataclasses.asdict(row) for row in outcome.rows])
    shown = diagnostics.summary(table.assign(attention="rope", options="", seed=0, train_len=32))
    assert [str(column.header) for column in shown.columns] == ["attention", "copy of", "64", "128", "256"]
    assert shown.row_count == 2
