"""Training of text models, for cells of any family that evaluate them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import platformdirs

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
from sbeval.training.text_model import TRAINING, EvaluatedModel, TextModel, likely_vocabulary

if TYPE_CHECKING:
    from sbeval.data.corpus import Corpus
    from sbeval.data.dataloader import Batch
    from sbeval.data.tokenizer import Tokenizer
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.training.checkpoint import State
    from sbeval.training.config import TrainConfig
    from sbeval.training.trainer import Trained

Kind = TypeVar("Kind", bound=EvaluatedModel)


def models(config: Kind) -> list[Kind]:
    """Return a config for each method with each seed, or for the given checkpoint.

    Raise InputError for an unknown method or option.
    """
    from sbeval.pretrained import load

    if config.checkpoint is not None:
        own = config.tokenizer if load.is_own(config.checkpoint) else config.checkpoint
        return [dataclasses.replace(config, attention=("",), seeds=(0,), tokenizer=own)]
    methods = dict.fromkeys(canonical_attention(spec) for spec in config.attention)
    return [
        dataclasses.replace(config, attention=(spec,), seeds=(seed,))
        for seed in dict.fromkeys(config.seeds)
        for spec in methods
    ]


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
    """The training of one model on text: a config of one method and seed, the same for all cells that evaluate it."""

    config: TextModel

    @property
    def _model(self) -> str:
        return f"{self.config.attention[0]} seed {self.config.seeds[0]}"

    @property
    def title(self) -> str:
        return f"train {self._model}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def flops(self) -> float:
        return 3 * flops_per_token(self.leaves, self.config.train_len) * self.schedule().tokens

    @property
    def reads(self) -> TextModel:
        return self.config

    @property
    def leaves(self) -> ModelConfig:
        return model_shape(self.config, likely_vocabulary(self.config.tokenizer))

    def schedule(self, text: "Corpus | None" = None) -> "TrainConfig":
        """Return steps and optimizer settings; without the text as if it were long enough."""
        from sbeval.data.dataloader import epoch_tokens
        from sbeval.training import held_out

        config, tokens = self.config, self.config.train_tokens
        if text is not None and config.max_epochs is not None:
            tokens = min(tokens, int(config.max_epochs * epoch_tokens(text.train, config.train_len)))
        training = train_config(config, tokens=tokens, length=config.train_len, lr=config.lr, seed=config.seeds[0])
        looks, _ = held_out.plan(training.tokens, training.length)
        return dataclasses.replace(training, patience=config.patience, look_every=-(-training.steps // looks))

    def train(self, context: "RunContext", progress: "Progress") -> Path:
        """Train, unless a finished checkpoint exists, and return the checkpoint folder."""
        return self.run(open_corpus(self.config, progress), context, progress, log_name=step_id(self))[0]

    def run(
        self, text: "Corpus", context: "RunContext", progress: "Progress", *, log_name: str
    ) -> "tuple[Path, Trained]":
        """Train on an open corpus, and return the checkpoint folder and the model. log_name: of TensorBoard logs."""
        from sbeval.data.dataloader import Batches
        from sbeval.training.trainer import Trainer

        packing, seed = self.config.packing, self.config.seeds[0]
        shape, training = model_shape(self.config, text.tokenizer.vocab_size), self.schedule(text)
        batches = Batches(text.train, training.length, training.batch, seed, packing)
        with context.checkpoint([shape, training, text.digest, packing], progress) as folder:
            trainer = Trainer(
                shape,
                training,
                batches,
                folder,
                context.device,
                context.world,
                shard=context.shard,
                tokenizer=text.tokenizer.digest,
                held_out=_held_out(text, training, packing),
            )
            task = progress.add(self.title, training.steps, completed=trainer.state.step)
            trained = trainer.run(task, log=context.logger(log_name))
            task.close()
        return folder, trained

    def ended_by(self, state: "State", training: "TrainConfig") -> str:
        """Return the option whose bound ended the training."""
        if state.step < training.steps:
            return "patience"
        return "max_epochs" if training.steps < self.schedule().steps else "train_tokens"


def model_shape(config: TextModel, vocab_size: int) -> ModelConfig:
    """Return the shape of the model of one method, with its vocabulary padded."""
    return named(config.size, vocab_size=padded_vocabulary(vocab_size), attention=config.attention[0])


def train_config(
    config: TextModel, *, tokens: int, length: int, lr: float, seed: int, sparse: bool = False
) -> "TrainConfig":
    """Return the settings of a training on so many tokens, in sequences of `length`."""
    from sbeval.training.config import TrainConfig

    batch = max(1, config.batch_tokens // length)
    micro = config.micro_batch_tokens and max(1, config.micro_batch_tokens // length)
    steps = max(1, tokens // (batch * length))
    return TrainConfig(
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
        sparse=sparse,
    )


def open_corpus(config: TextModel, progress: "Progress") -> "Corpus":
    """Open the corpus of a config; the first time it is tokenized."""
    from sbeval.data import corpus

    task = progress.add(f"tokenize {config.corpus}", total=None)
    text = corpus.open(
        config.corpus,
        tokenizer=config.tokenizer,
        cache_dir=Path(platformdirs.user_cache_dir("sbeval")),
        max_tokens=config.corpus_tokens,
        text_field=config.text_field,
        progress=task.advance,
    )
    task.close()
    return text


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
    training = Training(config=TextModel(**training_options(models(config)[0])))
    requested, trained = (training.schedule(each).tokens for each in (None, text))
    lines = epochs.notice(text.name, epoch_tokens(text.train, config.train_len), requested, trained)
    if not epoch_tokens(text.valid, config.train_len):
        lines.append(
            f"{text.name!r} has {len(text.valid.tokens):,} tokens of held-out text, less than a window of "
            f"{config.train_len}: no held-out loss is measured while models train, so overfitting goes unnoticed"
        )
    return lines


def _held_out(text: "Corpus", training: "TrainConfig", packing: str) -> "Batch | None":
    """Return the held-out windows, the same for every method; None where there is too little text."""
    from sbeval.data.dataloader import Batches, epoch_tokens
    from sbeval.training import held_out

    if not epoch_tokens(text.valid, training.length):
        return None
    _, windows = held_out.plan(training.tokens, training.length)
    return Batches(text.valid, training.length, batch=1, seed=0, packing=packing).spread(windows)
