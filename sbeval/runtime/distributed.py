"""Several processes that train one model, as torchrun starts them: who we are, and what is said between us.

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
    """This process, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


ALONE = World()


def size() -> int:
    """Processes that the launcher started: 1 without one. InputError when its variable is no number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"WORLD_SIZE is {text!r}; torchrun sets it to the number of processes")
    return int(text)


def local_device(name: str | None) -> str | None:
    """The device of this process of those on its machine: of several, each has a GPU of its own."""
    if size() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in (None, "cuda"):
        raise InputError(f"--device {name}: under torchrun each process takes a GPU of its own; give cuda or cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def joined(place: torch.device) -> Iterator[World]:
    """Join the other processes for the length of the block, NCCL on GPUs and Gloo elsewhere; alone, do nothing."""
    if size() == 1:
        yield ALONE
        return
    use(place)
    # imported while a group exists, as DistributedDataParallel would, it keeps the group for good, and the threads of a
    # living group may still be giving tensors back when Python ends, which aborts the process
    importlib.import_module("torch._dynamo")
    if place.type == "cuda":
        # said here, it need not be guessed at the first barrier
        dist.init_process_group("nccl", device_id=place)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def wait(world: World) -> None:
    """Go on when all have come here."""
    if world.size > 1:
        dist.barrier()


def summed(values: Floats, world: World, place: torch.device) -> Floats:
    """The sum over processes of equally shaped float64 arrays, on each of them."""
    if world.size == 1:
        return values
    total = torch.from_numpy(values).to(place)
    dist.all_reduce(total)
    return np.asarray(total.cpu().numpy(), dtype=np.float64)


def anywhere(flag: bool, world: World, place: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return flag if world.size == 1 else bool(summed(np.array([flag], dtype=np.float64), world, place)[0])


def merged(mine: dict[str, str], world: World) -> dict[str, str]:
    """The entries of all processes, on each of them."""
    if world.size == 1:
        return mine
    parts: list[dict[str, str]] = [{}] * world.size
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters instead of all of each."""
    # a DTensor, whose import takes a second that nothing else needs
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
