"""The store of a model's responses on disk, written at once, so that a killed run resumes at the next request.

A response depends on the model, the dtype and the input tokens alone. A file is of one model and dtype; its keys are
digests of the kind of request and the input tokens, after truncation. So responses are never reused across tokenizers,
lengths, prompts or versions of a task. Each has a digest of its own: one that is not as it was written is named, and
generated again.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sbeval.errors import InputError
from sbeval.runtime.files import storing

TABLE = "CREATE TABLE IF NOT EXISTS responses (key BLOB PRIMARY KEY, answer BLOB, digest BLOB) WITHOUT ROWID"
# a disk that is full, read-only or broken, a folder that takes no file, a lock that another process does not release
OF_THE_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
)


def key(request: str, tokens: Sequence[int]) -> bytes:
    """Return the digest of a request on these tokens. request: its kind and options."""
    return hashlib.sha256(request.encode() + b"\0" + np.asarray(tokens, dtype=np.int64).tobytes()).digest()


class Answers:
    """JSON answers by key; in memory where `path` is None. anew: delete those of earlier runs. say: prints a line."""

    def __init__(self, path: Path | None = None, *, anew: bool = False, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        if path is not None:
            with storing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        with self._reading():
            # another process may write answers of the same model
            self._file = sqlite3.connect(path or ":memory:", timeout=60)
            self._file.execute(TABLE)
            # a record of which the key is gone is not found, and so not named otherwise
            ((found,),) = self._file.execute("PRAGMA quick_check(1)").fetchall()
            if found != "ok":
                say(
                    f"{path} is not as it was written ({found.splitlines()[0]}): "
                    "responses that it has lost are generated again"
                )
            if anew:
                # the file is not removed: another process may have it open
                with self._file:
                    self._file.execute("DELETE FROM responses")

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Any]:
        """Return the stored answers of these keys, without those that are not as they were written."""
        select = "SELECT answer, digest FROM responses WHERE key = ?"
        with self._reading():
            rows = {one: self._file.execute(select, (one,)).fetchone() for one in keys}
        stored = {one: row for one, row in rows.items() if row is not None}
        whole = {one: answer for one, (answer, digest) in stored.items() if _is_whole(one, answer, digest)}
        if changed := [one.hex()[:10] for one in stored if one not in whole]:
            self._say(
                f"{self._path}: {len(changed)} of {len(stored)} stored responses are not as they were written, and are "
                f"generated again: {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
            )
        return {one: json.loads(answer) for one, answer in whole.items()}

    def keep(self, answers: Mapping[bytes, Any]) -> None:
        """Write answers; they survive a kill after this returns."""
        texts = {one: json.dumps(answer).encode() for one, answer in answers.items()}
        rows = [(one, text, _digest(one, text)) for one, text in texts.items()]
        with self._reading(), self._file:
            self._file.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise InputError for a disk that is full, and for a file that is not a database, or no longer one."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            # the lowest byte is the kind of an error
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in OF_THE_DISK:
                raise InputError(
                    f"cannot write {self._path}: {error}; "
                    "earlier answers are kept: fix this and run the same command again to resume"
                ) from None
            raise InputError(f"{self._path} is not a cache of model responses ({error}): remove it") from None


def _digest(key: bytes, answer: bytes) -> bytes:
    return hashlib.sha256(key + answer).digest()[:16]


def _is_whole(key: bytes, answer: object, digest: object) -> bool:
    """Return whether a record is as it was written, down to the kinds of its values."""
    return isinstance(answer, bytes) and digest == _digest(key, answer)
