"""Commands that run the cells of sweeps: one for each task family, `train` and `run`."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sbeval import registry
from sbeval.cli import options
from sbeval.cli.options import TASKS, Common, Device, Dtype, ResultsDir, Sweep, Training
from sbeval.config import AUTO, digest_of
from sbeval.errors import InputError, choose, valid
from sbeval.runtime import signals
from sbeval.runtime.console import plain, say
from sbeval.tables.results import Results

if TYPE_CHECKING:
    import torch

    from sbeval.sweep.context import RunContext
    from sbeval.sweep.executor import Executor
    from sbeval.sweep.study_file import Part

Force = Annotated[bool, typer.Option("--force", help="Run finished cells again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cells and their cost, and stop.")]
ExecutorKind = Annotated[str, typer.Option(help="local, or ray.")]
Workers = Annotated[int | None, typer.Option(help=options.WORKERS, parser=options.number(int), metavar="INTEGER")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, as host:port or auto.")]
GpusPerCell = Annotated[
    float | None, typer.Option(help=options.GPUS_PER_CELL, parser=options.number(float), metavar="FLOAT")
]


def add(app: typer.Typer) -> None:
    """Add the commands to an app whose group is `options.Commands`."""
    for name in registry.TASKS:
        _add_family(app, name)
    _add_train(app)
    _add_run(app)


def _add_family(app: typer.Typer, name: str) -> None:
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


def _add_train(app: typer.Typer) -> None:
    help = "Train the models that length-gen with the same options evaluates; under torchrun, on several GPUs."

    def add(alone: typer.Typer) -> None:
        from sbeval.training.text_model import TextModel

        presets = registry.task("length_gen").presets
        options.command(alone, "train", TextModel, presets, Training, _train, help=help, panel=TASKS)

    options.later(app, "train", add, help=help, panel=TASKS)


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
        if change:
            raise InputError("--show prints the study file as it is: leave out --set, or change what it prints")
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


def _add_run(app: typer.Typer) -> None:
    def add(alone: typer.Typer) -> None:
        from sbeval.sweep.study_file import summaries

        # a paragraph is a line
        lines = ("Studies:", *(f"[bold]{name}[/bold]: {line}" for name, line in summaries().items()))
        alone.command("run", help=run_study.__doc__, epilog="\n\n".join(lines), rich_help_panel=TASKS)(run_study)

    options.later(app, "run", add, help=str(run_study.__doc__), panel=TASKS)


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
    from sbeval.sweep import scheduler
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
    base = family.presets[choose("preset", preset, family.presets)]
    options = family.completed(given) | {"dtype": devices.pick_dtype(common.dtype, where)}
    with valid(name):
        config = dataclasses.replace(base, **options)
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
        _run([part], context, how, dry_run=common.dry_run, only=only)


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
    parts: "list[Part]",
    context: "RunContext",
    how: "Executor",
    *,
    dry_run: bool,
    name: str | None = None,
    only: bool = False,
) -> None:
    """Run the unfinished cells, or with `only` just train their models; with `dry_run` print what that costs, as a
    table for a (named) study."""
    from sbeval.sweep import inputs, plan, study

    console = _console(context)
    for line in study.notes(parts):
        say(line, console)
    if not dry_run:

        def work() -> bool:
            return study.train(parts[0], context, console) if only else study.run(parts, context, console, how)

        if not _resumable(work, context.force):
            raise typer.Exit(1)
        return
    inputs.check(parts)
    for line in study.method_notes([cell for part in parts for cell in study.cells(part)], context.device):
        say(line, console)
    if only:
        plan.list_trainings(parts[0], context, console)
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
