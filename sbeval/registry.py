"""Names of methods, task families and figures; each is one module and one line here.

The dictionaries have module names, not modules, so that `--help` and `sbeval plot` never import torch. Installed
packages add theirs by entry points of the groups `sbeval.attention`, `sbeval.tasks` and `sbeval.figures`, each a name
and a module. A method needs no entry point: `package.module` names it wherever a method is named.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from sbeval.errors import InputError, choose, reason

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure as MatplotlibFigure

    from sbeval.plots.chart import Chart
    from sbeval.sweep.family import Family

ATTENTION = {
    "alibi": "sbeval.kernels.alibi",
    "fire": "sbeval.kernels.fire",
    "forgetting": "sbeval.kernels.forgetting",
    "nope": "sbeval.kernels.nope",
    "rope": "sbeval.kernels.rope",
    "sliding_window": "sbeval.kernels.sliding_window",
    "stick_breaking": "sbeval.kernels.stick_breaking",
}
TASKS = {
    "attention_map": "sbeval.tasks.attention_map",
    "diagnostics": "sbeval.tasks.diagnostics",
    "few_shot": "sbeval.tasks.few_shot",
    "flip_flop": "sbeval.tasks.flip_flop",
    "length_gen": "sbeval.tasks.length_gen",
    "mqrar": "sbeval.tasks.mqrar",
    "needle": "sbeval.tasks.needle",
}
# a line of each command in `sbeval --help`, which imports no family that is here
HELP = {
    "attention_map": "Attention weights on the latest and on stale values of a variable that is assigned again.",
    "diagnostics": "Follow when models learn to retrieve: copying, induction heads, reach.",
    "few_shot": "Benchmarks of lm-eval, for the models of length-gen or for given ones, whose default preset is paper.",
    "flip_flop": "Flip-flop language: write, read and ignore one bit; is every read the bit last written?",
    "length_gen": "Train at one length, evaluate the loss at every position far past it.",
    "mqrar": "Multi-query repeated associative recall: does each use of a variable return its latest value?",
    "needle": "RULER's needles in haystacks: is a fact found anywhere in a text longer than the training length?",
}
FIGURES = {
    "attention_map": "sbeval.plots.attention_map",
    "diagnostics": "sbeval.plots.diagnostics",
    "few_shot": "sbeval.plots.few_shot",
    "fixed_targets": "sbeval.plots.fixed_targets",
    "flip_flop": "sbeval.plots.flip_flop",
    "kernel": "sbeval.plots.kernel",
    "kernel_error": "sbeval.plots.kernel_error",
    "learning_curves": "sbeval.plots.learning_curves",
    "length_gen": "sbeval.plots.length_gen",
    "loss_by_position": "sbeval.plots.loss_by_position",
    "model": "sbeval.plots.model",
    "mqrar": "sbeval.plots.mqrar",
    "mqrar_splits": "sbeval.plots.mqrar_splits",
    "mqrar_steps": "sbeval.plots.mqrar_steps",
    "needle": "sbeval.plots.needle",
    "needle_depth": "sbeval.plots.needle_depth",
    "rates": "sbeval.plots.rates",
    "recall_curves": "sbeval.plots.recall_curves",
    "skipping": "sbeval.plots.skipping",
    "tokens": "sbeval.plots.tokens",
}


def _add_installed() -> None:
    """Add the entry points of installed packages; warn of one whose name is taken."""
    installed = entry_points()
    for group, modules in (("attention", ATTENTION), ("tasks", TASKS), ("figures", FIGURES)):
        for entry in installed.select(group=f"sbeval.{group}"):
            if modules.setdefault(entry.name, entry.module) != entry.module:
                warnings.warn(
                    f"sbeval.{group}: {entry.name!r} is {modules[entry.name]}; {entry.module} is left out", stacklevel=2
                )


_add_installed()
# figures of which a run writes an interactive page too; `sbeval plot --format html` makes one of any
PAGES = ("attention_map",)


class Method(Protocol):
    """A module of `kernels/`: an attention method as the model uses it."""

    # a frozen dataclass with a default for every field, `--attention rope:theta=500000`: int, float, bool, str, a union
    # of these and None, or a Literal of texts; a ValueError of its own is shown as one line
    Options: type[Any]

    def Mixer(
        self, options: Any, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float
    ) -> "torch.nn.Module":
        """Build the module that mixes tokens: `forward(q, k, v, x, cu_seqlens=None, cache=None) -> (B, T, H, D)`.

        q: (B, T, H, D); k, v: (B, S, G, D), the queries being the last T of the S positions; x: (B, T, width), the
        normalised hidden state, for gates that depend on it; cu_seqlens: int32 (N + 1,) or None, the cumulative lengths
        of N sequences packed into one row (then B = 1 and S = T). `scale` multiplies q . k.

        cache: in generation the `sbeval.models.kv_cache.Layer` to which the mixer adds what later tokens need; q, k, v
        and x are then of the new tokens alone: packed prompts, or one token for each row.

        A `forward` that has a parameter `longest` is also given the most tokens that a packed sequence has, an int.

        Where outputs depend on the length of a row, padding on its right included, its attribute `by_length` is true.

        Outputs depend on no later token and on no other sequence or row; what it does not take, packed rows or a cache,
        it raises NotImplementedError for. `sbeval.models.own` checks this where the method is not of this package.
        """

    def backend_name(self, device_type: str) -> str:
        """Return the implementation that runs on a `cpu` or `cuda` device, for the column `backend`."""


class Figure(Protocol):
    """A module of `plots/`: one figure from one result table, for print and for an interactive page.

    It may also have `has_rows`, `gather` and `figures`, see the functions of these names below.
    """

    TABLE: ClassVar[str]  # stem of the CSV it reads
    COLUMNS: ClassVar[tuple[str, ...]]  # the columns it needs

    def draw(self, table: "pd.DataFrame") -> "MatplotlibFigure": ...

    def chart(self, table: "pd.DataFrame") -> "Chart": ...


def method(name: str) -> Method:
    """Import the attention method `name`, or that of a module `package.module`; raise InputError for an unknown one."""
    if name == "softmax":
        raise InputError("attention 'softmax' has no positions of its own: 'rope' is softmax with RoPE, 'nope' without")
    return cast(Method, _load("attention", name, ATTENTION, ("Options", "Mixer", "backend_name")))


def mixer(name: str, options: Any, **sizes: Any) -> "torch.nn.Module":
    """Build the Mixer of a method; raise InputError for one that cannot be called as `Method` states."""
    build = method(name).Mixer
    _check_call(f"attention {name!r}: its Mixer", build, options, **sizes)
    built = build(options, **sizes)
    _check_call(f"attention {name!r}: forward of its Mixer", built.forward, *"qkvx", "cu_seqlens", "cache")
    return built


def _check_call(what: str, called: Callable[..., Any], *given: Any, **named: Any) -> None:
    try:
        inspect.signature(called).bind(*given, **named)
    except TypeError as error:
        raise InputError(f"{what} takes other arguments than sbeval.registry.Method states: {error}") from None


def trained_as(name: str, options: Any) -> Any:
    """Return the options that a model of this method is trained with: those given, without those of evaluation alone.

    A method with such options has a function `trained_as(options)`; its weights serve both.
    """
    return getattr(method(name), "trained_as", lambda given: given)(options)


def task(name: str) -> "Family":
    """Import the task family `name`; raise InputError as `method`."""
    return cast("Family", _load("task family", name, TASKS, ("FAMILY",)).FAMILY)


def command_help(name: str) -> str:
    """Return the line of a family in `sbeval --help`; that of an installed package is in its module, or says that it
    cannot be imported, which is an error where it is used."""
    if name in HELP:
        return HELP[name]
    try:
        return task(name).help
    # what others' code can raise is anything
    except Exception as error:
        return _broken("tasks", name, error)


def ours(module: str) -> bool:
    """Return whether a module is of this package."""
    return module.startswith("sbeval.")


def _broken(group: str, name: str, error: Exception) -> str:
    return f"sbeval.{group}: {name!r} cannot be imported, {type(error).__name__}: {reason(error)}"


def gather(name: str, table: "pd.DataFrame", results_dir: Path) -> "pd.DataFrame":
    """Return the rows that the figure `name` draws: the table, or what its `gather` reads beside the table, which are
    values and curves of its cells: `sbeval check` compares no other files."""
    rows: pd.DataFrame = getattr(figure(name), "gather", lambda rows, _: rows)(table, results_dir)
    return rows


def figures(name: str, rows: "pd.DataFrame") -> "dict[str, MatplotlibFigure]":
    """Draw the figure `name`: one, or those that its `figures` returns, by what their files' names add to it."""
    module = figure(name)
    drawn: dict[str, MatplotlibFigure] = getattr(module, "figures", lambda rows: {"": module.draw(rows)})(rows)
    return drawn


def has_rows(name: str, table: "pd.DataFrame") -> bool:
    """Return whether a table has what the figure `name` draws: a figure that few tables have has a `has_rows`."""
    return bool(getattr(figure(name), "has_rows", lambda _: True)(table))


def figure(name: str) -> Figure:
    """Import the figure `name`; raise InputError as `method`."""
    return cast(Figure, _load("figure", name, FIGURES, ("TABLE", "COLUMNS", "draw", "chart")))


def all_figures(say: Callable[[str], None]) -> dict[str, Figure]:
    """Import all figures; those of installed packages that cannot be imported are said, once, and forgotten."""
    found = {}
    for name, path in list(FIGURES.items()):
        try:
            found[name] = figure(name)
        except Exception as error:
            if ours(path):
                raise
            say(f"{_broken('figures', name, error)}: left out")
            del FIGURES[name]
    return found


def _load(kind: str, name: str, modules: Mapping[str, str], needs: Iterable[str]) -> ModuleType:
    """Import the module of a name, or `name` itself if it has a dot; raise InputError if it is not one of this kind."""
    own = name not in modules and "." in name and all(part.isidentifier() for part in name.split("."))
    try:
        # that of a file is none of a module
        path = name if own and not name.endswith(".py") else modules[choose(kind, name, modules)]
    except InputError as error:
        if kind != "attention":
            raise
        raise InputError(f"{error}; one of your own is package.module, from a folder on PYTHONPATH") from None
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # not one that the module imports itself
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"{kind} {name!r}: no module {error.name!r}; install its package, or put its folder on PYTHONPATH"
        ) from None
    if missing := [need for need in needs if not hasattr(module, need)]:
        raise InputError(f"{kind} {name!r}: the module {path} has no {', '.join(missing)}")
    return module
