"""Length generalisation: train at one length, measure the loss at every position far past it.

The paper's figure 5 (Tan et al., ICLR 2025, arXiv 2410.17980) asks whether a model trained on windows of `train_len`
tokens still predicts well with `eval_len` tokens of context. Every method trains on the same tokens in the same order.

    train    |--- train_len ---|                       loss on every token
    test     |--- train_len ---|------- eval_len ------|   loss at each position, over documents that long
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import platformdirs

from sbeval import registry
from sbeval.config import EVALUATION, LATER, MODEL, option
from sbeval.errors import InputError
from sbeval.models import config as model_config
from sbeval.models.config import ModelConfig
from sbeval.sweep.cell import Cell as BaseCell
from sbeval.sweep.cell import Outcome, TrainingStep, cell_id, timing
from sbeval.sweep.family import Family
from sbeval.tables import epochs
from sbeval.tables.rows import Identity, Measurement
from sbeval.tasks.text_model import TRAINING, TextModel, uncut

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from sbeval.data.corpus import Corpus
    from sbeval.data.dataloader import Batch
    from sbeval.data.tokenizer import Ids, Tokenizer
    from sbeval.evaluation.perplexity import PositionLosses, Predictor, Rolling
    from sbeval.models.decoder import Decoder
    from sbeval.pretrained.load import Pretrained
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import Place
    from sbeval.tables.statistics import Estimate
    from sbeval.training.checkpoint import State
    from sbeval.training.config import TrainConfig
    from sbeval.training.trainer import Trained


NAME = "length_gen"
# tokens of evaluation windows that go through the model at once
EVAL_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: positions position_start <= i < position_end of a loss; the context length l of a figure over positions
    1 ... l; the last k of them; the tokens of a disjoint window, and what a perplexity over such windows is per
    (`token`, `word` or `byte`). status: `overfit`, or empty."""

    position_start: int | None = None
    position_end: int | None = None
    context_length: int | None = None
    last_k: int | None = None
    window: int | None = field(default=None, metadata=LATER)
    per: str | None = field(default=None, metadata=LATER)
    status: str = field(default="", metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(TextModel):
    """A sweep of attention methods and seeds. Lengths and amounts are in tokens."""

    eval_len: int = option(4096, EVALUATION, "Tokens of context to evaluate up to.")
    documents: int = option(32, EVALUATION, "Test documents at most: the first that are long enough.")
    windows: int = option(1, EVALUATION, "Disjoint windows of each document at most.")
    window: tuple[int, ...] = option(
        (), EVALUATION, "Tokens of the disjoint windows of lm-eval's perplexity of whole documents.",
        LATER,
    )  # fmt: skip
    checkpoint: str | None = option(
        None, MODEL, "Evaluate this model instead: our checkpoint folder, or a Hugging Face folder or name.", LATER
    )
    trust_remote_code: bool = option(
        False, MODEL, "Run the Python code that comes with a Hugging Face model.", compare=False
    )

    def __post_init__(self) -> None:
        # zero-argument super does not work in a class with slots
        TextModel.__post_init__(self)
        for name in ("documents", "windows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if short := [length for length in self.window if length < 1]:
            raise InputError(f"--window must be at least 1; got {short[0]}")
        if self.trains and self.eval_len < self.train_len:
            raise InputError(
                f"--eval-len {self.eval_len} is shorter than --train-len {self.train_len}: nothing to generalise to; "
                f"give --eval-len {self.train_len} or more"
            )

    @property
    def trains(self) -> bool:
        """Whether models are trained rather than given."""
        return self.checkpoint is None


# the methods of the paper's figure 5; of its factors and windows we know that of NTK and 512, the others are ours
FIGURE_5 = (
    "stick_breaking", "rope", "nope", "alibi", "fire",
    *(f"rope:scaling=ntk,factor={factor}" for factor in (2, 4, 8, 16)),
    *(f"sliding_window:window={window}" for window in (256, 512, 1024)),
)  # fmt: skip

RECIPE = Config(
    size="60m", train_len=2048, eval_len=2048, train_tokens=800 * 131072, batch_tokens=131072, lr=2e-3,
    corpus="python", tokenizer="bpe:8192", documents=64, windows=4,
)  # fmt: skip

PRESETS = {
    # 1.3 M parameters, for a laptop: minutes on two cores
    "quick": Config(),
    # 25 M parameters, 105 M tokens: one GPU of any kind
    "small": Config(
        size="25m", train_len=2048, eval_len=16384, train_tokens=800 * 131072, batch_tokens=131072,
        micro_batch_tokens=32768, lr=2e-3, corpus="python", tokenizer="bpe:8192", documents=64,
    ),
    # the same model and budget without accumulation
    "h200": Config(
        size="25m", train_len=2048, eval_len=16384, train_tokens=800 * 131072, batch_tokens=131072, lr=2e-3,
        corpus="python", tokenizer="bpe:8192", documents=64, windows=4,
    ),
    # the same, every method with two seeds, to 32 times the training length
    "figure5": Config(
        attention=(*FIGURE_5, "forgetting"), seeds=(0, 1), size="25m", train_len=2048, eval_len=65536,
        train_tokens=800 * 131072, batch_tokens=131072, lr=2e-3, corpus="python", tokenizer="bpe:8192", documents=64,
        windows=2, window=(2048, 16384, 65536),
    ),
    # the recipe at 60 M parameters and 105 M tokens, within its training length, and what nanoGPT's own makes of the
    # same tokens (AdamW at 6e-4 with betas 0.9 and 0.95, decay 0.1, clip 1, cosine to a tenth)
    "recipe": RECIPE,
    "nanogpt": dataclasses.replace(RECIPE, attention=("nope",), size="nanogpt-60m", lr=6e-4),
    # 367.5 M parameters, SlimPajama, 15 B tokens at 3e-4, windows of 2048 (--train-len 8192 for its other panel),
    # evaluated by lm-eval's windows of 2^11 to 2^16. Not known, and chosen here: half a million tokens a step, the
    # cosine schedule with a warm-up of 5 %, and which tokenizer of 32,000 it is. The documents evaluated are
    # SlimPajama's test split, not wikitext's.
    "paper": Config(
        attention=FIGURE_5, size="350m", train_len=2048, eval_len=65536, train_tokens=15 * 10**9, batch_tokens=1 << 19,
        micro_batch_tokens=1 << 16, lr=3e-4, corpus="hf:cerebras/SlimPajama-627B", corpus_tokens=15 * 10**9,
        tokenizer="TinyLlama/TinyLlama_v1.1", documents=64, window=tuple(2048 << octave for octave in range(6)),
    ),
}  # fmt: skip


Kind = TypeVar("Kind", bound=Config)


def preset(kind: Callable[..., Kind], name: str, **options: Any) -> Kind:
    """A preset of a family that asks of models trained as the preset `name` says, and read to their training length."""
    trained = {entry.name: getattr(PRESETS[name], entry.name) for entry in dataclasses.fields(Config)}
    return kind(**{**trained, "eval_len": trained["train_len"], "window": (), **options})


def without_evaluation(kind: type[Kind], config: Config, *others: str) -> Kind:
    """The config of one method and seed with the training options and those named; the rest is as no cell asks it, so
    that all cells of one model give the same."""
    kept = {name: getattr(config, name) for name in (*TRAINING, *others)}
    if config.checkpoint is None:
        kept["attention"] = (model_config.trained_attention(config.attention[0]),)
    return kind(**kept, eval_len=config.train_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(TrainingStep):
    """The training of one model, for cells of any family that evaluate it."""

    config: Config

    @property
    def cell(self) -> "Cell":
        return Cell(config=self.config)

    @property
    def title(self) -> str:
        return f"train {self.cell.title}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def flops(self) -> float:
        return 3 * model_config.flops_per_token(self.leaves, self.config.train_len) * self.cell.training().tokens

    @property
    def leaves(self) -> ModelConfig:
        """The model's shape, without a look at its tokenizer."""
        return self.cell.model(likely_vocabulary(self.config.tokenizer))

    def train(self, place: "Place", progress: "Progress") -> Path:
        """Train, unless that is done, and return the checkpoint folder."""
        return self.cell.train(place, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to evaluate, and what its rows say of it."""

    model: "Predictor"
    name: str
    attention: str
    options: str
    params: int
    train_len: int
    backend: str
    train_tokens: int = 0  # 0 where it was not trained here
    unique_tokens: int | None = None
    status: str = ""
    tokens_per_s: float | None = None
    measured: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(BaseCell):
    """One method and seed: a config whose `attention` and `seeds` have one entry each."""

    config: Config
    family: str = NAME

    @property
    def attention(self) -> str:
        return self.config.attention[0]

    @property
    def seed(self) -> int:
        return self.config.seeds[0]

    @property
    def title(self) -> str:
        if self.config.checkpoint is not None:
            return re.sub(r"[^\w.-]+", "-", self.config.checkpoint.strip("/"))
        return f"{self.attention} seed {self.seed}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def needs(self) -> tuple[Training, ...]:
        """The training of its model, unless that is there."""
        if self.config.checkpoint is not None:
            return ()
        return (Training(config=without_evaluation(Config, self.config)),)

    @property
    def flops(self) -> float:
        from sbeval.pretrained import load

        config = self.config
        # whole documents are read in windows too: as if they were of the length to evaluate to
        read = {config.eval_len: config.documents * config.windows * config.eval_len}
        for length in config.window:
            read[length] = read.get(length, 0) + config.documents * config.eval_len
        if config.checkpoint is not None:
            return 2.0 * load.likely_parameters(config.checkpoint) * sum(read.values())
        shape = self.model(likely_vocabulary(config.tokenizer))
        return sum(model_config.flops_per_token(shape, length) * tokens for length, tokens in read.items())

    def model(self, vocab_size: int) -> ModelConfig:
        padded = model_config.padded_vocabulary(vocab_size)
        return model_config.named(self.config.size, vocab_size=padded, attention=self.attention)

    def training(self, text: "Corpus | None" = None) -> "TrainConfig":
        """How its model is trained; without the text as if that were long enough."""
        from sbeval.data.dataloader import epoch_tokens
        from sbeval.training import held_out

        config, tokens = self.config, self.config.train_tokens
        if text is not None and config.max_epochs is not None:
            tokens = min(tokens, int(config.max_epochs * epoch_tokens(text.train, config.train_len)))
        training = training_config(config, tokens=tokens, length=config.train_len, lr=config.lr, seed=self.seed)
        looks, _ = held_out.plan(training.tokens, training.length)
        return dataclasses.replace(training, patience=config.patience, look_every=-(-training.steps // looks))

    def source(self, progress: "Progress") -> str:
        """Digest of the tokenized corpus, after that of a model that is there already."""
        return self._source(open_corpus(self.config, progress))

    def check(self, progress: "Progress") -> None:
        """InputError where the corpus has no documents this long."""
        _windows(open_corpus(self.config, progress), self.config)

    def run(self, place: "Place", progress: "Progress") -> Outcome:
        """Train, unless a checkpoint has it, and evaluate."""
        text = open_corpus(self.config, progress)
        # before training: a corpus without documents this long is the user's to change
        windows = _windows(text, self.config)
        subject = self._trained(text, place, progress) if self.config.checkpoint is None else self._loaded(text, place)
        return outcome(
            subject, self._measured(text, windows, subject, place, progress), family=NAME, task=text.name,
            eval_len=self.config.eval_len, seed=self.seed, corpus=text.name, corpus_digest=self._source(text),
            tokenizer=text.tokenizer.name,
        )  # fmt: skip

    def train(self, place: "Place", progress: "Progress") -> Path:
        """Train, unless that is done, and return the checkpoint from which `run` goes on."""
        return self._train(open_corpus(self.config, progress), place, progress)[0]

    def origin(self, progress: "Progress") -> tuple[str, str]:
        """Name and digest of the text that the model is trained on; of one that is there no name, and its digest."""
        from sbeval.pretrained import load

        if self.config.checkpoint is not None:
            return "", load.digest(self.config.checkpoint)
        text = open_corpus(self.config, progress)
        return text.name, text.digest

    def _source(self, text: "Corpus") -> str:
        from sbeval.pretrained import load

        given = self.config.checkpoint
        return text.digest if given is None else f"{load.digest(given)}-{text.digest}"

    def subject(self, found: "Pretrained", trained: str, place: "Place", progress: "Progress") -> Subject:
        """The model as it is evaluated; one that was trained here with what only evaluation asks for.

        trained: checkpoint folder of its training on text, or what --checkpoint names.
        """
        from sbeval.models.decoder import Decoder
        from sbeval.training import checkpoint

        if self.config.checkpoint is not None:
            return self._given(found, trained)
        assert isinstance(found.model, Decoder)
        state = checkpoint.load_state(Path(trained))
        return self._made(found.model, state, open_corpus(self.config, progress), place)

    def _given(self, found: "Pretrained", trained: str) -> Subject:
        from sbeval.pretrained import load
        from sbeval.training import checkpoint

        looks = checkpoint.load_state(Path(trained)).held_out if load.is_own(trained) else []
        return Subject(
            model=found.model, name=found.name, attention=found.attention, options=found.options, params=found.params,
            train_len=found.train_len or self.config.train_len, backend=found.backend, status=_status(looks),
        )  # fmt: skip

    def _train(self, text: "Corpus", place: "Place", progress: "Progress") -> "tuple[Path, Trained]":
        from sbeval.data.dataloader import Batches
        from sbeval.training.trainer import Trainer

        trained_as = model_config.trained_attention(self.attention)
        shape = dataclasses.replace(self.model(text.tokenizer.vocab_size), attention=trained_as)
        training = self.training(text)
        batches = Batches(text.train, training.length, training.batch, self.seed, self.config.packing)
        with place.checkpoint([shape, training, text.digest, self.config.packing], progress) as folder:
            trainer = Trainer(
                shape, training, batches, folder, place.device, place.world, shard=place.shard,
                tokenizer=text.tokenizer.digest, held_out=_held_out(text, training, self.config.packing),
            )  # fmt: skip
            task = progress.add(f"train {trained_as} seed {self.seed}", training.steps, completed=trainer.state.step)
            trained = trainer.run(task, log=place.logger(cell_id(self)))
            task.close()
        return folder, trained

    def _made(self, trained: "Decoder", state: "State", text: "Corpus", place: "Place") -> Subject:
        from sbeval.data.dataloader import epoch_tokens

        training = self.training(text)
        name, _, options = self.attention.partition(":")
        evaluated = trained.evaluated_as(self.attention)
        return Subject(
            model=evaluated, name=self.config.size, attention=name, options=options, params=evaluated.n_parameters(),
            train_len=training.length, train_tokens=state.step * training.batch * training.length,
            unique_tokens=epoch_tokens(text.train, training.length), status=_status(state.held_out),
            backend=registry.method(name).backend_name(place.device.type),
            measured={
                "held_out": [(step, round(loss, 4)) for step, loss in state.held_out],
                "ended_by": self._ended_by(state, training),
                **({"corpus_versions": dict(text.versions)} if text.versions else {}),
            },
        )  # fmt: skip

    def _ended_by(self, state: "State", training: "TrainConfig") -> str:
        """The option at whose bound training ended."""
        if state.step < training.steps:
            return "patience"
        return "max_epochs" if training.steps < self.training().steps else "train_tokens"

    def _trained(self, text: "Corpus", place: "Place", progress: "Progress") -> Subject:
        _, trained = self._train(text, place, progress)
        made = self._made(trained.model, trained.state, text, place)
        measured = {**timing(trained), **made.measured}
        return dataclasses.replace(made, tokens_per_s=trained.tokens_per_second, measured=measured)

    def _loaded(self, text: "Corpus", place: "Place") -> Subject:
        from sbeval.pretrained import load

        assert self.config.checkpoint is not None
        found = load.load(
            self.config.checkpoint, place.device, self.config.dtype, trust_remote_code=self.config.trust_remote_code
        )
        found.check_tokenizer(text.tokenizer, self.config.checkpoint)
        found.check_length(max((self.config.eval_len, *self.config.window)), self.config.checkpoint)
        return self._given(found, self.config.checkpoint)

    def _measured(
        self, text: "Corpus", windows: "list[tuple[int, Ids]]", subject: Subject, place: "Place", progress: "Progress"
    ) -> list[Row]:
        from sbeval.evaluation import perplexity

        config = self.config
        how: Any = {"place": place.device, "dtype": config.dtype, "world": place.world}
        task = progress.add(f"evaluate {self.title} to {config.eval_len}", total=len(windows))
        losses = perplexity.measure(
            subject.model, windows, text.tokenizer.byte_lengths, batch=_batch(place, config.eval_len),
            advance=task.advance, say=task.say, **how,
        )  # fmt: skip
        task.close()
        found = rows(losses, subject.train_len)
        documents = [text.test.document(index) for index in range(min(config.documents, len(text.test)))]
        for length in config.window:
            task = progress.add(f"evaluate {self.title} in windows of {length}", total=sum(map(len, documents)))
            whole = perplexity.rolling(
                subject.model, documents, text.tokenizer.decode, window=length, prefix=text.tokenizer.eos,
                batch=_batch(place, length), advance=task.advance, say=task.say, **how,
            )  # fmt: skip
            task.close()
            found += windowed_rows(whole, length)
        return found


def training_config(
    config: Config, *, tokens: int, length: int, lr: float, seed: int, sparse: bool = False
) -> "TrainConfig":
    """How a model is trained on so many tokens, `length` at a time."""
    from sbeval.training.config import TrainConfig

    batch = max(1, config.batch_tokens // length)
    micro = config.micro_batch_tokens and max(1, config.micro_batch_tokens // length)
    steps = max(1, tokens // (batch * length))
    return TrainConfig(
        steps=steps, batch=batch, length=length, micro_batch=micro and min(micro, batch), lr=lr,
        schedule=config.schedule, warmup=max(1, steps // 20), optimizer=config.optimizer, seed=seed,
        dtype=config.dtype, sparse=sparse,
    )  # fmt: skip


def outcome(
    subject: Subject, rows: Sequence[Any], *, family: str, task: str, eval_len: int, seed: int, corpus: str,
    corpus_digest: str, tokenizer: str, measured: Mapping[str, object] = MappingProxyType({}),
) -> Outcome:  # fmt: skip
    """What a finished cell found of a model; its rows, of a class with a status, get the model's."""
    unique = subject.unique_tokens
    return Outcome(
        identity=Identity(
            family=family, task=task, model=subject.name, attention=subject.attention, options=subject.options,
            params=subject.params, train_len=subject.train_len, eval_len=eval_len, seed=seed,
        ),
        rows=[dataclasses.replace(row, status=subject.status) for row in rows], corpus=corpus,
        corpus_digest=corpus_digest, tokenizer=tokenizer, train_tokens=subject.train_tokens, unique_tokens=unique,
        epochs=round(subject.train_tokens / unique, 4) if unique else None, backend=subject.backend,
        tokens_per_s=subject.tokens_per_s, measured={**measured, **subject.measured},
    )  # fmt: skip


def cells(config: Config) -> list[Cell]:
    """The grid: every method with every seed, or the model of a checkpoint.

    InputError names a method or option that is not known.
    """
    from sbeval.pretrained import load

    if config.checkpoint is not None:
        own = config.tokenizer if load.is_own(config.checkpoint) else config.checkpoint
        return [Cell(config=dataclasses.replace(config, attention=("",), seeds=(0,), tokenizer=own))]
    methods = dict.fromkeys(model_config.canonical_attention(spec) for spec in config.attention)
    return [
        Cell(config=dataclasses.replace(config, attention=(spec,), seeds=(seed,)))
        for seed in dict.fromkeys(config.seeds)
        for spec in methods
    ]


def rows(losses: "PositionLosses", train_len: int) -> list[Row]:
    """Every figure that follows from the losses by position."""
    from sbeval.evaluation import perplexity

    out = [
        _row("loss", "nats/token", losses.mean(first, last), position_start=first, position_end=last + 1)
        for first, last in perplexity.bins(losses.length)
    ]
    k = max(1, train_len // 4)
    for length in perplexity.lengths(train_len, losses.length):
        out.append(_row("perplexity", "1", losses.perplexity(length), context_length=length))
        out.append(_row("bits_per_byte", "bits/byte", losses.bits_per_byte(length), context_length=length))
        if length >= k:
            last = losses.mean(length - k + 1, length)
            out.append(_row("loss_last_k", "nats/token", last, context_length=length, last_k=k))
    return out


def windowed_rows(losses: "Rolling", window: int) -> list[Row]:
    """Perplexity per token, word and byte of whole documents in windows of `window` tokens, and bits per byte."""
    return [
        *(_row("perplexity", "1", losses.perplexity(per), window=window, per=per) for per in ("token", "word", "byte")),
        _row("bits_per_byte", "bits/byte", losses.bits_per_byte(), window=window),
    ]


def _row(metric: str, unit: str, estimate: "Estimate", **factors: Any) -> Row:
    return Row(metric=metric, unit=unit, value=estimate.value, stderr=estimate.stderr, n=estimate.n, **factors)


def open_corpus(config: Config, progress: "Progress") -> "Corpus":
    """Open the corpus of a config; it is tokenized the first time."""
    from sbeval.data import corpus

    task = progress.add(f"tokenize {config.corpus}", total=None)
    text = corpus.open(
        config.corpus, tokenizer=config.tokenizer, cache_dir=Path(platformdirs.user_cache_dir("sbeval")),
        max_tokens=config.corpus_tokens, text_field=config.text_field, progress=task.advance,
    )  # fmt: skip
    task.close()
    return text


def _held_out(text: "Corpus", training: "TrainConfig", packing: str) -> "Batch | None":
    """Held-out text to look at while a model trains, the same for every method; None where there is too little."""
    from sbeval.data.dataloader import Batches, epoch_tokens
    from sbeval.training import held_out

    if not epoch_tokens(text.valid, training.length):
        return None
    _, windows = held_out.plan(training.tokens, training.length)
    return Batches(text.valid, training.length, batch=1, seed=0, packing=packing).spread(windows)


def _status(looks: epochs.Looks) -> str:
    return epochs.OVERFIT if epochs.overfits(looks) else ""


def cautions(config: Config, progress: "Progress") -> list[str]:
    """What to say, before models train, of how often they will read their text, and of held-out text; often nothing."""
    from sbeval.data.dataloader import epoch_tokens

    if not config.trains:
        return []
    text = open_corpus(config, progress)
    asked, trained = (cells(config)[0].training(of).tokens for of in (None, text))
    found = epochs.notice(text.name, epoch_tokens(text.train, config.train_len), asked, trained)
    if not epoch_tokens(text.valid, config.train_len):
        found.append(
            f"{text.name!r} has {len(text.valid.tokens):,} tokens of held-out text, less than a window of "
            f"{config.train_len}: no loss on it is measured while models train, and whether they overfit is not known"
        )
    return found


def open_tokenizer(config: Config, progress: "Progress") -> "Tokenizer":
    """The tokenizer of a config's models; one that is trained on the corpus comes with it."""
    from sbeval.data import tokenizer

    if config.checkpoint is None or tokenizer.is_trained(config.tokenizer):
        return open_corpus(config, progress).tokenizer
    return tokenizer.load(config.tokenizer, cache_dir=Path(platformdirs.user_cache_dir("sbeval")))


def _windows(text: "Corpus", config: Config) -> "list[tuple[int, Ids]]":
    """(document, tokens) of the evaluation windows, eval_len + 1 tokens each."""
    chosen = text.test.windows(config.eval_len + 1, per_document=config.windows)
    kept = list(dict.fromkeys(document for document, _ in chosen))[: config.documents]
    return [
        (document, text.test.document(document)[start : start + config.eval_len + 1])
        for document, start in chosen
        if document in kept
    ]


def _batch(place: "Place", length: int) -> int:
    """Windows of `length` that go through the model at once."""
    return max(1, EVAL_TOKENS[place.device.type] // length)


def likely_vocabulary(tokenizer: str) -> int:
    """Vocabulary size for an estimate of cost, without loading the tokenizer."""
    if tokenizer == "bytes":
        return 257
    size = tokenizer.removeprefix("bpe:")
    return int(size) if size.isdecimal() else 32000


def summary(results: "pd.DataFrame") -> "Table":
    """Table for the terminal: loss of the last k tokens at each context length, averaged over seeds."""
    from rich.table import Table

    last = results[results["metric"] == "loss_last_k"]
    lengths = sorted(last["context_length"].unique())
    train_len = int(last["train_len"].iloc[0])
    k = int(last["last_k"].iloc[0])
    table = Table(
        title=f"Loss of the last {k} tokens (nats/token) by context length; trained at {train_len}",
        caption=epochs.caution(results) or None, caption_justify="left",
    )  # fmt: skip
    table.add_column("attention")
    for length in lengths:
        table.add_column(f"{length}", justify="right", style="" if length <= train_len else "bold")
    for (attention, options), group in last.groupby(["attention", "options"]):
        means = group.groupby("context_length")["value"].mean()
        table.add_row(
            f"{attention}:{options}" if options else f"{attention}", *(f"{means[length]:.3f}" for length in lengths)
        )
    return table


FAMILY = Family(
    name=NAME,
    help="Train at one length, evaluate the loss at every position far past it.",
    config=Config, presets=PRESETS, cells=cells, summary=summary, cautions=cautions, completed=uncut,
)  # fmt: skip
