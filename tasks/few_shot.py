"""Few-shot benchmarks: lm-eval's tasks, by name or by suite, of models trained here or by others.

The paper's table 2 (Tan et al., ICLR 2025, arXiv 2410.17980) asks whether stick-breaking costs anything on the usual
benchmarks. An item is a prompt and some continuations, of which the likeliest counts as the answer:

    prompt     Question: Which gas do plants take in? Answer:
    choices    oxygen | carbon dioxide | helium           acc: the sum of log-likelihoods is highest at the right one
                                                          acc_norm: the same, each sum divided by its characters
"""

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbeval.config import DATA, EVALUATION, LATER, MODEL, TASK, digest_of, option
from sbeval.errors import InputError, choose
from sbeval.models import config as model_config
from sbeval.sweep.cell import Cell as BaseCell
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables import epochs
from sbeval.tables.rows import Measurement
from sbeval.tasks import length_gen
from sbeval.tasks.text_model import uncut

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.table import Table

    from sbeval.evaluation.response_cache import Answers
    from sbeval.pretrained.load import Pretrained
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import Place


NAME = "few_shot"
# tokens of a forward pass, padding included
BATCH_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}
# requests and tokens of a benchmark, for an estimate of cost without its items
LIKELY_REQUESTS, LIKELY_TOKENS = 10_000, 64
LIKELY = {
    "blimp": (134_000, 16), "hellaswag": (40_168, 112), "mmlu": (56_168, 112), "mmlu:5": (56_168, 800),
    "gsm8k": (1319, 1200), "wikitext": (62, 4600), "boolq": (6540, 160), "race": (4180, 400),
    "lambada_openai": (5153, 96), "copa": (200, 16), "wsc273": (546, 32), "winogrande": (2534, 32),
}  # fmt: skip

# `mmlu:5` is mmlu with five examples in its prompt; without a number it is what the definition says
SUITES = {
    "quick": ("copa", "arc_easy", "wsc273"),
    # BLiMP, 67 phenomena of English grammar (Warstadt et al., arXiv 1912.00582)
    "linguistic": ("blimp",),
    # zero-shot, about the world and the plain sense of a text
    "commonsense": (
        "arc_easy",
        "arc_challenge",
        "boolq",
        "copa",
        "hellaswag",
        "lambada_openai",
        "openbookqa",
        "piqa",
        "winogrande",
        "wsc273",
    ),
    # the paper's, as its authors' scripts have it
    "paper": (
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "openbookqa",
        "piqa",
        "race",
        "sciq",
        "winogrande",
        "wikitext",
        "mmlu:0",
        "mmlu:5",
        "gsm8k:5",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Measurement):
    """Factors: part of the benchmark (empty: all of it), what lm-eval took from an answer before scoring it, examples
    in a prompt, version of lm-eval's task, score of guessing, where the items come from (`hub` or `files`), and in how
    many requests the beginning was cut to fit eval_len. status: `overfit`, or empty."""

    part: str = ""
    filter: str = ""
    shots: int
    version: str
    chance: float | None = None
    items: str
    cut: int
    status: str = field(default="", metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(length_gen.Config):
    """Benchmarks of the models that length-gen trains with the same options, or of `models`. eval_len: tokens that a
    model reads at most."""

    tasks: tuple[str, ...] = option(
        (), TASK, "Any task or group of lm-eval, or name:examples such as mmlu:5.", flag="--task", metavar="NAME"
    )
    suites: tuple[str, ...] = option(("quick",), TASK, f"{', '.join(SUITES)}.", flag="--suite", metavar="NAME")
    models: tuple[str, ...] = option(
        (),
        MODEL,
        "Evaluate this model instead: our checkpoint folder, or a Hugging Face folder or name.",
        flag="--model",
    )
    data_dir: str | None = option(
        None, DATA, "Folder of JSONL files with the items. Default: the Hugging Face hub.", metavar="DIR"
    )
    limit: int | None = option(None, TASK, "Items of each task at most. Default: all.")
    eval_len: int = option(4096, EVALUATION, "Tokens of a prompt and its completion at most.")
    checkpoint: str | None = field(default=None, metadata=LATER)
    # part of which cell it is, as published; benchmarks have no use for them
    documents: int = 32
    windows: int = 1
    window: tuple[int, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        # a slotted class is made anew, which zero-argument super does not know
        length_gen.Config.__post_init__(self)
        for suite in self.suites:
            choose("suite", suite, SUITES)
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, or left out; got {self.limit}")

    @property
    def trains(self) -> bool:
        return self.checkpoint is None and not self.models


PRESETS = {
    # a model of 1.3 M parameters and a few items, which say that everything works and nothing else
    "quick": length_gen.preset(Config, "quick", limit=20),
    "small": length_gen.preset(Config, "small", suites=("linguistic", "commonsense")),
    "h200": length_gen.preset(
        Config,
        "h200",
        suites=("linguistic", "commonsense"),
        attention=("stick_breaking", "rope", "alibi", "forgetting"),
    ),
    # the released 1B and 3B models' suite; of which models, --model says
    "paper": length_gen.preset(Config, "paper", suites=("paper",), attention=("stick_breaking", "rope"), eval_len=4096),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(BaseCell):
    """One model and benchmark: a config of one task, and of one checkpoint or one method and seed."""

    config: Config
    family: str = NAME

    @property
    def trained(self) -> length_gen.Cell:
        """The cell that trains the model; its checkpoint is that of length-gen with the same options."""
        return length_gen.Cell(config=self.config)

    @property
    def title(self) -> str:
        return f"{self.trained.title} {self.config.tasks[0]}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def row(self) -> type[Row]:
        return Row

    @property
    def needs(self) -> tuple[length_gen.Training, ...]:
        """The training of its model, unless that is there."""
        return self.trained.needs

    @property
    def flops(self) -> float:
        return _asking(self.trained, self.config.tasks[0], self.config.limit)

    def source(self, progress: "Progress") -> str:
        """Digests of the model and its tokenizer, or of the text that it is trained on, and of the items."""
        from sbeval.pretrained import load

        given = self.config.checkpoint
        # other models come with a tokenizer, which counts as theirs
        ours = given is not None and load.is_own(given)
        text = [length_gen.open_tokenizer(self.config, progress).digest] if ours else []
        return "-".join([self.trained.origin(progress)[1], *text, self._benchmark().digest])

    def check(self, progress: "Progress") -> None:
        """InputError where the items are not there, or lm-eval is not."""
        self._benchmark()

    def run(self, place: "Place", progress: "Progress") -> Outcome:
        """Train, unless a checkpoint has it, and ask everything that has no answer yet."""
        from sbeval.pretrained import load

        # before training: items that are not there are the user's to change
        benchmark = self._benchmark()
        config = self.config
        folder = config.checkpoint or str(self.trained.train(place, progress))
        digest = load.digest(folder)
        found = _loaded(folder, digest, place.device, self.dtype, config.trust_remote_code)
        subject = self.trained.subject(found, folder, place, progress)
        answers = self._answers(digest, place)
        adapter = _harness().Adapter(
            subject.model,
            self._text(found, progress),
            length=self._length(found),
            place=place.device,
            dtype=self.dtype,
            batch_tokens=BATCH_TOKENS[place.device.type],
            answers=answers,
            begin=functools.partial(progress.add, f"ask {self.title}"),
        )
        measured = _harness().scores(benchmark, adapter, config.limit)
        answers.close()
        return length_gen.outcome(
            subject,
            [self._row(score, benchmark, adapter.cut) for score in measured],
            family=NAME,
            task=benchmark.name,
            eval_len=adapter.length,
            seed=self.trained.seed,
            corpus=self.trained.origin(progress)[0],
            corpus_digest=self.source(progress),
            tokenizer=config.tokenizer,
            measured={"lm_eval": _harness().version(), "requests_cut": adapter.cut, "model_digest": digest},
        )

    def _row(self, score: Any, benchmark: Any, cut: int) -> Row:
        return Row(
            metric=score.metric,
            unit="bits/byte" if score.metric == "bits_per_byte" else "1",
            value=score.value,
            stderr=score.stderr,
            n=score.n,
            part="" if score.task == benchmark.name else score.task,
            filter=score.filter,
            shots=benchmark.shots,
            version=score.version,
            chance=score.chance,
            items="hub" if self.config.data_dir is None else "files",
            cut=cut,
        )

    def _benchmark(self) -> Any:
        name, shots = _parse(self.config.tasks[0])
        return _harness().load(name, shots, None if self.config.data_dir is None else Path(self.config.data_dir))

    def _answers(self, digest: str, place: "Place") -> "Answers":
        """What the model of this digest has answered; nothing when it has to be asked again."""
        from sbeval.evaluation.response_cache import Answers

        name = digest_of([digest, self.config.attention, self.dtype])
        path = place.results.answers(name)
        return Answers(path, anew=place.begins_anew(path))

    def _length(self, found: "Pretrained") -> int:
        """Tokens that the model reads at most; of one that isn't ours no more than its config says it can."""
        from sbeval.models import decoder

        own = isinstance(found.model, decoder.Decoder)
        return self.config.eval_len if own else min(self.config.eval_len, found.train_len or self.config.eval_len)

    def _text(self, found: "Pretrained", progress: "Progress") -> Any:
        """The model's tokenizer; InputError when it cannot be that."""
        from sbeval.pretrained import load

        config = self.config
        if config.checkpoint is not None and not load.is_own(config.checkpoint):
            return _harness().hub_text(config.checkpoint, config.trust_remote_code)
        ours = length_gen.open_tokenizer(config, progress)
        found.check_tokenizer(ours, str(config.checkpoint))
        return _harness().PlainText(ours)


def cells(config: Config) -> list[Cell]:
    """The grid: every model with every benchmark. InputError names what is not known, or that `data_dir` is missing."""
    from sbeval.pretrained import load

    # a config is a value, which a run file on another machine gives again: the disk is asked here
    if config.data_dir is not None and not os.path.isdir(config.data_dir):
        raise InputError(f"--data-dir {config.data_dir} is no folder")
    if config.models:
        specs = list(dict.fromkeys(config.models))
        names = [load.name(spec) for spec in specs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two models are called {twice[0]!r}, and a table could not tell them apart: rename one")
        loaded = [dataclasses.replace(config, checkpoint=spec, models=()) for spec in specs]
        models = [cell for one in loaded for cell in length_gen.cells(one)]
    else:
        models = length_gen.cells(config)
    tasks = dict.fromkeys((*config.tasks, *(task for suite in config.suites for task in SUITES[suite])))
    if not tasks:
        raise InputError("nothing to ask: give --task or --suite")
    for task in tasks:
        _parse(task)
    found = []
    for trained in models:
        assert isinstance(trained.config, Config), "it replaces fields of what it is given"
        for task in tasks:
            one = dataclasses.replace(trained.config, tasks=(task,), suites=(), models=())
            found.append(Cell(config=one))
    return found


def _asking(trained: length_gen.Cell, task: str, limit: int | None) -> float:
    """FLOPs of a benchmark, roughly."""
    from sbeval.pretrained import load

    requests, tokens = LIKELY.get(task) or LIKELY.get(_parse(task)[0]) or (LIKELY_REQUESTS, LIKELY_TOKENS)
    # four choices an item
    read = tokens * (requests if limit is None else min(requests, 4 * limit))
    if trained.config.checkpoint is not None:
        return 2.0 * load.likely_parameters(trained.config.checkpoint) * read
    shape = trained.model(length_gen.likely_vocabulary(trained.config.tokenizer))
    return read * model_config.flops_per_token(shape, tokens)


def _parse(task: str) -> tuple[str, int | None]:
    """Name and examples of `name` or `name:examples`."""
    name, colon, shots = task.partition(":")
    if not name or (colon and not re.fullmatch("[0-9]{1,3}", shots)):
        raise InputError(f"a task is a name, or name:examples such as mmlu:5; got {task!r}")
    return name, int(shots) if colon else None


@functools.lru_cache(maxsize=1)
def _loaded(spec: str, digest: str, place: "torch.device", dtype: str, trust: bool) -> "Pretrained":
    """The model of the cells that follow each other; the digest tells when another has come to the same place."""
    from sbeval.pretrained import load

    return load.load(spec, place, dtype, trust_remote_code=trust)


def _harness() -> Any:
    """What needs lm-eval, which is slow to import and not everyone's."""
    try:
        return importlib.import_module("sbeval.evaluation.lm_eval_tasks")
    except ImportError as error:
        raise InputError(f"few-shot needs lm_eval ({error}): pip install 'sbeval[few-shot]'") from None


def summary(results: "pd.DataFrame") -> "Table":
    """Table for the terminal: models by benchmarks, with their average."""
    from sbeval.tables import few_shot

    shown = few_shot.terminal(few_shot.table(results))
    shown.caption = epochs.caution(results) or None
    return shown


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    """No further than the models were trained, and tasks that are named instead of the preset's suites."""
    follows = {"eval_len": given["train_len"]} if "train_len" in given else {}
    return uncut(follows | ({"suites": ()} if "tasks" in given else {}) | given)


def _preset(given: Mapping[str, Any]) -> str | None:
    if not given.get("models"):
        return None
    from sbeval.pretrained import load

    return None if any(map(load.is_own, given["models"])) else "paper"


FAMILY = Family(
    name=NAME,
    help=(
        "Benchmarks through lm-eval, of models that length-gen trains or of any others. Others are "
        "evaluated as the preset paper says, unless another is named."
    ),
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    cautions=length_gen.cautions,
    completed=_completed,
    preset=_preset,
)
