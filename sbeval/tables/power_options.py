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
        (),
        EVALUATION,
        "Difference to find. Default: 0.02 (what the paper reports of stick-breaking and RoPE), 0.03 and 0.05 nats per "
        "token; in the score of a benchmark 0.01, 0.02 and 0.05.",
        flag="--difference",
    )
    benchmark: str = option(
        "", EVALUATION, "Benchmark of few-shot in whose score to find it, instead of perplexity.", metavar="TASK"
    )
    documents: tuple[int, ...] = option(
        (), EVALUATION, "Documents or items to evaluate. Default: as many as the results have, and four times as many."
    )
    power: float = option(0.8, EVALUATION, "Probability of finding the difference.")
    alpha: float = option(0.05, EVALUATION, "Probability of finding one where there is none.")
    seed_sd: float | None = option(
        None, EVALUATION, "Standard deviation over seeds, in the unit of the difference. Default: that of the results."
    )
    document_sd: float | None = option(
        None,
        EVALUATION,
        "Standard deviation over documents or items of the difference of two methods. Default: that of the results.",
    )
    results_dir: Path = option(Path("results"), RUN, "Folder of tables, run files, checkpoints and figures.")

    @property
    def to_find(self) -> tuple[float, ...]:
        default = (0.01, 0.02, 0.05) if self.benchmark else (round(PUBLISHED, 3), 0.03, 0.05)
        return self.differences or default

    def __post_init__(self) -> None:
        for name in ("power", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} must be between 0 and 1; got {getattr(self, name):g}")
        for flag, given in (("--difference", self.differences), ("--documents", self.documents)):
            if wrong := [value for value in given if not 0 < value < math.inf]:
                raise InputError(f"{flag} must be above 0 and finite; got {wrong[0]:g}")
        for name in ("seed_sd", "document_sd"):
            if (given_sd := getattr(self, name)) is not None and not 0 <= given_sd < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be 0 or more and finite; got {given_sd:g}")
