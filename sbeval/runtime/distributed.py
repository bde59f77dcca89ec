"""Distributed training with torchrun: rank, world size and collectives.

torchrun --nproc-per-node 8 -m sbeval train --preset paper
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from sbeval.errors import InputError
from sbeval.runtime.device import use

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class World:
    """Rank of this process, and the number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0


ALONE = World()


def size() -> int:
    """Return the number of processes that the launcher started, 1 without one; InputError if WORLD_SIZE is invalid."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"WORLD_SIZE is {text!r}; torchrun sets it to the number of processes")
    return int(text)


def local_device(name: str | None) -> str | None:
    """Return the device of this process: of several on a machine each has its own GPU."""
    if size() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in (None, "cuda"):
        raise InputError(f"--device {name}: under torchrun each process takes a GPU of its own; give cuda or cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the process group in the block, by NCCL on GPUs and Gloo elsewhere; do nothing for a single process."""
    if size() == 1:
        yield ALONE
        return
    use(device)
    # if imported while a group exists, as by DistributedDataParallel, it keeps the group alive, whose threads may still
    # release tensors when Python exits, which aborts the process
    importlib.import_module("torch._dynamo")
    if device.type == "cuda":
        # otherwise guessed at the first barrier
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def wait(world: World) -> None:
    """Wait for all processes: a barrier."""
    if world.size > 1:
        dist.barrier()


def summed(values: Floats, world: World, device: torch.device) -> Floats:
    """All-reduce: return the sum over processes of float64 arrays of equal shape."""
    if world.size == 1:
        return values
    total = torch.from_numpy(values).to(device)
    dist.all_reduce(total)
    return np.asarray(total.cpu().numpy(), dtype=np.float64)


def anywhere(flag: bool, world: World, device: torch.device) -> bool:
    """Return True if the flag is set in any process."""
    return flag if world.size == 1 else bool(summed(np.array([flag], dtype=np.float64), world, device)[0])


def merged(mine: dict[str, str], world: World) -> dict[str, str]:
    """All-gather: return the entries of all processes."""
    if world.size == 1:
        return mine
    parts: list[dict[str, str]] = [{}] * world.size
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def is_sharded(model: nn.Module) -> bool:
    """Return True if the parameters are sharded over processes."""
    # a DTensor, whose import would take a second
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
