"""Sources of texts: the standard library, files, or the Hugging Face hub.

A specification is one of

    python             the source of the running Python and of the distributions that sbeval needs: 6,200 documents,
                       113 MB; see `python_source` for what is left out
    stdlib             the standard library of the running Python, without tests: some 700 documents, 11 MB
    PATH               a file or a folder; text (a document a file), .jsonl or .json (a document a line), .parquet (a
                       document a row); each also as .gz, .bz2, .xz or .zst
    hf:NAME[:CONFIG]   a dataset of the hub, or of a local folder, also one that save_to_disk wrote, streamed

Documents are split into train, test and valid, the last for the held-out loss during training; n is the SHA-256 of a
document's name:

    python   by distribution, see `python_source`
    stdlib   by file: test where n is divisible by 8, valid where n % 32 is 1
    PATH     by names that start with `train` and with `test` (or `valid`, when there is no test): those of files, or of
             folders on the way to them; other files are then left out. A given file that starts with `train` is the
             only one of train, with the test files of its kind beside it. Names that start with `valid` beside these
             are valid. Without such names the first document is train, the second test, and of the rest those with n
             divisible by 10 are test
    hf       the dataset's own splits train, test and validation; validation is test when there is no test; with train
             alone as for a PATH without such names

    Without a split named valid, it is drawn from train, after its first document: where n % 32 is 1.

In a folder with .jsonl, .json or .parquet files only these are read: a README beside them is not data. Hidden files and
documents without text are left out.
"""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # likewise

from sbeval.config import HUB_NAME
from sbeval.data import python_source
from sbeval.data.python_source import Role
from sbeval.errors import InputError, reading, shown, spelled
from sbeval.runtime.files import check_not_pointer, sha256

ROLES: tuple[Role, ...] = ("train", "valid", "test")
# the most test and valid tokens of a hub dataset that are stored when the train tokens are limited
HUB_TOKENS: Mapping[Role, int] = {"test": 1 << 22, "valid": 1 << 18}
# one in VALID documents is drawn for valid
VALID = 32
# suffixes of packed files, and how many times smaller each makes books in JSON lines at its default level. What .gz and
# .zst state may be that of a part of the file; the index of .xz takes more code to read than an estimate is worth
PACKED = {".gz": 2.7, ".bz2": 3.6, ".xz": 3.5, ".zst": 2.4}
TABLES = (".jsonl", ".json", ".parquet")


class Document(NamedTuple):
    """One text and its origin: `path/to/file.txt` or `path/to/file.jsonl:12`."""

    name: str
    text: str


class Size(NamedTuple):
    """Bytes of text to train on, and of the other splits."""

    train: int
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source of texts. `digest` identifies the texts; each call of `documents` reads a split from its start.

    limits: the most tokens of other splits when train is limited. versions: of the software whose source is the text.
    whole: reads all documents, where neither files nor the source itself say which are for test; otherwise None.
    """

    name: str
    digest: str
    documents: Callable[[Role], Iterator[Document]]
    limits: Mapping[Role, int] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole: Callable[[], Iterator[Document]] | None = None


def source(spec: str, field: str) -> Source:
    """Return the source that a specification (see the module) names; `field` of a row holds its text.

    Raise InputError when it does not exist or has no files; their contents are read later.
    """
    if spec == "stdlib":
        return _stdlib(python_source.stdlib_folder())
    if spec == "python":
        return _python()
    if spec.startswith("hf:"):
        check_dataset(spec)
        return _hub(spec.removeprefix("hf:"), field)
    path = Path(spec)
    # a device or a pipe has no end, or is gone when it is read again
    if not os.path.isdir(path) and not os.path.isfile(path):
        raise _unknown(spec)
    with reading(f"corpus {spec!r}"):
        return _files(path, field)


def check_dataset(spec: str) -> None:
    """Raise InputError for a specification `hf:NAME[:CONFIG]` without a name, or whose name is no folder and cannot be
    one on the hub. Asks no hub."""
    name = spec.removeprefix("hf:").partition(":")[0]
    if not name:
        raise _unknown(spec)
    if not os.path.isdir(name) and not HUB_NAME.fullmatch(name):
        raise InputError(f"corpus {shown(spec)!r}: there is no folder {shown(name)!r}, and it is no name on the hub")


def check_package(spec: str) -> None:
    """Raise InputError where the package that reads a dataset `hf:NAME[:CONFIG]` is not installed."""
    if not importlib.util.find_spec("datasets"):
        raise _without_package(spec.removeprefix("hf:").partition(":")[0])


def _unknown(spec: str) -> InputError:
    known = "python, stdlib, an existing file or folder, or hf:NAME[:CONFIG]"
    return InputError(f"unknown corpus {shown(spec)!r}; give {known}")


def _without_package(name: str) -> InputError:
    return InputError(f"corpus hf:{name} needs datasets: pip install 'sbeval[hf]'")


def size(spec: str) -> Size | None:
    """Estimate how much text a specification names, without reading or unpacking it; None for a dataset of the hub."""
    if spec.startswith("hf:"):
        return None
    shares: list[tuple[Path, float]] = []
    if spec == "python":
        shares = [(file.path, float(file.role == "train")) for file in python_source.installed()[1]]
    elif spec == "stdlib":
        folder = python_source.stdlib_folder()
        files = python_source.stdlib_files(folder)
        shares = [(folder / name, float(_stdlib_role(name) == "train")) for name in files]
    elif os.path.exists(spec):
        shares = _shares(Path(spec))
    sizes = [(_text_size(path), share) for path, share in shares]
    total, train = sum(size for size, _ in sizes), sum(size * share for size, share in sizes)
    return Size(round(train), round(total - train)) if total else None


def _shares(path: Path) -> list[tuple[Path, float]]:
    """Return the files of a path, each with about what share of its text is to train on."""
    folder = path if path.is_dir() else path.parent
    chosen, splits = _chosen(path, folder)
    named: Collection[Role] = splits or ()
    train = splits["train"] if splits else chosen
    if any(_kind(name) in TABLES for name in train):
        share = (1.0 if "test" in named else 0.9) * (1.0 if "valid" in named else 1 - 1 / VALID)
        shares = dict.fromkeys(train, share)
    else:
        # a file is a document, whose name says its split
        drawn = {document.name for document in _drawn((Document(spelled(name), "") for name in train), "train", named)}
        shares = {name: float(spelled(name) in drawn) for name in train}
    return [(folder / name, shares.get(name, 0.0)) for name in chosen]


def _text_size(path: Path) -> float:
    """Return about how many bytes a file has unpacked; of parquet with all its columns."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size * PACKED.get(path.suffix.lower(), 1.0)
    with reading(path, pa.ArrowException):
        metadata = pq.read_metadata(path)
    return float(sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)))


def _stdlib(folder: Path) -> Source:
    files = python_source.stdlib_files(folder)

    def documents(role: Role) -> Iterator[Document]:
        for name in files:
            if role == _stdlib_role(name):
                yield Document(name, python_source.read(folder / name))

    parts = [sha256(folder / name) for name in files]
    return Source(name="stdlib", digest=digest(*files, *parts), documents=lambda role: _with_text(documents(role)))


def _stdlib_role(name: str) -> Role:
    number = _number(name)
    return "test" if number % 8 == 0 else "valid" if number % VALID == 1 else "train"


def _python() -> Source:
    versions, files = python_source.installed()
    # reads every file: not needed when the corpus is stored
    select = functools.cache(lambda: list(python_source.select(files)))

    def documents(role: Role) -> Iterator[Document]:
        for file in select():
            if file.role == role:
                yield Document(file.name, python_source.without_licence(python_source.read(file.path)))

    parts = [f"{file.role} {file.name} {sha256(file.path)}" for file in files]
    return Source(name="python", digest=digest(*parts), documents=documents, versions=versions)


def _files(path: Path, field: str) -> Source:
    folder = path if path.is_dir() else path.parent
    chosen, splits = _chosen(path, folder)
    if not chosen:
        raise InputError(f"folder {path} holds no file to read; give a folder of text, .jsonl, .json or .parquet files")

    def read(files: list[str]) -> Iterator[Document]:
        return _with_text(document for name in files for document in _read(folder / name, spelled(name), field))

    def documents(role: Role) -> Iterator[Document]:
        return _drawn(read(splits.get(role, splits["train"]) if splits else chosen), role, splits or ())

    parts = [f"{spelled(name)} {sha256(folder / name)}" for name in chosen]
    name = path.resolve().name if path.is_dir() else Path(_unpacked(path.name)).stem
    whole = None if splits else lambda: read(chosen)
    return Source(name=spelled(name), digest=digest(field, *parts), documents=documents, whole=whole)


def _chosen(path: Path, folder: Path) -> tuple[list[str], dict[Role, list[str]] | None]:
    """Return the files to read, sorted and relative to the folder, and their splits if their names give them."""
    paths = folder.rglob("*") if path.is_dir() else folder.iterdir()
    found = [item.relative_to(folder).as_posix() for item in paths if item.is_file() or item.is_symlink()]
    names = sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))
    links = [name for name in names if not (folder / name).is_file()]
    if path.is_dir():
        if links:
            what = f"{folder / spelled(links[0])} is a link to nothing or to a folder"
            raise InputError(f"{what}, which is not read: remove it, or copy there what it should be")
        names = [name for name in names if _kind(name) in TABLES] or names
        train = [name for name in names if _starts(name, "train")]
    else:
        names = [name for name in names if name not in links and _kind(name) == _kind(path.name)]
        train = [path.name] if _starts(path.name, "train") else []
    rest = [name for name in names if name not in train]
    test, valid = ([name for name in rest if _starts(name, role)] for role in ("test", "valid"))
    if train and test and valid:
        return train + test + valid, {"train": train, "test": test, "valid": valid}
    if train and (test or valid):
        return train + (test or valid), {"train": train, "test": test or valid}
    return (names if path.is_dir() else [path.name]), None


def _hub(spec: str, field: str) -> Source:
    dataset, _, config = spec.partition(":")
    short = dataset.rstrip("/").rsplit("/", 1)[-1]

    def documents(role: Role) -> Iterator[Document]:
        splits = _load_dataset(dataset, config)
        if "train" not in splits:
            raise InputError(f"dataset {dataset!r} has no split train, only {', '.join(splits)}")
        held_out = [name for name in ("test", "validation") if name in splits]
        named: dict[Role, str] = {"train": "train", **dict(zip(("test", "valid"), held_out, strict=False))}
        split = named.get(role, "train")
        rows = enumerate(splits[split])
        documents = _with_text(_document(f"{split}:{row}", values, field, dataset) for row, values in rows)
        # streams end early, change their columns or lose their connection
        with reading(f"dataset {dataset!r}", *_stream_errors()):
            yield from _drawn(documents, role, named if held_out else ())

    with reading(f"dataset {dataset!r}"):
        parts = [sha256(path) for path in sorted(Path(dataset).rglob("*")) if path.is_file()]
    name = f"{short}:{config}" if config else short
    return Source(name=name, digest=digest("hf", spelled(spec), field, *parts), documents=documents, limits=HUB_TOKENS)


def _load_dataset(name: str, config: str) -> Mapping[str, Iterable[object]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise _without_package(name) from None
    # a RuntimeError for datasets that are programs
    with reading(f"dataset {name!r}", RuntimeError, *_stream_errors()):
        # as `Dataset.save_to_disk` writes it; the folder of a DatasetDict has splits, which load_dataset reads
        if not config and os.path.isfile(os.path.join(name, "state.json")):
            return {"train": datasets.load_from_disk(name)}
        return cast(Mapping[str, Iterable[object]], datasets.load_dataset(name, config or None, streaming=True))


def _stream_errors() -> tuple[type[Exception], ...]:
    """Return what streaming from the hub raises, besides what `reading` knows."""
    names = ("datasets.exceptions.DatasetsError", "huggingface_hub.errors.HTTPError", "aiohttp.ClientError")
    found = [getattr(importlib.import_module(module), name) for module, _, name in (x.rpartition(".") for x in names)]
    return (LookupError, TypeError, zlib.error, lzma.LZMAError, pa.ArrowException, *found)


def _with_text(documents: Iterable[Document]) -> Iterator[Document]:
    return (document for document in documents if document.text and not document.text.isspace())


def _drawn(documents: Iterable[Document], role: Role, named: Collection[Role]) -> Iterator[Document]:
    """Draw a split from documents that also hold those of the unnamed splits (see the module)."""
    if role != "train" and role in named:
        yield from documents
        return
    for index, document in enumerate(documents):
        number = _number(document.name)
        drawn: Role = "train"
        if "test" not in named and (index == 1 or (index > 1 and number % 10 == 0)):
            drawn = "test"
        elif "valid" not in named and index > 0 and number % VALID == 1:
            drawn = "valid"
        if drawn == role:
            yield document


def _read(path: Path, name: str, field: str) -> Iterator[Document]:
    """Read the documents of one file, called `name` in messages and in the documents' names."""
    with _opened(path) as file:
        check_not_pointer(path, file.peek(64) if isinstance(file, io.BufferedReader) else b"")
        if _kind(name) in (".jsonl", ".json"):
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(f"{name}:{number}", _parsed(line, f"{name}:{number}"), field, name)
        elif _kind(name) == ".parquet":
            yield from _parquet(file, name, field)
        else:
            raw = file.read()
            if not _is_text(raw):
                raise InputError(f"{path} is not UTF-8 text: give text, .jsonl or .parquet files")
            yield Document(name, raw.decode("utf-8-sig"))


def _parsed(line: bytes, where: str) -> object:
    try:
        text = line.decode("utf-8-sig")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} (column {error.colno})"
        # an integer of more digits than Python reads; it is another field's, or not text
        except ValueError:
            return json.loads(text, parse_int=float)
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 text") from None
    except RecursionError:
        problem = "it is nested too deep"
    raise InputError(f"{where} is not JSON: {problem}; give one object a line")


def _parquet(file: BinaryIO, name: str, field: str) -> Iterator[Document]:
    # Parquet is read from its end: a compressed file must be unpacked first
    table = pq.ParquetFile(file if _unpacked(name) == name else pa.BufferReader(file.read()))
    columns = [field] if field in table.schema_arrow.names else None
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=columns):
        for values in _rows(batch, name, row):
            row += 1
            yield _document(f"{name}:{row}", values, field, name)


def _rows(batch: Any, name: str, before: int) -> list[Any]:
    """Return the rows of a batch, which begins after so many rows; InputError names one that is not UTF-8."""
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            raise InputError(f"{name}:{before + 1} is not UTF-8 text") from None
    return [row for index in range(batch.num_rows) for row in _rows(batch.slice(index, 1), name, before + index)]


def _document(name: str, row: object, field: str, origin: str) -> Document:
    """Return the text of a row, empty for null."""
    where = name if name.startswith(origin) else f"{origin} {name}"
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is not a JSON object but a {type(row).__name__}")
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise InputError(
            f"{where} has no field {field!r}; its fields: {fields}: give the one that holds text with --text-field"
        )
    text = row[field] if row[field] is not None else ""
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} holds a {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: field {field!r} holds half a surrogate pair, which is not text") from None
    return Document(name, text)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked; raise InputError when it cannot be read or is damaged."""
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        # in the standard library from Python 3.14 on
        ".zst": lambda packed: io.BufferedReader(pa.input_stream(str(packed), compression="zstd")),
    }
    with reading(path, lzma.LZMAError, zlib.error, pa.ArrowException):
        with openers.get(path.suffix.lower(), partial(Path.open, mode="rb"))(path) as file:
            yield file


def _kind(name: str) -> str:
    """Return the suffix of a file's format: `.jsonl` of `train.jsonl.xz`."""
    return Path(_unpacked(name)).suffix.lower()


def _unpacked(name: str) -> str:
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in PACKED else name


def _starts(name: str, prefix: str) -> bool:
    return any(part.lower().startswith(prefix) for part in name.split("/"))


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in raw


def _number(name: str) -> int:
    """Return the number of a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def digest(*parts: str) -> str:
    """Return 16 hexadecimal digits that identify the parts and their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
