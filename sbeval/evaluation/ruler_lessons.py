"""Lessons: prompts of RULER's tasks with their answers, of several lengths, packed into rows for fine-tuning.

A lesson with several needles asks for each of them, one question after the answer to another:

    [...] One of the special magic numbers for long-kayak is: 8231406. [...] One of the [...] for red-fox is: 1520973.
    What is the special magic number for red-fox [...] The special magic number for red-fox [...] is| 1520973
    What is the special magic number for long-kayak [...] The special magic number for long-kayak [...] is| 8231406

A row holds lessons of one length, its own or a half, a quarter and so on of it, which do not see each other:

    row 0   |                         2048                          |
    row 1   |           1024            |           1024            |
    row 2   |     512     |     512     |     512     |     512     |

The loss of a step is the mean over tokens of answers plus `rest` times the mean over all other tokens. Lessons are
drawn with replacement from a store, which the seed of the model does not change: methods and seeds share it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sbeval.config import IGNORE, digest_of
from sbeval.data.dataloader import WeightedBatch
from sbeval.data.tokenizer import Ids
from sbeval.errors import InputError
from sbeval.evaluation import ruler_tasks
from sbeval.evaluation.ruler_drafts import Sample, Setting
from sbeval.evaluation.ruler_prompts import FORMAT, GROUP, Writer, fit
from sbeval.runtime import seals
from sbeval.runtime.files import locked

# version of the lessons: raise it with any change of their text, their lengths or the order of their kinds
VERSION = 2
# the fewest tokens of a lesson
SHORTEST = 256
# tokens of a lesson for each needle in it, at least
PER_NEEDLE = 128
# the part of the steps in which all lessons have several needles, and the part of the lessons that have after it
MANY, KEPT = 0.5, 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lesson:
    """tokens: of the prompt, questions and answers, and the end; answered: whether each is of an answer, or the end."""

    tokens: Ids
    answered: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Kind:
    """Lessons of one kind: with so many needles where a task has them, and with words as values."""

    needles: int = 1
    words: bool = False


def kinds(needles: int) -> tuple[Kind, ...]:
    """Return the kinds of lessons in the order of a training: words, numbers, and prompts like those of the test."""
    return Kind(needles, words=True), Kind(needles), Kind()


def lengths(longest: int) -> list[int]:
    """Return the lengths of lessons: the longest, and its halves down to SHORTEST."""
    found = [longest]
    while found[-1] // 2 >= SHORTEST:
        found.append(found[-1] // 2)
    return found


def shares(step: int, steps: int) -> tuple[float, float, float]:
    """Return the share of each kind of lesson in a step.

    In the first half of the steps numbers take the place of words evenly; then half of the prompts are like those of
    the test. Not all are: with an eighth of the answers in a step, models lose tasks that they had learned.
    """
    done = step / max(1.0, MANY * steps)
    return (1 - done, done, 0.0) if done < 1 else (0.0, KEPT, 1 - KEPT)


def counts(total: int, tasks: Sequence[str], longest: int, needles: int) -> dict[tuple[str, int, Kind], int]:
    """Return how many lessons of each task, length and kind are stored, of about `total` in all.

    In proportion to how often they are drawn: half the length is drawn twice as often.
    """
    of_kind: dict[Kind, float] = {}
    often = MANY / 2, MANY / 2 + (1 - MANY) * KEPT, (1 - MANY) * (1 - KEPT)
    for kind, share in zip(kinds(needles), often, strict=True):
        # with one needle the last two kinds are the same
        of_kind[kind] = of_kind.get(kind, 0.0) + share
    levels = {length: 2**level for level, length in enumerate(lengths(longest))}
    unit = total / len(tasks) / sum(levels.values())
    found: dict[tuple[str, int, Kind], int] = {}
    for task in tasks:
        # the kinds of a task without needles are the same
        wanted = of_kind if ruler_tasks.TASKS[task].niah else {Kind(): 1.0}
        for length, often in levels.items():
            found |= {(task, length, kind): max(1, round(unit * often * share)) for kind, share in wanted.items()}
    return found


class Store:
    """The lessons of one writer, kept in its folder beside the prompts."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def lessons(
        self, task: str, length: int, kind: Kind, count: int, advance: Callable[[int], None] = lambda done: None
    ) -> list[Lesson]:
        """Return those of the first `count` lessons that fit in `length` tokens, with as many needles as fit."""
        path = self.path(task, length, kind, count)
        with locked(path):
            if seals.is_intact(path):
                advance(count)
                return _read(path)
            found: list[Lesson] = []
            for start in range(0, count, GROUP):
                group = range(start, min(start + GROUP, count))
                found += self._write(task, group, length, kind)
                advance(len(group))
            _keep(path, found)
        return found

    def path(self, task: str, length: int, kind: Kind, count: int) -> Path:
        """Return the file of these lessons, named by all that they depend on."""
        prompts = self.writer.path(task, length, 0, "train").stem
        name = f"lessons-{task}-{length}-{digest_of([FORMAT, VERSION, prompts, kind, count])}.npz"
        return self.writer.cache_dir / "needle" / name

    def _write(self, task: str, indices: Sequence[int], length: int, kind: Kind) -> list[Lesson]:
        setting = Setting(length=length, seed=0, tables=self.writer.tables, sources=self.writer.sources, use="train")
        needles = max(1, min(kind.needles, length // PER_NEEDLE)) if ruler_tasks.TASKS[task].niah else 1
        left, found = list(indices), dict[int, Lesson]()
        while left and needles:
            drafts = {i: ruler_tasks.lesson(task, i, setting, needles, words=kind.words) for i in left}
            least = self._encode([draft.write(draft.least) for draft in drafts.values()])
            # a lesson has its last token as a target only
            fits = [i for i, ids in zip(left, least, strict=True) if len(ids) <= length + 1]
            fitted = fit([drafts[i] for i in fits], length + 1, self._encode, _impossible)
            found |= zip(fits, self._lessons([sample for sample, _ in fitted]), strict=True)
            left, needles = [i for i in left if i not in found], needles // 2
        return [found[i] for i in sorted(found)]

    def _lessons(self, samples: Sequence[Sample]) -> list[Lesson]:
        return [
            Lesson(
                tokens=np.concatenate([ids for ids, _ in parts]),
                answered=np.concatenate([np.full(len(ids), answered) for ids, answered in parts]),
            )
            for parts in self._parts(samples)
        ]

    def _encode(self, samples: Sequence[Sample]) -> list[Ids]:
        return [np.concatenate([ids for ids, _ in parts]) for parts in self._parts(samples)]

    def _parts(self, samples: Sequence[Sample]) -> list[list[tuple[Ids, bool]]]:
        """Return the tokens of prompts, answers, further questions and the end, and whether they are to be answered."""
        text = self.writer.tokenizer
        end: tuple[Ids, bool] = (np.array([text.eos], dtype=text.dtype), True)
        prompts, answers = self.writer.encode(samples), self.writer.answers(samples)
        further = iter(text.encode_batch([one for item in samples for pair in item.further for one in pair]))
        found: list[list[tuple[Ids, bool]]] = []
        for sample, prompt, answer in zip(samples, prompts, answers, strict=True):
            more = [(next(further), answered) for _ in sample.further for answered in (False, True)]
            found.append([(prompt, False), (answer, True), *more, end])
        return found


def _impossible(least: int) -> InputError:
    raise AssertionError("a draft whose smallest sample fits has one that fits")


def _keep(path: Path, lessons: Sequence[Lesson]) -> None:
    empty = np.zeros(0)
    seals.keep_arrays(
        path,
        tokens=np.concatenate([lesson.tokens for lesson in lessons]) if lessons else empty,
        answered=np.concatenate([lesson.answered for lesson in lessons]) if lessons else empty,
        ends=np.cumsum([len(lesson.tokens) for lesson in lessons], dtype=np.int64),
    )


def _read(path: Path) -> list[Lesson]:
    with seals.arrays(path, "lessons") as stored:
        ends = stored["ends"]
        if not len(ends):
            return []
        tokens, answered = np.split(stored["tokens"], ends[:-1]), np.split(stored["answered"], ends[:-1])
    return [Lesson(tokens=ids, answered=mask) for ids, mask in zip(tokens, answered, strict=True)]


class LessonBatches:
    """Batches of `batch` rows of `length` tokens by step, the same for the same seed and step.

    stored: the lessons of each task, length and kind. All lengths are as likely, by rows, and so are all tasks that
    have lessons of a length. rest: weight of the loss on tokens that are not of answers.
    """

    def __init__(
        self,
        stored: Mapping[tuple[str, int, Kind], Sequence[Lesson]],
        needles: int,
        *,
        steps: int,
        batch: int,
        length: int,
        seed: int,
        eos: int,
        rest: float,
    ) -> None:
        self._steps, self._batch, self._length, self._seed = steps, batch, length, seed
        self._eos, self._rest = eos, rest
        self._pools = {
            (size, number): [
                found
                for task in dict.fromkeys(task for task, _, _ in stored)
                # a task without needles has one kind
                if (found := stored.get((task, size, kind), stored.get((task, size, Kind()), ())))
            ]
            for size in lengths(length)
            for number, kind in enumerate(kinds(needles))
        }
        # where no task has so short a lesson
        self._levels = [
            level
            for level, size in enumerate(lengths(length))
            if all(self._pools[size, number] for number in range(len(kinds(needles))))
        ]
        assert 0 in self._levels, "tasks that do not fit the training length are an error before"

    def __getitem__(self, step: int) -> WeightedBatch:
        generator = np.random.default_rng((self._seed, step))
        tokens = np.full((self._batch, self._length), self._eos, dtype=np.int64)
        targets = np.full_like(tokens, IGNORE)
        answered = np.zeros(tokens.shape, dtype=bool)
        bounds = []
        for row, level in enumerate(generator.choice(self._levels, self._batch)):
            size = lengths(self._length)[level]
            for start in range(0, (size << level), size):
                lesson = self._draw(generator, size, step)
                place = slice(start, start + len(lesson.tokens) - 1)
                tokens[row, place], targets[row, place] = lesson.tokens[:-1], lesson.tokens[1:]
                answered[row, place] = lesson.answered[1:]
                bounds.append(row * self._length + start)
        return WeightedBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            cu_seqlens=torch.tensor([*bounds, tokens.size], dtype=torch.int32),
            weights=torch.from_numpy(self._weights(answered, targets != IGNORE)),
        )

    def _draw(self, generator: np.random.Generator, size: int, step: int) -> Lesson:
        kind = generator.choice(3, p=shares(step, self._steps))
        pools = self._pools[size, int(kind)]
        pool = pools[int(generator.integers(len(pools)))]
        return pool[int(generator.integers(len(pool)))]

    def _weights(self, answered: npt.NDArray[np.bool_], scored: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        others = scored & ~answered
        return np.asarray(answered / answered.sum() + self._rest * others / max(1, others.sum()), dtype=np.float32)
