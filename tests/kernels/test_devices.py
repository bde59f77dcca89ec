"""Kernels are launched on the device of their inputs, which need not be the current one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sbeval.kernels import (
    fire,
    fire_triton,
    hopper,
    stick_breaking,
    stick_breaking_decode,
    stick_breaking_triton,
)

ENTRIES: list[tuple[ModuleType, str, str]] = [
    (stick_breaking_triton, "forward", "triton"),
    (stick_breaking_decode, "decode", "triton"),
    (fire_triton, "forward", "triton"),
]
if not hopper.compiler_obstacle():
    from sbeval.kernels import stick_breaking_hopper

    ENTRIES.append((stick_breaking_hopper, "forward", "triton-hopper"))


class Launched(Exception):
    pass


def weights(device: str) -> fire.Weights:
    hidden = torch.linspace(-1.0, 1.0, 8, device=device)
    return torch.tensor(0.1, device=device), torch.tensor(1.0, device=device), hidden, hidden, hidden.expand(2, 8)


def attend(module: ModuleType, device: str = "cpu", backend: str | None = None) -> Tensor:
    q, k, v = torch.randn(3, 1, 70, 2, 16, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    if module is fire_triton:
        return fire.attention(q, k, v, weights(device), backend=backend)
    # one query is decoded
    return stick_breaking.attention(q[:, -1:] if module is stick_breaking_decode else q, k, v, backend=backend)[0]


@pytest.mark.parametrize(("module", "name", "backend"), ENTRIES)
def test_the_device_of_the_inputs_is_current(
    module: ModuleType, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x.device)
        yield
        current.pop()

    def launch(*_: object) -> None:
        assert current == [torch.device("cpu")]
        raise Launched

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(module, name, launch)
    for asked in (stick_breaking, fire):
        monkeypatch.setattr(asked, "pick_backend", lambda *_: backend)
    with pytest.raises(Launched):
        attend(module)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("module", [stick_breaking_triton, stick_breaking_decode, fire_triton])
def test_on_a_second_gpu_the_output_is_that_of_the_first(module: ModuleType) -> None:
    first, second = (attend(module, device).cpu() for device in ("cuda:0", "cuda:1"))
    assert torch.equal(first, second)
