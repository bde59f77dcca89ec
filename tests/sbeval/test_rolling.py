"""Whole documents in disjoint windows, against lm-eval's own rolling log-likelihood of the same model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sbeval.data import evaluation_text
from sbeval.data.tokenizer import Bytes
from sbeval.evaluation import perplexity
from sbeval.evaluation.perplexity import Execution
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.tasks import length_gen_rows

TEXTS = ["one two  three\nfour" * 3, "short", "x" * 16, "Ünïcode wörds, and more of them " * 4]
PAGES = [' = Du Fu = \n \n Du Fu ( Tu Fu ; 712 – 770 ) was , 1 @,@ 024 times , " a poet " . \n ', " a guest @-@ role "]
CPU = torch.device("cpu")
EOS = 256


def build() -> Decoder:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=257, width=32, layers=2, heads=4, hidden=48, attention="rope", init_std=0.3)
    return Decoder(shape).eval()


class Harness(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Our decoder as lm-eval sees a model: log-likelihoods of continuations, by plain log-softmax."""

    eot_token_id = EOS

    def __init__(self, decoder: Decoder, window: int) -> None:
        super().__init__()
        self.decoder, self.window = decoder, window

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return [int(x) for x in Bytes().encode(string)]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            tokens = torch.tensor([[*context, *continuation]])
            with torch.no_grad():
                chances = self.decoder.logits(self.decoder(tokens[:, :-1])).double().log_softmax(-1)
            each = chances.gather(2, tokens[:, 1:, None])[0, -len(continuation) :, 0]
            found.append((each.sum().item(), False))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return [self._rolled(*request.args) for request in requests]

    def _rolled(self, text: str) -> float:
        windows = get_rolling_token_windows(self.tok_encode(text), EOS, self.window, context_len=1)
        pairs = [make_disjoint_window(pair) for pair in windows]
        return sum(chance for chance, _ in self._loglikelihood_tokens([(None, *pair) for pair in pairs]))

    def generate_until(self, *_: Any, **__: Any) -> list[str]:
        raise NotImplementedError


def rolled(window: int, batch: int) -> perplexity.Rolling:
    tokenizer = Bytes()
    return perplexity.rolling(
        build(),
        [tokenizer.encode(text) for text in TEXTS],
        TEXTS,
        Execution(place=CPU, dtype="float32", batch=batch),
        window=window,
        prefix=[EOS],
    )


@pytest.mark.parametrize(("window", "batch"), [(8, 1), (16, 5), (7, 3), (512, 2)])
def test_losses_are_lm_evals(window: int, batch: int) -> None:
    harness = Harness(build(), window)
    requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(TEXTS)]
    wanted = harness.loglikelihood_rolling(requests)
    np.testing.assert_allclose(rolled(window, batch).losses, -np.array(wanted), rtol=1e-4)


@pytest.mark.parametrize(("batch", "passes"), [(1, 10), (3, 5)])
def test_padding_shares_shapes_and_changes_nothing(batch: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build(), Bytes()
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 256, size) for size in (700, 3, 65, 90, 257, 70, 0, 300, 1)]
    texts = [tokenizer.decode(tokens) for tokens in documents]
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    how = Execution(place=CPU, dtype="float32", batch=batch)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "by_length", True)
        plain = perplexity.rolling(model, documents, texts, how, window=256, prefix=[EOS]).losses
    assert len({length for _, length in shapes}) == 6
    shapes.clear()
    np.testing.assert_allclose(
        perplexity.rolling(model, documents, texts, how, window=256, prefix=[EOS]).losses, plain, rtol=1e-5
    )
    # two lengths an octave, from 48 to the window; as many tokens of each as of windows
    assert {length for _, length in shapes} == {48, 96, 256}
    assert max(rows * length for rows, length in shapes) <= 256 * batch and len(shapes) == passes


@pytest.mark.parametrize("window", [8, 16, 512])
def test_windows_are_lm_evals(window: int) -> None:
    for text in TEXTS:
        tokens = Bytes().encode(text)
        theirs = [make_disjoint_window(x) for x in get_rolling_token_windows(tokens.tolist(), EOS, window, 1)]
        ours = [(x[:-n].tolist(), x[-n:].tolist()) for x, n in perplexity.disjoint(tokens, window, EOS)]
        assert [(list(context), list(rest)) for context, rest in theirs] == ours


def test_rows_are_normalised_as_lm_eval_does() -> None:
    found = rolled(16, 2)
    total, words = found.losses.sum(), sum(map(lambda text: len(text.split()), TEXTS))
    rows = {(row.metric, row.per): row for row in length_gen_rows.windowed_rows(found, 16)}
    size = sum(len(text.encode()) for text in TEXTS)
    # the last text ends in a space, behind which lm-eval counts one word more
    assert rows["perplexity", "word"].value == pytest.approx(math.exp(total / (words + 1)))
    assert rows["perplexity", "byte"].value == pytest.approx(math.exp(total / size))
    assert rows["perplexity", "token"].value == pytest.approx(math.exp(total / size))
    assert rows["bits_per_byte", None].value == pytest.approx(total / size / math.log(2))
    assert {row.window for row in rows.values()} == {16} and {row.context_length for row in rows.values()} == {None}


def test_wikitext_is_lm_evals(tmp_path: Path) -> None:
    """Loss of the page without the spaces of its tokenization, for each word and byte of the page with them."""
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": page}) + "\n" for page in PAGES))
    text = evaluation_text.read(f"wikitext:{path}", "text", Bytes(), [EOS])
    found = perplexity.rolling(
        build(), text.tokens, text.counted, Execution(place=CPU, dtype="float32"), window=16, prefix=text.prefix
    )
    harness, weighted = Harness(build(), 16), []
    for index, page in enumerate(PAGES):
        request = Instance("loglikelihood_rolling", {}, (wikitext_detokenizer({"page": page}),), index)
        weighted.append(process_results({"page": page}, harness.loglikelihood_rolling([request])))
    rows = {row.per or row.metric: row for row in length_gen_rows.windowed_rows(found, 16, text.name)}
    for name, metric in ("word", "word_perplexity"), ("byte", "byte_perplexity"):
        wanted = weighted_perplexity([page[metric] for page in weighted])
        assert rows[name].value == pytest.approx(wanted, rel=1e-4)
    assert rows["bits_per_byte"].value == pytest.approx(bits_per_byte([page["bits_per_byte"] for page in weighted]))
    assert {row.eval_corpus for row in rows.values()} == {"wikitext"}


def test_no_tokens_have_no_windows() -> None:
    assert perplexity.disjoint(np.array([], dtype=np.uint16), 8, EOS) == []
