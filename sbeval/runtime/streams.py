"""Standard output and error whatever they are: a terminal that is closed, a full disk, an encoding without signs."""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# what tables and lines use beyond ASCII, where the encoding of the terminal lacks it; other characters become `?`
SIGNS = {"±": "+-", "×": "x", "–": "-", "−": "-", "…": "...", "’": "'", "‘": "'", "“": '"', "”": '"', "≥": ">="}


@contextmanager
def guarded() -> Iterator[None]:
    """Write standard output and error through `_Stream` in the block, unless another object stands for one of them."""
    codecs.register_error("signs", _spelled)
    with contextlib.ExitStack() as stack:
        if sys.stdout is sys.__stdout__ and sys.stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(_guard(sys.stdout, "standard output")))
        if sys.stderr is sys.__stderr__ and sys.stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(_guard(sys.stderr, "standard error")))
        yield


def _guard(stream: TextIO, name: str) -> TextIO:
    stream.flush()
    raw = _Stream(stream.fileno(), name)
    # as in Python's own: lines are written at once to a terminal and to standard error
    at_once = stream.isatty() or name == "standard error"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors="signs", line_buffering=at_once)


class _Stream(io.FileIO):
    """A standard stream. A terminal that is gone takes all that is written; other errors name the stream."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._called = name

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]  # any buffer
        # a reader that has had enough, such as `head`, is no error
        except BrokenPipeError:
            raise
        except OSError as error:
            # nothing can be written here any more: what is buffered must not fail again when Python ends
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if error.errno == errno.EIO:
                return memoryview(data).nbytes  # type: ignore[arg-type]
            raise OSError(error.errno, error.strerror, self._called) from None


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "it is an error handler of output"
    return "".join(SIGNS.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
