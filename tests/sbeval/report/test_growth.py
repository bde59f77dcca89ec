"""Whether a method passes RoPE is answered by made-up tables as the rule says."""

import math
import re
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.report import growth
from sbeval.report.claims import OWN
from sbeval.report.judge import NO, UNDECIDED, YES, Evidence, findings
from sbeval.tables.rows import STICK, Method

TOKENS = np.array([60e6, 120e6, 240e6, 480e6, 600e6])
COMMON: dict[str, Any] = {
    "task": "books", "model": "25m", "corpus": "books", "tokenizer": "bpe:8192", "preset": "figure5", "dtype": "x",
    "train_len": 2048, "eval_len": 16384, "context_length": 2048, "metric": "perplexity", "lr": 2e-3,
}  # fmt: skip


def table(
    limit: float, seeds: int = 3, noise: float = 0.001, method: Method = STICK, more: float = 0.1
) -> pd.DataFrame:
    """Losses of RoPE, and of a method with a gap of `more` than its limit at first, which closes as 1 / tokens."""
    generator = np.random.default_rng(0)
    gap = limit + more * TOKENS[0] / TOKENS
    rows = []
    for (name, options), less in ((("rope", ""), 0.0), (method, gap)):
        for seed in range(seeds):
            losses = 3 + (TOKENS / 1e8) ** -0.2 + less + noise * generator.standard_normal(len(TOKENS))
            of = COMMON | {"attention": name, "options": options, "seed": seed, "status": ""}
            rows += [
                of | {"train_tokens": int(count), "value": math.exp(loss)}
                for count, loss in zip(TOKENS, losses, strict=True)
            ]
    return pd.DataFrame(rows)


def passes(rows: pd.DataFrame, method: Method = STICK) -> Any:
    return growth.passes(method, rows, Evidence({"length_gen": rows}))


def test_a_gap_that_falls_below_0_is_passed_and_where_is_said() -> None:
    found = passes(table(-0.04))
    # 60 M * 0.1 / 0.04
    assert found.verdict == YES and "95 % over 3 seeds" in found.basis and "seed" not in found.found
    assert re.search(r"where the fit is 0: 1[45]\d M \[1[345]\d M, 1[567]\d M\]", found.found)
    assert "+0.06" in found.found and "after 60 M tokens" in found.found and "after 600 M" in found.found
    # not yet below 0, and the fit is soon: at 667 M
    found = passes(table(-0.009))
    assert found.verdict == YES and "+0.00" in found.found.split(";")[0].split("tokens, ")[1]


def test_a_limit_that_the_tokens_do_not_tell_is_not_said() -> None:
    assert "; limit of the fit −0.0" in passes(table(-0.04)).basis
    # a gap that closes at once
    rows = table(-0.03, more=0.0)
    first = (rows["attention"] == STICK[0]) & (rows["train_tokens"] == TOKENS[0])
    found = passes(rows.assign(value=rows["value"].where(~first, 1.05 * rows["value"])))
    assert "; the tokens do not tell the limit; " in found.basis and found.verdict == YES


def test_seeds_that_stopped_early_are_said() -> None:
    rows = table(-0.04)
    found = passes(rows[(rows["seed"] == 0) | (rows["train_tokens"] < 5e8)])
    assert found.verdict == YES and ": 95 % over 3 and 3 seeds to 480 M, 1 and 1 to 600 M; " in found.basis
    # the gap is that at the most tokens at which both have two
    assert "after 480 M" in found.found and "after 600 M" not in found.found


def test_one_seed_of_rope_decides_nothing() -> None:
    rows = table(-0.04)
    found = passes(rows[(rows["seed"] == 0) | (rows["attention"] != "rope")])
    assert (found.verdict, found.reason) == (UNDECIDED, "one seed of this method or of RoPE")
    assert "+0.06" in found.found and "after 600 M" in found.found


def test_a_gap_that_stays_is_not() -> None:
    found = passes(table(0.04))
    assert found.verdict == NO and "where the fit is 0: nowhere, behind throughout" in found.found


def test_a_method_that_falls_behind_does_not_pass() -> None:
    found = passes(table(0.04, more=-0.1))
    # the fit is 0 at 150 M, from below
    assert found.verdict == NO and re.search(r"where the fit is 0: 1[45]\d M", found.found)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (table(0.0, noise=0.01), "the intervals include both"),
        # at 4 G tokens: the fit does not reach so far
        (table(-0.0015, noise=0.0001), "the intervals include both"),
        (table(-0.04, seeds=1), "one seed of every method has no interval"),
    ],
)
def test_what_is_left_open(rows: pd.DataFrame, reason: str) -> None:
    found = passes(rows)
    assert (found.verdict, found.reason, found.measured) == (UNDECIDED, reason, True)


def test_few_token_counts_have_no_fit() -> None:
    """A gap below 0 is one at any count; that it stays above 0 only a fit can say."""
    ahead, behind = (rows[rows["train_tokens"] < 3e8] for rows in (table(-0.06, more=0.01), table(0.04)))
    found = passes(ahead)
    assert found.verdict == YES and found.found.endswith("after 240 M.")
    assert "; too few counts of tokens for a fit; " in found.basis
    assert (passes(behind).verdict, passes(behind).reason) == (UNDECIDED, "too few counts of tokens for a fit")


def test_one_token_count_measures_nothing() -> None:
    rows = table(-0.04)
    found = passes(rows[rows["train_tokens"] == 600e6])
    assert (found.verdict, found.found, found.measured) == (UNDECIDED, "", False)


def test_the_form_with_offsets_is_asked_of_on_its_own() -> None:
    questions = [claim for claim in OWN if claim.figure == "tokens"]
    rows = pd.concat([table(0.04, method=(STICK[0], "remainder=none")), table(-0.04, method=growth.SPREAD)])
    plain, spread = findings(questions, Evidence({"length_gen": rows}))
    assert (plain.judged.verdict, spread.judged.verdict) == (NO, YES)
    assert isinstance(questions[1].judge, partial) and "spread over heads" in questions[1].text
