"""Few-shot benchmarks: lm-eval's tasks, by name or by suite, of models trained here or given.

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
from typing import TYPE_CHECKING, Any, ClassVar

from sbeval.config import DATA, EVALUATION, LATER, MODEL, TASK, option
from sbeval.errors import InputError, choose
from sbeval.registry import HELP
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables import epochs
from sbeval.tables.rows import Measurement
from sbeval.tasks import length_gen
from sbeval.tasks.text_cell import TextCell, outcome
from sbeval.tasks.text_training import cautions, models, open_tokenizer
from sbeval.training.text_model import LM_EVAL

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.table import Table

    from sbeval.pretrained.load import Pretrained
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext


NAME = "few_shot"
# tokens of a forward pass, padding included
BATCH_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}
# requests of a benchmark and tokens of each, for an estimate of cost without its items
LIKELY_REQUESTS, LIKELY_TOKENS = 10_000, 64
LIKELY = {
    "blimp": (134_000, 16), "hellaswag": (40_168, 112), "mmlu": (56_168, 112), "mmlu:5": (56_168, 800),
    "gsm8k": (1319, 1200), "wikitext": (62, 4600), "boolq": (6540, 160), "race": (4180, 400),
    "lambada_openai": (5153, 96), "copa": (200, 16), "wsc273": (546, 32), "winogrande": (2534, 32),
}  # fmt: skip

# `mmlu:5` is mmlu with five examples in the prompt; without a number their count is the definition's
SUITES = {
    "quick": ("copa", "arc_easy", "wsc273"),
    # BLiMP, 67 phenomena of English grammar (Warstadt et al., arXiv 1912.00582)
    "linguistic": ("blimp",),
    # zero-shot: world knowledge and common sense
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
    # the paper's suite, as in its authors' scripts
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
    """Factors: part of the benchmark (empty: all of it), lm-eval's filter of the answer, examples in a prompt, version
    of lm-eval's task, accuracy of guessing, source of the items (`hub` or `files`), and number of requests whose
    beginning was cut to fit eval_len. status: `overfit`, or empty."""

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
    """Benchmarks of the models that length-gen trains with the same options, or of `models`. eval_len: maximum tokens
    of a prompt and its completion."""

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
    # not used by few-shot, but part of the ids of published cells
    documents: int = 32
    windows: int = 1
    window: tuple[int, ...] = field(default=(), metadata=LATER)
    window_octaves: bool = field(default=False, metadata=LATER)
    eval_corpus: tuple[str, ...] = field(default=(), metadata=LATER)
    fixed_targets: int = field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        # zero-argument super does not work in a class with slots
        length_gen.Config.__post_init__(self)
        for suite in self.suites:
            choose("suite", suite, SUITES)
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, or left out; got {self.limit}")

    @property
    def trains(self) -> bool:
        return self.checkpoint is None and not self.models


PRESETS = {
    # 1.3 M parameters and a few items: shows that every step works, and nothing about the model
    "quick": length_gen.preset(Config, "quick", limit=20),
    "small": length_gen.preset(Config, "small", suites=("linguistic", "commonsense")),
    "h200": length_gen.preset(
        Config,
        "h200",
        suites=("linguistic", "commonsense"),
        attention=("stick_breaking", "rope", "alibi", "forgetting"),
    ),
    # the suite of the released 1B and 3B models, which --model names
    "paper": length_gen.preset(Config, "paper", suites=("paper",), attention=("stick_breaking", "rope"), eval_len=4096),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(TextCell):
    """One model and benchmark: a config of one task, and of one checkpoint or one method and seed."""

    config: Config
    family: str = NAME
    row: ClassVar[type[Row]] = Row

    @property
    def task(self) -> str:
        return self.config.tasks[0]

    @property
    def title(self) -> str:
        return f"{self.model_title} {self.task}"

    @property
    def flops(self) -> float:
        limit = self.config.limit
        requests, tokens = LIKELY.get(self.task) or LIKELY.get(_parse(self.task)[0]) or (LIKELY_REQUESTS, LIKELY_TOKENS)
        # four choices an item
        requests = requests if limit is None else min(requests, 4 * limit)
        return self.flops_per_token(tokens) * tokens * requests

    def source(self, progress: "Progress") -> str:
        """Return the digests of the given model and its tokenizer, or of the training corpus, and of the items."""
        from sbeval.pretrained import load

        given = self.config.checkpoint
        # the digests of other models cover their tokenizers
        ours = given is not None and load.is_own(given)
        text = [open_tokenizer(self.config, progress).digest] if ours else []
        return "-".join([self.origin(progress)[1], *text, self._benchmark().digest])

    def check(self, progress: "Progress") -> None:
        """Raise InputError where the items or lm-eval are missing."""
        self._benchmark()

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train, unless a finished checkpoint exists, and evaluate the requests without a stored answer."""
        from sbeval.pretrained import load

        # before training: raises InputError where items are missing
        benchmark = self._benchmark()
        config = self.config
        folder = self.train_model(context, progress)
        digest = load.digest(folder)
        model = _loaded(folder, digest, context.device, self.dtype, config.trust_remote_code)
        subject = self.subject(model, folder, context, progress)
        with self.answers(digest, context, progress) as answers:
            adapter = _lm_eval().Adapter(
                subject.model,
                self._text(model, progress),
                length=self._length(model),
                place=context.device,
                dtype=self.dtype,
                batch_tokens=BATCH_TOKENS[context.device.type],
                answers=answers,
                begin=functools.partial(progress.add, f"evaluate {self.title}"),
                bos_twice=config.bos == LM_EVAL,
            )
            scores, items = _lm_eval().scores(benchmark, adapter, config.limit)
        if adapter.apart:
            progress.say(
                f"{self.title}: {adapter.apart} continuations are encoded apart from their contexts, since the "
                "tokenizer has one token for the end of both"
            )
        return outcome(
            subject,
            [self._row(score, benchmark, adapter.cut) for score in scores],
            family=NAME,
            task=benchmark.name,
            eval_len=adapter.length,
            seed=self.seed,
            corpus=self.origin(progress)[0],
            corpus_digest=self.source(progress),
            tokenizer=config.tokenizer,
            measured={
                "lm_eval": _lm_eval().version(),
                "requests_cut": adapter.cut,
                "requests_encoded_apart": adapter.apart,
                "model_digest": digest,
            },
            values=items,
        )

    def _row(self, score: Any, benchmark: Any, cut: int) -> Row:
        return Row(
            metric=score.metric,
            unit="bits/byte" if score.metric.endswith("bits_per_byte") else "1",
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
        name, shots = _parse(self.task)
        return _lm_eval().load(name, shots, None if self.config.data_dir is None else Path(self.config.data_dir))

    def _length(self, model: "Pretrained") -> int:
        """Return eval_len, for models that are not ours at most the length that their config allows."""
        from sbeval.models.decoder import Decoder

        eval_len = self.config.eval_len
        return eval_len if isinstance(model.model, Decoder) else min(eval_len, model.train_len or eval_len)

    def _text(self, model: "Pretrained", progress: "Progress") -> Any:
        """Return the model's tokenizer; raise InputError where it does not match the model."""
        from sbeval.pretrained import load

        config = self.config
        if config.checkpoint is not None and not load.is_own(config.checkpoint):
            return _lm_eval().hub_text(config.checkpoint, model.vocab_size, config.trust_remote_code)
        ours = open_tokenizer(config, progress)
        model.check_tokenizer(ours, str(config.checkpoint))
        return _lm_eval().PlainText(ours)


def cells(config: Config) -> list[Cell]:
    """Return the grid: every model with every benchmark. Raise InputError for unknown names or a missing data_dir."""
    from sbeval.pretrained import load

    # here and not in the config, which is also rebuilt from run files of other machines
    if config.data_dir is not None and not os.path.isdir(config.data_dir):
        raise InputError(f"--data-dir {config.data_dir} is not a folder")
    if config.models:
        specs = list(dict.fromkeys(config.models))
        names = [load.name(spec) for spec in specs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two models are called {twice[0]!r}, and a table could not tell them apart: rename one")
        given = [dataclasses.replace(config, checkpoint=spec, models=()) for spec in specs]
    else:
        given = [config]
    tasks = dict.fromkeys((*config.tasks, *(task for suite in config.suites for task in SUITES[suite])))
    if not tasks:
        raise InputError("no benchmark to evaluate: give --task or --suite")
    for task in tasks:
        _parse(task)
    return [
        Cell(config=dataclasses.replace(model, tasks=(task,), suites=(), models=()))
        for one in given
        for model in models(one)
        for task in tasks
    ]


def _parse(task: str) -> tuple[str, int | None]:
    """Return name and examples of `name` or `name:examples`."""
    name, colon, shots = task.partition(":")
    if not name or (colon and not re.fullmatch("[0-9]{1,3}", shots)):
        raise InputError(f"a task is a name, or name:examples such as mmlu:5; got {task!r}")
    return name, int(shots) if colon else None


@functools.lru_cache(maxsize=1)
def _loaded(spec: str, digest: str, place: "torch.device", dtype: str, trust: bool) -> "Pretrained":
    """Load the model of consecutive cells once; the digest changes when another is saved to the same path."""
    from sbeval.pretrained import load

    return load.load(spec, place, dtype, trust_remote_code=trust)


def _lm_eval() -> Any:
    """Import the modules on lm-eval, which is optional and slow to import."""
    try:
        return importlib.import_module("sbeval.evaluation.lm_eval_tasks")
    except ImportError as error:
        raise InputError(f"few-shot needs lm_eval ({error}): pip install 'sbeval[few-shot]'") from None


def check_names(config: Config) -> None:
    """Raise InputError for a task that lm-eval does not have. Looking up one takes seconds, those of suites none."""
    suites = {_parse(task)[0] for tasks in SUITES.values() for task in tasks}
    for name in dict.fromkeys(_parse(task)[0] for task in config.tasks):
        if name not in suites:
            _lm_eval().check_name(name)


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: models by benchmarks, with the mean of those above chance."""
    from sbeval.tables import few_shot

    # such as CoLA's correlation
    others = not results["metric"].isin(few_shot.METRICS).any()
    table = few_shot.others(results) if others else few_shot.terminal(few_shot.table(results))
    table.caption = epochs.caution(results) or None
    return table


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    """Let eval_len follow train_len, and named tasks replace the preset's suites."""
    return length_gen.completed(({"suites": ()} if "tasks" in given else {}) | given)


def _preset(given: Mapping[str, Any]) -> str | None:
    if not given.get("models"):
        return None
    from sbeval.pretrained import load

    return None if any(map(load.is_own, given["models"])) else "paper"


FAMILY = Family(
    name=NAME,
    help=HELP[NAME],
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    cautions=cautions,
    check_names=check_names,
    completed=_completed,
    preset=_preset,
)
