"""Models that are there already: a checkpoint folder of ours, a released stick-breaking model, or a causal language
model of Hugging Face's.

Weights are read from safetensors alone, and code that comes with a model is not run unless the user says so.
"""

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbeval import checkpoint, device, registry, released
from sbeval.errors import InputError, first_line
from sbeval.model import Decoder
from sbeval.perplexity import Predictor
from sbeval.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A model with what a table says of it, and the digest of its tokenizer. `train_len` and `tokenizer` are None where
    its files do not say it."""

    model: Predictor
    name: str
    attention: str
    options: str
    params: int
    vocab_size: int
    train_len: int | None
    backend: str
    tokenizer: str | None = None

    def check_tokenizer(self, text: Tokenizer, spec: str) -> None:
        """InputError when a tokenizer has more tokens than the model, which `spec` names, or is not its own."""
        if text.vocab_size > self.vocab_size:
            raise InputError(
                f"tokenizer {text.name!r} has {text.vocab_size} tokens and the model of {spec} {self.vocab_size}: "
                "give the --tokenizer it was trained with"
            )
        if self.tokenizer not in (None, text.digest):
            raise InputError(
                f"the model of {spec} was trained with another tokenizer than {text.name!r}: give the --tokenizer, and "
                "for bpe:SIZE the --corpus, that it was trained with"
            )


class HubModel(nn.Module):
    """A model of transformers in two steps: hidden states, then logits."""

    # not every architecture of theirs is exact with padding
    ragged = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.head = model.base_model, model.get_output_embeddings()
        self.factor = _factor(model, self.body, self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden) * self.factor
        return logits

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Any]:
        """Hidden states (B, width) of the last token of each prompt, which are equally long, and the model's cache."""
        tokens = torch.tensor(prompts, device=self.head.weight.device)
        found = self.body(input_ids=tokens, use_cache=True)
        return found.last_hidden_state[:, -1], found.past_key_values

    def extend(self, tokens: Tensor, cache: Any) -> Tensor:
        """Hidden states (B, 1, width) of one further token of each row."""
        hidden: Tensor = self.body(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden


def is_own(spec: str) -> bool:
    """Whether `spec` is a checkpoint folder of ours."""
    try:
        return {"model", "state"} <= set(json.loads((Path(spec) / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def load(spec: str, place: torch.device, dtype: str, *, trust_remote_code: bool = False) -> Pretrained:
    """The model at a path, or of that name on the Hugging Face hub; InputError when there is none that can be read."""
    if is_own(spec):
        return _own(Path(spec), place)
    if (folder := _released(spec)) is None:
        return _from_hub(spec, place, dtype, trust_remote_code)
    return _read(spec, folder, place, dtype)


def digest(spec: str) -> str:
    """What stands for a model's weights: sixteen hexadecimal digits for those in a folder, on the hub their commit.

    Of a model on the hub there is a copy of its config afterwards; InputError when there is no such model.
    """
    folder = Path(spec)
    if not folder.is_dir():
        try:
            return Path(_hub().hf_hub_download(spec, "config.json")).parent.name
        except (OSError, ValueError) as error:
            raise InputError(f"no model {spec!r} in a folder or on the hub: {first_line(error)}") from None
    folder = checkpoint.find(folder) or folder
    found = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        # the moments of an optimizer are no part of the model
        if path.is_file() and path.name != "optimizer.safetensors":
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def likely_parameters(spec: str) -> int:
    """Parameters of a model in a folder, by the size of its files at two bytes each at least; 0 for one of the hub."""
    return sum(path.stat().st_size for path in Path(spec).glob("model*.safetensors")) // (4 if is_own(spec) else 2)


def _own(folder: Path, place: torch.device) -> Pretrained:
    model = checkpoint.load_model(folder, place).eval()
    tokenizer = checkpoint.training_tokenizer(folder)
    return _decoder(model, folder.resolve().name, checkpoint.training_length(folder), place, tokenizer)


def _decoder(
    model: Decoder, name: str, train_len: int | None, place: torch.device, tokenizer: str | None = None
) -> Pretrained:
    method, _, options = model.config.attention.partition(":")
    return Pretrained(
        model=model, name=name, attention=method, options=options, params=model.n_parameters(),
        vocab_size=model.config.vocab_size, train_len=train_len,
        backend=registry.method(method).backend_name(place.type), tokenizer=tokenizer,
    )  # fmt: skip


def name(spec: str) -> str:
    """What a table calls it: a folder's own name, or the hub's."""
    return Path(spec).resolve().name if Path(spec).is_dir() else spec


def _released(spec: str) -> Path | None:
    """The folder of a released stick-breaking model, fetched where it is on the hub; None where it is another model."""
    if (folder := Path(spec)).is_dir():
        try:
            config = json.loads((folder / "config.json").read_text())
        # transformers, which is asked next, says what is wrong
        except (OSError, ValueError, RecursionError):
            return None
        return folder if released.is_released(config) else None
    try:
        config = json.loads(Path(_hub().hf_hub_download(spec, "config.json")).read_text())
        if not released.is_released(config):
            return None
        return Path(_hub().snapshot_download(spec, allow_patterns=list(released.FILES)))
    except ImportError:
        return None
    # what it raises for a name that is unknown or out of reach
    except (OSError, ValueError) as error:
        raise InputError(f"no causal language model {spec!r}: {first_line(error)}") from None


def _hub() -> Any:
    return importlib.import_module("huggingface_hub")


def _read(spec: str, folder: Path, place: torch.device, dtype: str) -> Pretrained:
    model, train_len = released.load(folder, device.DTYPES[dtype])
    return _decoder(model.to(place).eval(), name(spec), train_len, place)


def _from_hub(spec: str, place: torch.device, dtype: str, trust_remote_code: bool) -> Pretrained:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise InputError(f"model {spec!r} needs transformers: pip install 'sbeval[hf]'") from None
    # registers ours, as `sbeval export` writes them
    from sbeval import hf

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            spec, dtype=device.DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code
        )
    # what it raises for a name that is unknown or out of reach, for files that it cannot read, and for code
    except (OSError, ValueError, KeyError) as error:
        if "custom code" in str(error):
            raise InputError(
                f"model {spec!r} comes with code of its own, which is not run; --trust-remote-code runs it"
            ) from None
        raise InputError(f"no causal language model {spec!r}: {first_line(error)}") from None
    model = model.to(place).eval()
    if isinstance(model, hf.SbevalForCausalLM):
        return _decoder(model.decoder, name(spec), model.config.train_len, place)
    text = model.config.get_text_config()
    return Pretrained(
        model=HubModel(model), name=name(spec), attention="hf",
        options=str(text.model_type), params=sum(x.numel() for x in model.parameters()),
        vocab_size=text.vocab_size, train_len=getattr(text, "max_position_embeddings", None),
        backend=str(text._attn_implementation),
    )  # fmt: skip


@torch.inference_mode()
def _factor(model: Any, body: Any, head: Any) -> float:
    """What the model's logits are to those of its head: some are scaled; InputError where it is not that simple."""
    tokens = torch.arange(8, device=model.device)[None]
    wanted = model(input_ids=tokens, use_cache=False).logits.float()
    plain = head(body(input_ids=tokens, use_cache=False).last_hidden_state).float()
    factor = float((wanted * plain).sum() / plain.square().sum())
    if not torch.allclose(wanted, plain * factor, rtol=2e-2, atol=2e-2 * float(wanted.std())):
        raise InputError(f"{type(model).__name__} changes the logits of its head by more than a factor: not supported")
    # a factor of 1 is exactly that in float32
    return 1.0 if abs(factor - 1) < 1e-3 else factor
