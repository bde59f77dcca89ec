from typing import Any

import pytest
import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.kernels import forgetting, softmax

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((2, 2, 2, 2, 2, 16), None),
    ((2, 17, 17, 6, 3, 32), None),
    ((1, 63, 63, 4, 1, 80), None),
    ((1, 200, 200, 4, 2, 50), None),
    ((1, 65, 200, 4, 1, 64), None),
    ((1, 1, 65, 4, 2, 32), None),
    ((1, 200, 200, 4, 2, 16), (0, 0, 17, 18, 18, 83, 200, 200)),
    # no room for a dimension more
    ((2, 90, 90, 2, 1, 256), None),
    ((1, 90, 90, 2, 2, 256), (0, 17, 18, 18, 90)),
]


@pytest.mark.parametrize(("shape", "values"), SHAPES, ids=str)
def test_output_and_gradients_are_the_references(
    shape: tuple[int, ...], values: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "CHUNK", 64)
    torch.manual_seed(0)
    b, t, s, h, g, d = shape
    bounds = None if values is None else torch.tensor(values, dtype=torch.int32)
    leaves = [torch.randn(x, dtype=torch.float64) for x in [(b, t, h, d), (b, s, g, d), (b, s, g, d), (b, s, h)]]
    weight = torch.randn(b, t, h, d, dtype=torch.float64)

    def results(run: Any) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in leaves]
        out = run(given, scale=0.3, cu_seqlens=bounds)
        return [out, *torch.autograd.grad(out, given, weight)]

    ours = results(lambda x, **kw: forgetting.attention(x[0], x[1], x[2], torch.nn.functional.logsigmoid(x[3]), **kw))
    expected = results(
        lambda x, **kw: forgetting.reference(x[0], x[1], x[2], torch.nn.functional.logsigmoid(x[3]), **kw)
    )
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.filterwarnings("default")  # compiling for a GPU warns of what torch does inside itself
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_gates_of_a_packed_row_gather_no_errors_of_later_sequences(device: str) -> None:
    # in bfloat16; alone, a sequence's gates have the errors of their own positions only
    count, length = 16, 128
    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(count, length, 2, 32).bfloat16().to(device) for _ in range(4))
    gates = torch.randn(count, length, 2, device=device)

    def gradient(function: Any, rows: int, dtype: torch.dtype, bounds: Tensor | None = None) -> Tensor:
        shaped = [x.reshape(rows, -1, *x.shape[2:]).to(dtype) for x in (q, k, v, weight)]
        leaf = gates.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        log_f = torch.nn.functional.logsigmoid(leaf).reshape(rows, -1, 2)
        out = function(*shaped[:3], log_f, scale=32**-0.5, cu_seqlens=bounds)
        return torch.autograd.grad(out, leaf, shaped[3])[0].double()

    exact = gradient(forgetting.reference, count, torch.float64)
    bounds = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
    alone, packed = (
        (gradient(forgetting.attention, rows, torch.bfloat16, cu) - exact).square().mean().sqrt() / exact.std()
        for rows, cu in ((count, None), (1, bounds))
    )
    assert alone < 0.03 and packed < 1.25 * alone


def test_bad_options_and_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="theta must be positive and finite"):
        forgetting.Options(theta=0.0)
    x = torch.zeros(1, 3, 2, 8)
    with pytest.raises(InputError, match=r"log_f must be of shape \(1, 3, 2\)"):
        forgetting.attention(x, x, x, torch.zeros(1, 3, 1))
