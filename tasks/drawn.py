"""Generated examples: batches by step, training with early stopping, and predictions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sbeval.models.decoder import IGNORE, Decoder
from sbeval.runtime import device, oom
from sbeval.runtime.progress import Progress
from sbeval.sweep.cell import cell_id
from sbeval.sweep.context import RunContext
from sbeval.tasks.synthetic import Scores, Synthetic
from sbeval.training.checkpoint import State
from sbeval.training.stepper import Batch
from sbeval.training.trainer import Batches, Trained, Trainer

EVAL_ROWS = 256
# steps whose examples are drawn together, with the kernel launches of one step
AHEAD = 16

Examples = TypeVar("Examples", bound=Batch)


class Drawn(Generic[Examples]):
    """Training batches by step: `rows` gives the row numbers of a step, `generate` a dataclass of tensors by row."""

    def __init__(self, rows: Callable[[int], Tensor], generate: Callable[[Tensor], Examples]) -> None:
        self._rows, self._generate = rows, generate
        self._together = functools.lru_cache(maxsize=1)(self._draw)

    def __getitem__(self, step: int) -> Examples:
        return self._together(step // AHEAD)[step % AHEAD]

    def _draw(self, number: int) -> list[Examples]:
        rows = [self._rows(step) for step in range(number * AHEAD, (number + 1) * AHEAD)]
        drawn: Any = self._generate(torch.cat(rows))
        parts = [getattr(drawn, field.name).split([len(part) for part in rows]) for field in dataclasses.fields(drawn)]
        return [type(drawn)(*tensors) for tensors in zip(*parts, strict=True)]


def train(
    cell: Synthetic,
    folder: Path,
    batches: Batches,
    validate: Callable[[Decoder], float],
    status: Callable[[Scores], str],
    context: RunContext,
    progress: Progress,
) -> Trained:
    """Train until `status` of the validation scores is not `budget`, unless `folder` has the finished model."""
    training = cell.training()
    trainer = Trainer(cell.model(), training, batches, folder, context.device)

    def stop(decoder: Decoder, state: State) -> bool:
        state.scores.append((state.step, validate(decoder)))
        return status(state.scores) != "budget"

    task = progress.add(f"train {cell.title}", total=training.steps, completed=trainer.state.step)
    with context.logger(cell_id(cell)) as log:
        trained = trainer.run(task, stop=stop, log=log)
    task.close()
    return trained


@torch.inference_mode()
def predict(decoder: Decoder, examples: Batch, dtype: str) -> Tensor:
    """Return whether the most likely token is the label, (B, L) bool; false where there is no label."""
    decoder.eval()
    parts: list[Tensor] = []

    def label(rows: Sequence[int]) -> None:
        tokens, targets = (x[rows[0] : rows[-1] + 1] for x in (examples.tokens, examples.targets))
        correct = torch.zeros_like(targets, dtype=torch.bool)
        scored = targets != IGNORE
        correct[scored] = decoder.logits(decoder(tokens)[scored]).argmax(-1) == targets[scored]
        parts.append(correct)

    with device.autocast(examples.tokens.device, dtype):
        oom.in_parts(range(len(examples.tokens)), EVAL_ROWS, label, print)
    decoder.train()
    return torch.cat(parts)
