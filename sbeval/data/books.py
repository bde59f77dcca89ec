"""Build the corpus `books` from public repositories of public-domain texts, byte for byte:

    python -m sbeval.data.books CLONES books/

It writes the splits of the committed results (DEFAULT); names of others may follow. CLONES has clones of the
repositories in SOURCES, each under its name. `books.tsv.xz` lists every document: split, id, source, path, title,
author, bytes, SHA-256 of the text, and edits. Rules turn a file into paragraphs; the edits are where the corpus
differs from them. A text that comes out different is an error.
"""

import hashlib
import json
import lzma
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sbeval.errors import InputError, choose, first_line
from sbeval.runtime.files import replacing

# repository and commit by name
SOURCES = {
    "Gutenberg_Text": ("rcdm-uga/Gutenberg_Text", "a0b16d35a9851168ce9ac649851c17b7ab08d48e"),
    "100_english_novels": ("computationalstylistics/100_english_novels", "143e601875d70e195f2cc5ebd8b034609271194d"),
    "ELTeC-eng": ("COST-ELTeC/ELTeC-eng", "3db3b6738a836f0e1b276b6c9703e42f4297f978"),
}
DEFAULT = ("train_core", "valid", "test")
START = re.compile(r"\*\*\* ?START OF TH(?:IS|E) PROJECT GUTENBERG.*?\*\*\*|\*END[ *]*THE SMALL PRINT!.*?\*END\*", re.S)
END = re.compile(r"\*\*\* ?END OF TH(?:IS|E) PROJECT GUTENBERG|^ *End of (?:the |this )?Project Gutenberg", re.M)
DROPPED = re.compile(r"\[Illustration|Produced by|E-text prepared by|Transcribed from|This eBook was produced by")
# lines shorter than this are verse, addresses, lists; so are lines that are indented
SHORT, INDENT = 49, 2
LINES = ("prose", "kept", "stripped", "joined", "raw", "outer", "spaced")
TEI = "{http://www.tei-c.org/ns/1.0}"


@dataclass(frozen=True, slots=True)
class Document:
    """A row of the manifest.

    lines: how those of a paragraph become its text, a name in LINES. edits: (start, end, new) replace the paragraphs
    start <= i < end of the rules; an integer in `new` is the same paragraph in another way, by its number in LINES.
    """

    split: str
    id: str
    source: str
    path: str
    title: str
    author: str
    bytes: int
    sha256: str
    lines: str
    edits: Sequence[tuple[int, int, Sequence[str | int]]]


def manifest() -> list[Document]:
    """Return the documents in the order of the corpus."""
    packed = (resources.files("sbeval") / "data" / "books.tsv.xz").read_bytes()
    head, *lines = lzma.decompress(packed).decode().rstrip("\n").split("\n")
    documents = []
    for line in lines:
        row: dict[str, Any] = dict(zip(head.split("\t"), line.split("\t"), strict=True))
        parsed = {"path": json.loads(row["path"]), "bytes": int(row["bytes"]), "edits": json.loads(row["edits"])}
        documents.append(Document(**row | parsed))
    return documents


def blocks(raw: bytes, source: str) -> list[list[str]]:
    """Return the lines of each paragraph of a file, without what the rules of its source drop."""
    if source == "ELTeC-eng":
        return [[paragraph] for paragraph in _tei(raw)]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if source == "Gutenberg_Text":
        start, end = START.search(text), END.search(text)
        text = text[start.end() if start else 0 : end.start() if end else len(text)]
    return [block for block in _blocks(text) if not DROPPED.match(block[0].strip())]


def paragraph(block: Sequence[str], lines: str) -> str:
    """Return the text of a paragraph, with its lines treated as a name in LINES says.

    `prose` joins the lines of prose and keeps those of verse, without their common indent. Separators are `* * *`.
    """
    if not any(re.search(r"\w", line) for line in block) and "*" in block[0]:
        return "* * *"
    longest = max(map(len, block))
    deepest = max(len(line) - len(line.lstrip()) for line in block)
    if lines == "outer":
        return "\n".join(block).strip()
    if lines == "spaced":
        return " ".join(line.strip() for line in block).replace("\xa0", " ")
    if len(block) == 1 or lines == "stripped":
        return "\n".join(line.strip() for line in block)
    if lines == "kept" or (lines == "prose" and (deepest >= INDENT or longest < SHORT)):
        return textwrap.dedent("\n".join(block))
    return " ".join(line if lines == "raw" else line.strip() for line in block)


def text_of(document: Document, raw: bytes) -> str:
    """Return a document's text; raise InputError if it is not that of the manifest."""
    parts = blocks(raw, document.source)
    found = [paragraph(block, document.lines) for block in parts]
    for start, end, new in reversed(document.edits):
        found[start:end] = [
            given if isinstance(given, str) else paragraph(parts[start + index], LINES[given])
            for index, given in enumerate(new)
        ]
    text = "\n\n".join(found) + "\n"
    if hashlib.sha256(text.encode()).hexdigest() != document.sha256:
        raise InputError(f"{document.path} of {document.source} is not the file that {document.id} was made from")
    return text


def build(clones: Path, out: Path, splits: Sequence[str] = DEFAULT) -> Mapping[str, int]:
    """Write a JSONL file for each split, with `id`, `title`, `author` and `text`; return the documents of each.

    Raise InputError for a repository or commit that is missing.
    """
    counts: dict[str, int] = {}
    out.mkdir(parents=True, exist_ok=True)
    documents = manifest()
    known = dict.fromkeys(document.split for document in documents)
    for split in [choose("split", name, known) for name in splits]:
        wanted = [document for document in documents if document.split == split]
        with replacing(out / f"{split}.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for document, raw in zip(wanted, _read(clones, wanted), strict=True):
                line = {"id": document.id, "title": document.title, "author": document.author}
                file.write(json.dumps(line | {"text": text_of(document, raw)}, ensure_ascii=False) + "\n")
        counts[split] = len(wanted)
    return counts


def _read(clones: Path, documents: Sequence[Document]) -> Iterator[bytes]:
    """Yield the files of documents, from their commits."""
    for document in documents:
        repository, commit = SOURCES[document.source]
        folder = clones / document.source
        command = ["git", "-C", str(folder), "cat-file", "blob", f"{commit}:{document.path}"]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise InputError(
                f"{folder} lacks {document.path!r} of commit {commit[:12]}: "
                f"git clone https://github.com/{repository} {folder}"
            )
        yield done.stdout


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield runs of lines that are not blank."""
    block: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []


def _tei(raw: bytes) -> list[str]:
    """Return the headings, paragraphs and lines of verse of a TEI file."""
    body = ET.fromstring(raw).find(f"{TEI}text/{TEI}body")
    assert body is not None, "a TEI file has a body"
    return [
        " ".join("".join(part.itertext()).split())
        for part in body.iter()
        if part.tag in (f"{TEI}head", f"{TEI}p", f"{TEI}l")
    ]


def main() -> None:
    """Build the corpus from the command line."""
    if len(sys.argv) < 3:
        raise SystemExit("python -m sbeval.data.books CLONES OUT [SPLIT ...]")
    try:
        for split, count in build(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or DEFAULT).items():
            print(f"{split}: {count} documents")
    except InputError as error:
        raise SystemExit(f"sbeval: {first_line(error)}") from None


if __name__ == "__main__":
    main()
