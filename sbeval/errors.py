"""Errors that a user can put right: one line that says what was given and what would do."""

import difflib
from collections.abc import Iterable

SEEDS = range(1 << 31)


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


def check_swept(config: object, *names: str) -> None:
    """InputError when a config has nothing of what it sweeps over, or a seed that is none."""
    for name in names:
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give one or more")
    if wrong := [seed for seed in getattr(config, "seeds", ()) if seed not in SEEDS]:
        raise InputError(f"a seed (--seed) must be 0 to {SEEDS[-1]}; got {wrong[0]}")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
