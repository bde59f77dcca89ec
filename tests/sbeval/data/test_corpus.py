"""What is stored is what was read, whole or not at all; what cannot be read is a one-line error."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbeval.data import corpus, sources
from sbeval.data.corpus import Corpus, Split
from sbeval.data.dataloader import Batches
from sbeval.data.sources import Document, Source
from sbeval.data.tokenizer import Bytes
from sbeval.errors import InputError

TEXTS = [f"document {i}: naïve 日本語\r\n" * (i + 1) for i in range(40)]
ROWS = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mine"
    made.mkdir()
    return made


def texts(split: Split) -> list[str]:
    return [Bytes().decode(split.document(i)) for i in range(len(split))]


def both(opened: Corpus) -> list[str]:
    return sorted(texts(opened.train) + texts(opened.valid) + texts(opened.test))


def opened(path: Path, cache: Path, **options: Any) -> Corpus:
    return corpus.open(str(path), tokenizer="bytes", cache_dir=cache, **options)


def split_of(*lengths: int) -> Split:
    """A split of documents of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)]).astype(np.int64)
    names = tuple(map(str, range(len(lengths))))
    tokens = np.zeros(offsets[-1], np.uint16)
    return Split(corpus="x", role="test", tokens=tokens, offsets=offsets, documents=names)


# the store


def test_a_store_holds_documents_closed_by_eos(folder: Path, cache: Path) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    found = opened(folder, cache)
    assert both(found) == sorted(TEXTS)
    assert (found.name, found.tokenizer.name) == ("mine", "bytes")
    for split in (found.train, found.valid, found.test):
        assert split.tokens[:].dtype == np.dtype("uint16")
        assert split.offsets.dtype == np.dtype("int64")
        assert len(split) == len(split.documents) == len(split.offsets) - 1
        assert split.offsets[-1] == len(split.tokens)
        np.testing.assert_array_equal(np.flatnonzero(split.tokens[:] == 256), split.offsets[1:] - 1)
        assert split.lengths.tolist() == [len(text.encode()) for text in texts(split)]
    first = found.train.documents.index("all.jsonl:1")
    assert texts(found.train)[first] == TEXTS[0]
    with pytest.raises(IndexError):
        found.train.document(len(found.train))


def test_batches_change_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    whole = opened(folder, cache)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 100)
    assert opened(folder, cache.with_name("other")).digest == whole.digest


def test_bpe_is_trained_on_train_alone_and_kept_with_the_store(folder: Path, cache: Path) -> None:
    (folder / "train.txt").write_text("abcd" * 40)
    (folder / "test.txt").write_text("wxyz" * 40)
    found = corpus.open(str(folder), tokenizer="bpe:259", cache_dir=cache)
    assert found.tokenizer.name == "bpe:259"
    assert len(found.train.document(0)) <= 80
    assert len(found.test.document(0)) == 160
    for path in (cache / "tokenizers").rglob("tokenizer.json"):
        path.unlink()
    again = corpus.open(str(folder), tokenizer="bpe:259", cache_dir=cache)
    assert (again.digest, again.tokenizer.digest) == (found.digest, found.tokenizer.digest)


def test_a_store_is_looked_for_without_building_one(folder: Path, cache: Path) -> None:
    (folder / "train.txt").write_text("a text to train on")
    (folder / "test.txt").write_text("a text to test with")

    def look(tokenizer: str) -> corpus.Corpus | None:
        return corpus.stored(str(folder), tokenizer=tokenizer, cache_dir=cache)

    assert look("bytes") is None and look("hub/name") is None and not cache.exists()
    built = corpus.open(str(folder), tokenizer="bytes", cache_dir=cache)
    found = look("bytes")
    assert found is not None and found.digest == built.digest


def test_a_stored_dataset_of_the_hub_is_found_without_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = "hf:someone/texts"
    assert corpus.stored(spec, tokenizer="bytes", cache_dir=cache) is None
    rows = {"train": [{"text": text} for text in TEXTS], "test": [{"text": "a text to test with"}]}
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_load_dataset", lambda name, config: rows)
        patch.setattr(sources, "_stream_errors", lambda: ())
        built = corpus.open(spec, tokenizer="bytes", cache_dir=cache)
    monkeypatch.setattr(sources, "_load_dataset", None)
    found = corpus.stored(spec, tokenizer="bytes", cache_dir=cache)
    assert found is not None and found.digest == built.digest
    # of more or fewer tokens it is another
    assert corpus.stored(spec, tokenizer="bytes", cache_dir=cache, max_tokens=100) is None


def test_a_store_is_built_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    first = opened(folder, cache)
    monkeypatch.setattr(corpus, "_build", None)
    assert opened(folder, cache).digest == first.digest


def test_a_change_makes_another_store(folder: Path, cache: Path) -> None:
    path = folder / "all.jsonl"
    path.write_text(ROWS)
    first = opened(folder, cache)
    path.write_text(ROWS.replace("document 7", "document X"))
    changed = opened(folder, cache)
    assert changed.digest != first.digest
    assert any("document X" in text for text in both(changed))
    assert corpus.open(str(path), tokenizer="bpe:270", cache_dir=cache).digest != changed.digest


def test_max_tokens_ends_train_with_a_document(folder: Path, cache: Path) -> None:
    for role in sources.ROLES:
        (folder / f"{role}.jsonl").write_text(ROWS)
    found = opened(folder, cache, max_tokens=1000)
    assert found.train.offsets[-2] < 1000 <= found.train.offsets[-1]
    assert texts(found.train) == TEXTS[: len(found.train)]
    assert texts(found.valid) == texts(found.test) == TEXTS
    assert len(opened(folder, cache).train) == 40
    with pytest.raises(InputError, match="max_tokens must be at least 1; got 0"):
        opened(folder, cache, max_tokens=0)


def test_limited_train_limits_a_source_that_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(str(number), text) for number, text in enumerate(TEXTS)]
    endless = Source(name="x", digest="x", documents=lambda role: iter(documents), limits={"test": 500, "valid": 100})
    monkeypatch.setattr(sources, "source", lambda spec, field: endless)
    found = corpus.open("x", tokenizer="bytes", cache_dir=cache, max_tokens=1000)
    assert found.train.offsets[-2] < 1000 <= found.train.offsets[-1]
    assert found.test.offsets[-2] < 500 <= found.test.offsets[-1]
    assert found.valid.offsets[-2] < 100 <= found.valid.offsets[-1]
    assert len(corpus.open("x", tokenizer="bytes", cache_dir=cache).test) == 40


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": ""}, "'mine' holds no text to train on"),
        ({"a.txt": " \n"}, "'mine' holds no text to train on"),
        ({"a.txt": "one document"}, "'mine' has too little text for a train and a test split"),
        ({"train.txt": "text", "test.txt": ""}, "'mine' has too little text for a train and a test split"),
    ],
)
def test_sources_with_too_little_text(files: dict[str, str], message: str, folder: Path, cache: Path) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        opened(folder, cache)
    assert "\n" not in str(caught.value)


def test_progress_counts_every_token(folder: Path, cache: Path) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    steps: list[int] = []
    found = opened(folder, cache, progress=steps.append)
    assert sum(steps) == sum(len(split.tokens) for split in (found.train, found.valid, found.test))
    assert len(steps) == 40


def test_nothing_is_left_of_a_store_that_fails(folder: Path, cache: Path) -> None:
    (folder / "all.jsonl").write_text(ROWS + "{\n")
    with pytest.raises(InputError, match=r"all\.jsonl:41 is not JSON"):
        opened(folder, cache)
    assert [path.suffix for path in (cache / "corpora").iterdir()] == [".lock"]


def test_a_store_that_was_killed_is_built_again(folder: Path, cache: Path) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    process = started(DIE_HALFWAY, folder, cache)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 9
    assert [path.suffix for path in sorted((cache / "corpora").iterdir())] == [".lock", ".unfinished"]
    assert both(opened(folder, cache)) == sorted(TEXTS)
    assert [path.suffix for path in sorted((cache / "corpora").iterdir())] == ["", ".lock"]


FILES = [f"{role}{kind}" for role in ("train", "valid", "test") for kind in (".npy", "_offsets.npy", "_documents.json")]


@pytest.mark.parametrize("name", [*FILES, "meta.json", "tokenizer.json"])
def test_a_store_that_was_changed_is_named_and_built_again(name: str, folder: Path, cache: Path) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    said: list[str] = []

    def again() -> Corpus:
        return corpus.open(str(folder), tokenizer="bpe:300", cache_dir=cache, say=said.append)

    tokens = [split.tokens[:] for split in (again().train, again().valid, again().test)]
    (store,) = (path for path in (cache / "corpora").iterdir() if path.is_dir())
    file = store / name
    whole = file.read_bytes()
    assert not said
    # cut short; zeros, a bit and a doubled part, which are other losses; missing
    half = len(whole) // 2
    damages = [whole[:-3], bytes(len(whole)), whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]]
    for damaged in (*damages, whole[:half] + whole, b"", None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        found = again()
        for split, expected in zip((found.train, found.valid, found.test), tokens, strict=True):
            assert np.array_equal(split.tokens[:], expected)
        assert len(said) == 1 and str(file) in said.pop() and file.read_bytes() == whole
    assert sorted(path.suffix for path in (cache / "corpora").iterdir()) == ["", ".lock"]


def test_a_store_that_is_cut_while_it_is_read_is_an_error_and_no_signal(folder: Path, cache: Path) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    found = opened(folder, cache)
    batches, before = Batches(found.train, 8, 2, 0, "documents"), found.test.document(0)
    whole = batches[0]
    (store,) = (path for path in (cache / "corpora").iterdir() if path.is_dir())
    for role in ("train", "test"):
        os.truncate(store / f"{role}.npy", 100)
    for read in (lambda: batches[0], lambda: found.test.document(0)):
        with pytest.raises(InputError, match=r"\.npy was changed while it was in use"):
            read()
    again = opened(folder, cache)
    assert torch.equal(Batches(again.train, 8, 2, 0, "documents")[0].tokens, whole.tokens)
    assert np.array_equal(again.test.document(0), before)


def test_a_store_is_checked_once_in_a_process(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    first = opened(folder, cache)
    opened(folder, cache)
    read: list[Path] = []
    monkeypatch.setattr(corpus, "sha256", lambda path: read.append(path))
    assert np.array_equal(opened(folder, cache).train.tokens[:], first.train.tokens[:]) and not read


def test_versions_of_the_text_are_kept_and_valid_is_no_part_of_the_digest(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source(spec: str, field: str) -> Source:
        texts = {"train": ["a"], "valid": [spec] * (spec != "none"), "test": ["b"]}
        documents = {role: [Document(text, text) for text in found] for role, found in texts.items()}
        return Source(name="x", digest=spec, documents=lambda role: iter(documents[role]), versions={"some": spec})

    monkeypatch.setattr(sources, "source", source)
    found = {spec: corpus.open(spec, tokenizer="bytes", cache_dir=cache) for spec in ("one", "two", "none")}
    assert found["one"].versions == {"some": "one"}
    assert {len(one.valid) for one in found.values()} == {0, 1}
    assert len({one.digest for one in found.values()}) == 1


def test_two_processes_build_one_store(folder: Path, cache: Path) -> None:
    (folder / "all.jsonl").write_text(ROWS)
    processes = [started(COUNT_BUILT, folder, cache) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    # documents that were tokenized, documents that are there
    assert sorted(said) == [["0", "40"], ["40", "40"]]


OPEN = """
import os, sys
from pathlib import Path
from sbeval.data import corpus
built = []
found = corpus.open(sys.argv[1], tokenizer="bytes", cache_dir=Path(sys.argv[2]), progress={progress})
print(len(built), len(found.train) + len(found.valid) + len(found.test))
"""
DIE_HALFWAY = OPEN.format(progress="lambda tokens: os._exit(9)")
COUNT_BUILT = OPEN.format(progress="built.append")


def started(code: str, folder: Path, cache: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(cache)], stdout=subprocess.PIPE, text=True)


# windows


def test_windows_are_the_first_of_documents_long_enough() -> None:
    split = split_of(10, 3, 4, 13)
    assert split.windows(4) == [(0, 0), (2, 0), (3, 0)]
    assert split.windows(4, per_document=2) == [(0, 0), (0, 4), (2, 0), (3, 0), (3, 4)]
    assert split.windows(4, per_document=9) == [(0, 0), (0, 4), (2, 0), (3, 0), (3, 4), (3, 8)]
    assert split.windows(13) == [(3, 0)]
    assert all(type(number) is int for window in split.windows(4) for number in window)


def test_windows_longer_than_any_document() -> None:
    message = (
        "no document of corpus 'x' (test) has 16385 tokens (a context of 16384 and one to predict); "
        "the longest has 9120: use --eval-len 9119 or less, or another --corpus"
    )
    with pytest.raises(InputError) as caught:
        split_of(9120, 300).windows(16385)
    assert str(caught.value) == message


def test_windows_that_no_length_gives() -> None:
    with pytest.raises(InputError, match=r"no document .* has 2 tokens .*; the longest has 1: use another --corpus$"):
        split_of(1, 1).windows(2)
    with pytest.raises(InputError, match="at least 1; got 0 and 1"):
        split_of(5, 4).windows(0)
