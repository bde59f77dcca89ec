"""Loss by position against plain log-softmax in double precision, and what follows from it against its formulas."""

import copy
import itertools
import math
import statistics

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sbeval.evaluation import perplexity
from sbeval.evaluation.perplexity import Execution, PositionLosses, bins, lengths, measure, window_losses
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.tables.statistics import Estimate, Floats
from sbeval.tasks import length_gen_rows

VOCABULARY = 40
CPU = torch.device("cpu")
HOW = Execution(place=CPU, dtype="float32")


def build(m_width: float = 1.0) -> Decoder:
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=VOCABULARY, width=32, layers=2, heads=4, hidden=48, attention="rope", init_std=0.3, m_width=m_width
    )
    return Decoder(shape).eval()


def draw(*size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCABULARY, size)


def exact(model: Decoder, windows: Tensor) -> Tensor:
    """Losses (N, n) in double precision throughout."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        chances = model.logits(model(windows[:, :-1])).log_softmax(-1)
    return -chances.gather(2, windows[:, 1:, None])[..., 0]


def random_losses(documents: int, positions: int) -> PositionLosses:
    """Losses that share something within a document, and documents whose tokens are of unequal size."""
    generator = np.random.default_rng(0)
    losses = generator.gamma(4.0, 0.5, (documents, positions)) + generator.normal(0, 0.2, (documents, 1))
    size = generator.integers(1, 9, (documents, positions)) + generator.integers(0, 5, (documents, 1))
    return PositionLosses(losses, np.cumsum(size, 1).astype(np.float64))


def known(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate


def without(losses: PositionLosses, document: int) -> PositionLosses:
    return PositionLosses(np.delete(losses.losses, document, 0), np.delete(losses.bytes, document, 0))


def one_each(tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    return np.ones_like(tokens)


@pytest.mark.parametrize("m_width", [1.0, 4.0])
def test_losses_are_log_softmax(m_width: float) -> None:
    model, windows = build(m_width), torch.from_numpy(draw(3, 26))
    found = window_losses(model, windows, "float32")
    assert found.shape == (3, 25)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(model, windows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 7, 26, 75, 100])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = build(), torch.from_numpy(draw(3, 26))
    whole = window_losses(model, windows, "float32")
    sizes: list[int] = []
    monkeypatch.setattr(perplexity, "CHUNK", chunk)
    model.head.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[1]))
    torch.testing.assert_close(window_losses(model, windows, "float32"), whole)
    # the chunk is of all rows together
    assert max(sizes) == max(1, min(chunk // 3, 25)) and sum(sizes) == 25


def test_half_precision_stops_before_the_softmax() -> None:
    model, windows = build(), torch.from_numpy(draw(3, 26))
    found = window_losses(model, windows, "bfloat16")
    assert found.dtype == torch.float32
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(model(windows[:, :-1]))
    assert logits.dtype == torch.bfloat16
    wanted = -logits.double().log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    # nor does a model whose weights are in half precision
    found = window_losses(model.bfloat16(), windows, "float32")
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_batches_do_not_show(batch: int) -> None:
    model = build()
    windows = [(index, row) for index, row in enumerate(draw(5, 17))]
    done: list[int] = []
    found = measure(model, windows, one_each, Execution(place=CPU, dtype="float32", batch=batch, advance=done.append))
    wanted = exact(model, torch.from_numpy(draw(5, 17)))
    np.testing.assert_allclose(found.losses, wanted.numpy(), atol=2e-5)
    assert found.losses.dtype == np.float64
    assert found.length == 16
    assert sum(done) == 5 and max(done) == min(batch, 5)


def test_windows_of_a_document_are_averaged_first() -> None:
    model, rows = build(), draw(4, 9)
    chosen = [(7, rows[0]), (2, rows[1]), (7, rows[2]), (5, rows[3])]

    def size(tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        return tokens + 1

    found = measure(model, chosen, size, HOW)
    losses = exact(model, torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found.losses, [(losses[0] + losses[2]) / 2, losses[1], losses[3]], atol=2e-5)
    # the first token of a window is not scored: its bytes do not count
    total = np.cumsum(rows[:, 1:] + 1, 1)
    np.testing.assert_array_equal(found.bytes, [(total[0] + total[2]) / 2, total[1], total[3]])
    assert known(found.perplexity(8)).n == 3


@pytest.mark.parametrize(("context", "batch"), [(5, 1), (5, 3), (8, 4), (16, 2)])
def test_fixed_targets_are_the_same_tokens_after_any_context(context: int, batch: int) -> None:
    model, rows = build(), draw(4, 17)
    windows = [(3, rows[0]), (1, rows[1]), (3, rows[2]), (0, rows[3])]
    done: list[int] = []
    how = Execution(place=CPU, dtype="float32", batch=batch, advance=done.append)
    found = perplexity.fixed_targets(model, windows, how, targets=5, context=context)
    # by hand, a target at a time: its context begins `context` tokens before the last target
    losses = np.zeros((4, 5))
    for row, target in itertools.product(range(4), range(5)):
        end = 16 - 4 + target
        losses[row, target] = exact(model, torch.from_numpy(rows[row : row + 1, 16 - context : end + 1]))[0, -1]
    np.testing.assert_allclose(found, [(losses[0] + losses[2]) / 2, losses[1], losses[3]], atol=2e-5)
    assert sum(done) == 4 and max(done) == batch


def test_the_text_further_back_can_be_another_document_s() -> None:
    model, rows = build(), draw(4, 17)
    # the next other document of the last window is that of the second: the first is of its own
    windows = [(3, rows[0]), (1, rows[1]), (1, rows[2]), (3, rows[3])]
    found = perplexity.fixed_targets(model, windows, HOW, targets=5, context=12, own=7)
    losses = np.zeros((4, 5))
    for row, other in enumerate([1, 3, 3, 1]):
        mixed = np.concatenate([rows[other, 4:9], rows[row, 9:]])
        losses[row] = exact(model, torch.from_numpy(mixed[None]))[0, -5:]
    np.testing.assert_allclose(found, [(losses[0] + losses[3]) / 2, (losses[1] + losses[2]) / 2], atol=2e-5)
    # nothing is further back than that
    plain, same = (perplexity.fixed_targets(model, windows, HOW, targets=5, context=7, own=own) for own in (None, 7))
    np.testing.assert_array_equal(plain, same)
    with pytest.raises(ValueError, match="one document"):
        perplexity.fixed_targets(model, windows[:1], HOW, targets=5, context=12, own=7)
    # the first target would be the other document's
    with pytest.raises(ValueError, match="5 targets"):
        perplexity.fixed_targets(model, windows, HOW, targets=5, context=12, own=4)


def test_fixed_targets_of_whole_windows_are_the_last_positions() -> None:
    model, windows = build(), [(index, row) for index, row in enumerate(draw(3, 17))]
    whole = measure(model, windows, one_each, HOW)
    found = perplexity.fixed_targets(model, windows, HOW, targets=6, context=16)
    np.testing.assert_allclose(found, whole.losses[:, -6:], atol=1e-6)


def test_a_window_that_cannot_see_far_has_the_same_loss_with_more_context() -> None:
    """The control: its perplexity falls along a text that gets easier, and its loss on fixed targets does not."""
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=VOCABULARY, width=32, layers=2, heads=4, hidden=48, attention="sliding_window:window=4", init_std=0.3
    )
    windows = [(index, row) for index, row in enumerate(draw(3, 33))]

    def losses(model: Decoder, context: int) -> Floats:
        return perplexity.fixed_targets(model, windows, HOW, targets=4, context=context)

    # two layers see 3 tokens before the query each
    near, far = Decoder(shape).eval(), build()
    np.testing.assert_allclose(losses(near, 4 + 6), losses(near, 32), atol=2e-5)
    assert np.abs(losses(near, 4) - losses(near, 32)).max() > 0.01
    assert np.abs(losses(far, 4 + 6) - losses(far, 32)).max() > 0.01


@pytest.mark.parametrize("per_octave", [1, 4, 50])
def test_bins_cover_every_position_once(per_octave: int) -> None:
    for length in [*range(1, 200), 1000, 1023, 4096, 65536]:
        found = bins(length, per_octave)
        assert [position for first, last in found for position in range(first, last + 1)] == list(range(1, length + 1))
        assert all(last / (first - 1) < 2.0 ** (1 / per_octave) * 1.1 for first, last in found if first > 64)


def test_bins_are_even_on_a_log_scale() -> None:
    assert bins(1) == [(1, 1)]
    assert bins(16, 1) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    assert [last for _, last in bins(4096, 2)[-5:]] == [1024, 1448, 2048, 2896, 4096]


def test_lengths_are_octaves_of_the_training_length() -> None:
    assert lengths(256, 4096) == [32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert lengths(256, 5000) == [32, 64, 128, 256, 512, 1024, 2048, 4096, 5000]
    assert lengths(96, 96) == [12, 24, 48, 96]
    assert lengths(2, 9) == [1, 2, 4, 8, 9]
    for train_len, octave in itertools.product((3, 100, 2047, 3000), range(12)):
        assert lengths(train_len, train_len << octave)[-1] == train_len << octave


def test_figures_are_those_of_the_formulas() -> None:
    found = random_losses(6, 40)
    for length in (1, 13, 40):
        by_document = [statistics.fmean(row[:length]) for row in found.losses.tolist()]
        loss, error = statistics.fmean(by_document), statistics.stdev(by_document) / math.sqrt(6)
        assert known(found.perplexity(length)).value == pytest.approx(math.exp(loss))
        assert known(found.perplexity(length)).stderr == pytest.approx(math.exp(loss) * error)
        bits = sum(sum(row[:length]) for row in found.losses.tolist()) / math.log(2)
        assert known(found.bits_per_byte(length)).value == pytest.approx(bits / found.bytes[:, length - 1].sum())
        assert known(found.perplexity(length)).n == known(found.bits_per_byte(length)).n == 6
    part = found.mean(5, 9)
    assert part.value == pytest.approx(statistics.fmean(x for row in found.losses.tolist() for x in row[4:9]))
    assert part.stderr == pytest.approx(statistics.stdev(map(statistics.fmean, found.losses[:, 4:9])) / math.sqrt(6))


@pytest.mark.parametrize("name", ["perplexity", "bits_per_byte"])
def test_errors_are_those_of_leaving_documents_out(name: str) -> None:
    documents = 300
    found = random_losses(documents, 20)

    def figure(losses: PositionLosses) -> float:
        return float(getattr(losses, name)(20).value)

    left_out = [figure(without(found, document)) for document in range(documents)]
    error = math.sqrt((documents - 1) * statistics.pvariance(left_out))
    assert getattr(found, name)(20).stderr == pytest.approx(error, rel=0.01)


def test_errors_are_those_of_drawing_documents_again() -> None:
    found = random_losses(300, 20)
    generator = np.random.default_rng(1)
    again = [PositionLosses(found.losses[rows], found.bytes[rows]) for rows in generator.integers(0, 300, (1500, 300))]
    drawn = statistics.stdev(known(losses.perplexity(20)).value for losses in again)
    assert known(found.perplexity(20)).stderr == pytest.approx(drawn, rel=0.08)
    drawn = statistics.stdev(known(losses.bits_per_byte(20)).value for losses in again)
    assert known(found.bits_per_byte(20)).stderr == pytest.approx(drawn, rel=0.08)
    # tokens of a document go together: as if each were drawn for itself, the error would be too small
    assert found.losses.std() / math.sqrt(300 * 20) < 0.8 * (found.mean(1, 20).stderr or 0.0)


def test_one_document_has_no_errors() -> None:
    found = random_losses(1, 20)
    for estimate in map(known, (found.perplexity(20), found.bits_per_byte(20), found.mean(3, 7))):
        assert estimate.stderr is None
        assert estimate.n == 1


def test_rolling_likelihood_of_a_document() -> None:
    """As lm-eval has it: disjoint windows, each conditioned on the token before it, the first on a separator."""
    model, window = build().double(), 8
    document = draw(1 + 5 * window)
    starts = range(0, 5 * window, window)
    found = measure(model, [(0, document[start : start + window + 1]) for start in starts], one_each, HOW)
    total = 0.0
    with torch.no_grad():
        for position in range(1, len(document)):
            start = (position - 1) // window * window
            context = torch.from_numpy(document[start:position])[None]
            logits = model.logits(model(context))[0, -1]
            total += (logits[document[position]] - logits.exp().sum().log()).item()
    tokens = len(document) - 1
    assert -found.losses.sum() * len(starts) == pytest.approx(total, rel=1e-6)
    assert known(found.perplexity(window)).value == pytest.approx(math.exp(-total / tokens), rel=1e-6)
    assert known(found.bits_per_byte(window)).value == pytest.approx(-total / tokens / math.log(2), rel=1e-6)


def table_of(losses: PositionLosses, train_len: int) -> dict[tuple[str, int | None, int | None], length_gen_rows.Row]:
    """Rows by metric, first position and context length, each once."""
    found = length_gen_rows.rows(losses, train_len)
    table = {(row.metric, row.position_start, row.context_length): row for row in found}
    assert len(table) == len(found)
    return table


def test_rows_of_the_length_family() -> None:
    losses = random_losses(5, 100)
    table = table_of(losses, 16)
    by_position = [row for row in table.values() if row.metric == "loss"]
    covered: list[int] = []
    for row in by_position:
        assert row.position_start is not None and row.position_end is not None
        covered += range(row.position_start, row.position_end)
        part: Floats = losses.losses[:, row.position_start - 1 : row.position_end - 1]
        assert row.value == pytest.approx(part.mean())
        assert (row.unit, row.n, row.context_length, row.last_k) == ("nats/token", 5, None, None)
    assert covered == list(range(1, 101))
    contexts = [2, 4, 8, 16, 32, 64, 100]
    for metric, unit, reported in (
        ("perplexity", "1", contexts),
        ("bits_per_byte", "bits/byte", contexts),
        ("loss_last_k", "nats/token", contexts[1:]),
    ):
        rows = [row for row in table.values() if row.metric == metric]
        assert [row.context_length for row in rows] == reported
        assert {(row.unit, row.n, row.position_start, row.position_end) for row in rows} == {(unit, 5, None, None)}
        assert all(row.stderr is not None for row in rows)
    for length in contexts:
        assert table["perplexity", None, length].value == pytest.approx(math.exp(losses.losses[:, :length].mean()))
        if length >= 4:
            last = table["loss_last_k", None, length]
            assert last.value == pytest.approx(losses.losses[:, length - 4 : length].mean())
            assert last.last_k == 4


def test_rows_of_one_document_have_no_errors() -> None:
    assert all(row.stderr is None and row.n == 1 for row in length_gen_rows.rows(random_losses(1, 30), 8))


def test_rows_past_a_very_short_training_length() -> None:
    table = table_of(random_losses(4, 9), 2)
    assert [context for metric, _, context in table if metric == "loss_last_k"] == [1, 2, 4, 8, 9]
    assert all(row.last_k == 1 for row in table.values() if row.metric == "loss_last_k")
