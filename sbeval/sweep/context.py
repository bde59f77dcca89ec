"""The context of a run: device, processes and results folder."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from sbeval.config import digest_of
from sbeval.runtime import distributed, files, trackers
from sbeval.runtime.distributed import ALONE, World
from sbeval.runtime.files import storing
from sbeval.runtime.progress import Progress
from sbeval.tables.results import Results
from sbeval.training import checkpoint

# seconds between attempts to take a lock that another process holds
POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The device, processes and results folder of a sweep; nothing here changes a number beyond rounding."""

    results_dir: Path
    device: torch.device
    force: bool = False  # train and evaluate finished cells again
    track: tuple[str, ...] = ()  # see `sbeval.runtime.trackers`
    world: World = ALONE
    quiet: bool = False  # show no progress
    shard: bool = False  # shard weights and optimizer state over the ranks of `world` while training
    # command line, for run files: a worker has another
    argv: tuple[str, ...] = field(default_factory=lambda: tuple(sys.argv))
    # of all workers of this run: `force` clears what other runs left, once
    run_id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def results(self) -> Results:
        return Results(self.results_dir)

    def folder(self, key: object) -> Path:
        """Return the checkpoint folder of the model whose training `key` describes."""
        return self.results.checkpoints / digest_of(key)

    @contextmanager
    def checkpoint(self, key: object, progress: Progress) -> Iterator[Path]:
        """Lock and yield the checkpoint folder of the model whose training `key` describes; `force` clears it.

        During the block no other command trains this model: a second one waits, and then finds it trained.
        """
        folder = self.folder(key)

        def waiting() -> str:
            # one that is finished is only read
            return "" if checkpoint.is_finished(folder) else f"another process trains {folder}: waiting"

        with self._locked(folder.name, waiting, progress):
            if self.world.leads and self._is_stale(folder):
                checkpoint.remove(folder)
                # only now: a worker that dies before is retried, and removes the rest
                self._mark(folder)
            elif self.world.leads:
                checkpoint.tidy(folder)
            distributed.wait(self.world)
            yield folder

    @contextmanager
    def cell(self, cell: str, progress: Progress) -> Iterator[None]:
        """Lock a cell: during the block no other command runs it. A second one waits, and then finds it finished."""
        with self._locked(cell, lambda: f"another process runs {cell}: waiting", progress):
            yield

    @contextmanager
    def _locked(self, name: str, waiting: Callable[[], str], progress: Progress) -> Iterator[None]:
        """Hold a lock of the results folder during the block, for all processes of `world`.

        waiting: returns the line that says once what is waited for; empty for none.
        """
        lock = FileLock(files.prepare(self.results.locks) / f"{name}.lock")
        line = ""
        try:
            while distributed.anywhere(self.world.leads and not _taken(lock), self.world, self.device):
                if not line and (line := waiting()):
                    progress.say(line)
                time.sleep(POLL_S)
            yield
        finally:
            lock.release()

    @contextmanager
    def clearing(self, path: Path) -> Iterator[bool]:
        """Yield whether `force` is to clear this path, which the block does: once in a run, by its first worker."""
        stale = self._is_stale(path)
        yield stale
        # only now: a worker killed before this clears again
        if stale:
            self._mark(path)

    def _is_stale(self, path: Path) -> bool:
        marker = self.results.cleared(path.name)
        return self.force and not (marker.exists() and marker.read_text(encoding="utf-8") == self.run_id)

    def _mark(self, path: Path) -> None:
        files.prepare(self.results.locks)
        with files.replacing(self.results.cleared(path.name)) as temporary:
            temporary.write_text(self.run_id, encoding="utf-8")

    @contextmanager
    def logger(self, name: str) -> Iterator[trackers.Log | None]:
        """Yield a function that logs the training of a cell to the trackers; None without any."""
        with trackers.opened(self.track if self.world.leads else (), name) as log:
            yield log


def _taken(lock: FileLock) -> bool:
    """Try to take a lock without waiting."""
    with storing(Path(lock.lock_file)):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
    return True
