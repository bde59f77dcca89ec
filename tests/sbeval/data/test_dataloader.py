"""Batches are the split's windows, each once an epoch, whatever was asked before; sequences end where they should."""

import numpy as np
import pytest
import torch

from sbeval.data.corpus import Split
from sbeval.data.dataloader import Batches, epoch_tokens
from sbeval.errors import InputError

EOS = 999


def split_of(*lengths: int) -> Split:
    """Documents of these lengths, whose tokens count on; each is closed by EOS."""
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint16)
    tokens[offsets[1:] - 1] = EOS
    return Split(corpus="x", role="train", tokens=tokens, offsets=offsets, documents=tuple(map(str, lengths)))


SPLIT = split_of(7, 1, 0, 20, 3, 11, 30, 4)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_an_epoch_is_every_window_once(packing: str) -> None:
    batches = Batches(SPLIT, length=5, batch=4, seed=0, packing=packing)
    # 84 tokens: 16 windows of 5 and a target, 3 tokens left
    assert batches.windows == 16
    for epoch in range(2):
        rows = torch.cat([batches[step].tokens for step in range(epoch * 4, epoch * 4 + 4)])
        assert rows.dtype == torch.int64
        expected = torch.from_numpy(SPLIT.tokens[:80].astype(np.int64)).view(16, 5)
        assert sorted(rows.tolist()) == sorted(expected.tolist())
        assert rows.tolist() != expected.tolist()


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_an_epoch_takes_as_many_tokens_however_sequences_are_packed(packing: str) -> None:
    batches = Batches(SPLIT, length=5, batch=16, seed=0, packing=packing)
    assert epoch_tokens(SPLIT, 5) == 80 == batches[0].tokens.numel()
    assert sorted(batches[0].tokens.tolist()) == sorted(batches[1].tokens.tolist())
    assert [epoch_tokens(split_of(*lengths), 5) for lengths in ((), (4,), (5,), (9,), (10,))] == [0, 0, 5, 5, 10]


def test_spread_windows_are_the_same_for_every_seed_and_of_even_distance() -> None:
    first, other = (Batches(SPLIT, 5, batch, seed, "documents").spread(4) for batch, seed in ((1, 0), (3, 7)))
    # of 16 windows the first, the sixth, the eleventh and the last
    assert first.tokens.tolist() == [SPLIT.tokens[start : start + 5].tolist() for start in (0, 25, 50, 75)]
    assert torch.equal(first.tokens, other.tokens) and torch.equal(first.targets, other.targets)
    assert first.cu_seqlens is not None and first.cu_seqlens.tolist()[-1] == 20
    for count in (1, 3, 15, 16, 17, 99):
        rows = Batches(SPLIT, 5, 1, 0, "stream").spread(count).tokens.tolist()
        assert len(rows) == len({tuple(row) for row in rows}) == min(count, 16)


def test_targets_are_one_further_on() -> None:
    batch = Batches(SPLIT, length=5, batch=16, seed=0, packing="stream")[0]
    assert batch.cu_seqlens is None
    assert batch.targets.dtype == torch.int64
    torch.testing.assert_close(batch.targets[:, :-1], batch.tokens[:, 1:])
    after = {tuple(row): int(target) for row, target in zip(batch.tokens.tolist(), batch.targets[:, -1], strict=True)}
    for start in range(0, 80, 5):
        assert after[tuple(SPLIT.tokens[start : start + 5].tolist())] == SPLIT.tokens[start + 5 :][0]


def test_documents_end_sequences() -> None:
    batch = Batches(SPLIT, length=5, batch=16, seed=0, packing="documents")[0]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.dtype == torch.int32
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    bounds = batch.cu_seqlens.tolist()
    assert bounds == sorted(set(bounds)), "no sequence is empty"
    # a sequence starts with each row and behind each end of a document, and nowhere else
    ends = {int(place) + 1 for place in torch.nonzero(tokens == EOS)}
    assert set(bounds) == ends | set(range(0, 81, 5))
    stream = Batches(SPLIT, length=5, batch=16, seed=0, packing="stream")[0]
    torch.testing.assert_close(batch.tokens, stream.tokens)
    torch.testing.assert_close(targets, stream.targets.flatten().where(tokens != EOS, -100))
    assert (targets == -100).sum() == 7


def test_a_document_that_starts_with_the_last_target() -> None:
    # a window whose last input closes a document, and one that is a document's inside
    split = split_of(3, 6)
    batch = Batches(split, length=4, batch=2, seed=0, packing="documents")[0]
    rows = {tuple(row): target for row, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)}
    assert rows == {(0, 1, 2, EOS): [1, 2, EOS, -100], (4, 5, 6, 7): [5, 6, 7, 8]}
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 4, 8]


def test_a_step_does_not_depend_on_others() -> None:
    def same(a: Batches, b: Batches, step: int) -> bool:
        return torch.equal(a[step].tokens, b[step].tokens) and torch.equal(a[step].targets, b[step].targets)

    walked, jumped, other = (Batches(SPLIT, 5, 3, seed, "documents") for seed in (4, 4, 5))
    for step in range(20):
        walked[step]
    # 16 windows in batches of 3: the sixth batch ends the first epoch and starts the second
    for step in (5, 17, 0, 5, 1000):
        assert same(walked, jumped, step)
    assert not all(same(walked, other, step) for step in range(5))
    # the epochs of one seed are not those of the next
    assert not torch.equal(Batches(SPLIT, 5, 16, 0, "stream")[1].tokens, Batches(SPLIT, 5, 16, 1, "stream")[0].tokens)


def test_more_rows_than_windows() -> None:
    batch = Batches(split_of(8), length=4, batch=5, seed=0, packing="stream")[0]
    assert batch.tokens.shape == (5, 4)
    counts = np.unique(batch.tokens[:, 0].numpy(), return_counts=True)[1]
    assert sorted(counts.tolist()) == [2, 3]


def test_too_short_a_split() -> None:
    assert Batches(split_of(9), length=9, batch=1, seed=0, packing="stream").windows == 1
    with pytest.raises(InputError, match=r"'x' \(train\) has 10 tokens, .* takes 11: use --train-len 9 or less"):
        Batches(split_of(9), length=10, batch=1, seed=0, packing="stream")


def test_arguments_that_will_not_do() -> None:
    with pytest.raises(InputError, match="unknown packing 'document'; did you mean 'documents'"):
        Batches(SPLIT, length=5, batch=1, seed=0, packing="document")
    for length, batch, seed in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(InputError, match=f"at least 0; got length={length} batch={batch} seed={seed}"):
            Batches(SPLIT, length=length, batch=batch, seed=seed, packing="stream")
    with pytest.raises(IndexError):
        Batches(SPLIT, length=5, batch=1, seed=0, packing="stream")[-1]
