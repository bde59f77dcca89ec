"""Progress display: bars with the estimated remaining time in a terminal, periodic plain lines elsewhere."""

import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self

from rich import progress
from rich.console import Console
from rich.table import Column

from sbeval.runtime.console import plain

# a plain line is due after PERIOD_S seconds, or STEP_PERCENT percent, but never within PAUSE_S
PERIOD_S, STEP_PERCENT, PAUSE_S = 10.0, 10.0, 1.0
# columns of a bar, and of a terminal that shows one
BAR, WITH_BAR = 20, 120
# seconds between messages of a task in another process; maximum characters of their text
TELL_S, MAX_TEXT = 0.1, 800


class Bar(Protocol):
    """A display of how many steps are done."""

    def advance(self, steps: int, /) -> None: ...

    def say(self, line: str, /) -> None: ...

    def close(self) -> None: ...


class Silent:
    """A Bar that displays nothing."""

    def __init__(self, total: int, completed: int) -> None: ...

    def advance(self, steps: int, /) -> None: ...

    def say(self, line: str, /) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Displays tasks during the `with` block; they may be nested and overlap.

    In a terminal the bar of a closed task is replaced by one plain line. Other output gets a line per task every 10 s
    or 10 %, and one at its end. Everything goes to standard error unless a console is given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or plain(stderr=True)
        # text that does not fit goes on in the next line, and the bar leaves first
        bar = [progress.BarColumn(bar_width=BAR)] if self._console.width >= WITH_BAR else []
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            *bar,
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[status]}", markup=False, table_column=Column(overflow="fold")),
            console=self._console,
            # seconds of history for the speed estimate; steps can take minutes
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
        """Start a task of `total` steps, None if unknown; `completed` were done before a resume."""
        return Task(self._bars, self._bars.add_task(description, total=total, completed=completed, status=""))

    def say(self, line: str) -> None:
        """Print a line, above the bars if any."""
        _print(self._bars, line)


class Task:
    """A task of a Progress."""

    def __init__(self, bars: progress.Progress, identity: progress.TaskID) -> None:
        self._bars = bars
        self._state = next(task for task in bars.tasks if task.id == identity)
        self._completed_before = self._state.completed
        self._printed_at = self._state.get_time()
        self._printed_percent = self._state.percentage

    def extend(self, steps: int) -> None:
        """Increase the total by `steps`."""
        self._bars.update(self._state.id, total=(self._state.total or 0) + steps)

    def advance(self, steps: int = 1, status: str = "") -> None:
        """Count completed steps. `status`, such as `loss 2.13, 12.3k tokens/s`, is shown until the next one."""
        self._bars.update(self._state.id, advance=steps, status=status or self._state.fields["status"])
        if self._bars.disable and self._due():
            self._say()

    def say(self, line: str) -> None:
        """Print a line, above the bars if any."""
        _print(self._bars, line)

    def close(self) -> None:
        """End the task, finished or not, and print its final state, unless it made no progress."""
        self._bars.remove_task(self._state.id)
        if self._state.completed > self._completed_before:
            self._say()

    def _due(self) -> bool:
        # `close` prints the final state
        if self._state.completed == self._state.total:
            return False
        passed = self._state.get_time() - self._printed_at
        gained = self._state.percentage - self._printed_percent
        return passed >= PERIOD_S or (passed >= PAUSE_S and gained >= STEP_PERCENT)

    def _say(self) -> None:
        self._printed_at, self._printed_percent = self._state.get_time(), self._state.percentage
        _print(self._bars, _line(self._state))


def _print(bars: progress.Progress, line: str) -> None:
    bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(task: progress.Task) -> str:
    """Format the state of a task: `train rope (seed 0): 40 %, 0:00:12 elapsed, 0:00:18 left, loss 2.13`."""
    done = f"{task.completed:,.0f} done" if task.total is None else f"{task.percentage:.0f} %"
    left = f"{_clock(task.time_remaining)} left" if task.time_remaining else ""
    parts = (done, f"{_clock(task.elapsed or 0)} elapsed", left, task.fields["status"])
    return f"{task.description}: {', '.join(part for part in parts if part)}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Telling(Progress):
    """A Progress in a worker, which sends its tasks by `tell` to the `Heard` of the driver."""

    def __init__(self, tell: Callable[[tuple[Any, ...]], None]) -> None:
        self._tell, self._numbers = tell, itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close tasks that an error left open."""
        self._tell(("end",))

    def add(self, description: str, total: int | None, completed: int = 0) -> Task:
        number = next(self._numbers)
        self._tell(("add", number, description[:MAX_TEXT], total, completed))
        return _Told(self._tell, number)

    def say(self, line: str) -> None:
        self._tell(("say", line[:MAX_TEXT]))


class _Told(Task):
    """A task of a Telling."""

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
        self._tell(("say", line[:MAX_TEXT]))

    def close(self) -> None:
        self._advance()
        self._tell(("close", self._number))

    def _advance(self) -> None:
        if self._steps:
            self._tell(("advance", self._number, self._steps, self._status[:MAX_TEXT]))
        self._steps, self._told_at = 0, time.monotonic()


class Heard:
    """Displays the tasks of workers on a Progress of this process."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[int, dict[int, Task]] = {}

    def __call__(self, worker: int, message: tuple[Any, ...] | None) -> None:
        """Handle a message of a worker, None if it died."""
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
