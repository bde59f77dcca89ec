"""lm-eval's tasks by name, and a model's scores on them."""

import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import io
import logging
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.utils
import pandas as pd
from datasets.exceptions import DatasetNotFoundError
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry
from transformers import AutoTokenizer

from sbeval.errors import InputError, first_line, reason
from sbeval.evaluation import lm_eval_choices, lm_eval_items, lm_eval_local
from sbeval.evaluation.lm_eval_model import Adapter, HubText, PlainText
from sbeval.pretrained.foreign import broken

__all__ = ["Adapter", "Benchmark", "HubText", "PlainText", "Score", "hub_text", "load", "scores", "version"]

# folders of the tasks in suites: indexing all tasks takes lm-eval ten seconds
FOLDERS = (
    "arc",
    "blimp",
    "gsm8k",
    "hellaswag",
    "lambada",
    "mmlu",
    "openbookqa",
    "piqa",
    "race",
    "sciq",
    "super_glue",
    "wikitext",
    "winogrande",
    "wsc273",
)
# bootstrap samples for statistics other than means; lm-eval's 100,000 take minutes and change an error by some percent
BOOTSTRAPS = 1000
# lm-eval's seed for the examples in prompts
SEED = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A task or group of lm-eval. digest: of the scored items and the tasks' versions. shots: examples in a prompt."""

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    shots: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number. task: name of the benchmark or of a part of it. stderr: lm-eval's, None where it has none. chance:
    the score of guessing, None where it is unknown."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    version: str
    chance: float | None


def version() -> str:
    """Return the version of lm-eval."""
    return importlib.metadata.version("lm_eval")


@functools.lru_cache(maxsize=32)
def load(name: str, shots: int | None, folder: Path | None) -> Benchmark:
    """Return the benchmark `name`, with items from JSONL files in `folder` (see `lm_eval_local`) or from the hub.

    shots: examples in a prompt, None for the definition's. Raise InputError for an unknown name or missing items.
    """
    entry, index = _find(name)
    # a definition with 0 examples is always zero-shot; the local class checks that itself
    overrides: dict[str, Any] = {} if shots is None else {"num_fewshot": shots}
    if folder is not None:
        overrides = {"class": lm_eval_local.local_task(folder, shots)}
    # what lm-eval raises for the first item, which it reads when it builds a task
    first = (KeyError, IndexError) if folder is None else (ValueError, *lm_eval_local.NOT_ITEMS)
    try:
        with _quiet():
            built = TaskFactory().build(entry, overrides=overrides, registry=index)
            loaded = TaskManager(include_defaults=False).load(built if isinstance(built, list) else [built])
    # `datasets` raises these for a set that is unknown, out of reach or not in the cache
    except (ConnectionError, FileNotFoundError, DatasetNotFoundError) as error:
        raise InputError(
            f"cannot load task {name!r} from the hub ({first_line(error)}): give a folder of its items with --data-dir"
        ) from None
    except InputError:
        raise
    except first as error:
        lacks = f"has no answer among its choices or lacks a field ({type(error).__name__}: {error})"
        raise InputError(f"item 1 of task {name!r} {lacks}") from None
    for task in loaded["tasks"].values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    used = {int(task.config.num_fewshot) for task in loaded["tasks"].values()}
    if shots is not None and used != {shots}:
        raise InputError(f"task {name!r} is defined with {max(used)} examples in its prompt; give --task {name}")
    with _quiet():
        for part, task in loaded["tasks"].items():
            if folder is not None:
                lm_eval_local.check(task, folder)
            lm_eval_choices.check(part, task)
        digest = lm_eval_local.digest(loaded["tasks"])
    return Benchmark(name=name, tasks=loaded["tasks"], groups=loaded.get("groups", {}), shots=max(used), digest=digest)


def hub_text(spec: str, vocab_size: int | None = None, trust_remote_code: bool = False) -> HubText:
    """Return the tokenizer of a Hugging Face folder or name, whose model has `vocab_size` tokens, if known."""
    try:
        return HubText(AutoTokenizer.from_pretrained(spec, trust_remote_code=trust_remote_code), vocab_size)
    except InputError:
        raise
    # for a name that is unknown or out of reach, and for files that it cannot read
    except broken() as error:
        raise InputError(f"no tokenizer with model {spec!r}: {reason(error)}") from None


def check_name(name: str) -> None:
    """Raise InputError for a name that is no task or group of lm-eval."""
    _find(name)


def _find(name: str) -> tuple[Entry, dict[str, Entry]]:
    known = _index(False)
    if name not in known:
        known = _index(True)
    if name not in known:
        # not a list: there are thousands of tasks
        near = difflib.get_close_matches(name, [*_index(False), *known], n=3)
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
        raise InputError(f"lm-eval {version()} has no task {name!r}; {hint}`lm_eval ls tasks` lists all")
    return known[name], known


@functools.cache
def _index(everything: bool) -> dict[str, Entry]:
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = [root / folder for folder in FOLDERS]
    with _quiet():
        return dict(TaskManager(include_path=None if everything else folders, include_defaults=everything).task_index)


def scores(benchmark: Benchmark, adapter: Adapter, limit: int | None) -> tuple[list[Score], pd.DataFrame]:
    """Return the model's scores on the benchmark, then on its parts, and the values of their items.

    limit: maximum items of each part.
    """
    loaded = {
        "tasks": dict(benchmark.tasks),
        "groups": dict(benchmark.groups),
        "group_map": {name: group.child_names for name, group in benchmark.groups.items()},
    }
    with _quiet():
        results = evaluate(adapter, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=True)
    chances = {name: lm_eval_choices.chance(task) for name, task in benchmark.tasks.items()}
    counts = {name: results["n-samples"][name]["effective"] for name in benchmark.tasks}
    for name, group in benchmark.groups.items():
        leaves = [task.task_name for task in group.get_all_tasks()]
        counts[name] = sum(counts[leaf] for leaf in leaves)
        parts = [chance * counts[leaf] for leaf in leaves if (chance := chances[leaf]) is not None]
        chances[name] = sum(parts) / counts[name] if len(parts) == len(leaves) else None
    names = sorted(results["results"], key=lambda name: (name != benchmark.name, name))
    found = [
        score
        for name in names
        for score in _scores(
            name, results["results"][name], counts[name], str(results["versions"][name]), chances[name]
        )
    ]
    items = lm_eval_items.values(benchmark.name, benchmark.tasks, results["samples"])
    versions = {name: str(results["versions"][name]) for name in names}
    return [*found, *_gold(benchmark, items, versions)], items


def _gold(benchmark: Benchmark, items: pd.DataFrame, versions: Mapping[str, str]) -> Iterator[Score]:
    """Yield the bits per byte of right answers, of the benchmark and of each part whose items have them."""
    for name, version in versions.items():
        group = benchmark.groups.get(name)
        tasks = [name] if group is None else [task.task_name for task in group.get_all_tasks()]
        found = lm_eval_items.gold_bits_per_byte(items, ["" if task == benchmark.name else task for task in tasks])
        if found is not None:
            yield Score(
                task=name,
                metric="gold_bits_per_byte",
                filter="",
                **dataclasses.asdict(found),
                version=version,
                chance=None,
            )


def _scores(name: str, numbers: Mapping[str, Any], n: int, version: str, chance: float | None) -> Iterator[Score]:
    for column, value in numbers.items():
        metric, comma, kind = column.partition(",")
        # a perplexity that no number holds has no row
        if not comma or metric.endswith("_stderr") or math.isinf(float(value)):
            continue
        error = numbers[f"{metric}_stderr,{kind}"]
        yield Score(
            task=name,
            metric=metric,
            filter="" if kind == "none" else kind,
            value=float(value),
            stderr=None if error == "N/A" or not math.isfinite(float(error)) else float(error),
            n=n,
            version=version,
            chance=chance if metric in ("acc", "acc_norm") else None,
        )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence bars and warnings of lm-eval and datasets, cache compiled templates, and start no processes.

    A perplexity of lm-eval's that no number holds is infinite instead of an error.
    """
    logger, bar, templates = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm, lm_eval.utils.env
    compiled = templates.from_string
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    processes = os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    lm_eval.api.metrics.math = types.SimpleNamespace(**vars(math) | {"exp": _exp})
    # it compiles a task's few templates for every item, which takes most of the time of small models
    templates.from_string = functools.lru_cache(maxsize=1024)(compiled)
    # the bootstrap would fork a pool of processes from one that holds a GPU
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm, templates.from_string = bar, compiled
        lm_eval.api.metrics.math = math
        if bars:
            datasets.enable_progress_bars()
        if processes is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = processes
