"""The corpus `books` is built from clones by its manifest, and anything else than its bytes is an error."""

import dataclasses
import hashlib
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from sbeval.data import books
from sbeval.data.books import Document
from sbeval.errors import InputError

RAW = """Title: A Book\r
\r
*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\r
\r
Produced by Nobody\r
\r
A line of prose that is long enough for it to be joined\r
with the next.\r
\r
    *       *       *\r
\r
    Verse is kept,\r
      and so is its shape.\r
\r
[Illustration]\r
\r
*** END OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\r
Licence\r
"""
TEXT = """A line of prose that is long enough for it to be joined with the next.

* * *

Verse is kept,
  and so is its shape.
"""


def document(text: str = TEXT, **changes: object) -> Document:
    return dataclasses.replace(
        Document(
            split="test", id="pg1", source="Gutenberg_Text", path="A, B/Book\r.txt", title="Book", author="A B",
            bytes=len(text), sha256=hashlib.sha256(text.encode()).hexdigest(), lines="prose", edits=[],
        ),
        **changes,  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_manifest_has_every_document_once() -> None:
    documents = books.manifest()
    assert Counter(document.split for document in documents) == {
        "train_core": 340, "train_extra1": 398, "train_extra2": 350, "train_extra3": 315, "valid": 12, "test": 27
    }  # fmt: skip
    assert len({document.id for document in documents}) == len({document.sha256 for document in documents}) == 1442
    assert {document.source for document in documents} == set(books.SOURCES)
    assert all(document.lines in books.LINES and len(document.sha256) == 64 for document in documents)


def test_rules_drop_the_licence_and_join_prose_but_not_verse() -> None:
    assert books.text_of(document(), RAW.encode()) == TEXT
    assert books.text_of(document(), b"\xef\xbb\xbf" + RAW.encode()) == TEXT


def test_edits_replace_paragraphs_by_texts_or_other_ways_with_their_lines() -> None:
    text = "Prose.\n\nVerse is kept,\n      and so is its shape.\n"
    edited = document(text, edits=[(0, 2, ["Prose."]), (2, 3, [books.LINES.index("outer")])])
    assert books.text_of(edited, RAW.encode()) == text


def test_headings_and_paragraphs_of_a_tei_file() -> None:
    body = "<text><body><div><head>One</head><p>A  <hi>b</hi>\nc.</p></div></body></text>"
    raw = f'<TEI xmlns="http://www.tei-c.org/ns/1.0">{body}</TEI>'.encode()
    assert books.blocks(raw, "ELTeC-eng") == [["One"], ["A b c."]]


@pytest.fixture
def clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with one book, whose commit is the one that the manifest asks for."""
    folder = tmp_path / "clones" / "Gutenberg_Text"
    (folder / "A, B").mkdir(parents=True)
    (folder / "A, B" / "Book\r.txt").write_bytes(RAW.encode())
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a book"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setitem(books.SOURCES, "Gutenberg_Text", ("someone/texts", head))
    return tmp_path / "clones"


def test_a_corpus_is_built_of_a_file_for_each_split(
    clones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "manifest", lambda: [document(), document(id="pg2", split="valid")])
    assert books.build(clones, tmp_path / "books", ["test", "valid"]) == {"test": 1, "valid": 1}
    (line,) = (tmp_path / "books" / "test.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": "pg1", "title": "Book", "author": "A B", "text": TEXT}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (document("Another text."), "is not the file that pg1 was made from"),
        (
            document(path="A, B/Other.txt"),
            "lacks 'A, B/Other.txt' of commit .* git clone https://github.com/someone/texts",
        ),
    ],
)
def test_another_file_is_an_error_and_leaves_no_corpus(
    clones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Document, message: str
) -> None:
    monkeypatch.setattr(books, "manifest", lambda: [wrong])
    with pytest.raises(InputError, match=message):
        books.build(clones, tmp_path / "books", ["test"])
    assert list((tmp_path / "books").iterdir()) == []
