"""Options of text models: mistakes, what training depends on, and a bound on epochs that given tokens lift."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sbeval.errors import InputError
from sbeval.training.text_model import (
    TRAINING,
    EvaluatedModel,
    TextModel,
    completed,
    likely_tokens,
    likely_vocabulary,
    trained_on,
    uncut,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": ()}, "attention is empty"),
        ({"seeds": (-1,)}, "a seed"),
        ({"size": "25 m"}, "unknown model size '25 m'; did you mean '25m'"),
        ({"packing": "streams"}, "unknown packing 'streams'; did you mean 'stream'"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"train_tokens": 0}, "train_tokens must be at least 1; got 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1, or left out; got 0"),
        ({"max_epochs": 0.0}, "max_epochs must be above 0 and finite; got 0"),
        ({"max_epochs": float("inf")}, "max_epochs must be above 0 and finite; got inf"),
        ({"patience": -1}, "patience must be at least 0; got -1"),
    ],
)
def test_mistakes_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextModel(**options)


def test_training_depends_on_all_options_but_those_of_evaluation() -> None:
    assert set(TRAINING) == {field.name for field in dataclasses.fields(TextModel)}
    one = EvaluatedModel(attention=("rope",), seeds=(0,))
    other = dataclasses.replace(one, attention=("nope",), seeds=(1, 2), trust_remote_code=True)
    assert trained_on(one) == trained_on(other) != trained_on(dataclasses.replace(one, lr=1e-4))
    assert one.trains and not dataclasses.replace(one, checkpoint="there").trains


def test_a_checkpoint_folder_takes_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {}, "state": {}}')
    options = {"models": ("m", str(tmp_path)), "tokenizer": "bytes"}
    assert completed(options) == options


def test_given_tokens_lift_the_bound_on_epochs() -> None:
    assert uncut({}) == {} and uncut({"lr": 1.0}) == {"lr": 1.0}
    assert completed({"checkpoint": "m", "train_len": 9}) == {"checkpoint": "m", "train_len": 9}
    for given, message in (
        ({"checkpoint": "m", "lr": 1.0, "branches": (9,)}, "--lr and --branch: the given model decides that already"),
        ({"models": ("m",), "attention": ("rope",)}, "--attention: the given model decides that already"),
        ({"checkpoint": "m", "seeds": (1,)}, "--seed: the given model decides that already"),
        ({"checkpoint": "m", "tokenizer": "bytes"}, "--tokenizer: m is no checkpoint folder, and other models bring"),
        ({"models": ("m", "n"), "tokenizer": "bytes"}, "--tokenizer: m and n is no"),
    ):
        with pytest.raises(InputError, match=message):
            completed(given)
    assert uncut({"train_tokens": 9}) == {"train_tokens": 9, "max_epochs": None}
    assert uncut({"train_tokens": 9, "max_epochs": 2.0}) == {"train_tokens": 9, "max_epochs": 2.0}


def test_a_vocabulary_is_estimated_without_its_tokenizer() -> None:
    assert [likely_vocabulary(name) for name in ("bytes", "bpe:8192", "some/model")] == [257, 8192, 32000]


def test_the_tokens_of_a_text_are_estimated_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a" * 600)
    assert [likely_tokens(str(tmp_path), name, None) for name in ("bytes", "bpe:8192")] == [600, 200]
    assert [likely_tokens(str(tmp_path), "bytes", most) for most in (500, 700)] == [500, 600]
    assert [likely_tokens("hf:some/text", "bytes", most) for most in (500, None)] == [500, None]


def test_training_tokens_are_without_those_of_other_splits(tmp_path: Path) -> None:
    for name, letters in (("train", 600), ("valid", 60), ("test", 30)):
        (tmp_path / f"{name}.txt").write_text("a" * letters)
    assert [likely_tokens(str(tmp_path), "bytes", most) for most in (None, 500)] == [600, 500]
    assert [likely_tokens(str(tmp_path), "bytes", most, with_held_out=True) for most in (None, 500)] == [690, 590]
