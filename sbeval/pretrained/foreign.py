"""Files of models that others wrote: their tensors and settings, each checked as it is taken."""

import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sbeval.errors import InputError, reason
from sbeval.runtime.files import check_not_pointer


class Tensors:
    """The tensors of a checkpoint; each is taken once and must have the shape that the config gives."""

    def __init__(self, tensors: Mapping[str, Tensor], where: object) -> None:
        self._remaining, self.where = dict(tensors), where

    def __contains__(self, name: str) -> bool:
        return name in self._remaining

    def names(self) -> list[str]:
        return list(self._remaining)

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self._remaining:
            raise InputError(f"{self.where} lacks the tensor {name}, of shape {shape}")
        tensor = self._remaining.pop(name)
        if tensor.shape != shape:
            raise InputError(f"{self.where}: {name} has shape {tuple(tensor.shape)}; its config gives {shape}")
        return tensor

    def size(self, name: str, dim: int) -> int:
        """Return one size of a tensor without taking it."""
        if name not in self._remaining or self._remaining[name].ndim <= dim:
            raise InputError(f"{self.where} lacks the tensor {name}, or it has less than {dim + 1} dimensions")
        return self._remaining[name].shape[dim]

    def finish(self) -> None:
        """Raise InputError, naming them, if tensors remain."""
        if self._remaining:
            raise InputError(f"{self.where} has tensors that its config does not explain: {patterns(self._remaining)}")


class Settings:
    """A config.json, or its settings of all blocks of one kind."""

    def __init__(self, values: Mapping[str, Any], where: object) -> None:
        self._values, self.where = values, where

    def blocks(self, key: str, layers: int) -> "Settings":
        """Return these settings with those of the blocks under `key`, if any, which must be equal in all layers."""
        if (blocks := self.get(key)) is None:
            return self
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise InputError(f"{self.where}: {key} must be a list of settings; got {blocks!r}")
        if len(blocks) != layers:
            raise InputError(f"{self.where}: config.json has {len(blocks)} {key} for {layers} layers")
        if any(block != blocks[0] for block in blocks):
            raise InputError(f"{self.where}: {key} differ from layer to layer, which is not supported")
        return Settings({**self._values, **blocks[0]}, self.where)

    def get(self, *keys: str) -> Any:
        """Return the first of these that is given and not null; None otherwise."""
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)

    def number(self, *keys: str, default: float | None = None) -> float:
        value = default if (given := self.get(*keys)) is None else given
        if not isinstance(value, int | float):
            raise InputError(f"{self.where}: config.json must have a number for {' or '.join(keys)}; got {value!r}")
        return value

    def count(self, *keys: str, default: int | None = None) -> int:
        value = self.number(*keys, default=default)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{self.where}: {keys[0]} must be a whole number of at least 1; got {value!r}")
        return value

    def only(self, key: str, *known: str) -> None:
        """Raise InputError when `key` is given and not one of `known`."""
        if (given := self.get(key)) is not None and given not in known:
            raise InputError(f"{self.where}: {key} {given!r} is not supported, only {' or '.join(known)}")

    def agrees(self, key: str, given: bool | None, present: bool, what: str) -> None:
        """Raise InputError when the config's value contradicts whether a tensor is present."""
        if given is not None and given != present:
            holds = "there is" if present else "there is no"
            raise InputError(f"{self.where}: config.json has {key}={self.get(key)}, but {holds} {what}")


def read(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of model.safetensors, or of the files of its index, which must match them."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _read(folder / "model.safetensors")
    try:
        files = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is not an index of safetensors ({type(error).__name__}: {error})") from None
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise InputError(f"{index} names a file outside its folder: {file}")
        part = _read(folder / file)
        listed = {name for name, location in files.items() if location == file}
        if wrong := sorted(listed ^ set(part)):
            raise InputError(f"{folder / file} does not match {index.name}: {patterns(wrong)}")
        tensors |= part
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        why = explained(str(path.parent), error)
        raise InputError(f"{path} can't be read: {why}; weights are read from safetensors alone") from None


def broken() -> tuple[type[Exception], ...]:
    """Return what safetensors and transformers raise for files that are not what they should be, and for packages that
    they lack."""
    known = (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, SafetensorError)
    try:
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError:
        return known
    return (*known, errors.StrictDataclassError)


def explained(spec: str, error: BaseException) -> str:
    """Return why a model cannot be read: the error's own words, unless a file is a pointer of Git LFS."""
    for path in sorted(Path(spec).glob("*.safetensors")) if os.path.isdir(spec) else ():
        with path.open("rb") as file:
            check_not_pointer(path, file.read(64))
    return reason(error)


def patterns(names: Iterable[str]) -> str:
    """Return names of tensors in one line: layers as {i}, a dozen at most."""
    patterns = sorted({re.sub(r"\.\d+\.", ".{i}.", name) for name in names})
    return ", ".join(patterns[:12]) + (f" and {len(patterns) - 12} more" if len(patterns) > 12 else "")
