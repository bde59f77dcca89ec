"""Checkpoints: a folder with model.safetensors, config.json and, during training, optimizer.safetensors.

During training of a sharded model, `shards` holds weights and optimizer state, as torch.distributed.checkpoint writes
them. A folder is written under another name and renamed when complete, so a reader finds all of it or nothing.
config.json has the SHA-256 of every file and of itself: a damaged file is named, and never loaded.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from sbeval.errors import InputError, first_line
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.runtime import distributed
from sbeval.runtime.distributed import ALONE, World
from sbeval.runtime.files import beside, clear, readable_as_others, sha256, storing
from sbeval.training.optimizer import state_names

AGAIN = "remove its folder to train again"
Part = TypeVar("Part")


@dataclass(slots=True, kw_only=True)
class State:
    """Progress of a training run.

    losses: of every step, in nats/token. scores: (step, score) on validation data; task_scores: by task, as `task`,
    `step`, `score` and `n`, the items. held_out: (step, nats/token) on held-out text. diagnoses: the fields of each
    `evaluation.diagnostics.Reading`, and the step. seconds: of all steps; diagnosis_seconds: of all diagnoses.
    tokens_per_second, mfu: the speed, and model FLOP utilisation, last measured.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    task_scores: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    diagnoses: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    diagnosis_seconds: float = 0.0
    tokens_per_second: float | None = None
    mfu: float | None = None
    finished: bool = False

    @property
    def step(self) -> int:
        return len(self.losses)


def save(
    folder: Path,
    model: Decoder,
    state: State,
    optimizer: torch.optim.Optimizer | None = None,
    training: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint, replacing `folder`. `training` records the training config.

    Raise InputError, and leave `folder` unchanged, when it cannot be written.
    """
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    if model.config.tied:
        del weights["head.weight"]
    tensors = {"model.safetensors": weights}
    if optimizer is not None:
        moments = {name: x.contiguous() for name, x in _optimizer_tensors(model, optimizer).items()}
        tensors["optimizer.safetensors"] = moments
    with _written(folder) as partial:
        for name, values in tensors.items():
            try:
                save_file(values, partial / name)
            except SafetensorError as error:
                raise OSError(first_line(error)) from None
            readable_as_others(partial / name)
        files = {name: sha256(partial / name) for name in tensors}
        _complete(folder, partial, model.config, state, training, files)


def save_sharded(
    folder: Path,
    model: Decoder,
    state: State,
    optimizer: torch.optim.Optimizer,
    world: World,
    training: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint of a sharded model during training; all processes must call."""
    from sbeval.training import fsdp

    with _written(folder, world) as partial:
        mine = fsdp.save(partial / "shards", _all_tensors(model, optimizer), world)
        files = distributed.merged({f"shards/{path.name}": sha256(path) for path in mine}, world)
        if world.leads:
            _complete(folder, partial, model.config, state, training, files)
        distributed.wait(world)


def _partial(folder: Path) -> Path:
    return beside(folder, "partial")


def _old(folder: Path) -> Path:
    return beside(folder, "old")


@contextmanager
def _written(folder: Path, world: World = ALONE) -> Iterator[Path]:
    """Give a temporary folder, which `_complete` renames to `folder` in the block; remove it on an error."""
    partial = _partial(folder)
    with storing(folder):
        try:
            if world.leads:
                clear(partial)
                partial.mkdir(parents=True)
            distributed.wait(world)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _complete(
    folder: Path,
    partial: Path,
    model: ModelConfig,
    state: State,
    training: Mapping[str, object] | None,
    files: Mapping[str, str],
) -> None:
    """Write config.json beside the tensors and rename `partial` to `folder`."""
    config: dict[str, object] = {"model": dataclasses.asdict(model), "state": dataclasses.asdict(state)}
    config |= {"training": training, "files": files}
    config["digest"] = _digest(config)
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    old = _old(folder)
    if folder.exists():
        # without `folder`, `old` is the only checkpoint
        clear(old)
        folder.rename(old)
    partial.rename(folder)
    clear(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint, and the one it was about to replace, if any."""
    for path in (_old(folder), folder):
        # delete config.json first: a partly deleted folder is then not a checkpoint
        if path.is_dir():
            (path / "config.json").unlink(missing_ok=True)
        clear(path)


def tidy(folder: Path) -> None:
    """Remove what a killed writer left beside a checkpoint; no other process may write to it."""
    clear(_partial(folder))
    if (folder / "config.json").is_file():
        clear(_old(folder))


def find(folder: Path) -> Path | None:
    """Return the complete checkpoint at `folder`: itself, or the one that a killed writer was about to replace."""
    return next((path for path in (folder, _old(folder)) if os.path.isfile(path / "config.json")), None)


def load_state(folder: Path) -> State:
    """Return the progress of a checkpoint's run; raise InputError when its config.json is missing or invalid."""
    return _read_config(folder).state


def is_finished(folder: Path) -> bool:
    """Return whether there is a checkpoint at `folder` of a run that is finished; False too for one that is damaged."""
    found = find(folder)
    try:
        return found is not None and load_state(found).finished
    except InputError:
        # who loads it names what is damaged
        return False


def training_length(folder: Path) -> int | None:
    """Return the tokens per sequence that a checkpoint was trained on; None if not recorded."""
    length = (_read_config(folder).training or {}).get("length")
    return length if isinstance(length, int) else None


def training_step_tokens(folder: Path) -> int | None:
    """Return the tokens of an optimizer step of a checkpoint's training; None if not recorded."""
    training = _read_config(folder).training or {}
    batch, length = training.get("batch"), training.get("length")
    return batch * length if isinstance(batch, int) and isinstance(length, int) else None


def training_tokenizer(folder: Path) -> str | None:
    """Return the digest of the tokenizer that a checkpoint was trained with; None if not recorded."""
    digest = (_read_config(folder).training or {}).get("tokenizer")
    return digest if isinstance(digest, str) else None


def load_model(folder: Path, device: torch.device | str = "cpu") -> Decoder:
    """Load the model of a checkpoint; raise InputError, naming the file, if one is missing, damaged or does not fit."""
    config = _read_config(folder).model
    if (folder / "shards").is_dir():
        # its index is a pickle, which is read only when a run resumes from its own checkpoint
        raise InputError(f"{folder} is a checkpoint of a sharded model in training: finish it with sbeval train")
    weights = _read_tensors(folder, "model.safetensors")
    if (layers := len({name.split(".")[1] for name in weights if name.startswith("blocks.")})) != config.layers:
        raise InputError(
            f"{folder / 'model.safetensors'} does not fit its config: it has {layers} layers, not {config.layers}"
        )
    try:
        # without memory for weights that are replaced: an invalid size must not allocate all of it
        with torch.device("meta"):
            model = Decoder(config)
    except (RuntimeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a model: {first_line(error)}") from None
    _load_weights(folder, model, weights, assign=True)
    if config.tied:
        model.head.weight = model.embedding.weight
    return model.to(device)


def restore(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the weights, and the optimizer's state if given, into a model of the same config."""
    if (folder / "shards").is_dir():
        _restore_shards(folder, model, optimizer)
        return
    _load_weights(folder, model, _read_tensors(folder, "model.safetensors"))
    if optimizer is not None:
        _restore_optimizer(folder, model, optimizer)


def _load_weights(folder: Path, model: Decoder, weights: dict[str, Tensor], *, assign: bool = False) -> None:
    if model.config.tied and "embedding.weight" in weights:
        weights["head.weight"] = weights["embedding.weight"]
    if distributed.is_sharded(model):
        from sbeval.training import fsdp

        own = model.state_dict()
        weights = {name: fsdp.shard_like(x, own[name]) if name in own else x for name, x in weights.items()}
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        # below a heading, a line for each kind of mismatch
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{folder / 'model.safetensors'} does not fit its config: {first}") from None


def _restore_shards(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer | None) -> None:
    from sbeval.training import fsdp

    for name in _read_config(folder).files or {}:
        _verify(folder, name)
    if optimizer is not None:
        for parameter, names in state_names(optimizer).items():
            optimizer.state[parameter] = {
                name: torch.zeros((), device=parameter.device) if name == "step" else torch.zeros_like(parameter)
                for name in names
            }
    fsdp.load(folder / "shards", _all_tensors(model, optimizer))


def _all_tensors(model: Decoder, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return weights and optimizer state by name, not copied; a weight that two layers share has one name."""
    weights = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return weights | ({} if optimizer is None else _optimizer_tensors(model, optimizer))


@dataclass(frozen=True, slots=True)
class _Config:
    """config.json. `files` are digests by name; None in checkpoints older than these."""

    model: ModelConfig
    state: State
    training: dict[str, Any] | None
    files: dict[str, str] | None


def _read_config(folder: Path) -> _Config:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} is not a checkpoint: it has no config.json") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    # RecursionError: nested too deep for the parser
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if isinstance(config, dict) and "digest" in config and config.pop("digest") != _digest(config):
        raise InputError(f"{path} is damaged: its digest does not match; {AGAIN}")
    try:
        model, state = _typed(ModelConfig, config["model"]), _typed(State, config["state"])
        state.losses = [float(loss) for loss in state.losses]
        # JSON has no tuples
        state.scores = [(int(step), float(score)) for step, score in state.scores]
        state.held_out = [(int(step), float(loss)) for step, loss in state.held_out]
        rest = {name: config[name] for name in config if name not in ("model", "state")}
        return _typed(_Config, {"training": None, "files": None} | rest | {"model": model, "state": state})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is not the config of a checkpoint ({type(error).__name__}: {error})") from None


def _typed(kind: type[Part], given: Mapping[str, Any]) -> Part:
    """Make a dataclass from JSON; raise TypeError for an unknown field or one of another type than declared."""
    hints = get_type_hints(kind)
    if not isinstance(given, Mapping) or (unknown := [name for name in given if name not in hints]):
        raise TypeError(f"unknown {unknown[0]!r}" if isinstance(given, Mapping) else f"not an object: {given!r}")
    for name, value in given.items():
        options = get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        known = tuple(get_origin(option) or option for option in options)
        # JSON has 1.0 for floats, but by hand one writes 1
        whole = isinstance(value, int) and float in known
        if not (isinstance(value, known) or whole) or (isinstance(value, bool) and bool not in known):
            raise TypeError(f"{name} is {value!r}")
    return kind(**given)


def _digest(config: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _verify(folder: Path, name: str, content: bytes | None = None) -> None:
    """Raise InputError unless a file, or its content, has its recorded digest, if config.json has digests."""
    files, path = _read_config(folder).files, folder / name
    try:
        digest = sha256(path) if content is None else hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}; {AGAIN}") from None
    if files is not None and digest != files.get(name):
        raise InputError(f"{path} can't be read: it is damaged, its digest does not match; {AGAIN}")


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read a file of tensors into memory: one that is cut while it is mapped ends the process with SIGBUS."""
    path = folder / name
    try:
        content = path.read_bytes()
        _verify(folder, name, content)
        return load(content)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read: {first_line(error)}; {AGAIN}") from None


def _optimizer_tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    path = folder / "optimizer.safetensors"
    tensors = _read_tensors(folder, path.name)
    sharded, names = distributed.is_sharded(model), state_names(optimizer)
    for name, parameter in model.named_parameters():
        state: dict[str, Tensor] = {}
        for key in names[parameter]:
            shape = torch.Size() if key == "step" else parameter.shape
            value = tensors.get(f"{key}.{name}")
            if value is None or value.shape != shape:
                given = "none" if value is None else f"shape {tuple(value.shape)}"
                raise InputError(f"{path} does not fit its model: {key} of {name} has {given}, not {tuple(shape)}")
            state[key] = _as_parameter(value, parameter) if sharded and shape else value.to(parameter.device)
        optimizer.state[parameter] = state


def _as_parameter(x: Tensor, parameter: Tensor) -> Tensor:
    from sbeval.training import fsdp

    return fsdp.shard_like(x, parameter)
