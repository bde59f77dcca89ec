"""Texts of RULER's prompts: an essay, questions with their documents, and pieces of text with their tokens."""

import functools
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbeval.data.tokenizer import Ids, Tokenizer
from sbeval.errors import InputError

Counted = npt.NDArray[np.int64]
# the longest length is 131072 tokens, and a word has at least one
ESSAY_WORDS = 131072
# a sentence ends with a word like the first if the next word is like the second
ENDS, BEGINS = re.compile(r"[.!?][\"'”’)\]]*$"), re.compile(r"[\"'“‘(\[_]*[A-Z]")


class Pieces:
    """Texts of which prompts are made, each encoded once: numbers of tokens (n,), and the tokens, concatenated."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self.texts, self._tokenizer = texts, tokenizer

    @functools.cached_property
    def _encoded(self) -> tuple[Ids, Counted]:
        unique = list(dict.fromkeys(self.texts))
        encoded = dict(zip(unique, self._tokenizer.encode_batch(unique), strict=True))
        ids = [encoded[text] for text in self.texts]
        return np.concatenate(ids), np.array([len(item) for item in ids], dtype=np.int64)

    @functools.cached_property
    def _starts(self) -> Counted:
        return np.concatenate([[0], np.cumsum(self.tokens)])

    @property
    def tokens(self) -> Counted:
        return self._encoded[1]

    @functools.cached_property
    def apart(self) -> tuple[bool, bool]:
        """Return whether all texts begin with white space, and whether none ends with it."""
        return all(text[:1].isspace() for text in self.texts), not any(text[-1:].isspace() for text in self.texts)

    def part(self, indices: Sequence[int]) -> "Part":
        return Part(self, indices)

    def ids(self, indices: Sequence[int]) -> Ids:
        """Return the tokens of these texts, concatenated."""
        ids, starts = self._encoded[0], self._starts
        if isinstance(indices, range):
            return ids[starts[indices.start] : starts[max(indices.start, indices.stop)]]
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.tokens[chosen]
        # index of each token within its text
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens: Ids = ids[np.repeat(starts[chosen], lengths) + within]
        return tokens


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some of the pieces, in the order of `indices`."""

    pieces: Pieces
    indices: Sequence[int]

    @property
    def text(self) -> str:
        return "".join([self.pieces.texts[index] for index in self.indices])

    @property
    def tokens(self) -> int:
        return int(self.pieces.tokens[list(self.indices)].sum())

    @property
    def ids(self) -> Ids:
        return self.pieces.ids(self.indices)


class Tables:
    """Pieces of one tokenizer; those `kept` under a name are encoded once for all prompts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._kept: dict[str, Pieces] = {}
        self._sums: dict[str, Counted] = {}

    def new(self, texts: Sequence[str]) -> Pieces:
        return Pieces(texts, self.tokenizer)

    def kept(self, name: str, texts: Callable[[], Sequence[str]]) -> Pieces:
        if name not in self._kept:
            self._kept[name] = self.new(texts())
        return self._kept[name]

    def sums(self, name: str, pieces: Pieces) -> Counted:
        """Return the numbers of tokens of the first 0, 1, 2, ... of the pieces kept under this name."""
        if name not in self._sums:
            self._sums[name] = np.concatenate([[0], np.cumsum(pieces.tokens)])
        return self._sums[name]

    def around(self, template: str) -> tuple[Part, Part]:
        """Return the text before and after {context}; white space before it belongs to the context's first piece."""
        head, tail = template.split("{context}")
        return self.new([head.rstrip()]).part([0]), self.new([tail]).part([0])

    def repeated(self, texts: Sequence[str]) -> Part:
        """Return a part of these texts, many of which are equal."""
        unique = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        return self.new(list(unique)).part([unique[text] for text in texts])

    def woven(self, ones: Pieces, first: Sequence[int], others: Pieces, second: Sequence[int]) -> list[Part]:
        """Return alternating pieces, one of the first, one of the second, and so on."""
        both = self.kept(f"{id(ones)} {id(others)}", lambda: [*ones.texts, *others.texts])
        indices = np.stack([np.asarray(first), np.asarray(second) + len(ones.texts)], axis=1).ravel()
        return [both.part(indices.tolist())]


def opened(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with a line end for the space before the first piece: a context begins on its own line."""
    index = next(index for index, part in enumerate(parts) if len(part.indices))
    part = parts[index]
    first = "\n" + part.pieces.texts[part.indices[0]].removeprefix(" ")
    begin = Pieces([first], part.pieces._tokenizer).part([0])
    return [begin, part.pieces.part(part.indices[1:]), *parts[index + 1 :]]


@dataclass(frozen=True, slots=True, eq=False)
class Essay:
    """A text in words, repeated up to ESSAY_WORDS, and the index of the first word of each sentence."""

    words: list[str]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its answers, and indices of the documents that it needs and of others on its subject."""

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Questions about documents, without duplicate documents."""

    path: str
    documents: list[str]
    asked: list[Asked]


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """The texts of prompts, and a digest of each by name, the essay's under `essay`."""

    essay: Essay
    questions: dict[str, Questions | None]
    digests: dict[str, str] = field(default_factory=dict)


def load(essays: str | None, squad: str | None, hotpot: str | None) -> Sources:
    """Read the files; without `essays` the essay is Walden. Raise InputError for unreadable files."""
    text = _walden() if essays is None else _essays(Path(essays))
    loaded = {"squad": squad and _squad(Path(squad)), "hotpot": hotpot and _hotpot(Path(hotpot))}
    questions = {name: value or None for name, value in loaded.items()}
    digests = {"essay": _digest(text)}
    for name, value in questions.items():
        if value is not None:
            digests[name] = _digest(json.dumps([value.documents, [(q.question, q.answers) for q in value.asked]]))
    return Sources(essay=_essay(text), questions=questions, digests=digests)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _walden() -> str:
    packed = resources.files("sbeval").joinpath("walden.txt.xz").read_bytes()
    return lzma.decompress(packed).decode()


def _essay(text: str) -> Essay:
    words = text.split()
    repeated = (words * -(-ESSAY_WORDS // len(words)))[: max(ESSAY_WORDS, len(words))]
    starts = [0] + [
        index for index in range(1, len(repeated)) if ENDS.search(repeated[index - 1]) and BEGINS.match(repeated[index])
    ]
    return Essay(repeated, starts)


def _essays(path: Path) -> str:
    """Return the text of a file, or of a folder's .txt files and `text` fields of its JSON files, sorted by path."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    texts: list[str] = []
    for file in files:
        if file.suffix in (".json", ".jsonl"):
            texts += [str(row["text"]) for row in _rows(file) if isinstance(row, dict) and "text" in row]
        elif file == path or file.suffix in (".txt", ".md"):
            texts.append(_read(file))
    text = " ".join(texts)
    if not text.split():
        raise InputError(f"--essays {path} has no text: give a text file, JSON with a field text, or a folder")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _rows(path: Path) -> list[Any]:
    """Return the rows of a JSON file, one array or object, or of JSON Lines."""
    text = _read(path)
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    return rows if isinstance(rows, list) else [rows]


def _squad(path: Path) -> Questions:
    """Read SQuAD v2 as published, or JSON Lines of questions `title, ctx, question, answers, impossible`, whose texts
    are rows `id, text` of a file of the same name but `contexts` for `questions`."""
    try:
        triples = list(_published(_rows(path)) if path.suffix != ".jsonl" else _split(path))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"--squad {path} is not SQuAD: {type(error).__name__} {error}") from None
    documents = sorted({text for _, text, _ in triples})
    index_of = {text: index for index, text in enumerate(documents)}
    articles: dict[str, dict[int, None]] = {}
    for title, text, _ in triples:
        articles.setdefault(title, {})[index_of[text]] = None
    asked = [
        Asked(
            question,
            tuple(answers),
            (index_of[text],),
            tuple(other for other in articles[title] if other != index_of[text]),
        )
        for title, text, pairs in triples
        for question, answers in pairs
        if answers
    ]
    return _checked(Questions(str(path), documents, asked), "--squad")


Triple = tuple[str, str, list[tuple[str, list[str]]]]


def _published(rows: list[Any]) -> Iterator[Triple]:
    for article in rows[0]["data"]:
        for paragraph in article["paragraphs"]:
            questions = [
                (item["question"], [answer["text"] for answer in item["answers"]])
                for item in paragraph["qas"]
                if not item.get("is_impossible")
            ]
            yield article["title"], paragraph["context"], questions


def _split(path: Path) -> Iterator[Triple]:
    beside = path.with_name(path.name.replace("questions", "contexts"))
    if beside == path or not beside.exists():
        raise InputError(
            f"--squad {path} has no file of contexts beside it, of the same name but contexts for questions"
        )
    texts = {row["id"]: row["text"] for row in _rows(beside)}
    for row in _rows(path):
        yield row["title"], texts[row["ctx"]], [] if row["impossible"] else [(row["question"], row["answers"])]


def _hotpot(path: Path) -> Questions:
    """Read HotpotQA's distractor setting: JSON as published, or JSON Lines."""
    rows = _rows(path)
    try:
        texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in rows]
        documents = sorted({text for context in texts for text in context})
        index_of = {text: index for index, text in enumerate(documents)}
        asked = [
            Asked(row["question"], (row["answer"],), tuple(dict.fromkeys(index_of[text] for text in context)), ())
            for row, context in zip(rows, texts, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--hotpot {path} is not HotpotQA: {type(error).__name__} {error}") from None
    return _checked(Questions(str(path), documents, asked), "--hotpot")


def _checked(questions: Questions, option: str) -> Questions:
    if not questions.asked:
        raise InputError(f"{option} {questions.path} has no question with an answer")
    return questions
