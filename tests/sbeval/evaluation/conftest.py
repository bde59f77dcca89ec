"""Prompts of RULER's tasks, written with small texts and two tokenizers."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from sbeval.data import tokenizer
from sbeval.data.tokenizer import EOS, Library, Tokenizer
from sbeval.evaluation import ruler_drafts, ruler_texts
from sbeval.evaluation.ruler_prompts import Writer
from sbeval.evaluation.ruler_texts import Sources


def sentences(number: int) -> str:
    return " ".join(f"Person {number} saw town {number + place} in {1900 + place}." for place in range(9))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qa")
    paragraphs = [
        {
            "context": f"{sentences(number)} It was the {number}th.",
            "qas": [
                {
                    "question": f"Who was {number}?",
                    "is_impossible": False,
                    "answers": [{"text": f"the {number}th"}, {"text": f"It was {number}"}],
                },
                {"question": "Who was not?", "answers": [], "is_impossible": True},
            ],
        }
        for number in range(40)
    ]
    articles = [{"title": f"T{start}", "paragraphs": paragraphs[start : start + 4]} for start in range(0, 40, 4)]
    rows = [
        {
            "question": f"Where is {number}?",
            "answer": f"town {number}",
            "context": [[f"Title {one % 40}", [sentences(one % 40), " The end."]] for one in (number, number + 1)],
        }
        for number in range(40)
    ]
    found = {"squad": folder / "dev.json", "hotpot": folder / "hotpot.json"}
    found["squad"].write_text(json.dumps({"version": "v2.0", "data": articles}))
    found["hotpot"].write_text(json.dumps(rows))
    return found


@pytest.fixture(scope="module")
def sources(files: dict[str, Path]) -> Sources:
    return ruler_texts.load(None, str(files["squad"]), str(files["hotpot"]))


def llama(texts: list[str]) -> Library:
    """A tokenizer that cuts text by another pattern than GPT-2's: digits in threes, line ends with what is before."""
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Library(backend, name="llama", eos=0)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def text(request: pytest.FixtureRequest, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = " ".join([*sources.essay.words[:20000], *ruler_drafts.words("noun", "adjective")])
    if request.param == "llama":
        return llama([words])
    return tokenizer.load("bpe:1024", train_texts=lambda: [words], cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def writer(text: Tokenizer, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return Writer(text, sources, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small(sources: Sources, tmp_path: Path) -> Writer:
    """Writes in bytes: a letter is a token."""
    return Writer(tokenizer.load("bytes", cache_dir=tmp_path), sources, tmp_path)
