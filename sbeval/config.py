"""Configurations: frozen dataclasses whose values name cells, checkpoints and what is kept of them."""

import dataclasses
import hashlib
import json
from typing import Any

# for `field(metadata=LATER)`: marks a field added after results were published, left out of digests at its default
LATER = {"later": True}


def digest_of(key: object) -> str:
    """Return ten hexadecimal digits that stand for a configuration: dataclasses, and what JSON knows, in any nesting.

    Fields with `compare=False` are not part of the identity.
    """
    text = json.dumps(key, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _plain(value: object) -> Any:
    assert dataclasses.is_dataclass(value) and not isinstance(value, type), value
    values = {entry: getattr(value, entry.name) for entry in dataclasses.fields(value) if entry.compare}
    return {
        entry.name: item
        for entry, item in values.items()
        if not (entry.metadata.get("later") and item == entry.default)
    }
