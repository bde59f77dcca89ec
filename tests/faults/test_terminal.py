"""A run in a terminal: ten quick Ctrl-Cs, a terminal that is closed, and one that is closed under `nohup`."""

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sbeval.tables import table
from sbeval.training import checkpoint

ENDLESS = (
    "mqrar --device cpu --attention rope --vocab-size 32 --seq-len 16 --kv-pairs 2 --width 16 --batch 4 --test-rows 12 "
    "--lr 3e-3 --steps 10000000"
)
# makes the terminal on standard input that of its session, so that its end is told by SIGHUP
LAUNCH = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "sbeval", *sys.argv[2:]])
"""


class Terminal:
    """A terminal with a command in it."""

    def __init__(self, command: str, results: Path, how: str) -> None:
        self.master, slave = pty.openpty()
        words = [sys.executable, "-c", LAUNCH, how, *shlex.split(command), "--results-dir", str(results)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self.said = ""
        self.deadline = time.monotonic() + 120

    def wait_for(self, text: str) -> None:
        while text not in self.said:
            assert self.read(), self.said

    def read(self) -> bool:
        """Read what is written next; return False when the command has ended."""
        while not select.select([self.master], [], [], 1.0)[0]:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < self.deadline, self.said
        # the terminal of a process that has ended has no input or output
        with suppress(OSError):
            part = os.read(self.master, 1 << 16)
            self.said += part.decode(errors="replace")
            return bool(part)
        return False

    def close(self) -> None:
        os.close(self.master)
        self.master = -1


@contextmanager
def terminal(command: str, results: Path, how: str = "") -> Iterator[Terminal]:
    shown = Terminal(command, results, how)
    try:
        yield shown
    finally:
        if shown.process.poll() is None:
            shown.process.kill()
        shown.process.wait()
        if shown.master >= 0:
            shown.close()


def saved_steps(results: Path) -> list[int]:
    folders = [path for path in (results / "checkpoints").iterdir() if path.is_dir()]
    return [checkpoint.load_state(folder).step for folder in folders]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ten_quick_interrupts_are_one(workers: int, tmp_path: Path) -> None:
    with terminal(f"{ENDLESS} --workers {workers} --seed 0 --seed 1", tmp_path) as shown:
        shown.wait_for("loss")
        for _ in range(10):
            os.killpg(shown.process.pid, signal.SIGINT)
            time.sleep(0.03)
        while shown.read():
            pass
        assert shown.process.wait(60) == 130
    assert "Traceback" not in shown.said and "Exception" not in shown.said, shown.said
    assert shown.said.count("sbeval: interrupted; finished work is kept, and the same command resumes") == 1
    assert saved_steps(tmp_path)[0] > 0


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_terminal_that_is_closed_saves_what_was_trained(workers: int, tmp_path: Path) -> None:
    with terminal(f"{ENDLESS} --workers {workers} --seed 0 --seed 1", tmp_path) as shown:
        shown.wait_for("loss")
        shown.close()
        assert shown.process.wait(60) == 130
    assert saved_steps(tmp_path)[0] > 0


def test_a_run_that_ignores_the_end_of_its_terminal_goes_on(tmp_path: Path) -> None:
    with terminal(ENDLESS.replace("10000000", "600"), tmp_path, "nohup") as shown:
        shown.wait_for("loss")
        shown.close()
        assert shown.process.wait(300) == 0
    assert len(table.read(tmp_path / "mqrar.csv"))
