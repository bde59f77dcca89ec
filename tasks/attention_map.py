"""Attention maps: which positions a model that recalls attends to (Tan et al., ICLR 2025, arXiv 2410.17980, figure 4).

Small models learn repeated associative recall (see `sbeval.tasks.mqrar`). At a query of a key that was assigned more
than once, the value after its last use is the latest, those before are stale:

    tokens     1 7 2 5 | 8 6 1 8 7 7 1 5 2 6
    1 again      ^ stale       ^     ^ the query: how much of its weight falls on 8, how much on 7?
                               latest

The weight on the latest and on stale values is measured over a test set, in every layer and head. The figure draws all
weights of one example: the first of the test set, from number `example` on, with a query of a key that has two or more
stale values. The choice does not depend on the model.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sbeval import registry
from sbeval.config import ATTENTION, EVALUATION, LATER, LR, MODEL, SEED, TASK, TRAINED, TRAINING, decided, option
from sbeval.data.recall import Recall
from sbeval.errors import InputError, check_swept
from sbeval.models.config import canonical_attention, flops_per_token
from sbeval.registry import HELP
from sbeval.sweep.cell import Cell as BaseCell
from sbeval.sweep.cell import Outcome, loss_curves, timing
from sbeval.sweep.family import Family
from sbeval.tables.rows import Identity, Measurement, method_of, spec_of
from sbeval.tasks import mqrar
from sbeval.tasks.synthetic import TEST_SEED

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from sbeval.models.decoder import Decoder
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.training.trainer import Trained

NAME = "attention_map"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: sizes of task and model. Layers and heads count from 1, positions from 0.

    accuracy: by `split` (all, fresh, stale). share: mean weight on a `target` at the queries with stale values: the
    `latest` value, all `stale` ones, the query's `own` position (for stick-breaking the remainder), all `other`
    positions. Of the example: token, the token at position `key`; weight, that of position `key` at position `query`,
    with `target` at the queries that have a value.
    """

    kv_pairs: int
    seq_len: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    lr: float | None = None
    optimizer: str | None = field(default=None, metadata=LATER)
    split: str = ""
    layer: int | None = None
    head: int | None = None
    target: str = ""
    query: int | None = None
    key: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Models to analyse: trained as by `sbeval mqrar`, or checkpoints of either command."""

    attention: tuple[str, ...] = option(("stick_breaking", "rope"), MODEL, ATTENTION, TRAINED, metavar="SPEC")
    seeds: tuple[int, ...] = option((0,), TRAINING, SEED, TRAINED, flag="--seed")
    checkpoint: tuple[str, ...] = option((), MODEL, "Models to analyse instead: checkpoint folders of mqrar.")
    vocab_size: int = option(65, TASK, "Tokens V: half are keys, half values.", TRAINED)
    seq_len: int = option(64, TASK, "Positions L of an example, at least 4 N.")
    kv_pairs: int = option(16, TASK, "Key-value pairs N.")
    width: int = option(100, MODEL, "Width of the model.", TRAINED)
    layers: int = option(2, MODEL, "Layers of the model.", TRAINED)
    heads: int = option(1, MODEL, "Attention heads.", TRAINED)
    lr: float = option(3e-3, TRAINING, LR, TRAINED)
    batch: int = option(64, TRAINING, "Examples of an optimizer step.", TRAINED)
    steps: int = option(3000, TRAINING, "Optimizer steps at most.", TRAINED)
    optimizer: str = option("adamw", TRAINING, "adamw, or muon for the matrices inside the blocks.", TRAINED, LATER)
    stop_accuracy: float = option(0.99, TRAINING, "Validation accuracy at which training ends.", TRAINED)
    test_rows: int = option(1000, EVALUATION, "Test examples.")
    example: int = option(0, EVALUATION, "Draw the first test example from this number on that has a key to show.")
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_swept(self, "attention", "seeds")
        if self.example < 0:
            raise InputError(f"--example must be at least 0; got {self.example}")
        # checks the options that both have
        self._mqrar(self.attention[0], self.seeds[0])

    def recall(self, spec: str, seed: int) -> mqrar.Cell:
        """Return the cell of `sbeval mqrar` that trains the model of a method and seed."""
        return mqrar.cells(self._mqrar(spec, seed))[0]

    def _mqrar(self, spec: str, seed: int) -> mqrar.Config:
        return mqrar.Config(
            attention=(spec,),
            seeds=(seed,),
            kv_pairs=(self.kv_pairs,),
            widths=(self.width,),
            lrs=(self.lr,),
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            layers=self.layers,
            heads=self.heads,
            batch=self.batch,
            steps=self.steps,
            optimizer=self.optimizer,
            stop_accuracy=self.stop_accuracy,
            test_rows=self.test_rows,
            dtype=self.dtype,
        )


# 2 layers and d = 100 are from the caption of figure 4; V, L and N from the author's public code
FIGURE_4 = Config()
PRESETS = {
    # both models learn the task in minutes on two cores, unlike with AdamW
    "quick": dataclasses.replace(FIGURE_4, optimizer="muon"),
    "small": dataclasses.replace(FIGURE_4, optimizer="muon", batch=256, steps=6000),
    "h200": dataclasses.replace(FIGURE_4, optimizer="muon", batch=1024, steps=6000),
    # the tokens of 64 epochs of 100,000 rows in batches of 256; here every row is new
    "paper": dataclasses.replace(FIGURE_4, lr=2.15e-3, batch=256, steps=25_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to analyse, and what its rows record about it."""

    model: "Decoder"
    name: str
    train_len: int
    lr: float | None = None
    optimizer: str | None = None
    trained: "Trained | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(BaseCell):
    """One model: a config whose swept fields have one entry each."""

    config: Config
    family: str = NAME
    row: ClassVar[type[Row]] = Row

    @property
    def title(self) -> str:
        if self.config.checkpoint:
            return re.sub(r"[^\w.-]+", "-", self.config.checkpoint[0].strip("/"))
        return f"{self.config.attention[0]} {self.config.kv_pairs} pairs seed {self.config.seeds[0]}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def needs(self) -> tuple[mqrar.Cell, ...]:
        """The cell of mqrar that trains its model; none for a given checkpoint."""
        return () if self.config.checkpoint else (self._recall,)

    @property
    def flops(self) -> float:
        config = self.config
        if config.checkpoint:
            from sbeval.pretrained import load

            each = 2.0 * load.likely_parameters(config.checkpoint[0])
        else:
            each = flops_per_token(self._recall.model(), config.seq_len)
        # one forward pass for predictions, one for weights
        return 2 * each * config.test_rows * config.seq_len

    @property
    def _recall(self) -> mqrar.Cell:
        return self.config.recall(self.config.attention[0], self.config.seeds[0])

    def source(self, progress: "Progress") -> str:
        """Return the digest of a given checkpoint, else an empty string: examples are generated."""
        from sbeval.pretrained import load

        return load.digest(self.config.checkpoint[0]) if self.config.checkpoint else ""

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train the model or load it, and measure its attention weights."""
        from sbeval.tasks.attention_shares import chosen, example_rows, shares
        from sbeval.tasks.drawn import predict
        from sbeval.tasks.recall_data import accuracies, held_out

        subject = self._loaded(context) if self.config.checkpoint else self._trained(context, progress)
        shape, config = subject.model.config, self.config
        if config.checkpoint and shape.vocab_size <= config.seq_len:
            raise InputError(
                f"--seq-len {config.seq_len} must be below the vocabulary of {config.checkpoint[0]}, "
                f"{shape.vocab_size}; the model was trained on sequences of {subject.train_len}"
            )
        if subject.train_len != config.seq_len:
            progress.say(
                f"{subject.name} was trained on sequences of {subject.train_len} and is analysed at {config.seq_len}"
            )
        task = Recall(vocab_size=shape.vocab_size, seq_len=config.seq_len, kv_pairs=config.kv_pairs)
        examples = held_out(task, TEST_SEED, config.test_rows, context.device)
        sizes: dict[str, Any] = {
            "kv_pairs": task.kv_pairs,
            "seq_len": task.seq_len,
            "vocab_size": task.vocab_size,
            "width": shape.width,
            "layers": shape.layers,
            "heads": shape.heads,
            "lr": subject.lr,
            "optimizer": subject.optimizer,
        }
        # before the work: raises InputError where no example fits
        example = chosen(examples, config.example)
        rows = [
            Row(metric="accuracy", unit="1", **dataclasses.asdict(score), **factors, **sizes)
            for score, factors in accuracies(examples, predict(subject.model, examples, config.dtype))
            if "split" in factors
        ]
        rows += [Row(**row, **sizes) for row in shares(subject.model.eval(), examples, task, progress.say)]
        rows += [Row(**row, **sizes) for row in example_rows(subject.model, examples.tokens[example], task)]
        return self._outcome(subject, rows, context, example, self.source(progress))

    def _trained(self, context: "RunContext", progress: "Progress") -> Subject:
        config = self.config
        trained = self._recall.trained(context, progress)
        name = f"{config.layers}x{config.width}"
        return Subject(
            model=trained.model,
            name=name,
            train_len=config.seq_len,
            lr=config.lr,
            optimizer=config.optimizer,
            trained=trained,
        )

    def _loaded(self, context: "RunContext") -> Subject:
        from sbeval.training import checkpoint

        folder = Path(self.config.checkpoint[0])
        model = checkpoint.load_model(folder, context.device).eval()
        length = checkpoint.training_length(folder) or self.config.seq_len
        return Subject(model=model, name=folder.resolve().name, train_len=length)

    def _outcome(self, subject: Subject, rows: list[Row], context: "RunContext", example: int, source: str) -> Outcome:
        config, trained = self.config, subject.trained
        name, options = method_of(subject.model.config.attention)
        return Outcome(
            identity=Identity(
                family=NAME,
                task=mqrar.NAME,
                model=subject.name,
                attention=name,
                options=options,
                params=subject.model.n_parameters(),
                train_len=subject.train_len,
                eval_len=config.seq_len,
                seed=config.seeds[0],
            ),
            rows=rows,
            corpus_digest=source,
            train_tokens=trained.state.step * config.batch * config.seq_len if trained else 0,
            backend=registry.method(name).backend_name(context.device.type),
            tokens_per_s=trained.tokens_per_second if trained else None,
            measured={"example": example, **(timing(trained) if trained else {})},
            curves={**loss_curves(trained.state), "validation_accuracy": trained.state.scores} if trained else {},
        )


def cells(config: Config) -> list[Cell]:
    """Return every method with every seed, or the checkpoints. Raise InputError for an unknown method or folder."""
    if config.checkpoint:
        from sbeval.pretrained import load
        from sbeval.training import checkpoint

        for folder in config.checkpoint:
            if not load.is_own(folder):
                raise InputError(f"--checkpoint {folder}: not a checkpoint folder of sbeval")
            if checkpoint.training_tokenizer(checkpoint.find(Path(folder)) or Path(folder)):
                raise InputError(f"--checkpoint {folder}: a language model; give one of sbeval mqrar or attention-map")
        one = dataclasses.replace(config, attention=("stick_breaking",), seeds=(0,))
        return [Cell(config=dataclasses.replace(one, checkpoint=(folder,))) for folder in config.checkpoint]
    methods = dict.fromkeys(canonical_attention(spec) for spec in config.attention)
    return [
        Cell(config=dataclasses.replace(config, attention=(spec,), seeds=(seed,)))
        for seed in dict.fromkeys(config.seeds)
        for spec in methods
    ]


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: weights at queries with stale values, by method, layer and head."""
    from rich.table import Table

    from sbeval.tasks.attention_shares import TARGETS

    title = "Attention weight at queries with stale values, mean over the test set"
    table = Table(title=title, caption="*: the head of a model with the most weight on the latest value.")
    for name in ("attention", "accuracy", "layer", "head", *TARGETS):
        table.add_column(name, justify="left" if name == "attention" else "right", no_wrap=name != "attention")
    keys = ["attention", "options", "model"]
    for (attention, options, _), group in results.groupby(keys):
        accuracy = group[(group["metric"] == "accuracy") & (group["split"] == "stale")]["value"].mean()
        share = group[group["metric"] == "share"]
        means = share.pivot_table(index=["layer", "head"], columns="target", values="value")
        for where, row in means.iterrows():
            assert isinstance(where, tuple)
            best = "*" if where == means["latest"].idxmax() else ""
            table.add_row(
                spec_of(attention, options),
                f"{accuracy:.3f}",
                f"{where[0]:g}",
                f"{best}{where[1]:g}",
                *(f"{row[target]:.3f}" for target in TARGETS),
            )
    return table


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("checkpoint") and (surplus := decided(Config, given)):
        raise InputError(f"{' and '.join(surplus)}: a --checkpoint decides that already")
    return given


FAMILY = Family(
    name=NAME,
    help=HELP[NAME],
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    completed=_completed,
)
