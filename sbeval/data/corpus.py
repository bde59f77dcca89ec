"""Corpora: the texts of a source, tokenized once and stored. See `sources` for what a source can be."""

import array
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from sbeval.data import sources
from sbeval.data.python_source import Role
from sbeval.data.sources import ROLES, Document, Source
from sbeval.data.token_file import TokenFile, Tokens
from sbeval.data.tokenizer import Ids, Library, Tokenizer, is_trained
from sbeval.data.tokenizer import load as load_tokenizer
from sbeval.data.tokenizer import read as read_tokenizer
from sbeval.errors import InputError, first_line
from sbeval.runtime.files import clear, locked, sha256, storing

# part of a store's key: a store of another format is not opened
FORMAT = 3
BATCH_CHARACTERS = 1 << 23


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Tokenized documents, concatenated, each followed by the end-of-document token.

    tokens: (n,) uint16 or uint32, in a file. offsets: (documents + 1,) int64, the start of each document.
    """

    corpus: str
    role: Role
    tokens: Tokens
    offsets: npt.NDArray[np.int64]
    documents: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document, (documents,), without its end-of-document token."""
        return np.diff(self.offsets) - 1

    def document(self, index: int) -> Ids:
        """Return the tokens of a document without its end-of-document token."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]

    def windows(self, length: int, per_document: int = 1) -> list[tuple[int, int]]:
        """Choose the first disjoint windows of `length` tokens of each document, `per_document` at most.

        Return (document, start within it) of each. Raise InputError when no document is long enough.
        """
        if min(length, per_document) < 1:
            raise InputError(
                f"windows need a length and a number per document of at least 1; got {length} and {per_document}"
            )
        counts = np.minimum(self.lengths // length, per_document)
        if not counts.any():
            # the last token of a window is only predicted
            longest = int(self.lengths.max())
            remedy = (
                f"use --eval-len {longest - 1} or less, or another --corpus" if longest > 1 else "use another --corpus"
            )
            raise InputError(
                f"no document of corpus {self.corpus!r} ({self.role}) has {length} tokens (a context of {length - 1} "
                f"and one to predict); the longest has {longest}: {remedy}"
            )
        return [(document, start * length) for document, count in enumerate(counts) for start in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """Three splits and their tokenizer. `digest` changes with any token of train or test.

    `valid` is for the held-out loss during training, reported nowhere else, and can be empty. `versions` are those of
    the software whose source is the text.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    train: Split
    valid: Split
    test: Split
    versions: Mapping[str, str]


def open(
    spec: str = "stdlib",
    *,
    tokenizer: str,
    cache_dir: Path,
    max_tokens: int | None = None,
    text_field: str = "text",
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = print,
) -> Corpus:
    """Open a corpus; the first call tokenizes it and stores it in cache_dir/corpora/<digest>.

    spec: as in `sources`. tokenizer: as in `sbeval.data.tokenizer`. max_tokens: train ends with the document that
    reaches it; test and valid stay whole, except those of a dataset of the hub, which then end with the document that
    reaches 2^22 and 2^18 tokens. text_field: the field of a row that holds its text. progress: called with the number
    of tokens added since its last call. say: names a store that is not as it was written, which is tokenized anew.

    Changed files are tokenized anew too; a dataset that changes on the hub is not. Raise InputError for files that
    cannot be read, hold no text, or too little to split.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1; got {max_tokens}")
    source = sources.source(spec, text_field)
    folder = _folder(source, tokenizer, cache_dir, max_tokens)
    # without the lock: large stores are checked by many processes at once
    if _fault(folder) is not None:
        with locked(folder):
            # another process may have built it meanwhile
            if (fault := _fault(folder)) is not None:
                if folder.exists():
                    say(f"{fault}: {source.name!r} is tokenized again")
                _build(folder, source, tokenizer, cache_dir, max_tokens, progress or (lambda tokens: None))
    return _read_store(folder, source.name, tokenizer, cache_dir)


def stored(
    spec: str, *, tokenizer: str, cache_dir: Path, max_tokens: int | None = None, text_field: str = "text"
) -> Corpus | None:
    """Return a corpus that `open` has stored; None without such a store. Writes nothing, and asks no hub."""
    if not (tokenizer == "bytes" or is_trained(tokenizer) or os.path.exists(tokenizer)):
        return None
    source = sources.source(spec, text_field)
    folder = _folder(source, tokenizer, cache_dir, max_tokens)
    return _read_store(folder, source.name, tokenizer, cache_dir) if _fault(folder) is None else None


def _folder(source: Source, tokenizer: str, cache_dir: Path, max_tokens: int | None) -> Path:
    definition = tokenizer if is_trained(tokenizer) else load_tokenizer(tokenizer, cache_dir=cache_dir).digest
    return cache_dir / "corpora" / sources.digest(str(FORMAT), source.digest, definition, str(max_tokens))


def _read_store(folder: Path, name: str, spec: str, cache_dir: Path) -> Corpus:
    if is_trained(spec):
        tokenizer: Tokenizer = read_tokenizer(folder / "tokenizer.json", name=spec)
    else:
        tokenizer = load_tokenizer(spec, cache_dir=cache_dir)
    splits = {
        role: Split(
            corpus=name,
            role=role,
            tokens=TokenFile(folder / f"{role}.npy"),
            offsets=np.load(folder / f"{role}_offsets.npy"),
            documents=tuple(json.loads((folder / f"{role}_documents.json").read_text(encoding="utf-8"))),
        )
        for role in ROLES
    }
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Corpus(name=name, digest=meta["digest"], tokenizer=tokenizer, **splits, versions=meta["versions"])


def _fault(folder: Path) -> str | None:
    """Return what of a store is not as it was written, before anything is opened; None for a whole store."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        if meta.pop("seal") != _seal(meta):
            return f"{path} is not as it was written"
        for name, (size, digest) in meta["files"].items():
            path = folder / name
            found = path.stat()
            if found.st_size != size or _sha256(path, found.st_size, found.st_mtime_ns) != digest:
                return f"{path} is not as it was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{path} cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
    return None


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Return the digest of a file, once in a process unless its size or its time of change is another."""
    return sha256(path)


def _seal(meta: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _build(
    folder: Path, source: Source, spec: str, cache_dir: Path, max_tokens: int | None, progress: Callable[[int], None]
) -> None:
    """Write a store under a temporary name and rename it when complete, so that nobody reads a partial one."""
    if next(source.documents("train"), None) is None:
        raise InputError(f"corpus {source.name!r} holds no text to train on")
    if next(source.documents("test"), None) is None:
        raise InputError(
            f"corpus {source.name!r} has too little text for a train and a test split: "
            "give two documents or more, or files whose names start with train and test"
        )
    unfinished = folder.with_suffix(".unfinished")
    # we hold the lock: an existing folder was left by a process that was killed
    clear(unfinished)
    try:
        with storing(folder):
            unfinished.mkdir()
        tokenizer = load_tokenizer(
            spec, train_texts=lambda: (document.text for document in source.documents("train")), cache_dir=cache_dir
        )
        if is_trained(spec):
            cast(Library, tokenizer).save(unfinished / "tokenizer.json")
        limits = {"train": max_tokens, **source.limits} if max_tokens else {}
        with storing(folder):
            digests = {
                role: _write_split(unfinished, role, source.documents(role), tokenizer, limits.get(role), progress)
                for role in ROLES
            }
        meta = {
            "source": source.name,
            "tokenizer": tokenizer.digest,
            # without valid, on which no result depends
            "digest": sources.digest(tokenizer.digest, digests["train"], digests["test"]),
            "versions": dict(source.versions),
            "files": {path.name: (path.stat().st_size, sha256(path)) for path in sorted(unfinished.iterdir())},
        }
        with storing(folder):
            sealed = {**meta, "seal": _seal(meta)}
            (unfinished / "meta.json").write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")
            _set_aside(folder)
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    """Remove a damaged store, if there is one; processes that have opened its files keep these."""
    if folder.is_dir() and not folder.is_symlink():
        damaged = folder.with_suffix(".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    else:
        folder.unlink(missing_ok=True)


def _write_split(
    folder: Path,
    role: Role,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    limit: int | None,
    progress: Callable[[int], None],
) -> str:
    """Write a split's three files document by document, and return the digest of its tokens."""
    names: list[str] = []
    offsets = array.array("q", [0])
    digest = hashlib.sha256()
    with (folder / f"{role}.npy").open("wb") as file:
        _write_header(file, tokenizer.dtype, 0)
        start = file.tell()
        for document, ids in encoded(documents, tokenizer):
            tokens = np.append(ids, ids.dtype.type(tokenizer.eos))
            file.write(tokens.data)
            digest.update(tokens.data)
            names.append(document.name)
            offsets.append(offsets[-1] + len(tokens))
            progress(len(tokens))
            if limit is not None and offsets[-1] >= limit:
                break
        file.seek(0)
        _write_header(file, tokenizer.dtype, offsets[-1])
        assert file.tell() == start, "numpy pads the header, so that the count can grow"
    np.save(folder / f"{role}_offsets.npy", np.array(offsets, dtype=np.int64))
    (folder / f"{role}_documents.json").write_text(json.dumps(names), encoding="utf-8")
    return digest.hexdigest()


def _write_header(file: BinaryIO, dtype: np.dtype[Any], count: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def encoded(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, Ids]]:
    """Encode documents in batches that keep all cores busy and memory small."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield from zip(batch, tokenizer.encode_batch([item.text for item in batch]), strict=True)
            batch, characters = [], 0
    yield from zip(batch, tokenizer.encode_batch([item.text for item in batch]), strict=True)
