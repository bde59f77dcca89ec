"""Names of the command line: each method, family or figure is one module and one line here.

The tables hold module names, not modules, so that `--help` and `sbeval plot` never import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from sbeval.errors import choose

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
    "few_shot": "sbeval.tasks.few_shot",
    "flip_flop": "sbeval.tasks.flip_flop",
    "length_gen": "sbeval.tasks.length_gen",
    "mqrar": "sbeval.tasks.mqrar",
    "needle": "sbeval.tasks.needle",
}
FIGURES = {
    "attention_map": "sbeval.plots.attention_map",
    "few_shot": "sbeval.plots.few_shot",
    "flip_flop": "sbeval.plots.flip_flop",
    "kernel": "sbeval.plots.kernel",
    "kernel_error": "sbeval.plots.kernel_error",
    "length_gen": "sbeval.plots.length_gen",
    "loss_by_position": "sbeval.plots.loss_by_position",
    "model": "sbeval.plots.model",
    "mqrar": "sbeval.plots.mqrar",
    "mqrar_splits": "sbeval.plots.mqrar_splits",
    "needle": "sbeval.plots.needle",
    "needle_depth": "sbeval.plots.needle_depth",
    "skipping": "sbeval.plots.skipping",
}
# figures that also have an interactive page
PAGES = {"attention_map": "sbeval.plots.attention_map_page"}


class Method(Protocol):
    """A module of `kernels/`: an attention method as the model uses it."""

    # a frozen dataclass with a default for every field: `--attention rope:theta=500000`
    Options: type[Any]

    def Mixer(
        self, options: Any, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float
    ) -> "torch.nn.Module":
        """Build the module that mixes tokens: `forward(q, k, v, x, cu_seqlens=None, cache=None) -> (B, T, H, D)`.

        q: (B, T, H, D); k, v: (B, S, G, D), the queries being the last T of the S positions; x: (B, T, width), the
        normalised hidden state, for gates that depend on it; cu_seqlens: int32 (N + 1,) or None, the cumulative lengths
        of N sequences packed into one row (then B = 1 and S = T). `scale` multiplies q . k.

        cache: a `sbeval.models.kv_cache.Layer` in generation: q, k, v and x are of the new tokens alone, first packed
        prompts, then one token per row, and the mixer adds what later tokens need to it.
        """

    def backend_name(self, device_type: str) -> str:
        """Name the backend on a `cpu` or `cuda` device, for the `backend` column."""


class Figure(Protocol):
    """A module of `plots/`: one figure, drawn from one result table."""

    TABLE: ClassVar[str]  # stem of the CSV it reads
    COLUMNS: ClassVar[tuple[str, ...]]  # the columns it needs

    def draw(self, table: "pd.DataFrame") -> "MatplotlibFigure": ...


class Charted(Protocol):
    """A module of `plots/` with the interactive chart of a figure's table."""

    def chart(self, table: "pd.DataFrame") -> "Chart": ...


class Page(Charted, Protocol):
    """A module of `plots/` that makes an HTML page of a figure's table."""

    def page(self, table: "pd.DataFrame") -> str: ...


def method(name: str) -> Method:
    """Import the attention method `name`; raise InputError, offering the nearest name, for an unknown one."""
    return cast(Method, importlib.import_module(ATTENTION[choose("attention", name, ATTENTION)]))


def trained_as(name: str, options: Any) -> Any:
    """Return the options that a model was trained with: those given, without those of evaluation alone.

    A method with options of evaluation has a function `trained_as(options)`; both options have the same weights.
    """
    return getattr(method(name), "trained_as", lambda given: given)(options)


def task(name: str) -> "Family":
    """Import the task family `name`; raise InputError as `method`."""
    return cast("Family", importlib.import_module(TASKS[choose("task family", name, TASKS)]).FAMILY)


def figure(name: str) -> Figure:
    """Import the figure `name`; raise InputError as `method`."""
    return cast(Figure, importlib.import_module(FIGURES[choose("figure", name, FIGURES)]))


def page(name: str) -> Page:
    """Import the module of the page of the figure `name`, which is one of PAGES."""
    return cast(Page, importlib.import_module(PAGES[name]))


def charted(name: str) -> Charted:
    """Import the module with the chart of the figure `name`."""
    return cast(Charted, importlib.import_module(PAGES.get(name) or FIGURES[choose("figure", name, FIGURES)]))
