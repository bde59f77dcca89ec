"""Epochs: how often training repeats a text, and whether a model overfits it.

Up to four epochs, repeated text is nearly as good as new text; the gain of further epochs fades to nothing
(Muennighoff et al. 2023, arXiv 2305.16264). A model that memorises its text has a held-out loss that rises again while
its training loss falls.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sbeval.tables.rows import Method, spec_of

if TYPE_CHECKING:
    import pandas as pd

# epochs of a preset at most
MAX_EPOCHS = 4.0
# nats/token by which the held-out loss of a model that overfits ends above its lowest: 5 % in perplexity. The text is
# the same at every validation step: in the preset quick, where that is 1,792 tokens, it rose by 0.025 at most from one
# step to the next, early, and fell to the end; of a model that had memorised 83,000 tokens it was 2.6 above its lowest
RISE = 0.05
# the status of such a model's rows
OVERFIT = "overfit"

# held-out losses: (step, nats/token)
Looks = Sequence[tuple[int, float]]


def overfits(held_out: Looks) -> bool:
    """Return whether the held-out loss ends more than RISE above its lowest."""
    losses = [loss for _, loss in held_out]
    return bool(losses) and losses[-1] - min(losses) > RISE


def looks_without_progress(held_out: Looks) -> int:
    """Return the number of validation steps since the one with the lowest loss."""
    losses = [loss for _, loss in held_out]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def notice(corpus: str, unique: int, requested: int, trained: int) -> list[str]:
    """Return notices on the tokens requested and those trained on, `unique` being one epoch; often empty."""
    if not unique:
        return []
    what = f"{requested:,} training tokens are {requested / unique:.3g} epochs of {corpus!r}, which has {unique:,}"
    if trained < requested:
        return [
            f"{what}: training ends after {trained / unique:.3g} epochs, {trained:,} tokens, for more of the same text "
            "teaches little (arXiv 2305.16264); another --corpus has more, --train-tokens or --max-epochs goes on"
        ]
    if requested <= MAX_EPOCHS * unique:
        return []
    return [
        f"{what}: past {MAX_EPOCHS:g} epochs the same text teaches little and models learn it by heart "
        "(arXiv 2305.16264); another --corpus has more"
    ]


def overfit(rows: "pd.DataFrame") -> "pd.Series[bool]":
    """Return which rows of a result table are of models that overfit; none where an older table lacks `status`."""
    import pandas as pd

    return rows["status"] == OVERFIT if "status" in rows else pd.Series(False, index=rows.index)


def caution(rows: "pd.DataFrame", name: Callable[[Method], str] | None = None) -> str:
    """Return sentences that name the models of these rows that overfit or trained for too many epochs; often empty.

    name: writes a method, (attention, options).
    """
    import pandas as pd

    name = name or (lambda method: spec_of(*method))
    sentences = []
    if methods := _methods(rows[overfit(rows)]):
        names = ", ".join(name(method) for method in methods)
        sentences.append(f"Overfit (held-out loss ended over {RISE} nats/token above its lowest): {names}.")
    if "epochs" in rows and (often := _methods(rows[pd.to_numeric(rows["epochs"]) > MAX_EPOCHS])):
        counts = ", ".join(f"{name(method)} {epochs:.3g}" for method, epochs in often.items())
        sentences.append(f"Trained for more than {MAX_EPOCHS:g} epochs of the text: {counts}.")
    return " ".join(sentences)


def _methods(rows: "pd.DataFrame") -> dict[Method, float]:
    """Return the methods of rows, with the most epochs of each."""
    import pandas as pd

    most = rows.assign(epochs=pd.to_numeric(rows["epochs"]) if "epochs" in rows else math.nan)
    highest = most.groupby(["attention", "options"])["epochs"].max().reset_index()
    return {(str(name), str(options)): float(epochs) for name, options, epochs in highest.to_numpy()}
