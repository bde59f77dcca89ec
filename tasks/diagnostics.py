"""When a method learns to retrieve: copying, induction heads and reach, over training and of the finished model.

    tokens seen    5 M       10 M       15 M   ...   105 M
    copy_gain      0.0       0.1        2.3          6.1      nats that a token costs less when it is copied

`sbeval.evaluation.diagnostics` defines the metrics. Those of a training come from its checkpoint: models are those that
`length-gen` trains with the same options, --diagnostics among them. The finished model is read at longer distances too.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sbeval.config import EVALUATION, LATER, TRAINING, option
from sbeval.errors import InputError
from sbeval.registry import HELP
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables import epochs
from sbeval.tables.rows import Measurement, spec_of
from sbeval.tasks import length_gen
from sbeval.tasks.text_cell import Subject, TextCell, outcome
from sbeval.tasks.text_training import cautions, models, open_corpus
from sbeval.training.text_model import TRAINING as TRAINING_OPTIONS
from sbeval.training.text_model import EvaluatedModel, completed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from sbeval.data.corpus import Corpus
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext

NAME = "diagnostics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: the training tokens that the model had seen, 0 if unknown; the distance of the metric in tokens. Layers
    and heads count from 1 and have rows for the finished model; `heads` is what a row without them says of all heads:
    their `mean` or the `highest`. Of models trained here: peak learning rate, optimizer, tokens of a step, schedule.
    status: `overfit`, or empty."""

    tokens_seen: int
    distance: int | None = None
    layer: int | None = None
    head: int | None = None
    heads: str = ""
    lr: float | None = None
    optimizer: str = ""
    batch_tokens: int | None = None
    schedule: str = ""
    status: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(EvaluatedModel):
    """Models to diagnose while they train, or the model of a checkpoint."""

    diagnostics: int = option(20, TRAINING, "Times at which models are diagnosed while they train, at most.", LATER)
    longest: int = option(16384, EVALUATION, "Longest distance in tokens that the finished model is read at.")

    def __post_init__(self) -> None:
        # zero-argument super does not work in a class with slots
        EvaluatedModel.__post_init__(self)
        if not 128 <= self.longest <= 65536:
            raise InputError(f"--longest must be 128 to 65536 tokens; got {self.longest}")


def _preset(name: str, **options: Any) -> Config:
    """Return the preset of length-gen of this name, with diagnostics."""
    trained = {entry: getattr(length_gen.PRESETS[name], entry) for entry in TRAINING_OPTIONS}
    return Config(**{**trained, "diagnostics": 20, **options})


PRESETS = {
    "quick": _preset("quick", longest=1024),
    "small": _preset("small"),
    "h200": _preset("h200"),
    "paper": _preset("paper", longest=65536),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(TextCell):
    """One method and seed: a config whose `attention` and `seeds` have one entry each."""

    config: Config
    family: str = NAME
    row: ClassVar[type[Row]] = Row

    @property
    def flops(self) -> float:
        # passages of the longest distance, 4 with and 4 without, and as much again for all shorter ones
        return self.flops_per_token(self.config.longest) * 16 * self.config.longest

    def source(self, progress: "Progress") -> str:
        """Return the digest of the tokenized corpus, after that of a given model."""
        return self.text_digest(open_corpus(self.config, progress))

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train, unless a finished checkpoint exists, and read the finished model."""
        text = open_corpus(self.config, progress)
        subject = self.evaluated(text, 2 * self.config.longest, context, progress)
        task = progress.add(f"diagnose {self.title}", total=1)
        readings = [*subject.diagnoses, *self._finished(text, subject, context, task.say)]
        task.advance()
        task.close()
        return outcome(
            subject,
            [dataclasses.replace(row, **self.recipe()) for row in rows(readings)],
            family=NAME,
            task=text.name,
            eval_len=self.config.longest,
            seed=self.seed,
            corpus=text.name,
            corpus_digest=self.text_digest(text),
            tokenizer=text.tokenizer.name,
            values=values(readings),
        )

    def _finished(self, text: "Corpus", subject: Subject, context: "RunContext", say: Any) -> list[dict[str, Any]]:
        """Return the readings of the finished model that its training has not taken at its end."""
        from sbeval.evaluation import diagnostics

        seen = max((reading["tokens_seen"] for reading in subject.diagnoses), default=subject.tokens_seen)
        last = [reading for reading in subject.diagnoses if reading["tokens_seen"] == seen]
        above = max((reading["distance"] or 0 for reading in last if reading["layer"] is None), default=0)
        size, tokenizer = diagnostics.Size(self.config.longest), text.tokenizer
        probes = diagnostics.probes(text.test, tokenizer.vocab_size, tokenizer.eos, size, subject.train_len, above)
        readings = diagnostics.measure(subject.model, probes, context.device, self.config.dtype, say)
        return [{"tokens_seen": seen, **dataclasses.asdict(reading)} for reading in readings]


def cells(config: Config) -> list[Cell]:
    """Return every method with every seed, or the model of a checkpoint.

    Raise InputError for an unknown method or option.
    """
    return [Cell(config=one) for one in models(config)]


def rows(readings: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Yield the rows of readings: of heads one by one at the end, and their mean and the highest at every time."""
    end = max(reading["tokens_seen"] for reading in readings)
    of_heads: dict[tuple[int, str, int | None], list[Mapping[str, Any]]] = {}
    for reading in readings:
        if reading["layer"] is None or reading["tokens_seen"] == end:
            yield Row(**reading)
        if reading["layer"] is not None:
            key = reading["tokens_seen"], reading["metric"], reading["distance"]
            of_heads.setdefault(key, []).append(reading)
    for (seen, metric, distance), each in of_heads.items():
        found = [reading["value"] for reading in each]
        for heads, value in ("mean", sum(found) / len(found)), ("highest", max(found)):
            yield Row(
                metric=metric,
                unit=each[0]["unit"],
                value=value,
                n=len(found),
                tokens_seen=seen,
                distance=distance,
                heads=heads,
            )


def values(readings: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    """Return all readings, of heads too: `unit_id` is the head, as layer.head, or empty."""
    import pandas as pd

    names = ("tokens_seen", "distance", "layer", "head")
    table = pd.DataFrame(
        [
            {
                "metric": reading["metric"],
                "unit_id": "" if reading["layer"] is None else f"{reading['layer']}.{reading['head']}",
                "value": reading["value"],
                **{name: reading[name] for name in names},
            }
            for reading in readings
        ]
    )
    return table.astype({name: "Int64" for name in names})


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: gains of finished models by distance, averaged over seeds."""
    from rich.table import Table

    end = results.groupby(["attention", "options", "seed"])["tokens_seen"].transform("max")
    last = results[(results["tokens_seen"] == end) & results["metric"].isin(["copy_gain", "passage_gain"])]
    distances = sorted(last["distance"].dropna().unique())
    table = Table(
        title="Nats per token saved by a copy, by distance of the copied tokens",
        caption=epochs.caution(results) or None,
        caption_justify="left",
    )
    table.add_column("attention")
    table.add_column("copy of")
    for distance in distances:
        table.add_column(f"{distance:g}", justify="right")
    for metric, name in ("copy_gain", "random tokens"), ("passage_gain", "64 tokens of text"):
        for (attention, options), group in last[last["metric"] == metric].groupby(["attention", "options"]):
            means = group.groupby("distance")["value"].mean()
            shown = (f"{means[distance]:.2f}" if distance in means else "" for distance in distances)
            table.add_row(spec_of(attention, options), name, *shown)
    return table


FAMILY = Family(
    name=NAME,
    help=HELP[NAME],
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    cautions=cautions,
    completed=completed,
)
