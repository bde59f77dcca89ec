"""Test the order of a sweep, what is recorded of cells that fail, and which cells count as finished."""

import dataclasses
import io
import math
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.runtime.distributed import World
from sbeval.runtime.progress import Progress
from sbeval.sweep import cost, finished, scheduler, work
from sbeval.sweep.cell import Cell as BaseCell
from sbeval.sweep.cell import Outcome, cell_id
from sbeval.sweep.context import RunContext
from sbeval.sweep.executor import Executor
from sbeval.tables import provenance, store, table
from sbeval.tables.rows import Identity, Measurement
from sbeval.tasks import mqrar
from sbeval.training.trainer import DivergedError

ROOT = Path(__file__).parents[3]


def test_a_run_file_has_the_command_of_the_driver(tmp_path: Path) -> None:
    context = RunContext(results_dir=tmp_path, device=torch.device("cpu"), argv=("/bin/sbeval", "run", "quick"))
    with Progress(Console(quiet=True)) as progress:
        stored = work.run_cell(Cell(title="good", value=0.5), context, "quick", progress)
    assert stored.record["argv"] == ["sbeval", "run", "quick"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found(Measurement):
    size: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell(BaseCell):
    """A cell whose result is `value`; with None it diverges."""

    title: str
    value: float | None = 1.0
    text: str = ""
    family: str = "fake"
    dtype: str = "float32"
    flops: float = 1e6

    @property
    def row(self) -> type[Found]:
        return Found

    def source(self, progress: Progress) -> str:
        return self.text

    def run(self, context: RunContext, progress: Progress) -> Outcome:
        if self.value is None:
            raise DivergedError("the loss is nan at step 7")
        identity = Identity(
            family=self.family,
            task="t",
            model="m",
            attention=self.title,
            options="",
            params=1,
            train_len=1,
            eval_len=1,
            seed=0,
        )
        rows = [Found(metric="x", unit="1", value=self.value, n=1, size=3)]
        return Outcome(
            identity=identity,
            rows=rows,
            corpus="",
            corpus_digest=self.text,
            tokenizer="",
            train_tokens=0,
            backend="torch",
            tokens_per_s=None,
        )


def run(cells: list[Cell], results: Path, **options: Any) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    context = RunContext(results_dir=results, device=torch.device("cpu"), **options)
    complete = scheduler.run(cells, context, preset="quick", console=console)
    assert isinstance(console.file, io.StringIO)
    return complete, console.file.getvalue()


def status(cell: Cell, results: Path) -> tuple[str, str]:
    record = provenance.read_run(results / "runs" / f"{cell_id(cell)}.json")
    return record["status"], record["reason"]


def test_a_cell_that_diverges_is_recorded_and_leaves_no_row(tmp_path: Path) -> None:
    bad, worse, good = Cell(title="bad", value=None), Cell(title="worse", value=math.nan), Cell(title="good")
    complete, said = run([bad, worse, good], tmp_path)
    assert not complete and said.count("recorded as diverged, continuing with the next") == 2
    assert status(bad, tmp_path) == ("failed", "the loss is nan at step 7")
    assert status(worse, tmp_path) == ("failed", "a measured value is not finite")
    assert status(good, tmp_path) == ("finished", "")
    assert set(table.read(tmp_path / "fake.csv")["cell"]) == {cell_id(good)}
    # only those that failed are tried again
    assert finished.unfinished([bad, worse, good], tmp_path) == [bad, worse]
    complete, said = run([good], tmp_path)
    assert complete and "1 of 1 cells are finished already" in said and "nothing to run" in said
    assert run([good], tmp_path, force=True)[1].startswith("1 cell to run")


def test_a_cell_whose_rows_no_run_wrote_is_named_and_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [Cell(title=title, value=0.5) for title in ("one", "two")]
    run(cells, tmp_path)
    path = tmp_path / "fake.csv"
    whole = table.read(path)
    path.write_text(path.read_text().replace("0.5", "0.25", 1))
    assert finished.unfinished(cells, tmp_path) == cells[:1]
    said = run(cells, tmp_path)[1]
    assert "1 of 2 cells are finished already" in said and "1 cell to run" in said
    assert f"the rows of 1 cell, such as {cell_id(cells[0])}, are not what the run wrote" in capsys.readouterr().err
    pd.testing.assert_frame_equal(table.read(path).drop(columns="utc"), whole.drop(columns="utc"))
    assert finished.unfinished(cells, tmp_path) == []


def test_rows_are_in_the_table_at_the_end_also_of_a_run_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell(title=title) for title in "abc"]

    def interrupted(self: Cell, context: RunContext, progress: Progress) -> Outcome:
        if self.title == "c":
            # while a run goes on its rows are parts, which readers find
            assert len(list((tmp_path / "parts" / "fake").glob("*.csv"))) == 1
            assert set(table.read(tmp_path / "fake.csv")["cell"]) == {cell_id(cell) for cell in cells[:2]}
            raise KeyboardInterrupt
        return whole(self, context, progress)

    whole = Cell.run
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cell, "run", interrupted)
        run(cells, tmp_path)
    assert not list((tmp_path / "parts").rglob("*.csv"))
    assert (tmp_path / "fake.csv").read_text().count("\n") == 3
    assert run(cells, tmp_path)[0] and (tmp_path / "fake.csv").read_text().count("\n") == 4


def test_a_finished_cell_is_run_again_when_its_text_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(title="reads", text="one")
    assert run([cell], tmp_path)[1].startswith("1 cell to run")
    assert "1 of 1 cells are finished already" in run([cell], tmp_path)[1]
    monkeypatch.setattr(Cell, "source", lambda self, progress: "another")
    assert run([cell], tmp_path)[1].startswith("1 cell to run")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Met(Cell):
    """A cell that waits, before it runs, until two processes are about to; `folder` has a file for each evaluation."""

    folder: str

    def check(self, progress: Progress) -> None:
        (Path(self.folder) / f"ready-{os.getpid()}").touch()
        deadline = time.monotonic() + 100
        while len(list(Path(self.folder).glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    def run(self, context: RunContext, progress: Progress) -> Outcome:
        (Path(self.folder) / f"evaluated-{self.title}-{os.getpid()}").touch()
        time.sleep(0.2)
        # zero-argument super does not work in a class with slots
        return super(Met, self).run(context, progress)


def run_met(folder: Path) -> None:
    """Run three cells in a process of their own, whose exit code is 0 if all have results."""
    assert run([Met(title=title, folder=str(folder)) for title in "abc"], folder)[0]


def test_a_cell_is_run_once_by_two_commands_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # from where a new process can import this file
    monkeypatch.syspath_prepend(ROOT)
    other = multiprocessing.get_context("spawn").Process(target=run_met, args=(tmp_path,))
    other.start()
    run_met(tmp_path)
    other.join()
    assert other.exitcode == 0
    assert sorted(path.name.split("-")[1] for path in tmp_path.glob("evaluated-*")) == ["a", "b", "c"]
    assert list(table.read(tmp_path / "fake.csv")["attention"]) == ["a", "b", "c"]


def test_a_failure_waits_for_the_lock_of_its_cell_and_takes_the_place_of_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbeval.sweep.context.POLL_S", 0.01)
    context, progress = RunContext(results_dir=tmp_path, device=torch.device("cpu")), Progress(Console(quiet=True))
    steps = work.Work(context, {"fake": "quick"}, work.CELL_ERRORS, progress)
    done, left = Cell(title="done"), Cell(title="left")
    failure = work.Failure("failed", "train it: out of memory")
    # another command runs both, and only the first to its end
    with ThreadPoolExecutor() as threads:
        with context.cell(cell_id(done), progress), context.cell(cell_id(left), progress):
            recorded = [threads.submit(steps.record, cell, failure, progress) for cell in (done, left)]
            time.sleep(0.1)
            assert not any(future.done() for future in recorded)
            store.keep(context.results, "fake", work.run_cell(done, context, "quick", progress))
    assert [future.result() for future in recorded] == [None, failure]
    assert status(done, tmp_path) == ("finished", "")
    assert status(left, tmp_path) == ("failed", failure.reason)


def test_of_several_processes_none_goes_on_alone_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: object) -> None:
        raise RuntimeError("a kernel that does not fit")

    monkeypatch.setattr(Cell, "run", overflow)
    monkeypatch.setattr("sbeval.runtime.distributed.wait", lambda world: None)
    monkeypatch.setattr("sbeval.runtime.distributed.anywhere", lambda flag, world, device: flag)
    cells = [Cell(title="first"), Cell(title="second")]
    complete, said = run(cells, tmp_path)
    assert not complete and said.count("a kernel that does not fit; recorded as failed") == 2
    # the others would wait for it in the cell that it has left
    with pytest.raises(RuntimeError, match="does not fit"):
        run(cells, tmp_path, world=World(1, 2))


def test_workers_are_given_the_gpus_and_idle_ones_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("sbeval.runtime.device.describe", lambda place: "GPU")
    monkeypatch.setattr("sbeval.runtime.device.measured_flops", lambda *_: 1e6)
    monkeypatch.setitem(cost.EFFICIENCY, "cuda", (0.1, 0.1))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given: list[Any] = []

    def note(work: work.Work, items: Any, *rest: Any, gpus: Any, hear: Any) -> Any:
        given.append((work.context.device, gpus))
        return iter([])

    monkeypatch.setattr(Executor, "run", lambda self, *rest, **options: note(*rest, **options))
    cells = [Cell(title=name) for name in "abcdefgh"]

    def said(device: str, workers: int | None, cells: list[Cell] = cells) -> str:
        console = Console(file=io.StringIO(), width=200)
        context = RunContext(results_dir=tmp_path, device=torch.device(device))
        scheduler.run(cells, context, preset="quick", console=console, executor=Executor(workers=workers))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    idle = "1 of 4 GPUs is used; --workers 4 spreads the cells over all of them"
    assert said("cuda", None).splitlines()[1:] == [idle] and "roughly 80 s on GPU" in said("cuda", None)
    assert "GPUs" not in said("cuda", None, cells[:1])
    for workers, time_and_place in ((2, "40 s on 2 x GPU"), (4, "20 s on 4 x GPU"), (8, "20 s on 4 x GPU")):
        assert said("cuda", workers).endswith(f"roughly {time_and_place}\n")
    assert said("cuda", 4, cells[:2]).endswith("roughly 10 s on 2 x GPU\n")
    # pinned to one
    assert said("cuda:1", 4).endswith("roughly 80 s on GPU\n") and said("cuda:1", None).count("\n") == 1
    assert {context: gpus for context, gpus in given} == {
        torch.device("cuda"): ["0", "1", "2", "3"],
        torch.device("cuda:1"): [],
    }


def test_a_ray_task_has_no_gpu_of_a_number(tmp_path: Path) -> None:
    context = RunContext(results_dir=tmp_path, device=torch.device("cuda:1"))
    with pytest.raises(InputError, match="--device cuda:1: a Ray task sees only the GPU that Ray assigns"):
        scheduler.run(
            [Cell(title="a")], context, preset="quick", console=Console(quiet=True), executor=Executor(kind="ray")
        )


@pytest.mark.parametrize("column", ["seed", "size", "cell"])
def test_a_table_without_a_column_is_said_before_anything_runs(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([Cell(title="first")], tmp_path)
    path = tmp_path / "fake.csv"
    path.write_text(path.read_text().replace(f",{column},", ",other,", 1))
    before = path.read_bytes()
    monkeypatch.setattr(Cell, "run", None)
    for force in (False, True):
        with pytest.raises(InputError, match=f"has no column '{column}'"):
            run([Cell(title="second")], tmp_path, force=force)
    assert path.read_bytes() == before


def test_results_are_those_of_the_cells_alone(tmp_path: Path) -> None:
    cells = [Cell(title=name) for name in ("a", "b", "c")]
    run(cells, tmp_path)
    assert sorted(finished.results_of(cells[:2], tmp_path)["attention"]) == ["a", "b"]


def test_cells_that_all_failed_have_no_rows_but_every_column(tmp_path: Path) -> None:
    done, failed = [Cell(title="a")], [Cell(title="b")]
    columns = table.columns(failed[0].row)
    none = finished.results_of(failed, tmp_path)
    assert none.empty and tuple(none) == columns
    run(done, tmp_path)
    none = finished.results_of(failed, tmp_path)
    assert none.empty and tuple(none) == columns
    # a choice by them finds nothing to choose
    config = mqrar.Config(lrs=(1e-3, 2e-3), seeds=(0, 1))
    assert mqrar.more(config, finished.results_of(mqrar.cells(config), tmp_path)) == []
