"""Needle prompts with their answers as training batches: the loss is on the answer and the end of the document."""

from collections.abc import Sequence

import numpy as np
import torch

from sbeval.config import IGNORE
from sbeval.data.dataloader import Batch
from sbeval.data.tokenizer import Tokenizer
from sbeval.evaluation.ruler_prompts import Prompt


class Lessons:
    """Batches of `batch` prompts by step, each of (B, length) int64, as many as there are.

    tokens    p0 p1 p2 a0 a1 E  E         for the prompt p0 p1 p2 and the answer a0 a1
    targets   .  .  a0 a1 E  .  .         E ends a document; it also fills the row
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Tokenizer, length: int, batch: int) -> None:
        self._prompts, self._eos, self._length, self._batch = prompts, tokenizer.eos, length, batch

    def __getitem__(self, step: int) -> Batch:
        rows = self._prompts[step * self._batch : (step + 1) * self._batch]
        assert len(rows) == self._batch, f"there are {len(self._prompts)} prompts, too few for step {step}"
        tokens = np.full((len(rows), self._length + 1), self._eos, dtype=np.int64)
        targets = np.full((len(rows), self._length), IGNORE, dtype=np.int64)
        for place, prompt in enumerate(rows):
            # an answer may be longer than what RULER generates: what does not fit is cut
            text = np.concatenate([prompt.tokens, prompt.answer])[: self._length + 1]
            tokens[place, : len(text)] = text
            first, last = len(prompt.tokens) - 1, min(len(text), self._length)
            targets[place, first:last] = tokens[place, first + 1 : last + 1]
        return Batch(tokens=torch.from_numpy(tokens[:, :-1].copy()), targets=torch.from_numpy(targets), cu_seqlens=None)
