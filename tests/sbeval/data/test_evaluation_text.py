"""Texts to evaluate on: which documents are read, and Wikitext as lm-eval reads it."""

import json
from pathlib import Path

import pytest
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

from sbeval.data import evaluation_text
from sbeval.data.evaluation_text import detokenized, read
from sbeval.data.tokenizer import Bytes
from sbeval.errors import InputError

# each rule of the detokenizer, and some that meet
PAGES = [
    ' = Du Fu = \n \n Du Fu ( Wade – Giles : Tu Fu ; 杜甫 ) was " a poet " . \n = = Life = = \n Born in 712 ! ',
    " a guest @-@ starring role , 1 @,@ 024 times at 2 @.@ 5 % [ note ] { x } of the players ' ' own ' N games ",
    " Teddy 's Story : 12 ° west ? = = = Deep = = = \n = = = = Deeper = = = = \n /' 5/ ; yes ",
]


def written(path: Path, pages: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: page}) + "\n" for page in pages), encoding="utf-8")
    return path


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_lm_evals(page: str) -> None:
    assert detokenized(page) == wikitext_detokenizer({"page": page}) != page


def test_wikitext_is_read_without_its_spaces_and_counted_with_them(tmp_path: Path) -> None:
    path = written(tmp_path / "pages.jsonl", PAGES)
    text = read(f"wikitext:{path}", "text", Bytes(), [7])
    assert text.name == "wikitext" and list(text.counted) == PAGES and text.prefix == [7]
    assert [Bytes().decode(tokens) for tokens in text.tokens] == [detokenized(page) for page in PAGES]
    assert list(text.documents) == ["pages.jsonl:1", "pages.jsonl:2", "pages.jsonl:3"]
    as_it_is = read(str(path), "text", Bytes(), [7])
    assert as_it_is.name == "pages" and [Bytes().decode(tokens) for tokens in as_it_is.tokens] == PAGES


def test_all_documents_are_read_unless_names_say_which_are_for_test(tmp_path: Path) -> None:
    pages = [f"page {number}" for number in range(30)]
    assert list(read(str(written(tmp_path / "pages.jsonl", pages)), "text", Bytes(), [7]).counted) == pages
    folder = tmp_path / "split"
    folder.mkdir()
    written(folder / "train.jsonl", pages)
    written(folder / "test.jsonl", ["for test"], "text")
    assert list(read(str(folder), "text", Bytes(), [7]).counted) == ["for test"]


def test_a_digest_is_of_the_documents(tmp_path: Path) -> None:
    path = written(tmp_path / "pages.jsonl", PAGES)
    before = evaluation_text.digest(f"wikitext:{path}", "text")
    assert evaluation_text.digest(f"wikitext:{path}", "text") == before
    written(path, PAGES[:2])
    assert evaluation_text.digest(f"wikitext:{path}", "text") != before


@pytest.mark.parametrize("spec", ["nothing", "wikitext:nothing"])
def test_a_text_that_does_not_exist(spec: str) -> None:
    with pytest.raises(InputError, match="'nothing'"):
        evaluation_text.digest(spec, "text")


def test_a_text_without_documents(tmp_path: Path) -> None:
    path = written(tmp_path / "pages.jsonl", [" "])
    with pytest.raises(InputError, match="holds no documents: give another --eval-corpus"):
        read(str(path), "text", Bytes(), [7])
