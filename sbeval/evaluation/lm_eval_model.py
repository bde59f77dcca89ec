"""A model behind lm-eval's interface: log-likelihoods of continuations and of whole documents, greedy generation.

The numbers are those of lm-eval's own `HFLM` in float32 (a test compares them), with less memory:

- Rows are padded on the right, after all scored positions, and sorted by length: batching changes no number beyond
  rounding. Models whose numbers depend on a row's length, padding included, get rows of one length. The head runs at
  scored positions alone, in float32 and in chunks: no (B, T, vocabulary) tensor.
- Inputs longer than `length` lose their beginning, as in lm-eval; `cut` counts them. A continuation that is longer by
  itself is an error. Whole documents are scored in lm-eval's disjoint windows of `length` tokens, after one BOS: HFLM
  0.4.13 has two where a tokenizer adds one, and scores the second (`bos_twice`).
- Where one token spans the end of a context and its whole continuation, lm-eval stops at an assertion. As its
  maintainers advise (https://github.com/EleutherAI/lm-evaluation-harness/issues/1053), the two are encoded apart, which
  `apart` counts.
- Equal inputs of all tasks are run once, and every response is stored at once (`sbeval.evaluation.response_cache`).

Nothing is registered with lm-eval: its registry fills itself only while it is empty, and would lack its own models.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol, cast

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from sbeval.data.tokenizer import Tokenizer
from sbeval.errors import InputError
from sbeval.evaluation import perplexity
from sbeval.evaluation.perplexity import Predictor
from sbeval.evaluation.response_cache import Answers, key
from sbeval.generate import Generator, generate
from sbeval.runtime import oom
from sbeval.runtime.progress import Bar, Silent

# rows are padded to multiples of this, so that kernels are compiled for few shapes
PAD = 16
# maximum rows of a batch, however short
ROWS = 1024
# prompts of a batch in generation
GENERATED = 16
# default number of tokens to generate, as in lm-eval
NEW_TOKENS = 256

Pair = tuple[Sequence[int], Sequence[int]]
Score = tuple[float, bool]


class Text(Protocol):
    """A tokenizer. `prefix` is the context of a text without one, `eos` ends a text."""

    eos: int
    prefix: int

    def encode(self, text: str, special: bool | None) -> list[int]:
        """Return the tokens of a text. special: whether to add the tokenizer's special tokens, such as BOS; None is its
        default."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""

    def spelling(self, token: int) -> str:
        """Return the text of a special token."""


class PlainText:
    """A tokenizer of ours, which adds no special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.eos, self.prefix = tokenizer, tokenizer.eos, tokenizer.eos

    def encode(self, text: str, special: bool | None) -> list[int]:
        return [int(x) for x in self.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def spelling(self, token: int) -> str:
        return self.tokenizer.decode([token])


class HubText:
    """A tokenizer of transformers, with its special tokens, as lm-eval uses it. vocab_size: of its model, if known."""

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no eos token, which must end a text")
        self.tokenizer, self.vocab_size, self.eos = tokenizer, vocab_size, int(tokenizer.eos_token_id)
        self.prefix = self.eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self._after = _after(tokenizer)

    def encode(self, text: str, special: bool | None) -> list[int]:
        if special is None:
            # no second BOS for a prompt that begins with one
            special = not text.startswith(self.spelling(self.prefix))
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        if self.vocab_size is not None and (largest := max(tokens, default=0)) >= self.vocab_size:
            raise InputError(
                f"tokenizer {self.tokenizer.name_or_path!r} has token {largest} "
                f"({self.spelling(largest)!r}) in a text, and its model knows {self.vocab_size}: they do not fit"
            )
        # a context has not ended, and what ends a continuation is not scored
        return tokens[: -len(self._after)] if special and self._after else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def spelling(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _after(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts after a text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return list(whole[next(starts, len(whole)) + len(plain) :])


class Adapter(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """See the module. length: maximum input tokens of the model. batch_tokens: tokens of a forward pass, padding
    included. begin: makes a progress bar for a number of requests and of those that are stored. bos_twice: whether a
    tokenizer's own BOS follows that before a whole document."""

    def __init__(
        self,
        model: Predictor,
        text: Text,
        *,
        length: int,
        place: torch.device,
        dtype: str,
        batch_tokens: int,
        answers: Answers | None = None,
        begin: Callable[[int, int], Bar] = Silent,
        bos_twice: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.text, self.length, self.place, self.dtype = model, text, length, place, dtype
        self.batch_tokens, self.answers, self.begin = batch_tokens, answers or Answers(), begin
        self.bos_twice, self.generated = bos_twice, GENERATED
        self.cut = self.apart = 0

    @property
    def eot_token_id(self) -> int:
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        return self.text.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string, add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """Return the log-likelihood in nats of each continuation, and whether greedy decoding would produce it."""
        if empty := [context for context, continuation in (request.args for request in requests) if not continuation]:
            raise InputError(f"a continuation of {empty[0][-40:]!r} is empty: there is nothing to score")
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Score]:
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        first, second = super()._encode_pair(context, continuation)
        if not second:
            self.apart += 1
            # its spaces belong to the continuation, as in lm-eval
            spaces = context[len(context.rstrip()) :]
            second = self.tok_encode(spaces + continuation, add_special_tokens=False)
        return first, second

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood in nats of each text, every token scored once."""
        special = None if self.bos_twice else False
        texts = [np.array(self.tok_encode(request.args[0], special), dtype=np.int64) for request in requests]
        windows = [
            (index, (part[:-count].tolist(), part[-count:].tolist()))
            for index, tokens in enumerate(texts)
            for part, count in perplexity.disjoint(tokens, self.length, self.prefix_token_id)
        ]
        totals = [0.0] * len(requests)
        # windows fit into length: nothing is cut
        for (index, _), (score, _) in zip(windows, self._scored([pair for _, pair in windows]), strict=True):
            totals[index] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy continuation of each context, up to the first of its stop sequences."""
        prompts = [self._prompt(*request.args) for request in requests]
        keys = [key(f"generate {new} until {until}", prompt) for prompt, new, until in prompts]
        known = self.answers.find(set(keys))
        bar = self.begin(len(keys), sum(one in known for one in keys))
        counts = Counter(keys)
        todo = {one: prompt for one, prompt in zip(keys, prompts, strict=True) if one not in known}

        def keep(answers: dict[bytes, Any]) -> None:
            self.answers.keep(answers)
            known.update(answers)
            bar.advance(sum(counts[one] for one in answers))

        order = sorted(todo, key=lambda one: (todo[one][1:], len(todo[one][0])))
        for (new, until), group in groupby(order, key=lambda one: todo[one][1:]):

            def complete(batch: Sequence[bytes], new: int = new, until: tuple[str, ...] = until) -> None:
                texts = self._generated([todo[one][0] for one in batch], new, until)
                keep(dict(zip(batch, texts, strict=True)))

            self.generated = oom.in_parts(list(group), self.generated, complete, bar.say)
        bar.close()
        return [str(known[one]) for one in keys]

    def _prompt(self, context: str, options: dict[str, Any]) -> tuple[Sequence[int], int, tuple[str, ...]]:
        """Return the tokens of a prompt, the number to generate, and the stop sequences."""
        options = normalize_gen_kwargs(options, NEW_TOKENS)
        if options.get("do_sample"):
            raise InputError("the task requests sampled completions: only greedy decoding is supported")
        new = int(options["max_gen_toks"])
        if new >= self.length:
            raise InputError(
                f"the task generates {new} tokens, and the model's input is {self.length}: give a larger --eval-len"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(tokens) > self.length - new
        eos = self.text.spelling(self.eot_token_id)
        return tokens[-(self.length - new) :], new, tuple(handle_stop_sequences(options["until"], eos=eos))

    def _generated(self, prompts: Sequence[Sequence[int]], new: int, until: tuple[str, ...]) -> list[str]:
        def stop(tokens: Sequence[int]) -> bool:
            return tokens[-1] == self.eot_token_id or any(one in self.text.decode(tokens) for one in until if one)

        model = cast(Generator, self.model)
        generated = generate(model, prompts, new, self.place, dtype=self.dtype, stop=stop, batch=len(prompts))
        texts = [self.text.decode([token for token in tokens if token != self.eot_token_id]) for tokens in generated]
        return [str(postprocess_generated_text(text, list(until), None)) for text in texts]

    def _scored(self, pairs: Sequence[Pair]) -> list[Score]:
        rows = [self._row(*pair) for pair in pairs]
        keys = [key(f"score the last {count}", row) for row, count in rows]
        known = self.answers.find(set(keys))
        bar = self.begin(len(keys), sum(one in known for one in keys))
        # requests with the same input share a row, whatever they score of it
        inputs: defaultdict[tuple[int, ...], dict[bytes, tuple[Sequence[int], int]]] = defaultdict(dict)
        for one, (row, count) in zip(keys, rows, strict=True):
            if one not in known:
                inputs[tuple(row[:-1])][one] = (row, count)
        counts = Counter(keys)

        def score(batch: Sequence[tuple[int, ...]]) -> None:
            wanted = [(index, one, *part) for index, row in enumerate(batch) for one, part in inputs[row].items()]
            scores = self._forward(batch, [(index, row[-count:]) for index, _, row, count in wanted])
            answers = {one: score for (_, one, _, _), score in zip(wanted, scores, strict=True)}
            self.answers.keep(answers)
            known.update(answers)
            bar.advance(sum(counts[one] for one in answers))

        self._score_all(sorted(inputs, key=lambda row: (-len(row), row)), score, bar.say)
        bar.close()
        return [(float(known[one][0]), bool(known[one][1])) for one in keys]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], int]:
        """Return the tokens of a request and how many at the end are scored; the very last one is not an input."""
        count = len(continuation)
        if not count:
            raise InputError("a continuation has no tokens: there is nothing to score")
        if count > self.length:
            raise InputError(
                f"a continuation has {count} tokens, and the model's input is {self.length}: give a larger --eval-len"
            )
        row = [*context, *continuation]
        self.cut += len(row) > self.length + 1
        return row[-(self.length + 1) :], count

    def _score_all(
        self,
        rows: Sequence[tuple[int, ...]],
        score: Callable[[Sequence[tuple[int, ...]]], None],
        say: Callable[[str], None],
    ) -> None:
        """Pass rows, longest first, to `score` in batches of at most batch_tokens, halved when out of memory."""
        start = 0
        while start < len(rows):
            longest = len(rows[start])
            padded = self._padded(longest)
            batch = rows[start : start + min(ROWS, max(1, self.batch_tokens // padded))]
            if self.model.by_length:
                batch = [row for row in batch if len(row) == longest]
            fitted = oom.in_parts(batch, len(batch), score, say)
            if fitted < len(batch):
                self.batch_tokens = padded * fitted
            start += len(batch)

    def _padded(self, length: int) -> int:
        if self.model.by_length:
            return length
        # a table of positions may have only `length` rows
        return min(-(-length // PAD) * PAD, max(self.length, length))

    def _forward(self, rows: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, Sequence[int]]]) -> list[Score]:
        """Return the scores of (row, targets): the targets follow the row's last tokens."""
        width = self._padded(len(rows[0]))
        return perplexity.endings(self.model, rows, wanted, place=self.place, dtype=self.dtype, width=width)
