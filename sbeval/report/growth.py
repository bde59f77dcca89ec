"""The rule of a question on training tokens: whether a method passes RoPE, and where.

It is judged by the gap after the most tokens at which both have two seeds. The interval alone is not enough: where
RoPE has one, it is made with how much the seeds of other methods differ.
"""

import math

import pandas as pd

from sbeval.report.judge import NO, UNDECIDED, WITHOUT_REMAINDER, YES, Evidence, Judged, basis_of
from sbeval.tables import tokens
from sbeval.tables.rows import STICK, Method
from sbeval.tables.statistics import size

# a fit is trusted up to so many times the most tokens
FURTHER = 4
TOO_FEW = "too few counts of tokens for a fit"
# with logit offsets spread over heads
SPREAD = (STICK[0], f"{WITHOUT_REMAINDER},logit_bias=spread")


def passes(method: Method, table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether the gap of a method to RoPE falls below 0 as training tokens grow."""
    ladders = [ladder for ladder in tokens.ladders(table) if ladder.method == method]
    if not ladders:
        reason = "no setting has both this method and RoPE at two or more counts of training tokens"
        return Judged(UNDECIDED, reason=reason, measured=False)
    ladder = max(ladders, key=lambda each: (each.law is not None, each.tokens[-1]))
    law = ladder.law
    replicated = [index for index, pair in enumerate(ladder.seeds) if min(pair) > 1]
    most = replicated[-1] if replicated else -1
    last = ladder.gaps[most]
    counts = {count for pair in ladder.seeds for count in pair}
    seeds = ladder.over(" seeds", size) if len(counts) > 1 else f"{min(counts)} seed{'s' * (counts != {1})}"
    where = f"; training tokens where the fit is 0: {law.crosses(size)}" if law else ""
    found = (
        f"Loss minus RoPE's: {ladder.gaps[0].text()} nats/token after {size(ladder.tokens[0])} tokens, {last.text()} "
        f"after {size(ladder.tokens[most])}{where}."
    )
    basis = basis_of(
        f"this method and RoPE: {'95 % over ' * (not math.isnan(last.low))}{seeds}", _limit(law), ladder.setting
    )
    if math.isnan(last.low):
        return Judged(UNDECIDED, found, basis, "one seed of every method has no interval")
    if not replicated:
        return Judged(UNDECIDED, found, basis, "one seed of this method or of RoPE")
    # with a limit above 0 the fit is 0 where a method that was ahead falls behind
    soon = law is not None and law.limit.value < 0 and law.crossing.high <= FURTHER * ladder.tokens[-1]
    if last.high < 0 or soon:
        return Judged(YES, found, basis)
    if law is not None and last.low > 0 and law.limit.low > 0:
        return Judged(NO, found, basis)
    return Judged(UNDECIDED, found, basis, "the intervals include both" if law else TOO_FEW)


def _limit(law: tokens.Law | None) -> str:
    if law is None:
        return TOO_FEW
    return f"limit of the fit {law.limit.text()} nats/token" if law.tells_limit else "the tokens do not tell the limit"
