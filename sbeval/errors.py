"""Errors that a user can fix: one line that names what was given and what is allowed."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

SEEDS = range(1 << 31)


class InputError(ValueError):
    """An invalid input of the user's. The command line prints its message and exits with code 2."""


class NothingToDraw(InputError):
    """A table without the rows that a figure is drawn from."""


def choose(kind: str, given: str, options: Iterable[str]) -> str:
    """Return `given` when it is one of `options`; otherwise raise InputError that offers the nearest."""
    names = sorted(options)
    if given in names:
        return given
    nearest = difflib.get_close_matches(given.replace("-", "_"), names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise InputError(f"unknown {kind} {given!r}; {hint}known: {', '.join(names)}")


def check_swept(config: Any, *names: str) -> None:
    """Keep each value of a config's tuples once.

    Raise InputError when a field that it sweeps over is empty, or a seed or a learning rate is out of range.
    """
    for field in dataclasses.fields(config):
        if isinstance(value := getattr(config, field.name), tuple):
            # the class is frozen
            object.__setattr__(config, field.name, tuple(dict.fromkeys(value)))
    for name in names:
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give one or more")
    if wrong := [seed for seed in getattr(config, "seeds", ()) if seed not in SEEDS]:
        raise InputError(f"a seed (--seed) must be 0 to {SEEDS[-1]}; got {wrong[0]}")
    single = [getattr(config, name) for name in ("lr", "finetune_lr") if hasattr(config, name)]
    rates = [*getattr(config, "lrs", ()), *single]
    if bad := [rate for rate in rates if not 0 < rate < math.inf]:
        raise InputError(f"a learning rate must be above 0 and finite; got {bad[0]}")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
