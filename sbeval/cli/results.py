"""Commands that read result tables, none of which needs torch: tables, figures, the report, comparisons, checks."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sbeval.cli import options
from sbeval.cli.options import RESULTS, ResultsDir
from sbeval.errors import choose
from sbeval.runtime.console import plain, print_table, say
from sbeval.tables import power_options
from sbeval.tables.results import Results


def add(app: typer.Typer) -> None:
    """Add the commands to an app."""
    for work in (table, compare, plot, report, check):
        app.command(rich_help_panel=RESULTS)(work)
    options.plain(app, "power", power_options.Config, power, help=str(power.__doc__), panel=RESULTS)


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
    _print(render(read(path, required=columns), format))


def compare(
    first: Annotated[Path, typer.Argument(help="Results folder.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Results folder to compare with.", metavar="B")],
    format: Annotated[str, typer.Option(help="terminal, markdown or csv.")] = "terminal",
) -> None:
    """Compare two results folders: differences with intervals, and rows in only one; needs no torch."""
    from sbeval.tables.compare import render

    _warn([path for folder in (first, second) for path in sorted(folder.glob("*.csv"))])
    _print(render(first, second, format))


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
            help="Draw only rows with this value, such as seed=0; repeat for more.",
            metavar="COLUMN=VALUE",
        ),
    ] = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Draw figures from the result tables; needs no torch."""
    from sbeval.report.drawn import USUAL
    from sbeval.report.figures import draw_figures

    names = [name.replace("-", "_") for name in figure or []]
    for path in draw_figures(results_dir, names, format or USUAL, out, say=say, where=where or ()):
        say(str(path))


def report(
    out: Annotated[Path | None, typer.Option(help="Output file. Default: results/report.html.", metavar="PATH")] = None,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Write an HTML report of all results: the paper's claims beside them, interactive figures; needs no torch."""
    from sbeval.report.html import write

    say(str(write(results_dir, out, say=say)))


def check(results_dir: ResultsDir = Path("results")) -> None:
    """Check that tables, run files, values and curves are what runs wrote, and figures show them; needs no torch."""
    from sbeval.report.drawn import Counts, stale
    from sbeval.tables.check import Checked, folder

    checked, faults, figures = Checked(), 0, Counts()
    for line in folder(Results(results_dir), checked):
        faults += 1
        say(line)
    # no fault: the numbers are what they are, and a figure is drawn again from them
    for line in stale(Results(results_dir), figures):
        say(line)
    unknown = f"; {checked.unknown} cells are of a version without digests" if checked.unknown else ""
    counts = {"row": checked.rows, "table": checked.tables, "run file": checked.cells, "other file": checked.files}
    words = ", ".join(f"{count:,} {noun}{'s' * (count != 1)}" for noun, count in counts.items())
    found = f"{faults} fault{'s' * (faults > 1)}" if faults else "as written"
    drawn = f"; figures: {figures}" if str(figures) else ""
    say(f"{results_dir}: {words}: {found}{unknown}{drawn}")
    if faults:
        raise typer.Exit(1)


def power(config: power_options.Config) -> None:
    """Say how many seeds and documents or items find a given difference in perplexity or a score; needs no torch."""
    from sbeval.tables.power import plan

    found = plan(config)
    print_table("Seeds that find a difference of two methods", found.headings, found.rows)
    for note in found.notes:
        say(note)


def _print(rendered: Any) -> None:
    """Print text as it is, or a table of the terminal."""
    if isinstance(rendered, str):
        print(rendered)
    else:
        plain().print(rendered)


def _warn(tables: list[Path]) -> None:
    """Say on stderr which rows are not what a run wrote."""
    from sbeval.tables.check import notes

    for line in notes(path for path in tables if path.exists()):
        print(f"sbeval: {line}", file=sys.stderr)
