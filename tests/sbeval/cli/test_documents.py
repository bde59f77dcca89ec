"""The numbers in documents are those of the tables."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from sbeval.cli import documents
from sbeval.errors import InputError
from sbeval.report.claims import CLAIMS
from sbeval.tables.published import PAPER

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("page", documents.PAGES)
def test_the_numbers_of_a_page_are_those_of_the_tables(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    current = documents.written(text, ROOT / "results")
    assert text == current, "python -m sbeval.cli.documents writes them anew"


def test_each_block_is_on_a_page() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in documents.PAGES)
    assert {name for _, name, _ in documents.BLOCK.findall(text)} == set(documents.BLOCKS)


@pytest.mark.parametrize(
    ("commands", "text"),
    [
        (["a"], "Made by `a`."),
        (["a", "b"], "Made by `a` and `b`."),
        (["a", "b", "c"], "Made by `a`. Some rows are of 2 other commands, listed by `sbeval report`."),
    ],
)
def test_both_commands_of_a_table_are_named_and_many_are_counted(
    commands: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "gather", lambda table, runs: SimpleNamespace(again=commands))
    assert documents.BLOCKS["kernel_command"](ROOT / "results") == text


def test_a_wrong_number_is_mended_and_the_rest_stays() -> None:
    text = "Before.\n<!-- numbers: typed_sentence -->\nRoPE 1.\n<!-- end of numbers -->\nAfter.\n"
    mended = documents.written(text, ROOT / "results")
    assert "RoPE 1." not in mended and mended.startswith("Before.\n<!--") and mended.endswith("-->\nAfter.\n")
    assert documents.written(mended, ROOT / "results") == mended


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- numbers: typd -->\n<!-- end of numbers -->\n", "unknown block 'typd' of numbers; did you mean 'typed'"),
        ("<!-- numbers: typed -->\nRoPE 1.\n", "a block of numbers has no end"),
    ],
)
def test_a_block_that_cannot_be_written_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        documents.written(text, ROOT / "results")


def test_digits() -> None:
    assert [documents._three(value) for value in (7.016, 26.03, 107.8, 2917.6)] == ["7.02", "26.0", "108", "2918"]


@pytest.mark.parametrize("name", ["claims", "own"])
def test_readme_has_the_findings_and_the_results_what_they_rest_on_too(name: str) -> None:
    """Numbers of seeds, p values and what would decide a claim are one click away."""
    short, full = (documents.BLOCKS[block](ROOT / "results") for block in (name, f"{name}_in_full"))
    rows, in_full = ([line.strip("| ").split(" | ") for line in text.splitlines()] for text in (short, full))
    assert rows[0] == [in_full[0][0], "These runs", "Decided"]
    assert in_full[0][2:] == ["What the numbers are of", "Decided", "What would decide"]
    # the same findings, whose tables are found from where the page is
    links = re.compile(r"\(\[([\w-]+)\]\(results/\1\)\)")
    assert links.search(short)
    found = [links.sub(r"([results/\1](../results/\1))", line[1]) for line in rows]
    assert found == [line[1] for line in in_full]
    rests_on = [line[2] for line in in_full[2:] if line[2]]
    assert rests_on and not any(basis in short for basis in rests_on)
    assert "95 % over" in full and "95 % over" not in short and "one-sided" not in short
    # README names the paper at its top
    assert PAPER not in short and ("(figure 3)" in short) == (f"({PAPER}, figure 3)" in full) == (name == "claims")


def test_a_claim_that_was_not_measured_names_no_folder(tmp_path: Path) -> None:
    """The folders that can decide are looked into in their order; none of them is here."""
    assert documents.DECIDING[0] not in documents.BLOCKS["own"](tmp_path)
    assert documents.BLOCKS["claims"](tmp_path).count("Not measured: `sbeval ") == len(CLAIMS)
