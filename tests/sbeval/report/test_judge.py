"""Each claim is decided by made-up tables as its rule says, and left open where the rows do not suffice."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import pytest

from sbeval.errors import InputError
from sbeval.report import judge
from sbeval.report.claims import CLAIMS
from sbeval.report.judge import AGREES, DISAGREES, UNDECIDED, Claim, Judged, findings
from sbeval.tables.published import SOLVED_TOKENS
from sbeval.tasks import mqrar

Row = dict[str, Any]
COMMON: Row = {
    "options": "",
    "seed": 0,
    "stderr": 0.0,
    "n": 100,
    "preset": "paper",
    "corpus": "books",
    "tokenizer": "bpe:8192",
    "dtype": "bfloat16",
    "device": "a card",
    "model": "1b",
    "params": 10**9,
    "train_tokens": 10**10,
    "train_len": 2048,
    "eval_len": 16384,
    "task": "",
}


def frame(rows: Iterable[Row], **common: Any) -> pd.DataFrame:
    return pd.DataFrame([COMMON | common | row for row in rows])


def lengths(stick: Sequence[float], rope: Sequence[float], **common: Any) -> pd.DataFrame:
    """Perplexities at 2048 and 16384 tokens of both methods."""
    values = zip(itertools.product(("stick_breaking", "rope"), (2048, 16384)), (*stick, *rope), strict=True)
    rows = [{"attention": name, "context_length": at, "value": value} for (name, at), value in values]
    return frame(rows, metric="perplexity", **common)


@pytest.mark.parametrize(
    ("stick", "rope", "stderr", "verdict"),
    [
        ((40, 40), (40, 80), 0.1, AGREES),
        ((40, 38), (40, 80), 1.0, AGREES),
        ((40, 44), (40, 80), 0.1, DISAGREES),
        ((40, 40), (40, 40), 0.1, DISAGREES),
        # both could have risen, or neither
        ((40, 40), (40, 44), 2.0, UNDECIDED),
        # stick-breaking may have risen, its mean did
        ((40, 42), (40, 80), 2.0, UNDECIDED),
    ],
)
def test_reading_past_the_training_length(
    stick: Sequence[float], rope: Sequence[float], stderr: float, verdict: str
) -> None:
    assert judge.lengths(lengths(stick, rope, stderr=stderr, params=10**6)).verdict == verdict


def test_the_interval_is_over_seeds_where_there_are_several() -> None:
    tables = [lengths((40, end), (40, 80), seed=seed, stderr=5.0) for seed, end in enumerate((40, 40.4))]
    judged = judge.lengths(pd.concat(tables))
    assert judged.verdict == AGREES and "from 40.0 to 40.2, +0 % [−6 %, +7 %]" in judged.found
    assert "(95 % over 2 seeds; 1 B parameters, 10 B training tokens)" in judged.found


def test_the_nearest_setting_decides() -> None:
    small = lengths((40, 80), (40, 40), model="25m", params=25 * 10**6)
    judged = judge.lengths(pd.concat([small, lengths((20, 20), (20, 40))]))
    assert judged.verdict == AGREES and "from 20.0 to 20.0" in judged.found and "1 B parameters" in judged.found
    # a larger model that was not read so far says nothing of it
    short = lengths((30, 30), (30, 60), model="3b", params=3 * 10**9).query("context_length == 2048")
    assert judge.lengths(pd.concat([small, lengths((20, 20), (20, 40)), short])) == judged


@pytest.mark.parametrize(
    ("stick", "stderr", "params", "verdict", "reason"),
    [
        (13.4, 0.01, 10**9, AGREES, ""),
        (14.9, 0.01, 10**9, DISAGREES, ""),
        (13.9, 0.5, 10**9, UNDECIDED, "the interval includes both"),
        (14.9, 0.01, 25 * 10**6, UNDECIDED, "models of 25 M parameters, the paper's have 1 B"),
        (13.4, 0.01, 250 * 10**6, AGREES, ""),
    ],
)
def test_within_the_training_length(stick: float, stderr: float, params: int, verdict: str, reason: str) -> None:
    judged = judge.within(lengths((stick, 99), (13.8, 99), stderr=stderr, params=params))
    assert (judged.verdict, judged.reason) == (verdict, reason)
    assert f"stick-breaking {stick:.1f}, RoPE 13.8" in judged.found


def recall(solved: dict[tuple[str, int], float], **common: Any) -> pd.DataFrame:
    # as `sbeval mqrar` writes them
    specs = {name: mqrar.cells(mqrar.Config(attention=(name,)))[0].attention for name, _ in solved}
    rows = [
        {"attention": name, "options": specs[name].partition(":")[2], "kv_pairs": pairs, "value": value}
        for (name, pairs), value in solved.items()
    ]
    sizes = {"vocab_size": 8192, "seq_len": 768, "width": 256, "layers": 2, "heads": 1, "lr": 1e-3}
    return frame(rows, **{"metric": "accuracy", "split": "all", "train_tokens": SOLVED_TOKENS} | sizes | common)


STICK, ROPE = "stick_breaking", "rope"


@pytest.mark.parametrize(
    ("solved", "tokens", "verdict"),
    [
        ({(STICK, 192): 1.0, (ROPE, 128): 1.0, (ROPE, 192): 0.5}, SOLVED_TOKENS, AGREES),
        ({(STICK, 192): 0.9, (ROPE, 128): 1.0, (ROPE, 192): 0.5}, SOLVED_TOKENS, DISAGREES),
        ({(STICK, 192): 1.0, (ROPE, 128): 1.0, (ROPE, 192): 1.0}, SOLVED_TOKENS // 100, DISAGREES),
        # what fails on fewer tokens than the paper's may be learned yet
        ({(STICK, 192): 0.9, (ROPE, 128): 1.0, (ROPE, 192): 0.5}, SOLVED_TOKENS - 1, UNDECIDED),
        ({(STICK, 192): 1.0, (ROPE, 192): 0.5}, SOLVED_TOKENS, UNDECIDED),
    ],
)
def test_recall(solved: dict[tuple[str, int], float], tokens: int, verdict: str) -> None:
    assert judge.recall(recall(solved, train_tokens=tokens)).verdict == verdict


def test_what_recall_lacks_is_said() -> None:
    judged = judge.recall(recall({(STICK, 192): 1.0, (ROPE, 192): 0.5}))
    assert judged.reason == "not measured, or too briefly trained: RoPE with 128 pairs"
    judged = judge.recall(recall({(STICK, 192): 1.0, (ROPE, 192): 0.5}, vocab_size=1024))
    assert judged.verdict == UNDECIDED and "the paper's vocabulary of 8192 in 768 tokens" in judged.reason
    assert judged.found == (
        "Stick-breaking solves 192 pairs of up to 192 (accuracy with 192: 1.000, 95 % over sequences). RoPE solves "
        "none of up to 192 (accuracy with 192: 0.500, 95 % over sequences). Vocabulary 1024, 768 tokens."
    )


def maps(stick: float, rope: float, *, accuracy: float = 1.0, stderr: float = 0.01) -> pd.DataFrame:
    """Weights of two heads on stale values: the first looks elsewhere, the second at the latest value."""
    rows = []
    for name, options, stale in ((STICK, "logit_scale=1.5", stick), (ROPE, "", rope)):
        of: Row = {"attention": name, "options": options, "cell": name}
        rows.append(of | {"metric": "accuracy", "split": "stale", "value": accuracy})
        for head, shares in enumerate(((0.1, 0.9), (0.6, stale)), 1):
            for target, value in zip(("latest", "stale"), shares, strict=True):
                where: Row = {"metric": "share", "layer": 1, "head": head, "target": target, "split": "stale"}
                rows.append(of | where | {"value": value, "stderr": stderr})
    return frame(rows, vocab_size=65, seq_len=64, kv_pairs=16, model="2x100")


@pytest.mark.parametrize(
    ("stick", "rope", "stderr", "verdict"),
    [(0.1, 0.3, 0.01, AGREES), (0.3, 0.1, 0.01, DISAGREES), (0.1, 0.3, 0.2, UNDECIDED)],
)
def test_distraction(stick: float, rope: float, stderr: float, verdict: str) -> None:
    judged = judge.distraction(maps(stick, rope, stderr=stderr))
    assert judged.verdict == verdict
    sign = "−" if stick < rope else "+"
    assert f"stick-breaking {stick:.3f}, RoPE {rope:.3f}; difference {sign}{abs(stick - rope):.3f}" in judged.found


def test_models_that_have_not_learned_it_say_nothing_of_distraction() -> None:
    with pytest.raises(InputError, match="no model answers 0.95 of the queries with stale values"):
        judge.distraction(maps(0.1, 0.3, accuracy=0.9))


@pytest.mark.parametrize(
    ("stick", "params", "verdict"),
    [(80.0, 10**9, AGREES), (70.0, 10**9, DISAGREES), (80.0, 10**8, UNDECIDED)],
)
def test_training_speed(stick: float, params: int, verdict: str) -> None:
    # the faster of two kernels counts
    rows = [{"attention": STICK, "backend": "triton", "value": stick}]
    rows += [{"attention": ROPE, "backend": backend, "value": value} for backend, value in (("a", 100.0), ("b", 50.0))]
    table = frame(rows, metric="throughput", step="train", queries=4096, batch=4, head_dim=64, params=params)
    judged = judge.training_speed(table)
    assert judged.verdict == verdict and f"{stick:.0f} %" in judged.found


def times(ours: Sequence[float], **common: Any) -> pd.DataFrame:
    """Times at heads of 64 and 128, where FlashAttention-2 takes 10 ms; a tenth more and less at the quantiles."""
    rows = []
    for dim, ms in zip((64, 128), ours, strict=True):
        for metric, scale in (("time", 1.0), ("time_q20", 0.9), ("time_q80", 1.1)):
            at = {"metric": metric, "head_dim": dim}
            rows.append(at | {"attention": STICK, "backend": "triton", "value": ms * scale})
            rows.append(at | {"attention": "softmax", "backend": "flash", "value": 10.0 * scale})
    sizes = {"batch": 1, "queries": 16384, "keys": 16384, "heads": 12, "kv_heads": 12, "sequences": 1, "epsilon": 0.0}
    return frame(rows, **sizes | {"step": "forward"} | common)


@pytest.mark.parametrize(
    ("ours", "verdict", "reason"),
    [
        ((20, 30), AGREES, ""),
        ((5, 6), DISAGREES, ""),
        ((5, 20), UNDECIDED, "it depends on the head size or the device"),
        ((10, 10), UNDECIDED, "the interval includes both"),
    ],
)
def test_kernels(ours: Sequence[float], verdict: str, reason: str) -> None:
    short = times((100.0, 100.0), queries=1024, keys=1024)
    judged = judge.kernel_speed("forward", pd.concat([short, times(ours)]))
    assert (judged.verdict, judged.reason) == (verdict, reason) and "16384 tokens" in judged.found
    assert f"{10 / ours[0]:.2f} [" in judged.found


def test_a_kernel_is_compared_on_the_same_device() -> None:
    other = times((1.0, 1.0), device="a faster card").query("backend == 'triton'")
    judged = judge.kernel_speed("forward", pd.concat([times((20.0, 30.0)), other]))
    assert judged.verdict == AGREES and "faster" not in judged.found
    both = pd.concat([times((20.0, 30.0)), times((5.0, 5.0), device="a faster card")])
    assert judge.kernel_speed("forward", both).verdict == UNDECIDED


def needles(stick: float, rope: float, **common: Any) -> pd.DataFrame:
    rows = [
        {
            "attention": name,
            "task": task,
            "length": length,
            "value": value if length > 2048 else 1.0,
            "cell": f"{name} {task}",
        }
        for name, value in ((STICK, stick), (ROPE, rope))
        for task in ("vt", "cwe")
        for length in (2048, 4096, 8192)
    ]
    return frame(rows, **{"metric": "score", "depth_start": None, "finetune_tokens": 0, "stderr": 0.02} | common)


@pytest.mark.parametrize(
    ("stick", "rope", "more", "verdict", "reason"),
    [
        (0.5, 0.1, {}, AGREES, ""),
        (0.1, 0.5, {}, DISAGREES, ""),
        (0.5, 0.5, {}, UNDECIDED, "the interval includes both"),
        (0.04, 0.0, {}, UNDECIDED, "neither finds anything there"),
        (0.5, 0.1, {"params": 10**7}, UNDECIDED, "models of 10 M parameters, the paper's have 1 B"),
    ],
)
def test_retrieval(stick: float, rope: float, more: Row, verdict: str, reason: str) -> None:
    judged = judge.retrieval(needles(stick, rope, **more))
    assert (judged.verdict, judged.reason) == (verdict, reason) and "at 4096, 8192 tokens" in judged.found


def shots(stick: float, rope: float, **common: Any) -> pd.DataFrame:
    rows = [
        {"attention": name, "task": task, "value": value}
        for name, value in ((STICK, stick), (ROPE, rope))
        for task in ("copa", "piqa")
    ]
    # a benchmark of one method alone is left out
    rows.append({"attention": ROPE, "task": "sciq", "value": 1.0})
    same: Row = {"metric": "acc", "part": "", "filter": "", "shots": 0, "chance": 0.5, "stderr": 0.001}
    return frame(rows, **same | common)


@pytest.mark.parametrize(
    ("stick", "more", "verdict"),
    [
        (0.6, {}, AGREES),
        (0.595, {}, AGREES),
        (0.55, {}, DISAGREES),
        (0.59, {"stderr": 0.01}, UNDECIDED),
        (0.6, {"params": 10**8}, UNDECIDED),
    ],
)
def test_few_shot(stick: float, more: Row, verdict: str) -> None:
    judged = judge.benchmarks(shots(stick, 0.6, **more))
    assert judged.verdict == verdict
    assert f"Average of 2 benchmarks: stick-breaking {100 * stick:.1f} %, RoPE 60.0 %, guessing 50.0 %" in judged.found


def test_without_the_rows_nothing_is_decided() -> None:
    empty = findings(CLAIMS, {})
    assert [each.judged.verdict for each in empty] == len(CLAIMS) * [UNDECIDED]
    assert empty[0].judged == Judged(UNDECIDED, reason="not measured here; sbeval length-gen does")
    table = lengths((40, 40), (40, 80))
    cases = [
        (CLAIMS[0], "no setting has rows of both", table[table["attention"] == ROPE]),
        (
            CLAIMS[0],
            "no model trained at 2048 tokens was evaluated up to 16384",
            table[table["context_length"] == 2048],
        ),
        (CLAIMS[1], "no seed in common", table.assign(seed=(table["attention"] == ROPE).astype(int))),
    ]
    for claim, reason, part in cases:
        judged = findings([claim], {"length_gen": part})[0].judged
        assert judged.verdict == UNDECIDED and reason in judged.reason


def test_no_claim_is_judged_by_a_model_that_overfits() -> None:
    def judged(*tables: pd.DataFrame) -> Judged:
        return findings(CLAIMS[:1], {"length_gen": pd.concat(tables).reset_index(drop=True)})[0].judged

    good = lengths((20, 20), (20, 40), model="125m", params=125 * 10**6, cell="a", status="")
    # larger, and so nearer to the paper's
    memorised = lengths((40, 80), (40, 40), cell="b", status="overfit")
    found = judged(good, memorised)
    assert found.verdict == AGREES and "from 20.0 to 20.0" in found.found
    assert found.reason == "left out, as they overfit: models of rope, stick_breaking"
    assert judged(good) == judge.lengths(good) and judged(memorised.assign(status="")).verdict == DISAGREES
    alone = judged(memorised)
    assert alone.verdict == UNDECIDED and "left out, as they overfit" in alone.reason
    # of one method alone: nothing is left to compare
    one = good.assign(status=["overfit" if name == "rope" else "" for name in good["attention"]])
    found = judged(one)
    assert (
        found.verdict == UNDECIDED
        and "no setting has rows of both" in found.reason
        and found.reason.endswith("of rope")
    )


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.table in ("length_gen", "needle", "few_shot")])
def test_a_table_of_overfit_models_alone_decides_nothing(claim: Claim) -> None:
    rows = lengths((40, 80), (40, 40), cell="b", status="overfit", part="", filter="", shots=0, chance=0.5, n=9)
    rows = rows.assign(depth_start=math.nan, length=4096, finetune_tokens=0)
    (found,) = findings([claim], {claim.table: rows})
    assert found.judged.verdict == UNDECIDED and "overfit: models of rope, stick_breaking" in found.judged.reason
