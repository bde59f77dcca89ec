"""Test the values of items that come from lm-eval's samples."""

import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from sbeval.evaluation import lm_eval_items


def task(kind: str, **entries: Any) -> SimpleNamespace:
    return SimpleNamespace(OUTPUT_TYPE=kind, multiple_input=0, **entries)


def sample(number: int, answers: list[Any], **metrics: Any) -> dict[str, Any]:
    return {
        "doc_id": number,
        "doc": {"number": number},
        "filter": "none",
        "metrics": list(metrics),
        "filtered_resps": answers,
        "arguments": [("so", f" {'é' * (index + 1)}") for index in range(len(answers))],
        **metrics,
    }


def found(frame: pd.DataFrame) -> dict[tuple[str, str], float]:
    return {(metric, unit): value for metric, unit, value in frame[["metric", "unit_id", "value"]].to_numpy()}


def test_a_choice_has_its_marks_and_the_likelihood_of_the_right_answer() -> None:
    # right answers by number and by name; of the third item several, of the fourth none
    right = [1, "a", [0, 1], "c"]
    choice = task(
        "multiple_choice", doc_to_target=lambda item: right[item["number"]], doc_to_choice=lambda item: [*"ab"]
    )
    answers = [(-1.25, False), (-0.5, True)]
    samples = [sample(number, answers, acc=1.0, acc_norm=0.0, f1=(1, 1)) for number in range(4)]
    frame = lm_eval_items.values("group", {"part": choice}, {"part": samples})
    values = found(frame)
    assert values["acc", "0"] == 1.0 and values["acc_norm", "3"] == 0.0
    assert [values.get(("log_probability", str(n))) for n in range(4)] == [-0.5, -1.25, None, None]
    # as they were asked, in UTF-8
    assert [values.get(("answer_bytes", str(n))) for n in range(4)] == [5, 3, None, None]
    assert set(frame["part"]) == {"part"} and set(frame["filter"]) == {""} and "f1" not in set(frame["metric"])


def test_the_right_prompt_of_several_is_known() -> None:
    prompts = task(
        "multiple_choice",
        doc_to_target=lambda _: "end",
        doc_to_text=lambda _: 1,
        doc_to_choice=lambda _: [*"ab"],
    )
    prompts.multiple_input = 2
    frame = lm_eval_items.values("it", {"it": prompts}, {"it": [sample(0, [(-3.0, False), (-2.0, False)], acc=1.0)]})
    assert found(frame) == {("acc", "0"): 1.0, ("log_probability", "0"): -2.0, ("answer_bytes", "0"): 5.0}
    assert set(frame["part"]) == {""}


def test_a_text_has_its_likelihood_and_what_it_is_divided_by() -> None:
    metrics = {"word_perplexity": (-70.12346, 20), "byte_perplexity": (-70.12346, 99), "bits_per_byte": (-70.12346, 99)}
    frame = lm_eval_items.values("w", {"w": task("loglikelihood_rolling")}, {"w": [sample(0, [-70.1], **metrics)]})
    assert found(frame) == {("log_probability", "0"): -70.1235, ("words", "0"): 20.0, ("bytes", "0"): 99.0}
    lambada = task("loglikelihood")
    frame = lm_eval_items.values("l", {"l": lambada}, {"l": [sample(0, [(-4.5, True)], perplexity=-4.5, acc=1)]})
    assert found(frame) == {("log_probability", "0"): -4.5, ("acc", "0"): 1.0, ("answer_bytes", "0"): 3.0}


def test_gold_answers_cost_their_bits_over_their_bytes() -> None:
    frame = pd.DataFrame(
        [
            ("log_probability", "0", -2.0, "a", ""),
            ("answer_bytes", "0", 4.0, "a", ""),
            ("log_probability", "0", -3.0, "b", ""),
            ("answer_bytes", "0", 2.0, "b", ""),
            # of no use without the other
            ("log_probability", "1", -9.0, "b", ""),
            ("acc", "0", 1.0, "b", ""),
        ],
        columns=list(lm_eval_items.COLUMNS),
    )
    one, both = (lm_eval_items.gold_bits_per_byte(frame, parts) for parts in (["a"], ["a", "b"]))
    assert one is not None and one.value == pytest.approx(0.5 / math.log(2)) and one.stderr is None and one.n == 1
    assert both is not None and both.n == 2 and both.stderr is not None
    assert both.value == pytest.approx(5 / 6 / math.log(2))
    assert lm_eval_items.gold_bits_per_byte(frame[frame["metric"] == "acc"], ["b"]) is None
