"""Commands derived from configs: a config field with help is an option of the command, described only there."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from sbeval.config import AUTO, DATA, EVALUATION, MODEL, RUN, TASK, TRAINING, option

# groups of options, in the order of `--help`
GROUPS = (TASK, MODEL, TRAINING, EVALUATION, DATA, RUN)
# groups of commands there
TASKS, RESULTS, TOOLS = "Tasks", "Results", "Tools"
# maximum number of values that `--help` lists for a swept option
LISTED = 6
# help of options that several commands have
DEVICE = "cpu, cuda or cuda:N. Default: the GPU if there is one."
DTYPE = "Data type of matrix products: float32, bfloat16 or float16. Default: bfloat16 on a GPU, float32 on a CPU."
RESULTS_DIR = "Folder of tables, run files, checkpoints and figures."
WORKERS = "Cells to run at once: processes that share cores and GPUs, or Ray's CPUs on this machine."
GPUS_PER_CELL = "GPUs of a Ray task, such as 0.25. Default: one where there are any."
THREADS = "Threads on the CPU, which --workers share: a number, or auto, the fastest of a short timing."

Device = Annotated[str | None, typer.Option(help=DEVICE)]
Dtype = Annotated[str | None, typer.Option(help=DTYPE)]
ResultsDir = Annotated[Path, typer.Option(help=RESULTS_DIR, file_okay=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Options of every command that runs cells."""

    preset: str | None = option(
        None,
        RUN,
        "quick (minutes on two cores), small (one GPU), h200, paper, or one of the task's own. Default: "
        "quick on a CPU, else small.",
    )
    device: str | None = option(None, RUN, DEVICE)
    dtype: str | None = option(None, RUN, DTYPE)
    results_dir: Path = option(Path("results"), RUN, RESULTS_DIR)
    force: bool = option(False, RUN, "Run finished cells again.")
    dry_run: bool = option(False, RUN, "Print the cells and their cost, and stop.")
    tensorboard: Path | None = option(None, RUN, "Folder for TensorBoard logs.", metavar="DIR")
    threads: str = option(AUTO, RUN, THREADS)
    track: tuple[str, ...] | None = option(
        None, RUN, "Show training in tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT.", metavar="KIND:WHERE"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(Common):
    """Options of a command that can run several cells at once."""

    executor: str = option("local", RUN, "local, or ray.")
    workers: int | None = option(None, RUN, WORKERS)
    address: str | None = option(None, RUN, "Ray cluster to join, as host:port or auto.")
    gpus_per_cell: float | None = option(None, RUN, GPUS_PER_CELL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(Common):
    """Options of the command that only trains."""

    shard: bool = option(False, RUN, "Shard weights and optimizer over the processes (FSDP2) instead of copies (DDP).")


# a mistake in options or commands; Typer exports this subclass alone, and has the class in a module of its version
UsageError: type[Any] = typer.BadParameter.__bases__[0]


def mistake(error: Any) -> str:
    """Return what is wrong with a command line, of a UsageError, in one line; empty where its help was printed."""
    said = " ".join(error.format_message().split()).removesuffix(".")
    if not said:
        return ""
    path = error.ctx.command_path if error.ctx else "sbeval"
    return f"{said[:1].lower()}{said[1:]}{' See' if said.endswith('?') else '; see'} {path} --help"


class Later(TyperCommand):
    """A command's line in `--help`; its callback returns the command."""


class Commands(TyperGroup):
    """Commands, some of which are built when they are called or completed: the list of all needs a line of each."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if isinstance(command, Later):
            assert command.callback is not None
            command = command.callback()
        return name, command, rest


Kind = TypeVar("Kind", bound=Common)
Given = TypeVar("Given")


def number(kind: type[int] | type[float]) -> Callable[[str | float], Any]:
    """Return the parser of a number, whose error names what was given."""

    def parse(text: str | float) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None

    return parse


def _several(kind: type[int] | type[float]) -> Callable[[str | float], list[Any]]:
    """Return the parser of numbers separated by commas: `--kv-pairs 8,16` is `--kv-pairs 8 --kv-pairs 16`."""

    def parse(text: str | float) -> list[Any]:
        # a number: one of a default
        return [number(kind)(one) for one in text.split(",")] if isinstance(text, str) else [text]

    return parse


def _flat(values: list[Any]) -> tuple[Any, ...]:
    return tuple(one for value in values for one in (value if isinstance(value, list) else [value]))


def parameters(config: type[Any], presets: Mapping[str, Any] | None = None) -> list[inspect.Parameter]:
    """Return a keyword parameter for each field that is an option, as Typer reads them.

    presets: by name, configs whose values hold where an option is not given: it is None then.
    """
    found, hints = [], get_type_hints(config)
    for field in fields(config):
        if "help" not in field.metadata:
            continue
        hint, help, default = hints[field.name], field.metadata["help"], None if presets else field.default
        parser, metavar = None, field.metadata["metavar"]
        flags = (field.metadata["flag"] or f"--{field.name.replace('_', '-')}").split()
        if isinstance(hint, types.UnionType):
            (hint,) = (kind for kind in get_args(hint) if kind is not types.NoneType)
        if get_args(hint):
            (item,) = set(get_args(hint)) - {...}
            hint, help = types.GenericAlias(list, (item,)), f"{help} Repeat for several."
            parser = _several(item) if item in (int, float) else None
        elif hint in (int, float):
            item, parser = hint, number(hint)
        if parser:
            metavar = metavar or ("INTEGER" if item is int else "FLOAT")
        if hint is bool and presets:
            flags = [f"{flag}/--no-{flag[2:]}" for flag in flags]
        if presets and (values := _by_preset(field.name, presets)):
            # escaped, since Rich reads brackets as markup
            help = f"{help} [dim]\\[{values}][/dim]"
        assert default is not MISSING, "an option has a default"
        # as the default, not in Annotated, which takes most of the time of building a command
        info = typer.Option(
            default,
            *flags,
            help=help,
            metavar=metavar,
            parser=parser,
            # paths are those of folders
            file_okay=hint is not Path,
            rich_help_panel=field.metadata["group"],
            show_default=not presets and hint is not bool,
        )
        kind: Any = hint | None if default is None else hint
        found.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind))
    return found


# Any: mypy takes no class to be hashable
_common: Any = functools.cache(parameters)


def _by_preset(name: str, presets: Mapping[str, Any]) -> str:
    """Return the default of an option and the presets with other values; empty if no preset sets it."""
    names: dict[str, list[str]] = {}
    for preset, config in presets.items():
        names.setdefault(_text(getattr(config, name)), []).append(preset)
    if list(names) == [""]:
        return ""
    most = max(names, key=lambda text: len(names[text]))
    others = [f"{', '.join(of)}: {text or 'none'}" for text, of in names.items() if text != most]
    return "; ".join([*([f"default: {most}"] if most else []), *others])


def _text(value: object) -> str:
    if isinstance(value, tuple):
        more = f", ... ({len(value)})" if len(value) > LISTED else ""
        return ", ".join(map(_text, value[: LISTED // 2 if more else LISTED])) + more
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def plain(
    app: typer.Typer, name: str, config: type[Given], run: Callable[[Given], None], *, help: str, panel: str = ""
) -> None:
    """Add a command with the options of a config alone, and no presets; `run` gets the config."""

    def invoke(**values: Any) -> None:
        run(config(**{key: tuple(_flat(value)) if isinstance(value, list) else value for key, value in values.items()}))

    own = sorted(parameters(config), key=lambda one: GROUPS.index(one.default.rich_help_panel))
    invoke.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    app.command(name, help=help, rich_help_panel=panel)(invoke)


def command(
    app: typer.Typer,
    name: str,
    config: type[Any],
    presets: Mapping[str, Any],
    common: type[Kind],
    run: Callable[[Kind, dict[str, Any]], None],
    *,
    help: str,
    panel: str,
) -> None:
    """Add a command with the options of a config and the common ones; `run` gets the common and the given options."""
    shared = {field.name for field in fields(common)}

    def invoke(**values: Any) -> None:
        rest = {key: value for key, value in values.items() if key not in shared and value is not None}
        given = {key: _flat(value) if isinstance(value, list) else value for key, value in rest.items()}
        run(common(**{key: values[key] for key in shared}), given)

    both = [*parameters(config, presets), *_common(common)]
    both.sort(key=lambda one: GROUPS.index(one.default.rich_help_panel))
    invoke.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
    app.command(name, help=help, rich_help_panel=panel)(invoke)


def later(app: typer.Typer, name: str, add: Callable[[typer.Typer], None], *, help: str, panel: str) -> None:
    """Add a command to an app whose group is `Commands`; when it is called, `add` adds it to an app of its own."""

    def build() -> Any:
        alone = typer.Typer(add_completion=False)
        add(alone)
        return typer.main.get_command(alone)

    app.command(name, cls=Later, help=help, rich_help_panel=panel)(build)
