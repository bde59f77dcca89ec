"""Atomic writes and locks: a kill, a full disk or a second process cannot leave a partial file."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from sbeval.errors import InputError, reason

# names that `replacing` gives; other programs have `.tmp` files too
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Convert an error of the disk or the path while the block writes `path` to a one-line InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {reason(error)}; "
            "what is finished is kept: fix this and run the same command again to resume"
        ) from None


def prepare(folder: Path, what: str = "results folder", option: str = "--results-dir") -> Path:
    """Create a folder for output and return it; InputError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the {what} {folder}: {error.strerror}; give another with {option}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to the {what} {folder}; give another with {option}")
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which atomically replaces `path` at the end of the block, after fsync.

    On an error it is removed and `path` is unchanged; what a killed process leaves, `remove_left` removes. A link stays
    one: the file that it names is replaced. InputError on a disk error, and where `path` is a folder or a device.
    """
    with storing(path):
        path = Path(os.path.realpath(path))
        # a device such as /dev/null would become a file
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'not a file'}")
        with _temporary(path) as temporary:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Create a file beside `path`, locked while this process lives, and remove it at the end."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # some network disks have no locks: what is left there stays
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def remove_left(folder: Path) -> None:
    """Remove the temporary files of killed processes in a folder: those that no process holds locked."""
    for left in folder.glob(".*.tmp"):
        # another process may hold it, or remove it first
        with suppress(OSError):
            if TEMPORARY.fullmatch(left.name):
                with left.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()


def clear(path: Path) -> None:
    """Remove what is at `path`, if anything: a folder, a file, or a link, but not what it points to."""
    with storing(path):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, renamed to `folder` at the end of the block; on an error it is removed.

    `folder` must not exist, or be empty, and only one process at a time may create it.
    """
    partial = beside(folder, "partial")
    # left over from a killed process
    clear(partial)
    try:
        with storing(folder):
            partial.mkdir(parents=True)
        yield partial
        with storing(folder):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def readable_as_others(path: Path) -> None:
    """Give a file the mode of any new file of this process: a library may have kept it to its owner."""
    # the umask can only be read by setting it
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


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


def is_of_the_disk(error: BaseException) -> bool:
    """Return whether an error says that a disk is full or read-only, whatever a library was about to read."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def check_not_pointer(path: Path, head: bytes) -> None:
    """Raise InputError where a file, of which `head` is the beginning, is a pointer of Git LFS to the file itself."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise InputError(f"{path} is a pointer of Git LFS, not the file: git lfs pull fetches it")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
