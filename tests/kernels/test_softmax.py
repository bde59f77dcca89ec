"""Properties of every softmax method: nope, rope and alibi."""

import itertools
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sbeval.errors import InputError
from sbeval.kernels import alibi, nope, rope, softmax

METHODS = [pytest.param(m, id=m.__name__.rsplit(".", 1)[-1]) for m in (nope, rope, alibi)]
# batch, queries, keys, query heads, key-value heads, head size
SHAPES = [
    (2, 1, 1, 2, 2, 16),
    (1, 2, 2, 4, 1, 50),
    (2, 17, 17, 6, 3, 32),
    (1, 65, 65, 4, 2, 50),
    (1, 200, 200, 3, 3, 16),
    (2, 1, 65, 4, 2, 32),
    (1, 17, 200, 6, 2, 50),
    (1, 150, 201, 2, 1, 16),
]
BOUNDS = [(0, 200), (0, 0, 17, 18, 18, 83, 200, 200), (0, 1), (0, 1, 2, 2, 65)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small inputs span several chunks."""
    monkeypatch.setattr(softmax, "CHUNK", 64)
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    b, t, s, h, g, d = shape
    return [torch.randn(shape, dtype=dtype) for shape in [(b, t, h, d), (b, s, g, d), (b, s, g, d)]]


def bounds(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_grads(method: Any, tensors: list[Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = method(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, weight.to(out))]


def agree(method: ModuleType, tensors: list[Tensor], cu_seqlens: Tensor | None = None) -> None:
    weight = torch.randn_like(tensors[0])
    ours = with_grads(method.attention, tensors, weight, scale=0.3, cu_seqlens=cu_seqlens)
    expected = with_grads(method.reference, tensors, weight, scale=0.3, cu_seqlens=cu_seqlens)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_the_references(method: ModuleType, shape: tuple[int, ...]) -> None:
    agree(method, draw(*shape))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", BOUNDS, ids=str)
def test_packed_output_and_gradients_are_the_references(method: ModuleType, values: tuple[int, ...]) -> None:
    agree(method, draw(1, values[-1], values[-1], 4, 2, 16), bounds(values))


@pytest.mark.parametrize("method", METHODS)
def test_packed_sequences_are_as_if_alone(method: ModuleType) -> None:
    q, k, v = draw(1, 200, 200, 4, 2, 16)
    values = (0, 0, 17, 18, 83, 200)
    packed = method.attention(q, k, v, cu_seqlens=bounds(values))
    for a, b in itertools.pairwise(values):
        if a < b:
            torch.testing.assert_close(packed[:, a:b], method.attention(q[:, a:b], k[:, a:b], v[:, a:b]))


@pytest.mark.parametrize("method", METHODS)
def test_strides_do_not_matter(method: ModuleType) -> None:
    q, k, v = draw(2, 65, 80, 4, 2, 32)
    expected = method.attention(q, k, v)
    strided = [x.transpose(0, 3).contiguous().transpose(0, 3) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(method.attention(*strided), expected)
    agree(method, strided)


@pytest.mark.parametrize("method", METHODS)
def test_default_scale_is_that_of_the_head_size(method: ModuleType) -> None:
    q, k, v = draw(1, 17, 17, 2, 2, 16)
    torch.testing.assert_close(method.attention(q, k, v), method.reference(q, k, v, scale=0.25))


@pytest.mark.parametrize("method", METHODS)
def test_last_queries_are_those_of_the_whole(method: ModuleType) -> None:
    q, k, v = draw(2, 150, 150, 4, 2, 16)
    whole = method.attention(q, k, v)
    for t in (1, 2, 100):
        torch.testing.assert_close(method.attention(q[:, -t:], k, v), whole[:, -t:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("t", "s"), [(100, 100), (70, 100)])
def test_causality_by_gradient(method: ModuleType, t: int, s: int) -> None:
    q, k, v = (x.requires_grad_() for x in draw(1, t, s, 4, 2, 16))
    row = t // 2
    position = s - t + row
    grads = torch.autograd.grad(method.attention(q, k, v)[:, row].square().sum(), (q, k, v))
    sizes = [g.abs().sum(dim=(0, 2, 3)) for g in grads]
    assert (sizes[0] > 0).nonzero().flatten().tolist() == [row]
    for size in sizes[1:]:
        assert (size[: position + 1] > 0).all()
        assert (size[position + 1 :] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_near(method: ModuleType, dtype: torch.dtype) -> None:
    tensors = draw(1, 70, 150, 4, 2, 32, dtype=dtype)
    out = method.attention(*tensors)
    exact = method.reference(*(x.double() for x in tensors), scale=32**-0.5)
    assert out.dtype == dtype
    assert (out - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


class Trace(TorchDispatchMode):
    """Records how many elements the largest tensor made has, and which operators ran."""

    numel = 0
    names: tuple[str, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names += (str(func),)
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [4096, 1024])
def test_memory_is_linear(method: ModuleType, t: int) -> None:
    s, heads, size = 4096, 2, 16
    q, k, v = (x.requires_grad_() for x in draw(1, t, s, heads, 1, size, dtype=torch.float32))
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    trace = Trace()  # type: ignore[no-untyped-call]  # as its base
    with trace, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = method.attention(q, k, v)
    assert trace.numel <= heads * softmax.CHUNK * s
    # q, k, v, their copies, the output and what rotation keeps: some rows of S x D, far from T x S
    assert sum(saved.values()) <= 12 * heads * size * s < t * s / 2
    with trace:
        out.sum().backward()
    assert trace.numel <= heads * softmax.CHUNK * s


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [100, 70])
def test_strides_and_masks_keep_to_the_fused_kernel(method: ModuleType, t: int) -> None:
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in draw(2, t, 100, 4, 2, 16)]
    trace = Trace()  # type: ignore[no-untyped-call]  # as its base
    with trace:
        method.attention(*strided)
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in trace.names
    assert not [name for name in trace.names if "softmax" in name]


@pytest.mark.parametrize("method", METHODS)
def test_mixer(method: ModuleType) -> None:
    q, k, v = draw(1, 65, 65, 4, 2, 16)
    mixer = method.Mixer(method.Options(), heads=4, kv_heads=2, head_dim=16, width=64, scale=0.2)
    x = torch.full((1, 65, 64), torch.nan)
    for cu_seqlens in (None, bounds((0, 30, 65))):
        expected = method.reference(q, k, v, scale=0.2, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(mixer(q, k, v, x, cu_seqlens), expected)
    assert not list(mixer.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [100, 70])
def test_mixer_compiles_whole(method: ModuleType, t: int) -> None:
    torch.compiler.reset()
    tensors = [x.requires_grad_() for x in draw(1, t, 100, 4, 2, 16)]
    mixer: torch.nn.Module = method.Mixer(method.Options(), heads=4, kv_heads=2, head_dim=16, width=64, scale=0.2)
    x = torch.empty(1, t, 64)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    out, expected = compiled(*tensors, x), mixer(*tensors, x)
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_sizes_may_be_symbolic() -> None:
    torch.compiler.reset()
    compiled = torch.compile(softmax._sdpa, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for t, kv_heads in ((5, 4), (9, 2), (1, 2)):
            q, k, v = draw(2, t, t, 4, kv_heads, 16)
            found, expected = (run(q, k, v, 0.25, "sdpa") for run in (compiled, softmax._sdpa))
            torch.testing.assert_close(found, expected)


def test_backend_names() -> None:
    assert [m.backend_name("cpu") for m in (nope, rope, alibi)] == ["torch"] * 3
    assert [m.backend_name("cuda") for m in (nope, rope, alibi)] == ["sdpa", "sdpa", "flex"]


@pytest.mark.parametrize("backend", ["cudnn", "flash", "flex", "sdpa"])
def test_gpu_backends_are_refused_on_the_cpu(backend: str) -> None:
    with pytest.raises(InputError, match=f"backend '{backend}' needs a GPU; this tensor is on cpu"):
        nope.attention(*draw(1, 3, 3, 2, 2, 16), backend=backend)


def test_backend_must_be_known() -> None:
    with pytest.raises(InputError, match="unknown backend 'flsh'; did you mean 'flash'"):
        nope.attention(*draw(1, 3, 3, 2, 2, 16), backend="flsh")


class FakeCuda:
    """A tensor as far as picking a backend looks at it."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (1, length, 2, 16), dtype


def picked(t: int, dtype: torch.dtype, asked: str | None, packed: bool = False, biased: bool = False) -> str:
    q: Any = FakeCuda(t, dtype)
    k: Any = FakeCuda(100, dtype)
    return softmax._backend(q, k, packed, biased, asked)


@pytest.mark.parametrize(
    ("t", "dtype", "packed", "biased", "expected"),
    [
        (100, torch.bfloat16, False, False, "sdpa"),
        (1, torch.float32, False, False, "sdpa"),
        (50, torch.float16, False, False, "flash"),
        (50, torch.float32, False, False, "flex"),
        (100, torch.bfloat16, True, False, "flash"),
        (100, torch.float32, True, False, "flex"),
        (100, torch.bfloat16, False, True, "flex"),
        (100, torch.float64, False, True, "torch"),
    ],
)
def test_default_backend_on_a_gpu(t: int, dtype: torch.dtype, packed: bool, biased: bool, expected: str) -> None:
    assert picked(t, dtype, None, packed, biased) == expected
    assert picked(t, dtype, expected, packed, biased) == expected


@pytest.mark.parametrize(("longest", "expected"), [(None, 24), (9, 9)])
def test_flash_begins_tiles_for_the_longest_sequence(
    longest: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, *bounds_and_sizes: Any, **options: Any) -> Tensor:
        sizes.append(bounds_and_sizes[2:])
        return q

    monkeypatch.setattr(softmax, "varlen_attn", stand_in)
    monkeypatch.setattr(softmax, "_backend", lambda *given: "flash")
    packed = torch.tensor([0, 9, 15, 24], dtype=torch.int32)
    for method in (nope, rope):
        method.attention(*draw(1, 24, 24, 2, 2, 16), cu_seqlens=packed, longest=longest)
    assert sizes == [(expected, expected)] * 2
    # of other rows the length of all counts
    nope.attention(*draw(1, 4, 24, 2, 2, 16), longest=longest)
    assert sizes[2:] == [(4, 24)]


@pytest.mark.parametrize(
    ("t", "dtype", "asked", "packed", "biased", "message"),
    [
        (100, torch.float32, "flash", False, False, "'flash' does not take torch.float32; use 'flex'"),
        (100, torch.float64, "flex", False, False, "'flex' does not take torch.float64; use 'torch'"),
        (100, torch.bfloat16, "cudnn", False, True, "'cudnn' takes no attention bias or window; use 'flex'"),
        (100, torch.bfloat16, "cudnn", True, False, "'cudnn' takes neither packed sequences"),
        (50, torch.bfloat16, "cudnn", False, False, "nor 50 queries of 100 keys; use 'flex'"),
    ],
)
def test_backend_that_cannot_serve_is_refused(
    t: int, dtype: torch.dtype, asked: str, packed: bool, biased: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        picked(t, dtype, asked, packed, biased)


def first_keys(s: int, values: tuple[int, ...] | None, window: int | None) -> Tensor:
    return softmax.first_keys(s, None if values is None else bounds(values), window, torch.device("cpu"))


@pytest.mark.parametrize(
    ("t", "s", "values", "window"),
    [
        (1, 1, None, None),
        (1, 300, None, None),
        (128, 128, None, None),
        (257, 257, None, None),
        (130, 700, None, None),
        (700, 700, (0, 0, 1, 128, 256, 256, 300, 640, 700), None),
        (600, 600, None, 1),
        (300, 600, None, 200),
        (600, 600, (0, 384, 600), 300),
    ],
)
def test_block_mask_is_that_of_the_dense_mask(
    t: int, s: int, values: tuple[int, ...] | None, window: int | None
) -> None:
    first = first_keys(s, values, window)
    ours = softmax.block_mask(t, first)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (first[i + s - t] <= j) & (j <= i + s - t)

    theirs = create_block_mask(seen, 1, 1, t, s, device="cpu")
    assert ours.shape == theirs.shape
    rows, columns = torch.arange(t)[:, None], torch.arange(s)
    zero = torch.tensor(0)
    assert torch.equal(ours.mask_mod(zero, zero, rows, columns), seen(zero, zero, rows, columns))
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for of in ("kv", "full_kv", "q", "full_q"):
        index, other = (getattr(mask, f"{of}_indices") for mask in (ours, theirs))
        assert (index.shape, index.dtype) == (other.shape, other.dtype) and index.is_contiguous()
        # the first is loaded where there is none
        assert index.min() >= 0 and index.max() < index.shape[-1]
        for row, n in enumerate(getattr(ours, f"{of}_num_blocks")[0, 0].tolist()):
            assert torch.equal(index[0, 0, row, :n], other[0, 0, row, :n])


def test_blocks_of_a_mask_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "argsort"), (torch, "sort"), (Tensor, "argsort"), (Tensor, "sort")):
        monkeypatch.setattr(owner, name, None)
    softmax.block_mask(700, first_keys(700, (0, 300, 700), None))


def test_kept_block_masks_serve_training_after_inference() -> None:
    softmax._causal_blocks.cache_clear()
    with torch.inference_mode():
        mask = softmax._causal_blocks(130, 200, torch.device("cpu"))
    assert softmax._causal_blocks(130, 200, torch.device("cpu")) is mask
    assert not any(x.is_inference() for x in mask.as_tuple() if isinstance(x, Tensor))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("t", "s", "values"), [(200, 200, None), (40, 300, None), (1, 130, None), (200, 200, (0, 0, 17, 18, 150, 200))]
)
def test_flex_path_without_a_gpu(
    method: ModuleType, t: int, s: int, values: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw(2 if values is None else 1, t, s, 4, 2, 16)
    cu_seqlens = None if values is None else bounds(values)
    expected = method.reference(*tensors, scale=0.3, cu_seqlens=cu_seqlens)
    ran = []

    def uncompiled(*args: Any, **options: Any) -> Any:
        ran.append(True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(*args, **options)

    monkeypatch.setattr(softmax, "_compiled_flex", lambda: uncompiled)
    monkeypatch.setattr(softmax, "_backend", lambda *_: "flex")
    torch.testing.assert_close(method.attention(*tensors, scale=0.3, cu_seqlens=cu_seqlens), expected)
    assert ran


# compiling warns of what torch does inside itself
@pytest.mark.filterwarnings("default")
def test_flex_takes_no_unknown_length_for_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_backend", lambda *_: "flex")
    options: list[dict[str, object]] = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nodes = [node for node in graph.graph.nodes if "flex_attention" in str(node.target)]
        options.extend(given for node in nodes for given in node.args if isinstance(given, dict))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(alibi.attention, fullgraph=True, backend=note)
    # the second length makes it a symbol
    for t in (200, 150):
        compiled(*draw(1, t, 200, 4, 2, 16), scale=0.3)
    assert len(options) == 2 and all(isinstance(x, bool | str | int) for given in options for x in given.values())


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.tensor([0, 6]), r"starts must be int32 of shape \(2,\) on cpu; it is torch.int64 of shape \(2,\)"),
        (torch.tensor([0], dtype=torch.int32), r"starts must be int32 of shape \(2,\)"),
        (torch.tensor([0, 6], dtype=torch.int32), r"starts must lie in 0 to 5; it is \[0, 6\]"),
        (torch.tensor([-1, 0], dtype=torch.int32), r"starts must lie in 0 to 5; it is \[-1, 0\]"),
    ],
)
def test_starts_that_will_not_do(starts: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        softmax.attention(torch.ones(2, 1, 2, 4), *torch.ones(2, 2, 6, 2, 4), starts=starts)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_a_cache_see_keys_from_their_starts(window: int | None) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, 9, 2, 8, dtype=torch.float64)
    first = [0, 4, 7]
    found = softmax.attention(q, k, v, starts=torch.tensor(first, dtype=torch.int32), window=window)
    for row, start in enumerate(first):
        part = q[row : row + 1], k[row : row + 1, start:], v[row : row + 1, start:]
        torch.testing.assert_close(found[row : row + 1], softmax.attention(*part, window=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_of_another_dtype_than_q_is_added_as_it_is(dtype: torch.dtype) -> None:
    q, k, v = draw(1, 130, 130, 2, 2, 16)

    def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (-(i - j) / 8).to(dtype)

    positions = torch.arange(130, dtype=torch.float64)
    wanted = softmax.reference(q, k, v, scale=0.25, bias=(positions - positions[:, None]) / 8)
    torch.testing.assert_close(softmax.attention(q, k, v, scale=0.25, bias=bias), wanted)
