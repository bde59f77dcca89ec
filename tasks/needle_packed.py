"""Fine-tuning on needles by the recipe `packed`: until held-out prompts of the training length are solved.

    lengths     256, 512, ... to the training length, as many tokens of each, packed into rows (cu_seqlens)
    prompts     in the first half several needles and a question about each, with words as values that give way to
                numbers; then prompts like those of the test
    loss        the mean over tokens of answers, plus a tenth of the mean over all others
    rate        constant after a short warm-up; of several, the one that solves the most tasks in the fewest tokens
    end         when greedy decoding is right for 95 % of the held-out prompts of every task, or --finetune tokens

A task is solved at the first look at which it was, also if training went on for other tasks. Its tokens until then are
censored at the budget where it never was. The gain from copying (`sbeval.evaluation.diagnostics`) of the model before
fine-tuning is measured too: it predicts them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sbeval.sweep.cell import step_id
from sbeval.tables.needle import SOLVED
from sbeval.tasks.needle_tuning import BATCH_TOKENS, Tuning, loaded
from sbeval.tasks.text_training import train_config

if TYPE_CHECKING:
    import torch

    from sbeval.evaluation.ruler_lessons import LessonBatches
    from sbeval.evaluation.ruler_prompts import Prompt, Writer
    from sbeval.models.decoder import Decoder
    from sbeval.runtime.progress import Progress
    from sbeval.sweep.context import RunContext
    from sbeval.training.checkpoint import State
    from sbeval.training.config import TrainConfig
    from sbeval.training.trainer import Trainer

# held-out prompts of a task; looks at them in a training, at most, and the share of its cost that all may have, where a
# forward pass is a third of a training step
HELD_OUT, LOOKS, SHARE = 64, 30, 0.1
# steps of the warm-up
WARMUP = 50
# tokens before a copy whose gain is measured, if the training length has room for both
COPY = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A fine-tuned model: folder of its checkpoint, learning rate, tokens of fine-tuning, nats per token that copying
    saved before, and by task the share of held-out prompts solved at the end, and the tokens until solved if it was."""

    folder: Path
    lr: float
    tokens: int
    copy_gain: float
    held_out: Mapping[str, float]
    solved_after: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTuning(Tuning):
    """The fine-tuning of one model at one learning rate, the same for all tasks that it is evaluated on."""

    @property
    def title(self) -> str:
        return f"fine-tune {self.model_title} lr {self.rate:g}"

    @property
    def rate(self) -> float:
        return self.config.finetune_lrs[0]

    def schedule(self) -> "TrainConfig":
        """Return steps, at most, and optimizer settings."""
        config = self.config
        of_step = dataclasses.replace(config, batch_tokens=config.finetune_batch_tokens or config.batch_tokens)
        training = train_config(of_step, tokens=config.finetune, length=self.length, lr=self.rate, seed=self.seed)
        return dataclasses.replace(
            training,
            schedule="constant",
            warmup=min(training.steps, WARMUP),
            check_every=-(-training.steps // self._looks(training)),
        )

    def _looks(self, training: "TrainConfig") -> int:
        each = len(self.config.finetune_tasks) * HELD_OUT * training.length
        return max(1, min(LOOKS, int(3 * SHARE * training.tokens / each)))

    def run(self, trained: str, writer: "Writer", context: "RunContext", progress: "Progress") -> Path:
        """Fine-tune the model of checkpoint `trained`, unless a finished checkpoint exists, and return the folder."""
        return self.tuned(trained, writer, context, progress).folder

    def tuned(self, trained: str, writer: "Writer", context: "RunContext", progress: "Progress") -> Tuned:
        """Fine-tune the model of checkpoint `trained`, unless a finished checkpoint exists, and return what came of
        it."""
        from sbeval.models.decoder import Decoder
        from sbeval.pretrained import load
        from sbeval.training import checkpoint
        from sbeval.training.trainer import Trainer

        config, training = self.config, self.schedule()
        digest = load.digest(trained)
        held_out = {name: writer.path(name, self.length, 0, "validation").stem for name in config.finetune_tasks}
        key = [digest, training, "packed", config.finetune_needles, config.finetune_rest, config.finetune_prompts]
        with context.checkpoint([*key, held_out, HELD_OUT, SOLVED], progress) as folder:
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
                self._train(trainer, writer, context, progress)
        return self._read(folder, training)

    def _batches(self, writer: "Writer", training: "TrainConfig", progress: "Progress") -> "LessonBatches":
        from sbeval.evaluation import ruler_lessons

        config = self.config
        store = ruler_lessons.Store(writer)
        wanted = ruler_lessons.counts(
            config.finetune_prompts, config.finetune_tasks, training.length, config.finetune_needles
        )
        task = progress.add("write prompts to fine-tune on", total=sum(wanted.values()))
        stored = {key: store.lessons(*key, count, advance=task.advance) for key, count in wanted.items()}
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

    def _train(self, trainer: "Trainer", writer: "Writer", context: "RunContext", progress: "Progress") -> None:
        held_out = {
            name: writer.prompts(name, self.length, 0, HELD_OUT, use="validation")
            for name in self.config.finetune_tasks
        }
        batch = max(1, BATCH_TOKENS[context.device.type] // self.length)
        task = progress.add(self.title, trainer.config.steps, completed=trainer.state.step)

        def stop(decoder: "Decoder", state: "State") -> bool:
            decoder.eval()
            shares = {
                name: _greedy(decoder, prompts, context.device, self.dtype, batch, task.say)
                for name, prompts in held_out.items()
            }
            decoder.train()
            state.task_scores += [{"step": state.step, "task": name, "score": share} for name, share in shares.items()]
            state.scores.append((state.step, sum(shares.values()) / len(shares)))
            return min(shares.values()) >= SOLVED

        with context.logger(step_id(self)) as log:
            trainer.run(task, stop=stop, log=log)
        task.close()

    def _read(self, folder: Path, training: "TrainConfig") -> Tuned:
        from sbeval.training import checkpoint

        state, step_tokens = checkpoint.load_state(folder), training.batch * training.length
        solved: dict[str, int] = {}
        for look in state.task_scores:
            if look["score"] >= SOLVED:
                solved.setdefault(look["task"], look["step"] * step_tokens)
        return Tuned(
            folder=folder,
            lr=self.rate,
            tokens=state.step * step_tokens,
            copy_gain=state.diagnoses[0]["value"],
            held_out={look["task"]: look["score"] for look in state.task_scores},
            solved_after=solved,
        )


def best(candidates: Iterable[Tuned], budget: int) -> Tuned:
    """Return the model that solved the most tasks, then in the fewest tokens, then with the most held-out prompts right
    at the end; ties go to the smallest rate."""

    def rank(one: Tuned) -> tuple[float, ...]:
        tokens = [one.solved_after.get(task, budget) for task in one.held_out]
        return -len(one.solved_after), sum(tokens), -sum(one.held_out.values()), one.lr

    return min(candidates, key=rank)


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
