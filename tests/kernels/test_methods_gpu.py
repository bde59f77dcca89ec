"""fire, forgetting and sliding_window on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbeval.kernels import fire, forgetting, sliding_window

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # compiling warns of what torch does inside itself
    pytest.mark.filterwarnings("default"),
]
METHODS = ["fire", "forgetting", "sliding_window"]
# of q, k and v, and of what a method has besides, whose gradients are sums over the rows
TOLERANCE = {torch.bfloat16: (2e-2, 5e-2), torch.float32: (1e-5, 1e-4)}
WINDOW = sliding_window.Options(window=50)


def draw(method: str, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, then what else the method takes, which is float32."""
    torch.manual_seed(0)
    b, t, s, h, g, d = shape
    drawn = [torch.randn(x, dtype=dtype, device="cuda") for x in [(b, t, h, d), (b, s, g, d), (b, s, g, d)]]
    if method == "fire":
        drawn += [torch.tensor(x, device="cuda") for x in (0.1, 1.0)]
        drawn += [torch.randn(x, device="cuda") for x in [(32,), (32,), (h, 32)]]
    elif method == "forgetting":
        drawn.append(torch.randn(b, s, h, device="cuda"))
    return drawn


def call(method: str, function: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        out: Tensor
        if method == "fire":
            out = getattr(fire, function)(q, k, v, rest, threshold=40.0, **options)
        elif method == "forgetting":
            out = getattr(forgetting, function)(q, k, v, F.logsigmoid(rest[0]), **options)
        else:
            out = getattr(sliding_window, function)(q, k, v, options=WINDOW, **options)
        return out

    return run


def with_grads(run: Callable[..., Tensor], tensors: list[Tensor], above: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = run(*leaves, scale=tensors[0].shape[-1] ** -0.5, **options)
    return [out, *torch.autograd.grad(out, leaves, above.to(out.dtype))]


# in float32 what compiles to other code: grouped heads, many queries or one, and packing
HALF: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((1, 257, 257, 4, 4, 50), None),
    ((2, 100, 300, 4, 2, 128), None),
    ((2, 150, 150, 2, 1, 256), None),
]
BOTH: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((2, 200, 200, 4, 2, 64), None),
    ((2, 1, 200, 6, 2, 8), None),
    ((1, 200, 200, 4, 2, 64), (0, 0, 17, 18, 18, 83, 200, 200)),
]


# fire has kernels and tests of its own
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize(
    ("dtype", "shape", "values"),
    [*((torch.bfloat16, *case) for case in HALF + BOTH), *((torch.float32, *case) for case in BOTH)],
    ids=str,
)
def test_as_near_as_the_dtype(
    method: str, dtype: torch.dtype, shape: tuple[int, ...], values: tuple[int, ...] | None
) -> None:
    tensors = draw(method, *shape, dtype=dtype)
    bounds = None if values is None else torch.tensor(values, dtype=torch.int32, device="cuda")
    above = torch.randn_like(tensors[0])
    ours = with_grads(call(method, "attention"), tensors, above, cu_seqlens=bounds)
    exact = [x.double() for x in tensors]
    expected = with_grads(call(method, "reference"), exact, above, cu_seqlens=bounds)
    for index, (got, want) in enumerate(zip(ours, expected, strict=True)):
        # the output, q, k and v, then the rest
        assert got.dtype == (dtype if index < 4 else torch.float32)
        allowed = TOLERANCE[dtype][index >= 4]
        if method == "forgetting" and index == 4 and dtype == torch.bfloat16:
            # a gate's gradient is a sum over the keys before it that nearly cancels, of what keys' gradients round
            allowed = 0.3
        assert (got - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_linear(method: str) -> None:
    tensors = draw(method, 1, 65536, 65536, 4, 2, 64, dtype=torch.bfloat16)
    above = torch.randn_like(tensors[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_grads(call(method, "attention"), tensors, above)
    # as bfloat16 the logits of one head alone would take 8.6 GB
    assert torch.cuda.max_memory_allocated() - before < 6e9
