"""Test workers that keep their GPU, die and are replaced; the functions that they run kill their own process."""

import io
import os
import re
import signal
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from sbeval.errors import InputError
from sbeval.runtime import device
from sbeval.runtime.progress import Heard, Progress, Telling
from sbeval.sweep import pool
from sbeval.sweep.pool import Lost

# from where a new process can import this file
ROOT = Path(__file__).parents[3]
GPUS = torch.cuda.device_count()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def square(number: int) -> int:
    return number * number


def fail(number: int) -> int:
    raise InputError(f"{number} is no good")


def die(folder: Path, times: int, number: int) -> int:
    """Kill this process the first `times` times that the item is 3."""
    deaths = len(list(folder.glob("death*")))
    if number == 3 and deaths < times:
        (folder / f"death{deaths}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def where(folder: Path, number: int) -> dict[str, Any]:
    """Return where a worker runs. Number 0 is killed once the others have started, which wait until it is back."""
    (folder / f"begun{number}").touch()
    found = {"pid": os.getpid(), "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "threads": torch.get_num_threads()}
    pool.tell(("at", number))
    if number == 0:
        for other in (1, 2, 3):
            wait_for(folder / f"begun{other}")
        die(folder, 1, 3)
        (folder / "back").touch()
    else:
        wait_for(folder / "back")
    return found


def test_workers_share_gpus_out_and_one_in_the_place_of_another_has_its_gpu(tmp_path: Path) -> None:
    heard: list[tuple[int, Any]] = []

    def hear(worker: int, message: Any) -> None:
        heard.append((worker, message))

    work = partial(where, tmp_path)
    found: dict[int, Any] = dict(pool.run(work, [0, 1, 2, 3], 4, gpus=("5", "GPU-ab"), hear=hear))
    assert Counter(one["gpu"] for one in found.values()) == {"5": 2, "GPU-ab": 2}
    assert (tmp_path / "death0").read_text() == found[0]["gpu"] == "5"
    # those whose worker lived were not begun again
    assert heard.count((0, None)) == 1 and heard.count((0, ("at", 0))) == 2
    assert sorted(heard, key=repr) == sorted(
        [(0, ("at", 0)), (0, None), (0, ("at", 0)), (1, ("at", 1)), (2, ("at", 2)), (3, ("at", 3))], key=repr
    )
    assert len({one["pid"] for one in found.values()}) == 4
    assert {one["threads"] for one in found.values()} == {max(1, torch.get_num_threads() // 4)}


def worker(number: int, gpu: str | None) -> Any:
    return SimpleNamespace(number=number, gpu=gpu)


def test_an_item_goes_where_the_fewest_are_at_work() -> None:
    first, second, third, fourth = (worker(number, "ab"[number % 2]) for number in range(4))
    assert pool._least_busy([third, second, first, fourth], []) is first
    # two cells are left of four workers on two GPUs: not both on one
    assert pool._least_busy([third, fourth], [(first, "item", 0)]) is fourth
    assert pool._least_busy([third], [(first, "item", 0)]) is third
    alone = [worker(number, None) for number in range(2)]
    assert pool._least_busy(alone, [(worker(2, None), "item", 0)]) is alone[0]


@pytest.mark.slow
def test_one_that_dies_again_and_again_runs_alone_at_last_and_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "RETRIES", 1)
    for times in (1, 2):
        folder = tmp_path / f"{times}"
        folder.mkdir()
        found = dict(pool.run(partial(die, folder, times), [1, 2, 3, 4], 2))
        lost = found.pop(3)
        assert found == {1: 1, 2: 4, 4: 16}
        assert lost == 9 if times == 1 else isinstance(lost, Lost)
        assert len(list(folder.iterdir())) == times


def test_what_died_twice_waits_until_the_others_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    left = {1: 3, 2: 9}

    class Worker:
        def __init__(self, number: int, workers: int, gpu: str | None, ear: Any) -> None:
            self.number, self.gpu, self.pool = number, gpu, SimpleNamespace(shutdown=lambda **_: None)

        def submit(self, work: Any, item: int) -> Future[int]:
            begun.append(item)
            future: Future[int] = Future()
            if left.get(item):
                left[item] -= 1
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(item)
            return future

        def renew(self) -> str:
            return "by SIGKILL: too much"

        def end(self) -> None:
            pass

    monkeypatch.setattr(pool, "_Worker", Worker)
    found = list(pool.run(square, [1, 2, 3, 4], 1))
    assert begun == [1, 1, 2, 2, 3, 4, 2, 2, 1, 1]
    assert found == [
        (3, 3),
        (4, 4),
        (2, Lost("its process died 4 times, at last by SIGKILL: too much")),
        (1, 1),
    ]


def test_what_follows_an_item_runs_where_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[int, list[str]] = {0: [], 1: []}

    class Worker:
        def __init__(self, number: int, workers: int, gpu: str | None, ear: Any) -> None:
            self.number, self.gpu = number, gpu

        def submit(self, work: Any, item: str) -> Future[str]:
            ran[self.number].append(item)
            future: Future[str] = Future()
            future.set_result(item)
            return future

        def end(self) -> None:
            pass

    monkeypatch.setattr(pool, "_Worker", Worker)
    # a model and what continues from it; the last two wait until nothing else is ready
    after = {"a": ["a model", "a longer"], "b": ["b model", "b longer"], "a longer": ["a last"]}
    found = dict(pool.run(str, ["a", "b", "c", "d"], 2, lambda item: after.get(item, [])))
    assert ran[0][:4] == ["a", "a model", "a longer", "a last"] and ran[1][:3] == ["b", "b model", "b longer"]
    assert set(found) == {*after, "c", "d", *(item for some in after.values() for item in some)}


def end_badly(number: int) -> int:
    os.write(2, b"a warning\nthe disk is on fire\n\n")
    os._exit(3)


def test_a_worker_that_is_lost_has_its_own_last_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "RETRIES", 0)
    ((_, lost),) = pool.run(end_badly, [1], 1, then=lambda item: [])
    assert lost == Lost("its process died 1 times, at last with exit code 3: the disk is on fire")
    # what workers say is heard
    assert capsys.readouterr().err.startswith("a warning\nthe disk is on fire\n")


@pytest.mark.parametrize(
    ("code", "last", "cause"),
    [
        (-9, "", "by SIGKILL: is the machine short of memory?"),
        (-9, "Killed", "by SIGKILL: Killed"),
        (-11, "", "by SIGSEGV"),
        (1, "", "with exit code 1"),
        (None, "CUDA error", "without an exit code: CUDA error"),
    ],
)
def test_memory_is_suspected_where_nothing_else_is_known(code: int | None, last: str, cause: str) -> None:
    assert pool._cause(code, last) == cause


def test_an_error_of_the_users_ends_the_work_of_processes() -> None:
    with pytest.raises(InputError, match="is no good"):
        list(pool.run(fail, [1, 2, 3], 2))


def train(number: int) -> int:
    """Show a task and print a long line."""
    with Telling(pool.tell) as progress:
        task = progress.add(f"train {number}", total=4, completed=1)
        progress.say(f"{number} has " + "a lot to say " * 1000)
        task.advance(2, status="loss 2")
        task.advance(status="loss 1")
        task.close()
    return number


def test_progress_of_workers_is_shown_where_the_driver_is() -> None:
    console = Console(file=io.StringIO(), width=5000)
    with Progress(console) as progress:
        assert dict(pool.run(train, [1, 2], 2, hear=Heard(progress))) == {1: 1, 2: 2}
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert sum(bool(re.fullmatch(r"[12] has (a lot to say )+.*", line)) for line in lines) == 2
    ends = [re.sub(r"\d:\d\d:\d\d", "TIME", line) for line in lines if line.startswith("train")]
    assert sorted(ends) == [f"train {number}: 100 %, TIME elapsed, loss 1" for number in (1, 2)]


def test_outside_a_worker_nobody_is_told() -> None:
    assert train(3) == 3


def card(folder: Path, number: int) -> str:
    """Return the GPU of a worker, once all workers are busy."""
    (folder / f"{number}").touch()
    for other in range(GPUS):
        wait_for(folder / f"{other}")
    assert torch.cuda.device_count() == 1
    return str(torch.cuda.get_device_properties(torch.ones(1, device="cuda").device).uuid)


@pytest.mark.skipif(GPUS < 2, reason="needs several GPUs")
def test_as_many_workers_as_gpus_have_one_each(tmp_path: Path) -> None:
    found = dict(pool.run(partial(card, tmp_path), range(GPUS), GPUS, gpus=device.spread(torch.device("cuda"))))
    here = [str(torch.cuda.get_device_properties(index).uuid) for index in range(GPUS)]
    # workers begin in order
    assert list(dict(sorted(found.items())).values()) == here
