"""Options of `sbeval power`. No heavy imports: `sbeval --help` reads them."""

import math
from dataclasses import dataclass
from pathlib import Path

from sbeval.config import EVALUATION, RUN, option
from sbeval.errors import InputError
from sbeval.tables.published import WIKITEXT

# tokens of this project's tokenizer in a word of text, by which the paper's perplexity per word becomes one a token
TOKENS_A_WORD = 1.49
PUBLISHED = math.log(WIKITEXT["rope"] / WIKITEXT["stick_breaking"]) / TOKENS_A_WORD


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What to find, and how surely."""

    differences: tuple[float, ...] = option(
        (round(PUBLISHED, 3), 0.03, 0.05),
        EVALUATION,
        "Difference to find, in nats per token (0.02: what the paper reports of stick-breaking and RoPE).",
        flag="--difference",
    )
    documents: tuple[int, ...] = option(
        (), EVALUATION, "Documents to evaluate. Default: as many as the results have, and four times as many."
    )
    power: float = option(0.8, EVALUATION, "Probability of finding the difference.")
    alpha: float = option(0.05, EVALUATION, "Probability of finding one where there is none.")
    seed_sd: float | None = option(
        None, EVALUATION, "Standard deviation over seeds, in nats per token. Default: that of the results."
    )
    document_sd: float | None = option(
        None,
        EVALUATION,
        "Standard deviation over documents of the difference of two methods. Default: that of the results' values.",
    )
    results_dir: Path = option(Path("results"), RUN, "Folder of tables, run files, checkpoints and figures.")

    def __post_init__(self) -> None:
        for name in ("power", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} must be between 0 and 1; got {getattr(self, name):g}")
        for flag, given in (("--difference", self.differences), ("--documents", self.documents)):
            if wrong := [value for value in given if value <= 0]:
                raise InputError(f"{flag} must be above 0; got {wrong[0]:g}")
        for name in ("seed_sd", "document_sd"):
            if (given_sd := getattr(self, name)) is not None and given_sd < 0:
                raise InputError(f"--{name.replace('_', '-')} must not be negative; got {given_sd:g}")
