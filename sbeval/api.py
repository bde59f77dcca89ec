"""The Python interface: what `import sbeval` offers beside the command line.

    results = sbeval.run("quick")                                 or sbeval.load_results("results")
    sbeval.draw(results["mqrar"]).savefig("mqrar.png")
    losses = sbeval.evaluate(model, tokens, train_len=2048)       any module that maps tokens to logits
    out = sbeval.attention(q, k, v, method="stick_breaking")

torch is imported by the functions that compute with it, pandas with this module.
"""

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from sbeval import registry
from sbeval.errors import InputError
from sbeval.tables import curves, intervals, provenance, selection, values
from sbeval.tables.results import Results
from sbeval.tables.table import read

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from sbeval.evaluation.perplexity import Predictor


class ResultTables(Mapping[str, pd.DataFrame]):
    """The tables of a results folder by family name, read when asked for; docs/columns.md explains every column."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __getitem__(self, family: str) -> pd.DataFrame:
        path = Results(self.folder).table(family)
        if not path.exists():
            raise KeyError(f"{self.folder} has no table {family!r}; it has: {', '.join(self) or 'none'}")
        return read(path)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self.folder.glob("*.csv")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"<results in {self.folder}: {', '.join(self) or 'no tables'}>"

    def run_file(self, cell: str) -> dict[str, Any]:
        """Return the run file of a row's `cell`: its whole configuration, versions and measurements."""
        return provenance.read_run(Results(self.folder).run_file(cell))

    def unit_values(self, cells: str | Iterable[str]) -> pd.DataFrame:
        """Return the values of each document, item or prompt behind the rows of cells, or of one cell: see
        docs/results-folder.md."""
        return values.read(Results(self.folder), [cells] if isinstance(cells, str) else cells)

    def curves(self, cells: str | Iterable[str]) -> pd.DataFrame:
        """Return losses and scores by training step of cells, or of one cell: columns cell, metric, step, value."""
        return curves.read(Results(self.folder), [cells] if isinstance(cells, str) else cells)


def load_results(folder: str | Path = "results") -> ResultTables:
    """Open a results folder; raise InputError if it is not there."""
    if not Path(folder).is_dir():
        raise InputError(f"no results folder {folder}; sbeval.run or the command line writes one")
    return ResultTables(folder)


def run(
    study: "str | Path | Mapping[str, Any]",
    *,
    results_dir: str | Path = "results",
    workers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> ResultTables:
    """Run the unfinished cells of a study and return the results, as `sbeval run` does.

    study: a name, the path of a study file, or its content, such as {"mqrar": {"kv_pairs": [8, 16]}}. With workers a
    script needs `if __name__ == "__main__":`. Raise RuntimeError, after all cells, if some failed; finished results are
    kept.
    """
    from rich.console import Console

    from sbeval.runtime import device as devices
    from sbeval.sweep import study as studies
    from sbeval.sweep import study_file
    from sbeval.sweep.context import RunContext
    from sbeval.sweep.executor import Executor

    where = devices.pick(device)
    document = study_file.given(study) if isinstance(study, Mapping) else study_file.read(str(study))
    parts = study_file.parts(document, lambda named: devices.pick_dtype(dtype or named, where))
    context = RunContext(results_dir=Path(results_dir), device=where, force=force, quiet=quiet)
    if not studies.run(parts, context, Console(quiet=quiet), Executor(workers=workers)):
        raise RuntimeError(f"some cells failed: their run files in {Results(Path(results_dir)).runs} have the reasons")
    return load_results(results_dir)


def evaluate(
    model: "nn.Module",
    tokens: "Tensor | Sequence[Any]",
    *,
    train_len: int,
    name: str = "model",
    batch: int = 1,
    dtype: str = "float32",
    device: "str | torch.device | None" = None,
) -> pd.DataFrame:
    """Measure the loss of a language model at every position, and its perplexity by context length.

    model: maps tokens (B, T) int64 to logits (B, T, vocabulary), or to an object with `logits`, as models of
    transformers do; or a Decoder of this package, whose logits are then never in memory at once. InputError for one
    that sees later tokens: of 32 the last is changed. tokens: (N, n + 1), or N sequences of n + 1 tokens, one from each
    document. train_len: the training length, in tokens. batch: sequences of a forward pass, halved when memory runs
    out. device: by default that of the model's parameters.

    The rows are those of `length_gen` (see docs/columns.md) without bits per byte; `name` is their `attention`.
    """
    import numpy as np
    import torch

    from sbeval.evaluation import perplexity
    from sbeval.models.decoder import Decoder
    from sbeval.pretrained import checks
    from sbeval.runtime import device as devices
    from sbeval.tables.rows import Identity
    from sbeval.tasks import length_gen_rows

    for what, number in (("train_len", train_len), ("batch", batch)):
        if not isinstance(number, numbers.Integral) or number < 1:
            raise InputError(f"{what} must be an integer of at least 1; got {number!r}")
    rows = [np.asarray(row.cpu() if isinstance(row, torch.Tensor) else row) for row in tokens]
    if strange := [row.dtype for row in rows if row.dtype.kind not in "iu"]:
        raise InputError(f"tokens must be integers; got {strange[0]}")
    rows = [row.astype(np.int64) for row in rows]
    if not rows or len({row.shape for row in rows}) > 1 or rows[0].ndim != 1 or len(rows[0]) < 2:
        shapes = ", ".join(sorted({str(row.shape) for row in rows})) or "nothing"
        raise InputError(f"tokens must be sequences of one length, at least 2 tokens each; got {shapes}")
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    place = torch.device(device)
    if place.type == "cuda":
        devices.pick(str(place))
    dtype = devices.pick_dtype(dtype, place)
    predictor: Predictor = model if isinstance(model, Decoder) else _Logits(model)
    training, _ = model.training, model.eval()
    try:
        windows = list(enumerate(rows))
        with devices.autocast(place, dtype):
            weights = {parameter.dtype for parameter in model.parameters()} | {devices.DTYPES[dtype]}
            narrow = min(weights, key=lambda kind: kind.itemsize)
            size, longest = 1 + max(int(row.max()) for row in rows), len(rows[0]) - 1
            checks.causal(predictor, size, place, narrow, name, longest=longest)
        how = perplexity.Execution(place=place, dtype=dtype, batch=batch)
        losses = perplexity.measure(predictor, windows, np.ones_like, how)
    finally:
        model.train(training)
    params = sum(parameter.numel() for parameter in model.parameters())
    identity = Identity(
        family="length_gen",
        task="given",
        model=type(model).__name__,
        attention=name,
        options="",
        params=params,
        train_len=train_len,
        eval_len=losses.length,
        seed=0,
    )
    found = length_gen_rows.rows(losses, train_len)
    made_here = {"corpus": "", "tokenizer": "", "preset": "", "train_tokens": 0, "dtype": dtype}
    return pd.DataFrame(
        [
            dataclasses.asdict(identity) | dataclasses.asdict(row) | made_here
            for row in found
            if row.metric != "bits_per_byte"
        ]
    )


class _Logits:
    """A model of logits as a Predictor, whose hidden states they are."""

    # not known, so rows are not padded
    by_length = True

    def __init__(self, model: "nn.Module") -> None:
        self._model = model

    def __call__(self, tokens: "Tensor", /) -> "Tensor":
        out = self._model(tokens)
        found: Tensor = getattr(out, "logits", out)
        if found.shape[:2] != tokens.shape or found.ndim != 3:
            raise InputError(
                f"the model must map tokens {tuple(tokens.shape)} to logits (B, T, vocabulary); "
                f"got {tuple(found.shape)}"
            )
        return found

    def logits(self, hidden: "Tensor", /) -> "Tensor":
        return hidden


@overload
def draw(table: pd.DataFrame, *, figure: str | None = None, results_dir: str | Path | None = None) -> "Figure": ...
@overload
def draw(table: pd.DataFrame, *, figure: str | None = None, x: str | None = None, axes: "Axes") -> "Axes": ...
def draw(
    table: pd.DataFrame,
    *,
    figure: str | None = None,
    results_dir: str | Path | None = None,
    x: str | None = None,
    axes: "Axes | None" = None,
) -> "Figure | Axes":
    """Draw a result table and return the matplotlib Figure; with `axes`, draw one panel into them and return them.

    figure: a name of `sbeval plot`, with `_`; by default that of the table's family. results_dir: the folder that the
    table is from, for figures of curves, or of values behind the rows, which are beside it. x: with axes, the column of
    the x axis, for rows of one metric; by default what the family is about: `context_length`, `kv_pairs` or `length`.
    """
    from sbeval.plots import legend

    if not len(table):
        raise InputError("the table has no rows to draw")
    _check_columns(table, "the table", [] if figure else ["family"])
    table = legend.named(table)
    name = figure or str(table["family"].iloc[0])
    if axes is not None:
        _check_columns(table, "the table", ["attention", "options", "metric", "value", *([x] if x else [])])
        return _panel(table, name, x, axes)
    drawn = registry.figure(name)
    _check_columns(table, f"the table for figure {name!r}, which is drawn from {drawn.TABLE},", drawn.COLUMNS)
    if hasattr(drawn, "gather") and results_dir is None:
        raise InputError(f"figure {name!r} is also drawn from files beside the table: give its results_dir")
    return drawn.draw(table if results_dir is None else registry.gather(name, table, Path(results_dir)))


def _check_columns(table: pd.DataFrame, what: str, needed: Iterable[str]) -> None:
    if missing := [name for name in needed if name not in table]:
        raise InputError(f"{what} has no column {missing[0]!r}; it has: {', '.join(map(str, table))}")


def _panel(table: pd.DataFrame, family: str, x: str | None, axes: "Axes") -> "Axes":
    """Draw a line with a band for each method."""
    from sbeval.plots import legend, style

    if x is None:
        rows, x = _selected(table, family)
    elif len(metrics := sorted(set(table["metric"]))) > 1:
        raise InputError(f"a panel has rows of one metric; the table has {', '.join(metrics)}: select one of them")
    else:
        rows = table[table[x].notna()]
    points = intervals.points(rows, [x], intervals.scale_of(str(rows["metric"].iloc[0])))
    for method, look in legend.looks(rows).items():
        mine = intervals.method(points, method)
        axes.plot(mine[x], mine["mean"], label=look.label, **look.line())
        axes.fill_between(mine[x], mine["low"], mine["high"], color=look.colour, alpha=0.2, linewidth=0)
    style.label(axes, x.replace("_", " "), str(rows["metric"].iloc[0]).replace("_", " "))
    axes.legend(frameon=False)
    return axes


def _selected(table: pd.DataFrame, family: str) -> tuple[pd.DataFrame, str]:
    """Return the rows that a family's main figure shows, and the column of its x axis."""
    if family == "length_gen":
        return selection.by_context(table), "context_length"
    if family == "mqrar":
        rows = selection.recall_accuracy(table)
        return rows[(rows["split"] == "all") & (rows["metric"] == "accuracy")], "kv_pairs"
    if family == "needle":
        scores = selection.needle_scores(table)
        means = selection.mean_over_tasks(scores[scores["metric"] == "score"]).assign(metric="score")
        if means.empty:
            raise InputError("there is no length at which a method has all tasks: select tasks, or give x")
        return means, "length"
    raise InputError(f"give the column of the x axis: a table of {family!r} has several that could be it")


def attention(
    q: "Tensor",
    k: "Tensor",
    v: "Tensor",
    *,
    method: str = "stick_breaking",
    scale: float | None = None,
    cu_seqlens: "Tensor | None" = None,
) -> "Tensor":
    """Attend causally: (B, T, H, D) from q (B, T, H, D) and k, v (B, S, G, D), whose last T positions are the queries'.

    method: as for `--attention`, with options: `stick_breaking:remainder=none`. scale: of q . k, D ** -0.5 when None.
    cu_seqlens: int32 (N + 1,), the bounds of N sequences packed into one row. Raise InputError for a method that has
    weights of its own: build its `Mixer`; and for options of a block, which are about the projections around it.
    """
    from sbeval.kernels import check
    from sbeval.models.config import block_options, parse_attention

    check.inputs(q, k, v, cu_seqlens)
    name, options = parse_attention(method)
    if of_block := block_options(method):
        raise InputError(
            f"attention {method!r} has options of a whole block ({', '.join(of_block)}): leave them out, or build an "
            "sbeval.models.decoder.Attention"
        )
    heads, size = q.shape[2:]
    mixer = registry.mixer(
        name,
        options,
        heads=heads,
        kv_heads=k.shape[2],
        head_dim=size,
        width=heads * size,
        scale=size**-0.5 if scale is None else scale,
    )
    if weights := [name for name, _ in mixer.named_parameters()]:
        raise InputError(
            f"attention {method!r} has weights of its own ({', '.join(weights)}): "
            f"build sbeval.registry.method({name!r}).Mixer"
        )
    # the last argument is for gates, which are weights
    return check.output(mixer.to(q.device)(q, k, v, q.flatten(2), cu_seqlens), q, method)
