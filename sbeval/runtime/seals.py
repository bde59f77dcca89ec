"""Seals of cached files: the SHA-256 of a file, in a file beside it. What does not fit its seal is made again."""

from collections.abc import Callable
from pathlib import Path

from sbeval.runtime.files import replacing, sha256


def seal(path: Path, written: Path) -> None:
    """Write the seal of `path`, which `written` is about to replace."""
    with replacing(_seal(path)) as temporary:
        temporary.write_text(sha256(written) + "\n", encoding="utf-8")


def is_intact(path: Path, say: Callable[[str], None] = print) -> bool:
    """Return whether a sealed file exists and is as it was written; `say` names one that is not."""
    if not path.exists():
        return False
    seal = _seal(path)
    if not seal.is_file():
        say(f"{path} has no digest beside it, and is made again")
        return False
    # bytes: a damaged seal need not be text
    if path.is_file() and seal.read_bytes() == f"{sha256(path)}\n".encode():
        return True
    say(f"{path} is not as it was written, and is made again")
    return False


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
