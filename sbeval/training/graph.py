"""A training step as a CUDA graph: recorded once and then launched whole.

The kernels of a small model are shorter than their launches from Python, above all Muon's: launched one by one, they
leave a GPU idle for much of a step.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# steps that run as they are before one is recorded: code is compiled and the optimizer's state created in them
WARM_UP = 3
# what torch warns of where something waits for the GPU
WAITED = "called a synchronizing CUDA operation"
# graphs that could not be recorded, kept since torch's allocator (to 2.12) still calls them
_unfinished: list[torch.cuda.CUDAGraph] = []


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yield a list which at the end of the block has a line for each time that it waited for the GPU, as torch knows.

    What runs kernels or waits without torch is not known: `Graph` then raises an error.
    """
    before, lines = torch.cuda.get_sync_debug_mode(), list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # of the mode itself
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in caught:
        if WAITED in str(one.message):
            lines.append(f"{one.filename}:{one.lineno}")
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def refused(error: RuntimeError) -> bool:
    """Return whether a step ran but cannot be recorded: the errors of CUDA, torch and Triton then say so."""
    return not isinstance(error, torch.OutOfMemoryError) and "captur" in str(error)


class Graph:
    """The kernels of `step(tokens, targets) -> loss`, recorded when this is made and run by each call.

    Weights, the optimizer's state and learning rates must be tensors that stay where they are, and nothing may wait for
    the GPU: see `waits` and `refused`. The step must have run on `stream` before. Recording runs nothing.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, targets: Tensor, stream: "torch.cuda.Stream"
    ) -> None:
        self._tokens, self._targets = tokens.clone(), targets.clone()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._loss = step(self._tokens, self._targets)
        except RuntimeError as error:
            if refused(error):
                _unfinished.append(self._graph)
                # it would take part in the recording for ever, and draw nothing outside it
                generator = torch.cuda.default_generators[stream.device.index]
                generator.graphsafe_set_state(generator.clone_state())
            raise

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run the step on a batch of the same shape; return its loss."""
        self._tokens.copy_(tokens)
        self._targets.copy_(targets)
        self._graph.replay()
        # the next replay overwrites it
        return self._loss.clone()
