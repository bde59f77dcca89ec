"""Atomic writes and locks: a kill, a full disk or a second process cannot leave a partial file."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from sbeval.errors import InputError, first_line

# disk full, read-only, not permitted or broken; libraries that wrap such errors give no number
STORAGE = (None, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Convert a disk error while the block writes `path` to a one-line InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        raise InputError(
            f"cannot write {path}: {error.strerror or first_line(error)}; "
            "what is finished is kept: fix this and run the same command again to resume"
        ) from None


def prepare(results_dir: Path) -> Path:
    """Create the results folder and return it; InputError if it cannot be created or written to."""
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the results folder {results_dir}: {error.strerror}") from None
    if not os.access(results_dir, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to the results folder {results_dir}; give another with --results-dir")
    return results_dir


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which atomically replaces `path` at the end of the block, after fsync.

    On an error it is removed and `path` is unchanged. InputError on a disk error.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    with storing(path):
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, renamed to `folder` at the end of the block; on an error it is removed.

    `folder` must not exist, or be empty, and only one process at a time may create it.
    """
    partial = beside(folder, "partial")
    # left over from a killed process
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with storing(folder):
            partial.mkdir(parents=True)
        yield partial
        with storing(folder):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path` in the block; its folder is created. InputError on a disk error."""
    lock = FileLock(f"{path}.lock")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def beside(folder: Path, ending: str) -> Path:
    """Return a hidden path beside a folder, which may be `.`: its name and an ending."""
    whole = Path(os.path.abspath(folder))
    return whole.with_name(f".{whole.name}.{ending}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
