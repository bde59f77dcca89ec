"""Length generalisation: train at one length, measure the loss at every position far past it.

The paper's figure 5 (Tan et al., ICLR 2025, arXiv 2410.17980) asks whether a model trained on windows of `train_len`
tokens still predicts well with `eval_len` tokens of context. Every method trains on the same tokens in the same order.

    train    |--- train_len ---|                       loss on every token
    test     |--- train_len ---|------- eval_len ------|   loss at each position, over documents that long

Far text that does not help looks the same in these figures as far text that cannot be seen: perplexity falls along
documents for a window of 512 tokens too. Two controls tell a method from its text:

- `--fixed-targets 512`: the loss of the last 512 tokens of each window of eval_len tokens, the same tokens for every
  context length of 512, 1024, ... eval_len (metric `loss_fixed_targets`). A method that uses far text is better with
  more of it; a sliding window is not. Past the training length they are also measured with another document's text
  there (`loss_fixed_targets_unrelated`): is it the text that helps, or that there is more of it?
- `--window-octaves`: the paper's own metric, lm-eval's perplexity of whole documents in disjoint windows of train_len
  tokens, doubled up to eval_len (column `window`); of other texts too (`--eval-corpus wikitext`, column `eval_corpus`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sbeval.config import DATA, EVALUATION, LATER, option
from sbeval.errors import InputError, choose
from sbeval.registry import HELP
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family
from sbeval.tables import epochs
from sbeval.tables.rows import spec_of
from sbeval.tasks.length_gen_losses import Evaluation, long_windows, whole_texts
from sbeval.tasks.length_gen_rows import Row, joined
from sbeval.tasks.text_cell import TextCell, outcome
from sbeval.tasks.text_training import cautions, models, open_corpus
from sbeval.training import text_model
from sbeval.training.text_model import BOS, LM_EVAL, EvaluatedModel

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from sbeval.data.corpus import Corpus
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext

NAME = "length_gen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(EvaluatedModel):
    """A sweep of attention methods and seeds. Lengths and amounts are in tokens."""

    eval_len: int = option(4096, EVALUATION, "Tokens of context to evaluate up to.")
    documents: int = option(32, EVALUATION, "Test documents at most: the first that are long enough.")
    windows: int = option(1, EVALUATION, "Disjoint windows of each document at most.")
    window: tuple[int, ...] = option(
        (), EVALUATION, "Tokens of the disjoint windows of lm-eval's perplexity of whole documents.", LATER
    )
    window_octaves: bool = option(
        False, EVALUATION, "Windows of --train-len tokens, too, and of its doublings up to --eval-len.", LATER
    )
    eval_corpus: tuple[str, ...] = option(
        (), DATA, "Other text for --window: wikitext[:PATH], or as --corpus; all its documents.", LATER
    )
    fixed_targets: int = option(
        0,
        EVALUATION,
        "Last tokens of each window whose loss is measured by context, from as many to --eval-len.",
        LATER,
    )

    bos: str = option(
        "once",
        EVALUATION,
        f"BOS before a whole document: once, or {LM_EVAL}, twice where a tokenizer adds one itself.",
        LATER,
    )

    def __post_init__(self) -> None:
        # zero-argument super does not work in a class with slots
        EvaluatedModel.__post_init__(self)
        choose("bos", self.bos, BOS)
        for name in ("eval_len", "documents", "windows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if short := [length for length in self.window if length < 1]:
            raise InputError(f"--window must be at least 1; got {short[0]}")
        if self.eval_corpus and not self.rolling:
            raise InputError(
                f"--eval-corpus {self.eval_corpus[0]} is evaluated in windows: give their --window, or --window-octaves"
            )
        if self.window_octaves and self.eval_len < self.train_len:
            raise InputError(f"--window-octaves needs --eval-len {self.train_len} (--train-len) or more")
        if not 0 <= self.fixed_targets <= self.eval_len:
            raise InputError(f"--fixed-targets must be 0 to --eval-len {self.eval_len}; got {self.fixed_targets}")
        if self.trains and self.eval_len < self.train_len:
            raise InputError(
                f"--eval-len {self.eval_len} is shorter than --train-len {self.train_len}: nothing to generalise to; "
                f"give --eval-len {self.train_len} or more"
            )

    @property
    def rolling(self) -> tuple[int, ...]:
        """Tokens of the disjoint windows in which whole documents are evaluated."""
        octaves = range((self.eval_len // self.train_len).bit_length()) if self.window_octaves else ()
        return tuple(sorted({*self.window, *(self.train_len << octave for octave in octaves)}))

    @property
    def contexts(self) -> tuple[int, ...]:
        """Context lengths of the fixed targets, the last one that of whole windows; empty without targets."""
        if not self.fixed_targets:
            return ()
        octaves = range((self.eval_len // self.fixed_targets).bit_length())
        return tuple(sorted({*(self.fixed_targets << octave for octave in octaves), self.eval_len}))

    def unrelated(self, train_len: int) -> tuple[int, ...]:
        """Those past the training length, to measure with another document's text there too; none where the targets
        themselves reach further back than it."""
        return tuple(length for length in self.contexts if length > train_len >= self.fixed_targets)


# the methods of the paper's figure 5, which names NTK and the window 512; the other factors and windows are ours
FIGURE_5 = (
    "stick_breaking",
    "rope",
    "nope",
    "alibi",
    "fire",
    *(f"rope:scaling=ntk,factor={factor}" for factor in (2, 4, 8, 16)),
    *(f"sliding_window:window={window}" for window in (256, 512, 1024)),
)

RECIPE = Config(
    size="60m",
    train_len=2048,
    eval_len=2048,
    train_tokens=800 * 131072,
    batch_tokens=131072,
    lr=2e-3,
    corpus="python",
    tokenizer="bpe:8192",
    documents=64,
    windows=4,
)

PRESETS = {
    # 1.3 M parameters, for a laptop: minutes on two cores. With half of the tokens RoPE does not yet rely on positions
    # where --train-len is 2048, and its loss hardly rises past it
    "quick": Config(train_tokens=600 * 8 * 256, documents=16),
    # 25 M parameters, 105 M tokens: one GPU of any kind
    "small": Config(
        size="25m", train_len=2048, eval_len=16384, train_tokens=800 * 131072, batch_tokens=131072,
        micro_batch_tokens=32768, lr=2e-3, corpus="python", tokenizer="bpe:8192", documents=64,
    ),
    # the same model and budget without accumulation
    "h200": Config(
        size="25m", train_len=2048, eval_len=16384, train_tokens=800 * 131072, batch_tokens=131072, lr=2e-3,
        corpus="python", tokenizer="bpe:8192", documents=64, windows=4,
    ),
    # the same, every method with two seeds, up to 32 times the training length
    "figure5": Config(
        attention=(*FIGURE_5, "forgetting"), seeds=(0, 1), size="25m", train_len=2048, eval_len=65536,
        train_tokens=800 * 131072, batch_tokens=131072, lr=2e-3, corpus="python", tokenizer="bpe:8192", documents=64,
        windows=2, window=(2048, 16384, 65536),
    ),
    # the recipe at 60 M parameters and 105 M tokens, within its training length, and nanoGPT's own recipe on the same
    # tokens (AdamW at 6e-4 with betas 0.9 and 0.95, decay 0.1, clip 1, cosine to a tenth)
    "recipe": RECIPE,
    "nanogpt": dataclasses.replace(RECIPE, attention=("nope",), size="nanogpt-60m", lr=6e-4),
    # 367.5 M parameters, SlimPajama, 15 B tokens at 3e-4, windows of 2048 (--train-len 8192 for its other panel),
    # evaluated in lm-eval's windows of 2^11 to 2^16. Not published, and chosen here: half a million tokens a step, the
    # cosine schedule with a warm-up of 5 %, and the tokenizer of 32,000. The evaluated documents are SlimPajama's test
    # split, not wikitext's.
    "paper": Config(
        attention=FIGURE_5, size="350m", train_len=2048, eval_len=65536, train_tokens=15 * 10**9, batch_tokens=1 << 19,
        micro_batch_tokens=1 << 16, lr=3e-4, corpus="hf:cerebras/SlimPajama-627B", corpus_tokens=15 * 10**9,
        tokenizer="TinyLlama/TinyLlama_v1.1", documents=64, window=tuple(2048 << octave for octave in range(6)),
        fixed_targets=512,
    ),
}  # fmt: skip


Kind = TypeVar("Kind", bound=Config)


def preset(kind: Callable[..., Kind], name: str, **options: Any) -> Kind:
    """Return a preset of another family: models trained as by the preset `name`, evaluated up to their train_len."""
    trained = {entry.name: getattr(PRESETS[name], entry.name) for entry in dataclasses.fields(Config)}
    return kind(**{**trained, "eval_len": trained["train_len"], "window": (), "fixed_targets": 0, **options})


def completed(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of such a family with those that they imply: eval_len follows train_len."""
    return text_model.completed(({"eval_len": given["train_len"]} if "train_len" in given else {}) | given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(TextCell):
    """One method and seed: a config whose `attention` and `seeds` have one entry each."""

    config: Config
    family: str = NAME
    row: ClassVar[type[Row]] = Row

    @property
    def flops(self) -> float:
        config = self.config
        # whole documents are estimated as eval_len tokens each
        tokens = {config.eval_len: config.documents * config.windows * config.eval_len}
        for length in config.rolling:
            tokens[length] = tokens.get(length, 0) + config.documents * config.eval_len * (1 + len(config.eval_corpus))
        for length in (*config.contexts[:-1], *config.unrelated(config.train_len)):
            tokens[length] = tokens.get(length, 0) + config.documents * config.windows * length
        return sum(self.flops_per_token(length) * count for length, count in tokens.items())

    def source(self, progress: "Progress") -> str:
        """Return the digest of the tokenized corpus, after that of a given model."""
        return self._source(open_corpus(self.config, progress))

    def check(self, progress: "Progress") -> None:
        """Raise InputError where no document of the corpus is long enough, or another text does not exist."""
        long_windows(open_corpus(self.config, progress), self.config)
        self._texts_digests()

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train, unless a finished checkpoint exists, and evaluate."""
        text = open_corpus(self.config, progress)
        # before training: raises InputError where documents are too short or a text cannot be read
        windows, texts = long_windows(text, self.config), whole_texts(text, self.config)
        subject = self.evaluated(text, max((self.config.eval_len, *self.config.rolling)), context, progress)
        evaluation = Evaluation(self.config, self.title, subject, context, progress)
        measured = [*evaluation.by_position(text, windows), *evaluation.in_windows(texts)]
        return outcome(
            subject,
            [dataclasses.replace(row, **self.recipe()) for rows, _ in measured for row in rows],
            family=NAME,
            task=text.name,
            eval_len=self.config.eval_len,
            seed=self.seed,
            corpus=text.name,
            corpus_digest=self._source(text),
            tokenizer=text.tokenizer.name,
            values=joined([part for _, values in measured for part in values]),
        )

    def _source(self, text: "Corpus") -> str:
        return "-".join([self.text_digest(text), *self._texts_digests()])

    def _texts_digests(self) -> list[str]:
        from sbeval.data import evaluation_text

        return [evaluation_text.digest(spec, self.config.text_field) for spec in self.config.eval_corpus]


def cells(config: Config) -> list[Cell]:
    """Return the grid: every method with every seed, or the model of a checkpoint.

    Raise InputError for an unknown method or option.
    """
    return [Cell(config=one) for one in models(config)]


def summary(results: "pd.DataFrame") -> "Table":
    """Return the table for the terminal: loss of the last k tokens at each context length, averaged over seeds, with
    lines for each setting."""
    from rich.table import Table

    from sbeval.tables import selection

    last = results[results["metric"] == "loss_last_k"]
    lengths = sorted(last["context_length"].unique())
    train_len = int(last["train_len"].min())
    k = int(last["last_k"].iloc[0])
    names = ("last_k", *selection.LENGTH_GEN.columns, "train_tokens", *selection.RECIPE)
    apart = selection.differing(last, dict.fromkeys(names))
    tokens = "tokens" if "last_k" in apart else f"{k} tokens"
    trained = "" if "train_len" in apart else f"; trained at {train_len}"
    table = Table(
        title=f"Loss of the last {tokens} (nats/token) by context length{trained}",
        caption=epochs.caution(results) or None,
        caption_justify="left",
    )
    table.add_column("attention")
    for length in lengths:
        table.add_column(f"{length}", justify="right", style="" if length <= train_len else "bold")
    for name in apart:
        table.add_column(name, justify="right")
    for (attention, options, *differing), group in last.groupby(["attention", "options", *apart], dropna=False):
        means = group.groupby("context_length")["value"].mean()
        table.add_row(
            spec_of(attention, options),
            *(f"{means[length]:.3f}" if length in means else "" for length in lengths),
            *(f"{value:g}" if isinstance(value, float) else f"{value}" for value in differing),
        )
    return table


FAMILY = Family(
    name=NAME,
    help=HELP[NAME],
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    cautions=cautions,
    completed=text_model.completed,
)
