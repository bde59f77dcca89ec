"""Losses of one model for `length_gen`: at every position of long windows, of fixed targets, of whole documents.

Heavy modules are imported in the functions that run, as in families.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbeval.tasks.length_gen_rows import (
    UNRELATED,
    Row,
    rows,
    target_rows,
    target_values,
    values,
    windowed_rows,
    windowed_values,
)
from sbeval.tasks.text_cell import Subject
from sbeval.training.text_model import LM_EVAL

if TYPE_CHECKING:
    import pandas as pd

    from sbeval.data.corpus import Corpus
    from sbeval.data.evaluation_text import Text
    from sbeval.data.tokenizer import Ids, Tokenizer
    from sbeval.evaluation.perplexity import Execution
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tables.statistics import Floats
    from sbeval.tasks.length_gen import Config

    # rows, and the values of each document that they are means of
    Measured = tuple[list[Row], list[pd.DataFrame]]

# tokens of evaluation windows in a forward pass
EVAL_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation of one model. title: of its cell, for the progress display."""

    config: "Config"
    title: str
    subject: Subject
    context: "RunContext"
    progress: "Progress"

    def by_position(self, text: "Corpus", windows: "list[tuple[int, Ids]]") -> "Iterator[Measured]":
        """Measure the loss at every position of long windows, and that of fixed targets by context length."""
        from sbeval.evaluation import perplexity

        config, subject = self.config, self.subject
        documents = [text.test.documents[index] for index in dict.fromkeys(index for index, _ in windows)]
        spelled = all(text.tokenizer.spells(tokens) for _, tokens in windows)
        with self._shown(f"to {config.eval_len}", len(windows), config.eval_len) as how:
            if not spelled:
                name = text.tokenizer.name
                how.say(f"no bits per byte by position: tokenizer {name!r} does not spell all of {text.name!r}")
            byte_lengths = text.tokenizer.byte_lengths if spelled else None
            losses = perplexity.measure(subject.model, windows, byte_lengths, how)
        yield rows(losses, subject.train_len), values(losses, subject.train_len, documents)
        if not (last := config.fixed_targets):
            return
        targets: dict[int, Floats] = {}
        for length in config.contexts[:-1]:
            with self._shown(f"on the last {last} tokens after {length}", len(windows), length) as how:
                targets[length] = perplexity.fixed_targets(subject.model, windows, how, targets=last, context=length)
        # measured already
        targets[config.eval_len] = losses.losses[:, -last:]
        yield target_rows(targets), target_values(targets, documents)
        unrelated: dict[int, Floats] = {}
        far = config.unrelated(subject.train_len) if len(documents) > 1 else ()
        for length in far:
            with self._shown(f"after {length} tokens, the furthest of other text", len(windows), length) as how:
                unrelated[length] = perplexity.fixed_targets(
                    subject.model, windows, how, targets=last, context=length, own=subject.train_len
                )
        if far:
            yield target_rows(unrelated, UNRELATED), target_values(unrelated, documents, UNRELATED)

    def in_windows(self, texts: "list[Text]") -> "Iterator[Measured]":
        """Measure the loss of whole documents in disjoint windows of every length."""
        from sbeval.evaluation import perplexity

        for text, length in itertools.product(texts, self.config.rolling):
            what = " ".join([*([text.name] if text.name else []), f"in windows of {length}"])
            with self._shown(what, sum(map(len, text.tokens)), length) as how:
                losses = perplexity.rolling(
                    self.subject.model, text.tokens, text.counted, how, window=length, prefix=text.prefix
                )
            yield windowed_rows(losses, length, text.name), windowed_values(losses, length, text.documents, text.name)

    @contextmanager
    def _shown(self, what: str, total: int, length: int) -> "Iterator[Execution]":
        """Show the progress of an evaluation of windows of `length` tokens; yield how it runs and reports."""
        from sbeval.evaluation.perplexity import Execution

        context = self.context
        task = self.progress.add(f"evaluate {self.title} {what}", total=total)
        yield Execution(
            place=context.device,
            dtype=self.config.dtype,
            world=context.world,
            batch=max(1, EVAL_TOKENS[context.device.type] // length),
            advance=task.advance,
            say=task.say,
        )
        task.close()


def long_windows(text: "Corpus", config: "Config") -> "list[tuple[int, Ids]]":
    """Return (document, tokens) of the evaluation windows, eval_len + 1 tokens each.

    Raise InputError when no document of the corpus is long enough.
    """
    windows = text.test.windows(config.eval_len + 1, per_document=config.windows)
    documents = list(dict.fromkeys(document for document, _ in windows))[: config.documents]
    return [
        (document, text.test.document(document)[start : start + config.eval_len + 1])
        for document, start in windows
        if document in documents
    ]


def whole_texts(text: "Corpus", config: "Config") -> "list[Text]":
    """Return the texts to evaluate in windows: the first test documents of the corpus, then those of other texts.

    Raise InputError when a text cannot be read.
    """
    from sbeval.data import evaluation_text
    from sbeval.data.evaluation_text import Text

    if not config.rolling:
        return []
    count = min(config.documents, len(text.test))
    tokens, prefix = [text.test.document(index) for index in range(count)], _prefix(text.tokenizer, config)
    own = Text(
        name="",
        prefix=prefix,
        documents=text.test.documents[:count],
        tokens=tokens,
        counted=_counted(text, tokens, config),
    )
    others = (evaluation_text.read(spec, config.text_field, text.tokenizer, prefix) for spec in config.eval_corpus)
    return [own, *others]


def _counted(text: "Corpus", tokens: "list[Ids]", config: "Config") -> list[str]:
    """Return the first test documents; the tokenizer has them unless it does not spell all of their tokens."""
    from sbeval.data import sources

    if all(map(text.tokenizer.spells, tokens)):
        return [text.tokenizer.decode(each) for each in tokens]
    documents = sources.source(config.corpus, config.text_field).documents("test")
    return [document.text for document in itertools.islice(documents, len(tokens))]


def _prefix(tokenizer: "Tokenizer", config: "Config") -> tuple[int, ...]:
    """Return the tokens before a document: BOS for models whose tokenizer puts it before a text, EOS for others.

    Our models have read EOS before each document, whatever their tokenizer.
    """
    from sbeval.pretrained import load

    ours = config.checkpoint is None or load.is_own(config.checkpoint)
    if ours or not tokenizer.prefix:
        return (tokenizer.eos,)
    return (tokenizer.prefix[-1], *(tokenizer.prefix if config.bos == LM_EVAL else ()))
