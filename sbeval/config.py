"""Configurations: frozen dataclasses whose values identify cells and checkpoints, and whose fields are the options."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

# for `field(metadata=LATER)`: marks a field added after results were published, left out of digests at its default
LATER = {"later": True}
# for `option(..., TRAINED)`: marks an option that the training of a model has decided
TRAINED = {"trained": True}
# a target that is not scored: the ignore_index of torch's cross_entropy
IGNORE = -100
# groups of options in `--help`
TASK, MODEL, TRAINING, EVALUATION, DATA, RUN = "Task", "Model", "Training", "Evaluation", "Data", "Run"
ATTENTION = "Method, or package.module of your own, with options as name:key=value,..."
SEED = "Seed of weights and data."
LR = "Peak learning rate."
OPTIMIZERS = ("adamw", "muon")
# of `--threads`
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
# what a name on the hub looks like, of a model, a dataset or a tokenizer
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def option(
    default: Any,
    group: str,
    help: str,
    *metadata: Mapping[str, Any],
    flag: str = "",
    metavar: str | None = None,
    compare: bool = True,
) -> Any:
    """Declare a field of a config that is also an option of its command, described by `help`.

    metadata: marks of the field, such as LATER. flag: the flag if it is not the field's name, as `--seed` for `seeds`.
    """
    own = {"help": help, "group": group, "flag": flag, "metavar": metavar}
    return dataclasses.field(
        default=default,
        compare=compare,
        metadata={key: value for part in (*metadata, own) for key, value in part.items()},
    )


def decided(of: type, given: Mapping[str, Any]) -> list[str]:
    """Return the flags of the options of a config that are given and that a model that was trained has decided."""
    return [
        entry.metadata["flag"] or f"--{entry.name.replace('_', '-')}"
        for entry in dataclasses.fields(of)
        if entry.metadata.get("trained") and entry.name in given
    ]


def digest_of(key: object) -> str:
    """Return ten hexadecimal digits that identify a configuration: dataclasses and JSON values, nested at will.

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
