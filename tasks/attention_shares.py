"""Attention weights of recall's queries on the latest value of their key, on stale ones, and on all else."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sbeval.data.recall import Recall
from sbeval.errors import InputError
from sbeval.models.attention_weights import attention_weights
from sbeval.models.decoder import IGNORE, Decoder
from sbeval.runtime import oom
from sbeval.tables import statistics
from sbeval.tasks.recall_data import Examples, label

# weights in memory at a time
CHUNK = 1 << 23
# smaller weights of the example have no row: in the figure they look like 0
LEAST = 0.001
TARGETS = ("latest", "stale", "own", "other")


def targets(examples: Examples, task: Recall) -> tuple[Tensor, Tensor]:
    """Return masks of the latest value of each query and of the stale ones, bool (B, query, key) each."""
    tokens = examples.tokens
    position = torch.arange(tokens.shape[1], device=tokens.device)
    before = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
    assigned = (before[:, None] == tokens[:, :, None]) & (tokens >= task.half)[:, None]
    assigned &= (position < position[:, None]) & (examples.targets != IGNORE)[:, :, None]
    latest = assigned & (position == position[:, None] - examples.distance[:, :, None])
    return latest, assigned & ~latest


def chosen(examples: Examples, start: int) -> int:
    """Return the number of the first example, from `start` on, with a query of a key with two or more stale values."""
    fits = (examples.stale >= 2).any(1)
    fits[:start] = False
    if not fits.any():
        raise InputError(
            f"no test example from number {start} on has a query of a key with two stale values; "
            "give a smaller --example, more --test-rows or more --kv-pairs"
        )
    return int(fits.long().argmax())


def shares(
    decoder: Decoder, examples: Examples, task: Recall, say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Yield mean weights on each target at queries with stale values by layer and head; errors are over examples."""
    wanted = (examples.stale > 0).float()
    shape, length = decoder.config, task.seq_len
    rows = max(1, CHUNK // (shape.layers * shape.heads * length**2))
    parts: list[Tensor] = []

    def add(some: Sequence[int]) -> None:
        part = slice(some[0], some[-1] + 1)
        weights = attention_weights(decoder, examples.tokens[part])
        latest, stale = targets(_part(examples, part), task)
        own = torch.eye(length, dtype=torch.bool, device=latest.device).expand_as(latest)
        masks = torch.stack([latest, stale, own, ~(latest | stale | own)]).float()
        # (layers, targets, B, H): sums over the keys of a target and the wanted queries
        parts.append(torch.einsum("lbhij,tbij,bi->ltbh", weights, masks, wanted[part]))

    oom.in_parts(range(len(wanted)), rows, add, say)
    sums, counts = torch.cat(parts, 2).double().cpu().numpy(), wanted.sum(1).double().cpu().numpy()
    for layer in range(shape.layers):
        for head in range(shape.heads):
            for index, target in enumerate(TARGETS):
                share = statistics.ratio(sums[layer, index, :, head], counts)
                yield {
                    "metric": "share",
                    "unit": "1",
                    "value": share.value,
                    "stderr": share.stderr,
                    "n": share.n,
                    "layer": layer + 1,
                    "head": head + 1,
                    "target": target,
                    "split": "stale",
                }


def _part(examples: Examples, rows: slice) -> Examples:
    return Examples(examples.tokens[rows], examples.targets[rows], examples.stale[rows], examples.distance[rows])


def example_rows(decoder: Decoder, tokens: Tensor, task: Recall) -> Iterator[dict[str, Any]]:
    """Yield the tokens of one example (L,), and the weights of every layer and head that are large enough to see."""
    for position, token in enumerate(tokens.tolist()):
        yield {"metric": "token", "unit": "1", "value": float(token), "n": 1, "key": position}
    latest, stale = (mask[0].cpu() for mask in targets(label(task, tokens[None]), task))
    weights = attention_weights(decoder, tokens[None])[:, 0].cpu()
    # weights on targets always have a row, from which the figure knows the targets
    for index in ((weights >= LEAST) | latest | stale).nonzero().tolist():
        layer, head, query, key = index
        target = "latest" if latest[query, key] else "stale" if stale[query, key] else ""
        yield {
            "metric": "weight",
            "unit": "1",
            "value": round(max(0.0, weights[tuple(index)].item()), 4),
            "n": 1,
            "layer": layer + 1,
            "head": head + 1,
            "query": query,
            "key": key,
            "target": target,
        }
