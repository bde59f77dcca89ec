"""Test retries when workers die: functions that kill their own process, then real cells on a Ray cluster."""

import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.sweep import finished, scheduler
from sbeval.sweep.cell import cell_id
from sbeval.sweep.context import RunContext
from sbeval.sweep.executor import Executor, _share
from sbeval.tasks import mqrar

CPU = torch.device("cpu")
TINY = mqrar.Config(
    attention=("stick_breaking", "rope"),
    kv_pairs=(2,),
    widths=(16,),
    lrs=(1e-3,),
    vocab_size=32,
    seq_len=16,
    batch=2,
    steps=40,
    check_every=20,
    test_rows=12,
)


def square(number: int) -> int:
    return number * number


def test_in_this_process_in_order() -> None:
    assert list(Executor().run(square, [3, 1])) == [(3, 9), (1, 1)]
    assert Executor().alone and not Executor(workers=2).alone and not Executor(kind="ray").alone


def test_what_an_item_lets_begin_comes_before_what_waits() -> None:
    taken: list[int] = []

    def then(number: int) -> list[int]:
        # asked only when what came of the item was taken
        assert taken[-1] == number
        return [10 * number, 10 * number + 1] if number < 10 else []

    for number, _ in Executor().run(square, [1, 2], then):
        taken.append(number)
    assert taken == [1, 10, 11, 2, 20, 21]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rey"}, "unknown executor 'rey'; did you mean 'ray'"),
        ({"workers": 0}, "--workers must be at least 1; got 0"),
        ({"gpus_per_cell": -1.0}, "--gpus-per-cell must be at least 0; got -1.0"),
        ({"address": "host:6379"}, "are for --executor ray"),
        ({"kind": "ray", "address": "auto", "workers": 2}, "give one of them"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Executor(**options)


@pytest.mark.parametrize(("share", "there", "taken"), [(None, 0, 0.0), (None, 8, 1.0), (0.25, 8, 0.25), (0.0, 8, 0.0)])
def test_the_share_of_a_gpu_that_a_ray_task_takes(share: float | None, there: int, taken: float) -> None:
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 2, "GPU": there})
    assert _share(cluster, Executor(kind="ray", gpus_per_cell=share)) == taken


def test_a_share_that_no_cluster_has_is_said() -> None:
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 2})
    with pytest.raises(InputError, match="--gpus-per-cell 0.5 is more than the Ray cluster has: 0 GPUs"):
        _share(cluster, Executor(kind="ray", gpus_per_cell=0.5))


def test_ray_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'sbeval\[ray\]'"):
        list(Executor(kind="ray").run(square, [1]))


class Deadly(RunContext):
    """A context in which the process of each cell is killed once, at step 20, and every validation step is logged."""

    @contextmanager
    def logger(self, name: str) -> Iterator[Callable[[int, dict[str, float]], None]]:
        looks = self.results_dir / f"looks-{name}"

        def log(step: int, numbers: dict[str, float]) -> None:
            with looks.open("a") as file:
                file.write(f"{step}\n")
            if step == 20 and looks.read_text().count("20\n") == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        yield log


class Saving(mqrar.Cell):
    """A cell that saves at every validation step."""

    def training(self) -> Any:
        return dataclasses.replace(super().training(), checkpoint_seconds=0.0)


def results(cells: list[Saving], folder: Path) -> pd.DataFrame:
    return finished.results_of(cells, folder).drop(columns=["utc", "device"])


def test_a_ray_cluster_of_two_workers_that_are_killed_in_the_middle(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    # workers cannot import this file
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cells = [Saving(config=cell.config) for cell in mqrar.cells(TINY)]
    options: dict[str, Any] = {"preset": "quick", "console": Console(quiet=True)}
    broken, whole = (kind(results_dir=tmp_path / kind.__name__, device=CPU) for kind in (Deadly, RunContext))
    try:
        assert scheduler.run(cells, broken, executor=Executor(kind="ray", workers=2), **options)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    for cell in cells:
        # killed at 20 after it had saved at 10, from where another went on
        looks = (broken.results_dir / f"looks-{cell_id(cell)}").read_text().split()
        assert looks == ["10", "20", "20", "30", "40"]
    assert scheduler.run(cells, whole, **options)
    pd.testing.assert_frame_equal(results(cells, broken.results_dir), results(cells, whole.results_dir))
    # a driver that begins again finds them done
    assert finished.unfinished(cells, broken.results_dir) == []


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes connections and says nothing; Ray itself waits for minutes."""
    pytest.importorskip("ray")
    monkeypatch.setattr("sbeval.sweep.executor.ANSWER_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(InputError, match=f"^no Ray cluster answers at {address} within 1 s"):
            list(Executor(kind="ray", address=address).run(square, [1]))
        # and what importing ray takes
        assert time.monotonic() - start < 60
