"""Texts of prompts are read from files in either form, and tokenized in parts as in whole."""

import json
from pathlib import Path

import pytest

from sbeval.errors import InputError
from sbeval.evaluation import ruler_tasks, ruler_texts
from sbeval.evaluation.ruler_prompts import Writer
from sbeval.evaluation.ruler_texts import Tables
from sbeval.tables.published import LONGEST, RULER_TASKS, SHORTEST


def test_questions_may_be_lines(tmp_path: Path, files: dict[str, Path]) -> None:
    published = ruler_texts.load(None, str(files["squad"]), str(files["hotpot"])).questions
    data = json.loads(files["squad"].read_text())["data"]
    paragraphs = [(article["title"], item) for article in data for item in article["paragraphs"]]
    lines = {
        "contexts": [{"id": number, "text": item["context"]} for number, (_, item) in enumerate(paragraphs)],
        "questions": [
            {
                "title": title,
                "ctx": number,
                "question": asked["question"],
                "answers": [answer["text"] for answer in asked["answers"]],
                "impossible": not asked["answers"],
            }
            for number, (title, item) in enumerate(paragraphs)
            for asked in item["qas"]
        ],
        "hotpot": json.loads(files["hotpot"].read_text()),
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = ruler_texts.load(None, str(tmp_path / "questions.jsonl"), str(tmp_path / "hotpot.jsonl")).questions
    for name in ("squad", "hotpot"):
        one, other = published[name], found[name]
        assert one is not None and other is not None and (one.documents, one.asked) == (other.documents, other.asked)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"cannot read .*squad\.json: No such file"),
        ("no json", r"squad\.json is not JSON"),
        ("{}", r"--squad .*squad\.json is not SQuAD: KeyError 'data'"),
        ('{"data": []}', r"--squad .*squad\.json has no question with an answer"),
    ],
)
def test_files_that_are_none_are_errors(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        ruler_texts.load(None, str(path), None)


def test_an_essay_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no text: give"):
        ruler_texts.load(str(tmp_path), None, None)


def test_prompts_that_are_written_in_parts_are_those_of_the_whole(writer: Writer) -> None:
    tables = Tables(writer.tokenizer)
    part = tables.new([" one", " two", "\nthree"]).part([2, 0, 0])
    assert part.text == "\nthree one one" and part.tokens == len(part.ids)
    assert part.ids.tolist() == [
        token for item in ("\nthree", " one", " one") for token in writer.tokenizer.encode(item)
    ]
    assert tuple(ruler_tasks.TASKS) == RULER_TASKS and (SHORTEST, LONGEST) == (512, 131072)
