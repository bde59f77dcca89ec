"""What makes the numbers of a Hugging Face model another model's, found when it is loaded: each is an InputError."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sbeval.errors import InputError
from sbeval.evaluation.perplexity import Predictor

# dtypes of weights in safetensors that are numbers as they stand; those of others have a scale
PLAIN = ("BF16", "F16", "F32", "F64")
# change of a hidden state by later tokens, relative to its size, that is no rounding; models of experts round tokens in
# groups, which another token changes
LEAK, LEAK_OF_HALF = 1e-5, 5e-2


def complete(model: Any, found: Mapping[str, Any], spec: str) -> None:
    """Raise InputError unless the files gave every tensor of a model of transformers, and no other.

    found: what `from_pretrained` returns with output_loading_info.
    """
    if missing := found["missing_keys"]:
        raise InputError(f"the files of model {spec!r} lack {_names(missing)}: random numbers would stand in for it")
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise InputError(
            f"{name} of model {spec!r} has the shape {tuple(stored)}, and its config asks for {tuple(wanted)}"
        )
    if unexpected := found["unexpected_keys"]:
        raise InputError(f"the files of model {spec!r} have {_names(unexpected)}, which its config has no place for")
    if errors := found["error_msgs"]:
        raise InputError(f"model {spec!r} cannot be loaded: {str(errors[0]).splitlines()[0]}")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    one, other = embedding.weight, head.weight
    # on the meta device and in models with factored embeddings there is nothing to compare
    if one is not other and one.shape == other.shape and not torch.equal(one, other):
        raise InputError(
            f"the config of model {spec!r} ties its head to its embedding, and its files have two different ones: "
            "set tie_word_embeddings in config.json"
        )


def dtypes(folder: Path, spec: str) -> None:
    """Raise InputError for weights of integers or 8 bits in a folder whose config has no quantization."""
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return
    for path in sorted(folder.glob("model*.safetensors")):
        for name, entry in header(path).items():
            # old files have masks of attention, which nothing reads, beside the weights
            if name.endswith(".weight") and entry["dtype"] not in PLAIN:
                raise InputError(
                    f"{name} of model {spec!r} is {entry['dtype']}, and its config.json has no quantization_config "
                    "that says what its numbers mean"
                )


def header(path: Path) -> dict[str, Any]:
    """Return name, dtype and shape of the tensors of a safetensors file, which has been read before."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(size))
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


@torch.inference_mode()
def causal(
    model: Predictor, vocab_size: int, place: torch.device, dtype: torch.dtype, spec: str, *, longest: int | None = None
) -> None:
    """Raise InputError where another last token changes the hidden states before it. longest: row that it reads."""
    tokens = torch.arange(min(32, longest or 32), device=place)[None] * 7 % vocab_size
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocab_size
    states, changed = (model(row)[0, :-1].double() for row in (tokens, other))
    change = (states - changed).norm(dim=-1) / states.norm(dim=-1)
    if (change > (LEAK_OF_HALF if dtype.itemsize < 4 else LEAK)).any():
        raise InputError(
            f"model {spec!r} attends to later tokens, so its losses are none of prediction: "
            "give a causal language model"
        )


def _names(names: Iterable[str]) -> str:
    """Return the first name, and how many more there are."""
    # layer 2 before layer 10
    first, *others = sorted(names, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)])
    return f"{first} and {len(others)} more tensors" if others else first
