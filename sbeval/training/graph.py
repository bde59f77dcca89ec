"""A training step as a CUDA graph: recorded once and then launched whole.

The kernels of a small model are shorter than their launches from Python, above all Muon's: launched one by one, they
leave a GPU idle for much of a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# steps that run as they are before one is recorded: code is compiled and the optimizer's state created in them
WARM_UP = 3


class Graph:
    """The kernels of `step(tokens, targets) -> loss`, recorded when this is made and run by each call.

    Weights, the optimizer's state and learning rates must be tensors that stay where they are, and nothing may wait for
    the GPU. The step must have run on `stream` before. Recording runs nothing.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, targets: Tensor, stream: "torch.cuda.Stream"
    ) -> None:
        self._tokens, self._targets = tokens.clone(), targets.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._loss = step(self._tokens, self._targets)

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run the step on a batch of the same shape; return its loss."""
        self._tokens.copy_(tokens)
        self._targets.copy_(targets)
        self._graph.replay()
        # the next replay overwrites it
        return self._loss.clone()
