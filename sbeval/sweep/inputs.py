"""What a plan checks without reading a text or loading a model: that files, folders and packages are there, and that
names can be ones on the hub, which it does not ask."""

import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any

from sbeval import registry
from sbeval.config import HUB_NAME
from sbeval.data import corpus, sources, tokenizer
from sbeval.data.evaluation_text import WIKITEXT, WIKITEXT_HUB
from sbeval.errors import InputError
from sbeval.sweep.study_file import Part
from sbeval.training.text_model import corpus_options

# options that name files or folders, and words that they may be instead
TEXTS = ("python", "stdlib")
FILES = {
    "corpus": TEXTS,
    "eval_corpus": (*TEXTS, WIKITEXT),
    "essays": (),
    "squad": (),
    "hotpot": (),
    "data_dir": (),
}
MODELS = ("checkpoint", "models")
# what a family imports when it runs
PACKAGES = {"few_shot": ("lm_eval", "few-shot"), "needle": ("wonderwords", "needle")}


def check(parts: Sequence[Part]) -> None:
    """Raise InputError for the first file, folder, package or benchmark of a plan that is not there."""
    for part in parts:
        package, extra = PACKAGES.get(part.family, ("", ""))
        if package and not importlib.util.find_spec(package):
            raise InputError(f"{part.family} needs {package}: pip install 'sbeval[{extra}]'")
        for config in part.configs:
            _check_files(config)
            for given in _values(config, "tokenizer"):
                tokenizer.check(given)
            for name in MODELS:
                for given in _values(config, name):
                    if not os.path.exists(given) and not HUB_NAME.fullmatch(given):
                        raise InputError(
                            f"{_flag(name)} {given}: there is no such folder, and it is no name on the hub"
                        )
            registry.task(part.family).check_names(config)


def _check_files(config: Any) -> None:
    for name, words in FILES.items():
        for given in _values(config, name):
            # pages of Wikitext may be a file of their own
            path = given.removeprefix(f"{WIKITEXT}:") if name == "eval_corpus" else given
            if words and path.startswith("hf:"):
                sources.check_dataset(path)
                # evaluation texts are read anew; a tokenizer of the hub is not known without it
                if name != "corpus" or corpus.stored(path, **corpus_options(config)) is None:
                    sources.check_package(path)
            elif path == WIKITEXT and path in words:
                sources.check_package(WIKITEXT_HUB)
            elif path not in words and not os.path.exists(path):
                raise InputError(f"{_flag(name)} {given}: there is no such file or folder")


def _values(config: Any, name: str) -> Iterable[str]:
    value = getattr(config, name, None)
    return () if value is None else (value,) if isinstance(value, str) else value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-').removesuffix('s') if name == 'models' else name.replace('_', '-')}"
