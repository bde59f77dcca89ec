"""Texts of prompts: lines end at line ends alone, and null is no text."""

import json
from pathlib import Path

import pytest

from sbeval.errors import InputError
from sbeval.evaluation import ruler_texts

TEXT = "The cat sat. The dog ran. " * 4


def words(path: Path) -> list[str]:
    return ruler_texts.load(str(path), None, None).essay.words


def test_essays(tmp_path: Path) -> None:
    path = tmp_path / "essays.jsonl"
    rows = [{"text": TEXT.replace("dog", "dog\u2028")}, {"text": None}, {"text": TEXT}, {"title": "none"}]
    path.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = words(path)
    assert found[:48] == (TEXT + TEXT).split() and "None" not in found
    path.write_text(json.dumps({"text": [1]}))
    with pytest.raises(InputError, match="field 'text' holds a list, not text"):
        words(path)


def test_null_in_a_question_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "hotpot.json"
    row = {"question": None, "answer": "a", "context": [["title", ["text"]]]}
    path.write_text(json.dumps([row]))
    with pytest.raises(InputError, match="is not HotpotQA: TypeError None is not text"):
        ruler_texts.load(None, None, str(path))
