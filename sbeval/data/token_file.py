"""Tokens in a file of NumPy's format, read where they are asked for, so that a corpus need not fit in memory.

They are copied from the open file, not mapped: a file that is cut while it is mapped ends the process with SIGBUS, and
one that is overwritten gives other tokens without a word. Here both are errors.
"""

import os
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from sbeval.data.tokenizer import Ids
from sbeval.errors import InputError, reading


class Tokens(Protocol):
    """A stream of tokens: an array, or a `TokenFile`."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Ids: ...


class TokenFile:
    """The tokens of a file, (n,) uint16 or uint32. A file that is replaced or removed can still be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with reading(path), path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            assert version == (1, 0), "as `corpus` writes it"
            (self._length,), _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._first = file.tell()
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._opened = self._state()

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        # the descriptor is of this process
        return TokenFile, (self._path,)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice, /) -> Ids:
        """Return the tokens of a slice without a step; InputError when the file is no longer as it was opened."""
        start, stop, step = part.indices(self._length)
        assert step == 1
        tokens: Ids = np.empty(max(0, stop - start), self.dtype)
        missing, place = tokens.view(np.uint8), self._first + start * self.dtype.itemsize
        with reading(self._path):
            # one call of the system copies two gigabytes at most
            while len(missing) and (copied := os.preadv(self._descriptor, [missing.data], place)):
                missing, place = missing[copied:], place + copied
        if len(missing) or self._state() != self._opened:
            raise InputError(f"{self._path} was changed while it was in use: run the same command again to resume")
        return tokens

    def _state(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns
