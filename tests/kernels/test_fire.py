"""FIRE: the blockwise path, and the Triton kernels, interpreted where there is no GPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.kernels import fire, softmax

# PyTorch's own kernel, which the blockwise path runs on a GPU, says so once where `poison` asks for determinism
pytestmark = pytest.mark.filterwarnings("ignore:Memory Efficient attention defaults to a non-deterministic algorithm")

GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if GPU else "cpu")
# relative error of the output and of the gradients of q, k and v; and of the weights', which are sums over the rows
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}
NAMES = ("out", "dq", "dk", "dv", "dc", "dm", "dw1", "db1", "dw2")


@dataclass(frozen=True)
class Case:
    """One problem. `bounds` are cu_seqlens, `units` the width of the network."""

    t: int
    s: int | None = None
    batch: int = 1
    heads: int = 2
    groups: int = 2
    dim: int = 16
    bounds: tuple[int, ...] | None = None
    units: int = 32
    threshold: float = 40.0
    c: float = 0.1

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k and v, then the weights."""
        s = self.t if self.s is None else self.s
        shapes = [(self.batch, n, h, self.dim) for n, h in [(self.t, self.heads), (s, self.groups), (s, self.groups)]]
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        rest = [torch.tensor(self.c), torch.tensor(1.0), *torch.randn(2, self.units)]
        rest.append(torch.randn(self.heads, self.units))
        drawn = [torch.randn(shape).to(PLACE, dtype) for shape in shapes]
        return drawn + [x.to(PLACE, exact) for x in rest]

    def cu_seqlens(self) -> Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=PLACE)


SMALL = [
    Case(2, batch=2),
    Case(17, batch=2, heads=6, groups=3, dim=32),
    Case(63, heads=4, groups=1, dim=8),
    Case(100, heads=2, groups=1, dim=50),
    Case(33, s=98, heads=4, groups=1, dim=64),
    Case(1, s=65, heads=4),
    Case(100, heads=4, bounds=(0, 0, 17, 18, 18, 83, 100, 100)),
    Case(130, units=1, c=2.0),
    Case(70, units=33, threshold=1e-3),
    Case(70, units=5, threshold=1e6),
]
LARGE = [
    Case(200, batch=2, heads=4, groups=2, dim=64),
    Case(257, heads=4, groups=4, dim=50),
    Case(100, s=300, batch=2, heads=4, groups=2, dim=128),
    Case(150, batch=2, groups=1, dim=256),
    Case(1000, heads=4, groups=2, dim=64, bounds=(0, 1, 1, 400, 401, 1000)),
    Case(4096, dim=64, threshold=512.0),
]
BACKENDS = ["torch", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend by name; without a GPU the Triton kernels run interpreted, which `attention` would refuse."""
    if request.param == "triton" and not GPU:
        monkeypatch.setattr(fire, "pick_backend", lambda *_: "triton")
    return str(request.param)


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # small inputs span several chunks
    monkeypatch.setattr(softmax, "CHUNK", 64)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that was allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def split(drawn: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, fire.Weights]:
    q, k, v, c, m, w1, b1, w2 = drawn
    return q, k, v, (c, m, w1, b1, w2)


def error(found: Tensor, wanted: Tensor, least: float = 1e-2) -> float:
    """Relative error of the whole tensor; where what is wanted is less than `least` (of an element), as if it were."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=least * wanted.numel() ** 0.5))


def results(run: Any, tensors: list[Tensor], above: Tensor, case: Case, **options: Any) -> list[Tensor]:
    given = [x.detach().requires_grad_() for x in tensors]
    scale = case.dim**-0.5
    out = run(*given[:3], tuple(given[3:]), scale=scale, threshold=case.threshold, **options)
    return [out, *torch.autograd.grad(out, given, above.to(out.dtype))]


def check(case: Case, dtype: torch.dtype, backend: str, tensors: list[Tensor] | None = None) -> None:
    tensors = tensors or case.draw(dtype)
    above, bounds = torch.randn_like(tensors[0]), case.cu_seqlens()
    ours = results(fire.attention, tensors, above, case, cu_seqlens=bounds, backend=backend)
    exact = [x.double() for x in tensors]
    expected = results(fire.reference, exact, above, case, cu_seqlens=bounds)
    for name, given, got, want in zip(NAMES, [tensors[0], *tensors], ours, expected, strict=True):
        assert got.dtype == given.dtype
        # a weight's gradient is a sum of many numbers around 1, which may cancel
        learned = name in NAMES[4:]
        wrong = error(got, want, 1.0 if learned else 1e-2)
        assert wrong <= TOLERANCE[dtype][learned], (name, wrong)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_problems_in_single_precision(case: Case, backend: str) -> None:
    check(case, torch.float32, backend)


@pytest.mark.parametrize("case", [*SMALL, *LARGE[:-1]], ids=str)
def test_blockwise_path_in_double_precision(case: Case) -> None:
    check(case, torch.float64, "torch")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_triton_on_the_gpu(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "triton")


def test_units_that_are_flat_or_bend_far_away(backend: str) -> None:
    case = Case(70, units=8)
    tensors = case.draw(torch.float32)
    w1, b1 = tensors[5:7]
    w1[:5] = torch.tensor([0.0, 0.0, 0.0, 1e-30, -1e-30])
    b1[:5] = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    # two kinks in one place
    w1[6], b1[6] = 2 * w1[5], 2 * b1[5]
    check(case, torch.float32, backend, tensors)


def test_many_kinks_within_a_tile(backend: str) -> None:
    case = Case(100, heads=1, groups=1)
    tensors = case.draw(torch.float32)
    tensors[5].abs_()
    tensors[6].copy_(-tensors[5] * torch.linspace(0.3, 0.4, 32, device=PLACE))
    check(case, torch.float32, backend, tensors)


def test_without_distance_nothing_is_learned_of_it(backend: str) -> None:
    case = Case(40, c=0.0)
    tensors = case.draw(torch.float32)
    _, *grads = results(fire.attention, tensors, torch.randn_like(tensors[0]), case, backend=backend)
    assert all(bool(x.isfinite().all()) for x in grads)
    assert float(grads[3]) == 0.0


@pytest.mark.parametrize("bounds", [None, (0, 40, 41, 70)])
def test_same_inputs_give_the_same_bits(bounds: tuple[int, ...] | None, backend: str) -> None:
    case = Case(70, heads=2, groups=1, bounds=bounds)
    tensors = case.draw(torch.float32)
    above = torch.randn_like(tensors[0])
    first, *rest = [
        results(fire.attention, tensors, above, case, cu_seqlens=case.cu_seqlens(), backend=backend)
        for _ in range(5 if GPU else 2)
    ]
    for again in rest:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_inputs_may_be_strided(backend: str) -> None:
    weights = split(Case(40).draw(torch.float32))[3]
    q, k, v = torch.randn(2, 40, 6, 32, device=PLACE).split((2, 2, 2), 2)
    wanted = fire.attention(q.contiguous(), k.contiguous(), v.contiguous(), weights, backend=backend)
    assert torch.equal(fire.attention(q, k, v, weights, backend=backend), wanted)
    q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    assert torch.equal(fire.attention(q, k, v, weights, backend=backend), wanted)


def test_a_row_of_a_cache_counts_from_its_start(backend: str) -> None:
    case = Case(1, s=70, batch=2, heads=4, groups=2)
    q, k, v, weights = split(case.draw(torch.float32))
    starts = torch.tensor([0, 23], dtype=torch.int32, device=PLACE)
    with torch.no_grad():
        found = fire.attention(q, k, v, weights, starts=starts, backend=backend, threshold=40.0)
        for b, start in enumerate(starts.tolist()):
            rows = slice(b, b + 1)
            wanted = fire.attention(q[rows], k[rows, start:], v[rows, start:], weights, backend=backend, threshold=40.0)
            assert error(found[b], wanted[0]) <= 1e-5


def test_torch_library_contract() -> None:
    if not GPU:
        pytest.skip("the interpreter does not run under opcheck's tracing")
    case = Case(20, bounds=(0, 5, 20))
    q, k, v, c, _, w1, b1, w2 = (x.requires_grad_() for x in case.draw(torch.float32))
    bottom = torch.rand(20, device=PLACE).add(1).requires_grad_()
    torch.library.opcheck(fire._operator, (q, k, v, c, bottom, w1, b1, w2, case.cu_seqlens(), 0.25))


def test_compiles_whole() -> None:
    if not GPU:
        pytest.skip("without a GPU the backward pass differentiates in torch, which cannot be compiled")
    case = Case(40)
    tensors = case.draw(torch.float32)
    above = torch.randn_like(tensors[0])
    compiled = torch.compile(fire.attention, fullgraph=True, backend="aot_eager")
    wanted, found = (results(run, tensors, above, case) for run in (fire.attention, compiled))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("bounds", [None, (0, 40, 41, 70)])
def test_never_waits_for_the_device(
    bounds: tuple[int, ...] | None, waiting_is_an_error: Callable[[], AbstractContextManager[None]]
) -> None:
    case = Case(70, heads=2, groups=1, bounds=bounds)
    tensors, cu_seqlens = case.draw(torch.float32), case.cu_seqlens()
    above = torch.randn_like(tensors[0])
    results(fire.attention, tensors, above, case, cu_seqlens=cu_seqlens)
    with waiting_is_an_error():
        results(fire.attention, tensors, above, case, cu_seqlens=cu_seqlens)


def test_wrong_arguments_are_named() -> None:
    q, k, v, weights = split(Case(8).draw(torch.float32))
    with pytest.raises(InputError, match="weights are of 2 heads; q has 4"):
        fire.attention(q.repeat_interleave(2, 2), k, v, weights)
    with pytest.raises(InputError, match="unknown backend 'flex' of fire"):
        fire.attention(q, k, v, weights, backend="flex")
    with pytest.raises(InputError, match="backend 'triton' needs float16, bfloat16 or float32 on a GPU"):
        fire.attention(q.double(), k.double(), v.double(), weights, backend="triton")


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_bad_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold must be positive and finite"):
        fire.Options(threshold=threshold)
