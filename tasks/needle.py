"""Needles in haystacks: the 13 tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) at any length.

A text of a given number of tokens hides what the question after it asks for (see `sbeval.evaluation.ruler_tasks`):

    [...] The grass is green. [...] One of the special magic numbers for long-kayak is: 8231406. The grass is [...]
    What is the special magic number for long-kayak mentioned in the provided text? The special magic number for
    long-kayak mentioned in the provided text is| 8231406                 scored by the model's completion

Models are those that length-gen trains with the same options, or a given checkpoint. With `finetune` tokens they are
first fine-tuned on such prompts, until they solve held-out prompts of their training length
(`sbeval.tasks.needle_tuning`). No test sample is among those: they are drawn from other seeds, part of which is the
word train, their essay begins at another sentence, and qa, whose questions are given, is left out.

So a method has two results: the tokens until it solves a task at its training length, and what it then scores at
others. A method that does not solve a task is not compared at other lengths.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sbeval.config import digest_of
from sbeval.errors import InputError
from sbeval.registry import HELP
from sbeval.sweep.cell import Outcome, TrainingStep, cell_id
from sbeval.sweep.family import Family, Say, unsaid, without_rates
from sbeval.tables.needle import Row as Row
from sbeval.tables.needle import summary
from sbeval.tasks import length_gen
from sbeval.tasks.needle_choice import chosen_rates, taught
from sbeval.tasks.needle_options import FILES, evaluated_tasks, not_finetuned, notes, settled
from sbeval.tasks.needle_options import PRESETS as PRESETS
from sbeval.tasks.needle_options import Config as Config
from sbeval.tasks.needle_tuning import BATCH_TOKENS as BATCH_TOKENS
from sbeval.tasks.needle_tuning import OPTIONS, Tuning, loaded, open_writer, sources
from sbeval.tasks.text_cell import TextCell, outcome
from sbeval.tasks.text_training import cautions, models, open_tokenizer, training_options
from sbeval.training.text_model import check_step

if TYPE_CHECKING:
    import pandas as pd

    from sbeval.evaluation.ruler_prompts import Prompt, Writer
    from sbeval.evaluation.ruler_scores import Answered
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext


NAME = "needle"
# width of the bins of depth, in per cent
BIN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(TextCell):
    """One model and task: a config of one task, and of one checkpoint or one method and seed."""

    config: Config
    family: str = NAME
    row: ClassVar[type[Row]] = Row

    @property
    def task(self) -> str:
        return self.config.tasks[0]

    @property
    def title(self) -> str:
        tuned = " fine-tuned" if self.config.finetune else ""
        return f"{self.model_title}{tuned} {self.task}"

    @property
    def needs(self) -> tuple[TrainingStep, ...]:
        """The training of its model, unless that is given, and its fine-tuning at each rate."""
        # zero-argument super does not work in a class with slots
        return (*super(Cell, self).needs, *self.tunings)

    @property
    def tunings(self) -> tuple[Tuning, ...]:
        """The fine-tuning of its model at each rate, equal for all tasks that the model is evaluated on."""
        if not self.config.finetune:
            return ()
        options = training_options(self.config) | {name: getattr(self.config, name) for name in OPTIONS}
        config = Config(**options, eval_len=self.config.train_len)
        return tuple(Tuning(config=dataclasses.replace(config, finetune_lrs=(rate,))) for rate in config.finetune_lrs)

    @property
    def flops(self) -> float:
        # each prompt is evaluated twice: to generate a completion, and to score the reference
        config = self.config
        return sum(2 * length * self.flops_per_token(length) for length in config.lengths) * config.samples

    def source(self, progress: "Progress") -> str:
        """Return the digests of the training corpus, or of the given model and its tokenizer, and of the texts of
        prompts."""
        given = self.config.checkpoint is not None
        text = [open_tokenizer(self.config, progress).digest] if given else []
        return "-".join([self.origin(progress)[1], *text, digest_of(sources(self.config).digests)])

    def check(self, progress: "Progress") -> None:
        """Raise InputError where a prompt of the test or of fine-tuning does not fit its length."""
        _, writer = open_writer(self.config, progress)
        for length in self.config.lengths:
            writer.prompts(self.task, length, self.config.sample_seed, 1)
        for tuning in self.tunings[:1]:
            for name in self.config.finetune_tasks:
                writer.prompts(name, tuning.length, 0, 1, use="validation")

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Write the prompts, train unless a finished checkpoint exists, and evaluate the samples without an answer."""
        from sbeval.evaluation import ruler_scores, ruler_tasks
        from sbeval.pretrained import load
        from sbeval.tables.values import joined

        config, task = self.config, ruler_tasks.TASKS[self.task]
        text, writer = open_writer(config, progress)
        prompts = {length: self._prompts(writer, length, progress) for length in config.lengths}
        trained = self.train_model(context, progress)
        tuned = taught(self.task, self.tunings, trained, writer, context, progress)
        digest = load.digest(tuned.folder)
        model = loaded(tuned.folder, digest, context.device, self.dtype, config.trust_remote_code)
        model.check_tokenizer(text, tuned.folder)
        model.check_length(max(config.lengths), tuned.folder)
        subject = self.subject(model, trained, context, progress)
        subject = dataclasses.replace(subject, curves={**subject.curves, **tuned.curves})
        rows = list(tuned.rows)
        parts: list[pd.DataFrame] = []
        with self.answers(digest, context, progress) as answers:
            for length, written in prompts.items():
                results = ruler_scores.evaluate(
                    subject.model,
                    written,
                    text,
                    answers,
                    rule=task.score,
                    new_tokens=task.new_tokens,
                    device=context.device,
                    dtype=self.dtype,
                    batch=max(1, BATCH_TOKENS[context.device.type] // length),
                    begin=functools.partial(progress.add, f"evaluate {self.title} at {length}"),
                )
                rows += measured(results, length, task.new_tokens, tuned.factors)
                parts.append(values(results, length))
        return outcome(
            subject,
            rows,
            family=NAME,
            task=self.task,
            eval_len=max(config.lengths),
            seed=self.seed,
            corpus=self.origin(progress)[0],
            corpus_digest=self.source(progress),
            tokenizer=text.name,
            measured={"haystack": sources(config).digests, **tuned.measured},
            values=joined(parts),
        )

    def _prompts(self, writer: "Writer", length: int, progress: "Progress") -> "list[Prompt]":
        task = progress.add(f"write {self.task} at {length}", total=self.config.samples)
        prompts = writer.prompts(self.task, length, self.config.sample_seed, self.config.samples, advance=task.advance)
        task.close()
        return prompts


def values(answers: "list[Answered]", length: int) -> "pd.DataFrame":
    """Return score, greedy and log-probability of each prompt, with the depth of its needle in percent."""
    import pandas as pd

    prompts = pd.DataFrame(
        {
            "unit_id": [str(item.index) for item in answers],
            "score": [item.score for item in answers],
            "greedy": [float(item.greedy) for item in answers],
            # as of losses by step
            "log_probability": [round(item.log_probability, 4) for item in answers],
            "length": length,
            "depth": pd.Series([item.depth for item in answers], dtype="float64"),
        }
    )
    long = prompts.melt(["unit_id", "length", "depth"], var_name="metric")
    return long[["metric", "unit_id", "value", "length", "depth"]]


def measured(answers: "list[Answered]", length: int, new_tokens: int, factors: Mapping[str, Any]) -> list[Row]:
    """Return the rows of one length: over all samples, and by the depth of the needle where there is one.

    factors: columns on fine-tuning.
    """
    import numpy as np

    from sbeval.tables import statistics

    def rows(samples: "list[Answered]", **depths: Any) -> list[Row]:
        metrics = {
            "score": ("1", [item.score for item in samples]),
            "greedy": ("1", [float(item.greedy) for item in samples]),
            "log_probability": ("nats", [item.log_probability for item in samples]),
        }
        if not depths:
            metrics["filled"] = ("1", [(item.tokens + new_tokens) / length for item in samples])
        means = {name: (unit, statistics.mean(np.array(values))) for name, (unit, values) in metrics.items()}
        return [
            Row(metric=name, unit=unit, **dataclasses.asdict(mean), length=length, **depths, **factors)
            for name, (unit, mean) in means.items()
        ]

    out = rows(answers)
    bins: dict[int, list[Answered]] = {}
    for item in answers:
        if item.depth is not None:
            bins.setdefault(min(int(item.depth // BIN) * BIN, 100 - BIN), []).append(item)
    for start, samples in sorted(bins.items()):
        out += rows(samples, depth_start=start, depth_end=start + BIN)
    return out


def cells(config: Config) -> list[Cell]:
    """Return the grid: every model with every task.

    Of several learning rates of fine-tuning and several seeds the models of the first seed; `more` has the rest. Raise
    InputError for unknown names.
    """
    seeds = list(dict.fromkeys(config.seeds))
    return _grid(config, seeds[:1] if _chooses(config) else seeds)


def more(config: Config, results: "pd.DataFrame | None", say: Say = unsaid) -> list[Cell]:
    """Return the models of further seeds, fine-tuned at the learning rate that validation chose with the first seed.

    Where no rate solved a task, the best of them is noise: at every rate that did not diverge. Where all cells failed:
    none, which `say` says. Without results: at every rate, an upper bound.
    """
    first, *others = dict.fromkeys(config.seeds)
    further = _grid(config, others) if _chooses(config) else []
    if results is None:
        return further
    ids: dict[tuple[str, int], list[str]] = {}
    for cell in cells(config) if further else ():
        ids.setdefault(_model(cell), []).append(cell_id(cell))
    rates = {
        model: chosen_rates(config.finetune_lrs, results[results["cell"].isin(some)]) for model, some in ids.items()
    }
    for (name, _), chosen in rates.items():
        if not chosen:
            say(without_rates(f"{NAME} {name}", first))
    return [
        dataclasses.replace(cell, config=dataclasses.replace(cell.config, finetune_lrs=rates[_model(cell)]))
        for cell in further
        if rates[_model(cell)]
    ]


def _model(cell: Cell) -> tuple[str, int]:
    """Return what tells the models of one seed apart: the method, and the training tokens of branches."""
    return cell.attention, cell.config.train_tokens


def _chooses(config: Config) -> bool:
    """Return whether validation chooses, with the first seed, the learning rate of the others."""
    several = len(set(config.seeds)) > 1 and len(set(config.finetune_lrs)) > 1
    return several and bool(config.finetune) and config.checkpoint is None


def _grid(config: Config, seeds: Sequence[int]) -> list[Cell]:
    config = dataclasses.replace(config, seeds=tuple(seeds))
    tasks = evaluated_tasks(config)
    if not_finetuned(config):
        config = dataclasses.replace(config, finetune=0)
    config = settled(config)
    tuned_on = config.finetune_tasks or tuple(name for name in tasks if name not in FILES)
    if not config.finetune:
        tuned_on = ()
    elif not tuned_on:
        raise InputError("--finetune needs a task other than qa: name one with --finetune-task")
    found = [
        Cell(config=dataclasses.replace(model, tasks=(task,), finetune_tasks=tuned_on))
        for model in models(config)
        for task in tasks
    ]
    # not a check of the config: a checkpoint says its length
    for tuning in found[0].tunings[:1]:
        given_by = "--train-len" if config.checkpoint is None else "the checkpoint's"
        check_step("--finetune-batch-tokens", tuning.step_tokens, tuning.length, given_by)
    return found


FAMILY = Family(
    name=NAME,
    help=HELP[NAME],
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    notes=notes,
    more=more,
    cautions=cautions,
    completed=length_gen.completed,
)
