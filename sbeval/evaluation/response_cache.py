"""A cache of a model's responses on disk, written at once, so that a killed run resumes at the next request.

A response depends on the model, the dtype and the input tokens alone. A file is of one model and dtype; its keys are
digests of the kind of request and the input tokens, after truncation. So responses are never reused across tokenizers,
lengths, prompts or versions of a task.
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
    """Return the digest of a request on these tokens. question: its kind and options."""
    return hashlib.sha256(question.encode() + b"\0" + np.asarray(tokens, dtype=np.int64).tobytes()).digest()


class Answers:
    """JSON answers by key; in memory where `path` is None. anew: delete those of earlier runs."""

    def __init__(self, path: Path | None = None, *, anew: bool = False) -> None:
        self._path = path
        if path is not None:
            with storing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # another process may write answers of the same model
            self._file = sqlite3.connect(path or ":memory:", timeout=60)
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT) WITHOUT ROWID")
            if anew:
                # the file is not removed: another process may have it open
                with self._file:
                    self._file.execute("DELETE FROM answers")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is not a cache of model responses ({error}): remove it") from None

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Any]:
        """Return the stored answers of these keys."""
        select = "SELECT answer FROM answers WHERE key = ?"
        rows = ((one, self._file.execute(select, (one,)).fetchone()) for one in keys)
        return {one: json.loads(row[0]) for one, row in rows if row is not None}

    def keep(self, answers: Mapping[bytes, Any]) -> None:
        """Write answers; they survive a kill after this returns."""
        rows = [(one, json.dumps(answer)) for one, answer in answers.items()]
        try:
            with self._file:
                self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        # a full or read-only disk; earlier answers stay
        except sqlite3.OperationalError as error:
            raise InputError(
                f"cannot write {self._path}: {error}; "
                "earlier answers are kept: fix this and run the same command again to resume"
            ) from None

    def close(self) -> None:
        self._file.close()
