"""Where cells run and where what they leave is kept."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from sbeval.config import digest_of
from sbeval.errors import InputError
from sbeval.runtime import distributed, files
from sbeval.runtime.distributed import ALONE, World
from sbeval.runtime.files import storing
from sbeval.runtime.progress import Progress
from sbeval.tables.results import Results
from sbeval.training import checkpoint

# seconds between looks at a lock that another holds
POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a sweep runs and where its results go; nothing here changes a number beyond rounding."""

    results_dir: Path
    device: torch.device
    force: bool = False  # train and evaluate again what is there already
    tensorboard: Path | None = None
    world: World = ALONE
    shard: bool = False  # spread weights and optimizer over the processes of `world` while training
    emptied: set[Path] = field(default_factory=set)  # of which `force` has removed what another run left

    @property
    def results(self) -> Results:
        return Results(self.results_dir)

    @contextmanager
    def checkpoint(self, key: object, progress: Progress) -> Iterator[Path]:
        """Folder of the model whose training `key` describes in full; with `force` what it held is removed.

        While the block runs no other command trains this model: a second one waits, and finds it trained.
        """
        folder = self.results.checkpoints / digest_of(key)
        lock = FileLock(files.prepare(self.results.locks) / f"{folder.name}.lock")
        try:
            said = False
            while distributed.anywhere(self.world.leads and not _taken(lock), self.world, self.device):
                if not said:
                    progress.say(f"another process trains {folder}: waiting for it")
                said = True
                time.sleep(POLL_S)
            if self.world.leads:
                (checkpoint.remove if self.begins_anew(folder) else checkpoint.tidy)(folder)
            distributed.wait(self.world)
            yield folder
        finally:
            lock.release()

    def kept(self, path: Path) -> Path:
        """A file that a run which was stopped may have left in the results folder; with `force` it is removed."""
        if self.begins_anew(path):
            path.unlink(missing_ok=True)
        return path

    def begins_anew(self, path: Path) -> bool:
        """Whether what another run left there is to be removed: once, with `force`."""
        first = self.force and path not in self.emptied
        if first:
            self.emptied.add(path)
        return first

    def logger(self, name: str) -> Callable[[int, dict[str, float]], None] | None:
        """What writes the training of the cell of this id to TensorBoard, None unless that was asked for."""
        if self.tensorboard is None or not self.world.leads:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("--tensorboard needs the tensorboard package: pip install 'sbeval[tensorboard]'") from None
        folder = self.tensorboard / name
        try:
            writer = SummaryWriter(folder)
        except OSError as error:
            raise InputError(f"cannot write TensorBoard logs to {folder}: {error.strerror}") from None

        def log(step: int, numbers: dict[str, float]) -> None:
            for metric, value in numbers.items():
                writer.add_scalar(metric, value, step)
            writer.flush()

        return log


def _taken(lock: FileLock) -> bool:
    with storing(Path(lock.lock_file)):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
    return True
