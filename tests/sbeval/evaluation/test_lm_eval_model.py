"""The adapter's numbers are lm-eval's own, whatever the batch, and an answer is never another model's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.api.registry
import numpy as np
import pytest
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from sbeval.data.tokenizer import Bytes
from sbeval.errors import InputError
from sbeval.evaluation import perplexity
from sbeval.evaluation.lm_eval_model import Adapter, HubText, PlainText
from sbeval.evaluation.response_cache import Answers
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.pretrained.hub_model import HubModel

transformers: Any = pytest.importorskip("transformers")

CPU = torch.device("cpu")
LENGTH = 24
WORDS = "the cat sat on a mat and saw no dog near it".split()
PAIRS = [
    ("", "the cat sat"),
    ("the cat", " sat on a mat"),
    ("the cat ", "sat"),
    ("a dog saw the mat", " and"),
    ("a dog saw the mat", " near"),
    ("a dog saw the mat", " near it"),
    ("no dog near it and the cat sat on a mat " * 3, "and saw it"),
    ("on", " a mat"),
]
DOCUMENTS = ["the cat sat on a mat", "a dog saw it " * 11, "it"]


@pytest.fixture(scope="module")
def hub() -> tuple[Any, Any]:
    """A small random model of transformers with a tokenizer that begins every text with a token of its own."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def theirs(hub: tuple[Any, Any]) -> Any:
    model, tokenizer = hub
    # in lm-eval 0.4.13 its cache of logits reads the wrong position where continuations of unequal lengths share what
    # the model reads, as the first and the third pair here do
    return HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, device="cpu", logits_cache=False
    )


def ours(hub: tuple[Any, Any], batch_tokens: int = 64, **options: Any) -> Adapter:
    model, text = HubModel(hub[0]), HubText(hub[1])
    return Adapter(model, text, length=LENGTH, place=CPU, dtype="float32", batch_tokens=batch_tokens, **options)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def decoder(attention: str = "rope", seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    shape = ModelConfig(vocab_size=257, width=32, layers=2, heads=4, hidden=48, attention=attention, init_std=0.3)
    return Decoder(shape).eval()


def adapter(model: Any, batch_tokens: int = 64, answers: Answers | None = None, length: int = LENGTH) -> Adapter:
    return Adapter(
        model, PlainText(Bytes()), length=length, place=CPU, dtype="float32", batch_tokens=batch_tokens, answers=answers
    )


# lm-eval's own numbers


def test_log_likelihoods_are_hflms(hub: tuple[Any, Any], theirs: Any) -> None:
    requests = asked("loglikelihood", *PAIRS)
    wanted, found = theirs.loglikelihood(requests, disable_tqdm=True), ours(hub).loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_rolling_is_hflms(hub: tuple[Any, Any], theirs: Any) -> None:
    requests = asked("loglikelihood_rolling", *((text,) for text in DOCUMENTS))
    twice = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(ours(hub, bos_twice=True).loglikelihood_rolling(requests), twice, rtol=1e-4)
    theirs.add_bos_token = False
    once = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(ours(hub).loglikelihood_rolling(requests), once, rtol=1e-4)
    assert np.abs(np.subtract(once, twice)).min() > 1


def test_a_tokenizer_that_ends_texts_changes_nothing(odd_models: Any, tmp_path: Path) -> None:
    """No context has ended before its continuation, and no EOS is scored."""
    requests = asked(
        "loglikelihood", ("the cat sat on the", " mat"), ("the old tree", " and then the river"), ("", "a")
    )
    rolled = asked("loglikelihood_rolling", ("the cat sat on the mat",))
    generated = asked("generate_until", ("the cat sat", {"until": ["tree"], "max_gen_toks": 6}))
    model = HubModel(transformers.AutoModelForCausalLM.from_pretrained(odd_models.write(tmp_path / "model")))
    found = []
    for end in (False, True):
        text = HubText(odd_models.byte_level(end=end))
        lm = Adapter(model, text, length=LENGTH, place=CPU, dtype="float32", batch_tokens=64)
        found.append((lm.loglikelihood(requests), lm.loglikelihood_rolling(rolled), lm.generate_until(generated)))
    assert found[0] == found[1]


def test_a_continuation_that_merges_into_its_context_is_encoded_apart(odd_models: Any, tmp_path: Path) -> None:
    text = HubText(odd_models.byte_level())
    assert len(text.encode("tre", None)) >= len(text.encode("tree", None)), "lm-eval's cut leaves nothing"
    model = HubModel(transformers.AutoModelForCausalLM.from_pretrained(odd_models.write(tmp_path / "model")))
    lm = Adapter(model, text, length=LENGTH, place=CPU, dtype="float32", batch_tokens=64)
    ((found, _), _) = lm.loglikelihood(asked("loglikelihood", ("the old tre", "e"), ("the old", " tree")))
    assert lm.apart == 1
    before, after = text.encode("the old tre", None), text.encode("e", False)
    ((wanted, _),) = perplexity.endings(model, [[*before, *after[:-1]]], [(0, after)], place=CPU, dtype="float32")
    assert found == pytest.approx(wanted)
    with pytest.raises(InputError, match="a continuation of 'the old' is empty: there is nothing to score"):
        lm.loglikelihood(asked("loglikelihood", ("the old", "")))


def test_generation_is_hflms(hub: tuple[Any, Any], theirs: Any) -> None:
    options = [{"until": ["mat"], "max_gen_toks": 6}, {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}]
    contexts = ["the cat sat", "a dog saw the mat and " * 4]
    requests = asked("generate_until", *((text, option) for text in contexts for option in options))
    wanted = theirs.generate_until(requests, disable_tqdm=True)
    assert ours(hub).generate_until(requests) == wanted and any(wanted)


def test_a_greedy_continuation_is_known_for_one(hub: tuple[Any, Any]) -> None:
    lm = ours(hub)
    (text,) = lm.generate_until(asked("generate_until", ("the cat", {"until": [], "max_gen_toks": 3})))
    (right,) = lm.loglikelihood(asked("loglikelihood", ("the cat", " " + text)))
    (wrong,) = lm.loglikelihood(asked("loglikelihood", ("the cat", " " + text.rpartition(" ")[0] + " <unk>")))
    assert right[1] and not wrong[1]


def test_lm_evals_registry_keeps_its_models() -> None:
    assert lm_eval.api.registry.get_model("hf") is HFLM


# batches and lengths


@pytest.mark.parametrize(
    "attention", ["stick_breaking", "rope", "alibi", "rope:scaling=dynamic_ntk,factor=8,train_len=8"]
)
def test_a_batch_of_one_is_a_batch_of_eight(attention: str) -> None:
    model = decoder(attention)
    requests, rolled = asked("loglikelihood", *PAIRS), asked("loglikelihood_rolling", *((x,) for x in DOCUMENTS))
    one, eight = adapter(model, 1), adapter(model, 8 * 32)
    np.testing.assert_allclose(one.loglikelihood(requests), eight.loglikelihood(requests), rtol=1e-4)
    np.testing.assert_allclose(one.loglikelihood_rolling(rolled), eight.loglikelihood_rolling(rolled), rtol=1e-4)


@pytest.mark.parametrize("attention", ["stick_breaking", "rope"])
def test_a_prompt_is_continued_alone_as_among_others(attention: str) -> None:
    options = {"until": ["\n\n"], "max_gen_toks": 5}
    contexts = ["", "one", "of several prompts", "x" * 40]
    together = adapter(decoder(attention)).generate_until(asked("generate_until", *((x, options) for x in contexts)))
    for context, found in zip(contexts, together, strict=True):
        assert adapter(decoder(attention)).generate_until(asked("generate_until", (context, options))) == [found]


def test_logits_are_made_where_something_is_scored_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = decoder(), []

    def logits(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape)
        return Decoder.logits(model, hidden)

    monkeypatch.setattr(model, "logits", logits)
    adapter(model, length=200).loglikelihood(asked("loglikelihood", ("x" * 150, "yz"), ("x" * 90, "z")))
    assert sum(shape[0] for shape in seen) == 3 and all(len(shape) == 2 for shape in seen)


def test_a_long_context_loses_its_beginning() -> None:
    lm = adapter(decoder())
    ((long, _),) = lm.loglikelihood(asked("loglikelihood", ("A" * 30 + "b" * (LENGTH - 1), "cd")))
    assert lm.cut == 1
    ((short, _),) = lm.loglikelihood(asked("loglikelihood", ("b" * (LENGTH - 1), "cd")))
    assert lm.cut == 1 and long == pytest.approx(short)


def test_what_cannot_be_scored_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"a continuation has 25 tokens, and the model's input is 24: give a larger --eval-len"
    ):
        adapter(decoder()).loglikelihood(asked("loglikelihood", ("a", "b" * 25)))
    with pytest.raises(InputError, match="sampled completions: only greedy"):
        adapter(decoder()).generate_until(asked("generate_until", ("a", {"do_sample": True, "temperature": 1.0})))
    with pytest.raises(InputError, match="generates 24 tokens"):
        adapter(decoder()).generate_until(asked("generate_until", ("a", {"max_gen_toks": 24})))


# answers on disk


class Counting:
    """A model that counts the rows it reads, and stops at a given one."""

    by_length = False

    def __init__(self, model: Decoder, until: int = 10**9) -> None:
        self.model, self.rows, self.until = model, 0, until

    def __call__(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens)
        if self.rows > self.until:
            raise KeyboardInterrupt
        hidden: Tensor = self.model(tokens)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Answers]:
    answers = Answers(tmp_path / "answers" / "model.sqlite")
    yield answers
    answers.close()


def test_what_is_answered_is_not_asked_again(tmp_path: Path, kept: Answers) -> None:
    requests = asked("loglikelihood", *PAIRS)
    wanted = adapter(decoder()).loglikelihood(requests)
    stopped = Counting(decoder(), until=4)
    with pytest.raises(KeyboardInterrupt):
        adapter(stopped, 1, kept).loglikelihood(requests)
    kept.close()
    again = Answers(tmp_path / "answers" / "model.sqlite")
    going = Counting(decoder())
    np.testing.assert_allclose(adapter(going, 1, again).loglikelihood(requests), wanted, rtol=1e-4)
    # the row at which it stopped is lost, and the two that differ in their last token are read once
    assert going.rows + 4 == len(PAIRS)
    done = Counting(decoder())
    adapter(done, 1, again).loglikelihood(requests)
    assert done.rows == 0
    again.close()
