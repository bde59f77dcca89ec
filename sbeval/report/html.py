"""The report: one HTML page of all result tables, with findings first; and the page of a single figure. No torch.

Each figure is interactive and comes with its numbers, the runs behind them and their commands. The same tables and run
files make the same page.
"""

from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path

import pandas as pd

from sbeval import registry
from sbeval.errors import InputError
from sbeval.plots import legend
from sbeval.plots.chart import SYMBOLS, Chart, Group, Panel, plain, readable
from sbeval.report import maturity, page
from sbeval.report.claims import CLAIMS, OWN
from sbeval.report.judge import AGREES, DISAGREES, FASTER, NO, SLOWER, UNDECIDED, YES, Evidence, Finding, findings
from sbeval.runtime.files import prepare, remove_left, replacing
from sbeval.tables import check, csv_text, values
from sbeval.tables.results import Results
from sbeval.tables.rows import Measurement
from sbeval.tables.run_files import Runs, gather
from sbeval.tables.table import read, required

TITLE = "Stick-breaking attention: results"
SIGNS = {AGREES: "✓", DISAGREES: "✗", UNDECIDED: "–", FASTER: "▲", SLOWER: "▼", YES: "✓", NO: "✗"}
LEANS = {AGREES: "leans towards it", DISAGREES: "leans against it"}
# groups with more panels draw them small
FEW = 4
INSTALL = "pip install -c constraints.txt -e '.[html]'"


def write(results_dir: Path, out: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Write the report on the tables in `results_dir` to `out`, by default report.html there, in one step.

    A figure whose table has nothing to draw is skipped and reported, and so are rows that are not what a run wrote.
    InputError where there is no table at all.
    """
    out = out or results_dir / "report.html"
    text = build(results_dir, say)
    remove_left(prepare(out.parent, "folder of the report", "--out"))
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


def build(results_dir: Path, say: Callable[[str], None] = print) -> str:
    """Return the report as HTML."""
    tables = _tables(results_dir, say)
    for line in check.notes(Results(results_dir).table(name) for name in tables):
        say(line)
    charts = _charts(tables, results_dir, say)
    runs = {name: gather(table, results_dir / "runs") for name, table in tables.items()}
    evidence = Evidence(tables, partial(values.read, Results(results_dir)))
    judged, own = findings(CLAIMS, evidence), findings(OWN, evidence)
    canaries = maturity.table(tables["length_gen"]) if "length_gen" in tables else pd.DataFrame()
    sections = [_claims(judged, charts), *([_own(own, charts)] if _measured(own) else [])]
    sections += [] if canaries.empty else [_maturity(canaries)]
    sections += [_figure(name, chart, runs[registry.figure(name).TABLE]) for name, chart in charts.items()]
    sections += [_all_runs(runs), _again(runs)]
    links = {"findings": "The paper's claims"} | ({"own": "Measurements of our own"} if _measured(own) else {})
    links |= {} if canaries.empty else {"maturity": "Maturity"}
    links |= {_id("figure", name): chart.heading for name, chart in charts.items()}
    links |= {"runs": "Runs", "again": "Run it again"}
    nav = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in links.items())
    body = (
        '<a class="skip" href="#findings">Skip to the findings</a>\n'
        f"<header><h1>{TITLE}</h1>{_lead(judged, tables)}</header>\n"
        f'<nav aria-label="On this page"><ul>{nav}</ul></nav>\n<main>\n{"".join(sections)}</main>'
    )
    return page.document(TITLE, body)


def _tables(results_dir: Path, say: Callable[[str], None]) -> dict[str, pd.DataFrame]:
    """Read the tables that exist, by name."""
    needed: dict[str, set[str]] = {}
    for figure in registry.all_figures(say).values():
        needed.setdefault(figure.TABLE, set(required(Measurement))).update(figure.COLUMNS)
    paths = {name: Results(results_dir).table(name) for name in needed}
    tables = {name: read(path, sorted(needed[name])) for name, path in paths.items() if path.exists()}
    if not tables:
        raise csv_text.nothing(results_dir)
    return tables


def _charts(tables: dict[str, pd.DataFrame], results_dir: Path, say: Callable[[str], None]) -> dict[str, Chart]:
    charts = {}
    # in the order of the claims that they show
    order = list(dict.fromkeys([*(claim.table for claim in (*CLAIMS, *OWN)), *tables]))
    names = [name for name in registry.FIGURES if registry.figure(name).TABLE in tables]
    for name in sorted(names, key=lambda name: order.index(registry.figure(name).TABLE)):
        table = registry.figure(name).TABLE
        try:
            rows = registry.gather(name, tables[table], results_dir)
            if registry.has_rows(name, rows):
                charts[name] = registry.figure(name).chart(legend.named(rows))
        except InputError as error:
            say(f"{name}: skipped, {results_dir / table}.csv: {error}")
    return charts


def _lead(judged: list[Finding], tables: dict[str, pd.DataFrame]) -> str:
    measured = _measured(judged)
    counts = {verdict: sum(each.judged.verdict == verdict for each in measured) for verdict in SIGNS}
    leaning = {verdict: sum(each.judged.leans == verdict for each in measured) for verdict in SIGNS}
    leans = f", of which {leaning[AGREES]} lean towards the claim and {leaning[DISAGREES]} against it"
    missing = len(judged) - len(measured)
    numbers = sum(len(table) for table in tables.values())
    cells = sum(table["cell"].nunique() for table in tables.values())
    newest = max((str(utc) for table in tables.values() for utc in table["utc"]), default="")[:10]
    return (
        f"<p>Of {len(judged)} claims about stick-breaking attention (Tan et al., ICLR 2025, arXiv 2410.17980) the "
        f"results here agree with {counts[AGREES]}, disagree with {counts[DISAGREES]} and leave "
        f"{counts[UNDECIDED]} undecided{leans if counts[UNDECIDED] else ''}"
        f"{f'; {missing} are not measured here' if missing else ''}. {numbers:,} numbers of {cells:,} runs, the newest "
        f"of {escape(newest)}.</p>"
    )


def _measured(judged: list[Finding]) -> list[Finding]:
    return [each for each in judged if each.judged.measured]


def _claims(judged: list[Finding], charts: dict[str, Chart]) -> str:
    caption = (
        "Each claim beside these results, with intervals in square brackets, and below them in small print what they "
        "are over; the rule says what decides it. Where the models are too small or too young to decide, the numbers "
        "still lean to one side."
    )
    others = [each.claim for each in judged if not each.judged.measured]
    lines = "".join(f"<li>{_text(claim.text)} <code>{escape(claim.command)}</code></li>" for claim in others)
    missing = f"<h3>Not measured here</h3>\n<ul>{lines}</ul>\n" if others else ""
    return _findings("findings", "The paper's claims", "Claimed", caption, judged, charts, missing)


def _own(judged: list[Finding], charts: dict[str, Chart]) -> str:
    caption = (
        "What the paper does not claim: the speed of this project's kernel, and gaps by training tokens. Intervals are "
        "in square brackets."
    )
    return _findings("own", "Measurements of our own", "Asked", caption, judged, charts)


def _findings(
    name: str, title: str, asked: str, caption: str, judged: list[Finding], charts: dict[str, Chart], more: str = ""
) -> str:
    rows = "".join(_finding(each, charts) for each in _measured(judged))
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>\n'
        f'<table class="findings"><caption>{escape(caption)}</caption>\n'
        f'<thead><tr><th scope="col">{asked}</th><th scope="col">These results</th><th scope="col">Verdict</th></tr>'
        f"</thead>\n<tbody>{rows}</tbody></table>{more}</section>\n"
    )


def _finding(each: Finding, charts: dict[str, Chart]) -> str:
    claim, judged = each.claim, each.judged
    found = _text(judged.found)
    if found and claim.figure in charts:
        heading = f'<span class="hidden">: {escape(charts[claim.figure].heading)}</span>'
        found += f' <a href="#{_id("figure", claim.figure)}">Figure{heading}</a>'
    # some reasons are sentences already
    if reason := judged.reason.strip(" ."):
        found += f' <span class="soft">{_text(f"{reason[:1].upper()}{reason[1:]}.")}</span>'
    if judged.basis:
        found += f'<p class="soft basis">{_text(judged.basis)}</p>'
    sign = f'<span aria-hidden="true">{SIGNS[judged.verdict]}</span> {judged.verdict}'
    if judged.leans:
        sign += f'<br><span class="soft">{LEANS[judged.leans]}</span>'
    return (
        f'<tr><th scope="row">{_text(claim.text)} <details><summary>Rule</summary><p class="soft">{_text(claim.rule)} '
        f"Source: {_text(claim.source)}.</p></details></th><td>{found}</td>"
        f'<td class="verdict {judged.verdict.split()[0]}">{sign}</td></tr>\n'
    )


def _maturity(canaries: pd.DataFrame) -> str:
    return (
        '<section id="maturity" aria-labelledby="maturity-title"><h2 id="maturity-title">Maturity</h2>\n'
        "<p>Young models are ranked by how soon a method becomes local, and gaps close later. In grown ones a sliding "
        f"window is behind RoPE, and NoPE is at most {maturity.BEHIND:g} nats behind it. Differences are in nats per "
        "token at the training length, with 95 % intervals over seeds, or over documents where there is one seed.</p>\n"
        f"{_table(canaries, 'Whether models are old enough to rank methods')}</section>\n"
    )


def _text(text: str) -> str:
    """Escape text; a number and its per cent sign stay on one line."""
    return escape(text).replace(" %", "&nbsp;%")


def figure(chart: Chart) -> str:
    """Return the page of one figure as HTML; InputError where plotly is not installed."""
    drawn, numbers = _drawn(chart)
    body = (
        f'<main><h1 id="figure-title">{escape(chart.heading)}</h1>\n<p>{escape(chart.sentence)}</p>\n'
        f'<figure aria-labelledby="figure-title"><div class="groups">{drawn}</div>\n'
        f"<figcaption>{escape(chart.note)}</figcaption></figure>\n"
        f"<details><summary>Numbers of this figure</summary>{numbers}</details></main>"
    )
    return page.document(chart.heading, body)


def _drawn(chart: Chart) -> tuple[str, str]:
    """Return the panels of a figure, and its numbers in tables."""
    groups = [group for group in chart.groups if group.panels]
    return "".join(_group(group, alone=len(groups) == 1) for group in groups), _numbers(chart.heading, groups)


def _figure(name: str, chart: Chart, runs: Runs) -> str:
    drawn, numbers = _drawn(chart)
    here, table = _id("figure", name), registry.figure(name).TABLE
    return (
        f'<section id="{here}" aria-labelledby="{here}-title"><h2 id="{here}-title">{escape(chart.heading)}</h2>\n'
        f'<p>{escape(chart.sentence)}</p>\n<figure aria-labelledby="{here}-title"><div class="groups">{drawn}</div>\n'
        f"<figcaption>{escape(chart.note)}{_made_by(runs)}</figcaption></figure>\n"
        f"<details><summary>Numbers of this figure</summary>{numbers}</details>\n"
        f'<p class="soft">{escape(runs.origin())}. <a href="#{_id("runs", table)}">Its runs in {table}.csv</a></p>\n'
        "</section>\n"
    )


def _made_by(runs: Runs) -> str:
    """Name one or two commands that make a figure's rows; of more, that of most rows and how many others there are."""
    if not runs.again:
        return ""
    first, *others = (f"<code>{escape(command)}</code>" for command in runs.again)
    rest = others if len(others) < 2 else [f'<a href="#again">{len(others)} more</a>']
    return f" Made by {' and '.join([first, *rest])}."


def _group(group: Group, *, alone: bool) -> str:
    looks = {look.label: look for panel in group.panels for look in panel.looks()}
    kinds = ["group"] + ["single"] * (len(group.panels) == 1 and not alone) + ["many"] * (len(group.panels) > FEW)
    title = f"<h3>{escape(group.title)}</h3>" if group.title else ""
    entries = "".join(_entry(look) for look in looks.values())
    shown = f'<ul class="legend" aria-label="Shown methods">{entries}</ul>' if entries else ""
    panels = "".join(map(_panel, group.panels))
    return f'<div class="{" ".join(kinds)}">{title}{shown}<div class="panels">{panels}</div></div>\n'


def _entry(look: legend.Look) -> str:
    name = escape(look.label)
    return (
        f'<li><button type="button" aria-pressed="true" data-name="{name}">'
        f'<span aria-hidden="true" style="color:{readable(look)}">{SYMBOLS[look.marker][1]}</span> {name}</button></li>'
    )


def _panel(panel: Panel) -> str:
    title = f"<h4>{escape(panel.title)}</h4>" if panel.title else ""
    return f'<div class="panel">{title}{page.plot(panel.plotly(), panel.words(), panel.css)}</div>'


def _numbers(heading: str, groups: list[Group]) -> str:
    """Return a table for each panel."""
    tables = []
    for group in groups:
        for panel in group.panels:
            rows = panel.rows()
            names = [name for name in (heading, group.title, panel.title) if name]
            tables.append(_table(rows, ", ".join(names)))
    return "".join(tables)


def _table(rows: pd.DataFrame, caption: str, name: str = "") -> str:
    """Return a table, its first column the header of each row; a long one scrolls."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in rows.columns)
    body = "".join(f"<tr>{''.join(_cells(row))}</tr>\n" for row in rows.itertuples(index=False, name=None))
    caption = escape(caption)
    return (
        f'<div class="scroll"{f" id={name}" if name else ""} tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _cells(row: tuple[object, ...]) -> Iterator[str]:
    yield f'<th scope="row">{escape(plain(row[0]))}</th>'
    for value in row[1:]:
        yield f"<td>{escape(value)}</td>" if isinstance(value, str) else f'<td class="number">{plain(value)}</td>'


def _all_runs(runs: dict[str, Runs]) -> str:
    # a link into a closed `details` opens it
    tables = "".join(
        f"<details><summary>{name}.csv: {len(each.cells)} runs</summary>"
        f"{_table(each.cells, f'Runs of {name}.csv', _id('runs', name))}</details>\n"
        for name, each in runs.items()
    )
    return (
        '<section id="runs" aria-labelledby="runs-title"><h2 id="runs-title">Runs</h2>\n<p>The column '
        "<code>cell</code> of a table names the run of a row. Its whole configuration, command line, loss curve and "
        f"speed are in <code>runs/&lt;cell&gt;.json</code> beside the table.</p>\n{tables}</section>\n"
    )


def _again(runs: dict[str, Runs]) -> str:
    commands = dict.fromkeys(command for each in runs.values() for command in each.again)
    lines = "\n".join([INSTALL, *commands, "sbeval report"])
    return (
        '<section id="again" aria-labelledby="again-title"><h2 id="again-title">Run it again</h2>\n<p>In a checkout of '
        "the project, at the commit of a run for the same code. A finished run is skipped unless "
        f"<code>--force</code> is given.</p>\n<pre>{escape(lines)}</pre></section>\n"
    )


def _id(*parts: str) -> str:
    return "-".join(parts).replace("_", "-")
