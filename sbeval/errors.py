"""Errors that a user can put right: one line that says what was given and what would do."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints its message and exits with code 2."""


def choose(kind: str, given: str, options: Iterable[str]) -> str:
    """Return `given` when it is one of `options`; otherwise raise InputError that offers the nearest of them."""
    names = sorted(options)
    if given in names:
        return given
    near = difflib.get_close_matches(given.replace("-", "_"), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown {kind} {given!r}; {hint}known: {', '.join(names)}")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
