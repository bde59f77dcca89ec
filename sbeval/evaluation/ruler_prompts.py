"""Prompts of RULER's tasks as tokens, with the largest haystack that fits, cached on disk.

tokens(BOS if the tokenizer has one, prompt with the beginning of the answer) + tokens to generate <= length
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbeval.config import digest_of
from sbeval.data.tokenizer import Ids, Tokenizer
from sbeval.errors import InputError
from sbeval.evaluation import ruler_tasks
from sbeval.evaluation.ruler_drafts import Draft, Sample, Setting
from sbeval.evaluation.ruler_texts import Sources, Tables
from sbeval.runtime import seals
from sbeval.runtime.files import locked
from sbeval.tables.published import LONGEST

# version of the prompts: raise it with any change of their text
FORMAT = 2
# prompts encoded together
GROUP = 32
# a prompt estimated to be longer than the budget by more tokens is not encoded
MARGIN = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """tokens: of the prompt; answer: those of the reference. See `ruler_drafts.Sample`."""

    tokens: Ids
    answer: Ids
    references: tuple[str, ...]
    depth: float | None


class Writer:
    """Writes the prompts of one tokenizer from one set of sources, and caches them in cache_dir/needle/.

    prefix: ids before each prompt, the BOS of models that have one.
    """

    def __init__(self, tokenizer: Tokenizer, sources: Sources, cache_dir: Path, prefix: tuple[int, ...] = ()) -> None:
        self.tokenizer, self.sources, self.cache_dir, self.prefix = tokenizer, sources, cache_dir, prefix
        self.tables = Tables(tokenizer)

    def prompts(
        self,
        task: str,
        length: int,
        seed: int,
        count: int,
        *,
        use: str = "test",
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Prompt]:
        """Return the first `count` prompts of a task at a length; raise InputError where the smallest does not fit.

        use: see `ruler_drafts.Setting`.
        """
        path = self.path(task, length, seed, use)
        with locked(path):
            prompts = _read(path) if seals.is_intact(path) else []
            if len(prompts) < count:
                prompts += self._write(task, range(len(prompts), count), length, seed, use, advance)
                _store(path, prompts)
        return prompts[:count]

    def path(self, task: str, length: int, seed: int, use: str = "test") -> Path:
        """Return the cache file of a task's prompts, named by all that they depend on."""
        niah, source = ruler_tasks.TASKS[task].niah, ruler_tasks.TASKS[task].source
        filled = source or ("essay" if niah is not None and niah.haystack == "essay" else "")
        key = [
            FORMAT,
            task,
            length,
            self.tokenizer.digest,
            self.prefix,
            seed,
            use,
            self.sources.digests.get(filled, ""),
        ]
        return self.cache_dir / "needle" / f"{task}-{length}-{digest_of(key)}.npz"

    def _write(
        self, task: str, indices: range, length: int, seed: int, use: str, advance: Callable[[int], None]
    ) -> list[Prompt]:
        setting = Setting(length=length, seed=seed, tables=self.tables, sources=self.sources, use=use)
        training = use != "test"
        prompts: list[Prompt] = []
        for start in range(0, len(indices), GROUP):
            group = indices[start : start + GROUP]
            drafts = [ruler_tasks.draft(task, index, setting) for index in group]
            budget = length - ruler_tasks.TASKS[task].new_tokens
            fitted = fit(drafts, budget, self.encode, functools.partial(_too_long, task, length, budget, training))
            samples = [sample for sample, _ in fitted]
            for one, (_, ids) in zip(drafts, fitted, strict=True):
                if one.largest is not None and budget - len(ids) > one.largest:
                    raise _underfilled(task, length, budget, training, len(ids))
            for (sample, ids), answer in zip(fitted, self.answers(samples), strict=True):
                prompts.append(Prompt(tokens=ids, answer=answer, references=sample.references, depth=sample.depth))
            advance(len(group))
        return prompts

    def encode(self, samples: Sequence[Sample]) -> list[Ids]:
        """Return the tokens of each prompt: encoded by piece where that is equivalent, else as a whole."""
        whole = [sample for sample in samples if not (self.tokenizer.cuts_at_spaces and _apart(sample))]
        texts = iter(self.tokenizer.encode_batch([sample.prompt for sample in whole]))
        front = np.array(self.prefix, dtype=self.tokenizer.dtype)
        return [
            np.concatenate([front, next(texts)] if sample in whole else [front, *(part.ids for part in sample.parts)])
            for sample in samples
        ]

    def answers(self, samples: Sequence[Sample]) -> list[Ids]:
        """Return the tokens of each answer: as encoded after the prompt's last line, unless that changes the line's."""
        ends = [sample.parts[-1].text for sample in samples]
        tails = [end[end.rstrip().rfind("\n") + 1 :] for end in ends]
        pairs = zip(tails, samples, strict=True)
        alone = self.tokenizer.encode_batch(tails)
        both = self.tokenizer.encode_batch([tail + sample.answer for tail, sample in pairs])
        apart = self.tokenizer.encode_batch([sample.answer for sample in samples])
        return [
            full[len(tail) :] if np.array_equal(full[: len(tail)], tail) else answer
            for tail, full, answer in zip(alone, both, apart, strict=True)
        ]


def _apart(sample: Sample) -> bool:
    """Return whether pieces of a prompt meet at white space: all but the first begin with it, all but the last end
    without it."""
    parts = [part for part in sample.parts if len(part.indices)]
    begins = all(part.pieces.apart[0] for part in parts[1:])
    ends = all(part.pieces.apart[1] for part in parts[:-1])
    return begins and ends and all(all(part.pieces.apart) for part in parts if len(part.indices) > 1)


def fit(
    drafts: Sequence[Draft],
    budget: int,
    encode: Callable[[Sequence[Sample]], list[Ids]],
    too_long: Callable[[int], InputError],
) -> list[tuple[Sample, Ids]]:
    """Return for each draft the sample with the most haystack of at most `budget` tokens, and its tokens.

    A binary search over the draft's estimates, corrected by the error of the last one. The returned sample was encoded,
    and so was the next larger one, unless its estimate exceeds the budget by more than MARGIN tokens.
    """
    # per draft: units that fit, units that do not, correction of the estimate
    low, high = [draft.least - 1 for draft in drafts], [draft.most + 1 for draft in drafts]
    error = [0] * len(drafts)
    best: list[tuple[Sample, Ids] | None] = [None] * len(drafts)
    open_ = list(range(len(drafts)))
    while open_:
        tries = [_next(drafts[i], budget - error[i], low[i], high[i]) for i in open_]
        samples = [drafts[i].write(units) for i, units in zip(open_, tries, strict=True)]
        encoded = encode(samples)
        for i, units, sample, ids in zip(open_, tries, samples, encoded, strict=True):
            error[i] = len(ids) - drafts[i].tokens(units)
            if len(ids) <= budget:
                low[i], best[i] = units, (sample, ids)
            else:
                high[i] = units
                if units == drafts[i].least:
                    raise too_long(len(ids))
        open_ = [i for i in open_ if low[i] + 1 < high[i] and not _fitted(drafts[i], low[i], budget - error[i])]
    return [pair for pair in best if pair is not None]


def _next(draft: Draft, budget: int, low: int, high: int) -> int:
    """Return the units to try: the most, between `low` and `high`, whose estimate is within the budget."""
    first, last = low + 1, high - 1
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if draft.tokens(middle) <= budget else (first, middle - 1)
    return first


def _fitted(draft: Draft, fits: int, budget: int) -> bool:
    """Return whether the estimate of one more unit exceeds the budget by more than its error can be."""
    return fits >= draft.least and draft.tokens(fits + 1) > budget + MARGIN


def _too_long(task: str, length: int, budget: int, training: bool, least: int) -> InputError:
    # other samples may need a little more
    needed = -(-11 * (least + length - budget) // 1280) * 128
    more = f"give --length {needed} or more" if needed <= LONGEST else "leave it out or use another --tokenizer"
    if training:
        more = f"name others with --finetune-task, or train at --train-len {needed} or more"
    return InputError(
        f"{task} does not fit {length} tokens: its smallest prompt has {least}, and {length - budget} are generated; "
        f"{more}"
    )


def _underfilled(task: str, length: int, budget: int, training: bool, most: int) -> InputError:
    # other samples may have a little less
    filled = 95 * (most + length - budget) // 12800 * 128
    fewer = f"give --length {filled} or less, or leave {task} out"
    if training:
        fewer = f"name others with --finetune-task, or train at --train-len {filled} or less"
    return InputError(
        f"{task} cannot fill {length} tokens: with all of its words its prompt has {most}, and {length - budget} are "
        f"generated; {fewer}"
    )


def _store(path: Path, prompts: Sequence[Prompt]) -> None:
    meta = json.dumps([(prompt.references, prompt.depth) for prompt in prompts]).encode()
    seals.keep_arrays(
        path,
        meta=np.frombuffer(meta, np.uint8),
        tokens=np.concatenate([prompt.tokens for prompt in prompts]),
        answers=np.concatenate([prompt.answer for prompt in prompts]),
        ends=np.cumsum([len(prompt.tokens) for prompt in prompts]),
        answer_ends=np.cumsum([len(prompt.answer) for prompt in prompts]),
    )


def _read(path: Path) -> list[Prompt]:
    with seals.arrays(path, "prompts") as stored:
        tokens = np.split(stored["tokens"], stored["ends"][:-1])
        answers = np.split(stored["answers"], stored["answer_ends"][:-1])
        meta = json.loads(stored["meta"].tobytes())
    return [
        Prompt(tokens=ids, answer=answer, references=tuple(references), depth=depth)
        for ids, answer, (references, depth) in zip(tokens, answers, meta, strict=True)
    ]
