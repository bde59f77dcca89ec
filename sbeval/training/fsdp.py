"""A model whose weights, gradients and optimizer state are spread over processes (FSDP2), and its checkpoints.

A parameter is then a DTensor, of which each process holds a part. A checkpoint of training holds them as
torch.distributed.checkpoint writes them, each process its own; any number of processes, one included, goes on from it.
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
    """Shard the module `loss` in place: each of its `blocks` gathers its weights when it runs, the rest stay gathered
    from forward to backward."""
    for block in blocks:
        fully_shard(block)
    fully_shard(loss)


def keep_gradients(loss: nn.Module, stay: bool) -> None:
    """Say whether gradients of the passes from here on stay in this process, to be summed over all by a later one."""
    assert isinstance(loss, FSDPModule)
    loss.set_requires_gradient_sync(not stay)


def spread_again(loss: nn.Module) -> None:
    """Give up the weights that stay gathered until a backward pass, where none comes."""
    assert isinstance(loss, FSDPModule)
    loss.reshard()


def whole(x: Tensor) -> Tensor:
    """The tensor of which this process may hold a part. All processes must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_as(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that each process has whole, spread and placed as `like` is."""
    x = x.to(like.device)
    if not isinstance(like, DTensor):
        return x
    # the same everywhere already: nothing to send
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def save(folder: Path, tensors: dict[str, Tensor], world: World) -> list[Path]:
    """Write tensors into `folder`, each process its part, and return the files of this one. All must call."""
    try:
        with _alone_too():
            write_state(tensors, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        raise OSError(str(error).strip()) from None
    return [*folder.glob(f"__{world.rank}_*"), *([folder / ".metadata"] if world.leads else [])]


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, spread in whatever way, in place; InputError when the folder does not hold them."""
    try:
        with _alone_too():
            read_state(tensors, storage_reader=FileSystemReader(folder))
    except (CheckpointException, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} can't be read: {first}; remove the checkpoint to train again") from None


@contextmanager
def _alone_too() -> Iterator[None]:
    with warnings.catch_warnings():
        # one process is what is meant where there is one
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
