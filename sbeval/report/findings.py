"""What the paper claims beside what result tables show, each claim with the rule that decides it.

A rule speaks of plain stick-breaking and plain RoPE in the same setting. Of several settings it takes the one nearest
the paper's: the largest model, then the most training tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from sbeval.errors import InputError
from sbeval.tables import epochs

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "not decided"
METHODS = {"stick-breaking": ("stick_breaking", ""), "RoPE": ("rope", "")}
# a model this many times smaller than the paper's does not decide what the paper says of its own size
FAR = 4


@dataclass(frozen=True, slots=True)
class Judged:
    """What results show, in words with numbers, the verdict, and why there is none or what it leaves out."""

    verdict: str
    found: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim, where it is made, the rule by which `judge` decides it, and where its rows come from."""

    text: str
    source: str
    rule: str
    table: str
    command: str
    figure: str
    judge: Callable[[pd.DataFrame], Judged]


@dataclass(frozen=True, slots=True)
class Finding:
    claim: Claim
    judged: Judged


def findings(claims: Iterable[Claim], tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Judge each claim by its table."""
    return [Finding(claim, _judge(claim, tables)) for claim in claims]


def _judge(claim: Claim, tables: Mapping[str, pd.DataFrame]) -> Judged:
    if claim.table not in tables:
        return Judged(UNDECIDED, reason=f"not measured here; {claim.command} does")
    table, left_out = _without_overfit(tables[claim.table])
    try:
        judged = claim.judge(table)
    except InputError as error:
        judged = Judged(UNDECIDED, reason=str(error))
    reason = "; ".join(filter(None, [judged.reason, left_out]))
    return dataclasses.replace(judged, reason=reason)


def _without_overfit(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows that can decide a claim, and which methods have others; no model that overfits decides any."""
    found = epochs.overfit(table)
    methods = sorted({":".join(filter(None, pair)) for pair in table.loc[found, ["attention", "options"]].to_numpy()})
    return table[~found], f"left out, as they overfit: models of {', '.join(methods)}" if methods else ""


def verdict(answer: bool | None, found: str, *, far: str = "") -> Judged:
    """What `answer` means for a claim; `far` says why the setting cannot decide it."""
    if far:
        return Judged(UNDECIDED, found, far)
    if answer is None:
        return Judged(UNDECIDED, found, "the interval includes both")
    return Judged(AGREES if answer else DISAGREES, found)


def nearest(rows: pd.DataFrame, by: Iterable[str]) -> pd.DataFrame:
    """The rows of both methods in the setting nearest the paper's; InputError where no setting has both."""
    plain = rows[rows["attention"].isin([name for name, _ in METHODS.values()]) & (rows["options"] == "")]
    both = [part for _, part in plain.groupby(list(by), dropna=False) if part["attention"].nunique() == 2]
    if not both:
        raise InputError("no setting has rows of both stick-breaking and RoPE")
    return max(both, key=lambda part: (part["params"].max(), part["train_tokens"].max()))


def too_small(rows: pd.DataFrame, params: float) -> str:
    """Why models of these rows are no evidence for a claim about `params` parameters; empty when they are."""
    mine = float(rows["params"].max())
    return "" if mine * FAR >= params else f"models of {size(mine)} parameters, the paper's have {size(params)}"


def size(params: float) -> str:
    return f"{params / 1e9:.3g} B" if params >= 1e9 else f"{params / 1e6:.3g} M"
