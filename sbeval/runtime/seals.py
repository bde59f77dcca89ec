"""Seals of cached files: the SHA-256 of a file, in a file beside it. What does not fit its seal is made again."""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbeval.errors import InputError, first_line
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


def keep_arrays(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write arrays as a sealed npz file, which `arrays` reads."""
    # in memory first: on a disk that fills, zipfile hides why
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]  # its only keyword of another type is allow_pickle
    with replacing(path) as temporary:
        temporary.write_bytes(packed.getbuffer())
        seal(path, temporary)


@contextmanager
def arrays(path: Path, contents: str) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
    """Yield the arrays of a file by name; InputError if the file, or what the block takes from it, cannot be read.

    contents: what is written again where the file is removed, such as `prompts`.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            yield stored
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} can't be read: {first_line(error)}; remove it to write the {contents} again"
        ) from None


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
