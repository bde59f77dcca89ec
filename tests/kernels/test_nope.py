import torch

from sbeval.kernels import nope


def test_order_of_the_past_does_not_matter() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 1, 4, 16, dtype=torch.float64)
    k, v = (torch.randn(2, 33, 2, 16, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(33)
    torch.testing.assert_close(nope.attention(q, k[:, order], v[:, order]), nope.attention(q, k, v))
