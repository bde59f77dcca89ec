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
from sbeval.errors import InputError
from sbeval.evaluation.lm_eval_model import Adapter, HubText, PlainText
from sbeval.pretrained import load
from sbeval.runtime import device as devices

# tokens of a forward pass, and of an input where the checkpoint does not say how long its training was
BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16}
LENGTH = 2048
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
        checkpoint: str,
        tokenizer: str = "bytes",
        length: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
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
            from transformers import AutoTokenizer

            text = HubText(AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=bool(trust_remote_code)))
        length = int(length or model.train_len or LENGTH)
        model.check_length(length, checkpoint)
        batch = BATCH_TOKENS[place.type]
        if batch_size not in (None, "auto"):
            batch = int(str(batch_size)) * length
        super().__init__(model.model, text, length=length, place=place, dtype=dtype, batch_tokens=batch)


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
        raise SystemExit(f"sbeval: {error}") from None


if __name__ == "__main__":
    main()
