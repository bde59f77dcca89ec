import pytest
import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.kernels import check


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def bounds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_good_inputs_pass() -> None:
    check.inputs(ones(2, 3, 4, 16), ones(2, 5, 2, 16), ones(2, 5, 2, 16))
    check.inputs(ones(1, 5, 4, 256), ones(1, 5, 1, 256), ones(1, 5, 1, 256), bounds(0, 0, 4, 4, 5))


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (ones(3, 4, 16), ones(2, 5, 2, 16), ones(2, 5, 2, 16), "q must have four dimensions"),
        (ones(2, 3, 4, 16), ones(2, 5, 2, 16), ones(2, 5, 16), "v must have four dimensions"),
        (ones(2, 0, 4, 16), ones(2, 5, 2, 16), ones(2, 5, 2, 16), "q must have four dimensions, none empty"),
        (ones(2, 3, 4, 16, dtype=torch.int64), ones(2, 5, 2, 16), ones(2, 5, 2, 16), "q must be floating"),
        (ones(2, 3, 4, 16), ones(2, 5, 2, 16, dtype=torch.float64), ones(2, 5, 2, 16), "k must be floating"),
        (ones(2, 3, 4, 16), ones(2, 5, 2, 16), ones(2, 5, 2, 16, dtype=torch.float16), "v must be floating"),
        (ones(2, 3, 4, 16), ones(2, 5, 2, 16).to("meta"), ones(2, 5, 2, 16), "k must be on the device of q, cpu"),
        (ones(2, 3, 4, 16), ones(2, 5, 2, 16), ones(2, 4, 2, 16), "v must have the shape of k"),
        (ones(2, 3, 4, 16), ones(3, 5, 2, 16), ones(3, 5, 2, 16), "k must have the batch and head size"),
        (ones(2, 3, 4, 16), ones(2, 5, 2, 8), ones(2, 5, 2, 8), "k must have the batch and head size"),
        (ones(2, 3, 4, 16), ones(2, 5, 3, 16), ones(2, 5, 3, 16), "k has 3 heads"),
        (ones(2, 6, 4, 16), ones(2, 5, 2, 16), ones(2, 5, 2, 16), "q has 6 positions"),
        (ones(2, 3, 4, 257), ones(2, 5, 2, 257), ones(2, 5, 2, 257), "at most 256; it is 257"),
    ],
)
def test_bad_tensors_are_named(q: Tensor, k: Tensor, v: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check.inputs(q, k, v)


@pytest.mark.parametrize(
    ("batch", "t", "cu_seqlens", "message"),
    [
        (1, 5, bounds(0, 5).long(), "cu_seqlens must be int32"),
        (1, 5, bounds(0, 5)[None], "cu_seqlens must be int32 of shape"),
        (1, 5, bounds(0), "cu_seqlens must be int32 of shape"),
        (1, 5, bounds(0, 5).to("meta"), "cu_seqlens must be on the device of q"),
        (2, 5, bounds(0, 5), "B must be 1"),
        (1, 4, bounds(0, 4), "S equal T"),
        (1, 5, bounds(1, 5), "cu_seqlens must go from 0 to T = 5; it goes from 1 to 5"),
        (1, 5, bounds(0, 4), "cu_seqlens must go from 0 to T = 5; it goes from 0 to 4"),
        (1, 5, bounds(0, 4, 3, 5), "cu_seqlens must not fall"),
    ],
)
def test_bad_bounds_are_named(batch: int, t: int, cu_seqlens: Tensor, message: str) -> None:
    kv = ones(batch, 5, 2, 16)
    with pytest.raises(InputError, match=message):
        check.inputs(ones(batch, t, 4, 16), kv, kv, cu_seqlens)


def test_bounds_elsewhere_are_not_read() -> None:
    # a tensor on the meta device has no values: reading one would raise
    kv = ones(1, 5, 2, 16).to("meta")
    check.inputs(kv, kv, kv, bounds(3, 1).to("meta"))
