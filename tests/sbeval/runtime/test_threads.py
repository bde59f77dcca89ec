"""Threads on the CPU: the fastest of a timing, kept while a run is not complete."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sbeval.errors import InputError
from sbeval.runtime import threads
from sbeval.runtime.threads import used

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch with four threads, and nothing said of them in the environment, which is restored."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def times(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Let a timing take these seconds with each number of threads; return the numbers that were timed."""
    timed: list[int] = []

    def passed(*_: object) -> float:
        timed.append(torch.get_num_threads())
        # the first of each starts threads
        return seconds[timed[-1]] + 100 * (timed.count(timed[-1]) == 1)

    monkeypatch.setattr(threads, "_seconds", passed)
    return timed


@pytest.mark.parametrize(
    ("seconds", "most", "fastest"),
    [
        # idle, busy, and no gain
        ({1: 4.0, 2: 2.1, 4: 1.2}, 4, 4),
        ({1: 4.0, 2: 12.0, 4: 24.0}, 4, 1),
        ({1: 4.0, 2: 4.0, 4: 4.0}, 4, 1),
        ({1: 4.0, 2: 2.1, 3: 1.5}, 3, 3),
        ({}, 1, 1),
        ({}, 0, 1),
    ],
)
def test_the_fastest(seconds: dict[int, float], most: int, fastest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = times(monkeypatch, seconds)
    assert threads.fastest(most) == fastest
    # by turns, and as it was before
    assert timed[: len(seconds)] == list(seconds) and torch.get_num_threads() == 4


def test_a_timing_is_one() -> None:
    assert threads.fastest(2) in (1, 2)


def test_a_number_is_taken_and_passed_on(tmp_path: Path) -> None:
    with used("3", CPU, tmp_path / "threads"):
        assert torch.get_num_threads() == 3 and os.environ["OMP_NUM_THREADS"] == "3"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5", ""])
def test_other_words_are_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--threads must be auto, or a number of at least 1; got"):
        with used(wrong, CPU, tmp_path / "threads"):
            pytest.fail("nothing runs")


def test_an_interrupted_run_goes_on_with_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums depend on the number of threads, and a resumed run is to have the same."""
    kept = tmp_path / "locks" / "threads"
    times(monkeypatch, {1: 4.0, 2: 2.0, 4: 3.0})
    with pytest.raises(KeyboardInterrupt), used("auto", CPU, kept):
        assert torch.get_num_threads() == 2
        raise KeyboardInterrupt
    # by now the machine is idle, or busy
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    torch.set_num_threads(4)
    times(monkeypatch, {1: 1.0, 2: 9.0, 4: 9.0})
    with used("auto", CPU, kept):
        assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    torch.set_num_threads(4)
    with used("auto", CPU, kept):
        assert torch.get_num_threads() == 1
    kept.write_text("two")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    with pytest.raises(InputError, match=f"cannot read {kept}"), used("auto", CPU, kept):
        pytest.fail("nothing runs")


def test_workers_share_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = times(monkeypatch, {1: 4.0, 2: 2.0})
    with used("auto", CPU, tmp_path / "threads", workers=2):
        assert torch.get_num_threads() == 4 and set(timed) == {1, 2}
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    with used("auto", CPU, tmp_path / "threads", workers=4):
        assert torch.get_num_threads() == 4 and set(timed) == {1, 2}


def test_a_gpu_and_the_environment_decide_without_a_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "fastest", lambda most: pytest.fail("timed"))
    with used("auto", torch.device("cuda"), tmp_path / "threads"):
        assert torch.get_num_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with used("auto", CPU, tmp_path / "threads"):
        assert torch.get_num_threads() == 4 and not list(tmp_path.iterdir())
