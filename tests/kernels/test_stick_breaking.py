"""Stick-breaking attention: the portable path, and the Triton kernels, interpreted where there is no GPU."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from sbeval.errors import InputError
from sbeval.kernels import hopper, stick_breaking
from sbeval.kernels.stick_breaking import Mixer, Options, attention, initial_bias, reference

GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if GPU else "cpu")
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="needs a GPU")
NEEDS_HOPPER = pytest.mark.skipif(bool(hopper.obstacle(PLACE)), reason="needs a Hopper GPU")
# relative error of the whole tensor
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Case:
    """One problem. `bounds` are cu_seqlens; `spread` is the standard deviation of logits, `shift` their mean."""

    t: int
    s: int | None = None
    batch: int = 1
    heads: int = 2
    groups: int = 2
    dim: int = 16
    current: bool = False
    bounds: tuple[int, ...] | None = None
    spread: float = 1.0
    shift: float = 0.0
    biased: bool = False

    def draw(self, dtype: torch.dtype, place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        s = self.t if self.s is None else self.s
        shapes = [(self.t, self.heads), (s, self.groups), (s, self.groups)]
        q, k, v = (torch.randn(self.batch, n, h, self.dim, dtype=torch.float64) for n, h in shapes)
        # one coordinate of its own makes the mean of the logits
        q[..., 0], k[..., 0] = self.shift / self.spread * self.dim**0.5, 1.0
        q *= self.spread
        q, k, v = (x.to(place, dtype) for x in (q, k, v))
        return q, k, v

    def cu_seqlens(self, place: torch.device) -> Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=place)


SMALL = [
    Case(1),
    Case(2, current=True),
    Case(17, batch=2),
    Case(33, heads=4, groups=2, dim=50),
    Case(65, dim=32),
    Case(40, s=75, dim=32, current=True),
    Case(1, s=70),
    Case(70, bounds=(0, 0, 1, 31, 70, 70), heads=4, groups=1),
    Case(50, spread=30.0),
    Case(50, shift=-12.0),
    Case(50, shift=3.0),
    Case(150, heads=4, groups=2, biased=True, bounds=(0, 100, 150)),
]
LARGE = [
    *(Case(t, batch=2) for t in (63, 64, 127, 200, 1000)),
    *(Case(200, dim=dim) for dim in (64, 80, 100, 128, 256)),
    Case(300, s=700, heads=6, groups=2, dim=64),
    Case(1000, bounds=(0, 1, 1, 400, 401, 1000), heads=4, groups=2, dim=64),
    Case(257, bounds=(0, 128, 256, 257), current=True, dim=64),
    Case(4096, dim=64),
    Case(4096, dim=128, shift=-6.0),
]
BACKENDS = ["torch", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend by name; without a GPU the Triton kernels run interpreted, which `attention` would refuse."""
    if request.param == "triton" and not GPU:
        monkeypatch.setattr(stick_breaking, "pick_backend", lambda *_: "triton")
    return str(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that was allocated and not written is NaN."""
    # torch.utils.deterministic.fill_uninitialized_memory is on by default
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error of the whole tensor; absolute where what is wanted is next to nothing."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-6 * wanted.numel() ** 0.5))


def run(case: Case, dtype: torch.dtype, backend: str, epsilon: float | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Output, remainder and gradients of both: what was found, and the reference in float64."""
    q, k, v = inputs = [x.requires_grad_() for x in case.draw(dtype, PLACE)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = (torch.randn(case.heads, dtype=wide, device=PLACE) - 1).requires_grad_() if case.biased else None
    inputs += [] if bias is None else [bias]
    cu_seqlens = case.cu_seqlens(PLACE)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, rest = attention(
        q, k, v, attend_current=case.current, cu_seqlens=cu_seqlens, bias=bias, epsilon=epsilon, backend=backend
    )
    dout, drest = torch.randn_like(out), torch.randn_like(rest)
    exact_bias = exact[3] if case.biased else None
    wanted = reference(*exact[:3], attend_current=case.current, cu_seqlens=cu_seqlens, bias=exact_bias)
    gradients = torch.autograd.grad([out, rest], inputs, [dout, drest])
    right = torch.autograd.grad(wanted, exact, [dout.double(), drest.double()])
    names = ("out", "remainder", "dq", "dk", "dv", "dbias")[: 2 + len(inputs)]
    return dict(zip(names, zip((out, rest, *gradients), (*wanted, *right), strict=True), strict=True))


def check(case: Case, dtype: torch.dtype, backend: str, epsilon: float | None = 0.0) -> None:
    for name, (found, wanted) in run(case, dtype, backend, epsilon).items():
        assert error(found, wanted) <= TOLERANCE[dtype], (name, error(found, wanted))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_problems_in_single_precision(case: Case, backend: str) -> None:
    check(case, torch.float32, backend)


@pytest.mark.parametrize("case", SMALL + [case for case in LARGE if case.t <= 1000], ids=str)
def test_portable_path_in_double_precision(case: Case) -> None:
    check(case, torch.float64, "torch")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_portable_path_in_half_precision(dtype: torch.dtype) -> None:
    check(Case(200, dim=64), dtype, "torch")


@NEEDS_GPU
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product(SMALL + LARGE, [torch.bfloat16]),
        # the small ones run in float32 above; what differs between head sizes from 64 on is the padding
        *((case, torch.float32) for case in LARGE if case.dim not in (80, 100)),
        *product(SMALL[::3], [torch.float16]),
    ],
    ids=str,
)
def test_triton_on_the_gpu(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "triton")


HOPPER = [
    # some cases differ in their head size alone
    *dict.fromkeys(
        replace(case, dim=dim)
        for case in SMALL + LARGE
        for dim in (64, 128)
        if case.s in (None, case.t + 64) and case.batch * case.t >= 64
    ),
    Case(300, s=492, heads=6, groups=2, dim=64),
    # more programs than multiprocessors: in backward most heads come whole, the last ones in ranges of queries
    *(Case(1100, batch=4, heads=8, groups=8, dim=dim) for dim in (64, 128)),
    Case(200, spread=30.0, dim=128),
    Case(100, shift=-12.0, dim=64),
]


@NEEDS_HOPPER
@pytest.mark.parametrize(
    ("case", "dtype", "epsilon"),
    [
        *product(HOPPER, [torch.bfloat16], [None]),
        # each of these is compiled anew, for 15 s: with both head sizes, but not with every case
        *product(HOPPER[::3], [torch.bfloat16], [0.0]),
        *product(HOPPER[1::3], [torch.float16], [None]),
    ],
    ids=str,
)
def test_hopper_on_the_gpu(case: Case, dtype: torch.dtype, epsilon: float | None) -> None:
    check(case, dtype, "triton-hopper", epsilon)


@NEEDS_HOPPER
def test_hopper_a_thousand_times() -> None:
    """More tiles than multiprocessors, of which many stop early; in between others that use the same memory."""
    q, k, v = Case(1100, batch=4, heads=6, groups=3, dim=64, shift=-1.0).draw(torch.bfloat16, PLACE)
    wanted = attention(q, k, v, backend="triton-hopper")
    for _ in range(1000):
        found = attention(q, k, v, backend="triton-hopper")
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Block(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.qkv, self.out = torch.nn.Linear(512, 1536), torch.nn.Linear(512, 512)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 64)).split(8, 2)
        return cast(Tensor, self.out(attention(q, k, v, cu_seqlens=cu_seqlens, backend=self.backend)[0].flatten(2)))


@pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=NEEDS_GPU), pytest.param("triton-hopper", marks=NEEDS_HOPPER)]
)
def test_numbers_of_packed_sequences_share_a_compiled_block(backend: str) -> None:
    torch.compiler.reset()
    counters.clear()
    block = Block(backend).cuda()
    compiled = torch.compile(block)
    for n_sequences in (None, 17, 30, 23, 64, 41):
        x = torch.randn((4, 2048, 512) if n_sequences is None else (1, 8192, 512), device="cuda")
        cu_seqlens = None
        if n_sequences is not None:
            inner = torch.randperm(8191)[: n_sequences - 1].add(1).sort().values.tolist()
            cu_seqlens = torch.tensor([0, *inner, 8192], dtype=torch.int32, device="cuda")
        results = []
        for run in (block, compiled):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                out = run(leaf, cu_seqlens)
            results.append((out, *torch.autograd.grad(out.float().square().mean(), leaf)))
        for wanted, found in zip(*results, strict=True):
            assert (found - wanted).float().norm() <= 1e-2 * wanted.float().norm(), n_sequences
    assert counters["stats"]["unique_graphs"] <= 4, counters["stats"]


@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
def test_extreme_logits_stay_finite(value: float, backend: str) -> None:
    shape = (1, 40, 1, 16)
    q = torch.full(shape, value / 16, device=PLACE).requires_grad_()
    k = torch.ones(shape, device=PLACE).requires_grad_()
    v = torch.randn(shape, device=PLACE).requires_grad_()
    out, rest = attention(q, k, v, scale=1.0, epsilon=0.0, backend=backend)
    gradients = torch.autograd.grad(out.sum() + rest.sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in (out, rest, *gradients))
    if value > 0:
        # the nearest key takes the whole stick
        torch.testing.assert_close(out[:, 1:], v[:, :-1])
    elif value < 0:
        assert float(out.detach().norm()) == 0.0
        assert bool((rest == 1).all())
    else:
        halves = 0.5 ** torch.arange(40, device=PLACE)
        torch.testing.assert_close(rest[0, :, 0], halves)


def test_one_large_logit_among_small_ones(backend: str) -> None:
    case = Case(70)
    q, k, v = (x.double() for x in case.draw(torch.float64, PLACE))
    k[:, 20] *= 1e4
    wanted, _ = reference(q, k, v)
    found, _ = attention(q.float(), k.float(), v.float(), epsilon=0.0, backend=backend)
    assert error(found, wanted) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2])
def test_skipping_changes_the_output_by_at_most_epsilon(epsilon: float, backend: str) -> None:
    q, k, v = Case(300, heads=2, shift=-3.5).draw(torch.float32, PLACE)
    full, _ = attention(q, k, v, epsilon=0.0, backend=backend)
    cut, rest = attention(q, k, v, epsilon=epsilon, backend=backend)
    difference = float((full - cut).abs().max())
    assert 0 < difference <= epsilon * float(v.abs().max())
    # rows that were cut say how much was left
    assert float(rest.max()) > 0


class _Made(TorchDispatchMode):
    """Shapes of the tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.shapes.append(made.shape)
        return made


def test_backward_makes_no_gradient_of_zeros() -> None:
    """Of an output that no gradient reaches, such as what rounding took off, there is none in memory."""
    inputs = [x.requires_grad_() for x in Case(20).draw(torch.bfloat16, PLACE)]
    out, rest = attention(*inputs, backend="torch")
    with _Made() as made:
        torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    assert made.shapes.count(out.shape) == 1
    # either output may have no gradient
    both = torch.autograd.grad(out.float().sum() + rest.sum(), inputs, retain_graph=True)
    alone = [torch.autograd.grad(x.float().sum(), inputs, retain_graph=True) for x in (out, rest)]
    for whole, first, second in zip(both, *alone, strict=True):
        assert error(first + second, whole) <= 1e-2


def test_what_rounding_took_off_is_made_for_a_gradient_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    operator = stick_breaking._operator

    def spied(*arguments: Any) -> tuple[Tensor, ...]:
        made.append(operator(*arguments))
        return cast(tuple[Tensor, ...], made[-1])

    monkeypatch.setattr(stick_breaking, "_operator", spied)
    q, k, v = Case(20).draw(torch.bfloat16, PLACE)
    attention(q, k, v, backend=backend)
    attention(q.requires_grad_(), k, v, backend=backend)
    with torch.no_grad():
        attention(q, k, v, backend=backend)
    assert [residual.numel() for _, _, residual, _ in made] == [0, q.numel(), 0]
    assert torch.equal(made[0][0], made[1][0])


def test_a_gradient_without_what_rounding_took_off_is_refused(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in Case(20).draw(torch.bfloat16, PLACE))
    with pytest.raises(AssertionError, match="what rounding took off the output was not kept"):
        stick_breaking._operator(q, k, v, None, None, 0.25, False, 0.0, backend, False)


def test_gradient_is_that_of_the_truncated_function(backend: str) -> None:
    # two tiles of keys: with a stick used up in the newer one, the older one gets no gradient at all
    q, k, v = (x.requires_grad_() for x in Case(300, heads=1, groups=1, shift=1.0).draw(torch.float32, PLACE))
    out, rest = attention(q, k, v, epsilon=1e-3, backend=backend)
    late = out[:, -20:].sum() + rest[:, -20:].sum()
    dk, dv = torch.autograd.grad(late, (k, v))
    assert float(dk[:, :100].abs().max()) == 0.0
    assert float(dv[:, :100].abs().max()) == 0.0
    assert float(dv[:, -40:].abs().max()) > 0


def test_default_epsilon_changes_nothing_above_rounding(backend: str) -> None:
    check(Case(200, heads=2), torch.float32, backend, epsilon=None)


def test_portable_path_stops_when_the_stick_is_used_up() -> None:
    q, k, v = Case(2048, heads=1, groups=1, shift=2.0).draw(torch.float32, torch.device("cpu"))
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    tiles = list(stick_breaking._walk(q, k.flip(1), v.flip(1), None, slice(1920, 2048), False, 2**-24))
    assert len(tiles) <= 3
    everything = list(stick_breaking._walk(q, k.flip(1), v.flip(1) * 0, None, slice(1920, 2048), False, -1.0))
    assert len(everything) == 16


@pytest.mark.parametrize("bounds", [None, (0, 40, 41, 70)])
def test_same_inputs_give_the_same_bits(bounds: tuple[int, ...] | None, backend: str) -> None:
    case = Case(70 if not GPU else 1000, heads=2, groups=1, dim=32)
    if bounds:
        case = replace(case, bounds=(*bounds[:-1], case.t))
    inputs = tuple(x.requires_grad_() for x in case.draw(torch.float32, PLACE))
    results = []
    for _ in range(2 if not GPU else 5):
        out, rest = attention(*inputs, cu_seqlens=case.cu_seqlens(PLACE), backend=backend)
        results.append((out, rest, *torch.autograd.grad(out.square().sum() + rest.sum(), inputs)))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_inputs_may_be_strided(backend: str) -> None:
    heads = torch.randn(2, 40, 6, 32, device=PLACE)
    q, k, v = heads.split((2, 2, 2), 2)
    assert not q.is_contiguous()
    wanted, _ = attention(*(x.contiguous() for x in (q, k, v)), backend=backend)
    found, _ = attention(q, k, v, backend=backend)
    assert torch.equal(found, wanted)
    transposed = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(attention(*transposed, backend=backend)[0], wanted)


def test_a_query_block_sees_what_the_whole_sees(backend: str) -> None:
    q, k, v = Case(90, heads=4, groups=2, shift=-4.0).draw(torch.float32, PLACE)
    whole, rest = attention(q, k, v, epsilon=0.0, backend=backend)
    part, part_rest = attention(q[:, 60:], k, v, epsilon=0.0, backend=backend)
    assert error(part, whole[:, 60:]) <= TOLERANCE[torch.float32]
    assert error(part_rest, rest[:, 60:]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("epsilon", [0.0, 2.0**-24, 0.2])
@pytest.mark.parametrize("queries", [1, 3])
def test_decoding_against_a_padded_cache(queries: int, epsilon: float, backend: str, monkeypatch: Any) -> None:
    """Row by row what the reference says of the row's own keys; padding holds NaN."""
    from sbeval.kernels import stick_breaking_decode

    # so that there are chunks left to ask for
    monkeypatch.setattr(stick_breaking_decode, "NEWEST", 64)
    case = Case(queries, s=300, batch=4, heads=4, groups=2, dim=32, shift=-4.0)
    q, k, v = case.draw(torch.float32, PLACE)
    starts, lengths = [0, 17, 299, 40], [300, 280, 300, 40]
    bias = torch.randn(4, device=PLACE)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for x in (k, v):
            x[b, :start] = x[b, length:] = torch.nan
    first, end = (torch.tensor(x, dtype=torch.int32, device=PLACE) for x in (starts, lengths))
    out, rest = attention(q, k, v, bias=bias, starts=first, lengths=end, epsilon=epsilon, backend=backend)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        n = min(queries, length - start)
        assert bool((out[b, : queries - n] == 0).all()) and bool((rest[b, : queries - n] == 1).all())
        if n == 0:
            continue
        row = (q[b : b + 1, -n:], k[b : b + 1, start:length], v[b : b + 1, start:length])
        wanted, wanted_rest = reference(*(x.double() for x in row), bias=bias.double())
        if epsilon < 0.1:
            assert error(out[b, -n:], wanted[0]) <= TOLERANCE[torch.float32]
            assert float((rest[b, -n:] - wanted_rest[0]).abs().max()) <= epsilon + TOLERANCE[torch.float32] * float(
                wanted_rest.max()
            )
        else:
            assert float((out[b, -n:] - wanted[0]).abs().max()) <= epsilon * float(row[2].abs().max())


def test_bounds_are_for_decoding(backend: str) -> None:
    q, k, v = Case(1, s=8).draw(torch.float32, PLACE)
    lengths = torch.tensor([5], dtype=torch.int32, device=PLACE)
    with pytest.raises(InputError, match="starts and lengths are for decoding, which has no gradient"):
        attention(q.requires_grad_(), k, v, lengths=lengths, backend=backend)
    with pytest.raises(InputError, match="lengths must be int32 of shape"):
        attention(q.detach(), k, v, lengths=lengths.long(), backend=backend)
    if not GPU:
        with pytest.raises(InputError, match="lengths must lie in 0 to 8; it is \\[9\\]"):
            attention(q.detach(), k, v, lengths=lengths + 4, backend=backend)
    with pytest.raises(InputError, match="bias must be torch.float32 of shape"):
        attention(q.detach(), k, v, bias=torch.zeros(3, device=PLACE), backend=backend)


@pytest.mark.parametrize(("heads", "bounds"), [(3, None), (5, (0, 70, 70))], ids=str)
def test_heads_in_chunks_give_the_same(heads: int, bounds: tuple[int, ...] | None, monkeypatch: Any) -> None:
    """Backward keeps the states of as many heads at a time as fit; here two of three, or of packed sequences, where the
    device counts what they take, three of five."""
    if not GPU:
        monkeypatch.setattr(stick_breaking, "pick_backend", lambda *_: "triton")
    from sbeval.kernels import stick_breaking_triton

    inputs = tuple(x.requires_grad_() for x in Case(70, heads=heads, groups=heads).draw(torch.float32, PLACE))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=PLACE)

    def gradients() -> tuple[Tensor, ...]:
        out, rest = attention(*inputs, cu_seqlens=cu_seqlens, backend="triton")
        return torch.autograd.grad(out.square().sum() + rest.sum(), inputs)

    wanted = gradients()
    options = stick_breaking_triton.tiles("query", 16, torch.float32)
    slots = options["BLOCK_M"] // options["BLOCK_N"] * 3 + 2
    one = slots * 2 * options["BLOCK_M"] * 4
    assert one * heads < stick_breaking_triton.STATE_BYTES
    monkeypatch.setattr(stick_breaking_triton, "STATE_BYTES", one * 2)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))


def test_weights_and_remainder_share_one_stick() -> None:
    q, k, v = Case(100).draw(torch.float64, PLACE)
    out, rest = attention(q, k, torch.ones_like(v))
    torch.testing.assert_close(out[..., 0] + rest, torch.ones_like(rest))


def test_only_earlier_keys_are_seen(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in Case(40, heads=1, groups=1).draw(torch.float32, PLACE))
    out, _ = attention(q, k, v, backend=backend)
    (dv,) = torch.autograd.grad(out[:, 20].sum(), v)
    assert float(dv[:, 20:].abs().max()) == 0.0
    assert bool((dv[:, :20].abs().amax((0, 2, 3)) > 0).all())


def test_memory_is_linear_in_length() -> None:
    """16384 tokens and 4 heads forward and backward: the T x T matrix alone would take 4.3 GB."""
    script = (
        "import resource, torch\n"
        "from sbeval.kernels.stick_breaking import attention\n"
        "q, k, v = (torch.randn(1, 16384, 4, 16).requires_grad_() for _ in range(3))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "out, rest = attention(q * 0.1, k, v - 0.0)\n"
        "(out.sum() + rest.sum()).backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 1e9
    assert resource.RUSAGE_SELF == 0


def test_torch_library_contract(backend: str) -> None:
    if backend == "triton" and not GPU:
        pytest.skip("the interpreter does not run under opcheck's tracing")
    case = Case(20, bounds=(0, 5, 20))
    q, k, v = (x.requires_grad_() for x in case.draw(torch.float32, PLACE))
    arguments = (q, k, v, None, case.cu_seqlens(PLACE), 0.25, False, 0.0, backend, True)
    torch.library.opcheck(stick_breaking._operator, arguments)


def test_compiles_whole() -> None:
    q, k, v = (x.requires_grad_() for x in Case(40).draw(torch.float32, PLACE))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, rest = attention(q, k, v)
        return out.square().sum() + rest.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(q, k, v), (q, k, v))
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("remainder", ["none", "value", "bias"])
def test_mixer_spends_the_remainder(remainder: str) -> None:
    mixer = Mixer(Options(remainder=remainder), heads=4, kv_heads=2, head_dim=16, width=64, scale=0.25).double()
    q, k, v = Case(30, heads=4).draw(torch.float64, torch.device("cpu"))
    bias = torch.randn(4, 16, dtype=torch.float64)
    if remainder == "bias":
        mixer.load_state_dict({"bias": bias})
    out, rest = reference(q, k, v, scale=0.25)
    bought = {"none": torch.zeros_like(out), "value": v.repeat_interleave(2, 2), "bias": bias}
    torch.testing.assert_close(mixer(q, k, v, q.flatten(2)), out + rest[..., None] * bought[remainder])


def test_spread_biases_are_a_ladder_over_heads() -> None:
    """The nearest key takes 2^-1 ... 2^-10 over the heads, evenly in the exponent."""
    betas = initial_bias("spread", 10).double().sigmoid()
    torch.testing.assert_close(betas, 0.5 ** torch.arange(1, 11, dtype=torch.float64), rtol=1e-6, atol=0)
    exponents = -initial_bias("spread", 4).double().sigmoid().log2()
    torch.testing.assert_close(exponents, torch.tensor([1.0, 4, 7, 10], dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(initial_bias(-3.0, 2), torch.tensor([-3.0, -3]))
    with pytest.raises(
        InputError, match="logit_bias=spread is spread over heads, and the model has one: give a number"
    ):
        initial_bias("spread", 1)


@pytest.mark.parametrize("start", [-1.5, "spread"])
def test_mixer_adds_the_bias_of_each_head(start: float | str) -> None:
    options = Options(remainder="none", logit_bias=start)
    mixer = Mixer(options, heads=4, kv_heads=2, head_dim=16, width=64, scale=0.25).double()
    q, k, v = Case(30, heads=4).draw(torch.float64, torch.device("cpu"))
    wanted = reference(q, k, v, scale=0.25, bias=initial_bias(start, 4).double())[0]
    torch.testing.assert_close(mixer(q, k, v, q.flatten(2)), wanted)


def test_wrong_arguments_are_named() -> None:
    q, k, v = Case(8).draw(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="cu_seqlens must go from 0 to T = 8; it goes from 0 to 7"):
        attention(q, k, v, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match="epsilon is a share of the stick.*got 2"):
        attention(q, k, v, epsilon=2)
    with pytest.raises(ValueError, match="unknown backend 'tritn' of stick_breaking; did you mean 'triton'"):
        attention(q, k, v, backend="tritn")
    with pytest.raises(ValueError, match="backend 'triton' needs float16, bfloat16 or float32 on a GPU"):
        attention(q, k, v, backend="triton")
    with pytest.raises(InputError, match="unknown remainder 'valu'; did you mean 'value'"):
        Options(remainder="valu")
