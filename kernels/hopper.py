"""Whether the kernels for Hopper run here.

They are written in Gluon, Triton's dialect that leaves layouts, copies and barriers to the author. It is experimental:
a release may change its names, so that it is known in VERSIONS alone.
"""

import functools
import importlib

import torch
from torch import Tensor

VERSIONS = ("3.6", "3.7")
HEAD_SIZES = (64, 128)
# keys of a tile
TILE = 64


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def obstacle(device: torch.device) -> str:
    """Say in words what keeps the kernels from running on this device; empty where they run."""
    if device.type != "cuda":
        return f"it needs a GPU, and this device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it needs a GPU of compute capability 9.x (Hopper), and this one has {major}.{minor}"
    return compiler_obstacle()


@functools.cache
def compiler_obstacle() -> str:
    """The same of the compiler alone, for which no GPU is needed."""
    try:
        version = str(importlib.import_module("triton").__version__)
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"Triton's Gluon can't be imported: {error}"
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        return f"Triton is {version}, and Gluon is known in {' and '.join(VERSIONS)}"
    return ""


def inputs_obstacle(q: Tensor, k: Tensor) -> str:
    """The same of inputs that attention takes."""
    past = k.shape[1] - q.shape[1]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, and q is {q.dtype}"
    if q.shape[3] not in HEAD_SIZES:
        return f"it takes heads of {' and '.join(map(str, HEAD_SIZES))}, and those of q have {q.shape[3]}"
    if past % TILE:
        return f"it takes queries that follow a multiple of {TILE} keys, and q follows {past}"
    if k.shape[0] * k.shape[1] < TILE:
        return f"it takes at least {TILE} keys, and k has {k.shape[0] * k.shape[1]}"
    return ""
