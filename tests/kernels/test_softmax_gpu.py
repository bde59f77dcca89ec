"""Every softmax method on a GPU: nope, rope and alibi."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval.kernels import alibi, nope, rope

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # compiling warns of what torch does inside itself
    pytest.mark.filterwarnings("default"),
]
METHODS = [pytest.param(m, id=m.__name__.rsplit(".", 1)[-1]) for m in (nope, rope, alibi)]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def draw(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    b, t, s, h, g, d = shape
    return [torch.randn(x, dtype=dtype, device="cuda") for x in [(b, t, h, d), (b, s, g, d), (b, s, g, d)]]


def bounds(values: tuple[int, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device="cuda")


def with_grads(method: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = method(*leaves, **options)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def near(method: ModuleType, run: Any, tensors: list[Tensor], cu_seqlens: Tensor | None) -> None:
    ours = with_grads(run, tensors, cu_seqlens=cu_seqlens)
    exact = [x.double() for x in tensors]
    expected = with_grads(method.reference, exact, scale=tensors[0].shape[-1] ** -0.5, cu_seqlens=cu_seqlens)
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == tensors[0].dtype
        assert (got - want).norm() <= TOLERANCE[got.dtype] * want.norm()


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((2, 200, 200, 4, 2, 64), None),
    ((2, 1, 200, 6, 2, 8), None),
    ((1, 200, 200, 4, 2, 64), (0, 0, 17, 18, 18, 83, 200, 200)),
    ((1, 257, 257, 4, 4, 50), None),
    ((2, 100, 300, 4, 2, 128), None),
    ((2, 60, 300, 4, 2, 128), None),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "shape", "values"),
    [
        *((torch.bfloat16, *case) for case in SHAPES),
        # what compiles to other code: grouped heads, one query, packing, a longer prefix
        *((torch.float32, *case) for case in (*SHAPES[:3], SHAPES[4])),
        *((torch.float64, *case) for case in SHAPES),
    ],
    ids=str,
)
def test_as_near_as_the_dtype(
    method: ModuleType, dtype: torch.dtype, shape: tuple[int, ...], values: tuple[int, ...] | None
) -> None:
    near(method, method.attention, draw(*shape, dtype=dtype), bounds(values))


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_longest_sequence_changes_nothing(method: ModuleType) -> None:
    # as long as it is said to be, and exactly a tile
    for values, longest in ((0, 0, 17, 18, 18, 83, 200, 200), 117), ((0, 128, 200), 128):
        near(
            method,
            lambda *a, longest=longest, **o: method.attention(*a, longest=longest, **o),
            draw(1, 200, 200, 4, 2, 64, dtype=torch.bfloat16),
            bounds(values),
        )


@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash", "flex", "torch"])
def test_backends_agree(backend: str) -> None:
    near(
        nope,
        lambda *a, **o: nope.attention(*a, backend=backend, **o),
        draw(2, 300, 300, 4, 2, 64, dtype=torch.bfloat16),
        None,
    )


def test_many_variants_in_one_process() -> None:
    # more than the 8 that dynamo compiles before it gives up on a function
    for size in range(16, 88, 8):
        q, k, v = draw(1, 130, 130, 2, 1, size, dtype=torch.bfloat16)
        exact = alibi.reference(q.double(), k.double(), v.double(), scale=size**-0.5)
        assert (alibi.attention(q, k, v) - exact).norm() <= 1e-2 * exact.norm()


def test_lengths_share_a_variant() -> None:
    for t in (130, 333, 1000):
        near(alibi, alibi.attention, draw(1, t, t, 2, 1, 64, dtype=torch.bfloat16), None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("t", "values"), [(200, None), (150, None), (200, (0, 0, 17, 150, 200))])
def test_mixer_compiles_whole(method: ModuleType, t: int, values: tuple[int, ...] | None) -> None:
    mixer: torch.nn.Module = method.Mixer(method.Options(), heads=4, kv_heads=2, head_dim=64, width=256, scale=0.125)
    compiled = torch.compile(mixer, fullgraph=True)
    x = torch.empty(1, t, 256, device="cuda")
    near(
        method,
        lambda q, k, v, cu_seqlens: compiled(q, k, v, x, cu_seqlens),
        draw(1, t, 200, 4, 2, 64, dtype=torch.bfloat16),
        bounds(values),
    )


# whole sequences, the last of them, packed ones
PLACES: list[tuple[int, tuple[int, ...] | None]] = [(200, None), (150, None), (200, (0, 0, 17, 150, 200))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "t", "values"),
    [*((torch.bfloat16, *place) for place in PLACES), (torch.float32, *PLACES[2])],
    ids=str,
)
def test_never_waits_for_the_device(
    method: ModuleType,
    dtype: torch.dtype,
    t: int,
    values: tuple[int, ...] | None,
    waiting_is_an_error: Callable[[], AbstractContextManager[None]],
) -> None:
    tensors, cu_seqlens = draw(1, t, 200, 4, 2, 64, dtype=dtype), bounds(values)
    with_grads(method.attention, tensors, cu_seqlens=cu_seqlens)
    with waiting_is_an_error():
        with_grads(method.attention, tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "t", "values"),
    [
        (torch.bfloat16, 16384, None),
        (torch.bfloat16, 8192, None),
        (torch.bfloat16, 16384, (0, 5000, 16384)),
        (torch.float32, 16384, None),
    ],
    ids=str,
)
def test_memory_is_linear(method: ModuleType, dtype: torch.dtype, t: int, values: tuple[int, ...] | None) -> None:
    tensors, cu_seqlens = draw(1, t, 16384, 4, 2, 50, dtype=dtype), bounds(values)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_grads(method.attention, tensors, cu_seqlens=cu_seqlens)
    # bytes: what a mask of booleans alone would take
    assert torch.cuda.max_memory_allocated() - before < t * 16384
