"""The Hopper kernels without a GPU: their logic in an emulator, and who may run them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.kernels import hopper, stick_breaking
from sbeval.kernels.stick_breaking import attention, reference

if hopper.compiler_obstacle():
    pytest.skip(hopper.compiler_obstacle(), allow_module_level=True)

from sbeval.kernels import (
    stick_breaking_hopper,
    stick_breaking_hopper_backward,
    stick_breaking_hopper_gradients,
    stick_breaking_hopper_movers,
    stick_breaking_hopper_order,
)


def _emulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gluon_emulator", Path(__file__).with_name("gluon_emulator.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


emulator = _emulator()
BFLOAT16 = torch.bfloat16


def _exchange(order: list[int]) -> Any:
    return lambda x: emulator.Value(x.t[:, order])


def _pack(older: Any, newer: Any, dtype: torch.dtype) -> Any:
    low, high = (x.t.to(dtype).view(torch.int16).int() for x in (older, newer))
    return emulator.Value((low & 0xFFFF) | (high << 16))


def _halves(x: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    low, high = ((y >> 16).to(torch.int16).view(dtype) for y in (x.t << 16, x.t))
    return emulator.Value(low), emulator.Value(high)


def _wait_for(p_count: Any, wanted: int) -> Any:
    assert int(p_count.flat[p_count.offset]) >= wanted, "programs run one after another: this would wait for ever"
    return emulator.Integer(0)


def _find(p_first: Any, p_second: Any, count: Any) -> Any:
    words = [p.flat[p.offset] for p in (p_first, p_second)]
    waits = not all(bool((word >> 32 == count.t).all()) for word in words)
    assert not waits, "programs run one after another: this would wait for ever"
    return tuple(emulator.Value(word.to(torch.int32).view(torch.float32)) for word in words)


def _leave(words: Any, o_word: Any, value: Any, count: Any, i_q: Any) -> None:
    # that of all four threads is the same
    assert bool((value.t == value.t[:, :1]).all())
    written = (count.t.long() << 32) | (value.t.contiguous().view(torch.int32).long() & 0xFFFFFFFF)
    words.flat[o_word.t[:, 0].long()] = written[:, 0]


def _publish(p_count: Any, warps: int = 1) -> None:
    p_count.flat[p_count.offset] += warps


ASSEMBLY = {
    "_exp2": lambda x: emulator.Value(x.t.exp2()),
    "_reciprocal": lambda x: emulator.Value(1 / x.t),
    "_from_neighbour": _exchange([1, 0, 3, 2]),
    "_from_other_pair": _exchange([2, 3, 0, 1]),
    "_pack": _pack,
    "_halves": _halves,
    "_wait_for": _wait_for,
    "_publish": _publish,
    "_publish_all": lambda p_count: _publish(p_count, 4),
    "_find": _find,
    "_leave": _leave,
    "_add_to_global": lambda descriptor, corner, tile: descriptor.write(corner, tile, add=True),
    "_wait_for_additions": lambda _: None,
    "_cut": lambda _: None,
    "_meet": lambda: None,
    "TILE": 64,
    "WORDS": 8,
    "RANGES": 5,
    "RESOLUTION": 2.0**-24,
    "BETA_SCALE": 2.0**15,
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run in the emulator, copies late now and then; two programs of forward draw all tiles."""
    torch.manual_seed(0)
    launched = {stick_breaking_hopper: "forward_kernel", stick_breaking_hopper_backward: "backward_kernel"}
    parts = [stick_breaking_hopper_gradients, stick_breaking_hopper_movers, stick_breaking_hopper_order]
    for module, name in launched.items():
        kernel = emulator.Launched(getattr(module, name), [*launched, *parts], ASSEMBLY, delay=5e-3)
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(stick_breaking, "pick_backend", lambda *_: "triton-hopper")


@pytest.fixture(autouse=True)
def poison() -> Any:
    """Memory that was allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(t: int, s: int, heads: int = 2, groups: int = 1, dim: int = 64, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, n, h, dim).to(BFLOAT16) for n, h in ((t, heads), (s, groups), (s, groups))]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check(q: Tensor, k: Tensor, v: Tensor, *, bounds: Any = None, bias: float | None = None, **options: Any) -> None:
    """Output, remainder and every gradient against the definition in float64."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    inputs = [q, k, v] + ([] if bias is None else [torch.full((q.shape[2],), bias)])
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    epsilon = options.pop("epsilon", 0.0)
    shift, exact_shift = (None, None) if bias is None else (inputs[3], exact[3])
    found = attention(q, k, v, cu_seqlens=cu_seqlens, bias=shift, epsilon=epsilon, backend="triton-hopper", **options)
    wanted = reference(*exact[:3], cu_seqlens=cu_seqlens, bias=exact_shift, **options)
    above = [torch.randn_like(x) for x in found]
    gradients = torch.autograd.grad(found, inputs, above)
    right = torch.autograd.grad(wanted, exact, [x.double() for x in above])
    # a bias' gradient is a sum over all pairs that nearly cancels
    tolerances = (5e-3, 1e-5, 5e-3, 5e-3, 5e-3, 2e-2)[: 2 + len(inputs)]
    for got, want, tolerance in zip((*found, *gradients), (*wanted, *right), tolerances, strict=True):
        assert error(got.detach(), want.detach()) < tolerance


# one tile, a tile and a row, tiles that no warpgroup has rows for, batches, the last row in a window, packed rows
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("t", "options"),
    [
        (64, {}),
        (65, {"attend_current": True}),
        (200, {"epsilon": 2.0**-24}),
        (330, {"bias": -1.0}),
        (300, {"bounds": (0, 0, 1, 65, 193, 193, 290, 300)}),
    ],
)
def test_odd_lengths(t: int, options: dict[str, Any], dim: int) -> None:
    check(*draw(t, t, dim=dim, batch=1 if "bounds" in options else 2), **options)


@pytest.mark.parametrize(
    ("stages", "gradients", "columns", "together"), [(2, 2, 1, 1), (3, 4, 1, 2), (3, 4, 2, 5), (4, 2, 2, 3)]
)
def test_buffers_and_orders_of_programs(
    stages: int, gradients: int, columns: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps are buffered, and however many heads are dealt with together."""
    config = {"STAGES": stages, "NB": gradients, "NDQ": columns, "TOGETHER": together}
    monkeypatch.setitem(stick_breaking_hopper_backward.CONFIGS, 64, config)
    for t in (64, 130, 330):
        check(*draw(t, t, heads=3, groups=3), bias=-1.0)


@pytest.mark.parametrize("groups", [2, 3])
def test_a_plan_has_each_tile_of_each_sequence(groups: int) -> None:
    """Of more sequences than are summed at a time, of more tiles than are written at a time, some of them empty."""
    lengths = [0, 1, 64, 65, 7000, 0] + [3 * i % 400 for i in range(300)]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    plan = torch.full((4 * (sum(lengths) // 64 + len(lengths) + 1),), -1, dtype=torch.int32)
    stick_breaking_hopper.plan_kernel[(len(lengths),)](bounds, plan, len(lengths), NWG=groups)
    wanted, before = [], 0
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        tiles = -(-length // 64)
        # the first rows of the programs' tiles, of which the last ends with the sequence
        rows = range((tiles - groups) * 64, -groups * 64, -groups * 64)
        wanted += [[start, length, row, before] for row in reversed(rows)]
        before += tiles
    assert plan[:2].tolist() == [0, len(wanted)]
    assert plan[4 : 4 + 4 * len(wanted)].view(-1, 4).tolist() == wanted
    assert int(plan[4 + 4 * len(wanted) :].max()) == -1


def test_without_a_gradient_nothing_is_kept_for_it() -> None:
    q, k, v = draw(200, 200)
    wanted = stick_breaking_hopper.forward(q, k, v, None, None, 0.125, False, 0.0)
    bare = stick_breaking_hopper.forward(q, k, v, None, None, 0.125, False, 0.0, differentiable=False)
    assert bare[2].numel() == 0
    assert all(torch.equal(bare[i], wanted[i]) for i in (0, 1, 3))


def test_output_is_read_from_shared_memory_before_the_next_queries_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program has six tiles of queries one after another in two places."""
    monkeypatch.setattr(stick_breaking_hopper, "_processors", lambda _: 1)
    check(*draw(384, 384, dim=128))


@pytest.mark.parametrize("cached", [0, 1 << 30])
def test_heads_in_ranges_of_queries(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads in ranges, one after another, where the L2 has no room for one; else the last one."""
    monkeypatch.setattr(stick_breaking_hopper_order, "CACHED", cached)
    check(*draw(900, 964, heads=3, groups=3), bias=-1.0)
    check(*draw(514, 514, heads=4, groups=2), bias=1.0, epsilon=2.0**-24)


class Walk(NamedTuple):
    """What a program is dealt."""

    head: int
    keys: int
    begin: int
    end: int
    i_range: int
    place: int
    n_before: int
    is_last: bool


@pytest.mark.parametrize(("n_tiles", "n_past"), [(1, 0), (2, 3), (5, 0), (30, 0), (31, 1), (64, 7)])
@pytest.mark.parametrize("shares", [(5, 0, 2, 1), (0, 3, 1, 1), (4, 3, 3, 2), (1, 2, 2, 2), (0, 1, 1, 1)])
def test_programs_are_dealt_all_tiles_in_order(
    n_tiles: int, n_past: int, shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair of tiles once, the newer keys first; whoever adds to dk and dv comes after those that it waits for."""
    module = stick_breaking_hopper_order
    ranges = module.programs_of(n_tiles, n_past)
    monkeypatch.setattr(module, "gl", emulator.FakeGluon(0, 1))
    monkeypatch.setattr(module, "RANGES", 5)
    for name in ("_edge", "_n_programs"):
        monkeypatch.setattr(module, name, emulator.plain(getattr(module, name)))
    tickets = shares[0] * ranges[0] + shares[1] * sum(ranges)
    deal = emulator.plain(module._deal)
    walks = [Walk(*deal(emulator.Integer(i), shares, ranges[0], n_tiles, n_past)) for i in range(tickets)]
    following = {(head, tile): (tile + n_past) // 2 for head in range(sum(shares[:2])) for tile in range(n_tiles)}
    users: dict[int, list[Walk]] = {}
    for walk in walks:
        begin = max(walk.begin, 2 * walk.keys - n_past)
        assert 0 <= begin < walk.end <= n_tiles
        for tile in range(begin, walk.end):
            assert walk.keys == following[walk.head, tile]
            following[walk.head, tile] -= 1
        if walk.place >= 0:
            before = users.setdefault(walk.place, [])
            assert walk.n_before == len(before)
            # the one before is of the same keys, or has done with its own
            same = bool(before) and (before[-1].head, before[-1].keys) == (walk.head, walk.keys)
            assert same == (walk.i_range > 0) and (same or not before or before[-1].is_last)
            assert not same or not before[-1].is_last and before[-1].begin == walk.end
            before.append(walk)
        else:
            assert walk.is_last and walk.i_range == 0
        assert walk.is_last == (begin == max(0, 2 * walk.keys - n_past))
    assert set(following.values()) == {-1}
    assert len(users) <= shares[3] * ranges[1]


def test_queries_after_a_longer_prefix() -> None:
    check(*draw(100, 228, heads=4, groups=2))


@pytest.mark.parametrize("options", [{"batch": 3}, {"heads": 6, "groups": 3}, {"heads": 1}])
def test_heads_in_two_parts(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of groups of heads, and one, of which the second part would be empty."""
    monkeypatch.setattr(stick_breaking_hopper_backward, "LONG", 0)
    check(*draw(130, 130, **options), bias=-1.0)


@pytest.mark.parametrize("bias", [-3.0, 1.0])
def test_a_warpgroup_stops_alone(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each 64 queries stopped is where their own stick was used up, at a look."""
    monkeypatch.setattr(stick_breaking_hopper, "LOOK", 2)
    q, k, v = draw(1000, 1000)
    shift = torch.full((2,), bias)
    *_, stop = stick_breaking_hopper.forward(q, k, v, shift, None, 0.125, False, 2.0**-24)
    check(q, k, v, bias=bias, epsilon=2.0**-24)
    q, k = q.detach(), k.detach()
    z = torch.einsum("bthd,bsgd->bhts", q.double(), k.double()) * 0.125 + bias
    before = torch.arange(1000) < torch.arange(1000)[:, None]
    rest = torch.nn.functional.logsigmoid(-z).masked_fill(~before, 0)
    for i in range(16):
        left = rest[:, :, 64 * i : 64 * i + 64].flip(-1).cumsum(-1).exp().flip(-1).amax(2)
        for head, key in enumerate(stop[0, :, i].tolist()):
            assert key % 64 == 0 and (key == 0 or left[0, head, key] <= 2.0**-24)
            # two tiles, a look, before
            newer = key + 128
            assert newer >= 64 * i or left[0, head, newer] > 2.0**-24
    assert int(stop.max()) > 0


def test_gradient_is_that_of_the_truncated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stick_breaking_hopper, "LOOK", 1)
    q, k, v = draw(640, 640, heads=1)
    *_, stop = stick_breaking_hopper.forward(q, k, v, None, None, 0.05, False, 1e-3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, rest = attention(*inputs, scale=0.05, epsilon=1e-3, backend="triton-hopper")
    # the oldest key that the last 64 queries visited, in the newer and the older half of a program's keys
    for i in (8, 9):
        late = slice(64 * i, 64 * i + 64)
        oldest = int(stop[0, 0, i])
        assert oldest > 0
        gradients = torch.autograd.grad(out[:, late].sum() + rest[:, late].sum(), inputs[1:], retain_graph=True)
        for gradient in gradients:
            assert float(gradient[:, :oldest].abs().max()) == 0.0
            assert float(gradient[:, oldest : oldest + 64].abs().max()) > 0


def test_a_tile_that_comes_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest warpgroup needs neither of the two newest tiles; if it did not wait for them, it would take the first
    of them, in a ring of two, for the next one's."""
    monkeypatch.setitem(stick_breaking_hopper.CONFIGS[64], "STAGES", 2)
    monkeypatch.setattr(stick_breaking_hopper.forward_kernel, "delay", 0.1)
    for _ in range(4):
        check(*draw(192, 192, heads=1))


@pytest.mark.parametrize("slot", range(10, 30))
def test_a_stop_that_no_barrier_has_ordered_changes_nothing(slot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer at a slot has seen the tiles up to slot - STAGES given back; of later stops its threads may see some
    or none. It began at slot 10, and -1 and 9 are stops of walks before."""
    monkeypatch.setattr(stick_breaking_hopper, "gl", emulator.FakeGluon(0, 1))
    seen = emulator.plain(stick_breaking_hopper._has_stopped)
    stages = 4
    assert [seen(stop, 10, slot, stages) for stop in (-1, 9)] == [0, 0]
    for stop in range(10, 30):
        assert seen(stop, 10, slot, stages) == int(stop <= slot - stages)


@pytest.mark.filterwarnings("default")
def test_packing_other_numbers_of_sequences_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model is compiled once for one number of sequences and once for all others."""
    graphs = []

    def forward(q: Tensor, k: Tensor, v: Tensor, bias: None, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, ...]:
        stop = torch.zeros(stick_breaking_hopper.stop_shape(q, cu_seqlens), dtype=torch.int32)
        return torch.zeros_like(q), torch.zeros(q.shape[:3]), torch.zeros_like(q), stop

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(stick_breaking_hopper, "forward", forward)
    torch.compiler.reset()
    q, k, v = draw(256, 256)
    compiled = torch.compile(lambda cu_seqlens: attention(q, k, v, cu_seqlens=cu_seqlens)[0] * 2, backend=counted)
    for n_sequences in (3, 5, 4, 9, 12):
        compiled(torch.linspace(0, 256, n_sequences + 1).int())
    torch.compiler.reset()
    assert len(graphs) <= 2


def test_they_run_by_default_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pick = stick_breaking.pick_backend
    q, k, v = draw(64, 64)
    assert pick(q, k, None) == "torch"
    monkeypatch.setattr(hopper, "obstacle", lambda _: "")
    assert pick(q, k, None) == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True)
        assert pick(q, k, None) == "triton"
        q, k = (torch.empty(2, 8192, 2, 64, dtype=BFLOAT16) for _ in range(2))
        assert pick(q, k, None) == "triton-hopper"
        assert pick(q[:, :-64], k, None) == "triton-hopper"
        assert pick(q[:, :4096], k, None) == "triton"
        assert pick(q, k, None, True) == "triton"
        assert pick(q[..., :32], k[..., :32], None) == "triton"
        assert pick(q.float(), k.float(), None) == "triton"
        patch.setattr(hopper, "obstacle", lambda _: "it needs another GPU")
        assert pick(q, k, None) == "triton"


def test_who_may_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    q, k, v = draw(64, 64)
    with pytest.raises(InputError, match="backend 'triton-hopper' can't run: it needs a GPU, and this device is cpu"):
        attention(q, k, v, backend="triton-hopper")
    with pytest.raises(InputError, match="'triton-hopper' has no kernel for starts and lengths"):
        attention(q, k, v, starts=torch.zeros(1, dtype=torch.int32), backend="triton-hopper")
    assert hopper.inputs_obstacle(q, k) == ""
    assert "takes float16 and bfloat16" in hopper.inputs_obstacle(q.float(), k.float())
    assert "heads of 64 and 128, and those of q have 32" in hopper.inputs_obstacle(q[..., :32], k[..., :32])
    assert "and q follows 1" in hopper.inputs_obstacle(q[:, 1:], k)
    assert "at least 64 keys, and k has 63" in hopper.inputs_obstacle(q[:, 1:], k[:, 1:])


@pytest.mark.parametrize(
    ("major", "version", "obstacle"), [(8, "3.6.0", "has 8.0"), (9, "3.9.1", "3.9.1, and Gluon is")]
)
def test_other_devices_and_compilers(major: int, version: str, obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(triton, "__version__", version)
    hopper.compiler_obstacle.cache_clear()
    assert obstacle in hopper.obstacle(torch.device("cuda"))
    hopper.compiler_obstacle.cache_clear()
