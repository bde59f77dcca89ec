"""Checkpoints: a folder with model.safetensors, config.json and, while training goes on, optimizer.safetensors.

While a sharded model trains, `shards` holds both instead, as torch.distributed.checkpoint writes them. A folder is
written under another name and renamed when complete, so a reader finds all of it or nothing.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbeval import distributed
from sbeval.distributed import World
from sbeval.errors import InputError
from sbeval.model import Decoder, ModelConfig


@dataclass(slots=True, kw_only=True)
class State:
    """Where a training run stands: the loss of every step done (nats/token), the seconds they took, and (step, score)
    of each look at held-out data."""

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    @property
    def step(self) -> int:
        return len(self.losses)


def save(
    folder: Path, model: Decoder, state: State, optimizer: torch.optim.Optimizer | None = None,
    training: Mapping[str, object] | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint in place of whatever `folder` holds. `training` says for readers how the model is trained."""
    partial = _begin(folder)
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    if model.config.tied:
        del weights["head.weight"]
    save_file(weights, partial / "model.safetensors")
    if optimizer is not None:
        moments = {name: x.contiguous() for name, x in _optimizer_tensors(model, optimizer).items()}
        save_file(moments, partial / "optimizer.safetensors")
    _complete(folder, partial, model.config, state, training)


def save_sharded(
    folder: Path, model: Decoder, state: State, optimizer: torch.optim.Optimizer, world: World,
    training: Mapping[str, object] | None = None,
) -> None:  # fmt: skip
    """The same of a model that is sharded and still trains; all processes must call."""
    from sbeval import sharded

    partial = _partial(folder)
    if world.leads:
        _begin(folder)
    distributed.wait(world)
    sharded.save(partial / "shards", _all_tensors(model, optimizer))
    if world.leads:
        _complete(folder, partial, model.config, state, training)
    distributed.wait(world)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _begin(folder: Path) -> Path:
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _complete(
    folder: Path, partial: Path, model: ModelConfig, state: State, training: Mapping[str, object] | None
) -> None:
    """Write the config beside the tensors and give all of it its name."""
    config = {"model": dataclasses.asdict(model), "state": dataclasses.asdict(state), "training": training}
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    old = _old(folder)
    if folder.exists():
        # without `folder`, `old` is all there is
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint, and the one it was about to replace, if there is any."""
    for path in (_old(folder), folder):
        # first what makes it one: stopped half way, the rest is none
        (path / "config.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what a writer that was killed left beside a checkpoint; no other writes to it meanwhile."""
    shutil.rmtree(_partial(folder), ignore_errors=True)
    if (folder / "config.json").is_file():
        shutil.rmtree(_old(folder), ignore_errors=True)


def find(folder: Path) -> Path | None:
    """The complete checkpoint at `folder`: itself, or the one it was about to replace when the writer was stopped."""
    return next((path for path in (folder, _old(folder)) if (path / "config.json").is_file()), None)


def load_state(folder: Path) -> State:
    """How far the run of a checkpoint has come; InputError names a config.json that is missing or garbled."""
    return _read_config(folder)[1]


def training_length(folder: Path) -> int | None:
    """Tokens of the sequences that the model of a checkpoint was trained on; None where the folder does not say."""
    training = json.loads((folder / "config.json").read_text()).get("training") or {}
    length = training.get("length")
    return length if isinstance(length, int) else None


def load_model(folder: Path, device: torch.device | str = "cpu") -> Decoder:
    """Build the model of a checkpoint folder; InputError names a file that is missing, cut short or does not fit."""
    model = Decoder(_read_config(folder)[0])
    if (folder / "shards").is_dir():
        # its index is a pickle, which is read where a run goes on from its own and nowhere else
        raise InputError(f"{folder} is of a sharded model that is still training: finish it with sbeval train")
    restore(folder, model)
    return model.to(device)


def restore(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the weights, and the optimizer's moments when asked, into a model of the same config."""
    if (folder / "shards").is_dir():
        _restore_shards(folder / "shards", model, optimizer)
        return
    weights = _read_tensors(folder / "model.safetensors")
    if model.config.tied and "embedding.weight" in weights:
        weights["head.weight"] = weights["embedding.weight"]
    if distributed.is_sharded(model):
        from sbeval import sharded

        own = model.state_dict()
        weights = {name: sharded.spread_as(x, own[name]) if name in own else x for name, x in weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # below a heading, a line for each kind of misfit
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{folder / 'model.safetensors'} does not fit its config: {first}") from None
    if optimizer is not None:
        _restore_optimizer(folder / "optimizer.safetensors", model, optimizer)


def _restore_shards(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer | None) -> None:
    from sbeval import sharded

    if optimizer is not None:
        for parameter in model.parameters():
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    sharded.load(folder, _all_tensors(model, optimizer))


def _all_tensors(model: Decoder, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Weights and moments by name, not copied; a weight that two layers share has one name."""
    weights = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return weights | ({} if optimizer is None else _optimizer_tensors(model, optimizer))


def _read_config(folder: Path) -> tuple[ModelConfig, State]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is no checkpoint: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    try:
        model, state = ModelConfig(**config["model"]), State(**config["state"])
        # JSON has no tuples
        state.scores = [(step, score) for step, score in state.scores]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not the config of a checkpoint ({type(error).__name__}: {error})") from None
    return model, state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(f"{path} can't be read: {error}; remove its folder to train again") from None


def _optimizer_tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    tensors = _read_tensors(path)
    spread = distributed.is_sharded(model)
    for name, parameter in model.named_parameters():
        state: dict[str, Tensor] = {}
        for key, shape in (("step", torch.Size()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            found = tensors.get(f"{key}.{name}")
            if found is None or found.shape != shape:
                given = "none" if found is None else f"shape {tuple(found.shape)}"
                raise InputError(f"{path} does not fit its model: {key} of {name} has {given}, not {tuple(shape)}")
            state[key] = _as_parameter(found, parameter) if spread and shape else found.to(parameter.device)
        optimizer.state[parameter] = state


def _as_parameter(x: Tensor, parameter: Tensor) -> Tensor:
    from sbeval import sharded

    return sharded.spread_as(x, parameter)
