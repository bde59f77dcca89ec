"""Needles in haystacks: the 13 tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) at any length.

A text of a given number of tokens hides what the question after it asks for (see `sbeval.evaluation.ruler_tasks`):

    [...] The grass is green. [...] One of the special magic numbers for long-kayak is: 8231406. The grass is [...]
    What is the special magic number for long-kayak mentioned in the provided text? The special magic number for
    long-kayak mentioned in the provided text is| 8231406                 scored by the model's completion

Models are those that length-gen trains with the same options, or a given checkpoint. With `finetune` tokens they are
first fine-tuned on such prompts of their training length, with the answers as targets. No test sample is among those:
they are drawn from other seeds, part of which is the word train, their essay begins at another sentence, and qa, whose
questions are given, is left out.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from sbeval.config import DATA, LATER, MODEL, TASK, TRAINING, digest_of, option
from sbeval.errors import InputError, choose
from sbeval.models.config import ModelConfig
from sbeval.sweep.cell import Outcome, TrainingStep, cell_id
from sbeval.sweep.family import Family
from sbeval.tables import epochs
from sbeval.tables.published import LONGEST, RULER_TASKS, SHORTEST
from sbeval.tables.rows import Measurement
from sbeval.tasks import length_gen
from sbeval.tasks.text_cell import TextCell, outcome
from sbeval.tasks.text_training import (
    cautions,
    models,
    open_tokenizer,
    train_config,
    training_options,
)
from sbeval.training.text_model import likely_vocabulary, uncut

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.table import Table

    from sbeval.data.tokenizer import Tokenizer
    from sbeval.evaluation.ruler_prompts import Prompt, Writer
    from sbeval.evaluation.ruler_scores import Answered, Samples
    from sbeval.evaluation.ruler_texts import Sources
    from sbeval.pretrained.load import Pretrained
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.training.config import TrainConfig


NAME = "needle"
# tokens of prompts in a forward pass
BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 17}
# width of the bins of depth, in per cent
BIN = 10
# option and file of the questions of RULER's qa tasks
FILES = {
    "qa_1": ("squad", "SQuAD v2's dev-v2.0.json"),
    "qa_2": ("hotpot", "HotpotQA's hotpot_dev_distractor_v1.json"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: length of prompt and answer in tokens; depth_start <= depth < depth_end of the needle, in per cent (100
    is in the last bin; empty: all samples); tokens of fine-tuning. status: `overfit` where the model's training on text
    was, or empty."""

    length: int
    depth_start: int | None = None
    depth_end: int | None = None
    finetune_tokens: int = 0
    status: str = field(default="", metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(length_gen.Config):
    """Tasks and lengths for the models that length-gen trains with the same options, or for that of `checkpoint`."""

    tasks: tuple[str, ...] = option(
        (), TASK, f"{', '.join(RULER_TASKS)}. Default: all whose files are given.", flag="--task", metavar="NAME"
    )
    lengths: tuple[int, ...] = option(
        (512, 1024, 2048), TASK, f"Tokens of prompt and answer, {SHORTEST} to {LONGEST}.", flag="--length"
    )
    samples: int = option(500, TASK, "Prompts of each task and length.")
    sample_seed: int = option(42, TASK, "Seed of the prompts.")
    essays: str | None = option(None, DATA, "File or folder of text to hide needles in. Default: Walden.")
    squad: str | None = option(None, DATA, "SQuAD v2, dev-v2.0.json, for qa_1.")
    hotpot: str | None = option(None, DATA, "HotpotQA, hotpot_dev_distractor_v1.json, for qa_2.")
    finetune: int = option(0, TRAINING, "Tokens of prompts of the training length to fine-tune on before evaluation.")
    finetune_lr: float = option(1e-3, TRAINING, "Peak learning rate of fine-tuning.")
    finetune_tasks: tuple[str, ...] = option(
        (), TRAINING, "Tasks to fine-tune on. Default: those evaluated.", flag="--finetune-task", metavar="NAME"
    )
    checkpoint: str | None = option(
        None,
        MODEL,
        "Evaluate this model instead: our checkpoint folder, or a Hugging Face folder or name.",
        LATER,
        flag="--checkpoint --model",
    )
    # not used by needle, but part of the ids of published cells
    eval_len: int = 4096
    documents: int = 32
    windows: int = 1
    window: tuple[int, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        # zero-argument super does not work in a class with slots
        length_gen.Config.__post_init__(self)
        for name in (*self.tasks, *self.finetune_tasks):
            choose("needle task", name, RULER_TASKS)
        if wrong := [length for length in self.lengths if not SHORTEST <= length <= LONGEST]:
            raise InputError(f"--length must be {SHORTEST} to {LONGEST} tokens; got {wrong[0]}")
        if not self.lengths or self.samples < 1 or self.finetune < 0 or not self.finetune_lr > 0:
            raise InputError(
                "needle needs a length, 1 sample or more, and fine-tuning of 0 tokens or more at an lr above 0"
            )
        if lacking := [name for name in self.tasks if name in FILES and getattr(self, FILES[name][0]) is None]:
            raise InputError(_lacks(lacking[0]))
        if questions := [name for name in self.finetune_tasks if name in FILES]:
            raise InputError(f"{questions[0]} cannot be fine-tuned on: its questions are those of the test")


PRESETS = {
    # 1.3 M parameters: every step in minutes on two cores, but too little training to find a needle
    "quick": length_gen.preset(
        Config, "quick", tokenizer="bpe:1024", train_len=512, eval_len=512, train_tokens=50 * 4096, batch_tokens=4096,
        tasks=("niah_single_1",), lengths=(512, 1024, 2048), samples=20, finetune=100 * 4096, finetune_lr=3e-3,
    ),
    "small": length_gen.preset(
        Config, "small", lengths=(1024, 2048, 4096, 8192, 16384), samples=100, finetune=200 * 131072
    ),
    # the models of length-gen's preset h200, and two more methods
    "h200": length_gen.preset(
        Config, "h200", attention=("stick_breaking", "rope", "alibi", "forgetting"),
        lengths=(1024, 2048, 4096, 8192, 16384), samples=100, finetune=200 * 131072,
    ),
    # RULER as published: all tasks, 500 samples, 4k to 128k, nothing fine-tuned
    "paper": length_gen.preset(
        Config, "paper", attention=("stick_breaking", "rope"), lengths=tuple(4096 << octave for octave in range(6)),
    ),
}  # fmt: skip


# options of fine-tuning, besides those of the training on text
TUNING = ("checkpoint", "finetune", "finetune_lr", "finetune_tasks", "essays", "squad", "hotpot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning(TrainingStep):
    """The fine-tuning of one model, the same for all tasks that it is evaluated on."""

    config: Config

    @property
    def cell(self) -> "Cell":
        return Cell(config=dataclasses.replace(self.config, tasks=self.config.finetune_tasks[:1]))

    @property
    def title(self) -> str:
        return f"fine-tune {self.cell.model_title}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def flops(self) -> float:
        return 3 * self.cell.flops_per_token(self.config.train_len) * self.config.finetune

    @property
    def leaves(self) -> ModelConfig:
        return self.cell.model(likely_vocabulary(self.config.tokenizer))

    def train(self, context: "RunContext", progress: "Progress") -> Path:
        """Train and fine-tune, unless a finished checkpoint exists, and return the checkpoint folder."""
        return self.cell.train(context, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(TextCell):
    """One model and task: a config of one task, and of one checkpoint or one method and seed."""

    config: Config
    family: str = NAME

    @property
    def task(self) -> str:
        return self.config.tasks[0]

    @property
    def title(self) -> str:
        tuned = " fine-tuned" if self.config.finetune else ""
        return f"{self.model_title}{tuned} {self.task}"

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def needs(self) -> tuple[TrainingStep, ...]:
        """The training of its model, unless that is given, and its fine-tuning."""
        # zero-argument super does not work in a class with slots
        training = super(Cell, self).needs
        if not self.config.finetune:
            return training
        options = training_options(self.config) | {name: getattr(self.config, name) for name in TUNING}
        return (*training, Tuning(config=Config(**options, eval_len=self.config.train_len)))

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
        return "-".join([self.origin(progress)[1], *text, digest_of(_sources(self.config).digests)])

    def check(self, progress: "Progress") -> None:
        """Raise InputError where a prompt of the test or of fine-tuning does not fit its length."""
        _, writer = self._writer(progress)
        for length in self.config.lengths:
            writer.prompts(self.task, length, self.config.sample_seed, 1)
        for name in self.config.finetune_tasks:
            writer.prompts(name, self._finetune_len, self.seed, 1, training=True)

    def train(self, context: "RunContext", progress: "Progress") -> Path:
        """Train and fine-tune, unless a finished checkpoint exists, and return the checkpoint folder."""
        text, writer = self._writer(progress)
        return Path(self._tuned(self.train_model(context, progress), text, writer, context, progress))

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Write the prompts, train unless a finished checkpoint exists, and evaluate the samples without an answer."""
        from sbeval.evaluation import ruler_tasks
        from sbeval.evaluation.ruler_scores import ask
        from sbeval.pretrained import load

        config = self.config
        text, writer = self._writer(progress)
        prompts = {length: self._prompts(writer, length, progress) for length in config.lengths}
        trained = self.train_model(context, progress)
        folder = self._tuned(trained, text, writer, context, progress)
        digest = load.digest(folder)
        model = _loaded(folder, digest, context.device, self.dtype, config.trust_remote_code)
        model.check_tokenizer(text, folder)
        model.check_length(max(config.lengths), folder)
        subject = self.subject(model, trained, context, progress)
        rows: list[Row] = []
        for length, written in prompts.items():
            samples = self._samples(digest, writer.path(self.task, length, config.sample_seed).stem, context)
            known = sum(index in samples.found for index in range(len(written)))
            task = progress.add(f"ask {self.title} at {length}", total=len(written), completed=known)
            answers = ask(
                subject.model,
                written,
                text,
                samples,
                rule=ruler_tasks.TASKS[self.task].score,
                new_tokens=ruler_tasks.TASKS[self.task].new_tokens,
                place=context.device,
                dtype=self.dtype,
                batch=max(1, BATCH_TOKENS[context.device.type] // length),
                advance=task.advance,
                notify=task.say,
            )
            task.close()
            tuned = self._tuning().tokens if config.finetune else 0
            rows += measured(answers, length, ruler_tasks.TASKS[self.task].new_tokens, tuned)
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
            measured={"haystack": _sources(config).digests},
        )

    def _writer(self, progress: "Progress") -> "tuple[Tokenizer, Writer]":
        """Return the model's tokenizer and the writer of its prompts: with a BOS for models that are not ours."""
        from sbeval.evaluation.ruler_prompts import Writer
        from sbeval.pretrained import load

        config = self.config
        cache_dir = Path(platformdirs.user_cache_dir("sbeval"))
        ours = config.checkpoint is None or load.is_own(config.checkpoint)
        text = open_tokenizer(config, progress)
        return text, Writer(text, _sources(config), cache_dir, prefix=() if ours else text.prefix)

    def _tuned(
        self, folder: str, text: "Tokenizer", writer: "Writer", context: "RunContext", progress: "Progress"
    ) -> str:
        """Return the checkpoint to evaluate, fine-tuned if `finetune` asks for it."""
        from sbeval.pretrained import load

        if not self.config.finetune:
            return folder
        digest = load.digest(folder)
        model = _loaded(folder, digest, context.device, self.dtype, self.config.trust_remote_code)
        model.check_tokenizer(text, folder)
        return str(self._finetune(model, digest, writer, context, progress))

    def _prompts(self, writer: "Writer", length: int, progress: "Progress") -> "list[Prompt]":
        task = progress.add(f"write {self.task} at {length}", total=self.config.samples)
        prompts = writer.prompts(self.task, length, self.config.sample_seed, self.config.samples, advance=task.advance)
        task.close()
        return prompts

    @property
    def _finetune_len(self) -> int:
        """Tokens of the sequences that the model was trained on."""
        from sbeval.training import checkpoint

        spec = self.config.checkpoint
        return (spec and checkpoint.training_length(Path(spec))) or self.config.train_len

    def _tuning(self) -> "TrainConfig":
        config = self.config
        return train_config(
            config,
            tokens=config.finetune,
            length=self._finetune_len,
            lr=config.finetune_lr,
            seed=self.seed,
            sparse=True,
        )

    def _finetune(
        self, pretrained: "Pretrained", digest: str, writer: "Writer", context: "RunContext", progress: "Progress"
    ) -> Path:
        """Fine-tune the model on prompts, unless a finished checkpoint exists, and return the checkpoint folder."""
        from sbeval.evaluation.ruler_prompts import PromptBatches
        from sbeval.models.decoder import Decoder
        from sbeval.training.trainer import Trainer

        assert isinstance(pretrained.model, Decoder), "only our models are fine-tuned"
        training, names = self._tuning(), self.config.finetune_tasks
        length = training.length
        kinds = [writer.path(name, length, self.seed, training=True).stem for name in names]
        each = -(-training.steps * training.batch // len(names))
        written: list[list[Prompt]] = []
        for name in names:
            task = progress.add(f"write fine-tuning prompts of {name} at {length}", total=each)
            written.append(writer.prompts(name, length, self.seed, each, training=True, advance=task.advance))
            task.close()
        prompts = [prompt for together in zip(*written, strict=True) for prompt in together]
        batches = PromptBatches(prompts, writer.tokenizer, length, training.batch)
        with context.checkpoint([digest, training, kinds], progress) as folder:
            tokenizer = writer.tokenizer.digest
            trainer = Trainer(pretrained.model.config, training, batches, folder, context.device, tokenizer=tokenizer)
            if trainer.state.step == 0:
                trainer.model.load_state_dict(pretrained.model.state_dict())
            task = progress.add(f"fine-tune {self.model_title}", training.steps, completed=trainer.state.step)
            trainer.run(task, log=context.logger(cell_id(self)))
            task.close()
        return folder

    def _samples(self, digest: str, prompts: str, context: "RunContext") -> "Samples":
        """Return the stored answers of the model of this digest; none with `force`."""
        from sbeval.evaluation.ruler_scores import Samples

        name = digest_of([digest, self.attention, self.dtype, prompts])
        return Samples(context.kept(context.results.samples(f"{prompts}-{name}")))


def measured(answers: "list[Answered]", length: int, new_tokens: int, finetuned: int) -> list[Row]:
    """Return the rows of one length: over all samples, and by the depth of the needle where there is one."""
    import numpy as np

    from sbeval.tables import statistics

    def rows(samples: "list[Answered]", **factors: Any) -> list[Row]:
        metrics = {
            "score": ("1", [item.score for item in samples]),
            "greedy": ("1", [float(item.greedy) for item in samples]),
            "log_probability": ("nats", [item.log_probability for item in samples]),
        }
        if not factors:
            metrics["filled"] = ("1", [(item.tokens + new_tokens) / length for item in samples])
        means = {name: (unit, statistics.mean(np.array(values))) for name, (unit, values) in metrics.items()}
        return [
            Row(
                metric=name,
                unit=unit,
                value=mean.value,
                stderr=mean.stderr,
                n=mean.n,
                length=length,
                finetune_tokens=finetuned,
                **factors,
            )
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
    """Return the grid: every model with every task. Raise InputError for unknown names."""
    tasks = _tasks(config)
    if _not_finetuned(config):
        config = dataclasses.replace(config, finetune=0)
    tuned_on = config.finetune_tasks or tuple(name for name in tasks if name not in FILES)
    if not config.finetune:
        tuned_on = ()
    elif not tuned_on:
        raise InputError("--finetune needs a task other than qa: name one with --finetune-task")
    return [
        Cell(config=dataclasses.replace(model, tasks=(task,), finetune_tasks=tuned_on))
        for model in models(config)
        for task in tasks
    ]


def notes(config: Config) -> list[str]:
    """Return lines on tasks that lack their file, files that no task uses, and a model that is not fine-tuned."""
    lines = _about_files(config)
    if _not_finetuned(config):
        lines.append(f"{config.checkpoint} is not fine-tuned: only checkpoint folders of ours are")
    return lines


def _not_finetuned(config: Config) -> bool:
    """Return whether fine-tuning is skipped: the checkpoint is not one of ours."""
    from sbeval.pretrained import load

    given = config.checkpoint
    return bool(config.finetune) and given is not None and not load.is_own(given)


def _tasks(config: Config) -> list[str]:
    with_files = [name for name in RULER_TASKS if name not in FILES or getattr(config, FILES[name][0]) is not None]
    return list(dict.fromkeys(config.tasks or with_files))


def _lacks(name: str) -> str:
    option, what = FILES[name]
    return f"{name} is not run without its questions: give --{option} PATH to {what}"


def _about_files(config: Config) -> list[str]:
    absent = {name: option for name, (option, _) in FILES.items() if name not in _tasks(config)}
    if not config.tasks:
        return [_lacks(name) for name in absent]
    return [
        f"--{option} is not used: {name} is not among the tasks; give --task {name} too"
        for name, option in absent.items()
        if getattr(config, option) is not None
    ]


def _sources(config: Config) -> "Sources":
    return _loaded_sources(config.essays, config.squad, config.hotpot)


@functools.lru_cache(maxsize=1)
def _loaded_sources(essays: str | None, squad: str | None, hotpot: str | None) -> "Sources":
    from sbeval.evaluation import ruler_texts

    return ruler_texts.load(essays, squad, hotpot)


@functools.lru_cache(maxsize=2)
def _loaded(spec: str, digest: str, place: "torch.device", dtype: str, trust: bool) -> "Pretrained":
    """Load the model of consecutive cells once; the digest changes when another is saved to the same path."""
    from sbeval.pretrained import load

    return load.load(spec, place, dtype, trust_remote_code=trust)


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: score and greedy accuracy by task and length, mean over seeds, and means."""
    from rich.table import Table

    rows = results[results["metric"].isin(["score", "greedy"]) & results["depth_start"].isna()]
    lengths = sorted(rows["length"].unique())
    table = Table(
        title="Score of what is said (accuracy of greedy decoding of the reference) by length in tokens",
        caption=epochs.caution(results) or None,
        caption_justify="left",
    )
    for name in ("attention", "task"):
        table.add_column(name)
    for length in lengths:
        table.add_column(f"{length}", justify="right")
    for (attention, options), group in rows.groupby(["attention", "options"]):
        method = f"{attention}:{options}" if options else f"{attention}"
        tasks = [*group.groupby("task")] + ([("mean", group)] if group["task"].nunique() > 1 else [])
        for task, some in tasks:
            means = some.groupby(["length", "metric"])["value"].mean()
            table.add_row(method, str(task), *(f"{means[x, 'score']:.2f} ({means[x, 'greedy']:.2f})" for x in lengths))
    return table


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    return uncut(given | ({"eval_len": given["train_len"]} if "train_len" in given else {}))


FAMILY = Family(
    name=NAME,
    help="RULER's needles in haystacks: is a fact found anywhere in a text longer than the training length?",
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    notes=notes,
    cautions=cautions,
    completed=_completed,
)
