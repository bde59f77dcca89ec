"""Commands that benchmark kernels and models: their options, and what they run."""

from dataclasses import dataclass, fields
from pathlib import Path

import typer

from sbeval.cli import options
from sbeval.config import ATTENTION, DATA, MODEL, RUN, TASK, option
from sbeval.errors import InputError
from sbeval.runtime.console import plain, say
from sbeval.tables.results import Results

HEAD_DIMS = (64, 128)

bench = typer.Typer(help="Benchmark kernels and models beside their peers, on a GPU.", no_args_is_help=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Options of every benchmark. Numbers are at least 1."""

    device: str | None = option(None, RUN, options.DEVICE)
    dtype: str | None = option(None, RUN, options.DTYPE)
    results_dir: Path = option(Path("results"), RUN, options.RESULTS_DIR)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, int)]
            if wrong := [one for one in numbers if one < 1]:
                flag = field.metadata["flag"] or f"--{field.name}"
                raise InputError(f"{flag} must be at least 1; got {wrong[0]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel(Benchmark):
    lengths: tuple[int, ...] = option((1024, 4096, 16384, 65536), TASK, "Tokens of a sequence.", flag="--length")
    head_dims: tuple[int, ...] = option(HEAD_DIMS, TASK, "Size of a head.", flag="--head-dim")
    heads: int = option(12, TASK, "Query heads.")
    caches: tuple[int, ...] = option((16384, 65536), TASK, "Keys in the cache when decoding.", flag="--cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Benchmark):
    sizes: tuple[str, ...] = option(("350m", "1b"), MODEL, "Size of the model: 25m, 125m, 350m, 1b, ...", flag="--size")
    length: int = option(4096, TASK, "Tokens of a sequence.")
    batch: int = option(4, TASK, "Sequences of a step.")
    head_dims: tuple[int, ...] = option(HEAD_DIMS, MODEL, "Size of a head.", flag="--head-dim")
    repeats: int = option(5, TASK, "Runs of each, in random order.")
    attention: tuple[str, ...] = option(
        ("stick_breaking", "stick_breaking:epsilon=0", "rope"), MODEL, ATTENTION, metavar="SPEC"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipping(Benchmark):
    checkpoint: str = option("", MODEL, "Checkpoint folder of a stick-breaking model. Required.")
    corpus: str = option("stdlib", DATA, "Text to evaluate on: python, stdlib, a file or folder, or hf:NAME[:CONFIG].")
    tokenizer: str = option("bytes", DATA, "Tokenizer of the model: bytes, bpe:SIZE, or a Hugging Face name.")
    lengths: tuple[int, ...] = option(
        (2048, 4096, 8192, 16384, 32768, 65536), TASK, "Tokens of a sequence.", flag="--length"
    )


def _kernel(config: Kernel) -> None:
    """Benchmark attention kernels: time, throughput, memory and error."""
    from sbeval.bench import kernels, problems
    from sbeval.runtime import device

    where = device.pick(config.device)
    found = problems.problems(sorted(config.lengths), config.head_dims, config.heads, config.caches)
    plain().print(kernels.kernel(found, where, device.pick_dtype(config.dtype, where), config.results_dir, say))
    _draw(config.results_dir, ["kernel", "kernel_error"], device.describe(where))


def _model(config: Model) -> None:
    """Benchmark models: tokens per second of training and evaluation with each method, softmax through two kernels."""
    from sbeval.bench import models
    from sbeval.runtime import device

    where = device.pick(config.device)
    problems = models.problems(config.sizes, config.head_dims, length=config.length, batch=config.batch)
    dtype = device.pick_dtype(config.dtype, where)
    plain().print(
        models.measure(problems, models.peers(config.attention), config.repeats, where, dtype, config.results_dir)
    )
    say(str(Results(config.results_dir).table("model")))
    _draw(config.results_dir, ["model"], device.describe(where))


def _skipping(config: Skipping) -> None:
    """Benchmark block skipping on the activations of a trained model: training and decoding, beside softmax."""
    from sbeval.bench import skipping
    from sbeval.runtime import device
    from sbeval.sweep import scheduler
    from sbeval.sweep.context import RunContext
    from sbeval.tasks.text_training import open_corpus
    from sbeval.training.text_model import TextModel

    if not config.checkpoint:
        raise InputError("give the checkpoint folder of a stick-breaking model with --checkpoint")
    where = device.pick(config.device)
    with scheduler.progress_of(RunContext(results_dir=config.results_dir, device=where)) as progress:
        text = open_corpus(TextModel(corpus=config.corpus, tokenizer=config.tokenizer), progress)
    dtype = device.pick_dtype(config.dtype, where)
    plain().print(
        skipping.measure(config.checkpoint, text.test, sorted(config.lengths), where, dtype, config.results_dir)
    )
    _draw(config.results_dir, ["skipping"], device.describe(where))


def _draw(results_dir: Path, names: list[str], device: str) -> None:
    """Draw figures of the timings on one device; the table may have others' too."""
    from sbeval.report.figures import draw_figures

    for path in draw_figures(results_dir, names, say=say, required=False, where=[f"device={device}"]):
        say(str(path))


options.plain(bench, "kernel", Kernel, _kernel, help=str(_kernel.__doc__))
options.plain(bench, "model", Model, _model, help=str(_model.__doc__))
options.plain(bench, "skipping", Skipping, _skipping, help=str(_skipping.__doc__))
