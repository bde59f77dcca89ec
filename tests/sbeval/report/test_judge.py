"""Verdicts: what is left out, what is missing, and the correction for several methods."""

import math
from collections.abc import Callable

import pandas as pd
import pytest

from sbeval.report import language
from sbeval.report.claims import CLAIMS, OWN
from sbeval.report.judge import (
    AGREES,
    DISAGREES,
    UNDECIDED,
    Claim,
    Evidence,
    Judged,
    against,
    basis_of,
    findings,
    verdict,
)
from sbeval.tables.rows import Method
from sbeval.tables.statistics import Interval

Tables = Callable[..., pd.DataFrame]
# stick-breaking is as good as RoPE within the training length
WITHIN = CLAIMS[1]
GOOD = {"stick_breaking": {2048: [13.4, 13.41]}, "rope": {2048: [13.8, 13.81]}}
BAD = {"stick_breaking": {2048: [15.4, 15.41]}, "rope": {2048: [13.8, 13.81]}}


def test_without_the_rows_nothing_is_decided(perplexities: Tables) -> None:
    empty = findings(CLAIMS, Evidence({}))
    assert [each.judged.verdict for each in empty] == len(CLAIMS) * [UNDECIDED]
    assert empty[0].judged == Judged(UNDECIDED, reason="not measured here; sbeval length-gen does", measured=False)
    table = perplexities(GOOD)
    (found,) = findings([WITHIN], Evidence({"length_gen": table[table["attention"] == "rope"]}))
    assert found.judged.verdict == UNDECIDED and "no setting has rows of both" in found.judged.reason


def test_no_claim_is_judged_by_a_model_that_overfits(perplexities: Tables) -> None:
    def judged(*tables: pd.DataFrame) -> Judged:
        table = pd.concat(tables).reset_index(drop=True)
        return findings([WITHIN], Evidence({"length_gen": table}))[0].judged

    good = perplexities(GOOD, status="")
    # larger, and so nearer to the paper's
    memorised = perplexities(BAD, model="3b", params=3 * 10**9, train_tokens=10**11, status="overfit", canaries=False)
    found = judged(good, memorised)
    assert found.verdict == AGREES and "stick-breaking 13.4" in found.found
    assert found.reason == "left out, as they overfit: models of rope, stick_breaking"
    assert judged(good) == language.within(good, Evidence({"length_gen": good}))
    alone = judged(memorised)
    assert alone.verdict == UNDECIDED and "left out, as they overfit" in alone.reason
    # of one method alone: nothing is left to compare
    one = judged(good.assign(status=["overfit" if name == "rope" else "" for name in good["attention"]]))
    assert one.verdict == UNDECIDED and "no setting has rows of both" in one.reason and one.reason.endswith("of rope")


def test_plain_stick_breaking_may_have_no_remainder(perplexities: Tables) -> None:
    def judged(**options: str) -> Judged:
        table = perplexities(GOOD | {"forgetting": BAD["stick_breaking"]})
        names = {"stick_breaking": options["good"], "forgetting": options["bad"], "rope": ""}
        table = table.assign(
            options=table["attention"].map(names), attention=table["attention"].replace("forgetting", "stick_breaking")
        )
        return findings([WITHIN], Evidence({"length_gen": table}))[0].judged

    assert "stick-breaking 13.4" in judged(good="remainder=none", bad="logit_bias=spread").found
    assert "stick-breaking 15.4" in judged(good="remainder=none", bad="").found
    neither = judged(good="remainder=none,logit_bias=spread", bad="logit_bias=spread")
    assert neither.verdict == UNDECIDED and "no setting has rows of both" in neither.reason


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.table in ("length_gen", "needle", "few_shot")])
def test_a_table_of_overfit_models_alone_decides_nothing(claim: Claim, perplexities: Tables) -> None:
    rows = perplexities(BAD, canaries=False, status="overfit", part="", filter="", shots=0, chance=0.5)
    rows = rows.assign(depth_start=math.nan, length=4096, finetune_tokens=0)
    (found,) = findings([claim], Evidence({claim.table: rows}))
    assert found.judged.verdict == UNDECIDED and "overfit: models of rope, stick_breaking" in found.judged.reason


def test_p_values_are_corrected_for_all_methods() -> None:
    stick: Method = ("stick_breaking", "")
    # its upper end is just below 0
    differences = {stick: Interval(-1.0, -1.99, -0.01)}
    assert against(differences, 0.0).below is True and against(differences, -3.0).below is False
    others = {("alibi", ""): Interval(-0.1, -1.0, 1.0), ("nope", ""): Interval(3.0, 2.0, 4.0)}
    answer = against(differences | others, 0.0)
    assert answer.below is None and answer.words == "one-sided p = 0.072 after Holm over 3 methods"


def test_verdicts() -> None:
    assert verdict(True, "x", "y") == Judged(AGREES, "x", "y")
    assert verdict(False, "x", "y") == Judged(DISAGREES, "x", "y")
    assert verdict(None, "x", "y").verdict == UNDECIDED
    # too far from the paper's setting to decide, with numbers on one side, and on none
    assert verdict(True, "x", "y", far="too small") == Judged(UNDECIDED, "x", "y", "too small", leans=AGREES)
    assert verdict(False, "x", "y", far="too small").leans == DISAGREES
    assert verdict(None, "x", "y", far="too small") == Judged(UNDECIDED, "x", "y", "too small")


def test_a_basis_is_a_sentence_of_the_parts_that_there_are() -> None:
    assert basis_of("difference: 2 seeds", "", "p = 0.1") == "Difference: 2 seeds; p = 0.1."
    assert basis_of("", "") == ""


def test_the_kernel_is_no_claim_of_the_paper() -> None:
    assert {claim.table for claim in OWN} == {"kernel", "length_gen"}
    assert not {claim.table for claim in CLAIMS} & {"kernel"}
    assert all(claim.decides and not claim.decides.endswith(".") for claim in (*CLAIMS, *OWN))
