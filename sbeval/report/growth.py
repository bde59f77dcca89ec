"""The rule of a question on training tokens: whether a method passes RoPE, and where."""

import math

import pandas as pd

from sbeval.report.judge import NO, UNDECIDED, WITHOUT_REMAINDER, YES, Evidence, Judged
from sbeval.report.maturity import size
from sbeval.tables import tokens
from sbeval.tables.rows import STICK, Method

# a fit is trusted up to so many times the most tokens
FURTHER = 4
# with logit offsets spread over heads
SPREAD = (STICK[0], f"{WITHOUT_REMAINDER},logit_bias=spread")


def passes(method: Method, table: pd.DataFrame, evidence: Evidence) -> Judged:
    """Judge whether the gap of a method to RoPE falls below 0 as training tokens grow."""
    ladders = [ladder for ladder in tokens.ladders(table) if ladder.method == method]
    if not ladders:
        reason = f"no setting has both this method and RoPE at {tokens.FEWEST} or more counts of training tokens"
        return Judged(UNDECIDED, reason=reason, measured=False)
    ladder = max(ladders, key=lambda each: each.tokens[-1])
    last = ladder.gaps[-1]
    counts = {count for pair in ladder.seeds for count in pair}
    seeds = ladder.over(" seeds") if len(counts) > 1 else f"{min(counts)} seed{'s' * (counts != {1})}"
    limit = f"limit {ladder.limit.text()}" if ladder.tells_limit else "the tokens do not tell the limit"
    found = (
        f"Loss less RoPE's: {ladder.gaps[0].text()} nats/token after {size(ladder.tokens[0])} tokens, {last.text()} "
        f"after {size(ladder.tokens[-1])}; {limit}; where the fit is 0: {ladder.crosses(size)} "
        f"({'95 % over ' * (not math.isnan(last.low))}{seeds}; {ladder.setting})."
    )
    if math.isnan(last.low):
        return Judged(UNDECIDED, found, "one seed of every method has no interval")
    # with a limit above 0 the fit is 0 where a method that was ahead falls behind
    soon = ladder.limit.value < 0 and ladder.crossing.high <= FURTHER * ladder.tokens[-1]
    if last.high < 0 or soon:
        return Judged(YES, found)
    if last.low > 0 and ladder.limit.low > 0:
        return Judged(NO, found)
    return Judged(UNDECIDED, found, "the intervals include both")
