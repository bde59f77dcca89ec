"""Tokenizers: raw bytes, byte-level BPE trained on a corpus, or one of Hugging Face's `tokenizers` library.

A specification is one of

    bytes       ids 0..255 are the bytes of the text in UTF-8, 256 ends a document
    bpe:N       byte-level BPE of N ids, trained on the first 64 million characters of the training texts
    PATH, NAME  a tokenizer.json file, a tokenizer's folder, or its name on the Hugging Face hub
"""

import hashlib
import importlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sbeval.config import HUB_NAME
from sbeval.errors import InputError, reason, shown
from sbeval.runtime.files import is_of_the_disk, replacing, storing
from sbeval.runtime.seals import is_intact, seal

EOS = "<|endoftext|>"
# names of the token that ends a document, searched when no config beside tokenizer.json gives it
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
MAX_IDS = 1 << 20
TRAINING_CHARACTERS = 64_000_000
PARALLELISM = "TOKENIZERS_PARALLELISM"
# the library needs some 350 bytes of memory per token while it encodes
PIECE_CHARACTERS, GROUP_CHARACTERS = 1 << 18, 1 << 23
# spellings of a space and a byte in SentencePiece's vocabularies
SPACE, BYTE = "\u2581", re.compile("<0x[0-9A-F]{2}>")
LINE_END = re.compile(r"(?<=\w)\n")

Ids = npt.NDArray[np.uint16 | np.uint32]


class Tokenizer(ABC):
    """Text to ids and back. `digest` changes with the ids of any text; `eos` ends a document.

    prefix: the special ids that it puts before a text for its models, such as BOS. unknown: the id of text that it
    cannot spell, if there is one.
    cuts_at_spaces: a text that is cut before white space that follows other characters keeps its ids.
    """

    def __init__(self, *, name: str, definition: str, vocab_size: int, eos: int) -> None:
        self.name = name
        self.digest = hashlib.sha256(definition.encode()).hexdigest()[:16]
        self.vocab_size = vocab_size
        self.eos = eos
        self.prefix: tuple[int, ...] = ()
        self.unknown: int | None = None
        self.cuts_at_spaces = True
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> Ids:
        """Encode one text: (n,) uint16 or, where the vocabulary exceeds 65536, uint32; (0,) for the empty text.

        No special tokens are added, and their spelling inside the text is text like any other.
        """
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Encode many texts, each as `encode` would, on all cores."""

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """Decode ids, (n,) integers, to text without eos; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def byte_lengths(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the bytes of UTF-8 text of each id, (n,) int64 for (n,) integers; 0 for eos.

        Exact for bytes and byte-level BPE, also where a character is spread over ids. SentencePiece's include the space
        that they put before a text. Text counts as normalized. Raise InputError for ids whose bytes are not known.
        """

    def spells(self, ids: npt.ArrayLike) -> bool:
        """Return whether the bytes of these ids are known: not of other kinds of tokenizers, nor of <unk>."""
        return True

    @abstractmethod
    def library(self) -> tokenizers.Tokenizer:
        """Return a tokenizer of the `tokenizers` library with the same ids, which adds no special tokens."""


class Bytes(Tokenizer):
    """One id per byte."""

    def __init__(self) -> None:
        super().__init__(name="bytes", definition="bytes", vocab_size=257, eos=256)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: npt.ArrayLike) -> str:
        array = np.asarray(ids)
        raw: bytes = array[array != self.eos].astype(np.uint8).tobytes()
        return raw.decode(errors="replace")

    def byte_lengths(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        return np.where(np.asarray(ids) == self.eos, 0, 1)

    def library(self) -> tokenizers.Tokenizer:
        # byte-level BPE spells printable bytes of Latin-1 as they are, and the others as the characters from 256 on
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([EOS])
        return backend


class Library(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer, *, name: str, eos: int) -> None:
        # truncation and padding are up to those who make batches
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        definition = backend.to_str()
        size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(name=name, definition=f"{eos} {definition}", vocab_size=size, eos=eos)
        self._backend = backend
        self.prefix = _prefix(backend)
        stages = json.loads(definition)
        self.unknown = _unknown(backend, stages["model"])
        self.cuts_at_spaces = _is_gpt2(stages)
        spell = _spelling(stages["decoder"])
        self._bytes = _byte_table(backend, size, eos, spell) if spell else None

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        pieces: list[list[Ids]] = [[] for _ in texts]
        for group in _groups(texts, PIECE_CHARACTERS if self.cuts_at_spaces else None):
            with _all_cores():
                encodings = self._backend.encode_batch_fast([text for _, text in group], add_special_tokens=False)
            for (index, _), encoding in zip(group, encodings, strict=True):
                pieces[index].append(np.array(encoding.ids, dtype=self.dtype))
        return [np.concatenate(parts) for parts in pieces]

    def decode(self, ids: npt.ArrayLike) -> str:
        array = np.asarray(ids)
        return str(self._backend.decode(array[array != self.eos].tolist(), skip_special_tokens=False))

    def byte_lengths(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        if self._bytes is None or not self.spells(ids):
            raise InputError(
                f"tokenizer {self.name!r} has no bytes for these tokens: give one that is byte-level or SentencePiece's"
            )
        lengths: npt.NDArray[np.int64] = self._bytes[np.asarray(ids, dtype=np.int64)]
        return lengths

    def spells(self, ids: npt.ArrayLike) -> bool:
        return self._bytes is not None and not (np.asarray(ids) == self.unknown).any()

    def library(self) -> tokenizers.Tokenizer:
        stages = json.loads(self._backend.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(stages | {"post_processor": None}))

    def save(self, path: Path, *, sealed: bool = False) -> None:
        """Write the tokenizer as a tokenizer.json file, atomically. sealed: see `sbeval.runtime.seals`."""
        # the library's own `save` does not name a full disk in its error
        with replacing(path) as temporary:
            temporary.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
            if sealed:
                seal(path, temporary)


def load(spec: str, *, train_texts: Callable[[], Iterable[str]] | None = None, cache_dir: Path) -> Tokenizer:
    """Load or train the tokenizer that `spec` names (see the module).

    `bpe:N` is trained on `train_texts` and stored in cache_dir/tokenizers/<digest of N and text>/tokenizer.json.
    Raise InputError for an unknown specification, and for an N that is too small or larger than the text gives.
    """
    if spec == "bytes":
        return Bytes()
    if is_trained(spec):
        if train_texts is None:
            raise InputError(f"tokenizer {spec!r} is trained on a corpus and none is given: give a tokenizer.json file")
        return _cached(spec, _size(spec), train_texts(), cache_dir)
    path = Path(spec)
    if os.path.isfile(path):
        return read(path, name=spec)
    if os.path.isdir(path) and not (path / "tokenizer_config.json").exists() and (path / "tokenizer.json").exists():
        return read(path / "tokenizer.json", name=spec)
    # the empty specification would be the current folder
    if spec and (os.path.isdir(path) or _on_hub(spec)):
        return _from_transformers(spec)
    raise _unknown_name(spec)


def is_trained(spec: str) -> bool:
    """Return whether `spec` names a tokenizer that is trained on the corpus."""
    return spec.startswith("bpe:")


def check(spec: str) -> None:
    """Raise InputError for a specification that is wrong whatever the text and the network have."""
    if is_trained(spec):
        _size(spec)
    elif not (spec and os.path.exists(spec)) and not _on_hub(spec):
        raise _unknown_name(spec)


def _on_hub(spec: str) -> bool:
    """Return whether a name may be one on the hub: one of ours that lacks its size is not."""
    return HUB_NAME.fullmatch(spec) is not None and spec != "bpe"


def _unknown_name(spec: str, why: str = "") -> InputError:
    known = "bytes, bpe:SIZE, a tokenizer.json file or its folder, or a name on the hub"
    return InputError(f"unknown tokenizer {shown(spec)!r}; give {known}{why and f': {why}'}")


def check_same(trained: str | None, given: Tokenizer, spec: str) -> None:
    """Raise InputError unless `given` has the digest that the model `spec` was `trained` with, if that is known."""
    if trained not in (None, given.digest):
        raise InputError(
            f"the model of {spec} was trained with another tokenizer than {given.name!r}: give the --tokenizer that it "
            "was trained with, and for bpe:SIZE its --corpus"
        )


def read(path: Path, *, name: str) -> Library:
    """Read a tokenizer.json file; raise InputError when it is not one, or has no token that ends a document."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)["model"]["vocab"]
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        # the library, in Rust, raises the class Exception itself
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, LookupError, TypeError)):
            raise
        raise InputError(f"{path} is not a tokenizer.json file of the tokenizers library") from None
    known = [backend.token_to_id(token) for token in EOS_NAMES]
    eos = next((number for number in known if number is not None), None)
    if eos is None:
        raise InputError(
            f"{path} has no end-of-document token ({', '.join(EOS_NAMES)}): give a folder with a tokenizer_config.json"
        )
    return Library(backend, name=name, eos=eos)


def _size(spec: str) -> int:
    number = spec.removeprefix("bpe:")
    # the library takes memory for them all, and its process ends where that is too much
    if not re.fullmatch(r"[0-9]{1,9}", number) or not 257 <= int(number) <= MAX_IDS:
        raise InputError(
            f"tokenizer {spec!r}: the size after bpe: must be at least 257 ids (bytes and eos), at most {MAX_IDS}"
        )
    return int(number)


def _cached(spec: str, size: int, texts: Iterable[str], cache_dir: Path) -> Library:
    sample = list(_first(texts, TRAINING_CHARACTERS))
    digest = hashlib.sha256(f"{size}\n".encode())
    for text in sample:
        digest.update(hashlib.sha256(text.encode()).digest())
    path = cache_dir / "tokenizers" / digest.hexdigest()[:16] / "tokenizer.json"
    if not is_intact(path):
        trained = _train(sample, size, spec)
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        trained.save(path, sealed=True)
    return read(path, name=spec)


def _train(texts: list[str], size: int, spec: str) -> Library:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _all_cores():
        backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached < size:
        raise InputError(f"the training text gives a BPE of {reached} ids: use bpe:{reached} or less, not {spec}")
    # the trainer gives its special tokens the first ids
    return Library(backend, name=spec, eos=0)


def _from_transformers(spec: str) -> Library:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise InputError(f"tokenizer {spec!r} needs transformers: pip install 'sbeval[hf]'") from None
    try:
        # the fast form that is read here needs no code of the repository
        with quiet(transformers):
            loaded: Any = transformers.AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    # raised for an unknown name, without network, for files that it cannot read, and packages that it lacks
    except (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError) as error:
        if is_of_the_disk(error):
            raise InputError(
                f"cannot write the caches of transformers for tokenizer {spec!r}: {reason(error)}"
            ) from None
        raise _unknown_name(spec, reason(error)) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"tokenizer {spec!r} has no fast form (tokenizer.json): choose another")
    if loaded.eos_token_id is None:
        raise InputError(f"tokenizer {spec!r} has no eos token to end a document: choose another")
    return Library(backend, name=spec, eos=loaded.eos_token_id)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence what transformers says of files that it loads, such as of an unknown architecture, and its bar."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    remaining = characters
    for text in texts:
        yield text[:remaining]
        remaining -= len(text)
        if remaining <= 0:
            return


def _groups(texts: Sequence[str], cut: int | None) -> Iterator[list[tuple[int, str]]]:
    """Group pieces of the texts, each with the index of its text, so that encoding a group takes little memory."""
    group: list[tuple[int, str]] = []
    characters = 0
    for index, text in enumerate(texts):
        for piece in _pieces(text, cut):
            group.append((index, piece))
            characters += len(piece)
            if characters >= GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
    if group:
        yield group


def _pieces(text: str, size: int | None) -> Iterator[str]:
    """Cut a text before line ends that follow a letter, a digit or `_`: no word of GPT-2's pattern spans these."""
    start = 0
    while size is not None and (end := LINE_END.search(text, start + size)):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def _is_gpt2(stages: dict[str, Any]) -> bool:
    """Return whether GPT-2's pattern alone splits a text into words."""
    if stages["normalizer"] is not None or not all(token["special"] for token in stages["added_tokens"]):
        return False
    words = stages["pre_tokenizer"]
    return words is not None and words["type"] == "ByteLevel" and words["use_regex"] and not words["add_prefix_space"]


def _prefix(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer's own post-processor puts before a text."""
    plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return tuple(whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)])


def _unknown(backend: tokenizers.Tokenizer, model: dict[str, Any]) -> int | None:
    """Return the id of text that the model cannot spell; None where it has none, or spells all text in bytes."""
    if isinstance(model.get("unk_id"), int):
        return None if model.get("byte_fallback") else int(model["unk_id"])
    unknown = model.get("unk_token")
    return None if unknown is None or model.get("byte_fallback") else backend.token_to_id(unknown)


def _spelling(decoder: dict[str, Any] | None) -> Callable[[str], int] | None:
    """Return a function from a token's spelling to its bytes, by the decoder's kind; None for unknown kinds."""
    stages = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {stage["type"] for stage in stages}
    if kinds == {"ByteLevel"}:
        # one character for each byte
        return len
    if "Metaspace" in kinds or {"type": "Replace", "pattern": {"String": SPACE}, "content": " "} in stages:
        return lambda token: 1 if BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())
    return None


def _byte_table(
    backend: tokenizers.Tokenizer, size: int, eos: int, spell: Callable[[str], int]
) -> npt.NDArray[np.int64]:
    """Return the number of bytes of each id: (size,) int64."""
    lengths = np.zeros(size, dtype=np.int64)
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        lengths[number] = spell(token)
    # added tokens are spelled as in the text
    for number, added in backend.get_added_tokens_decoder().items():
        lengths[number] = len(added.content.encode())
    lengths[eos] = 0
    return lengths


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the library use its threads inside the block, unless the environment variable forbids it.

    Outside the block the variable is set but empty, which means no threads: processes that fork later neither warn
    about lost threads nor hang. Empty on entry therefore counts as unset.
    """
    given = os.environ.get(PARALLELISM, "")
    os.environ[PARALLELISM] = given or "true"
    try:
        yield
    finally:
        os.environ[PARALLELISM] = given
