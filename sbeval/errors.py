"""Errors that a user can fix: one line that names what was given and what is allowed."""

import dataclasses
import difflib
import math
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SEEDS = range(1 << 31)
# characters of a library's message that are shown
SHOWN = 300


class InputError(ValueError):
    """An invalid input of the user's. The command line prints its message and exits with code 2."""


class NothingToDraw(InputError):
    """A table without the rows that a figure is drawn from."""


def choose(kind: str, given: str, options: Iterable[str]) -> str:
    """Return `given` when it is one of `options`; otherwise raise InputError that offers the nearest.

    kind: a noun; what follows its ` of ` stands after the name: unknown option 'tetha' of attention 'rope'.
    """
    names = sorted(options)
    if given in names:
        return given
    nearest = difflib.get_close_matches(given[:SHOWN].replace("-", "_"), names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    noun, of, whole = kind.partition(" of ")
    raise InputError(f"unknown {noun} {shown(given)!r}{of}{whole}; {hint}known: {', '.join(names)}")


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
    rates = [*getattr(config, "lrs", ()), *([config.lr] if hasattr(config, "lr") else [])]
    if bad := [rate for rate in rates if not 0 < rate < math.inf]:
        raise InputError(f"a learning rate (--lr) must be above 0 and finite; got {bad[0]}")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
    """Return a library's error message as one short line; of an error of the system its words alone."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(str(words), SHOWN, placeholder=" ...")


def shown(text: str) -> str:
    """Return a text, cut where it is too long for a line."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@contextmanager
def reading(what: object, *kinds: type[BaseException]) -> Iterator[None]:
    """Convert what a file or stream from outside can raise while the block reads it, to an InputError that names it.

    These are errors of the system, an early end, text of another encoding, values of another kind, and `kinds`: those
    of the library that reads it.
    """
    raised: tuple[type[BaseException], ...] = (OSError, EOFError, ValueError, OverflowError, RecursionError, *kinds)
    try:
        yield
    except InputError:
        raise
    except raised as error:
        raise InputError(f"cannot read {what}: {reason(error)}") from None


@contextmanager
def valid(what: str) -> Iterator[None]:
    """Convert a ValueError that options of an own method or task raise in the block to an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{what}: {reason(error)}") from None


def spelled(name: str) -> str:
    """Return the name of a file as text: bytes that are not UTF-8 as in `caf\\xe9`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
