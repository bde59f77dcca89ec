"""Errors of the outside become one line that names what was read."""

import errno
import lzma
from pathlib import Path

import pytest

from sbeval.errors import SHOWN, InputError, choose, reading, reason, shown, spelled

RAISED = (
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (EOFError("ended early"), "ended early"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
    (ValueError("two\n  lines"), "two lines"),
    (lzma.LZMAError("corrupt"), "corrupt"),
    (RecursionError(), "RecursionError"),
)


@pytest.mark.parametrize(("error", "words"), RAISED, ids=[type(error).__name__ for error, _ in RAISED])
def test_what_reading_raises_is_one_line_with_the_path(error: Exception, words: str) -> None:
    with (
        pytest.raises(InputError, match=f"^cannot read some/path: .*{words}") as caught,
        reading(Path("some/path"), lzma.LZMAError),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_our_own_errors_pass() -> None:
    with pytest.raises(InputError, match="^as it is$"), reading("a path"):
        raise InputError("as it is")
    with pytest.raises(lzma.LZMAError), reading("a path"):
        raise lzma.LZMAError
    with pytest.raises(TypeError), reading("a path"):
        raise TypeError


def test_long_words_are_cut() -> None:
    assert len(reason(ValueError("word " * 1000))) <= SHOWN
    assert shown("x" * 1000) == "x" * SHOWN + "..." and shown("x") == "x"
    with pytest.raises(InputError) as caught:
        choose("size", "x" * 1_000_000, ["a", "b"])
    assert len(str(caught.value)) < 2 * SHOWN


def test_names_that_are_not_utf8_are_text() -> None:
    assert spelled(b"caf\xe9".decode(errors="surrogateescape")) == "caf\\xe9" and spelled("caf\xe9") == "caf\xe9"
