"""Prompts of RULER's tasks as tokens: the largest haystack that fits, found once and kept.

tokens(BOS if the tokenizer has one, prompt with the beginning of the answer) + tokens to generate <= length
"""

import functools
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbeval.config import digest_of
from sbeval.data.tokenizer import Ids, Tokenizer
from sbeval.errors import InputError, first_line
from sbeval.evaluation import ruler_tasks
from sbeval.evaluation.ruler_tasks import Draft, Sample, Setting
from sbeval.evaluation.ruler_texts import Sources, Tables
from sbeval.runtime.files import locked, replacing
from sbeval.tables.published import LONGEST

# changes with anything that makes other prompts
FORMAT = 2
# prompts that are encoded together
GROUP = 32
# tokens by which the number of a longer prompt is trusted to be too many
MARGIN = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """tokens: of the prompt; answer: what follows them when the model is right. See `ruler.Sample`."""

    tokens: Ids
    answer: Ids
    references: tuple[str, ...]
    depth: float | None


class Writer:
    """Writes the prompts of one tokenizer from one set of sources, and keeps them in cache_dir/needle/.

    prefix: ids that stand before each prompt, the BOS of models that have one.
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
        training: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Prompt]:
        """The first `count` prompts of a task at a length in tokens; InputError where the smallest does not fit."""
        path = self.path(task, length, seed, training)
        with locked(path):
            found = _read(path)
            if len(found) < count:
                found += self._write(task, range(len(found), count), length, seed, training, advance)
                _keep(path, found)
        return found[:count]

    def path(self, task: str, length: int, seed: int, training: bool = False) -> Path:
        """Where the prompts of a task are kept: named by all that they depend on."""
        niah, source = ruler_tasks.TASKS[task].niah, ruler_tasks.TASKS[task].source
        filled = source or ("essay" if niah is not None and niah.haystack == "essay" else "")
        key = [
            FORMAT,
            task,
            length,
            self.tokenizer.digest,
            self.prefix,
            seed,
            training,
            self.sources.digests.get(filled, ""),
        ]
        return self.cache_dir / "needle" / f"{task}-{length}-{digest_of(key)}.npz"

    def _write(
        self, task: str, indices: range, length: int, seed: int, training: bool, advance: Callable[[int], None]
    ) -> list[Prompt]:
        setting = Setting(length=length, seed=seed, tables=self.tables, sources=self.sources, training=training)
        found: list[Prompt] = []
        for start in range(0, len(indices), GROUP):
            group = indices[start : start + GROUP]
            drafts = [ruler_tasks.draft(task, index, setting) for index in group]
            budget = length - ruler_tasks.TASKS[task].new_tokens
            fitted = fit(drafts, budget, self._encode, functools.partial(_misfit, task, length, budget, training))
            samples = [sample for sample, _ in fitted]
            for one, (_, ids) in zip(drafts, fitted, strict=True):
                if one.largest is not None and budget - len(ids) > one.largest:
                    raise _underfilled(task, length, budget, training, len(ids))
            for (sample, ids), answer in zip(fitted, self._answers(samples), strict=True):
                found.append(Prompt(tokens=ids, answer=answer, references=sample.references, depth=sample.depth))
            advance(len(group))
        return found

    def _encode(self, samples: Sequence[Sample]) -> list[Ids]:
        """Tokens of each prompt: piece by piece where that is the same, and else of the whole text."""
        whole = [sample for sample in samples if not (self.tokenizer.cuts_at_spaces and _apart(sample))]
        texts = iter(self.tokenizer.encode_batch([sample.prompt for sample in whole]))
        front = np.array(self.prefix, dtype=self.tokenizer.dtype)
        return [
            np.concatenate([front, next(texts)] if sample in whole else [front, *(part.ids for part in sample.parts)])
            for sample in samples
        ]

    def _answers(self, samples: Sequence[Sample]) -> list[Ids]:
        """Tokens that follow a prompt's own: what is encoded beside its last line, where that leaves those as they
        are."""
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
    """Whether pieces of a prompt meet where white space begins: all but the first begin with it, none but the last ends
    with it."""
    parts = [part for part in sample.parts if len(part.indices)]
    begins = all(part.pieces.apart[0] for part in parts[1:])
    ends = all(part.pieces.apart[1] for part in parts[:-1])
    return begins and ends and all(all(part.pieces.apart) for part in parts if len(part.indices) > 1)


def fit(
    drafts: Sequence[Draft],
    budget: int,
    encode: Callable[[Sequence[Sample]], list[Ids]],
    misfit: Callable[[int], InputError],
) -> list[tuple[Sample, Ids]]:
    """For each draft the sample with the most haystack that has at most `budget` tokens, and those.

    A draft's own numbers, corrected by what its last text really had, say what to try; what is returned was counted,
    and so was the next larger one unless it is too long by more than MARGIN tokens.
    """
    # per draft: units that fit, units that do not, correction
    low, high = [draft.least - 1 for draft in drafts], [draft.most + 1 for draft in drafts]
    error = [0] * len(drafts)
    best: list[tuple[Sample, Ids] | None] = [None] * len(drafts)
    going = list(range(len(drafts)))
    while going:
        tries = [_next(drafts[i], budget - error[i], low[i], high[i]) for i in going]
        samples = [drafts[i].write(units) for i, units in zip(going, tries, strict=True)]
        found = encode(samples)
        for i, units, sample, ids in zip(going, tries, samples, found, strict=True):
            error[i] = len(ids) - drafts[i].tokens(units)
            if len(ids) <= budget:
                low[i], best[i] = units, (sample, ids)
            else:
                high[i] = units
                if units == drafts[i].least:
                    raise misfit(len(ids))
        going = [i for i in going if low[i] + 1 < high[i] and not _surely(drafts[i], low[i], budget - error[i])]
    return [pair for pair in best if pair is not None]


def _next(draft: Draft, budget: int, low: int, high: int) -> int:
    """Units to try, between those that fit and those that don't: as many as the draft's own numbers allow."""
    first, last = low + 1, high - 1
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if draft.tokens(middle) <= budget else (first, middle - 1)
    return first


def _surely(draft: Draft, fits: int, budget: int) -> bool:
    """Whether one unit more than what fits is too much by more than the numbers can be wrong."""
    return fits >= draft.least and draft.tokens(fits + 1) > budget + MARGIN


def _misfit(task: str, length: int, budget: int, training: bool, least: int) -> InputError:
    # other samples need a little more
    needed = -(-11 * (least + length - budget) // 1280) * 128
    more = f"give --length {needed} or more" if needed <= LONGEST else "leave it out or use another --tokenizer"
    if training:
        more = f"name others with --finetune-task, or train at --train-len {needed} or more"
    return InputError(
        f"{task} does not fit {length} tokens: its smallest prompt has {least}, and {length - budget} are generated; "
        f"{more}"
    )


def _underfilled(task: str, length: int, budget: int, training: bool, most: int) -> InputError:
    # other samples have a little less
    filled = 95 * (most + length - budget) // 12800 * 128
    fewer = f"give --length {filled} or less, or leave {task} out"
    if training:
        fewer = f"name others with --finetune-task, or train at --train-len {filled} or less"
    return InputError(
        f"{task} cannot fill {length} tokens: with every word it has, its prompt has {most}, and {length - budget} are "
        f"generated; {fewer}"
    )


def _keep(path: Path, prompts: Sequence[Prompt]) -> None:
    meta = json.dumps([(prompt.references, prompt.depth) for prompt in prompts]).encode()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            meta=np.frombuffer(meta, np.uint8),
            tokens=np.concatenate([prompt.tokens for prompt in prompts]),
            answers=np.concatenate([prompt.answer for prompt in prompts]),
            ends=np.cumsum([len(prompt.tokens) for prompt in prompts]),
            answer_ends=np.cumsum([len(prompt.answer) for prompt in prompts]),
        )


def _read(path: Path) -> list[Prompt]:
    if not path.exists():
        return []
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            tokens = np.split(stored["tokens"], stored["ends"][:-1])
            answers = np.split(stored["answers"], stored["answer_ends"][:-1])
            meta = json.loads(stored["meta"].tobytes())
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} can't be read: {first_line(error)}; remove it to write the prompts again") from None
    return [
        Prompt(tokens=ids, answer=answer, references=tuple(references), depth=depth)
        for ids, answer, (references, depth) in zip(tokens, answers, meta, strict=True)
    ]
