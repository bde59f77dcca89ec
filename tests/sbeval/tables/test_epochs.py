"""When a model overfits, the warnings about it, and that each committed result of too many epochs has one."""

from pathlib import Path

import pandas as pd
import pytest

from sbeval.tables import epochs, table

RESULTS = Path(__file__).parents[3] / "results"
OF_TEXT = ("length_gen", "needle", "few_shot")


def looks(*losses: float) -> list[tuple[int, float]]:
    return [(10 * (place + 1), loss) for place, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "overfits", "waited"),
    [
        ((), False, 0),
        ((4.0,), False, 0),
        ((4.0, 3.5, 3.0), False, 0),
        ((4.0, 3.0, 3.04), False, 1),
        ((4.0, 3.0, 3.06), True, 1),
        # it rose on the way and fell again
        ((3.0, 3.5, 2.9), False, 0),
        ((3.0, 2.0, 2.5, 2.4), True, 2),
        # the first of equal ones is the last that was new
        ((3.0, 2.0, 2.0), False, 1),
    ],
)
def test_a_model_overfits_whose_held_out_loss_ends_above_its_lowest(
    losses: tuple[float, ...], overfits: bool, waited: int
) -> None:
    assert epochs.overfits(looks(*losses)) is overfits
    assert epochs.looks_without_progress(looks(*losses)) == waited


def test_what_is_said_of_tokens_and_epochs() -> None:
    assert epochs.notice("books", 1000, 4000, 4000) == []
    assert epochs.notice("books", 1000, 10, 10) == []
    # what has no window is said when it is to be trained on
    assert epochs.notice("books", 0, 10, 1) == []
    (cut,) = epochs.notice("stdlib", 2_700_000, 104_857_600, 10_747_904)
    assert cut.startswith(
        "104,857,600 training tokens are 38.8 epochs of 'stdlib', which has 2,700,000: training ends "
    )
    assert "after 3.98 epochs, 10,747,904 tokens" in cut and "another --corpus has more" in cut
    (warning,) = epochs.notice("stdlib", 1000, 4001, 4001)
    assert "4,001 training tokens are 4 epochs" in warning and "past 4 epochs" in warning and "--corpus" in warning
    assert not any("\n" in line for line in (cut, warning))


def test_a_caution_names_the_methods() -> None:
    rows = pd.DataFrame(
        [("rope", "", "overfit", 39.0), ("rope", "", "", 1.0), ("alibi", "slope=1", "", 4.2), ("nope", "", "", 4.0)],
        columns=["attention", "options", "status", "epochs"],
    )
    assert epochs.overfit(rows).tolist() == [True, False, False, False]
    assert epochs.caution(rows) == (
        "Overfit (held-out loss ended over 0.05 nats/token above its lowest): rope. "
        "Trained for more than 4 epochs of the text: alibi:slope=1 4.2, rope 39."
    )
    assert "lowest): RoPE." in epochs.caution(rows, {("rope", ""): "RoPE", ("alibi", "slope=1"): "ALiBi"}.__getitem__)
    assert epochs.caution(rows[3:]) == ""


def test_tables_from_before_have_nothing_to_say() -> None:
    rows = pd.DataFrame([("rope", "")], columns=["attention", "options"])
    assert not epochs.overfit(rows).any() and epochs.caution(rows) == ""
    assert epochs.caution(rows.assign(epochs="", status="")) == ""


@pytest.mark.parametrize("path", [path for name in OF_TEXT for path in sorted(RESULTS.rglob(f"{name}.csv"))], ids=str)
def test_committed_rows_of_models_of_text_say_their_epochs(path: Path) -> None:
    rows = table.read(path, ["unique_tokens", "epochs"])
    trained = rows[rows["train_tokens"] > 0]
    # whole windows of an epoch
    assert (trained["unique_tokens"] % trained["train_len"] == 0).all()
    assert (trained["epochs"] - trained["train_tokens"] / trained["unique_tokens"]).abs().max() < 1e-4
    assert epochs.caution(rows) == ""
