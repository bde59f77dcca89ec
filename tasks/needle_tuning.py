"""Fine-tuning on needles, until held-out prompts of the training length are solved.

    lengths     256, 512, ... to the training length, as many tokens of each, packed into rows (cu_seqlens)
    prompts     several needles and a question about each, with words as values that give way to numbers; in the second
                half of the steps half of the prompts are like those of the test
    loss        the mean over tokens of answers, plus a tenth of the mean over all others
    rate        constant after a short warm-up, and over the last sixth of the steps falling to 0; of several, the one
                that solves the most tasks in the fewest tokens
    end         when every task is solved, or after --finetune tokens

A task is solved at the first validation that has greedy decoding right for 95 % of its held-out prompts, if those from
there on have so in the mean and are four or more: one alone may have so by chance, and a model that goes on with other
tasks can lose one. At the end of the budget, where fewer found it so, 256 prompts decide. The tokens until then are
censored at the budget where a task is not solved. What the model gained from copying before fine-tuning
(`sbeval.evaluation.diagnostics`) is measured too, to compare them with.
"""

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import platformdirs

from sbeval.models.config import ModelConfig
from sbeval.sweep.cell import TrainingStep, step_id
from sbeval.tables.needle import SOLVED
from sbeval.tasks.needle_options import TUNING, Config
from sbeval.tasks.text_cell import TextStep
from sbeval.tasks.text_training import DECAY, open_tokenizer, train_config
from sbeval.training.config import TrainConfig
from sbeval.training.text_model import likely_vocabulary

if TYPE_CHECKING:
    import torch

    from sbeval.data.tokenizer import Tokenizer
    from sbeval.evaluation.ruler_lessons import LessonBatches
    from sbeval.evaluation.ruler_prompts import Prompt, Writer
    from sbeval.evaluation.ruler_texts import Sources
    from sbeval.models.decoder import Decoder
    from sbeval.pretrained.load import Pretrained
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.training.checkpoint import State
    from sbeval.training.trainer import Trainer

# options on which a fine-tuned model depends, besides those of its training on text
OPTIONS = ("checkpoint", "finetune", "finetune_tasks", "essays", "squad", "hotpot", *TUNING)
# tokens of prompts in a forward pass; a GPU decodes a few long prompts no sooner than many
BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 19}
# held-out prompts of a task; validations in a training, at most, and the share of its cost that all may have, where a
# forward pass is a third of a training step; prompts that validations which find a task solved must have, at least
HELD_OUT, VALIDATIONS, SHARE, AGREE = 64, 30, 0.1, 256
# steps of the warm-up
WARMUP = 50
# tokens before a copy whose gain is measured, if the training length has room for both
COPY = 512


class Validation(NamedTuple):
    """The share `score` of `n` held-out prompts of a task that are right after `step` steps."""

    step: int
    score: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A fine-tuned model: folder of its checkpoint, learning rate, tasks and tokens of fine-tuning, nats per token that
    copying saved before; by task its validations, and the tokens until solved if it was.
    losses: of each step. measured: of the training, for run files."""

    folder: Path
    lr: float
    tasks: Sequence[str]
    tokens: int
    copy_gain: float
    scores: Mapping[str, Sequence[Validation]]
    solved_after: Mapping[str, int]
    losses: Sequence[float] = ()
    measured: Mapping[str, object] = field(default_factory=dict)

    def held_out(self, task: str) -> Validation:
        """Return the last validation."""
        return self.scores[task][-1]

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    def ended(self, task: str) -> str:
        """Return how fine-tuning on a task ended; empty where it was on others."""
        if task not in self.tasks:
            return ""
        return "diverged" if self.diverged else "solved" if task in self.solved_after else "budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning(TextStep, TrainingStep):
    """The fine-tuning of one model at one learning rate, the same for all tasks that it is evaluated on."""

    config: Config

    @property
    def title(self) -> str:
        return f"fine-tune {self.model_title} lr {self.rate:g}"

    @property
    def rate(self) -> float:
        return self.config.finetune_lrs[0]

    @property
    def flops(self) -> float:
        return 3 * self.flops_per_token(self.config.train_len) * self.config.finetune

    @property
    def leaves(self) -> ModelConfig:
        return self.model(likely_vocabulary(self.config.tokenizer))

    @property
    def length(self) -> int:
        """Tokens of the sequences that the model was trained on."""
        from sbeval.training import checkpoint

        spec = self.config.checkpoint
        return (spec and checkpoint.training_length(Path(spec))) or self.config.train_len

    @property
    def step_tokens(self) -> int:
        return self.config.finetune_batch_tokens or self.config.batch_tokens

    def schedule(self) -> TrainConfig:
        """Return steps, at most, and optimizer settings."""
        config = self.config
        of_step = dataclasses.replace(config, batch_tokens=self.step_tokens)
        training = train_config(of_step, tokens=config.finetune, length=self.length, lr=self.rate, seed=self.seed)
        return dataclasses.replace(
            training,
            schedule="wsd",
            decay=DECAY,
            warmup=min(training.steps, WARMUP),
            check_every=-(-training.steps // self._validations(training)),
        )

    def _validations(self, training: TrainConfig) -> int:
        each = len(self.config.finetune_tasks) * HELD_OUT * training.length
        return max(1, min(VALIDATIONS, int(3 * SHARE * training.tokens / each)))

    def train(self, context: "RunContext", progress: "Progress") -> Path:
        """Train and fine-tune, unless finished checkpoints exist, and return the checkpoint folder."""
        _, writer = open_writer(self.config, progress)
        return self.run(self.train_model(context, progress), writer, context, progress).folder

    def run(self, trained: str, writer: "Writer", context: "RunContext", progress: "Progress") -> Tuned:
        """Fine-tune the model of checkpoint `trained`, unless a finished checkpoint exists, and return what came of
        it."""
        from sbeval.evaluation import ruler_lessons
        from sbeval.models.decoder import Decoder
        from sbeval.pretrained import load
        from sbeval.training import checkpoint
        from sbeval.training.trainer import Trainer

        config, training = self.config, self.schedule()
        digest = load.digest(trained)
        held_out = {name: writer.path(name, self.length, 0, "validation").stem for name in config.finetune_tasks}
        lessons = [ruler_lessons.VERSION, config.finetune_needles, config.finetune_rest, config.finetune_prompts]
        with context.checkpoint(
            [digest, training, "packed", *lessons, held_out, HELD_OUT, SOLVED, AGREE], progress
        ) as folder:
            found = checkpoint.find(folder)
            if found is None or not checkpoint.load_state(found).finished:
                pretrained = loaded(trained, digest, context.device, self.dtype, config.trust_remote_code)
                pretrained.check_tokenizer(writer.tokenizer, trained)
                assert isinstance(pretrained.model, Decoder), "only our models are fine-tuned"
                trainer = Trainer(
                    pretrained.model.config,
                    training,
                    self._batches(writer, training, progress),
                    folder,
                    context.device,
                    tokenizer=writer.tokenizer.digest,
                )
                if trainer.state.step == 0:
                    trainer.model.load_state_dict(pretrained.model.state_dict())
                    trainer.state.diagnoses = [_copy_gain(pretrained.model, writer, self.length, context, self.dtype)]
                self._train(trainer, folder, writer, context, progress)
        return self._read(folder, training)

    def _batches(self, writer: "Writer", training: TrainConfig, progress: "Progress") -> "LessonBatches":
        from sbeval.evaluation import ruler_lessons

        config = self.config
        store = ruler_lessons.Store(writer)
        wanted = ruler_lessons.counts(
            config.finetune_prompts, config.finetune_tasks, training.length, config.finetune_needles
        )
        task = progress.add("write prompts to fine-tune on", total=sum(wanted.values()))
        # workers that begin together write different ones, and read the others'
        order = random.Random().sample(list(wanted), len(wanted))
        read = {key: store.lessons(*key, wanted[key], advance=task.advance) for key in order}
        stored = {key: read[key] for key in wanted}
        task.close()
        return ruler_lessons.LessonBatches(
            stored,
            config.finetune_needles,
            steps=training.steps,
            batch=training.batch,
            length=training.length,
            seed=self.seed,
            eos=writer.tokenizer.eos,
            rest=config.finetune_rest,
        )

    def _train(
        self, trainer: "Trainer", folder: Path, writer: "Writer", context: "RunContext", progress: "Progress"
    ) -> None:
        from sbeval.training import checkpoint
        from sbeval.training.trainer import DivergedError

        held_out = {name: self._held_out(name, writer, HELD_OUT) for name in self.config.finetune_tasks}
        batch = max(1, BATCH_TOKENS[context.device.type] // self.length)
        task = progress.add(self.title, trainer.config.steps, completed=trainer.state.step)

        def stop(decoder: "Decoder", state: "State") -> bool:
            def right(prompts: "Sequence[Prompt]") -> float:
                return _greedy(decoder, prompts, context.device, self.dtype, batch, task.say)

            decoder.eval()
            scores = _by_task(state)
            for name, prompts in held_out.items():
                one = Validation(state.step, right(prompts), len(prompts))
                mine = scores.setdefault(name, [])
                mine.append(one)
                if state.step == trainer.config.steps and one.score >= SOLVED and solved_from(mine) is None:
                    more = self._held_out(name, writer, AGREE)[HELD_OUT:]
                    total = one.n * one.score + len(more) * right(more)
                    mine[-1] = Validation(state.step, total / AGREE, AGREE)
            decoder.train()
            state.task_scores += [{"task": name, **mine[-1]._asdict()} for name, mine in scores.items()]
            state.scores.append((state.step, sum(mine[-1].score for mine in scores.values()) / len(scores)))
            return all(solved_from(mine) is not None for mine in scores.values())

        with context.logger(step_id(self)) as log:
            try:
                trainer.run(task, stop=stop, log=log)
            except DivergedError as error:
                # kept, so that no cell trains it again: validation may choose another rate
                task.say(f"{self.title}: {error}")
                trainer.state.finished = True
                checkpoint.save(folder, trainer.model, trainer.state, training=dataclasses.asdict(trainer.config))
        task.close()

    def _held_out(self, name: str, writer: "Writer", count: int) -> "Sequence[Prompt]":
        return writer.prompts(name, self.length, 0, count, use="validation")

    def _read(self, folder: Path, training: TrainConfig) -> Tuned:
        from sbeval.training import checkpoint

        state, step_tokens = checkpoint.load_state(folder), training.batch * training.length
        scores = _by_task(state)
        after = {task: solved_from(of_task) for task, of_task in scores.items()}
        return Tuned(
            folder=folder,
            lr=self.rate,
            tasks=self.config.finetune_tasks,
            tokens=state.step * step_tokens,
            copy_gain=state.diagnoses[0]["value"],
            scores=scores,
            solved_after={task: step * step_tokens for task, step in after.items() if step is not None},
            losses=state.losses,
            measured={"seconds": state.seconds, "tokens_per_s": state.tokens_per_second},
        )


def solved_from(scores: Sequence[Validation]) -> int | None:
    """Return the step of the first validation that has SOLVED of the held-out prompts right, as those from there on
    have in the mean, with AGREE prompts or more; None where there is none, or one that asked so many itself was the
    last and has fewer right. scores: in the order of their steps."""
    if scores and scores[-1].n >= AGREE and scores[-1].score < SOLVED:
        return None
    for place, first in enumerate(scores):
        later = scores[place:]
        mean = sum(one.score for one in later) / len(later)
        if first.score >= SOLVED and mean >= SOLVED and sum(one.n for one in later) >= AGREE:
            return first.step
    return None


def _by_task(state: "State") -> dict[str, list[Validation]]:
    scores: dict[str, list[Validation]] = {}
    for one in state.task_scores:
        scores.setdefault(one["task"], []).append(Validation(one["step"], one["score"], one["n"]))
    return scores


def _greedy(
    decoder: "Decoder",
    prompts: "Sequence[Prompt]",
    place: "torch.device",
    dtype: str,
    batch: int,
    say: Callable[[str], None],
) -> float:
    """Return the share of prompts after which the likeliest tokens are the reference."""
    from sbeval.evaluation import ruler_scores
    from sbeval.runtime import oom

    right: list[bool] = []

    def answer(some: "Sequence[Prompt]") -> None:
        right.extend(greedy for _, greedy in ruler_scores.teacher_forced(decoder, some, place, dtype, len(some)))

    oom.in_parts(prompts, batch, answer, say)
    return sum(right) / len(right)


def _copy_gain(model: "Decoder", writer: "Writer", length: int, context: "RunContext", dtype: str) -> dict[str, object]:
    """Return the reading of the gain from copying of a model before it is fine-tuned."""
    from sbeval.evaluation import diagnostics

    reading = diagnostics.copy_gain(
        model, min(COPY, length // 2), writer.tokenizer.vocab_size, writer.tokenizer.eos, context.device, dtype
    )
    return {"step": 0, **dataclasses.asdict(reading)}


def open_writer(config: Config, progress: "Progress") -> "tuple[Tokenizer, Writer]":
    """Return the model's tokenizer and the writer of its prompts: with a BOS for models that are not ours."""
    from sbeval.evaluation.ruler_prompts import Writer
    from sbeval.pretrained import load

    cache_dir = Path(platformdirs.user_cache_dir("sbeval"))
    ours = config.checkpoint is None or load.is_own(config.checkpoint)
    text = open_tokenizer(config, progress)
    return text, Writer(text, sources(config), cache_dir, prefix=() if ours else text.prefix)


def sources(config: Config) -> "Sources":
    """Return the texts that prompts are made of."""
    return _sources(config.essays, config.squad, config.hotpot)


@functools.lru_cache(maxsize=1)
def _sources(essays: str | None, squad: str | None, hotpot: str | None) -> "Sources":
    from sbeval.evaluation import ruler_texts

    return ruler_texts.load(essays, squad, hotpot)


@functools.lru_cache(maxsize=2)
def loaded(spec: str, digest: str, device: "torch.device", dtype: str, trust: bool) -> "Pretrained":
    """Load the model of consecutive cells once; the digest changes when another is saved to the same path."""
    from sbeval.pretrained import load

    return load.load(spec, device, dtype, trust_remote_code=trust)
