"""Items from JSONL files give the prompts, choices and answers that the hub's items give."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask

from sbeval.errors import InputError
from sbeval.evaluation import lm_eval_local, lm_eval_tasks

ARC = {"id": "1", "question": "Which is a gas?", "choices": {"text": ["iron", "helium"], "label": ["A", "B"]}}
WSC = "The city councilmen refused the demonstrators a permit because they feared violence."
# task, stem of the file, an item as it stands there, the same as it stands on the hub
SAME: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (
        "arc_easy",
        "arc_easy_test",
        {"question": "Which is a gas?", "choices": ["iron", "helium"], "gold": 1},
        {**ARC, "answerKey": "B"},
    ),
    # some questions on the hub number their choices
    (
        "arc_challenge",
        "arc_challenge_test",
        {"question": "Which is a gas?", "choices": ["iron", "helium"], "gold": 0},
        {**ARC, "choices": {"text": ["iron", "helium"], "label": ["1", "2"]}, "answerKey": "1"},
    ),
    (
        "openbookqa",
        "openbookqa_test",
        {"question": "Fog is likely around:", "choices": ["a marsh", "a desert"], "gold": 0},
        {
            "question_stem": "Fog is likely around:",
            "choices": {"text": ["a marsh", "a desert"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ),
    (
        "hellaswag",
        "hellaswag_val",
        {
            "query": "Clean and jerk: A lady walks to a barbell. The lady",
            "choices": ["swings.", "stands and lifts."],
            "gold": 1,
        },
        {
            "activity_label": "Clean and jerk",
            "ctx_a": "A lady walks to a barbell.",
            "ctx_b": "the lady",
            "endings": ["swings.", "stands  and lifts."],
            "label": "1",
        },
    ),
    (
        "piqa",
        "piqa_val",
        {"goal": "Dry a floor", "choices": ["with a towel ", "with oil"], "gold": 0},
        {"goal": "Dry a floor", "sol1": "with a towel ", "sol2": "with oil", "label": 0},
    ),
    (
        "winogrande",
        "winogrande_xl_val",
        {"contexts": ["Ann met Anna so Ann", "Ann met Anna so Anna"], "continuation": "was glad.", "gold": 1},
        {"sentence": "Ann met Anna so _ was glad.", "option1": "Ann", "option2": "Anna", "answer": "2"},
    ),
    (
        "wsc273",
        "wsc273",
        {
            "contexts": [f"{WSC[:63]}the city councilmen", f"{WSC[:63]}the demonstrators"],
            "continuation": "feared violence.",
            "gold": 0,
        },
        {
            "text": WSC,
            "pronoun": "they",
            "pronoun_loc": 63,
            "options": ["The city councilmen", "The demonstrators"],
            "label": 0,
        },
    ),
    (
        "boolq",
        "boolq_val",
        {"passage": "Bees fly.", "question": "do bees fly?", "choices": ["no", "yes"], "gold": 1},
        {"passage": "Bees fly.", "question": "do bees fly", "label": 1, "idx": 0},
    ),
    (
        "copa",
        "copa_val",
        {"context": "I sat down because", "choices": ["i was tired.", "the sun shone."], "gold": 0},
        {
            "premise": "I sat down.",
            "choice1": "I was tired.",
            "choice2": "The sun shone.",
            "question": "cause",
            "label": 0,
        },
    ),
    (
        "lambada_openai",
        "lambada_openai_test",
        {"context": 'I stare at him.\n\n"Well," says', "target": "Harlin"},
        {"text": 'I stare at him.\n\n"Well," says Harlin'},
    ),
    (
        "gsm8k",
        "gsm8k_test",
        {"context": "2 ducks, 3 eggs each?", "chain_of_thought": "2*3=<<2*3=6>>6 eggs", "answer": "6"},
        {"question": "2 ducks, 3 eggs each?", "answer": "2*3=<<2*3=6>>6 eggs\n#### 6"},
    ),
    (
        "mmlu_abstract_algebra",
        "mmlu_test",
        {"subject": "abstract_algebra", "question": "Order of Z_4?", "choices": ["1", "2", "3", "4"], "gold": 3},
        {"question": "Order of Z_4?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 3},
    ),
    (
        "blimp_adjunct_island",
        "blimp",
        {"uid": "adjunct_island", "good": "Who hugs?", "bad": "Who hugs who?"},
        {"sentence_good": "Who hugs?", "sentence_bad": "Who hugs who?", "field": "syntax"},
    ),
    (
        "wikitext",
        "wikitext2_test_docs",
        {"title": "Du Fu", "text": " = Du Fu = \n \n A poet , of 712 @-@ 770 . \n"},
        {"page": " = Du Fu = \n \n A poet , of 712 @-@ 770 . \n"},
    ),
]


def write(folder: Path, stem: str, *rows: dict[str, Any]) -> None:
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def hub_task(item: dict[str, Any], shots: int | None) -> type[Any]:
    """lm-eval's definition over a hub that has one item in every split."""

    class Hub(ConfigurableTask):  # type: ignore[misc]  # lm-eval has no types
        def __init__(self, config: dict[str, Any]) -> None:
            kept = {key: value for key, value in config.items() if key != "class"}
            super().__init__(config=kept if shots is None else {**kept, "num_fewshot": shots})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
            rows = datasets.Dataset.from_list([item])
            self.dataset = dict.fromkeys(("train", "validation", "test", "dev"), rows)

    return Hub


def asked(benchmark: lm_eval_tasks.Benchmark) -> list[Any]:
    """All that a model is asked, the right answer, and the version."""
    (task,) = benchmark.tasks.values()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    (item,) = task.eval_docs
    return [task.VERSION, task.doc_to_target(item), *(one.args for one in task.instances)]


@pytest.mark.parametrize(("name", "stem", "item", "on_the_hub"), SAME, ids=[name for name, *_ in SAME])
def test_prompts_are_the_hubs(
    name: str,
    stem: str,
    item: dict[str, Any],
    on_the_hub: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, stem, item)
    shots = 0 if name == "gsm8k" else None
    found = asked(lm_eval_tasks.load(name, shots, tmp_path))
    monkeypatch.setattr(lm_eval_local, "local_task", lambda folder, shots: hub_task(on_the_hub, shots))
    wanted = asked(lm_eval_tasks.load(name, shots, tmp_path / "hub"))
    assert found == wanted and len(found) > 2


def test_one_prompt_spelled_out(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy_test", {"question": "Which is a gas?", "choices": ["iron", "helium"], "gold": 1})
    assert asked(lm_eval_tasks.load("arc_easy", None, tmp_path)) == [
        1.0,
        1,
        ("Question: Which is a gas?\nAnswer:", " iron"),
        ("Question: Which is a gas?\nAnswer:", " helium"),
    ]


def test_any_dataset_is_read_in_the_hubs_own_fields(tmp_path: Path) -> None:
    item = {
        "question": "What do plants take in?",
        "distractor1": "iron",
        "distractor2": "sand",
        "distractor3": "oil",
        "correct_answer": "light",
        "support": "Plants live on light.",
    }
    write(tmp_path, "sciq_test", item)
    _, gold, *requests = asked(lm_eval_tasks.load("sciq", None, tmp_path))
    assert requests[int(gold)] == ("Plants live on light.\nQuestion: What do plants take in?\nAnswer:", " light")
    problems = [{"question": "What is it?", "options": ["a", "b", "c", "d"], "answer": "C"}]
    write(tmp_path, "race_high_test", {"article": "A text.", "problems": str(problems)})
    _, gold, *requests = asked(lm_eval_tasks.load("race", None, tmp_path))
    assert requests[int(gold)][1] == " c"


def test_examples_come_from_items_that_are_not_scored(tmp_path: Path) -> None:
    rows = [
        {"question": f"Number {n}?", "choices": [f"{n}", "none"], "gold": 0} for n in range(lm_eval_local.HELD_OUT + 5)
    ]
    write(tmp_path, "arc_easy_test", *rows)
    (task,) = lm_eval_tasks.load("arc_easy", 3, tmp_path).tasks.values()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    scored = {item["question"] for item in task.eval_docs}
    assert scored == {row["question"] for row in rows[lm_eval_local.HELD_OUT :]}
    for request in task.instances:
        *examples, own = [part.splitlines()[0].removeprefix("Question: ") for part in request.args[0].split("\n\n")]
        assert len(examples) == 3 and not scored & set(examples) and own in scored
    assert len(lm_eval_tasks.load("arc_easy", 0, tmp_path).tasks["arc_easy"].eval_docs) == len(rows)


def test_mmlus_examples_are_its_dev_split(tmp_path: Path) -> None:
    def item(n: int) -> dict[str, Any]:
        return {"subject": "anatomy", "question": f"Bone {n}?", "choices": ["a", "b", "c", "d"], "gold": n % 4}

    write(tmp_path, "mmlu_test", item(100), item(101))
    write(tmp_path, "mmlu_dev", *map(item, range(5)))
    (task,) = lm_eval_tasks.load("mmlu_anatomy", 5, tmp_path).tasks.values()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    prompt = task.instances[0].args[0]
    assert [f"Bone {n}?" in prompt for n in (0, 1, 2, 3, 4, 100, 101)] == [True] * 6 + [False]
    assert len(task.eval_docs) == 2


@pytest.mark.parametrize(
    ("name", "shots", "content", "said"),
    [
        ("piqa", None, None, r"reads piqa_validation.jsonl or piqa_val.jsonl, and .* has no such file"),
        ("piqa", None, "no json\n", r"piqa_val.jsonl:1: not a JSON object in UTF-8"),
        ("piqa", None, '[["goal", "a"]]\n', r"piqa_val.jsonl:1: not a JSON object in UTF-8"),
        ("piqa", None, '{"goal": "a"}\n', r"not in a form that sbeval.evaluation.lm_eval_local reads \(KeyError"),
        ("piqa", None, "", r"piqa_val.jsonl is empty"),
        (
            "piqa",
            None,
            '{"goal": "a", "choices": ["b", "c"], "gold": -1}\n',
            r"item 1 of .* has no answer: gold",
        ),
        (
            "piqa",
            2,
            '{"goal": "a", "choices": ["b", "c"], "gold": 0}\n',
            r"needs 2 examples, and .* has 1 to draw from and 0 other items to score; without piqa_train.jsonl",
        ),
        ("wsc273", 1, "", r"has only one split: no examples to draw; give --task wsc273:0"),
        ("blimp_causative", 2, "", r"defined with 0 examples"),
        ("blimp_adjunct_island", None, "", r"and .* has none with items whose 'uid' is 'adjunct_island'"),
        ("pica", None, "", r"has no task 'pica'; did you mean piqa"),
    ],
)
def test_what_is_not_there_is_an_error(
    name: str, shots: int | None, content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # reading all of lm-eval's definitions takes seconds
    few = lm_eval_tasks._index(False)
    monkeypatch.setattr(lm_eval_tasks, "_index", lambda everything: few)
    write(tmp_path, "wsc273", SAME[6][2])
    write(tmp_path, "blimp", {"uid": "causative", "good": "a", "bad": "b"})
    if content is not None:
        (tmp_path / "piqa_val.jsonl").write_text(content)
    with pytest.raises(InputError, match=said):
        lm_eval_tasks.load(name, shots, tmp_path)


def test_without_a_network_the_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"cannot load task 'piqa' .*reach the Hub.*--data-dir"):
        lm_eval_tasks.load("piqa", None, None)


SCIQ = {"question": "?", "support": "", "correct_answer": "a"} | {f"distractor{n}": "b" for n in (1, 2, 3)}


@pytest.mark.parametrize("wrong", [{"question": "?"}, SCIQ | {"support": 1}])
def test_a_first_item_that_the_definition_cannot_read_is_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "sciq_test", wrong)
    with pytest.raises(InputError, match="item 1 of task 'sciq' has no answer among its choices or lacks a field"):
        lm_eval_tasks.load("sciq", None, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"distractor2": None}, "item 2 of task 'sciq' has a choice that is no text"),
        ({"distractor2": 1}, "cannot read the items of task 'sciq': "),
    ],
)
def test_a_later_item_with_another_choice_than_text_is_named(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path, "sciq_test", SCIQ, SCIQ | wrong)
    with pytest.raises(InputError, match=said):
        lm_eval_tasks.load("sciq", None, tmp_path)


def test_a_byte_order_mark_and_blank_lines_are_no_items(tmp_path: Path) -> None:
    write(tmp_path, "piqa_val", *({"goal": f"{n}", "choices": ["b", "c"], "gold": 1} for n in range(3)))
    path = tmp_path / "piqa_val.jsonl"
    plain = lm_eval_local.read(path, None)
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"\ufeff{first}\n\n  \n{rest}", encoding="utf-8")
    assert lm_eval_local._read(path, None, 1) == plain
    path.write_bytes(b'{"goal": "a"}\n{"goal": "caf\xe9"}\n')
    with pytest.raises(InputError, match="piqa_val.jsonl:2: not a JSON object in UTF-8"):
        lm_eval_local._read(path, None, 2)
