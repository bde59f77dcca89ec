"""Items without an answer are not scored, and chance is a share of right choices."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sbeval.data.tokenizer import Bytes
from sbeval.errors import InputError
from sbeval.evaluation import lm_eval_choices, lm_eval_tasks
from sbeval.evaluation.lm_eval_model import Adapter, PlainText
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder


def load(folder: Path, name: str, stem: str, *items: dict[str, Any]) -> lm_eval_tasks.Benchmark:
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    lm_eval_tasks.load.cache_clear()
    return lm_eval_tasks.load(name, None, folder)


def scores(benchmark: lm_eval_tasks.Benchmark) -> dict[str, lm_eval_tasks.Score]:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=24, attention="nope", init_std=0.5)
    cpu = torch.device("cpu")
    lm = Adapter(Decoder(shape).eval(), PlainText(Bytes()), length=256, place=cpu, dtype="float32", batch_tokens=4096)
    return {score.metric: score for score in lm_eval_tasks.scores(benchmark, lm, None)[0]}


@pytest.mark.parametrize("label", [-1, 2])
def test_an_item_without_its_answer_is_an_error(label: int, tmp_path: Path) -> None:
    items = [{"goal": "a", "sol1": "b", "sol2": "c", "label": label} for label in (0, 1)]
    benchmark = load(tmp_path, "piqa", "piqa_validation", *items)
    (task,) = benchmark.tasks.values()
    assert [lm_eval_choices.right(task, item) for item in task.eval_docs] == [[0], [1]]
    with pytest.raises(InputError, match="item 2 of task 'piqa' has no answer among its choices, and cannot be scored"):
        load(tmp_path, "piqa", "piqa_validation", items[0], items[0] | {"label": label})
    winogrande = {"sentence": "a _ b", "option1": "c", "option2": "d"}
    load(tmp_path, "winogrande", "winogrande_winogrande_xl_validation", winogrande | {"answer": "1"})
    with pytest.raises(InputError, match="item 1 of task 'winogrande' has no answer"):
        load(tmp_path, "winogrande", "winogrande_winogrande_xl_validation", winogrande | {"answer": ""})


def test_chance_is_of_right_choices_alone(tmp_path: Path) -> None:
    piqa = scores(load(tmp_path, "piqa", "piqa_validation", {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}))
    assert piqa["acc"].chance == piqa["acc_norm"].chance == 0.5
    # its accuracy is a share of probability
    choices = ["a", "b", "c", "d"]
    item = {
        "question": "why",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0]},
    }
    found = scores(load(tmp_path, "truthfulqa_mc2", "truthful_qa_multiple_choice_validation", item, item))
    assert found["acc"].chance is None


def test_a_perplexity_that_no_number_holds_has_no_score(tmp_path: Path) -> None:
    found = scores(load(tmp_path, "wikitext", "wikitext2_test_docs", {"text": "x" * 3000}))
    assert "word_perplexity" not in found and math.isfinite(found["bits_per_byte"].value)
