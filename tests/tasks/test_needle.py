"""Needles: the grid, rows and stored answers of evaluations, which an interrupted run resumes."""

import contextlib
import dataclasses
import io
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from rich.console import Console

from sbeval.cli import main
from sbeval.errors import InputError
from sbeval.evaluation import ruler_scores, ruler_tasks
from sbeval.evaluation.ruler_scores import Answered
from sbeval.models import config as model_config
from sbeval.models.decoder import Decoder
from sbeval.sweep import finished, scheduler
from sbeval.sweep.cell import cell_id
from sbeval.sweep.context import RunContext
from sbeval.tables import curves, table, values
from sbeval.tables.results import Results
from sbeval.tasks import length_gen, needle
from sbeval.tasks.needle import Cell, Config, Row, cells, measured
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.stepper import Stepper
from sbeval.training.text_model import TRAINING

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


# the grid


def test_every_model_is_asked_every_task_of_which_the_files_are_there(config: Config) -> None:
    wide = dataclasses.replace(config, attention=("rope", "alibi"), tasks=())
    found = cells(wide)
    names = [name for name in ruler_tasks.TASKS if name not in ("qa_1", "qa_2")]
    assert [(cell.attention, cell.task) for cell in found] == [
        (method, name) for method in ("rope", "alibi") for name in names
    ]
    # a model is trained once, by what trains length-gen's
    options = {name: getattr(wide, name) for name in TRAINING}
    lengths = length_gen.cells(length_gen.Config(**options, eval_len=4096))
    assert found[0].needs == found[1].needs == lengths[0].needs != found[-1].needs
    assert needle.FAMILY.notes(wide) == [
        "qa_1 is not run without its questions: give --squad PATH to SQuAD v2's dev-v2.0.json",
        "qa_2 is not run without its questions: give --hotpot PATH to HotpotQA's hotpot_dev_distractor_v1.json",
    ]
    with_file = dataclasses.replace(wide, squad="dev.json")
    assert (
        len(cells(with_file)) == 24 and len(needle.FAMILY.notes(with_file)) == 1 and needle.FAMILY.notes(config) == []
    )


def test_a_length_that_does_not_fit_is_said_before_training(config: Config, tmp_path: Path) -> None:
    for change in ({"tasks": ("cwe",)}, {"finetune": 9, "train_len": 256, "eval_len": 256, "batch_tokens": 256}):
        with pytest.raises(InputError, match="does not fit"):
            run(dataclasses.replace(config, **change), tmp_path / "results")
    assert not list((tmp_path / "results" / "checkpoints").iterdir())


# what comes of it


def test_rows_are_by_length_and_depth(config: Config, tmp_path: Path) -> None:
    (cell,) = run(config, tmp_path / "results")
    rows = finished.results_of([cell], tmp_path / "results")
    whole, parts = rows[rows["depth_start"].isna()], rows[rows["depth_start"].notna()]
    assert sorted(whole["metric"]) == sorted(2 * ["filled", "greedy", "log_probability", "score"])
    assert set(whole["length"]) == {768, 1024} and (whole["n"] == 5).all() and (whole["eval_len"] == 1024).all()
    assert (whole[whole["metric"] == "filled"]["value"].astype(float) > 0.95).all()
    assert (whole[whole["metric"] == "log_probability"]["value"].astype(float) < -20).all()
    assert (parts["depth_end"] - parts["depth_start"] == 10).all()
    assert parts[parts["metric"] == "score"].groupby("length")["n"].sum().tolist() == [5, 5]


def test_means_are_those_of_the_samples() -> None:
    answers = [
        Answered(index=n, depth=depth, tokens=90, score=n / 4, log_probability=-float(n), greedy=n == 3, completion="")
        for n, depth in enumerate((0, 9.99, 100, None))
    ]
    found = {(row.metric, row.depth_start): row for row in measured(answers, 100, 10, {"finetune_tokens": 7})}
    assert found["score", None].value == pytest.approx(0.375) and found["score", None].n == 4
    assert found["log_probability", 0].value == pytest.approx(-0.5) and found["greedy", None].value == 0.25
    last = found["score", 90]
    assert (last.value, last.n, last.depth_end, last.finetune_tokens) == (0.5, 1, 100, 7)
    assert found["filled", None].value == 1 and len(found) == 4 + 2 * 3


@pytest.mark.parametrize("attention", ["rope", "stick_breaking", "forgetting"])
def test_answers_do_not_depend_on_the_batch(
    attention: str, config: Config, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dataclasses.replace(config, checkpoint=str(save(tmp_path / "model", attention)), lengths=(768,), samples=8)
    results: list[list[Answered]] = []
    evaluate = ruler_scores.evaluate

    def keep(*arguments: Any, **options: Any) -> list[Answered]:
        results.append(evaluate(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(ruler_scores, "evaluate", keep)
    for batch in (1, 8):
        asked.clear()
        monkeypatch.setitem(needle.BATCH_TOKENS, "cpu", batch * 768)
        run(given, tmp_path / f"results{batch}")
        assert asked == [batch] * (8 // batch)
    assert len(results[0]) == 8 and len({item.tokens for item in results[0]}) > 1
    for one, other in zip(*results, strict=True):
        assert other.log_probability == pytest.approx(one.log_probability, rel=1e-5)
        assert dataclasses.replace(other, log_probability=0.0) == dataclasses.replace(one, log_probability=0.0)


def test_a_run_that_was_stopped_goes_on_sample_by_sample(
    config: Config, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(needle.BATCH_TOKENS, "cpu", 1024)
    given = dataclasses.replace(config, checkpoint=str(save(tmp_path / "model")), lengths=(1024,))
    run(given, tmp_path / "whole")
    assert asked == [1] * 5
    asked.clear()
    completions, batches = ruler_scores.completions, list[int]()

    def stopped(*arguments: Any) -> list[list[int]]:
        batches.append(1)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return completions(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ruler_scores, "completions", stopped)
        run(given, tmp_path / "results")
    assert asked == [1, 1] and not (tmp_path / "results" / "needle.csv").exists()
    (cell,) = run(given, tmp_path / "results")
    assert asked == [1] * 5
    one, other = (finished.results_of([cell], tmp_path / name).drop(columns="utc") for name in ("whole", "results"))
    assert one.equals(other)
    # more samples are asked for the rest alone
    run(dataclasses.replace(given, samples=6), tmp_path / "results")
    assert asked == [1] * 6
    run(given, tmp_path / "results", force=True)
    assert asked == [1] * 11


def test_a_digit_that_changed_in_a_stored_answer_changes_no_result(
    config: Config, tmp_path: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = dataclasses.replace(config, checkpoint=str(save(tmp_path / "model")), lengths=(768,))
    (cell,) = run(given, tmp_path / "results")
    before = finished.results_of([cell], tmp_path / "results").drop(columns="utc")
    (path,) = (tmp_path / "results" / "answers").iterdir()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        (answer,) = file.execute("SELECT answer FROM responses LIMIT 1").fetchone()
        file.execute("UPDATE responses SET answer = ? WHERE answer = ?", (answer.replace(b"[-", b"[-1"), answer))
    (tmp_path / "results" / "needle.csv").unlink()
    run(given, tmp_path / "results")
    assert sum(asked) == 5 + 1
    assert f"{path.name}: 1 of 5 stored responses are not as they were written" in capsys.readouterr().err
    assert finished.results_of([cell], tmp_path / "results").drop(columns="utc").equals(before)


def test_another_model_at_the_same_path_is_asked_again(config: Config, tmp_path: Path, asked: list[int]) -> None:
    folder = save(tmp_path / "model")
    given = dataclasses.replace(config, checkpoint=str(folder), lengths=(768,))
    run(given, tmp_path / "results")
    run(given, tmp_path / "results")
    assert sum(asked) == 5
    checkpoint.remove(folder)
    save(folder, seed=1)
    run(given, tmp_path / "results")
    assert sum(asked) == 10


def test_a_given_model_with_another_tokenizer_is_another(config: Config, tmp_path: Path) -> None:
    given = dataclasses.replace(config, checkpoint=str(save(tmp_path / "model")))
    with scheduler.progress_of(RunContext(results_dir=tmp_path, device=CPU)) as progress:
        bytes_, bpe = (
            cells(dataclasses.replace(given, tokenizer=name))[0].source(progress) for name in ("bytes", "bpe:260")
        )
    assert bytes_ != bpe


def test_a_tokenizer_of_another_model_is_an_error(config: Config, tmp_path: Path) -> None:
    given = dataclasses.replace(config, checkpoint=str(save(tmp_path / "model")), tokenizer="bpe:260", lengths=(2048,))
    with pytest.raises(InputError, match=r"'bpe:260' has 260 tokens and the model of .* 257: give the --tokenizer"):
        run(given, tmp_path / "results")


def test_lengths_past_a_table_of_positions_are_an_error(config: Config, tmp_path: Path, asked: list[int]) -> None:
    decoder = Decoder(model_config.ModelConfig(vocab_size=257, attention="nope", positions=800, **TINY))
    checkpoint.save(tmp_path / "model", decoder, State(finished=True), training={"length": 768})
    with pytest.raises(InputError, match="has a table of 800 positions and can't read 1024 tokens: give 800 or less"):
        run(dataclasses.replace(config, checkpoint=str(tmp_path / "model")), tmp_path / "results")
    assert not asked, "shorter prompts too"


# the command line


def said(*arguments: object) -> tuple[int | str | None, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main.main()
    return ended.value.code, out.getvalue(), error.getvalue()


@pytest.fixture
def command(config: Config, tmp_path: Path) -> Iterator[list[object]]:
    yield [
        "needle",
        "--device",
        "cpu",
        "--model",
        save(tmp_path / "model"),
        "--tokenizer",
        "bytes",
        "--finetune",
        0,
        "--samples",
        2,
        "--length",
        1024,
        "--essays",
        config.essays,
        "--results-dir",
        tmp_path / "results",
    ]


def test_a_command_leaves_table_and_figures(command: list[object], tmp_path: Path) -> None:
    code, out, _ = said(*command, "--task", "niah_single_1", "--task", "niah_multiquery")
    assert code == 0 and "niah_single_1" in out and "mean" in out and "is not run" not in out
    for name in ("needle.png", "needle_depth.png"):
        assert (tmp_path / "results" / "figures" / name).stat().st_size > 0
    rows = table.read(tmp_path / "results" / "needle.csv", table.columns(Row))
    assert set(rows["task"]) == {"niah_single_1", "niah_multiquery"} and rows["n"].max() == 2
    found = values.read(Results(tmp_path / "results"), rows["cell"]).merge(rows[["cell", "task"]].drop_duplicates())
    for row in rows[(rows["metric"] != "filled")].itertuples():
        mine = found[(found["task"] == row.task) & (found["metric"] == row.metric) & (found["length"] == row.length)]
        if pd.notna(cast(Any, row.depth_start)):
            mine = mine[(mine["depth"] >= row.depth_start) & (mine["depth"] < row.depth_end)]
        assert mine["value"].mean() == pytest.approx(row.value, abs=1e-4) and mine["unit_id"].nunique() == row.n
    # four needles have no one depth
    assert rows[rows["task"] == "niah_multiquery"]["depth_start"].isna().all()


def test_help_says_which_tasks_a_preset_asks() -> None:
    code, out, _ = said("needle", "--help")
    words = " ".join(word for word in out.split() if word != "│")
    assert code == 0 and "Default: all whose files are given. Repeat for several. [quick: niah_single_1]" in words
    assert {name: preset.tasks for name, preset in needle.PRESETS.items() if preset.tasks} == {
        "quick": ("niah_single_1",)
    }
    assert len(ruler_tasks.TASKS) == 13


def test_questions_that_are_missing_are_one_line(command: list[object]) -> None:
    code, _, error = said(*command, "--task", "qa_1")
    assert code == 2 and error.count("\n") == 1 and "give --squad PATH to SQuAD v2's dev-v2.0.json" in error
    code, _, error = said(*command, "--task", "qa_2", "--hotpot", "nowhere.json")
    assert code == 2 and error == "sbeval: cannot read nowhere.json: No such file or directory\n"


def test_rows_say_how_their_model_was_trained(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(config.corpus) / "valid.txt").write_text("valid says this and that. " * 9)
    losses = [3.0, 2.0]
    monkeypatch.setattr(Stepper, "mean_loss", lambda self, batch: losses.pop() if losses else 2.5)
    (cell,) = run(dataclasses.replace(config, train_tokens=640, lengths=(768,)), tmp_path / "results")
    rows = table.read(tmp_path / "results" / "needle.csv", table.columns(Row))
    assert set(rows["status"]) == {"overfit"} and (rows["train_tokens"] == 640).all()
    assert (rows["epochs"] - 640 / rows["unique_tokens"]).abs().max() < 1e-4
    record = json.loads((tmp_path / "results" / "runs" / f"{cell_id(cell)}.json").read_text())
    assert record["measured"]["ended_by"] == "train_tokens"
    held_out = curves.read(Results(tmp_path / "results"), [cell_id(cell)])
    assert set(held_out["metric"]) == {"held_out_loss"} and held_out["value"].tolist()[0] == 2.0
    assert "above its lowest): rope." in str(needle.FAMILY.summary(rows).caption)
