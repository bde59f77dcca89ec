"""What a model has answered, kept on disk as it comes, so that a run that was killed goes on request by request.

An answer depends on the model, the dtype and the tokens that the model was given, and on nothing else. A file is of one
model and dtype; its keys are digests of those tokens, taken after a context was cut, with what was asked of them. So no
tokenizer, length, prompt or version of a task can be answered from another's.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbeval.errors import InputError
from sbeval.runtime.files import storing


def key(question: str, tokens: Sequence[int]) -> bytes:
    """Digest of what is asked of these tokens."""
    return hashlib.sha256(question.encode() + b"\0" + np.asarray(tokens, dtype=np.int64).tobytes()).digest()


class Answers:
    """Answers, JSON each, by key; in memory alone when there is no path. anew: forget those that are there."""

    def __init__(self, path: Path | None = None, *, anew: bool = False) -> None:
        self._path = path
        if path is not None:
            with storing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # another process may be writing answers of the same model
            self._file = sqlite3.connect(path or ":memory:", timeout=60)
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT) WITHOUT ROWID")
            if anew:
                # not by removing the file, which another process may have open
                with self._file:
                    self._file.execute("DELETE FROM answers")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} holds no answers of a model ({error}); remove it") from None

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Any]:
        """The answers that are there."""
        select = "SELECT answer FROM answers WHERE key = ?"
        found = ((one, self._file.execute(select, (one,)).fetchone()) for one in keys)
        return {one: json.loads(row[0]) for one, row in found if row is not None}

    def keep(self, answers: Mapping[bytes, Any]) -> None:
        """Write answers; when this returns a kill does not lose them."""
        rows = [(one, json.dumps(answer)) for one, answer in answers.items()]
        try:
            with self._file:
                self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        # a full or read-only disk; what was kept before stays
        except sqlite3.OperationalError as error:
            raise InputError(
                f"cannot write {self._path}: {error}; "
                "what is answered is kept: fix this and run the same command again to resume"
            ) from None

    def close(self) -> None:
        self._file.close()
