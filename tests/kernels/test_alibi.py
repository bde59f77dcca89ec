import pytest
import torch
from torch import Tensor

from sbeval.kernels import alibi


@pytest.mark.parametrize(
    ("heads", "published"),
    [
        (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (16, [2 ** (-i / 2) for i in range(1, 17)]),
        # those of 8 heads, then the first, third, fifth and seventh of 16
        (12, [*(2.0**-i for i in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
        (1, [1 / 256]),
        (3, [1 / 16, 1 / 256, 1 / 4]),
    ],
)
def test_slopes_are_the_papers(heads: int, published: list[float]) -> None:
    expected = torch.tensor(published, dtype=torch.float64)
    torch.testing.assert_close(alibi.slopes(heads, dtype=torch.float64), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(alibi.slopes(heads), expected.float(), rtol=0, atol=0)


def test_weights_by_hand() -> None:
    # equal logits leave the penalty alone: weights fall by exp(-slope) a step; one-hot values read them off
    t, heads = 7, 4
    q = torch.zeros(1, t, heads, t, dtype=torch.float64)
    v = torch.eye(t, dtype=torch.float64)[None, :, None, :].expand(1, t, heads, t)
    weights = alibi.attention(q, q, v)[0, -1]
    distance = torch.arange(t - 1, -1, -1, dtype=torch.float64)
    for h, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
        expected = torch.exp(-slope * distance)
        torch.testing.assert_close(weights[h], expected / expected.sum())


def test_scale_leaves_the_penalty_alone() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 4, 16, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(alibi.attention(3 * q, k, v, scale=0.1), alibi.attention(q, k, v, scale=0.3))


def test_shift_invariance() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 4, 16, dtype=torch.float64) for _ in range(3))
    # keys too unlike any query to be seen push the rest 25 positions on
    far = torch.full((1, 25, 4, 16), -1e4, dtype=torch.float64)
    q = q.abs()

    def pushed(x: Tensor, front: Tensor) -> Tensor:
        return torch.cat((front, x), dim=1)

    shifted = alibi.attention(q, pushed(k, far), pushed(v, far))
    torch.testing.assert_close(shifted, alibi.attention(q, k, v))


def test_penalty_is_exact_far_away_in_low_precision() -> None:
    # in bfloat16 the distances 4095 and 4096 would round to one; the weights must not
    q = torch.ones(1, 1, 8, 16, dtype=torch.bfloat16)
    k = torch.zeros(1, 4097, 1, 16, dtype=torch.bfloat16)
    k[:, 2:] = -1e4
    v = torch.zeros_like(k)
    v[0, 0] = 1
    weight = alibi.attention(q, k, v)[0, 0, :, 0].float()
    expected = torch.sigmoid(-alibi.slopes(8))
    torch.testing.assert_close(weight, expected, atol=0, rtol=2**-6)
