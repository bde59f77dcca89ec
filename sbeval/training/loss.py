"""The loss of a model as a module, compiled on a GPU, and which code the compiler keeps."""

import torch
from torch import Tensor, nn

from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder

# models that the compiler holds code of, and the shapes that need code of their own
_compiled: set[tuple[ModelConfig, object]] = set()


def make_room(model: ModelConfig, variant: object) -> None:
    """Drop compiled code of other models: it is useless, and past a limit nothing more is compiled.

    Models that differ in their weights alone share it, so a sweep over learning rates and seeds compiles once.
    """
    # imported here: it takes seconds, and on a CPU nothing is compiled
    from torch._dynamo import config

    if any(model != other for other, _ in _compiled) or len(_compiled | {(model, variant)}) > config.recompile_limit:
        forget()
    _compiled.add((model, variant))


def forget() -> None:
    """Drop all compiled code."""
    torch.compiler.reset()
    _compiled.clear()


class Loss(nn.Module):
    """A model's loss as a module, the unit of compilation, DDP and FSDP."""

    def __init__(self, model: Decoder, sparse: bool, capacity: int | None) -> None:
        super().__init__()
        self.model, self.sparse, self.capacity = model, sparse, capacity
        self.score = model.score

    def forward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        if weights is not None:
            return self.score(self.model(tokens, cu_seqlens), targets, weights)
        if self.sparse:
            return self.model.sparse_loss(tokens, targets, cu_seqlens, self.capacity)
        return self.score(self.model(tokens, cu_seqlens), targets)

    def compile_parts(self, *, in_place: bool) -> None:
        """Compile a block, whose code all blocks share, and the score: a whole model takes many times as long.

        in_place: every call of a block runs the compiled code, not those of training alone.
        """
        if in_place:
            for block in self.model.blocks:
                block.compile()
        else:
            self.model.compile_blocks()
        # eager, it would hold several float32 copies of the logits; not if sparse, as the number of positions varies
        if not self.sparse:
            self.score = torch.compile(self.model.score)
