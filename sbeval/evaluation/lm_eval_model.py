"""A model as lm-eval sees one: log-likelihoods of continuations and of whole documents, and greedy generation.

The numbers are those of lm-eval's own `HFLM` in float32 (a test compares them), with less memory and fewer surprises:

- Rows are padded on the right, in the future of what is scored, and sorted by length: a batch changes no number beyond
  rounding. The head runs at scored positions alone, some at a time and in float32: no (B, T, vocabulary) tensor.
- What exceeds `length` loses its beginning, as in lm-eval; `cut` counts how often. A continuation that does not fit by
  itself is an error. Whole documents are read in lm-eval's disjoint windows of `length` tokens.
- Equal inputs are run once, whichever task asks, and every answer is kept as it comes (`sbeval.evaluation.response_cache`).

Nothing is registered with lm-eval: its registry fills itself only while it is empty, and would lose its own models.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
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

# rows are padded to multiples of this, so that kernels see few shapes
PAD = 16
# rows of a batch at most, however short they are
ROWS = 1024
# prompts that are continued together
GENERATED = 16
# tokens to generate where a task does not say, as in lm-eval
NEW_TOKENS = 256

Pair = tuple[Sequence[int], Sequence[int]]
Score = tuple[float, bool]


class Text(Protocol):
    """Text to tokens and back. `prefix` stands before a text that has no context, `eos` ends one."""

    eos: int
    prefix: int

    def encode(self, text: str, special: bool | None) -> list[int]:
        """Tokens of a text. special: whether to add the tokenizer's own, such as one that begins every text; None is
        the tokenizer's habit."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""

    def spelling(self, token: int) -> str:
        """How a special token is spelled."""


class Bar(Protocol):
    """Shows how many requests are done."""

    def advance(self, steps: int, /) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def __init__(self, total: int) -> None: ...

    def advance(self, steps: int, /) -> None: ...

    def close(self) -> None: ...


class PlainText:
    """A tokenizer of ours, which adds nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.eos, self.prefix = tokenizer, tokenizer.eos, tokenizer.eos

    def encode(self, text: str, special: bool | None) -> list[int]:
        return [int(x) for x in self.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def spelling(self, token: int) -> str:
        return self.tokenizer.decode([token])


class HubText:
    """A tokenizer of transformers, with the special tokens that it adds by itself, as lm-eval uses it."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} names no eos token, which has to end a text")
        self.tokenizer, self.eos = tokenizer, int(tokenizer.eos_token_id)
        self.prefix = self.eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

    def encode(self, text: str, special: bool | None) -> list[int]:
        if special is None:
            # a prompt that begins with the token gets no second one
            special = not text.startswith(self.spelling(self.prefix))
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def spelling(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


class Adapter(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """See the module. length: tokens that the model reads at most. batch_tokens: tokens of a forward pass, padding
    included. begin: called with a number of requests, gives the bar that shows them."""

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
        begin: Callable[[int], Bar] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.text, self.length, self.place, self.dtype = model, text, length, place, dtype
        self.batch_tokens, self.answers, self.begin = batch_tokens, answers or Answers(), begin or Silent
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        return self.text.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string, add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """Log-likelihood in nats of each continuation after its context, and whether greedy decoding would give it."""
        found: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Score]:
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each text, every token once."""
        windows = [
            (index, (part[:-count].tolist(), part[-count:].tolist()))
            for index, request in enumerate(requests)
            for part, count in perplexity.disjoint(
                np.array(self.tok_encode(request.args[0]), dtype=np.int64), self.length, self.prefix_token_id
            )
        ]
        totals = [0.0] * len(requests)
        # the windows reach back on purpose: nothing is cut
        for (index, _), (score, _) in zip(windows, self._scored([pair for _, pair in windows]), strict=True):
            totals[index] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The likeliest continuation of each context, token by token, up to the first of its stop sequences."""
        asked = [self._prompt(*request.args) for request in requests]
        keys = [key(f"generate {new} until {until}", prompt) for prompt, new, until in asked]
        known = self.answers.find(set(keys))
        bar = self.begin(len(keys))
        counts = Counter(keys)
        bar.advance(sum(count for one, count in counts.items() if one in known))
        todo = {one: question for one, question in zip(keys, asked, strict=True) if one not in known}
        order = sorted(todo, key=lambda one: (todo[one][1:], len(todo[one][0])))
        for (new, until), group in groupby(order, key=lambda one: todo[one][1:]):
            for batch in batched(group, GENERATED):
                prompts = [todo[one][0] for one in batch]
                answers = dict(zip(batch, self._generated(prompts, new, until), strict=True))
                self.answers.keep(answers)
                known |= answers
                bar.advance(sum(counts[one] for one in batch))
        bar.close()
        return [str(known[one]) for one in keys]

    def _prompt(self, context: str, options: dict[str, Any]) -> tuple[Sequence[int], int, tuple[str, ...]]:
        """Tokens of a prompt, how many to generate, and where to stop."""
        found = normalize_gen_kwargs(options, NEW_TOKENS)
        if found.get("do_sample"):
            raise InputError("a task asks for sampled answers: generation here is greedy")
        new = int(found["max_gen_toks"])
        if new >= self.length:
            raise InputError(
                f"a task generates {new} tokens and the model reads {self.length}: give a longer --eval-len"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(tokens) > self.length - new
        eos = self.text.spelling(self.eot_token_id)
        return tokens[-(self.length - new) :], new, tuple(handle_stop_sequences(found["until"], eos=eos))

    def _generated(self, prompts: Sequence[Sequence[int]], new: int, until: tuple[str, ...]) -> list[str]:
        def stop(tokens: Sequence[int]) -> bool:
            return tokens[-1] == self.eot_token_id or any(one in self.text.decode(tokens) for one in until if one)

        model = cast(Generator, self.model)
        found = generate(model, prompts, new, self.place, dtype=self.dtype, stop=stop, batch=GENERATED)
        texts = [self.text.decode([token for token in tokens if token != self.eot_token_id]) for tokens in found]
        return [str(postprocess_generated_text(text, list(until), None)) for text in texts]

    def _scored(self, pairs: Sequence[Pair]) -> list[Score]:
        rows = [self._row(*pair) for pair in pairs]
        keys = [key(f"score the last {count}", row) for row, count in rows]
        known = self.answers.find(set(keys))
        bar = self.begin(len(keys))
        bar.advance(sum(one in known for one in keys))
        # one row serves all continuations that differ in what they score of the same input
        inputs: defaultdict[tuple[int, ...], dict[bytes, tuple[Sequence[int], int]]] = defaultdict(dict)
        for one, (row, count) in zip(keys, rows, strict=True):
            if one not in known:
                inputs[tuple(row[:-1])][one] = (row, count)
        asked = Counter(keys)
        for batch in self._batches(sorted(inputs, key=lambda row: (-len(row), row))):
            wanted = [(index, one, *part) for index, row in enumerate(batch) for one, part in inputs[row].items()]
            scores = self._forward(batch, [(index, row[-count:]) for index, _, row, count in wanted])
            answers = {one: score for (_, one, _, _), score in zip(wanted, scores, strict=True)}
            self.answers.keep(answers)
            known |= answers
            bar.advance(sum(asked[one] for one in answers))
        bar.close()
        return [(float(known[one][0]), bool(known[one][1])) for one in keys]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], int]:
        """Tokens of a request, the last of which are scored and not read, and how many are scored."""
        count = len(continuation)
        if not count:
            raise InputError("a continuation has no tokens of its own: this tokenizer merges it with its context")
        if count > self.length:
            raise InputError(
                f"a continuation has {count} tokens and the model reads {self.length}: give a longer --eval-len"
            )
        row = [*context, *continuation]
        self.cut += len(row) > self.length + 1
        return row[-(self.length + 1) :], count

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Rows, longest first, in batches of at most batch_tokens."""
        start = 0
        while start < len(rows):
            size = min(ROWS, max(1, self.batch_tokens // self._padded(len(rows[start]))))
            yield rows[start : start + size]
            start += size

    def _padded(self, length: int) -> int:
        # a table of positions may end at `length`
        return min(-(-length // PAD) * PAD, max(self.length, length))

    def _forward(self, rows: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, Sequence[int]]]) -> list[Score]:
        """Scores of (row, targets): the targets are what follows the row's last tokens."""
        width = self._padded(len(rows[0]))
        return perplexity.endings(self.model, rows, wanted, place=self.place, dtype=self.dtype, width=width)


def batched(things: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """Lists of at most `size` things, in their order."""
    left = iter(things)
    while some := list(islice(left, size)):
        yield some
