"""Inputs that are not what they should be: one line that names the file or the item, and never a traceback."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # likewise
import pytest
import torch

from sbeval.data import corpus, sources, tokenizer
from sbeval.data.sources import ROLES
from sbeval.errors import InputError
from sbeval.evaluation import lm_eval_local, lm_eval_tasks
from sbeval.pretrained import load

transformers: Any = pytest.importorskip("transformers")
CPU = torch.device("cpu")
TEXT = "the cat sat on the mat. " * 20
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


def refused(work: Any, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        work()
    assert len(str(caught.value).splitlines()) == 1


def texts(spec: object, field: str = "text") -> list[str]:
    """Read a whole corpus."""
    source = sources.source(str(spec), field)
    return [document.text for role in ROLES for document in source.documents(role)]


# corpora


def lines(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def test_an_integer_of_any_size_is_another_field(tmp_path: Path) -> None:
    row = f'{{"text": {json.dumps(TEXT)}, "id": {"9" * 5000}}}'
    assert texts(lines(tmp_path / "a.jsonl", [row] * 3)) == [TEXT] * 3
    refused(lambda: texts(tmp_path / "a.jsonl", "id"), r"a\.jsonl:\d: field 'id' holds a float, not text")


def test_json_that_is_nested_too_deep(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ["[" * 100_000])
    refused(lambda: texts(path), r"a\.jsonl:1 is not JSON: it is nested too deep")


def test_parquet_that_is_not_utf8_names_the_row(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"fine too", b"not \xff", b"fine"])
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    refused(lambda: texts(tmp_path / "a.parquet"), r"a\.parquet:3 is not UTF-8 text")


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    for name in (b"a.txt", b"caf\xe9.txt", b"z.txt"):
        Path(str(tmp_path), name.decode(errors="surrogateescape")).write_text(TEXT)
    text = corpus.open(str(tmp_path), tokenizer="bytes", cache_dir=tmp_path / ".cache")
    names = [name for role in ROLES for name in getattr(text, role).documents]
    assert sorted(names) == ["a.txt", "caf\\xe9.txt", "z.txt"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    refused(lambda: texts(tmp_path / name), rf"{re.escape(name)} is a pointer of Git LFS")


@pytest.mark.parametrize("spec", ["/dev/zero", "/dev/null", "/proc/self/mem", "x" * 5000])
def test_what_is_no_file(spec: str) -> None:
    refused(lambda: texts(spec), "corpus")


def test_a_stream_that_changes_its_columns_or_ends_early(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import gzip

    rows = [json.dumps({"text": TEXT})] * 4
    (tmp_path / "columns").mkdir()
    lines(tmp_path / "columns" / "train-0.jsonl", rows)
    lines(tmp_path / "columns" / "train-1.jsonl", [json.dumps({"text": TEXT, "more": 1})] * 4)
    refused(lambda: texts(f"hf:{tmp_path / 'columns'}"), "cannot read dataset '.*columns': Couldn't cast")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode())[:-12])
    refused(lambda: texts(f"hf:{tmp_path / 'cut'}"), "cannot read dataset '.*cut': Compressed file ended before")


def test_a_cache_that_cannot_be_one(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.txt").write_text(TEXT)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "folder")
    for place in (folder / "train.txt", Path("/dev/null"), Path("/proc"), tmp_path / "link"):
        for tokens in ("bytes", "bpe:260"):
            refused(
                lambda tokens=tokens, place=place: corpus.open(str(folder), tokenizer=tokens, cache_dir=place),
                "^cannot write ",
            )


def test_tokenizers_that_are_broken_or_too_large(tmp_path: Path) -> None:
    stages = json.loads(tokenizer.Bytes().library().to_str())
    for merges in ([["no", "such"]], [["a"]], 3):
        broken = stages | {"model": stages["model"] | {"merges": merges}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        refused(lambda: tokenizer.read(tmp_path / "tokenizer.json", name="x"), "is not a tokenizer.json file")
    too_large = "bpe:999999999"
    refused(
        lambda: tokenizer.load(too_large, train_texts=lambda: [TEXT], cache_dir=tmp_path),
        "at least 257 ids .*, at most 1048576",
    )


# models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of transformers with a healthy model."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=257, bos_token_id=None, eos_token_id=256, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.Bytes().library(), eos_token=tokenizer.EOS)
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_that_are_a_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text(POINTER)
    refused(lambda: load.load(str(model), CPU, "float32"), r"model\.safetensors is a pointer of Git LFS")


def test_weights_that_are_cut(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    refused(lambda: load.load(str(model), CPU, "float32"), "no causal language model '.*model': .*header")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_cache_of_transformers_that_is_full(code: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrong with the model or its tokenizer."""

    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", full)
    said = f"^cannot write the caches of transformers for .*: {os.strerror(code)}$"
    refused(lambda: load.load(str(model), CPU, "float32"), said)
    refused(lambda: tokenizer.load(str(model), cache_dir=model), said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="another message")
def test_a_package_that_is_missing(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    refused(lambda: load.load(str(model), CPU, "float32"), "no causal language model '.*model': .*bitsandbytes")


@pytest.mark.parametrize("value", [None, [], "four", {"a": 1}])
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "rope_parameters", "architectures"])
def test_a_config_of_other_types(name: str, value: object, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {name: value}))
    try:
        load.load(str(model), CPU, "float32")
    except InputError as error:
        assert len(str(error).splitlines()) == 1


def test_a_tokenizer_that_is_larger_than_its_model(model: Path) -> None:
    fast = transformers.AutoTokenizer.from_pretrained(model)
    fast.add_tokens(["<extra>"])
    fast.save_pretrained(model)
    text = lm_eval_tasks.hub_text(str(model), 257)
    assert text.encode("plain", False) == [ord(letter) for letter in "plain"]
    refused(lambda: text.encode("a <extra> one", False), r"has token 257 \('<extra>'\) in a text, .* knows 257")


# items


@pytest.fixture
def items(tmp_path: Path) -> Iterator[Path]:
    lm_eval_tasks.load.cache_clear()
    yield tmp_path
    lm_eval_tasks.load.cache_clear()


ITEM = {"id": "1", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.mark.parametrize("lacks", ["answerKey", "question", "choices"])
def test_an_item_that_lacks_what_is_asked(lacks: str, items: Path) -> None:
    rows = [ITEM, {key: value for key, value in ITEM.items() if key != lacks}, ITEM]
    lines(items / "ai2_arc_ARC-Easy_test.jsonl", [json.dumps(row) for row in rows])
    refused(lambda: lm_eval_tasks.load("arc_easy", None, items), "cannot read item 2 of task 'arc_easy' in ")


def test_items_that_are_no_table(items: Path) -> None:
    for rows in ([ITEM | {"id": 1 << 80}], [ITEM, ITEM | {"question": ["Which?"]}], [{"x": {}}, {"x": 3}]):
        lines(items / "ai2_arc_ARC-Easy_test.jsonl", [json.dumps(row) for row in rows])
        refused(lambda: lm_eval_tasks.load("arc_easy", None, items), "cannot read ")


def test_items_that_are_not_utf8_name_the_line(items: Path) -> None:
    path = items / "items.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n')
    refused(lambda: lm_eval_local.read(path, None), r"items\.jsonl:2: not a JSON object in UTF-8")
