"""Progress of long work: bars with an estimate of the time left in a terminal, now and then a plain line elsewhere."""

import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich import progress
from rich.console import Console

# a plain line is due after so many seconds, or sooner after so many percent, but not in quick succession
PERIOD_S, STEP_PERCENT, PAUSE_S = 10.0, 10.0, 1.0
# a task of another process tells of steps after so many seconds; characters of a line that it can say
TELL_S, TOLD = 0.1, 800


class Progress:
    """Shows tasks while the `with` block runs; they may be nested and overlap.

    In a terminal a closed task's bar gives way to one plain line. Other output gets a line per task every 10 s or 10 %,
    and one at its end. Everything goes to standard error unless a console is given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            # rich forgets steps older than this, and steps can take minutes
            speed_estimate_period=3600,
            disable=not self._console.is_interactive,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def add(self, description: str, total: int | None, completed: int = 0) -> "Task":
        """Start a task of `total` steps, None if unknown; `completed` of them were done before (resumed work)."""
        return Task(self._bars, self._bars.add_task(description, total=total, completed=completed, status=""))

    def say(self, line: str) -> None:
        """Print a line, above the bars where there are any."""
        _print(self._bars, line)


class Task:
    """One line of a Progress."""

    def __init__(self, bars: progress.Progress, identity: progress.TaskID) -> None:
        self._bars = bars
        self._state = next(task for task in bars.tasks if task.id == identity)
        self._completed_before = self._state.completed
        self._said_at = self._state.get_time()
        self._said_percent = self._state.percentage

    def extend(self, steps: int) -> None:
        """Add to the steps there are."""
        self._bars.update(self._state.id, total=(self._state.total or 0) + steps)

    def advance(self, steps: int = 1, status: str = "") -> None:
        """Count steps done. `status`, such as `loss 2.13, 12.3k tokens/s`, is shown until the next one is given."""
        self._bars.update(self._state.id, advance=steps, status=status or self._state.fields["status"])
        if self._bars.disable and self._due():
            self._say()

    def say(self, line: str) -> None:
        """Print a line, above the bars where there are any."""
        _print(self._bars, line)

    def close(self) -> None:
        """End the task, finished or not, with a line that says how far it came; with none if nothing was to do."""
        self._bars.remove_task(self._state.id)
        if self._state.completed > self._completed_before:
            self._say()

    def _due(self) -> bool:
        # `close` says the end
        if self._state.completed == self._state.total:
            return False
        passed = self._state.get_time() - self._said_at
        gained = self._state.percentage - self._said_percent
        return passed >= PERIOD_S or (passed >= PAUSE_S and gained >= STEP_PERCENT)

    def _say(self) -> None:
        self._said_at, self._said_percent = self._state.get_time(), self._state.percentage
        _print(self._bars, _line(self._state))


def _print(bars: progress.Progress, line: str) -> None:
    bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(task: progress.Task) -> str:
    """Say a task's state in one line: `train rope (seed 0): 40 %, 0:00:12 elapsed, 0:00:18 left, loss 2.13`."""
    done = f"{task.completed:,.0f} done" if task.total is None else f"{task.percentage:.0f} %"
    left = f"{_clock(task.time_remaining)} left" if task.time_remaining else ""
    parts = (done, f"{_clock(task.elapsed or 0)} elapsed", left, task.fields["status"])
    return f"{task.description}: {', '.join(part for part in parts if part)}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Telling(Progress):
    """Shows tasks where `tell` brings what becomes of them: on the `Heard` of another process."""

    def __init__(self, tell: Callable[[tuple[Any, ...]], None]) -> None:
        self._tell, self._numbers = tell, itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close what an error left open."""
        self._tell(("end",))

    def add(self, description: str, total: int | None, completed: int = 0) -> Task:
        number = next(self._numbers)
        self._tell(("add", number, description[:TOLD], total, completed))
        return _Told(self._tell, number)

    def say(self, line: str) -> None:
        self._tell(("say", line[:TOLD]))


class _Told(Task):
    """One line of a Progress of another process."""

    def __init__(self, tell: Callable[[tuple[Any, ...]], None], number: int) -> None:
        self._tell, self._number = tell, number
        self._steps, self._told_at = 0, 0.0

    def extend(self, steps: int) -> None:
        self._tell(("extend", self._number, steps))

    def advance(self, steps: int = 1, status: str = "") -> None:
        self._steps, self._status = self._steps + steps, status
        if time.monotonic() - self._told_at > TELL_S:
            self._advance()

    def say(self, line: str) -> None:
        self._tell(("say", line[:TOLD]))

    def close(self) -> None:
        self._advance()
        self._tell(("close", self._number))

    def _advance(self) -> None:
        if self._steps:
            self._tell(("advance", self._number, self._steps, self._status[:TOLD]))
        self._steps, self._told_at = 0, time.monotonic()


class Heard:
    """Shows on a Progress of this process what the tasks of others tell."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[int, dict[int, Task]] = {}

    def __call__(self, worker: int, message: tuple[Any, ...] | None) -> None:
        """Take a message of a worker, None when it died."""
        tasks = self._tasks.setdefault(worker, {})
        match message:
            case ("add", number, description, total, completed):
                tasks[number] = self._progress.add(description, total, completed)
            case ("say", line):
                self._progress.say(line)
            case ("extend", number, steps):
                tasks[number].extend(steps)
            case ("advance", number, steps, status):
                tasks[number].advance(steps, status)
            case ("close", number):
                tasks.pop(number).close()
            case ("end",) | None:
                for task in self._tasks.pop(worker).values():
                    task.close()
