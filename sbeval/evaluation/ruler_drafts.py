"""What the tasks of RULER are written with: drafts of samples, and lm_eval's templates and wonderwords' words."""

import ast
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbeval.errors import InputError
from sbeval.evaluation.ruler_texts import Part, Sources, Tables

MISSING = "needle needs {} for the prompts of RULER: pip install 'sbeval[needle]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt, its reference answer, and the references that are searched in a completion. depth: per cent of the
    haystack before the queried needle; None where it is not a single one. further: of a lesson, more questions, each
    with its answer."""

    parts: Sequence[Part]
    answer: str
    references: tuple[str, ...]
    depth: float | None = None
    further: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample whose haystack is still open: `least` to `most` units.

    tokens: an estimate for so many units, whose error changes little from one number to the next. largest: maximum
    tokens of a unit, where it is an error that all units do not fill the length; else None.
    """

    least: int
    most: int
    tokens: Callable[[int], int]
    write: Callable[[int], Sample]
    largest: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The inputs of a draft. use: test, train or validation, which draw different samples; only in a test does the
    essay start at its beginning."""

    length: int
    seed: int
    tables: Tables
    sources: Sources
    use: str = "test"


@functools.cache
def templates(module: str) -> dict[str, Any]:
    """Return the literals at the top of a module of lm_eval's RULER; importing it would access the network."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(MISSING.format("lm_eval"))
    path = Path(spec.submodule_search_locations[0]) / "tasks" / "ruler" / f"{module}.py"
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; needle needs lm_eval 0.4.13 or later") from None
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return values


@functools.cache
def words(*kinds: str) -> list[str]:
    """Return the words of wonderwords of these kinds, sorted."""
    try:
        import wonderwords
    except ImportError:
        raise InputError(MISSING.format("wonderwords")) from None
    return sorted({word for kind in kinds for word in wonderwords.RandomWord().filter(include_categories=[kind])})
