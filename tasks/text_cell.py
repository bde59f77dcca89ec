"""Cells that evaluate text models, whatever their family."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sbeval import registry
from sbeval.config import digest_of
from sbeval.models.config import ModelConfig, flops_per_token
from sbeval.sweep.cell import Cell, Outcome, Step, TrainingStep, cell_id, held_out_curve, loss_curves, timing
from sbeval.tables import epochs
from sbeval.tables.privacy import shared
from sbeval.tables.rows import Identity, method_of
from sbeval.tasks.text_training import Training, model_shape, open_corpus, training_options
from sbeval.training.config import TrainConfig
from sbeval.training.text_model import EvaluatedModel, TextModel, likely_vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from sbeval.data.corpus import Corpus
    from sbeval.evaluation.perplexity import Predictor
    from sbeval.evaluation.response_cache import Answers
    from sbeval.models.decoder import Decoder
    from sbeval.pretrained.load import Pretrained
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.tables.curves import Curves
    from sbeval.training.checkpoint import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to evaluate, and what its rows record about it. train_tokens: 0 where it was not trained here.
    tokens_seen: 0 where that is not known. diagnoses: those of its training, with the tokens that it had seen."""

    model: "Predictor"
    name: str
    attention: str
    options: str
    params: int
    train_len: int
    backend: str
    train_tokens: int = 0
    tokens_seen: int = 0
    unique_tokens: int | None = None
    status: str = ""
    tokens_per_s: float | None = None
    measured: Mapping[str, object] = field(default_factory=dict)
    curves: "Curves" = field(default_factory=dict)
    diagnoses: "Sequence[Mapping[str, Any]]" = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStep(Step):
    """A step that works on one text model: a config of one method and seed, or of a checkpoint."""

    config: EvaluatedModel

    @property
    def attention(self) -> str:
        return self.config.attention[0]

    @property
    def seed(self) -> int:
        return self.config.seeds[0]

    @property
    def model_title(self) -> str:
        if self.config.checkpoint is not None:
            return re.sub(r"[^\w.-]+", "-", shared(self.config.checkpoint).strip("~/"))
        tokens = f" {self.config.train_tokens} tokens" if self.config.schedule == "wsd" else ""
        return f"{self.attention} seed {self.seed}{tokens}"

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def training_step(self) -> Training:
        """The training of the model; not for given checkpoints."""
        return Training(config=TextModel(**training_options(self.config)))

    def model(self, vocab_size: int) -> ModelConfig:
        """Return the shape of the model as it is evaluated."""
        return model_shape(self.config, vocab_size)

    def training(self, text: "Corpus | None" = None) -> TrainConfig:
        """Return how the model is trained; without the text as if it were long enough."""
        return self.training_step.schedule(text)

    def flops_per_token(self, length: int) -> float:
        """Return the approximate FLOPs of a token in a forward pass over `length` tokens."""
        from sbeval.pretrained import load

        if self.config.checkpoint is not None:
            return 2.0 * load.likely_parameters(self.config.checkpoint)
        return flops_per_token(self.model(likely_vocabulary(self.config.tokenizer)), length)

    def train_model(self, context: "RunContext", progress: "Progress") -> str:
        """Return the given checkpoint, or the checkpoint folder of the trained model."""
        return self.config.checkpoint or str(self.training_step.train(context, progress))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCell(TextStep, Cell):
    """A cell that evaluates one text model."""

    @property
    def title(self) -> str:
        return self.model_title

    @property
    def needs(self) -> tuple[TrainingStep, ...]:
        return () if self.config.checkpoint is not None else (*self.training_step.needs, self.training_step)

    def origin(self, progress: "Progress") -> tuple[str, str]:
        """Return name and digest of the training corpus; for a given checkpoint "" and the digest of its weights."""
        from sbeval.pretrained import load

        if self.config.checkpoint is not None:
            return "", load.digest(self.config.checkpoint)
        text = open_corpus(self.config, progress)
        return text.name, text.digest

    @contextmanager
    def answers(self, digest: str, context: "RunContext", progress: "Progress") -> Iterator["Answers"]:
        """Open the stored answers of the model of this digest in the block; there are none with `force`."""
        from sbeval.evaluation.response_cache import Answers

        path = context.results.answers(f"{self.family}-{digest_of([digest, self.attention, self.dtype])}")
        with context.clearing(path) as stale:
            answers = Answers(path, anew=stale, say=progress.say)
        with closing(answers):
            yield answers

    def subject(self, loaded: "Pretrained", folder: str, context: "RunContext", progress: "Progress") -> Subject:
        """Return the model as it is evaluated. folder: the checkpoint of its training on text, or the given one."""
        from sbeval.models.decoder import Decoder
        from sbeval.training import checkpoint

        if self.config.checkpoint is not None:
            return self._given_subject(loaded, folder)
        assert isinstance(loaded.model, Decoder)
        state = checkpoint.load_state(Path(folder))
        return self._trained_subject(loaded.model, state, open_corpus(self.config, progress), context)

    def _given_subject(self, loaded: "Pretrained", folder: str) -> Subject:
        """Return a pretrained model as it is evaluated."""
        from sbeval.pretrained import load
        from sbeval.training import checkpoint

        own = load.is_own(folder)
        state = checkpoint.load_state(Path(folder)) if own else checkpoint.State()
        step_tokens = (checkpoint.training_step_tokens(Path(folder)) if own else None) or 0
        return Subject(
            model=loaded.model,
            name=loaded.name,
            attention=loaded.attention,
            options=loaded.options,
            params=loaded.params,
            train_len=loaded.train_len or self.config.train_len,
            backend=loaded.backend,
            status=_status(state.held_out),
            tokens_seen=state.step * step_tokens,
            diagnoses=_diagnoses(state, step_tokens),
        )

    def evaluated(self, text: "Corpus", longest: int, context: "RunContext", progress: "Progress") -> Subject:
        """Train, unless a finished checkpoint exists, or load the given model, and return it as it is evaluated.

        longest: tokens of a row that it must take.
        """
        from sbeval.pretrained import load

        config, given = self.config, self.config.checkpoint
        if given is None:
            return self._trained_here(text, context, progress)
        model = load.load(given, context.device, config.dtype, trust_remote_code=config.trust_remote_code)
        model.check_tokenizer(text.tokenizer, given)
        model.check_length(longest, given)
        return self._given_subject(model, given)

    def text_digest(self, text: "Corpus") -> str:
        """Return the digest of the tokenized corpus, after that of a given model."""
        from sbeval.pretrained import load

        given = self.config.checkpoint
        return text.digest if given is None else f"{load.digest(given)}-{text.digest}"

    def recipe(self) -> dict[str, Any]:
        """Return the columns on how the model was trained; none for a given one."""
        from sbeval.tables.selection import RECIPE

        if not self.config.trains:
            return {}
        step = self.training()
        # a step is of whole sequences
        return {name: getattr(self.config, name) for name in RECIPE} | {"batch_tokens": step.batch * step.length}

    def _trained_here(self, text: "Corpus", context: "RunContext", progress: "Progress") -> Subject:
        _, trained = self.training_step.run(text, context, progress, log_name=cell_id(self))
        subject = self._trained_subject(trained.model, trained.state, text, context)
        return dataclasses.replace(
            subject,
            tokens_per_s=trained.tokens_per_second,
            measured={**timing(trained), **subject.measured},
            curves=loss_curves(trained.state),
        )

    def _trained_subject(self, trained: "Decoder", state: "State", text: "Corpus", context: "RunContext") -> Subject:
        from sbeval.data.dataloader import epoch_tokens

        training = self.training(text)
        name, options = method_of(self.attention)
        evaluated = trained.evaluated_as(self.attention)
        return Subject(
            model=evaluated,
            name=self.config.size,
            attention=name,
            options=options,
            params=evaluated.n_parameters(),
            train_len=training.length,
            train_tokens=state.step * training.batch * training.length,
            tokens_seen=state.step * training.batch * training.length,
            unique_tokens=epoch_tokens(text.train, training.length),
            status=_status(state.held_out),
            backend=registry.method(name).backend_name(context.device.type),
            curves=held_out_curve(state),
            diagnoses=_diagnoses(state, training.batch * training.length),
            measured={
                "ended_by": self.training_step.ended_by(state, training),
                **({"diagnosis_seconds": state.diagnosis_seconds} if state.diagnoses else {}),
                **({"corpus_versions": dict(text.versions)} if text.versions else {}),
            },
        )


def outcome(
    subject: Subject,
    rows: Sequence[Any],
    *,
    family: str,
    task: str,
    eval_len: int,
    seed: int,
    corpus: str,
    corpus_digest: str,
    tokenizer: str,
    measured: Mapping[str, object] = MappingProxyType({}),
    values: "pd.DataFrame | None" = None,
) -> Outcome:
    """Return the result of a finished cell. The class of `rows` has a status, which becomes the model's."""
    unique = subject.unique_tokens
    return Outcome(
        identity=Identity(
            family=family,
            task=task,
            model=subject.name,
            attention=subject.attention,
            options=subject.options,
            params=subject.params,
            train_len=subject.train_len,
            eval_len=eval_len,
            seed=seed,
        ),
        rows=[dataclasses.replace(row, status=subject.status) for row in rows],
        corpus=corpus,
        corpus_digest=corpus_digest,
        tokenizer=tokenizer,
        train_tokens=subject.train_tokens,
        unique_tokens=unique,
        epochs=round(subject.train_tokens / unique, 4) if unique else None,
        backend=subject.backend,
        tokens_per_s=subject.tokens_per_s,
        measured={**measured, **subject.measured},
        values=values,
        curves=subject.curves,
    )


def _status(losses: epochs.Looks) -> str:
    return epochs.OVERFIT if epochs.overfits(losses) else ""


def _diagnoses(state: "State", step_tokens: int) -> list[dict[str, Any]]:
    """Return the diagnoses of a training with the tokens seen instead of steps, of which each has so many tokens."""
    return [
        {"tokens_seen": step_tokens * reading["step"], **{name: reading[name] for name in reading if name != "step"}}
        for reading in state.diagnoses
    ]
