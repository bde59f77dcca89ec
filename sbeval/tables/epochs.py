"""How often a text is read in training, and what that does to a model.

Up to four epochs, repeated text is nearly as good as new text; what more of them add fades, until there is nothing to
gain (Muennighoff et al. 2023, arXiv 2305.16264). A model that learns its text by heart shows it by a loss on held-out
text that rises again while that on training text falls.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


# passes over the training text that a preset makes at most
MAX_EPOCHS = 4.0
# nats a token by which the held-out loss of a model that overfits ends above its lowest: 5 % in perplexity. It is the
# same text at every look: in the preset quick, where that is 1,792 tokens, it rose by 0.025 at most from one look to
# the next, early, and fell to the end; of a model that had learnt 83,000 tokens by heart it was 2.6 above its lowest
RISE = 0.05
# the status of such a model's rows
OVERFIT = "overfit"

# looks at the held-out loss: (step, nats/token)
Looks = Sequence[tuple[int, float]]
Method = tuple[str, str]


def overfits(looks: Looks) -> bool:
    """Whether the held-out loss ends by more than RISE above its lowest."""
    losses = [loss for _, loss in looks]
    return bool(losses) and losses[-1] - min(losses) > RISE


def looks_without_progress(looks: Looks) -> int:
    """Looks since the one with the lowest loss."""
    losses = [loss for _, loss in looks]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def notice(corpus: str, unique: int, asked: int, trained: int) -> list[str]:
    """What to say of the tokens that are asked for and of those trained on, given those of an epoch; often nothing."""
    if not unique:
        return []
    what = f"{asked:,} training tokens are {asked / unique:.3g} epochs of {corpus!r}, which has {unique:,}"
    if trained < asked:
        return [
            f"{what}: training ends after {trained / unique:.3g} epochs, {trained:,} tokens, for more of the same text "
            "teaches little (arXiv 2305.16264); another --corpus has more, --train-tokens or --max-epochs goes on"
        ]
    if asked <= MAX_EPOCHS * unique:
        return []
    return [
        f"{what}: past {MAX_EPOCHS:g} epochs the same text teaches little and models learn it by heart "
        "(arXiv 2305.16264); another --corpus has more"
    ]


def overfit(rows: "pd.DataFrame") -> "pd.Series[bool]":
    """Which rows of a result table are of models that overfit; tables from before that was measured have none."""
    import pandas as pd

    return rows["status"] == OVERFIT if "status" in rows else pd.Series(False, index=rows.index)


def caution(rows: "pd.DataFrame", name: Callable[[Method], str] | None = None) -> str:
    """What a reader of these rows must know of their models' training, in sentences; empty when it is nothing.

    name: what the reader knows a method, (attention, options), as.
    """
    import pandas as pd

    name = name or (lambda method: ":".join(filter(None, method)))
    said = []
    if found := _methods(rows[overfit(rows)]):
        names = ", ".join(name(method) for method in found)
        said.append(f"Overfit (held-out loss ended over {RISE} nats/token above its lowest): {names}.")
    if "epochs" in rows and (often := _methods(rows[pd.to_numeric(rows["epochs"]) > MAX_EPOCHS])):
        counts = ", ".join(f"{name(method)} {epochs:.3g}" for method, epochs in often.items())
        said.append(f"Trained for more than {MAX_EPOCHS:g} epochs of the text: {counts}.")
    return " ".join(said)


def _methods(rows: "pd.DataFrame") -> dict[Method, float]:
    """The methods of rows, and the most epochs of each."""
    import pandas as pd

    most = rows.assign(epochs=pd.to_numeric(rows["epochs"]) if "epochs" in rows else math.nan)
    found = most.groupby(["attention", "options"])["epochs"].max().reset_index()
    return {(str(name), str(options)): float(epochs) for name, options, epochs in found.to_numpy()}
