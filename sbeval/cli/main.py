"""The command line. Commands import heavy modules when they run, so that `--help` is fast."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sbeval import __version__, registry
from sbeval.cli import options
from sbeval.cli.bench import bench
from sbeval.cli.options import Common, Sweep, Training
from sbeval.config import AUTO, digest_of
from sbeval.errors import InputError, choose, reason
from sbeval.runtime import signals, streams
from sbeval.runtime.console import plain, say
from sbeval.tables import power_options
from sbeval.tables.results import Results

if TYPE_CHECKING:
    import torch

    from sbeval.sweep.context import RunContext
    from sbeval.sweep.executor import Executor
    from sbeval.sweep.study_file import Part


class _Commands(options.Commands):
    """All commands: what fails outside of sbeval is an InputError, where no place that knows more has said so."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # not when Python ends, where an error could not be told
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            raise
        except (OSError, EOFError) as error:
            name = getattr(error, "filename", None)
            raise InputError(f"cannot read or write {name}: {reason(error)}" if name else reason(error)) from error
        except KeyboardInterrupt:
            signals.ignore()
            raise


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Evaluate stick-breaking attention and its baselines (Tan et al., ICLR 2025, arXiv 2410.17980).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# groups of commands in `--help`
TASKS, RESULTS, TOOLS = "Tasks", "Results", "Tools"

Device = Annotated[str | None, typer.Option(help=options.DEVICE)]
Dtype = Annotated[str | None, typer.Option(help=options.DTYPE)]
ResultsDir = Annotated[Path, typer.Option(help=options.RESULTS_DIR)]
Force = Annotated[bool, typer.Option("--force", help="Run finished cells again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cells and their cost, and stop.")]
CorpusSpec = Annotated[
    str | None, typer.Option("--corpus", help="python, stdlib, a file or folder, or hf:NAME[:CONFIG].")
]
TextField = Annotated[str | None, typer.Option(help="Field of the text in JSONL and parquet.")]
ExecutorKind = Annotated[str, typer.Option(help="local, or ray.")]
Workers = Annotated[int | None, typer.Option(help=options.WORKERS, parser=options.number(int), metavar="INTEGER")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, as host:port or auto.")]
GpusPerCell = Annotated[
    float | None, typer.Option(help=options.GPUS_PER_CELL, parser=options.number(float), metavar="FLOAT")
]


def _version(asked: bool) -> None:
    if asked:
        print(f"sbeval {__version__}")
        raise typer.Exit


def _add_family(name: str) -> None:
    def add(alone: typer.Typer) -> None:
        family = registry.task(name)
        options.command(
            alone,
            command,
            family.config,
            family.presets,
            Sweep,
            lambda common, given: _family(name, common, given),
            help=family.help,
            panel=TASKS,
        )

    command = name.replace("_", "-")
    options.later(app, command, add, help=registry.command_help(name), panel=TASKS)


def _add_train() -> None:
    help = "Train the models that length-gen with the same options evaluates; under torchrun, on several GPUs."

    def add(alone: typer.Typer) -> None:
        from sbeval.training.text_model import TextModel

        presets = registry.task("length_gen").presets
        options.command(alone, "train", TextModel, presets, Training, _train, help=help, panel=TASKS)

    options.later(app, "train", add, help=help, panel=TASKS)


for _name in registry.TASKS:
    _add_family(_name)
_add_train()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Evaluate stick-breaking attention and its baselines (Tan et al., ICLR 2025, arXiv 2410.17980)."""


@app.command(rich_help_panel=TOOLS)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of sbeval.", metavar="CHECKPOINT")],
    out: Annotated[Path, typer.Argument(help="Output folder, which must be new or empty.", metavar="OUT")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="The tokenizer of training: bytes, bpe:SIZE with --corpus, a file, folder or name. Default: none."
        ),
    ] = None,
    corpus: CorpusSpec = None,
    text_field: TextField = None,
    code: Annotated[
        bool, typer.Option("--code", help="Add the code by which trust_remote_code=True loads it in other tools.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Then upload it to this repository of the Hugging Face hub.", metavar="USER/NAME")
    ] = None,
) -> None:
    """Export a checkpoint as a Hugging Face model, which loads after `import sbeval.hf`."""
    if not importlib.util.find_spec("transformers"):
        raise InputError("export needs transformers: pip install 'sbeval[hf]'")
    from sbeval import hf, hf_card

    hf.export(checkpoint, out, hf.tokenizer_of(tokenizer, corpus, text_field or "text"), code=code)
    say(str(out))
    if push is not None:
        say(hf_card.push(out, push))


@app.command(rich_help_panel=RESULTS)
def table(
    name: Annotated[
        str,
        typer.Argument(
            help="few-shot: models by benchmarks, as papers print them; tokens: gaps to RoPE by training tokens."
        ),
    ],
    format: Annotated[str, typer.Option(help="terminal, markdown or csv; few-shot also latex.")] = "terminal",
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Print a table that follows from a result table; needs no torch."""
    from sbeval.tables import few_shot, tokens, values
    from sbeval.tables.table import read

    results = Results(results_dir)
    tables: dict[str, tuple[str, Sequence[str], Callable[..., Any]]] = {
        "few_shot": (
            "few_shot",
            few_shot.COLUMNS,
            lambda rows, style: few_shot.render(rows, style, lambda cells: values.read(results, cells)),
        ),
        "tokens": ("length_gen", tokens.COLUMNS, tokens.render),
    }
    source, columns, render = tables[choose("table", name.replace("-", "_"), tables)]
    path = results.table(source)
    _warn([path])
    rendered = render(read(path, required=columns), format)
    if isinstance(rendered, str):
        print(rendered)
    else:
        plain().print(rendered)


@app.command(rich_help_panel=TOOLS)
def doctor(device: Device = None, results_dir: ResultsDir = Path("results")) -> None:
    """Report what this machine can run: devices, attention methods, optional packages, presets that fit."""
    from sbeval.doctor import examine
    from sbeval.runtime import device as devices

    report = examine(devices.pick(device), results_dir)
    for section in report.sections:
        _print_table(section.title, section.headings, section.rows)
    if not report.able:
        raise typer.Exit(1)


@app.command(rich_help_panel=RESULTS)
def compare(
    first: Annotated[Path, typer.Argument(help="Results folder.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Results folder to compare with.", metavar="B")],
    format: Annotated[str, typer.Option(help="terminal, markdown or csv.")] = "terminal",
) -> None:
    """Compare two results folders: differences with intervals, and rows in only one; needs no torch."""
    from sbeval.tables.compare import render

    _warn([path for folder in (first, second) for path in sorted(folder.glob("*.csv"))])
    rendered = render(first, second, format)
    if isinstance(rendered, str):
        print(rendered)
    else:
        plain().print(rendered, soft_wrap=False)


def run_study(
    study: Annotated[str, typer.Argument(help="Name of a study, listed below, or the path of a study file (YAML).")],
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override an option of the study, such as needle.samples=20; repeat for several.",
            metavar="OPTION=VALUE",
        ),
    ] = None,
    executor: ExecutorKind = "local",
    workers: Workers = None,
    address: Address = None,
    gpus_per_cell: GpusPerCell = None,
    device: Device = None,
    dtype: Dtype = None,
    results_dir: ResultsDir = Path("results"),
    force: Force = False,
    dry_run: DryRun = False,
    threads: Annotated[str, typer.Option("--threads", help=options.THREADS)] = AUTO,
    show: Annotated[bool, typer.Option("--show", help="Print the study file, as a template, and stop.")] = False,
) -> None:
    """Run a study: train each model once, evaluate every family on it; resumes an interrupted run."""
    from sbeval.runtime import device as devices
    from sbeval.runtime import distributed
    from sbeval.sweep import study_file
    from sbeval.sweep.context import RunContext

    if show:
        print(study_file.text(study), end="")
        return
    if distributed.size() > 1:
        raise InputError("a study runs in one process: start it without torchrun, with --workers or --executor ray")
    how = _how(executor, workers, address, gpus_per_cell)
    where = devices.pick(device)
    parts = study_file.parts(
        study_file.read(study, change or ()), lambda given: devices.pick_dtype(dtype or given, where)
    )
    with _threads(threads, where, results_dir, how, parts, dry_run=dry_run):
        _run(parts, RunContext(results_dir=results_dir, device=where, force=force), how, dry_run=dry_run, name=study)


def _add_run() -> None:
    def add(alone: typer.Typer) -> None:
        from sbeval.sweep.study_file import summaries

        # a paragraph is a line
        lines = ("Studies:", *(f"[bold]{name}[/bold]: {line}" for name, line in summaries().items()))
        alone.command("run", help=run_study.__doc__, epilog="\n\n".join(lines), rich_help_panel=TASKS)(run_study)

    options.later(app, "run", add, help=str(run_study.__doc__), panel=TASKS)


_add_run()


@app.command(rich_help_panel=RESULTS)
def plot(
    figure: Annotated[
        list[str] | None,
        typer.Argument(help="Figures: attention-map, length-gen, mqrar, mqrar-splits, ... Default: all."),
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="png, pdf or html; repeat for several. Default: png and pdf.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the figures. Default: results/figures.", metavar="DIR")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Draw only rows with this value, such as seed=0; repeat for several.", metavar="COLUMN=VALUE"
        ),
    ] = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Draw figures from the result tables; needs no torch."""
    from sbeval.report.figures import draw_figures

    names = [name.replace("-", "_") for name in figure or []]
    for path in draw_figures(results_dir, names, format or ("png", "pdf"), out, say=say, where=where or ()):
        say(str(path))


@app.command(rich_help_panel=RESULTS)
def report(
    out: Annotated[Path | None, typer.Option(help="Output file. Default: results/report.html.", metavar="PATH")] = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Write an HTML report of all results: the paper's claims beside them, interactive figures; needs no torch."""
    from sbeval.report.html import write

    say(str(write(results_dir, out, say=say)))


@app.command(rich_help_panel=RESULTS)
def check(results_dir: ResultsDir = Path("results")) -> None:
    """Check that tables, run files, values and curves are what the runs wrote; needs no torch."""
    from sbeval.tables.check import Checked, folder

    checked, faults = Checked(), 0
    for line in folder(Results(results_dir), checked):
        faults += 1
        say(line)
    unknown = f"; {checked.unknown} cells are of a version without digests" if checked.unknown else ""
    counts = f"{checked.rows:,} rows in {checked.tables} tables, {checked.cells:,} run files, {checked.files:,} others"
    say(f"{results_dir}: {counts}: {f'{faults} faults' if faults else 'as written'}{unknown}")
    if faults:
        raise typer.Exit(1)


def _power(config: power_options.Config) -> None:
    from sbeval.tables import power

    plan = power.plan(config)
    _print_table("Seeds that find a difference of two methods", plan.headings, plan.rows)
    for note in plan.notes:
        say(note)


options.plain(
    app,
    "power",
    power_options.Config,
    _power,
    help="Say how many seeds and documents or items find a given difference in perplexity or a score; needs no torch.",
    panel=RESULTS,
)

app.add_typer(bench, name="bench", rich_help_panel=TOOLS)


def _warn(tables: list[Path]) -> None:
    """Say on stderr which rows are not what a run wrote."""
    from sbeval.tables.check import notes

    for line in notes(path for path in tables if path.exists()):
        print(f"sbeval: {line}", file=sys.stderr)


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in a terminal, elsewhere plain lines with aligned columns, however wide."""
    console = plain()
    if console.is_terminal:
        grid = Table(*headings, title=title)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
        return
    widths = [max(len(row[index]) for row in (headings, *rows)) for index in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows))
    say("\n".join([title, *(f"  {line.rstrip()}" for line in lines), ""]))


def _how(kind: str, workers: int | None, address: str | None, gpus_per_cell: float | None) -> "Executor":
    from sbeval.runtime import distributed
    from sbeval.sweep.executor import Executor

    how = Executor(kind=kind, workers=workers, address=address, gpus_per_cell=gpus_per_cell)
    if distributed.size() > 1 and not how.alone:
        raise InputError(
            "--workers and --executor ray start their own processes: leave them out, or start without torchrun"
        )
    return how


def _family(name: str, common: Common, given: dict[str, Any], *, only: bool = False, shard: bool = False) -> None:
    """Run one family: build the config from preset and options and run its cells; with `only` just train."""
    from sbeval.runtime import device as devices
    from sbeval.runtime import distributed
    from sbeval.sweep import scheduler, study
    from sbeval.sweep.context import RunContext
    from sbeval.sweep.study_file import Part

    family = registry.task(name)
    if distributed.size() > 1 and name != "length_gen":
        raise InputError(f"{name.replace('_', '-')} runs in one process: start it without torchrun")
    how = scheduler.HERE
    if isinstance(common, Sweep):
        how = _how(common.executor, common.workers, common.address, common.gpus_per_cell)
    where = devices.pick(distributed.local_device(common.device))
    preset = common.preset or family.preset(given) or ("quick" if where.type == "cpu" else "small")
    config = dataclasses.replace(
        family.presets[choose("preset", preset, family.presets)],
        **family.completed(given) | {"dtype": devices.pick_dtype(common.dtype, where)},
    )
    part = Part(family=name, preset=preset, config=config)
    threads = _threads(common.threads, where, common.results_dir, how, [part], dry_run=common.dry_run)
    with distributed.joined(where) as world, threads:
        context = RunContext(
            results_dir=common.results_dir,
            device=where,
            force=common.force,
            track=_trackers(common),
            world=world,
            shard=shard,
        )
        if not only or common.dry_run:
            _run([part], context, how, dry_run=common.dry_run)
        elif not _resumable(lambda: study.train(part, context, _console(context)), common.force):
            raise typer.Exit(1)


def _threads(
    wanted: str, where: "torch.device", results_dir: Path, how: "Executor", parts: "Sequence[Part]", *, dry_run: bool
) -> AbstractContextManager[None]:
    """Return the block in which the CPU has the wanted threads, a number for each command; a plan times none."""
    from sbeval.runtime import threads

    if dry_run and wanted == AUTO:
        return nullcontext()
    command = digest_of([how.workers, *([part.family, *part.configs] for part in parts)])
    return threads.used(wanted, where, Results(results_dir).threads(command), how.workers)


def _trackers(common: Common) -> tuple[str, ...]:
    from sbeval.runtime import trackers

    found = (*(common.track or ()), *((f"tensorboard:{common.tensorboard}",) if common.tensorboard else ()))
    trackers.check(found)
    return found


def _train(common: Training, given: dict[str, Any]) -> None:
    # other commands evaluate
    follows = {"eval_len": given["train_len"]} if "train_len" in given else {}
    _family("length_gen", common, given | follows, only=True, shard=common.shard)


def _run(
    parts: "list[Part]", context: "RunContext", how: "Executor", *, dry_run: bool, name: str | None = None
) -> None:
    """Run the unfinished cells, or with `dry_run` print their cost, as a table for a (named) study."""
    from sbeval.sweep import inputs, plan, study

    console = _console(context)
    for line in study.notes(parts):
        study.say(console, line)
    if dry_run:
        inputs.check(parts)
    if not dry_run:
        if not _resumable(lambda: study.run(parts, context, console, how), context.force):
            raise typer.Exit(1)
    elif name is None:
        plan.list_cells(parts[0], context, console, how)
    else:
        console.print(plan.table(f"Study {name}", parts, context))


def _console(context: "RunContext") -> Console:
    """Return the console, which prints on rank 0 only."""
    return plain(quiet=not context.world.leads)


def _resumable(work: Callable[[], bool], force: bool) -> bool:
    try:
        return work()
    except KeyboardInterrupt:
        signals.ignore()
        then = "starts over" if force else "resumes"
        print(f"sbeval: interrupted; finished work is kept, and the same command {then}", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command line; a mistake in its options, or an InputError, is printed as one line, with exit code 2."""
    with streams.guarded(), signals.terminable():
        try:
            sys.exit(app(standalone_mode=False) or 0)
        except options.UsageError as error:
            line = options.mistake(error)
        except InputError as error:
            line = str(error)
        # standard error may be what cannot be written
        with suppress(OSError):
            if line:
                print(f"sbeval: {line}", file=sys.stderr)
        sys.exit(2)
