"""Attention kernels that are timed beside each other, and their errors against the float64 reference."""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sbeval.bench.problems import Problem
from sbeval.errors import InputError
from sbeval.kernels import softmax, stick_breaking

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """attention: what it computes; backend: whose kernel. `build` raises ImportError if it is not installed."""

    attention: str
    backend: str
    build: Callable[[Problem, torch.device], Run]


def _ours(backend: str | None = None) -> Callable[[Problem, torch.device], Run]:
    def build(problem: Problem, device: torch.device) -> Run:
        bounds = problem.cu_seqlens(device)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return stick_breaking.attention(q, k, v, cu_seqlens=bounds, epsilon=problem.epsilon, backend=backend)[0]

        return run

    return build


def _fla(problem: Problem, device: torch.device) -> Run:
    attend = importlib.import_module("fla.ops.stickbreaking_attn").parallel_stickbreaking_attn
    bounds = problem.cu_seqlens(device)
    _plain(problem, "fla", packed=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q, k, v, scale=problem.head_dim**-0.5, cu_seqlens=bounds)[0]
        return out

    return run


def _authors(problem: Problem, device: torch.device) -> Run:
    attend = importlib.import_module("stickbreaking_attention.sb_attn").sb_attn
    _plain(problem, "the authors' package")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = attend(q, k, v, inv_temp=problem.head_dim**-0.5)[0]
        return out.transpose(1, 2)

    return run


def sdpa(backend: SDPBackend) -> Callable[[Problem, torch.device], Run]:
    def build(problem: Problem, device: torch.device) -> Run:
        if problem.bounds or problem.queries not in (1, problem.keys):
            raise InputError("SDPA takes whole sequences")

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
                ).transpose(1, 2)

        return run

    return build


def _flex(problem: Problem, device: torch.device) -> Run:
    bounds = problem.cu_seqlens(device)
    return lambda q, k, v: softmax.attention(q, k, v, cu_seqlens=bounds, backend="flex")


def _plain(problem: Problem, who: str, *, packed: bool = False) -> None:
    if problem.heads != problem.kv_heads or problem.queries != problem.keys or (problem.bounds and not packed):
        raise InputError(f"{who} takes whole sequences without grouped heads{'' if packed else ' or packing'}")


# whose failure ends the benchmark, but for what they say that they can't serve
OURS = ("triton", "triton-hopper")
CONTENDERS = (
    *(Contender("stick_breaking", backend, _ours(backend)) for backend in OURS),
    Contender("softmax", "flash", sdpa(SDPBackend.FLASH_ATTENTION)),
    Contender("softmax", "cudnn", sdpa(SDPBackend.CUDNN_ATTENTION)),
    Contender("softmax", "flex", _flex),
    Contender("stick_breaking", "fla", _fla),
    Contender("stick_breaking", "authors", _authors),
)


def error_of(contender: Contender, problem: Problem, device: torch.device, dtype: torch.dtype) -> float:
    """Return the relative error of the output against float64 on standard normal inputs of at most 2048 tokens."""
    length = min(2048, problem.keys)
    bounds = (0, length // 3, length) if problem.bounds else ()
    short = dataclasses.replace(
        problem, step="forward", batch=1, queries=min(length, problem.queries), keys=length, bounds=bounds
    )
    q, k, v = short.draw(device, dtype)
    packed = short.cu_seqlens(device)
    with torch.no_grad():
        exact = [x.double() for x in (q, k, v)]
        if contender.attention == "softmax":
            wanted = softmax.reference(*exact, scale=short.head_dim**-0.5, cu_seqlens=packed)
        else:
            wanted = stick_breaking.reference(*exact, cu_seqlens=packed)[0]
        found = contender.build(short, device)(q, k, v).double()
    error = float((found - wanted).norm() / wanted.norm())
    if not error < 0.05:
        raise ArithmeticError(f"wrong by {error:.1e}")
    return error
