"""Weights, gradients and optimizer state sharded over processes (FSDP2), and checkpoints of them.

A parameter is then a DTensor, of which each process holds a shard. During training a checkpoint holds the shards as
torch.distributed.checkpoint writes them; any number of processes, one included, can resume from it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sbeval.errors import InputError
from sbeval.runtime.distributed import World


def shard(loss: nn.Module, blocks: nn.ModuleList) -> None:
    """Shard the module `loss` in place.

    Each of its `blocks` gathers its weights when it runs; the rest stay gathered from forward to backward.
    """
    for block in blocks:
        fully_shard(block)
    fully_shard(loss)


def keep_gradients(loss: nn.Module, stay: bool) -> None:
    """Set whether gradients of the next backward passes stay in this process, to be reduced by a later pass."""
    assert isinstance(loss, FSDPModule)
    loss.set_requires_gradient_sync(not stay)


def reshard(loss: nn.Module) -> None:
    """Free the weights that stay gathered until a backward pass, when none follows."""
    assert isinstance(loss, FSDPModule)
    loss.reshard()


def full(x: Tensor) -> Tensor:
    """Return the full tensor of one that may be sharded. All processes must call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that each process has in full, sharded and placed like `like`."""
    x = x.to(like.device)
    if not isinstance(like, DTensor):
        return x
    # the same in all processes: nothing to send
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def save(folder: Path, tensors: dict[str, Tensor], world: World) -> list[Path]:
    """Write tensors into `folder`, each process its shards; return the files of this one. All must call."""
    try:
        with _alone_too():
            write_state(tensors, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        raise OSError(str(error).strip()) from None
    return [*folder.glob(f"__{world.rank}_*"), *([folder / ".metadata"] if world.leads else [])]


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, however sharded, in place; raise InputError when the folder does not hold them."""
    try:
        with _alone_too():
            read_state(tensors, storage_reader=FileSystemReader(folder))
    except (CheckpointException, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} can't be read: {first}; remove the checkpoint to train again") from None


@contextmanager
def _alone_too() -> Iterator[None]:
    with warnings.catch_warnings():
        # single-process use is intended
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
