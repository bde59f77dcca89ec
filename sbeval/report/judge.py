"""Judge the paper's claims by result tables: for each claim a function from its rows to a verdict with numbers.

A rule compares plain stick-breaking (with the default remainder, or in a table without it, with none) with plain RoPE
in the same setting: of several, the one nearest the paper's, which is that of grown models (`sbeval.report.maturity`),
then of the largest, then of the most training tokens.
`sbeval.report.claims` states each rule in words. The rules are in `language`, `far_text`, `recall`, `speed` and
`growth`.

A claim agrees or disagrees by a one-sided p value below 2.5 %, where a 95 % interval lies on one side of its bound.
Where other methods were measured in the same setting, p values have Holm's correction for all of them. Where the
setting is too far from the paper's to decide, `Judged.leans` says what these numbers would decide there.

What this project asks is no claim of the paper's: of its own kernel it is answered by `faster` or `slower`, of training
tokens and distant text by `yes` or `no`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd

from sbeval.errors import InputError
from sbeval.report import maturity
from sbeval.tables import epochs, intervals, pooling, statistics
from sbeval.tables.documents import Values, nothing
from sbeval.tables.rows import ROPE, STICK, Method, spec_of
from sbeval.tables.statistics import Interval, size

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "not decided"
# answers to questions of this project's own
FASTER, SLOWER = "faster", "slower"
YES, NO = "yes", "no"
WITHOUT_REMAINDER = "remainder=none"
METHODS = {"stick-breaking": STICK, "RoPE": ROPE}
BILLION = 1e9
# a model this many times smaller than the paper's does not decide a claim about the paper's size
FAR = 4
# one-sided: the two ends of a 95 % interval
ALPHA = 0.025


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, what the results show in words with numbers, and the reason for no verdict or for rows left out.

    basis: what the numbers are of, as sentences: seeds and units of each interval, p values, models, runs.
    leans: of a claim that these models cannot decide, the verdict if they could; empty where that is open as well.
    measured: whether there is a table that could decide it.
    """

    verdict: str
    found: str = ""
    basis: str = ""
    reason: str = ""
    leans: str = ""
    measured: bool = True


@dataclass(frozen=True, slots=True)
class Evidence:
    """Result tables by name, and the values of each document behind the rows of cells."""

    tables: Mapping[str, pd.DataFrame]
    values: Values = field(default=nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim of the paper, or a question of this project, its source, and the rule by which `judge` decides it.

    table, command, figure: where its rows come from, and what shows them. decides: what a run that decides it has.
    """

    text: str
    source: str
    rule: str
    decides: str
    table: str
    command: str
    figure: str
    judge: Callable[[pd.DataFrame, Evidence], Judged]


@dataclass(frozen=True, slots=True)
class Finding:
    claim: Claim
    judged: Judged


def findings(claims: Iterable[Claim], evidence: Evidence) -> list[Finding]:
    """Judge each claim by its table."""
    return [Finding(claim, _judge(claim, evidence)) for claim in claims]


def _judge(claim: Claim, evidence: Evidence) -> Judged:
    if claim.table not in evidence.tables:
        return Judged(UNDECIDED, reason=f"not measured here; {claim.command} does", measured=False)
    table, left_out = _without_overfit(_plain(evidence.tables[claim.table]))
    try:
        judged = claim.judge(table, evidence)
    except InputError as error:
        judged = Judged(UNDECIDED, reason=str(error))
    reason = "; ".join(filter(None, [judged.reason, left_out]))
    return dataclasses.replace(judged, reason=reason)


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose plain stick-breaking is the one without a remainder, where it has no other.

    Which of the two the paper's models have is not known; forms with other options are not the paper's.
    """
    if (table["options"][table["attention"] == STICK[0]] == STICK[1]).any():
        return table
    without = (table["attention"] == STICK[0]) & (table["options"] == WITHOUT_REMAINDER)
    return table.assign(options=table["options"].mask(without, STICK[1]))


def _without_overfit(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows of models that do not overfit, and a sentence that names the methods of the others."""
    overfit = epochs.overfit(table)
    methods = sorted({spec_of(*pair) for pair in table.loc[overfit, ["attention", "options"]].to_numpy()})
    return table[~overfit], f"left out, as they overfit: models of {', '.join(methods)}" if methods else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a difference is below a bound (None: not decided), and the correction of its p value, in words."""

    below: bool | None
    words: str


def against(differences: Mapping[Method, Interval], bound: float) -> Answer:
    """Return whether stick-breaking's difference is below a bound, corrected for all methods with a difference."""
    at = list(differences).index(STICK)
    below = statistics.holm([each.below(bound) for each in differences.values()])[at]
    above = statistics.holm([each.above(bound) for each in differences.values()])[at]
    answer = True if below < ALPHA else False if above < ALPHA else None
    over = f" after Holm over {len(differences)} methods" if len(differences) > 1 else ""
    p = min(below, above)
    return Answer(answer, f"one-sided p {statistics.p_words(p)}{over}")


def verdict(answer: bool | None, found: str, basis: str, *, far: str = "") -> Judged:
    """Turn the answer to a claim into a verdict; `far` says why the setting cannot decide the claim."""
    if answer is None:
        return Judged(UNDECIDED, found, basis, far or "the interval, with its correction, includes both")
    decided = AGREES if answer else DISAGREES
    return Judged(UNDECIDED, found, basis, far, leans=decided) if far else Judged(decided, found, basis)


def basis_of(*parts: str) -> str:
    """Return the basis of a finding as one sentence of these parts; empty ones are left out."""
    text = "; ".join(filter(None, parts))
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def nearest(rows: pd.DataFrame, by: Iterable[str]) -> pd.DataFrame:
    """Return the rows of all methods in the setting nearest the paper's that has METHODS.

    Raise InputError where no setting has them.
    """
    parts = [part for _, part in rows.groupby(list(by), dropna=False) if {STICK, ROPE} <= {*intervals.methods(part)}]
    if not parts:
        raise InputError(f"no setting has rows of both {' and '.join(METHODS)}")

    def rank(part: pd.DataFrame) -> tuple[bool, float, float]:
        plain = part[part["attention"] == ROPE[0]]
        return not maturity.short(plain), plain["params"].max(), plain["train_tokens"].max()

    return max(parts, key=rank)


def trained(differences: Mapping[Method, Interval]) -> dict[Method, Interval]:
    """Return the differences of methods that were trained, not only evaluated in another way."""
    return {of: each for of, each in differences.items() if pooling.SAME_WEIGHTS not in of[1]}


def too_small(rows: pd.DataFrame, params: float) -> str:
    """Return why models of these rows are no evidence for a claim about `params` parameters; empty when they are."""
    mine = float(rows["params"].max())
    return "" if mine * FAR >= params else f"models of {size(mine)} parameters, the paper's have {size(params)}"


def young(rows: pd.DataFrame, evidence: Evidence) -> str:
    """Return why the models of these rows are too young to rank; empty when they are not."""
    return maturity.fault(rows, evidence.tables.get("length_gen"))


def models(rows: pd.DataFrame) -> str:
    tokens, params = rows["train_tokens"].max(), rows["params"].max()
    seen = f"{size(tokens)} training tokens, {tokens / max(params, 1):.1f} a parameter"
    return f"models of {size(params)} parameters, {seen}"
