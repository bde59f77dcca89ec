import functools
import io
import re
from typing import Any

import pytest
from rich.console import Console

from sbeval.runtime.progress import Heard, Progress, Telling


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain(clock: Clock) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, get_time=clock, width=40), out


def said(out: io.StringIO) -> list[str]:
    # some versions of rich end with an empty line
    return out.getvalue().rstrip("\n").split("\n")


def test_lines_when_the_output_is_no_terminal(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        task = shown.add("train stick_breaking [seed 0], long enough to be wrapped", total=100)
        for step in range(100):
            clock.now += 2
            task.advance(status=f"loss {step}.5")
        task.close()
    lines = said(out)
    name = "train stick_breaking [seed 0], long enough to be wrapped"
    assert lines[0] == f"{name}: 5 %, 0:00:10 elapsed, 0:03:10 left, loss 4.5"
    assert lines[-1] == f"{name}: 100 %, 0:03:20 elapsed, loss 99.5"
    assert len(lines) == 20


@pytest.mark.parametrize(("width", "bar"), [(80, False), (120, True)])
def test_in_a_terminal_nothing_is_cut(width: int, bar: bool) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    progress = Progress(console)
    words = "train stick_breaking:logit_scale=1.5 8 pairs width 64 lr 0.003 seed 0".split()
    progress.add(" ".join(words), total=100).advance(40, status="loss 2.13, 12.3k tokens/s")
    console.print(progress._bars.get_renderable())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert all(word in shown for word in words) and "loss 2.13, 12.3k tokens/s" in shown and "…" not in shown
    assert ("━" in shown) is bar and max(map(len, shown.splitlines())) <= width


def test_fast_tasks_say_only_that_they_ended(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        task = shown.add("evaluate", total=100)
        for _ in range(100):
            clock.now += 0.001
            task.advance()
        task.close()
    assert said(out) == ["evaluate: 100 %, 0:00:00 elapsed"]


def test_a_line_every_ten_percent_of_a_short_task(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        task = shown.add("train", total=40)
        for _ in range(40):
            clock.now += 0.5
            task.advance()
        task.close()
    assert re.findall(r"(\d+) %", out.getvalue()) == ["10", "20", "30", "40", "50", "60", "70", "80", "90", "100"]


def test_status_stays_and_resumed_work_counts(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        task = shown.add("train", total=100, completed=50)
        for status in ("loss 2", ""):
            clock.now += 10
            task.advance(10, status=status)
        task.close()
    first, second, last = said(out)
    assert first == "train: 60 %, 0:00:10 elapsed, loss 2"
    # the half that was done before says nothing about the speed
    assert second == "train: 70 %, 0:00:20 elapsed, 0:00:30 left, loss 2"
    assert last == second


def test_nested_tasks_and_nothing_to_do(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        sweep = shown.add("cells", total=2)
        for name in "ab":
            shown.add(f"resume {name}", total=2, completed=2).close()
            task = shown.add(name, total=1)
            task.advance()
            task.close()
            sweep.advance()
        sweep.close()
    assert [line.split(",")[0] for line in said(out)] == ["a: 100 %", "b: 100 %", "cells: 100 %"]


def test_work_of_unknown_length(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        task = shown.add("tokenize", total=None)
        for _ in range(3):
            clock.now += 6
            task.advance(5000)
        task.close()
    assert said(out) == [
        "tokenize: 10,000 done, 0:00:12 elapsed",
        "tokenize: 15,000 done, 0:00:18 elapsed",
    ]


def test_bars_in_a_terminal_give_way_to_a_line() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"})) as shown:
        task = shown.add("train [rope]", total=2)
        task.advance(status="loss 2.1")
        shown._bars.refresh()
        assert "━" in out.getvalue() and "50%" in out.getvalue() and "loss 2.1" in out.getvalue()
        task.advance()
        task.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert re.search(r"train \[rope\]: 100 %, 0:00:0\d elapsed, loss 2.1\n", text)
    assert not shown._bars.tasks


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as shown:
        task = shown.add("train", total=4)
        task.advance()
        task.close()
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("train: 25 %")


def test_an_error_inside_gets_out(clock: Clock) -> None:
    console, _ = plain(clock)
    with pytest.raises(KeyboardInterrupt), Progress(console) as shown:
        shown.add("train", total=1)
        raise KeyboardInterrupt


def test_tasks_of_other_processes_are_shown_here(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        heard = Heard(shown)
        first, second = (Telling(functools.partial(heard, worker)) for worker in (0, 1))
        with first, second:
            task, other = first.add("train a", total=10), second.add("train b", total=None)
            other.advance(7)
            clock.now += 12
            task.advance(5, status="loss 2")
            second.say("said at once")
            task.extend(10)
            clock.now += 3
            task.close()
            other.close()
    assert said(out) == [
        "train a: 50 %, 0:00:12 elapsed, loss 2",
        "said at once",
        "train a: 25 %, 0:00:15 elapsed, loss 2",
        "train b: 7 done, 0:00:15 elapsed",
    ]


def test_many_small_steps_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    with Telling(told.append) as progress:
        task = progress.add("ask", total=1000)
        now = iter(range(10**6))
        monkeypatch.setattr("time.monotonic", lambda: 1e6 + next(now) / 1000)
        for step in range(1000):
            task.advance(status=f"{step}")
        task.close()
    steps = [message for message in told if message[0] == "advance"]
    assert 5 < len(steps) < 12 and sum(message[2] for message in steps) == 1000 and steps[-1][3] == "999"
    assert told[0] == ("add", 0, "ask", 1000, 0) and told[-2:] == [("close", 0), ("end",)]


def test_what_a_worker_left_open_goes_when_it_dies_or_fails(clock: Clock) -> None:
    console, out = plain(clock)
    with Progress(console) as shown:
        heard = Heard(shown)
        for worker, last in ((0, None), (1, ("end",))):
            heard(worker, ("add", 0, f"train {worker}", 10, 0))
            heard(worker, ("advance", 0, 4, ""))
            assert len(shown._bars.tasks) == 1
            heard(worker, last)
            assert not shown._bars.tasks
            # the number of a task begins anew in another process
            heard(worker, ("add", 0, "again", 10, 10))
            heard(worker, ("close", 0))
    assert said(out) == ["train 0: 40 %, 0:00:00 elapsed", "train 1: 40 %, 0:00:00 elapsed"]
