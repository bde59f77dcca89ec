"""Multi-query repeated associative recall (Tan et al., ICLR 2025, arXiv 2410.17980, section 5.1).

A variable is assigned, used and assigned again; each use must return its latest value. The rules are those of the
public code of the paper's first author. With V tokens, L positions and N pairs (V > L, 4 N <= L, L even):

    keys are 1 ... V/2 - 1, values V/2 ... V - 1, token 0 never occurs
    prefix      k1 v1 ... kN vN, keys and values drawn with replacement
    then        S = (L - 2 N) / 2 slots of two tokens; N of them, drawn without replacement with p_j ~ (j + 1)^(a - 1),
                begin with one of the example's keys; every other token is a random value
    label       at a key that has a value: that value; then the token after the key becomes its value

For keys 1 2 and values 5 ... 8, N = 2, with labels under the tokens (loss and labels are not shifted):

    tokens   1 7 2 5 | 8 6 1 8 7 7 1 5 2 6
    labels   . . . . | . . 7 . . . 8 . 5 .
                             ^       ^   ^ fresh: its first use after one assignment
                                     | stale: 7 was its value before
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sbeval.data.recall import Recall
from sbeval.models.config import ModelConfig, canonical_attention, flops_per_token
from sbeval.registry import HELP
from sbeval.sweep.cell import Outcome
from sbeval.sweep.family import Family, Say, unsaid, without_rates
from sbeval.tables.mqrar import Row as Row
from sbeval.tables.mqrar import summary
from sbeval.tables.rows import method_of
from sbeval.tasks.mqrar_options import PRESETS as PRESETS
from sbeval.tasks.mqrar_options import Config as Config
from sbeval.tasks.mqrar_options import factors
from sbeval.tasks.synthetic import TEST_SEED, VALIDATION_SEED, Scores, Synthetic
from sbeval.training.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tasks.recall_data import Examples
    from sbeval.training.trainer import Trained

NAME = "mqrar"
# key of the validation scores in run files
SCORES = "validation_accuracy"
# gain in accuracy that counts as progress
GAIN = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(Synthetic):
    """One point of the sweep: a config whose swept fields have one entry each."""

    config: Config
    family: str = NAME
    row: ClassVar[type[Row]] = Row

    @property
    def task(self) -> Recall:
        return self.config.task(self.config.kv_pairs[0], self.config.n_back[0])

    @property
    def setting(self) -> str:
        """Title without learning rate and seed."""
        config = self.config
        size = f"{config.kv_pairs[0]} pairs width {config.widths[0]}"
        back = f" {config.n_back[0]} back" if config.n_back[0] > 1 else ""
        return f"{self.attention} {size}{back}"

    @property
    def title(self) -> str:
        return f"{self.setting} lr {self.config.lrs[0]:g} seed {self.config.seeds[0]}"

    @property
    def flops(self) -> float:
        """FLOPs of all steps, an upper bound: training may end earlier."""
        shape, config = self.model(), self.config
        head = 2 * shape.width * shape.vocab_size
        scored = self.task.scored(config.batch) / (config.batch * config.seq_len)
        return 3 * (flops_per_token(shape, config.seq_len) - (1 - scored) * head) * self.training().tokens

    def model(self) -> ModelConfig:
        config, width = self.config, self.config.widths[0]
        return ModelConfig(
            vocab_size=config.vocab_size,
            width=width,
            layers=config.layers,
            heads=config.heads,
            hidden=4 * width,
            attention=self.attention,
            mlp="gelu",
            tied=True,
            positions=config.seq_len if config.positions else 0,
            init_std=config.init_std,
            dropout=config.dropout,
            norm=config.norm,
            qkv_bias=config.biases,
            out_bias=config.biases,
            mlp_bias=config.biases,
        )

    def training(self) -> TrainConfig:
        config = self.config
        return TrainConfig(
            steps=config.steps,
            batch=config.batch,
            length=config.seq_len,
            lr=config.lrs[0],
            schedule=config.schedule,
            warmup=max(1, config.steps // 20) if config.warmup is None else config.warmup,
            final_lr=config.final_lr,
            epoch_rows=config.stored_rows if config.lr_by_epoch else 0,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            decay_all=config.decay_all,
            beta_2=config.beta_2,
            clip=config.clip,
            seed=config.seeds[0],
            dtype=config.dtype,
            sparse=True,
            capacity=self._room(),
            check_every=config.check_every,
        )

    def _room(self) -> int:
        """Return the capacity for scored positions: one of two sizes, since each is compiled separately."""
        half = max(1, self.task.seq_len // 8)
        return self.task.scored(self.config.batch, min(-(-self.task.kv_pairs // half) * half, self.task.seq_len // 4))

    def run(self, context: "RunContext", progress: "Progress") -> Outcome:
        """Train until solved, on a plateau or out of steps, then test."""
        from sbeval.tables.values import counted
        from sbeval.tasks.drawn import predict
        from sbeval.tasks.recall_data import counts, held_out

        config, validation = self.config, self._validation(context)
        trained = self.trained(context, progress)
        test = held_out(self.task, TEST_SEED, config.test_rows, context.device)
        rows = self._rows(validation, predict(trained.model, validation, config.dtype), "validation_accuracy")[:1]
        correct = predict(trained.model, test, config.dtype)
        rows += self._rows(test, correct, "accuracy")
        rows += self._ended(status(config, trained.state.scores), trained.state.step)
        values = counted(counts(test, correct), "correct", "scored", by_example=True)
        return self.outcome(rows, context, SCORES, trained, values)

    def trained(self, context: "RunContext", progress: "Progress") -> "Trained":
        """Train until solved, on a plateau or out of steps, unless a finished checkpoint exists."""
        from sbeval.tasks import drawn
        from sbeval.tasks.recall_data import Batches, accuracy

        config = self.config
        validation = self._validation(context)
        # validation decides when training ends
        ending = [config.stop_accuracy, config.patience, len(validation.tokens)]
        key = [self.model(), self.training(), self.task, config.stored_rows, *ending]
        with context.checkpoint(key, progress) as folder:
            return drawn.train(
                self,
                folder,
                Batches(self.task, config.seeds[0], config.batch, config.stored_rows, context.device),
                lambda decoder: accuracy(validation, drawn.predict(decoder, validation, config.dtype)),
                functools.partial(status, config),
                context,
                progress,
            )

    def _validation(self, context: "RunContext") -> "Examples":
        from sbeval.tasks.recall_data import held_out

        return held_out(self.task, VALIDATION_SEED, max(1, self.config.test_rows // 3), context.device)

    def failed(self, how: str, context: "RunContext") -> Outcome:
        return self.outcome(self._ended(how), context, SCORES)

    def _ended(self, how: str, steps: int | None = None) -> list[Row]:
        solved = Row(metric="solved", unit="1", value=float(how == "solved"), n=1, status=how, **factors(self.config))
        if steps is None:
            return [solved]
        return [solved, Row(metric="steps", unit="steps", value=steps, n=1, status=how, **factors(self.config))]

    def _rows(self, examples: "Examples", correct: "Tensor", metric: str) -> list[Row]:
        from sbeval.tasks.recall_data import accuracies

        return [
            Row(metric=metric, unit="1", **dataclasses.asdict(mean), **factors(self.config), **split)
            for mean, split in accuracies(examples, correct)
        ]


def status(config: Config, scores: Scores) -> str:
    """Return `solved`, `plateau` or else `budget`, after validation scores of (step, accuracy)."""
    best, since = 0.0, 0
    for step, accuracy in scores:
        if accuracy >= best + GAIN:
            best, since = accuracy, step
    if not scores:
        return "budget"
    step, accuracy = scores[-1]
    if accuracy >= config.stop_accuracy:
        return "solved"
    return "plateau" if config.patience and step - since >= config.patience else "budget"


def cells(config: Config) -> list[Cell]:
    """Return the grid; of several learning rates and seeds every rate with the first seed, `more` has the rest.

    Raise InputError for an unknown method or option.
    """
    seeds = dict.fromkeys(config.seeds)
    first = list(seeds)[: 1 if len(set(config.lrs)) > 1 else None]
    return [
        dataclasses.replace(cell, config=dataclasses.replace(cell.config, lrs=(rate,), seeds=(seed,)))
        for seed in first
        for cell in _settings(config)
        for rate in dict.fromkeys(config.lrs)
    ]


def more(config: Config, results: "pd.DataFrame | None", say: Say = unsaid) -> list[Cell]:
    """Return the further seeds, at the learning rate that solves the task in the fewest steps with the first seed.

    Where none solves it, accuracies may be chance, and the best of them noise: at every rate that did not fail. Where
    all failed: none, which `say` says. Without results: at every rate, an upper bound.
    """
    first, *others = dict.fromkeys(config.seeds)
    if len(set(config.lrs)) == 1 or not others:
        return []
    found = []
    for cell in _settings(config):
        rates = list(dict.fromkeys(config.lrs)) if results is None else _rates(cell, first, results)
        if not rates:
            say(without_rates(f"{NAME} {cell.setting}", first))
        found += [
            dataclasses.replace(cell, config=dataclasses.replace(cell.config, lrs=(rate,), seeds=(seed,)))
            for rate in rates
            for seed in others
        ]
    return found


def _rates(cell: Cell, seed: int, results: "pd.DataFrame") -> list[float]:
    """Return the learning rates that are worth further seeds."""
    from sbeval.tables import intervals, selection

    config, mine = cell.config, intervals.method(results, method_of(cell.attention))
    same = {"seed": seed, "kv_pairs": config.kv_pairs[0], "width": config.widths[0], "n_back": config.n_back[0]}
    for name, value in same.items():
        mine = mine[mine[name] == value]
    rates = selection.ranked_rates(mine) or []
    solved = (mine["metric"] == "validation_accuracy") & (mine["value"] >= config.stop_accuracy)
    return rates[:1] if solved.any() else rates


def _settings(config: Config) -> list[Cell]:
    """Return the grid without learning rates and seeds."""
    methods = dict.fromkeys(_spec(config, spec) for spec in config.attention)
    return [
        Cell(
            config=dataclasses.replace(config, attention=(spec,), kv_pairs=(pairs,), n_back=(n_back,), widths=(width,))
        )
        # models that share compiled code are consecutive
        for spec in methods
        for width in dict.fromkeys(config.widths)
        for pairs in dict.fromkeys(config.kv_pairs)
        for n_back in dict.fromkeys(config.n_back)
    ]


def _spec(config: Config, spec: str) -> str:
    """Return the canonical spec, with the sweep's logit scale where stick-breaking's options have none."""
    name, options = method_of(spec)
    if name == "stick_breaking" and "logit_scale=" not in options:
        spec = f"{name}:{options + ',' if options else ''}logit_scale={config.logit_scale}"
    return canonical_attention(spec)


FAMILY = Family(
    name=NAME,
    help=HELP[NAME],
    config=Config,
    presets=PRESETS,
    cells=cells,
    summary=summary,
    more=more,
)
