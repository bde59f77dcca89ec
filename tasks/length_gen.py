"""Length generalisation: train at one length, measure the loss at every position far past it.

The paper's figure 5 (Tan et al., ICLR 2025, arXiv 2410.17980) asks whether a model trained on windows of `train_len`
tokens still predicts well with `eval_len` tokens of context. Every method trains on the same tokens in the same order.

    train    |--- train_len ---|                       loss on every token
    test     |--- train_len ---|------- eval_len ------|   loss at each position, over documents that long
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import platformdirs
from rich.table import Table

from sbeval import corpus, model, perplexity, registry
from sbeval.batches import Batches
from sbeval.corpus import Corpus
from sbeval.errors import InputError, choose
from sbeval.estimate import Estimate
from sbeval.model import ModelConfig
from sbeval.perplexity import PositionLosses
from sbeval.progress import Progress
from sbeval.sweep import Outcome, Place, timing
from sbeval.table import Identity, Measurement
from sbeval.tokenizer import Ids
from sbeval.train import TrainConfig, Trained, Trainer

FAMILY = "length_gen"
# tokens of evaluation windows that go through the model at once
EVAL_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: positions position_start <= i < position_end of a loss; the context length l of a figure over positions
    1 ... l; the last k of them."""

    position_start: int | None = None
    position_end: int | None = None
    context_length: int | None = None
    last_k: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A sweep of attention methods and seeds. Lengths and amounts are in tokens."""

    attention: tuple[str, ...] = ("stick_breaking", "rope")
    seeds: tuple[int, ...] = (0,)
    size: str = "quick"
    train_len: int = 256
    eval_len: int = 4096
    train_tokens: int = 300 * 8 * 256
    batch_tokens: int = 8 * 256
    micro_batch_tokens: int | None = None
    lr: float = 3e-3
    schedule: str = "cosine"
    packing: str = "stream"
    corpus: str = "stdlib"
    tokenizer: str = "bytes"
    text_field: str = "text"
    corpus_tokens: int | None = None  # how much of a streamed corpus to keep
    documents: int = 32  # evaluation documents at most, the first that are long enough
    windows: int = 1  # disjoint windows of each at most
    dtype: str = "float32"

    def __post_init__(self) -> None:
        choose("model size", self.size, model.SIZES)
        choose("packing", self.packing, ("stream", "documents"))
        for name in ("train_len", "train_tokens", "batch_tokens", "documents", "windows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("micro_batch_tokens", "corpus_tokens"):
            if (amount := getattr(self, name)) is not None and amount < 1:
                raise InputError(f"{name} must be at least 1, or left out; got {amount}")
        if self.eval_len < self.train_len:
            raise InputError(
                f"--eval-len {self.eval_len} is shorter than --train-len {self.train_len}: nothing to generalise to; "
                f"give --eval-len {self.train_len} or more"
            )


PRESETS = {
    # 1.3 M parameters, for a laptop: minutes on two cores
    "quick": Config(),
    # 25 M parameters, 105 M tokens: one GPU of any kind
    "small": Config(
        size="25m", train_len=2048, eval_len=16384, train_tokens=800 * 131072, batch_tokens=131072,
        micro_batch_tokens=32768, lr=2e-3, tokenizer="bpe:8192", documents=64,
    ),
    # the same model and budget without accumulation
    "h200": Config(
        size="25m", train_len=2048, eval_len=16384, train_tokens=800 * 131072, batch_tokens=131072, lr=2e-3,
        tokenizer="bpe:8192", documents=64, windows=4,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method and seed: a config whose `attention` and `seeds` have one entry each."""

    config: Config
    family: str = FAMILY

    @property
    def attention(self) -> str:
        return self.config.attention[0]

    @property
    def seed(self) -> int:
        return self.config.seeds[0]

    @property
    def title(self) -> str:
        return f"{self.attention} seed {self.seed}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def flops(self) -> float:
        config, shape = self.config, self.model(_likely_vocabulary(self.config.tokenizer))
        train = 3 * model.flops_per_token(shape, config.train_len) * self.training().tokens
        evaluated = config.documents * config.windows * config.eval_len
        return train + model.flops_per_token(shape, config.eval_len) * evaluated

    def model(self, vocab_size: int) -> ModelConfig:
        return model.named(self.config.size, vocab_size=vocab_size, attention=self.attention)

    def training(self) -> TrainConfig:
        config = self.config
        batch = max(1, config.batch_tokens // config.train_len)
        micro = config.micro_batch_tokens and max(1, config.micro_batch_tokens // config.train_len)
        steps = max(1, config.train_tokens // (batch * config.train_len))
        return TrainConfig(
            steps=steps, batch=batch, length=config.train_len, micro_batch=micro and min(micro, batch), lr=config.lr,
            schedule=config.schedule, warmup=max(1, steps // 20), seed=self.seed, dtype=config.dtype,
        )  # fmt: skip

    def source(self, progress: Progress) -> str:
        """Digest of the tokenized corpus."""
        return open_corpus(self.config, progress).digest

    def run(self, place: Place, progress: Progress) -> Outcome:
        """Train, unless a checkpoint has it, and evaluate."""
        text = open_corpus(self.config, progress)
        # before training: a corpus without documents this long is the user's to change
        windows = _windows(text, self.config)
        trained = self._train(text, place, progress)
        task = progress.add(f"evaluate {self.title} to {self.config.eval_len}", total=len(windows))
        losses = perplexity.measure(
            trained.model,
            windows,
            text.tokenizer.byte_lengths,
            place=place.device,
            dtype=self.config.dtype,
            batch=max(1, EVAL_TOKENS[place.device.type] // self.config.eval_len),
            advance=task.advance,
        )
        task.close()
        return self._outcome(text, trained, losses, place)

    def _train(self, text: Corpus, place: Place, progress: Progress) -> Trained:
        shape, training = self.model(text.tokenizer.vocab_size), self.training()
        folder = place.checkpoint([shape, training, text.digest, self.config.packing])
        batches = Batches(text.train, training.length, training.batch, self.seed, self.config.packing)
        trainer = Trainer(shape, training, batches, folder, place.device)
        task = progress.add(f"train {self.title}", total=training.steps, completed=trainer.state.step)
        trained = trainer.run(task, log=place.logger(self))
        task.close()
        return trained

    def _outcome(self, text: Corpus, trained: Trained, losses: PositionLosses, place: Place) -> Outcome:
        name, _, options = self.attention.partition(":")
        return Outcome(
            identity=Identity(
                family=FAMILY, task=text.name, model=self.config.size, attention=name, options=options,
                params=trained.model.n_parameters(), train_len=self.config.train_len, eval_len=self.config.eval_len,
                seed=self.seed,
            ),
            rows=rows(losses, self.config.train_len),
            corpus=text.name,
            corpus_digest=text.digest,
            tokenizer=text.tokenizer.name,
            train_tokens=self.training().tokens,
            backend=registry.method(name).backend_name(place.device.type),
            tokens_per_s=trained.tokens_per_second,
            measured=timing(trained),
        )  # fmt: skip


def cells(config: Config) -> list[Cell]:
    """The grid: every method with every seed. InputError names a method or option that is not known."""
    methods = dict.fromkeys(model.canonical_attention(spec) for spec in config.attention)
    return [
        Cell(config=dataclasses.replace(config, attention=(spec,), seeds=(seed,)))
        for seed in dict.fromkeys(config.seeds)
        for spec in methods
    ]


def rows(losses: PositionLosses, train_len: int) -> list[Row]:
    """Every figure that follows from the losses by position."""
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


def _row(metric: str, unit: str, estimate: Estimate, **factors: int) -> Row:
    return Row(metric=metric, unit=unit, value=estimate.value, stderr=estimate.stderr, n=estimate.n, **factors)


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """Open the corpus of a config; it is tokenized the first time."""
    task = progress.add(f"tokenize {config.corpus}", total=None)
    text = corpus.open(
        config.corpus, tokenizer=config.tokenizer, cache_dir=Path(platformdirs.user_cache_dir("sbeval")),
        max_tokens=config.corpus_tokens, text_field=config.text_field, progress=task.advance,
    )  # fmt: skip
    task.close()
    return text


def _windows(text: Corpus, config: Config) -> list[tuple[int, Ids]]:
    """(document, tokens) of the evaluation windows, eval_len + 1 tokens each."""
    chosen = text.test.windows(config.eval_len + 1, per_document=config.windows)
    kept = list(dict.fromkeys(document for document, _ in chosen))[: config.documents]
    return [
        (document, text.test.document(document)[start : start + config.eval_len + 1])
        for document, start in chosen
        if document in kept
    ]


def _likely_vocabulary(tokenizer: str) -> int:
    """Vocabulary size for an estimate of cost, without loading the tokenizer."""
    if tokenizer == "bytes":
        return 257
    size = tokenizer.removeprefix("bpe:")
    return int(size) if size.isdecimal() else 32000


def summary(results: pd.DataFrame) -> Table:
    """Table for the terminal: loss of the last k tokens at each context length, averaged over seeds."""
    last = results[results["metric"] == "loss_last_k"]
    lengths = sorted(last["context_length"].unique())
    train_len = int(last["train_len"].iloc[0])
    k = int(last["last_k"].iloc[0])
    table = Table(title=f"Loss of the last {k} tokens (nats/token) by context length; trained at {train_len}")
    table.add_column("attention")
    for length in lengths:
        table.add_column(f"{length}", justify="right", style="" if length <= train_len else "bold")
    for (attention, options), group in last.groupby(["attention", "options"]):
        means = group.groupby("context_length")["value"].mean()
        table.add_row(
            f"{attention}:{options}" if options else f"{attention}", *(f"{means[length]:.3f}" for length in lengths)
        )
    return table
