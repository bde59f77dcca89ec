"""Run a Gluon kernel's Python on the CPU, to test its logic: barriers and their phases, indexing, who waits for whom.

Partitions are threads. Products that are asynchronous happen as late as they may, and so do copies to global memory;
those from there after `delay` seconds or at once, as chance has it; shared memory starts as NaN, and a tile is NaN
again while it is copied. A barrier tells an odd phase from an even one, as in hardware, and a partition that waits for
LIMIT seconds raises. Nothing is known here of layouts, of compilers, or of missing fences; what uses inline assembly
is replaced by the caller.
"""

import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LIMIT = 20.0
# what is written to global memory by several partitions
lock = threading.Lock()
_queue = threading.local()


def _number(x: Any) -> Any:
    return Integer(x) if not x.dtype.is_floating_point else float(x)


def raw(x: Any) -> Any:
    """The tensor or number in a value of a kernel."""
    return x.t if isinstance(x, Value) else x


class Integer(int):
    """A scalar integer; what comes of it has the methods that a kernel's scalars have."""

    def to(self, _: Any) -> "Integer":
        return self


def _integer_operator(name: str) -> Callable[[Integer, Any], Any]:
    plain = getattr(int, name)

    def operator(self: Integer, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        found = plain(self, int(other))
        return found if isinstance(found, bool) else Integer(found)

    return operator


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "rshift", "lshift"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(Integer, _side, _integer_operator(_side))


class Untyped:
    """In place of a type, of which only the layout is asked."""

    layout = None


class Held:
    """A tensor in some memory."""

    type = Untyped

    def __init__(self, t: Any) -> None:
        self.t = t

    @property
    def shape(self) -> list[int]:
        return list(self.t.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.t.dtype  # type: ignore[no-any-return]


class Value(Held):
    """A tensor in registers."""

    t: Tensor

    def reshape(self, shape: Sequence[int]) -> "Value":
        return Value(self.t.reshape(shape))

    def permute(self, *order: Any) -> "Value":
        return Value(self.t.permute(order[0] if isinstance(order[0], (tuple, list)) else order))

    def to(self, dtype: torch.dtype, **_: Any) -> "Value":
        return Value(self.t.to(dtype))

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.t[index])


def _operator(name: str, swapped: bool) -> Callable[[Value, Any], Any]:
    plain = getattr(torch.Tensor, f"__{name}__")

    def operator(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        other = raw(other)
        if not isinstance(other, Tensor):
            floating = isinstance(other, float) and not self.t.dtype.is_floating_point
            other = torch.tensor(other, dtype=torch.float32 if floating else self.t.dtype)
        return Value(plain(other, self.t) if swapped else plain(self.t, other))

    return operator


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "and",
    "or",
    "rshift",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
):
    setattr(Value, f"__{_name}__", _operator(_name, False))
for _name in ("add", "sub", "mul", "truediv", "and"):
    setattr(Value, f"__r{_name}__", _operator(_name, True))


class Pointer:
    """An address in a flat tensor, or a tensor of them."""

    def __init__(self, flat: Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat.detach().view(-1), offset

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.flat, self.offset + (raw(other).long() if isinstance(other, Value) else int(other)))

    __radd__ = __add__

    def to(self, *_: Any, **__: Any) -> "Pointer":
        """In bytes, as inline assembly wants it."""
        return Pointer(self.flat, self.offset * self.flat.element_size())


class Barrier:
    """An mbarrier: a phase is complete when all have arrived and all expected bytes have."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.bytes = self.pending = self.count = 0

    def change(self, arrivals: int, n_bytes: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += n_bytes
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: (self.phase & 1) != parity, LIMIT):
                raise RuntimeError("nobody came to a barrier")


class Shared(Held):
    """Shared memory: a tensor, or barriers."""

    def index(self, i: int) -> "Shared":
        return Shared(self.t[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.t.narrow(dim, start, length))

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.t.view(shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.t.permute(order))

    def load(self, _: Any = None) -> Value:
        return Value(self.t.clone())

    def store(self, value: Value) -> None:
        assert value.shape == self.shape, (value.shape, self.shape)
        self.t.copy_(value.t)


class Descriptor:
    """A tensor map: what lies outside of it is read as 0."""

    layout = None

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> None:
        self.view = torch.as_strided(base.detach(), shape, strides)
        self.block, self.dtype = list(block), base.dtype

    def read(self, corner: Sequence[int]) -> Tensor:
        found = self.view[tuple(slice(int(c), int(c) + n) for c, n in zip(corner, self.block, strict=True))]
        whole = torch.zeros(self.block, dtype=self.dtype)
        whole[tuple(slice(0, n) for n in found.shape)] = found
        return whole

    def write(self, corner: Sequence[int], tile: "Shared", *, add: bool) -> None:
        """What lies outside is left out."""
        inside = self.view[tuple(slice(int(c), int(c) + n) for c, n in zip(corner, self.block, strict=True))]
        with lock:
            inside.copy_(tile.t[tuple(slice(0, n) for n in inside.shape)] + (inside if add else 0))


class Product:
    """A product that may not have happened yet."""

    def __init__(self) -> None:
        self.value: Value | None = None


def _finish(outstanding: int) -> None:
    waiting = _queue.__dict__.setdefault("products", [])
    while len(waiting) > outstanding:
        waiting.pop(0)()


def _product(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    token = Product()
    # an operand in registers is read when the product begins, one in shared memory when it happens
    held = a.t.clone() if isinstance(a, Value) else a.t

    def happen() -> None:
        base: Any = acc.value if isinstance(acc, Product) else acc
        token.value = Value(held.float() @ b.t.float() + (base.t if use_acc else 0.0))

    _queue.__dict__.setdefault("products", []).append(happen)
    if is_async:
        return token
    _finish(0)
    return token.value


def _product_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    _finish(num_outstanding)
    # what is still in flight stays a token
    found = tuple(x.value if isinstance(x, Product) and x.value is not None else x for x in deps)
    return found[0] if len(found) == 1 else found


class FakeBarriers:
    """In place of Gluon's mbarrier."""

    @staticmethod
    def MBarrierLayout() -> None:
        return None

    @staticmethod
    def init(bar: Shared, count: int) -> None:
        bar.t[0].count = bar.t[0].pending = count

    @staticmethod
    def expect(bar: Shared, n_bytes: int, pred: Any = True) -> None:
        if pred:
            bar.t[0].change(1, n_bytes)

    @staticmethod
    def arrive(bar: Shared, *, count: int = 1, pred: Any = True) -> None:
        if pred:
            bar.t[0].change(count, 0)

    @staticmethod
    def wait(bar: Shared, phase: int, pred: Any = True) -> None:
        if pred:
            bar.t[0].wait(int(phase) & 1)


class FakeCopies:
    """In place of Gluon's tma."""

    def __init__(self, launched: "Launched") -> None:
        self.launched = launched

    def async_copy_global_to_shared(
        self, desc: Descriptor, corner: Sequence[int], bar: Shared, target: Shared, pred: Any = True
    ) -> None:
        if not pred:
            return
        target.t.fill_(torch.nan)

        def copy() -> None:
            time.sleep(self.launched.delay * (random.random() < 0.3))
            target.t.copy_(desc.read(corner).view(target.t.shape))
            bar.t[0].change(0, -target.t.numel() * target.t.element_size())

        threading.Thread(target=copy, daemon=True).start()

    def async_copy_shared_to_global(self, desc: Descriptor, corner: Sequence[int], source: Shared) -> None:
        _queue.__dict__.setdefault("stores", []).append(lambda: desc.write(corner, source, add=False))

    def store_wait(self, outstanding: int) -> None:
        waiting = _queue.__dict__.setdefault("stores", [])
        while len(waiting) > outstanding:
            waiting.pop(0)()


class FakeGluon:
    """In place of triton.experimental.gluon.language, for one program."""

    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    static_range = range

    class constexpr:
        pass

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs

    def __getattr__(self, name: str) -> Any:
        assert name.endswith("Layout"), f"the emulator knows no {name}"
        return lambda *_, **__: None

    def program_id(self, _: int) -> Integer:
        return Integer(self.program)

    def num_programs(self, _: int) -> Integer:
        return Integer(self.programs)

    def arange(self, start: int, end: int, layout: Any) -> Value:
        return Value(torch.arange(start, end))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Value:
        return Value(torch.zeros(tuple(shape), dtype=dtype))

    def full(self, shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any) -> Value:
        return Value(torch.full(tuple(shape), int(value) if isinstance(value, int) else value, dtype=dtype))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        condition, a, b = (torch.as_tensor(raw(x)) for x in (condition, a, b))
        return self._reduced(torch.where(condition, a, b))

    def minimum(self, a: Any, b: Any) -> Any:
        if isinstance(a, int):
            return Integer(min(a, b))
        return Value(a.t.clamp(max=raw(b)))

    def maximum(self, a: int, b: int) -> Integer:
        return Integer(max(a, b))

    def join(self, a: Value, b: Value) -> Value:
        return Value(torch.stack([a.t, b.t], -1))

    def split(self, x: Value) -> tuple[Value, Value]:
        return Value(x.t[..., 0]), Value(x.t[..., 1])

    def convert_layout(self, x: Value, layout: Any, assert_trivial: bool = False) -> Value:
        return x

    def _reduced(self, found: Tensor) -> Any:
        return Value(found) if found.dim() else _number(found)

    def max(self, x: Value, axis: int) -> Any:
        return self._reduced(x.t.amax(axis))

    def min(self, x: Value, axis: int) -> Any:
        return self._reduced(x.t.amin(axis))

    def sum(self, x: Value, axis: int) -> Any:
        return self._reduced(x.t.sum(axis))

    def load(self, p: Pointer, mask: Value | None = None, other: Any = 0) -> Any:
        offset = torch.as_tensor(p.offset)
        if mask is None:
            found = p.flat[offset]
        else:
            inside = mask.t.expand(offset.shape)
            found = torch.where(inside, p.flat[torch.where(inside, offset, 0)], torch.tensor(other, dtype=p.flat.dtype))
        return self._reduced(found)

    def store(self, p: Pointer, value: Any, mask: Value | None = None) -> None:
        offset, value = torch.broadcast_tensors(torch.as_tensor(p.offset), torch.as_tensor(raw(value)).to(p.flat.dtype))
        inside = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.t.expand(offset.shape)
        p.flat[offset[inside]] = value[inside]

    def atomic_add(self, p: Pointer, value: int, sem: str = "acq_rel") -> Integer:
        with lock:
            found = Integer(p.flat[p.offset])
            p.flat[p.offset] += value
        return found

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        if dtype == torch.int64:
            return Shared([[Barrier()] for _ in range(shape[0])])
        return Shared(torch.full(tuple(shape), torch.nan if dtype.is_floating_point else -(1 << 30), dtype=dtype))

    def warp_specialize(self, parts: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
        failures: list[str] = []

        def work(function: Any, arguments: Sequence[Any]) -> None:
            try:
                plain(function)(*arguments)
                assert not _queue.__dict__.get("products"), "products that nobody waited for"
                assert not _queue.__dict__.get("stores"), "copies from shared memory that nobody waited for"
            # a thread has nobody to raise to: whatever it is ends the test
            except BaseException:
                failures.append(traceback.format_exc())

        threads = [threading.Thread(target=work, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * LIMIT)
        assert not failures, "\n".join(failures)
        assert not any(thread.is_alive() for thread in threads), "a partition did not end"


def plain(function: Any) -> Any:
    """The Python function of a kernel."""
    return getattr(function, "fn", function)


class Launched:
    """A kernel that runs here when it is launched, each program after the last.

    modules: where names that the kernel uses stand; replace: what some of them mean here. delay: see above.
    """

    def __init__(
        self, kernel: Any, modules: Sequence[ModuleType], replace: dict[str, Any], *, delay: float = 0.0
    ) -> None:
        self.kernel, self.modules, self.delay = kernel, modules, delay
        self.replace = {
            "mbarrier": FakeBarriers, "tma": FakeCopies(self), "warpgroup_mma": _product,
            "warpgroup_mma_init": lambda x: x, "warpgroup_mma_wait": _product_wait, "fence_async_shared": lambda: None,
            **replace,
        }  # fmt: skip

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launch(grid[0], arguments, options)

    def launch(self, programs: int, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        names = self.kernel.arg_names
        given = [_argument(x) for x in arguments] + [options[name] for name in names[len(arguments) :]]
        saved = [dict(module.__dict__) for module in self.modules]
        try:
            for module, before in zip(self.modules, saved, strict=True):
                functions = {name: plain(x) for name, x in before.items() if type(x).__name__ == "GluonJITFunction"}
                module.__dict__.update(functions | self.replace)
            for program in range(programs):
                for module in self.modules:
                    module.__dict__["gl"] = FakeGluon(program, programs)
                plain(self.kernel)(*given)
        finally:
            for module, before in zip(self.modules, saved, strict=True):
                module.__dict__.clear()
                module.__dict__.update(before)


def _argument(x: Any) -> Any:
    """What a kernel gets for an argument of a launch."""
    if isinstance(x, Tensor):
        return Pointer(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x.base, x.shape, x.strides, x.block_shape)
    return Integer(x) if type(x) is int else x
