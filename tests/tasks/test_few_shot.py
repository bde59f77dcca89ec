"""Few-shot: the grid, rows and stored answers of evaluations, which a killed run resumes."""

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from rich.console import Console

from sbeval.cli import main
from sbeval.errors import InputError
from sbeval.evaluation import lm_eval_tasks
from sbeval.evaluation.lm_eval_model import Adapter
from sbeval.models import config as model_config
from sbeval.models.decoder import Decoder
from sbeval.sweep import finished, scheduler
from sbeval.sweep.cell import cell_id
from sbeval.sweep.context import RunContext
from sbeval.tables import table, values
from sbeval.tables.results import Results
from sbeval.tasks import few_shot
from sbeval.tasks.few_shot import Cell, Config, Row, cells
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.stepper import Stepper

TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "hidden": 32, "tied": True}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")

    def write(stem: str, rows: list[dict[str, Any]]) -> None:
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "copa_val",
        [
            {"context": f"I saw {n} birds because", "choices": ["i looked up.", f"the {n} were red."], "gold": n % 2}
            for n in range(12)
        ],
    )
    write(
        "arc_easy_test",
        [
            {"question": f"What is {n}?", "choices": ["a", "number", "no", "thing"][: 3 + n % 2], "gold": 1}
            for n in range(40)
        ],
    )
    phenomena = [name.removeprefix("blimp_") for name in lm_eval_tasks._index(False) if name.startswith("blimp_")]
    write(
        "blimp",
        [
            {"uid": uid, "good": f"{uid} is good {n}", "bad": f"{uid} good is {n}"}
            for uid in phenomena
            for n in range(2)
        ],
    )
    write("lambada_openai_test", [{"context": f"He said {n} and", "target": f"{n}"} for n in range(6)])
    return folder


@pytest.fixture
def config(tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(model_config.SIZES, "tiny", TINY)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    folder = tmp_path / "texts"
    folder.mkdir()
    for role in ("train0", "test0"):
        (folder / f"{role}.txt").write_text(f"{role} says this and that. " * 9)
    return Config(
        attention=("rope",),
        size="tiny",
        train_len=8,
        eval_len=64,
        train_tokens=96,
        batch_tokens=16,
        corpus=str(folder),
        data_dir=str(items),
        tasks=("copa",),
        suites=(),
    )


def run(config: Config, results: Path, *, force: bool = False) -> list[Cell]:
    found = cells(config)
    context = RunContext(results_dir=results, device=CPU, force=force)
    assert scheduler.run(found, context, preset="quick", console=Console(file=io.StringIO()))
    return found


def save(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    decoder = Decoder(model_config.ModelConfig(vocab_size=257, attention="stick_breaking", **TINY))
    checkpoint.save(folder, decoder, State(finished=True), training={"length": 8})
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inputs went through a model, a number for each batch."""
    counts: list[int] = []
    forward = Adapter._forward

    def count(self: Adapter, rows: Any, wanted: Any) -> Any:
        counts.append(len(rows))
        return forward(self, rows, wanted)

    monkeypatch.setattr(Adapter, "_forward", count)
    return counts


# the grid


def test_every_model_is_asked_every_task(config: Config) -> None:
    wide = dataclasses.replace(config, attention=("rope", "alibi"), tasks=("mmlu:5", "copa"), suites=("quick",))
    found = cells(wide)
    assert [(cell.attention, cell.config.tasks) for cell in found] == [
        (method, (task,)) for method in ("rope", "alibi") for task in ("mmlu:5", "copa", "arc_easy", "wsc273")
    ]
    # a model is trained once
    assert found[0].needs == found[3].needs != found[4].needs and len(found[0].needs) == 1
    assert found[0].flops > 10 * found[1].flops and found[0].config.suites == ()
    assert found[0].title == "rope seed 0 mmlu:5" and len({cell_id(cell) for cell in found}) == len(found)


def test_what_else_is_asked_is_no_part_of_a_cells_name(config: Config) -> None:
    (alone,) = cells(config)
    last = cells(dataclasses.replace(config, tasks=("arc_easy", "copa")))[1]
    assert cell_id(alone) == cell_id(last)


def test_the_model_is_length_gens(config: Config, tmp_path: Path) -> None:
    (cell,) = run(config, tmp_path / "results")
    with scheduler.progress_of(RunContext(results_dir=tmp_path, device=CPU)) as progress:
        trained = cell.training_step.train(RunContext(results_dir=tmp_path / "results", device=CPU), progress)
    assert [path.name for path in (tmp_path / "results" / "checkpoints").iterdir()] == [trained.name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ("mmlu:x",)}, "a task is a name, or name:examples"),
        ({"tasks": ()}, "no benchmark to evaluate: give --task or --suite"),
        ({"suites": ("papers",)}, "unknown suite 'papers'; did you mean 'paper'"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"data_dir": "/nowhere/at/all"}, "--data-dir /nowhere/at/all is not a folder"),
    ],
)
def test_mistakes_are_errors(config: Config, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        cells(dataclasses.replace(config, **change))


def test_models_of_one_name_are_an_error(config: Config, tmp_path: Path) -> None:
    specs = [str(save(tmp_path / one / "model", seed)) for seed, one in enumerate("ab")]
    with pytest.raises(InputError, match="two models are called 'model', .* rename one"):
        cells(dataclasses.replace(config, models=tuple(specs)))
    assert len(cells(dataclasses.replace(config, models=(specs[0], specs[0])))) == 1


def test_presets_ask_what_they_say() -> None:
    assert {task for suite in few_shot.SUITES.values() for task in suite} >= {"blimp", "mmlu:5", "race", "gsm8k:5"}
    assert few_shot.PRESETS["h200"].suites == ("linguistic", "commonsense")
    assert all(cells(preset) for preset in few_shot.PRESETS.values())


# what comes of it


def test_rows_are_lm_evals(config: Config, tmp_path: Path) -> None:
    (cell,) = run(dataclasses.replace(config, tasks=("arc_easy:2",)), tmp_path / "results")
    rows = finished.results_of([cell], tmp_path / "results")
    assert set(rows["metric"]) == {"acc", "acc_norm", "gold_bits_per_byte"} and (rows["shots"] == 2).all()
    gold, rows = rows[rows["metric"] == "gold_bits_per_byte"], rows[rows["metric"] != "gold_bits_per_byte"]
    assert (gold["unit"] == "bits/byte").all() and (gold["n"] == 8).all()
    # 32 of 40 are set aside for examples; half of the rest have three choices
    assert (rows["n"] == 8).all() and rows["chance"].tolist() == pytest.approx([7 / 24] * 2)
    value = rows["value"].to_numpy(dtype=float)
    assert rows["stderr"].to_numpy(dtype=float) == pytest.approx((value * (1 - value) / 7) ** 0.5)
    same = rows[["task", "version", "items", "part", "eval_len"]].drop_duplicates()
    assert same.values.tolist() == [["arc_easy", 1.0, "files", "", 64]]
    # prompts with two examples exceed 64 bytes
    assert (rows["cut"] > 0).all()


def test_a_group_has_rows_of_its_parts(config: Config, tmp_path: Path) -> None:
    (cell,) = run(dataclasses.replace(config, tasks=("blimp",)), tmp_path / "results")
    rows = finished.results_of([cell], tmp_path / "results")
    gold, rows = rows[rows["metric"] == "gold_bits_per_byte"], rows[rows["metric"] != "gold_bits_per_byte"]
    assert len(gold) == 68 and gold["n"].max() == 134
    whole, parts = rows[rows["part"] == ""], rows[rows["part"] != ""]
    assert len(whole) == 1 and len(parts) == 67 and (rows["chance"] == 0.5).all() and (rows["metric"] == "acc").all()
    assert whole["value"].iloc[0] == pytest.approx(parts["value"].mean()) and whole["n"].iloc[0] == 134


def test_a_likelihood_has_perplexity_and_accuracy(config: Config, tmp_path: Path) -> None:
    (cell,) = run(dataclasses.replace(config, tasks=("lambada_openai",), limit=4), tmp_path / "results")
    rows = finished.results_of([cell], tmp_path / "results").set_index("metric")
    assert set(rows.index) == {"acc", "perplexity", "gold_bits_per_byte"} and (rows["n"] == 4).all()
    # a space and a digit each
    bits = math.log2(float(rows["value"]["perplexity"]))
    assert float(rows["value"]["gold_bits_per_byte"]) == pytest.approx(bits / 2, rel=1e-4)
    # guessing has no score there
    assert float(rows["stderr"]["perplexity"]) > 0 and (rows["chance"] == "").all()


def test_another_model_at_the_same_path_is_asked_again(config: Config, tmp_path: Path, asked: list[int]) -> None:
    folder = save(tmp_path / "model", 0)
    given = dataclasses.replace(config, models=(str(folder),))
    (cell,) = run(given, tmp_path / "results")
    first, count = finished.results_of([cell], tmp_path / "results"), sum(asked)
    assert (first["attention"] == "stick_breaking").all() and (first["model"] == "model").all() and count == 24
    run(given, tmp_path / "results")
    assert sum(asked) == count
    checkpoint.remove(folder)
    save(folder, 1)
    run(given, tmp_path / "results")
    assert sum(asked) == 2 * count and len(list((tmp_path / "results" / "answers").iterdir())) == 2


def test_other_items_are_asked(config: Config, items: Path, tmp_path: Path, asked: list[int]) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    lines = (items / "copa_val.jsonl").read_text().splitlines(keepends=True)
    (folder / "copa_val.jsonl").write_text("".join(lines[:10]))
    given = dataclasses.replace(config, data_dir=str(folder))
    (cell,) = run(given, tmp_path / "results")
    assert sum(asked) == 20 and (finished.results_of([cell], tmp_path / "results")["n"] == 10).all()
    lm_eval_tasks.load.cache_clear()
    (folder / "copa_val.jsonl").write_text("".join(lines))
    run(given, tmp_path / "results")
    # those that were answered are not asked again
    assert sum(asked) == 24 and (finished.results_of([cell], tmp_path / "results")["n"] == 12).all()


def test_other_examples_in_prompts_are_other_items(
    config: Config, items: Path, tmp_path: Path, asked: list[int]
) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    text = (items / "arc_easy_test.jsonl").read_text()
    (folder / "arc_easy_test.jsonl").write_text(text)
    given = dataclasses.replace(config, data_dir=str(folder), tasks=("arc_easy:2",), eval_len=512)
    run(given, tmp_path / "results")
    count = sum(asked)
    lm_eval_tasks.load.cache_clear()
    lines = text.splitlines(keepends=True)
    # those that are set aside for examples
    (folder / "arc_easy_test.jsonl").write_text("".join(line.replace("What", "Which") for line in lines[:32]))
    with (folder / "arc_easy_test.jsonl").open("a") as file:
        file.writelines(lines[32:])
    run(given, tmp_path / "results")
    assert sum(asked) == 2 * count


def test_items_that_are_missing_are_said_before_any_is_asked(config: Config, tmp_path: Path, asked: list[int]) -> None:
    given = dataclasses.replace(config, models=(str(save(tmp_path / "model", 0)),), tasks=("copa", "race"))
    with pytest.raises(InputError, match="race"):
        run(given, tmp_path / "results")
    assert not asked


def test_a_given_model_may_read_less_than_others_are_trained_on(config: Config) -> None:
    with pytest.raises(InputError, match="--eval-len 4 is shorter than --train-len 8"):
        dataclasses.replace(config, eval_len=4)
    assert dataclasses.replace(config, eval_len=4, models=("some/model",)).eval_len == 4


def test_force_asks_again(config: Config, tmp_path: Path, asked: list[int]) -> None:
    given = dataclasses.replace(config, models=(str(save(tmp_path / "model", 0)),), tasks=("copa", "arc_easy"), limit=3)
    run(given, tmp_path / "results")
    count = sum(asked)
    run(given, tmp_path / "results", force=True)
    assert sum(asked) == 2 * count > 0


def test_a_tokenizer_of_another_model_is_an_error(config: Config, tmp_path: Path) -> None:
    given = dataclasses.replace(config, models=(str(save(tmp_path / "model", 0)),), tokenizer="bpe:260")
    with pytest.raises(InputError, match=r"'bpe:260' has 260 tokens and the model of .* 257: give the --tokenizer"):
        run(given, tmp_path / "results")


def test_a_tokenizer_of_a_smaller_vocabulary_is_an_error_too(config: Config, tmp_path: Path) -> None:
    trained = dataclasses.replace(config, tokenizer="bpe:270")
    run(trained, tmp_path / "results")
    (folder,) = (tmp_path / "results" / "checkpoints").iterdir()
    given = dataclasses.replace(trained, models=(str(folder),))
    with pytest.raises(InputError, match="was trained with another tokenizer than 'bytes': give the --tokenizer"):
        run(dataclasses.replace(given, tokenizer="bytes"), tmp_path / "results")
    run(given, tmp_path / "results")


def test_evaluation_alone_changes_the_model(config: Config, tmp_path: Path) -> None:
    specs = ("rope", "rope:scaling=linear,factor=4.0,train_len=8")
    found = run(dataclasses.replace(config, attention=specs), tmp_path / "results")
    assert len(list((tmp_path / "results" / "checkpoints").iterdir())) == 1
    # neither has answered for the other
    assert len(list((tmp_path / "results" / "answers").iterdir())) == 2
    assert set(finished.results_of(found, tmp_path / "results")["options"]) == {"", specs[1].partition(":")[2]}


# the command line


def said(*arguments: object) -> tuple[int | str | None, str]:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["sbeval", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            main.main()
    return ended.value.code, out.getvalue()


@pytest.fixture
def command(items: Path, tmp_path: Path) -> Iterator[list[object]]:
    folder = save(tmp_path / "model", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield [
            "few-shot",
            "--device",
            "cpu",
            "--model",
            folder,
            "--tokenizer",
            "bytes",
            "--data-dir",
            items,
            "--train-len",
            8,
            "--eval-len",
            64,
            "--results-dir",
            tmp_path / "results",
        ]


def test_a_command_leaves_table_and_figure(command: list[object], tmp_path: Path) -> None:
    code, out = said(*command, "--task", "copa", "--task", "arc_easy:0")
    assert code == 0 and "copa (0) acc" in out and "chance" in out
    assert (tmp_path / "results" / "figures" / "few_shot.png").stat().st_size > 0
    rows = table.read(tmp_path / "results" / "few_shot.csv", table.columns(Row))
    # the preset's limit
    assert set(rows["task"]) == {"copa", "arc_easy"} and rows["n"].max() == 20
    items = values.read(Results(tmp_path / "results"), rows["cell"])
    for row in rows.itertuples():
        of_cell = items[items["cell"] == row.cell]
        if row.metric == "gold_bits_per_byte":
            nats, size = (of_cell[of_cell["metric"] == name]["value"] for name in ("log_probability", "answer_bytes"))
            assert -nats.sum() / math.log(2) / size.sum() == pytest.approx(row.value)
            assert len(nats) == len(size) == row.n
            continue
        mine = of_cell[of_cell["metric"] == row.metric]
        assert mine["value"].mean() == pytest.approx(row.value) and mine["unit_id"].nunique() == row.n == len(mine)
    right = items[items["metric"] == "log_probability"]
    assert len(right) == rows.loc[rows["metric"] == "acc", "n"].sum() and (right["value"] < 0).all()
    code, out = said("table", "few-shot", "--format", "markdown", "--results-dir", tmp_path / "results")
    assert code == 0 and "| model stick_breaking |" in out and "| chance | 29.2 | 50.0 |" in out


def test_a_model_of_others_is_asked_what_the_paper_asks(tmp_path: Path) -> None:
    given = ["few-shot", "--device", "cpu", "--model", "some/model", "--results-dir", tmp_path, "--dry-run"]
    code, out = said(*given)
    assert code == 0 and "gsm8k-5" in out and "12 cells to run, at a cost that is not known yet" in out
    code, out = said(*given, "--preset", "quick")
    assert code == 0 and "3 cells to run" in out


@pytest.mark.slow
def test_a_killed_run_goes_on_request_by_request(command: list[object], tmp_path: Path, asked: list[int]) -> None:
    """One row a batch and a pause after each: killed in the middle, and what was answered is there."""
    slow = (
        "import sys, time\n"
        "from sbeval.cli import main as cli\n"
        "from sbeval.evaluation import lm_eval_model as lm\n"
        "from sbeval.tasks import few_shot\n"
        "few_shot.BATCH_TOKENS['cpu'] = 1\n"
        "keep = lm.Answers.keep\n"
        "def kept(self, answers): keep(self, answers); time.sleep(0.3)\n"
        "lm.Answers.keep = kept; sys.argv[0] = 'sbeval'; cli.main()"
    )
    whole = [*map(str, command), "--task", "copa"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *whole], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    folder = tmp_path / "results" / "answers"
    deadline = time.monotonic() + 60
    while _answers(folder) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = _answers(folder)
    assert 3 <= before < 24 and not (tmp_path / "results" / "few_shot.csv").exists()
    code, _ = said(*command, "--task", "copa")
    assert code == 0 and sum(asked) == 24 - before
    assert sorted(table.read(tmp_path / "results" / "few_shot.csv")["metric"]) == ["acc", "gold_bits_per_byte"]


def _answers(folder: Path) -> int:
    """How many answers are on disk, 0 while there is no file."""
    for path in folder.glob("*.sqlite"):
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(path)) as file:
            return int(file.execute("SELECT count(*) FROM responses").fetchone()[0])
    return 0


def test_rows_say_how_their_model_was_trained(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(config.corpus) / "valid.txt").write_text("valid says this and that. " * 9)
    losses = [3.0, 2.0]
    monkeypatch.setattr(Stepper, "mean_loss", lambda self, batch: losses.pop() if losses else 2.5)
    run(dataclasses.replace(config, train_tokens=640), tmp_path / "results")
    rows = table.read(tmp_path / "results" / "few_shot.csv", table.columns(Row))
    assert set(rows["status"]) == {"overfit"} and (rows["train_tokens"] == 640).all()
    assert (rows["epochs"] - 640 / rows["unique_tokens"]).abs().max() < 1e-4
