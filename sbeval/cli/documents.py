"""Numbers in README and docs/results.md: blocks that are written from the tables, so that they are what was measured.

python -m sbeval.cli.documents          in a checkout, writes the blocks and README's figures anew

<!-- numbers: typed -->                 a block: everything between its marks is written
<!-- end of numbers -->
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from sbeval.cli import documents_studies
from sbeval.cli.documents_studies import CONTEXT
from sbeval.errors import InputError, choose
from sbeval.report import far_text
from sbeval.report.claims import CLAIMS, OWN
from sbeval.report.judge import AGREES, DISAGREES, UNDECIDED, Claim, Evidence, Judged, findings
from sbeval.tables import intervals, markup, pairs, statistics, values
from sbeval.tables.pairs import Stored
from sbeval.tables.published import PAPER
from sbeval.tables.results import Results
from sbeval.tables.rows import ROPE, STICK, Method
from sbeval.tables.run_files import gather
from sbeval.tables.statistics import Interval
from sbeval.tables.table import read

PAGES = ("README.md", "docs/results.md")
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end of numbers -->)", re.DOTALL)

# results folders that can decide a claim: the first that does, else the first that has numbers for it
DECIDING = ("125m", "tokens", "retrieval", "mqrar-author", "", "quick", "which-stick-breaking")
LEANS = {AGREES: ", leaning towards it", DISAGREES: ", leaning against it"}
# families whose figures docs/results.md shows
DRAWN = ("attention_map", "kernel", "length_gen", "mqrar", "skipping")
# results folder, columns and rows of each table: (label, folder, method)
TYPED = {"one H200": "typed", "two CPU cores": "typed-cpu"}
FORMS = {
    "no remainder": "remainder=none",
    "remainder to its own value": "",
    "remainder to a learned vector": "remainder=bias",
    "the same, norm of heads": "remainder=bias,head_norm=true",
    "biases of q, k and v": "remainder=none,qkv_bias=true",
    "initial deviation of 0.02": "remainder=none,init_std=0.02",
    "logit offset of -1.5": "remainder=none,logit_bias=-1.5",
    "logit offset of -3": "remainder=none,logit_bias=-3.0",
    "logit offsets spread over heads": "remainder=none,logit_bias=spread",
}
FIXED = {
    "RoPE": ROPE,
    "window of 512": ("sliding_window", ""),
    **{f"stick-breaking, {form}": (STICK[0], options) for form, options in FORMS.items()},
}
# the best of these forms
BEST = FIXED["stick-breaking, logit offsets spread over heads"]
# those of README's sentence
FIRST = ("RoPE", "window of 512", "stick-breaking, no remainder", "stick-breaking, logit offsets spread over heads")
BOOKS = {
    "forgetting": ("forgetting", ""),
    "ALiBi": ("alibi", ""),
    "sliding window of 512": ("sliding_window", ""),
    "sliding window of 1024": ("sliding_window", "window=1024"),
    "sliding window of 256": ("sliding_window", "window=256"),
    "stick-breaking with a logit offset of -3": ("stick_breaking", "logit_bias=-3.0"),
    "stick-breaking": STICK,
    "FIRE": ("fire", ""),
    "RoPE, dynamic NTK, f = 8": ("rope", "scaling=dynamic_ntk,factor=8.0,train_len=2048"),
    "RoPE, NTK, f = 16": ("rope", "scaling=ntk,factor=16.0"),
    "RoPE, Llama 3, f = 8": ("rope", "scaling=llama3,factor=8.0,train_len=2048"),
    "RoPE, YaRN, f = 8": ("rope", "scaling=yarn,factor=8.0,train_len=2048"),
    "RoPE, linear, f = 8": ("rope", "scaling=linear,factor=8.0"),
    "RoPE": ROPE,
    "NoPE": ("nope", ""),
}


def written(text: str, results: Path) -> str:
    """Return the text of a page with its blocks as the tables below the folder `results` have them."""
    if text.count("<!-- numbers:") != len(BLOCK.findall(text)):
        raise InputError("a block of numbers has no end: <!-- end of numbers --> is missing")

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{BLOCKS[choose('block of numbers', match[2], BLOCKS)](results)}\n{match[3]}"

    return BLOCK.sub(block, text)


def _books(results: Path) -> str:
    lengths = (512, 2048, 4096, 16384, 65536)
    found = _perplexities(results)
    rows = [[label, *(_three(found[(*method, length)]) for length in lengths)] for label, method in BOOKS.items()]
    return markup.table([CONTEXT, *map(str, lengths)], rows)


def _typed(results: Path) -> str:
    lengths = (512, 2048, 4096, 8192, 16384)
    rows = [
        [f"{name}, {where}", *(_three(_perplexities(results / folder)[(*method, length)]) for length in lengths)]
        for where, folder in TYPED.items()
        for name, method in (("stick-breaking", STICK), ("RoPE", ROPE))
    ]
    return markup.table([CONTEXT, *map(str, lengths)], rows)


def _typed_sentence(results: Path) -> str:
    parts = []
    for where, folder in TYPED.items():
        found = _perplexities(results / folder)
        each = [
            f"{name} {_three(found[(*method, 2048)])} and {_three(found[(*method, 16384)])}"
            for name, method in (("RoPE", ROPE), ("stick-breaking", STICK))
        ]
        parts.append(f"on {where} {', '.join(each)}")
    return f"Perplexity at 2048 and 16384 tokens of context: {'; '.join(parts)}."


def _fixed(results: Path) -> str:
    lengths = (512, 2048, 8192, 65536)
    rows = _fixed_rows(results)
    found = _means(rows)
    at = rows[rows["context_length"] == 2048]
    stored = Stored(functools.partial(values.read, Results(results / "which-stick-breaking")))
    gaps = _less(at, ROPE, stored)
    behind = _less(at, BEST, stored)
    forms = [method for method in behind if method[0] == STICK[0]]
    p_values = dict(zip(forms, statistics.holm([behind[method].apart(0.0) for method in forms]), strict=True))
    lines = []
    for label, method in FIXED.items():
        seeds = intervals.method(at, method)["seed"].nunique()
        gap = gaps[method].text("{:+.3f}".format) if method in gaps else ""
        loss = f"{behind[method].mean:+.3f}".replace("-", "−") if method in behind else ""
        sure = f" (p {statistics.p_words(p_values[method])})" if method in p_values else ""
        means = (f"{found[(*method, length)]:.3f}" for length in lengths)
        lines.append([label, str(seeds), *means, gap, loss + sure])
    headings = ["nats per token, context =", "seeds", *map(str, lengths)]
    headings += ["minus RoPE at 2048", "minus spread offsets at 2048"]
    return markup.table(headings, lines)


def _less(rows: pd.DataFrame, other: Method, stored: Stored) -> dict[Method, Interval]:
    joint = pairs.of_methods(rows, other, stored, ["context_length"])
    return intervals.differences(intervals.samples(rows), other, pairs=joint)


def _distant_sentence(results: Path) -> str:
    rows = documents_studies.distant_text(results)
    found = _means(rows[rows["metric"] == far_text.METRIC])
    each = [f"{label} {found[(*FIXED[label], 2048)]:.3f} and {found[(*FIXED[label], 16384)]:.3f}" for label in FIRST]
    return f"Nats per token with 2048 and 16384 tokens of context: {'; '.join(each)}."


def _claims(results: Path, claims: tuple[Claim, ...]) -> str:
    """Write the table of claims in short: what is claimed, what the tables show, and whether that decides it."""
    headings = (_asked(claims), "These runs", "Decided")
    rows = []
    for claim, judged, folder in _judged(results, claims):
        # README names the paper at its top
        where = claim.source.removeprefix(f"{PAPER}, ")
        of_paper = f" ({where})" if where != claim.source else ""
        link = f" ([{folder}](results/{folder}))" if folder and judged.found else ""
        rows.append([f"{claim.text}{of_paper}", f"{_shown(claim, judged)}{link}", _verdict(judged)])
    return markup.table(headings, rows)


def _claims_in_full(results: Path, claims: tuple[Claim, ...]) -> str:
    """Write the table of claims with their sources, what the numbers are of, and what would decide an open one."""
    headings = (_asked(claims), "These runs", "What the numbers are of", "Decided", "What would decide")
    rows = []
    for claim, judged, folder in _judged(results, claims):
        link = f" ([results/{folder}](../results/{folder}))" if folder and judged.found else ""
        decides = f"{claim.decides[:1].upper()}{claim.decides[1:]}" if judged.verdict == UNDECIDED else ""
        text = f"{claim.text} ({claim.source})"
        rows.append([text, f"{_shown(claim, judged)}{link}", judged.basis, _verdict(judged), decides])
    return markup.table(headings, rows)


def _asked(claims: tuple[Claim, ...]) -> str:
    return "The paper" if claims is CLAIMS else "Asked"


def _shown(claim: Claim, judged: Judged) -> str:
    return judged.found or f"Not measured: `{claim.command}`."


def _verdict(judged: Judged) -> str:
    return f"**{judged.verdict}**{LEANS.get(judged.leans, '')}"


@functools.cache
def _judged(results: Path, claims: tuple[Claim, ...]) -> list[tuple[Claim, Judged, str]]:
    """Return each claim with the judgement that decides it, and the folder of its tables."""
    by_folder = [findings(claims, _evidence(Results(results / folder), claims)) for folder in DECIDING]
    return [
        (claim, *_deciding([finding.judged for finding in found]))
        for claim, *found in zip(claims, *by_folder, strict=True)
    ]


def _evidence(results: Results, claims: tuple[Claim, ...]) -> Evidence:
    # length_gen has the canaries of other tables' models
    paths = {name: results.table(name) for name in ("length_gen", *(claim.table for claim in claims))}
    tables = {name: read(path) for name, path in paths.items() if path.exists()}
    return Evidence(tables, functools.partial(values.read, results))


def _deciding(judged: Sequence[Judged]) -> tuple[Judged, str]:
    """Return the judgement that decides, of one of each folder, and the folder."""
    found = list(zip(judged, DECIDING, strict=True))
    decided = [one for one in found if one[0].verdict != UNDECIDED]
    # a table of other models has its rows and says nothing
    shown = [one for one in found if one[0].found]
    return (decided or shown or found)[0]


def _made_by(results: Path, family: str) -> str:
    """Name one or two commands of a figure's rows; of more, that of most rows and how many others there are."""
    table = read(Results(results).table(family), ["cell"])
    first, *others = gather(table, Results(results).runs).again
    if len(others) < 2:
        return f"Made by {' and '.join(f'`{command}`' for command in (first, *others))}."
    return f"Made by `{first}`. Some rows are of {len(others)} other commands, listed by `sbeval report`."


def _fixed_rows(results: Path) -> pd.DataFrame:
    table = read(Results(results / "which-stick-breaking").table("length_gen"), ["metric"])
    return table[table["metric"] == far_text.METRIC]


def _perplexities(results: Path) -> Mapping[tuple[str, str, int], float]:
    """Return perplexities over the first tokens of documents, means of logarithms over seeds."""
    table = read(Results(results).table("length_gen"), ["metric"])
    # an empty column is read as text
    whole = table["window"].isna() | (table["window"] == "")
    rows = table[(table["metric"] == "perplexity") & (table["train_len"] == 2048) & whole]
    logs = _means(rows.assign(value=rows["value"].map(math.log)))
    return {key: math.exp(value) for key, value in logs.items()}


def _means(rows: pd.DataFrame) -> Mapping[tuple[str, str, int], float]:
    """Return the mean of `value` over seeds by attention, options and context."""
    means = rows.groupby(["attention", "options", "context_length"])["value"].mean().reset_index()
    columns = (means[name].tolist() for name in ("attention", "options", "context_length", "value"))
    return {(name, options, int(length)): value for name, options, length, value in zip(*columns, strict=True)}


def _three(value: float) -> str:
    """Format a number with three digits, or all before the point."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "books": _books,
    "claims": functools.partial(_claims, claims=CLAIMS),
    "own": functools.partial(_claims, claims=OWN),
    "claims_in_full": functools.partial(_claims_in_full, claims=CLAIMS),
    "own_in_full": functools.partial(_claims_in_full, claims=OWN),
    "typed": _typed,
    "typed_sentence": _typed_sentence,
    "fixed_targets": _fixed,
    "distant_sentence": _distant_sentence,
    "needle_means": documents_studies.needle_means,
    **documents_studies.BLOCKS,
    **{f"{family}_command": functools.partial(_made_by, family=family) for family in DRAWN},
}

if __name__ == "__main__":
    from sbeval.cli import documents_figures

    documents_figures.draw(Path("results"), Path("docs") / "figures")
    for name in PAGES:
        page = Path(name)
        page.write_text(written(page.read_text(encoding="utf-8"), Path("results")), encoding="utf-8")
