"""Work goes on when its workers die: functions that kill their own process, then real cells on a Ray cluster."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sbeval import checkpoint, sweep, table
from sbeval.errors import InputError
from sbeval.executor import RETRIES, Executor, Lost
from sbeval.progress import Progress
from sbeval.sweep import Outcome, Place
from sbeval.tasks import mqrar
from sbeval.train import TrainConfig

TINY = mqrar.Config(
    attention=("stick_breaking", "rope"), kv_pairs=(2,), widths=(16,), lrs=(1e-3,), vocab_size=32, seq_len=16, batch=2,
    steps=40, check_every=20, test_rows=12,
)  # fmt: skip


def square(number: int) -> int:
    return number * number


def fail(number: int) -> int:
    raise InputError(f"{number} is no good")


def die(folder: Path, times: int, number: int) -> int:
    """Kill this process the first `times` times that the number 3 comes."""
    mark = folder / f"{time.monotonic_ns()}"
    if number == 3 and len(list(folder.iterdir())) < times:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_in_this_process_in_order() -> None:
    assert list(Executor().run(square, [3, 1])) == [(3, 9), (1, 1)]
    assert Executor().alone and not Executor(workers=2).alone and not Executor(kind="ray").alone


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


def test_ray_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'sbeval\[ray\]'"):
        list(Executor(kind="ray").run(square, [1]))
