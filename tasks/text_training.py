"""Training of text models, for cells of any family that evaluate them."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import platformdirs

from sbeval.config import LATER
from sbeval.models.config import (
    ModelConfig,
    canonical_attention,
    flops_per_token,
    named,
    padded_vocabulary,
    trained_attention,
)
from sbeval.sweep.cell import TrainingStep, step_id
from sbeval.tables import epochs
from sbeval.training.config import TrainConfig
from sbeval.training.text_model import (
    TRAINING,
    EvaluatedModel,
    TextModel,
    check_step,
    corpus_options,
    likely_tokens,
    likely_vocabulary,
)

if TYPE_CHECKING:
    import torch

    from sbeval.data.corpus import Corpus
    from sbeval.data.dataloader import Batch
    from sbeval.data.tokenizer import Tokenizer
    from sbeval.evaluation.diagnostics import Size
    from sbeval.models.decoder import Decoder
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.training.checkpoint import State
    from sbeval.training.trainer import Trained

Kind = TypeVar("Kind", bound=EvaluatedModel)
# share of the decay in the steps of `wsd`: a fifth of those before it
DECAY = 1 / 6


def models(config: Kind) -> list[Kind]:
    """Return a config for each method with each seed, or for the given checkpoint.

    Raise InputError for an unknown method or option, and for steps that are shorter than a sequence.
    """
    from sbeval.pretrained import load

    if config.checkpoint is not None:
        spec = load.located(config.checkpoint)
        own = config.tokenizer if load.is_own(spec) else spec
        return [dataclasses.replace(config, checkpoint=spec, attention=("",), seeds=(0,), tokenizer=own)]
    # not a check of the config: fine-tuning has one with steps of its own
    check_step("--batch-tokens", config.batch_tokens, config.train_len)
    methods = dict.fromkeys(canonical_attention(spec) for spec in config.attention)
    return [
        dataclasses.replace(branch, attention=(spec,), seeds=(seed,))
        for seed in dict.fromkeys(config.seeds)
        for branch in _branches(config)
        for spec in methods
    ]


def _branches(config: Kind) -> list[Kind]:
    """Return a config for each branch, shortest first: the whole training, and the branches up to its own."""
    if not config.branches:
        return [config]
    branches = sorted(set(config.branches))
    # the same for all, since they share it
    warmup = config.warmup_tokens or max(1, _whole(branches[0]) // 20)
    return [
        dataclasses.replace(
            config, train_tokens=_whole(branch), warmup_tokens=warmup, branches=tuple(branches[: index + 1])
        )
        for index, branch in enumerate(branches)
    ]


def _whole(branch: int) -> int:
    """Return the tokens of a training that decays after `branch` tokens."""
    return round(branch / (1 - DECAY))


def training_options(config: EvaluatedModel) -> dict[str, Any]:
    """Return the options on which the training of one method and seed depends.

    Configs that differ only in how the model is evaluated have the same.
    """
    options = {name: getattr(config, name) for name in TRAINING}
    if config.checkpoint is None:
        options["attention"] = (trained_attention(config.attention[0]),)
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(TrainingStep):
    """The training of one model on text: a config of one method and seed, the same for all cells that evaluate it.

    trunk: only its part at a constant learning rate, which decays of several lengths share:

        50 M ---- 100 M ------------ 200 M         trunks, each the beginning of the next
          \\           \\                 \\
           60 M        120 M             240 M     decays, each a model to evaluate
    """

    config: TextModel
    trunk: bool = field(default=False, metadata=LATER)

    @property
    def _model(self) -> str:
        config = self.config
        bound = "" if config.max_epochs is None else "at most "
        tokens = f" {bound}{config.train_tokens} tokens" if config.schedule == "wsd" else ""
        return f"{config.attention[0]} seed {config.seeds[0]}{tokens}"

    @property
    def title(self) -> str:
        return f"train {'the trunk of ' if self.trunk else ''}{self._model}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def flops(self) -> float:
        tokens, branches = self._likely_tokens, self.config.branches
        before = self.needs[-1]._likely_tokens if self.needs else 0
        # where the text bounds the next shorter branch too, they are one training
        if not self.trunk and len(branches) > 1 and self._branch(len(branches) - 2)._likely_tokens == tokens:
            before = tokens
        return 3 * flops_per_token(self.leaves, self.config.train_len) * (tokens - before)

    @property
    def _likely_tokens(self) -> int:
        """Estimate of the tokens to train on, with those of the trunks, as the text bounds them."""
        config = self.config
        return self._schedule(likely_tokens(config.corpus, config.tokenizer, config.corpus_tokens)).tokens

    @property
    def reads(self) -> TextModel:
        return self.config

    @property
    def leaves(self) -> ModelConfig:
        return model_shape(self.config, likely_vocabulary(self.config.tokenizer))

    @property
    def copies(self) -> int:
        return 3 if self.trunk else 1

    @property
    def needs(self) -> "tuple[Training, ...]":
        """The trunks that it continues, shortest first."""
        count = len(self.config.branches)
        return tuple(self._branch(index, trunk=True) for index in range(count - 1 if self.trunk else count))

    def _branch(self, index: int, *, trunk: bool = False) -> "Training":
        branches = self.config.branches[: index + 1]
        config = dataclasses.replace(self.config, train_tokens=_whole(branches[-1]), branches=branches)
        return Training(config=config, trunk=trunk)

    def schedule(self, text: "Corpus | None" = None) -> TrainConfig:
        """Return steps and optimizer settings; without the text as if it were long enough."""
        from sbeval.data.dataloader import epoch_tokens

        return self._schedule(None if text is None else epoch_tokens(text.train, self.config.train_len))

    def _schedule(self, unique: int | None) -> TrainConfig:
        """Return steps and optimizer settings for a text of `unique` tokens; None: as if it were long enough."""
        from sbeval.training import held_out

        config, tokens = self.config, self.config.train_tokens
        if unique is not None and config.max_epochs is not None:
            tokens = min(tokens, int(config.max_epochs * unique))
        training = train_config(config, tokens=tokens, length=config.train_len, lr=config.lr, seed=config.seeds[0])
        looks, _ = held_out.plan(training.tokens, training.length)
        training = dataclasses.replace(training, patience=config.patience, look_every=-(-training.steps // looks))
        if config.warmup_tokens is not None:
            warmup = max(1, config.warmup_tokens // (training.batch * training.length))
            training = dataclasses.replace(training, warmup=min(warmup, training.steps))
        if self.trunk:
            training = dataclasses.replace(training, schedule="constant", steps=training.trunk_steps)
        if not config.diagnostics:
            return training
        return dataclasses.replace(training, diagnose_every=-(-training.steps // self._diagnoses(training)[0]))

    def _diagnoses(self, training: TrainConfig) -> "tuple[int, Size]":
        """Return how often, and with how much, retrieval is diagnosed."""
        from sbeval.evaluation import diagnostics

        times = min(self.config.diagnostics, training.steps)
        return diagnostics.plan(self.leaves, training.length, training.tokens, times)

    def _diagnose(
        self, text: "Corpus", training: TrainConfig, place: "torch.device"
    ) -> "Callable[[Decoder], list[dict[str, Any]]] | None":
        from sbeval.evaluation import diagnostics

        if not self.config.diagnostics:
            return None
        _, size = self._diagnoses(training)
        tokenizer = text.tokenizer
        probes = diagnostics.probes(text.test, tokenizer.vocab_size, tokenizer.eos, size, training.length)
        return lambda model: [
            dataclasses.asdict(reading) for reading in diagnostics.measure(model, probes, place, training.dtype)
        ]

    def train(self, context: "RunContext", progress: "Progress") -> Path:
        """Train, unless a finished checkpoint exists, and return the checkpoint folder."""
        return self.run(open_corpus(self.config, progress), context, progress)[0]

    def run(
        self, text: "Corpus", context: "RunContext", progress: "Progress", *, log_name: str = ""
    ) -> "tuple[Path, Trained]":
        """Train on an open corpus, and return the checkpoint folder and the model. log_name: of TensorBoard logs."""
        from sbeval.data.dataloader import Batches
        from sbeval.training import checkpoint
        from sbeval.training.trainer import Trainer

        packing, seed = self.config.packing, self.config.seeds[0]
        shape, training = self._shape(text), self.schedule(text)
        batches = Batches(text.train, training.length, training.batch, seed, packing)
        with context.checkpoint(self._key(text), progress) as folder:
            begun = checkpoint.find(folder) is not None
            trainer = Trainer(
                shape,
                training,
                batches,
                folder,
                context.device,
                context.world,
                shard=context.shard,
                tokenizer=text.tokenizer.digest,
                held_out=self.held_out(text),
                diagnose=self._diagnose(text, training, context.device),
                after=None if begun else self._trunk(text, training, context, progress),
                trunk=self.trunk,
            )
            task = progress.add(self.title, training.steps, completed=trainer.state.step)
            with context.logger(log_name or step_id(self)) as log:
                trained = trainer.run(task, log=log)
            task.close()
        return folder, trained

    def held_out(self, text: "Corpus") -> "Batch | None":
        """Return the held-out windows, the same for every method and branch; None where there is too little text."""
        from sbeval.data.dataloader import Batches, epoch_tokens
        from sbeval.training import held_out

        training = self.schedule(text)
        if not epoch_tokens(text.valid, training.length):
            return None
        # a branch has the losses of its trunk, and a shorter branch the same trunk
        tokens = min((training.tokens, *self.config.branches[:1]))
        _, windows = held_out.plan(tokens, training.length)
        return Batches(text.valid, training.length, batch=1, seed=0, packing=self.config.packing).spread(windows)

    def trained(self, context: "RunContext") -> bool:
        """Return whether a finished checkpoint is there; False too where the text is not tokenized yet."""
        from sbeval.training import checkpoint

        config = self.config
        if not context.results.checkpoints.is_dir():
            return False
        text = _stored(config.corpus, tuple(corpus_options(config).items()), context.run_id)
        return text is not None and checkpoint.is_finished(context.folder(self._key(text)))

    def _shape(self, text: "Corpus") -> ModelConfig:
        return model_shape(self.config, text.tokenizer.vocab_size)

    def _key(self, text: "Corpus") -> list[Any]:
        """Return what decides the trained weights."""
        trunk = ["trunk"] if self.trunk else []
        return [self._shape(text), self.schedule(text), text.digest, self.config.packing, *trunk]

    def _trunk(self, text: "Corpus", training: TrainConfig, context: "RunContext", progress: "Progress") -> Path | None:
        """Return the checkpoint of the longest trunk that is a part of this training, trained if it is not yet."""
        # where the text bounds both, a shorter branch may have as long a trunk
        shorter = [trunk for trunk in self.needs if trunk.schedule(text).steps < training.steps]
        return shorter[-1].run(text, context, progress)[0] if shorter else None

    def ended_by(self, state: "State", training: TrainConfig) -> str:
        """Return the option whose bound ended the training."""
        if state.step < training.steps:
            return "patience"
        return "max_epochs" if training.steps < self.schedule().steps else "train_tokens"


def model_shape(config: TextModel, vocab_size: int) -> ModelConfig:
    """Return the shape of the model of one method, with its vocabulary padded."""
    return named(config.size, vocab_size=padded_vocabulary(vocab_size), attention=config.attention[0])


def train_config(config: TextModel, *, tokens: int, length: int, lr: float, seed: int) -> TrainConfig:
    """Return the settings of a training on so many tokens, in sequences of `length`."""
    batch = max(1, config.batch_tokens // length)
    micro = config.micro_batch_tokens and max(1, config.micro_batch_tokens // length)
    steps = max(1, tokens // (batch * length))
    training = TrainConfig(
        steps=steps,
        batch=batch,
        length=length,
        micro_batch=micro and min(micro, batch),
        lr=lr,
        schedule=config.schedule,
        warmup=max(1, steps // 20),
        optimizer=config.optimizer,
        seed=seed,
        dtype=config.dtype,
    )
    return dataclasses.replace(training, decay=DECAY) if config.schedule == "wsd" else training


def open_corpus(config: TextModel, progress: "Progress") -> "Corpus":
    """Open the corpus of a config; the first time it is tokenized."""
    from sbeval.data import corpus

    task = progress.add(f"tokenize {config.corpus}", total=None)
    text = corpus.open(config.corpus, **corpus_options(config), progress=task.advance, say=progress.say)
    task.close()
    return text


@functools.lru_cache(maxsize=4)
def _stored(spec: str, options: tuple[tuple[str, Any], ...], run_id: str) -> "Corpus | None":
    """Look for a tokenized corpus once in a run, for all its models: its files are listed each time."""
    from sbeval.data import corpus

    return corpus.stored(spec, **dict(options))


def open_tokenizer(config: EvaluatedModel, progress: "Progress") -> "Tokenizer":
    """Open the tokenizer of a config's models; one that is trained on the corpus comes with it."""
    from sbeval.data import tokenizer

    if config.checkpoint is None or tokenizer.is_trained(config.tokenizer):
        return open_corpus(config, progress).tokenizer
    return tokenizer.load(config.tokenizer, cache_dir=Path(platformdirs.user_cache_dir("sbeval")))


def cautions(config: EvaluatedModel, progress: "Progress") -> list[str]:
    """Return warnings to print before models train: about epochs of the corpus and missing held-out text."""
    from sbeval.data.dataloader import epoch_tokens

    if not config.trains:
        return []
    text = open_corpus(config, progress)
    # the longest of several branches
    training = Training(config=TextModel(**training_options(models(config)[-1])))
    requested, trained = (training.schedule(each).tokens for each in (None, text))
    lines = epochs.notice(text.name, epoch_tokens(text.train, config.train_len), requested, trained)
    if not epoch_tokens(text.valid, config.train_len):
        lines.append(
            f"{text.name!r} has {len(text.valid.tokens):,} tokens of held-out text, less than a window of "
            f"{config.train_len}: no held-out loss is measured while models train, so overfitting goes unnoticed"
        )
    return lines
