"""Options of text models, shared by the families whose cells evaluate the same models."""

import functools
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import platformdirs

from sbeval.config import ATTENTION, DATA, LATER, LR, MODEL, OPTIMIZERS, SEED, TRAINED, decided, option
from sbeval.config import TRAINING as TRAIN
from sbeval.errors import InputError, check_swept, choose
from sbeval.models.config import SIZES
from sbeval.tables import epochs

# BOS before a whole document, in windows: once, or as lm-eval 0.4.13 has it, where a tokenizer's own comes after it and
# is scored
LM_EVAL = "lm-eval-0.4.13"
BOS = ("once", LM_EVAL)
PACKINGS = ("documents", "stream")
# bytes of text per token of a subword tokenizer
TOKEN_BYTES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """Methods and seeds, model size, training text and schedule. Amounts are in tokens."""

    attention: tuple[str, ...] = option(("stick_breaking", "rope"), MODEL, ATTENTION, TRAINED, metavar="SPEC")
    seeds: tuple[int, ...] = option((0,), TRAIN, SEED, TRAINED, flag="--seed")
    size: str = option("quick", MODEL, f"Size of the model: {', '.join(SIZES)}.", TRAINED)
    train_len: int = option(256, TRAIN, "Tokens of a training sequence.")
    train_tokens: int = option(
        300 * 8 * 256, TRAIN, "Tokens to train on; those of a preset end at --max-epochs.", TRAINED
    )
    batch_tokens: int = option(8 * 256, TRAIN, "Tokens of an optimizer step.")
    micro_batch_tokens: int | None = option(None, TRAIN, "Tokens of a forward pass. Default: all of a step.")
    lr: float = option(3e-3, TRAIN, LR, TRAINED)
    schedule: str = option("cosine", TRAIN, "Learning rate schedule: cosine, power, constant or wsd.", TRAINED)
    packing: str = option("stream", TRAIN, "stream, or documents: no attention across documents.", TRAINED)
    corpus: str = option("stdlib", DATA, "python, stdlib, a file or folder, or hf:NAME[:CONFIG].")
    tokenizer: str = option("bytes", DATA, "bytes, bpe:SIZE, or a Hugging Face name or folder.")
    text_field: str = option("text", DATA, "Field of the text in JSONL and parquet.")
    corpus_tokens: int | None = option(None, DATA, "Training tokens to keep of the corpus. Default: all.")
    dtype: str = "float32"
    max_epochs: float | None = option(
        epochs.MAX_EPOCHS,
        TRAIN,
        "Passes over the training text at most; --train-tokens alone lifts it.",
        LATER,
        TRAINED,
    )
    patience: int = option(
        0, TRAIN, "Held-out evaluations without a new lowest loss after which training ends; 0: never.", LATER, TRAINED
    )
    optimizer: str = option("adamw", TRAIN, "adamw, or muon for the matrices inside the blocks.", LATER)
    diagnostics: int = option(
        0, TRAIN, "Times at which retrieval is diagnosed while models train, at most; see `sbeval diagnostics`.", LATER
    )
    warmup_tokens: int | None = option(
        None,
        TRAIN,
        "Tokens of the warm-up of the learning rate. Default: 5 % of all; of the first --branch.",
        LATER,
        TRAINED,
    )
    # not part of a model's identity: it says which trainings share their beginning, and changes no number
    branches: tuple[int, ...] = option(
        (),
        TRAIN,
        "With --schedule wsd: tokens at a constant rate after which a decay over a fifth as many branches off, a model "
        "each, in place of --train-tokens.",
        TRAINED,
        flag="--branch",
        compare=False,
    )

    def __post_init__(self) -> None:
        check_swept(self, "attention", "seeds")
        choose("model size", self.size, SIZES)
        choose("packing", self.packing, PACKINGS)
        choose("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("train_len", "train_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("micro_batch_tokens", "corpus_tokens"):
            if (amount := getattr(self, name)) is not None and amount < 1:
                raise InputError(f"{name} must be at least 1, or left out; got {amount}")
        if self.max_epochs is not None and not 0 < self.max_epochs < math.inf:
            raise InputError(f"max_epochs must be above 0 and finite; got {self.max_epochs}")
        for name in ("patience", "diagnostics"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.warmup_tokens is not None and self.warmup_tokens < 1:
            raise InputError(f"warmup_tokens must be at least 1, or left out; got {self.warmup_tokens}")
        self._check_branches()

    def _check_branches(self) -> None:
        if not self.branches:
            return
        if self.schedule != "wsd":
            raise InputError(f"--branch is for --schedule wsd; the schedule is {self.schedule}")
        if self.patience:
            raise InputError("--branch and --patience exclude each other: branches share steps that none may leave out")
        if min(self.branches) < self.batch_tokens:
            raise InputError(f"--branch must be at least --batch-tokens {self.batch_tokens}; got {min(self.branches)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel(TextModel):
    """Text models to evaluate: trained with these options, or a given checkpoint."""

    checkpoint: str | None = option(
        None, MODEL, "Evaluate this model instead: our checkpoint folder, or a Hugging Face folder or name.", LATER
    )
    trust_remote_code: bool = option(
        False, MODEL, "Run the Python code that comes with a Hugging Face model.", compare=False
    )

    @property
    def trains(self) -> bool:
        """True where models are trained rather than given."""
        return self.checkpoint is None


# options that the training of a model depends on
TRAINING = tuple(field.name for field in fields(TextModel))


def trained_on(config: TextModel) -> tuple[object, ...]:
    """Return the training options that the models of a config share, whatever their method and seed."""
    return tuple(getattr(config, name) for name in TRAINING if name not in ("attention", "seeds"))


def corpus_options(config: TextModel) -> dict[str, Any]:
    """Return what, beside the specification, `corpus.open` and `corpus.stored` know a config's corpus by."""
    return {
        "tokenizer": config.tokenizer,
        "cache_dir": Path(platformdirs.user_cache_dir("sbeval")),
        "max_tokens": config.corpus_tokens,
        "text_field": config.text_field,
    }


def completed(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a family of text models with those that they imply; InputError where a model is given, and
    options of its training with it, or a tokenizer beside that of the model."""
    given = [options["checkpoint"]] if options.get("checkpoint") else options.get("models")
    if given and (surplus := decided(TextModel, options)):
        raise InputError(f"{' and '.join(surplus)}: the given model decides that already; leave it out")
    if given and "tokenizer" in options:
        from sbeval.pretrained import load

        if not any(load.is_own(load.located(spec)) for spec in given):
            raise InputError(
                f"--tokenizer: {' and '.join(given)} is no checkpoint folder, and other models bring their tokenizers; "
                "leave it out"
            )
    return uncut(options)


def uncut(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without a bound on epochs where `train_tokens` is given and `max_epochs` is not."""
    unbounded = "train_tokens" in options and "max_epochs" not in options
    return options | ({"max_epochs": None} if unbounded else {})


def check_step(flag: str, tokens: int, train_len: int, given_by: str = "--train-len") -> None:
    """Raise InputError for a step of fewer tokens than a sequence has. flag, given_by: what gives either of them."""
    if tokens < train_len:
        raise InputError(
            f"{flag} {tokens} is less than a sequence of {given_by} {train_len}; give {flag} {train_len} or more"
        )


def likely_vocabulary(tokenizer: str) -> int:
    """Return an estimate of the vocabulary size, without loading the tokenizer."""
    if tokenizer == "bytes":
        return 257
    size = tokenizer.removeprefix("bpe:")
    return int(size) if size.isdecimal() else 32000


@functools.lru_cache
def likely_tokens(corpus: str, tokenizer: str, corpus_tokens: int | None, *, with_held_out: bool = False) -> int | None:
    """Return an estimate of the training tokens of a text from the size of its files; None for a dataset of the hub.

    corpus_tokens: the training tokens to keep, if not all. with_held_out: with those of the other splits.
    """
    from sbeval.data import sources

    size = sources.size(corpus)
    if size is None:
        return corpus_tokens
    train, held_out = (part // (1 if tokenizer == "bytes" else TOKEN_BYTES) for part in size)
    return min(train, corpus_tokens or train) + (held_out if with_held_out else 0)
