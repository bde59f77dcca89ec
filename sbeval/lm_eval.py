"""Our checkpoints as models of lm-eval's own command line, with all of its options, tasks and outputs:

    python -m sbeval.lm_eval run --model sbeval --model_args checkpoint=FOLDER,tokenizer=bytes --tasks lambada_openai

lm-eval finds models by name in a registry that no entry point extends, so the name must be added before its command
runs: that is all this module does. `lm_eval --model hf` loads what `sbeval export --code` writes.
"""

import sys
from pathlib import Path
from typing import Any

import lm_eval.models  # fills the registry, which it does only while that is empty
import platformdirs
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from sbeval.data import tokenizer as tokenizers
from sbeval.errors import InputError, choose
from sbeval.evaluation.lm_eval_tasks import Adapter, PlainText, hub_text
from sbeval.pretrained import load
from sbeval.runtime import device as devices

# tokens of a forward pass, and of an input where the checkpoint does not say how long its training was
BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16}
LENGTH = 2048
# keys of --model_args
KEYS = ("checkpoint", "tokenizer", "length", "dtype", "device", "batch_size", "max_batch_size", "trust_remote_code")
# what lm-eval asks for where no --device is given, GPU or not
DEFAULT_DEVICE = "cuda:0"


class CheckpointLM(Adapter):
    """A model of sbeval for lm-eval.

    checkpoint: a folder. tokenizer: that of its training, `bytes`, a tokenizer.json or a Hugging Face name. length:
    maximum input tokens, by default the training length. `--batch_size` counts inputs of `length` tokens of a forward
    pass.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        tokenizer: str = "bytes",
        length: int | str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **others: object,
    ) -> None:
        for name in others:
            choose("key of --model_args", name, KEYS)
        if checkpoint is None:
            raise InputError("--model sbeval needs a folder: --model_args checkpoint=FOLDER")
        if length is not None:
            length = _count("length", length)
        if batch_size is not None and not str(batch_size).startswith("auto"):
            batch_size = _count("batch_size", batch_size)
        if device == DEFAULT_DEVICE and not torch.cuda.is_available():
            print(f"sbeval: there is no GPU for lm-eval's default device {device}: on cpu", file=sys.stderr)
            device = None
        place = devices.pick(device)
        dtype = devices.pick_dtype(dtype, place)
        model = load.load(checkpoint, place, dtype, trust_remote_code=bool(trust_remote_code))
        if load.is_own(checkpoint):
            own = tokenizers.load(tokenizer, cache_dir=Path(platformdirs.user_cache_dir("sbeval")))
            model.check_tokenizer(own, checkpoint)
            text: Any = PlainText(own)
        else:
            text = hub_text(checkpoint, model.vocab_size, bool(trust_remote_code))
        length = length or model.train_len or LENGTH
        model.check_length(length, checkpoint)
        batch = BATCH_TOKENS[place.type]
        if isinstance(batch_size, int):
            batch = batch_size * length
        super().__init__(model.model, text, length=length, place=place, dtype=dtype, batch_tokens=batch)


def _count(name: str, given: object) -> int:
    """Return a value of --model_args or an option of lm-eval as a number of 1 or more."""
    if not str(given).isdecimal() or int(str(given)) < 1:
        raise InputError(f"{name} must be a whole number of 1 or more; got {given}")
    return int(str(given))


def register() -> None:
    """Add the name `sbeval` to lm-eval's models."""
    assert lm_eval.models
    if "sbeval" not in model_registry:
        model_registry.register("sbeval", target=CheckpointLM)


def main() -> None:
    """Run lm-eval's command line with our model; an InputError is printed as one line, with exit code 2."""
    register()
    try:
        cli_evaluate()
    except InputError as error:
        print(f"sbeval: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
