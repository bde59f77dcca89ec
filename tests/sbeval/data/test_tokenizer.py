"""Ids come back as the text they were, however it is cut, and bytes are counted exactly."""

import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sbeval.data import tokenizer
from sbeval.data.tokenizer import EOS, Tokenizer
from sbeval.errors import InputError

# a word list with enough pairs for merges, more than one script, a special token's spelling, all kinds of line ends
TEXT = "".join(f"word{i} naïve 日本語 {i * i} {EOS}\r\n\n  it's_{i % 7}\n" for i in range(200))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(cache: Path) -> Tokenizer:
    return tokenizer.load("bpe:300", train_texts=lambda: [TEXT], cache_dir=cache)


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def byte_level(request: pytest.FixtureRequest, cache: Path) -> Tokenizer:
    return tokenizer.load(request.param, train_texts=lambda: [TEXT], cache_dir=cache)


def saved(bpe: Tokenizer, folder: Path) -> Path:
    """Write the BPE as a folder in transformers' layout."""
    assert isinstance(bpe, tokenizer.Library)
    folder.mkdir()
    bpe.save(folder / "tokenizer.json")
    config = f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{EOS}"}}'
    (folder / "tokenizer_config.json").write_text(config)
    return folder


def test_bytes_are_the_ids_of_text() -> None:
    coder = tokenizer.load("bytes", cache_dir=Path("unused"))
    assert coder.encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert (coder.eos, coder.vocab_size, coder.dtype.name) == (256, 257, "uint16")
    assert coder.decode([0xC3, 0xA9, 256, 0x0A]) == "é\n"


def test_text_comes_back(byte_level: Tokenizer) -> None:
    texts = ["", " ", "a", TEXT, "\x00\t\x1c x", "𝄞 e\u0301"]
    batch = byte_level.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.uint16
        assert byte_level.eos not in ids
        assert byte_level.decode(ids) == text
        np.testing.assert_array_equal(ids, byte_level.encode(text))
    assert byte_level.encode_batch([]) == []


def test_bytes_are_counted_wherever_ids_are_cut(byte_level: Tokenizer) -> None:
    ids = np.append(byte_level.encode("日本語 naïve 𝄞"), [byte_level.eos]).astype(byte_level.dtype)
    total = len("日本語 naïve 𝄞".encode())
    assert byte_level.byte_lengths(ids)[-1] == 0
    assert len(ids) > 9, "characters are meant to be spread over ids"
    for cut in range(len(ids) + 1):
        assert byte_level.byte_lengths(ids[:cut]).sum() + byte_level.byte_lengths(ids[cut:]).sum() == total
    assert byte_level.byte_lengths([]).sum() == 0


def test_half_a_character_decodes_to_its_replacement(byte_level: Tokenizer) -> None:
    first = byte_level.encode("𝄞")[:1]
    assert byte_level.decode(first) == "\N{REPLACEMENT CHARACTER}"


def test_bpe_has_the_size_asked_for_and_shortens(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 300
    assert 0 <= bpe.eos < 300
    assert len(bpe.encode(TEXT)) < 0.8 * len(TEXT.encode())
    # all 256 bytes are there, whatever the training text was
    every = "".join(map(chr, range(0x800))) + "\U00010000\U0010ffff"
    assert bpe.decode(bpe.encode(every)) == every


def test_bpe_is_trained_once_for_a_text(cache: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tokenizer.load("bpe:300", train_texts=lambda: [TEXT.upper()], cache_dir=cache)
    assert other.digest != bpe.digest
    monkeypatch.setattr(tokenizer, "_train", None)
    again = tokenizer.load("bpe:300", train_texts=lambda: [TEXT], cache_dir=cache)
    assert (again.name, again.digest) == ("bpe:300", bpe.digest)
    assert not list(cache.rglob(".*")), "no temporary files are left"


def test_a_kept_tokenizer_that_was_changed_is_named_and_trained_again(
    tmp_path: Path, bpe: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    def again() -> Tokenizer:
        return tokenizer.load("bpe:300", train_texts=lambda: [TEXT], cache_dir=tmp_path)

    again()
    (path,) = tmp_path.rglob("tokenizer.json")
    whole = path.read_text()
    # it would load, with another id for a letter
    path.write_text(whole.replace('"a": ', '"§": ', 1))
    assert path.read_text() != whole
    assert again().digest == bpe.digest and path.read_text() == whole
    assert capsys.readouterr().out == f"{path} is not as it was written, and is made again\n"
    path.with_name("tokenizer.json.sha256").unlink()
    assert again().digest == bpe.digest
    assert capsys.readouterr().out == f"{path} has no digest beside it, and is made again\n"


def test_training_twice_gives_the_same(tmp_path: Path, bpe: Tokenizer) -> None:
    assert tokenizer.load("bpe:300", train_texts=lambda: [TEXT], cache_dir=tmp_path).digest == bpe.digest


def test_training_text_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "TRAINING_CHARACTERS", 12)
    capped = tokenizer.load("bpe:258", train_texts=lambda: ["aaaa", "bbbbbbbb", "cccc"], cache_dir=tmp_path)
    same = tokenizer.load("bpe:258", train_texts=lambda: ["aaaa", "bbbbbbbbdddd"], cache_dir=tmp_path)
    assert capped.digest == same.digest
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1


@pytest.mark.parametrize("size", ["", "256", "-300", "8k", "1.5"])
def test_impossible_sizes(size: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"bpe:{size}.*at least 257"):
        tokenizer.load(f"bpe:{size}", train_texts=lambda: [TEXT], cache_dir=tmp_path)


def test_more_ids_than_the_text_gives(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"BPE of 258 ids: use bpe:258 or less, not bpe:9000"):
        tokenizer.load("bpe:9000", train_texts=lambda: ["ab"], cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_bpe_without_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trained on a corpus and none is given: give a tokenizer.json"):
        tokenizer.load("bpe:300", cache_dir=tmp_path)


def test_cutting_long_texts_changes_no_id(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bpe.encode(TEXT)
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 1)
    monkeypatch.setattr(tokenizer, "GROUP_CHARACTERS", 50)
    # a cut is tried behind every character
    assert len(list(tokenizer._pieces(TEXT, 1))) > 200
    both = bpe.encode_batch([TEXT, "x", TEXT])
    np.testing.assert_array_equal(both[0], whole)
    np.testing.assert_array_equal(both[1], bpe.encode("x"))
    np.testing.assert_array_equal(both[2], whole)


def test_other_patterns_are_not_cut() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a\nb": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    coder = tokenizer.Library(words, name="words", eos=2)
    assert not coder.cuts_at_spaces
    assert coder.encode("a\nb").tolist() == [0]
    with pytest.raises(InputError, match="has no bytes for these tokens: give one"):
        coder.byte_lengths([0])


def test_threads_are_for_encoding_alone(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tokenizer.PARALLELISM, raising=False)
    bpe.encode("a")
    assert os.environ[tokenizer.PARALLELISM] == ""
    with tokenizer._all_cores():
        assert os.environ[tokenizer.PARALLELISM] == "true"
    monkeypatch.setenv(tokenizer.PARALLELISM, "false")
    with tokenizer._all_cores():
        assert os.environ[tokenizer.PARALLELISM] == "false"


def test_json_file_and_folder_are_the_same(bpe: Tokenizer, tmp_path: Path) -> None:
    folder = saved(bpe, tmp_path / "mine")
    file = tokenizer.load(str(folder / "tokenizer.json"), cache_dir=tmp_path)
    assert (file.digest, file.eos) == (bpe.digest, bpe.eos)
    pytest.importorskip("transformers")
    loaded = tokenizer.load(str(folder), cache_dir=tmp_path)
    assert (loaded.vocab_size, loaded.eos, loaded.name) == (300, bpe.eos, str(folder))
    np.testing.assert_array_equal(loaded.encode(TEXT), bpe.encode(TEXT))
    assert loaded.byte_lengths(loaded.encode(TEXT)).sum() == len(TEXT.encode())
    (folder / "tokenizer_config.json").unlink()
    assert tokenizer.load(str(folder), cache_dir=tmp_path).digest == bpe.digest


def test_limits_and_padding_in_a_file_are_ignored(bpe: Tokenizer, tmp_path: Path) -> None:
    path = saved(bpe, tmp_path / "mine") / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(path))
    loaded = tokenizer.load(str(path), cache_dir=tmp_path)
    np.testing.assert_array_equal(loaded.encode(TEXT), bpe.encode(TEXT))
    assert len(loaded.encode("a")) == 1
    assert loaded.digest == bpe.digest


def test_sentencepiece_bytes_are_counted() -> None:
    vocabulary = {"</s>": 0, "\u2581a": 1, "b": 2, "é": 3, "\u2581": 4, "a": 5, "<0xF0>": 6, "<0x9D>": 7}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    coder = tokenizer.Library(backend, name="pieces", eos=0)
    ids = coder.encode(" ab é")
    assert ids.tolist() == [1, 2, 4, 3]
    assert coder.byte_lengths(ids).sum() == len(" ab é".encode())
    assert coder.byte_lengths([6, 7, 0]).tolist() == [1, 1, 0]


def test_large_vocabularies_take_32_bits() -> None:
    vocabulary = {f"t{i}": i for i in range(1 << 16)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    small = tokenizer.Library(backend, name="words", eos=0)
    backend.add_tokens(["one more"])
    large = tokenizer.Library(backend, name="words", eos=0)
    assert (small.vocab_size, small.dtype.name) == (65536, "uint16")
    assert (large.vocab_size, large.dtype.name) == (65537, "uint32")
    assert large.encode("t65535 one more").tolist() == [65535, 65536]


def test_file_without_an_end_token(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(InputError, match="tokenizer.json has no end-of-document token"):
        tokenizer.load(str(path), cache_dir=tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": 3}', "\x00"])
def test_file_that_is_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError, match="is not a tokenizer.json file"):
        tokenizer.load(str(path), cache_dir=tmp_path)


@pytest.mark.parametrize("spec", ["", "byte:3", "bpe", "no/such/folder/of/mine", "a b"])
def test_unknown_specifications(spec: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown tokenizer .*; give bytes, bpe:SIZE, a tokenizer.json"):
        tokenizer.load(spec, cache_dir=tmp_path)


def test_unreachable_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hosts: list[object] = []

    def refuse(host: object, *rest: object, **options: object) -> NoReturn:
        hosts.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(InputError, match="unknown tokenizer 'sbeval-has/no-such'; give bytes") as caught:
        tokenizer.load("sbeval-has/no-such", cache_dir=tmp_path)
    assert not hosts
    assert "\n" not in str(caught.value)


def test_hub_name_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'sbeval\[hf\]'"):
        tokenizer.load("some/name", cache_dir=tmp_path)


def test_the_tokenizer_of_an_unknown_architecture_is_loaded_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    bpe = models.BPE(vocab={"a": 0, "</s>": 1}, merges=[])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(bpe), eos_token="</s>")
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow", "shape": {}}')
    capfd.readouterr()
    assert tokenizer.load(str(tmp_path), cache_dir=tmp_path).eos == 1
    assert capfd.readouterr().err == ""
