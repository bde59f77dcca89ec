"""Errors of the user's, and of the outside, are one line that names what was given or read, and what is allowed."""

import dataclasses
import errno
import lzma
from pathlib import Path
from typing import Any

import pytest

from sbeval.errors import SEEDS, SHOWN, InputError, check_swept, choose, first_line, reading, reason, shown, spelled

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


def test_the_nearest_name_is_offered() -> None:
    assert choose("fruit", "pear", ("apple", "pear")) == "pear"
    with pytest.raises(InputError, match=r"^unknown fruit 'paer'; did you mean 'pear'\? known: apple, pear$"):
        choose("fruit", "paer", ("pear", "apple"))
    with pytest.raises(InputError, match=r"^unknown fruit 'xyz'; known: apple$"):
        choose("fruit", "xyz", ("apple",))
    # as the command line spells it
    with pytest.raises(InputError, match="did you mean 'flip_flop'"):
        choose("task", "flip-flop", ("flip_flop", "mqrar"))


def config(**fields: Any) -> Any:
    return dataclasses.make_dataclass("Config", list(fields), frozen=True)(**fields)


def test_swept_options_have_a_value_and_seeds_are_in_range() -> None:
    swept = config(lrs=(1.0, 2.0, 1.0), seeds=(0, SEEDS[-1]))
    check_swept(swept, "lrs", "seeds")
    assert swept.lrs == (1.0, 2.0), "each once"
    with pytest.raises(InputError, match="lrs is empty: give one or more"):
        check_swept(config(lrs=()), "lrs")
    for seed in (-1, 1 << 31):
        with pytest.raises(InputError, match=rf"a seed \(--seed\) must be 0 to 2147483647; got {seed}"):
            check_swept(config(seeds=(0, seed)))


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(ValueError("\none\ntwo")) == "one" and first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
