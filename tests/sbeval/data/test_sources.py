"""Every text is read, into the split that it belongs to; what cannot be read is a one-line error."""

import bz2
import gzip
import json
import lzma
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # likewise
import pytest

from sbeval.data import python_source, sources
from sbeval.data.sources import Document
from sbeval.errors import InputError

TEXTS = [f"document {i}: naïve 日本語\r\n" * (i + 1) for i in range(40)]
ROWS = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))


class Found(NamedTuple):
    name: str
    train: list[Document]
    valid: list[Document]
    test: list[Document]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mine"
    made.mkdir()
    return made


def read(spec: object, text_field: str = "text") -> Found:
    source = sources.source(str(spec), text_field)
    return Found(source.name, *(list(source.documents(role)) for role in sources.ROLES))


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def both(found: Found) -> list[str]:
    return sorted(texts(found.train + found.valid + found.test))


# the standard library


def test_stdlib() -> None:
    found = read("stdlib")
    assert found.name == "stdlib"
    assert 0.08 < len(found.test) / len(found.train + found.valid + found.test) < 0.17
    assert 0.01 < len(found.valid) / len(found.train) < 0.08
    assert sum(len(document.text) > 16384 for document in found.test) >= 10
    read_names = set(names(found.train + found.valid + found.test))
    assert len(read_names) == len(found.train + found.valid + found.test)
    assert {"argparse.py", "json/decoder.py"} < read_names
    assert not any(part in python_source.NO_STDLIB for name in read_names for part in name.split("/"))
    folder = Path(sysconfig.get_paths()["stdlib"])
    for documents in (found.train, found.test):
        longest = max(documents, key=lambda document: len(document.text))
        assert longest.text.encode() == (folder / longest.name).read_bytes()


def test_stdlib_leaves_out_tests_and_other_encodings(tmp_path: Path) -> None:
    kept = [f"module{i}.py" for i in range(80)] + ["email/mime.py"]
    left = ["test/a.py", "idlelib/idle_test/a.py", "ctypes/tests/a.py", "site-packages/a.py", "notes.txt"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9")
    (tmp_path / "empty.py").write_text("")
    source = sources._stdlib(tmp_path)
    train, valid, test = (names(list(source.documents(role))) for role in sources.ROLES)
    assert sorted(train + valid + test) == sorted(kept)
    assert test and valid


# files


def zstd(raw: bytes) -> bytes:
    return bytes(pa.compress(raw, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_every_format_in_every_compression(suffix: str, pack: Callable[[bytes], bytes], folder: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS[:20], "id": range(20)}), sink)
    (folder / f"part.parquet{suffix}").write_bytes(pack(sink.getvalue().to_pybytes()))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[20:])
    (folder / f"part.jsonl{suffix}").write_bytes(pack(rows.encode()))
    assert both(read(folder)) == sorted(TEXTS)
    plain = folder / "plain"
    plain.mkdir()
    for number, text in enumerate(TEXTS):
        (plain / f"{number}.md{suffix}").write_bytes(pack(text.encode()))
    assert both(read(plain)) == sorted(TEXTS)


# a packed file counts as the text in it, about


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_the_size_of_packed_text_is_about_that_of_the_text(
    suffix: str, pack: Callable[[bytes], bytes], folder: Path
) -> None:
    text = lzma.decompress((Path(sources.__file__).parents[1] / "walden.txt.xz").read_bytes())
    for name in ("train.txt", "test.txt"):
        (folder / f"{name}{suffix}").write_bytes(pack(text))
    found = sources.size(str(folder))
    assert found == pytest.approx((len(text), len(text)), rel=0.15 if suffix else 0)


def test_the_size_of_parquet_is_that_of_its_values(folder: Path) -> None:
    texts = [f"{index} " * 1000 for index in range(40)]
    pq.write_table(pa.table({"text": texts}), folder / "train.parquet", compression="zstd", row_group_size=20)
    found = sources.size(str(folder))
    assert found is not None and sum(found) == pytest.approx(sum(map(len, texts)), rel=0.15)
    (folder / "train.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(InputError, match=r"cannot read .*train\.parquet"):
        sources.size(str(folder))


def test_the_size_of_a_text_is_by_split(folder: Path) -> None:
    assert sources.size(str(folder)) is None
    for name, letters in (("train_a", 600), ("train_b", 60), ("valid", 20), ("test", 10)):
        (folder / f"{name}.jsonl").write_text("a" * letters)
    assert sources.size(str(folder)) == (660, 30)
    assert sources.size(str(folder / "train_a.jsonl")) == (600, 30)
    (folder / "valid.jsonl").unlink()
    # without files of it a split is drawn from train
    assert sources.size(str(folder)) == (round(660 * 31 / 32), 10 + 660 - round(660 * 31 / 32))
    assert sources.size(str(folder / "test.jsonl")) == (round(10 * 0.9 * 31 / 32), 1)


@pytest.mark.parametrize("corpus", ["stdlib", "texts"])
def test_the_size_of_files_that_are_documents_is_exact(corpus: str, folder: Path) -> None:
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)
    spec = str(folder) if corpus == "texts" else corpus
    found = read(spec)
    sizes = [sum(len(text.encode()) for text in texts(part)) for part in (found.train, found.valid + found.test)]
    assert sources.size(spec) == tuple(sizes)


def test_folders_are_read_recursively_without_hidden_files(folder: Path) -> None:
    for name in ("a.txt", "b/c.rst", "b/d/e", ".git/f.txt", "b/.g.txt", "b/blank.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "b/blank.txt").write_text(" \n")
    assert both(read(folder)) == ["a.txt", "b/c.rst", "b/d/e"]


def test_a_readme_beside_tables_is_no_document(folder: Path) -> None:
    (folder / "README.md").write_text("about")
    (folder / "rows.json").write_text(ROWS)
    assert both(read(folder)) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("files", "train", "valid", "test"),
    [
        (["train_core.txt", "train_extra.txt", "test.txt", "valid.txt", "other.txt"], 2, ["valid.txt"], ["test.txt"]),
        (["Train.txt", "validation.txt"], 1, [], ["validation.txt"]),
        (["train/a.txt", "train/b.txt", "test/a.txt"], 2, [], ["test/a.txt"]),
        (["deep/train-0.txt", "deep/valid-0.txt", "deep/valid-1.txt"], 1, [], ["deep/valid-0.txt", "deep/valid-1.txt"]),
    ],
)
def test_names_say_the_split(files: list[str], train: int, valid: list[str], test: list[str], folder: Path) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    found = read(folder)
    assert (names(found.test), texts(found.test)) == (test, test)
    assert names(found.valid) == valid
    assert len(found.train) == train


def test_a_train_file_finds_its_test_file(folder: Path) -> None:
    for name in ("train_core", "train_extra", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (folder / "test.md").write_text("notes")
    found = read(folder / "train_core.jsonl")
    assert (texts(found.train), texts(found.test), found.name) == (["train_core"], ["test"], "train_core")


def test_other_documents_are_drawn(folder: Path) -> None:
    path = folder / "my.rows.jsonl.xz"
    path.write_bytes(lzma.compress((ROWS * 10).encode()))
    found = read(path)
    assert found.name == "my.rows"
    assert 0.06 < len(found.test) / 400 < 0.15
    assert 0.01 < len(found.valid) / 400 < 0.06
    assert set(names(found.train)).isdisjoint(names(found.test + found.valid))
    assert set(names(found.valid)).isdisjoint(names(found.test))
    path.write_bytes(lzma.compress("".join(ROWS.splitlines(keepends=True)[:2]).encode()))
    two = read(path)
    assert (texts(two.train), texts(two.test)) == (TEXTS[:1], TEXTS[1:2])


def test_byte_order_marks_and_blank_rows_are_left_out(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": null}\n{"text": " "}\n{"text": "b"}')
    (folder / "test.jsonl").write_text('{"text": "c"}')
    found = read(folder)
    assert (texts(found.train), texts(found.test)) == (["a", "b"], ["c"])
    assert names(found.train) == ["train.jsonl:1", "train.jsonl:5"]


def test_text_field(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"body": "a", "text": 1}\n{"body": "b", "text": 2}')
    pq.write_table(pa.table({"body": ["c"]}), folder / "b.parquet")
    assert both(read(folder, text_field="body")) == ["a", "b", "c"]


# what cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\x00\x01", r"a\.txt is not UTF-8 text"),
        ("a.txt", "é".encode("latin-1"), r"a\.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2 is not JSON: .* give one object a line"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1 is not UTF-8 text"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1 is not a JSON object but a list"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' holds a int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .* half a surrogate pair"),
        ("a.jsonl", b'\n{"id": 1, "body": 2}', r"a\.jsonl:2 has no field 'text'; its fields: id, body: .*--text-field"),
        ("a.jsonl.xz", b"not packed", r"cannot read .*a\.jsonl\.xz"),
        ("a.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)[:-20], r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.zst", zstd(ROWS.encode())[:50], r"cannot read .*a\.jsonl\.zst"),
        ("a.parquet", b"PAR1 or not", r"cannot read .*a\.parquet"),
    ],
)
def test_files_that_will_not_do(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_field(folder: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), folder / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet:1 has no field 'text'; its fields: body, id"):
        read(folder)


def test_paths_that_hold_nothing(folder: Path) -> None:
    for spec in ("hf:", "hf::config"):
        with pytest.raises(InputError, match=f"unknown corpus '{spec}'; give python, .* or hf:NAME"):
            sources.source(spec, "text")
    for name in ("a/b/c", "./nowhere", "-x", "two words"):
        with pytest.raises(InputError, match=f"corpus 'hf:{name}:en': there is no folder '{name}', and it is no name"):
            sources.source(f"hf:{name}:en", "text")
    with pytest.raises(InputError, match=r"unknown corpus '.*missing'; give python, stdlib, .* or hf:NAME"):
        read(folder / "missing")
    with pytest.raises(InputError, match="mine holds no file to read"):
        read(folder)


# datasets


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hosts: list[object] = []

    def refuse(host: object, *rest: object, **options: object) -> NoReturn:
        hosts.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not hosts, "a test asked for the network"


def dataset(folder: Path, **splits: list[str]) -> str:
    for split, rows in splits.items():
        pq.write_table(pa.table({"text": rows}), folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("second", ["test", "validation"])
def test_dataset_with_splits(second: str, folder: Path) -> None:
    spec = dataset(folder, train=TEXTS[:30], **{second: TEXTS[30:]})
    found = read(spec)
    assert (texts(found.test), found.name) == (TEXTS[30:], "mine")
    assert sorted(texts(found.train + found.valid)) == sorted(TEXTS[:30])
    assert sources.source(spec, "text").limits == sources.HUB_TOKENS
    assert found.test[0].name == f"{second}:0"


@pytest.mark.usefixtures("offline")
def test_dataset_with_three_splits(folder: Path) -> None:
    found = read(dataset(folder, train=TEXTS[:30], validation=TEXTS[30:35], test=TEXTS[35:]))
    assert (texts(found.train), texts(found.valid), texts(found.test)) == (TEXTS[:30], TEXTS[30:35], TEXTS[35:])


@pytest.mark.usefixtures("offline")
def test_dataset_with_train_alone_is_drawn(folder: Path) -> None:
    found = read(dataset(folder, train=TEXTS))
    assert both(found) == sorted(TEXTS)
    assert TEXTS[1] in texts(found.test)


@pytest.mark.usefixtures("offline")
def test_datasets_that_save_to_disk_wrote(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(folder / "both")
    assert both(read(f"hf:{folder / 'one'}")) == sorted(TEXTS)
    assert texts(read(f"hf:{folder / 'both'}").test) == TEXTS[:3]


@pytest.mark.usefixtures("offline")
def test_configurations(folder: Path) -> None:
    for config in ("one", "two"):
        (folder / config).mkdir()
        dataset(folder / config, train=[config, "x"], test=[config])
    files = "".join(
        f"- config_name: {config}\n  data_files:\n"
        f"  - {{split: train, path: {config}/train*}}\n  - {{split: test, path: {config}/test*}}\n"
        for config in ("one", "two")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    found = read(f"hf:{folder}:two")
    assert (texts(found.test), found.name) == (["two"], "mine:two")
    with pytest.raises(InputError, match="cannot read dataset .*three"):
        read(f"hf:{folder}:three")


@pytest.mark.usefixtures("offline")
def test_datasets_that_will_not_do(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot read dataset 'sbeval-has/no-such'") as caught:
        read("hf:sbeval-has/no-such")
    assert "\n" not in str(caught.value)
    spec = dataset(folder, test=TEXTS)
    with pytest.raises(InputError, match="has no split train, only test"):
        read(spec)
    spec = dataset(folder, train=TEXTS)
    with pytest.raises(InputError, match=r"mine train:0 has no field 'body'; its fields: text"):
        read(spec, text_field="body")


def test_dataset_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"corpus hf:some/name needs datasets: pip install 'sbeval\[hf\]'") as caught:
        read("hf:some/name:en")
    # a plan says the same; naming a source does not: its tokens may be stored
    with pytest.raises(InputError) as planned:
        sources.check_package("hf:some/name:en")
    assert str(planned.value) == str(caught.value)
    assert sources.source("hf:some/name:en", "text").name == "name:en"


@pytest.mark.parametrize("target", ["nowhere", "elsewhere"])
def test_a_link_that_is_no_file_is_named(target: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=r"b\.txt is a link to nothing or to a folder, which is not read: remove it"):
        read(folder)
    assert read(folder / "a.txt")
