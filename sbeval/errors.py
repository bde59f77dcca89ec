"""Errors that a user can fix: one line that names what was given and what is allowed."""

import difflib
from collections.abc import Iterable

SEEDS = range(1 << 31)


class InputError(ValueError):
    """An invalid input of the user's. The command line prints its message and exits with code 2."""


def choose(kind: str, given: str, options: Iterable[str]) -> str:
    """Return `given` when it is one of `options`; otherwise raise InputError that offers the nearest."""
    names = sorted(options)
    if given in names:
        return given
    nearest = difflib.get_close_matches(given.replace("-", "_"), names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise InputError(f"unknown {kind} {given!r}; {hint}known: {', '.join(names)}")


def check_swept(config: object, *names: str) -> None:
    """Raise InputError when a field that a config sweeps over is empty, or a seed is out of range."""
    for name in names:
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give one or more")
    if wrong := [seed for seed in getattr(config, "seeds", ()) if seed not in SEEDS]:
        raise InputError(f"a seed (--seed) must be 0 to {SEEDS[-1]}; got {wrong[0]}")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
