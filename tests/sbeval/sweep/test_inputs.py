"""A dry run names what is not there: files, folders, packages, models."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sbeval import registry
from sbeval.data import corpus
from sbeval.data.evaluation_text import WIKITEXT_HUB
from sbeval.errors import InputError
from sbeval.sweep import inputs
from sbeval.sweep.study_file import Part
from sbeval.tasks import few_shot


def part(family: str, **changes: Any) -> Part:
    config = dataclasses.replace(registry.task(family).presets["quick"], **changes)
    return Part(family=family, preset="quick", config=config)


def test_what_is_there_or_is_not_looked_up_passes(tmp_path: Path) -> None:
    inputs.check([part("length_gen"), part("mqrar"), part("length_gen", corpus=str(tmp_path))])
    texts = ("wikitext", f"wikitext:{tmp_path}", "stdlib", "hf:someone/texts", str(tmp_path))
    inputs.check([part("length_gen", eval_corpus=texts, window=(64,))])
    inputs.check([part("length_gen", corpus=name) for name in ("hf:someone/texts:2024 en", f"hf:{tmp_path}", "hf:c4")])
    inputs.check([part("length_gen", checkpoint="gpt2")])
    inputs.check([part("few_shot", models=("someone/model",)), part("length_gen", checkpoint=str(tmp_path))])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("length_gen", {"corpus": "nowhere"}, "--corpus nowhere: there is no such file or folder"),
        (
            "length_gen",
            {"eval_corpus": ("wikitext:pages",), "window": (64,)},
            "--eval-corpus wikitext:pages: there is no such file or folder",
        ),
        ("length_gen", {"corpus": "hf:"}, "unknown corpus 'hf:'; give python, stdlib, an existing file"),
        ("length_gen", {"corpus": "hf::train"}, "unknown corpus 'hf::train'; give python, stdlib"),
        ("length_gen", {"corpus": "hf:a/b/c"}, "corpus 'hf:a/b/c': there is no folder 'a/b/c', and it is no name"),
        (
            "length_gen",
            {"eval_corpus": ("stdlib", "hf:./texts:en"), "window": (64,)},
            "corpus 'hf:./texts:en': there is no folder './texts', and it is no name on the hub",
        ),
        ("needle", {"squad": "dev.json"}, "--squad dev.json: there is no such file"),
        ("needle", {"squad": "hf:rajpurkar/squad_v2"}, "--squad hf:rajpurkar/squad_v2: there is no such file"),
        ("few_shot", {"data_dir": "items/"}, "--data-dir items/: there is no such file or folder"),
        ("length_gen", {"checkpoint": "a/b/c"}, "--checkpoint a/b/c: there is no such folder"),
        ("few_shot", {"models": ("./model",)}, "--model ./model: there is no such folder"),
        ("length_gen", {"tokenizer": "bpe"}, "unknown tokenizer 'bpe'; give bytes, bpe:SIZE"),
        ("length_gen", {"tokenizer": "bpe:8k"}, "tokenizer 'bpe:8k': the size after bpe: must be at least 257"),
        ("needle", {"tokenizer": "no/such/file"}, "unknown tokenizer 'no/such/file'"),
    ],
)
def test_what_is_missing_is_named(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        inputs.check([part(family, **changes)])
    assert message in str(error.value)


def test_further_sweeps_of_a_family_are_checked_too() -> None:
    lacking = part("length_gen", corpus="nowhere").config
    with pytest.raises(InputError, match="--corpus nowhere: there is no such file or folder"):
        inputs.check([dataclasses.replace(part("length_gen"), others=(lacking,))])


def test_a_benchmark_that_lm_eval_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def check_name(name: str) -> None:
        asked.append(name)
        if name == "coppa":
            raise InputError("lm-eval has no task 'coppa'; did you mean copa?")

    monkeypatch.setattr(few_shot, "_lm_eval", lambda: SimpleNamespace(check_name=check_name))
    # those of suites are known
    inputs.check([part("few_shot", tasks=("mmlu:5", "copa", "triviaqa:3"))])
    assert asked == ["triviaqa"]
    with pytest.raises(InputError, match="no task 'coppa'; did you mean copa"):
        inputs.check([part("few_shot", tasks=("coppa",))])


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"few_shot needs lm_eval: pip install 'sbeval\[few-shot\]'"):
        inputs.check([part("few_shot")])
    window: dict[str, Any] = {"window": (64,)}
    for name, changes in {
        "hf:someone/texts": {"corpus": "hf:someone/texts:en"},
        "hf:c4": {"eval_corpus": ("hf:c4",), **window},
        WIKITEXT_HUB.rpartition(":")[0]: {"eval_corpus": ("wikitext",), **window},
    }.items():
        with pytest.raises(InputError) as error:
            inputs.check([part("length_gen", **changes)])
        assert str(error.value) == f"corpus {name} needs datasets: pip install 'sbeval[hf]'"
    # a corpus whose tokens are stored is not loaded; an evaluation text is
    monkeypatch.setattr(corpus, "stored", lambda spec, **options: object() if options["tokenizer"] == "bytes" else None)
    inputs.check([part("length_gen", corpus="hf:someone/texts", tokenizer="bytes")])
    for changes in (
        {"corpus": "hf:someone/texts", "tokenizer": "bpe:300"},
        {"eval_corpus": ("hf:c4",), "tokenizer": "bytes", **window},
    ):
        with pytest.raises(InputError, match="needs datasets"):
            inputs.check([part("length_gen", **changes)])
    # pages of Wikitext in a file, and the standard library, need none
    inputs.check([part("length_gen", eval_corpus=(f"wikitext:{__file__}",), **window)])
