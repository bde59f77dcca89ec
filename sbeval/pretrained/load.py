"""Load pretrained models: our checkpoints, released stick-breaking models, or causal language models of Hugging Face.

Weights are read from safetensors alone, and code that comes with a model runs only with --trust-remote-code.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sbeval import registry
from sbeval.data.tokenizer import Tokenizer, check_same
from sbeval.errors import InputError, first_line
from sbeval.evaluation.perplexity import Predictor
from sbeval.models.decoder import Decoder
from sbeval.pretrained import released
from sbeval.runtime import device
from sbeval.runtime.files import sha256
from sbeval.training import checkpoint

# names of caches in models of transformers; not the `state` of RWKV, which mixes the rows of a batch there
CACHES = ("past_key_values", "cache_params")
# names in their configs of c, where logits x become c tanh(x / c)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# architectures of transformers whose table of positions is not a parameter, and the name of its length in their configs
FIXED = {"codegen": "n_positions", "ctrl": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}
# files of their tokenizers
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A model and its columns of a result table.

    train_len, tokenizer (a digest): None if its files do not record them. positions: the size of its table of
    positions, None if it has none.
    """

    model: Predictor
    name: str
    attention: str
    options: str
    params: int
    vocab_size: int
    train_len: int | None
    backend: str
    positions: int | None
    tokenizer: str | None = None

    def check_tokenizer(self, text: Tokenizer, spec: str) -> None:
        """Raise InputError when a tokenizer has more tokens than the model of `spec`, or is not its own."""
        if text.vocab_size > self.vocab_size:
            raise InputError(
                f"tokenizer {text.name!r} has {text.vocab_size} tokens and the model of {spec} {self.vocab_size}: "
                "give the --tokenizer that it was trained with"
            )
        check_same(self.tokenizer, text, spec)

    def check_length(self, length: int, spec: str) -> None:
        """Raise InputError when `length` tokens exceed the positions of the model of `spec`."""
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"the model of {spec} has a table of {self.positions} positions and can't read {length} tokens: "
                f"give {self.positions} or less"
            )


class HubModel(nn.Module):
    """A model of transformers, split into hidden states and logits."""

    # not all their architectures are exact with padding
    ragged = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.head = model.base_model, model.get_output_embeddings()
        if self.head is None or self.body is model:
            raise InputError(f"{type(model).__name__} is not supported: it has no separate body and head")
        # hidden states of some models are float32
        self.dtype: torch.dtype = model.dtype
        # as in their generate()
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        config = model.config.get_text_config()
        self.cap: float | None = next((cap for name in CAPS if (cap := getattr(config, name, None))), None)
        self.factor = self._factor(model)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden.to(self.dtype))
        return self._scaled(logits, self.factor)

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, dict[str, Any]]:
        """Return hidden states (B, width) of the last tokens of equally long prompts, and the next pass's arguments.

        These are the model's cache by its name, or all tokens if it has no cache that can be used.
        """
        tokens = torch.tensor(prompts, device=self.head.weight.device)
        output = self.body(input_ids=tokens, use_cache=True)
        past = {name: cache for name in CACHES if (cache := getattr(output, name, None)) is not None}
        if not past:
            return self(tokens)[:, -1], {"input_ids": tokens}
        if self.takes_positions:
            # hybrid models can't derive these from their caches
            past["position_ids"] = torch.full_like(tokens[:, :1], tokens.shape[1])
        return output.last_hidden_state[:, -1], past

    def extend(self, tokens: Tensor, cache: dict[str, Any]) -> Tensor:
        """Return hidden states (B, 1, width) of one further token of each row."""
        if "input_ids" in cache:
            cache["input_ids"] = torch.cat([cache["input_ids"], tokens], 1)
            states: Tensor = self(cache["input_ids"])
            return states[:, -1:]
        output = self.body(input_ids=tokens, use_cache=True, **cache)
        cache.update((name, output[name]) for name in CACHES if name in cache)
        if self.takes_positions:
            cache["position_ids"] = cache["position_ids"] + 1
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _scaled(self, logits: Tensor, factor: float) -> Tensor:
        logits = logits * factor
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    @torch.inference_mode()
    def _factor(self, model: Any) -> float:
        """Return the factor between the head's output and the model's logits; 1 for most models.

        The head gets hidden states of several sizes, since a cap changes large logits and not small ones. Raise
        InputError when logits differ by more than a factor and the cap.
        """
        tokens = torch.arange(8, device=model.device)[None]
        hidden = self(tokens).to(self.dtype)
        # scale the largest logit of each token to 0.1 ... 100
        sizes = torch.logspace(-1, 2, 8, device=hidden.device)[:, None]
        scale: Tensor = sizes / self.head(hidden).float().abs().amax(-1, keepdim=True)

        def resized(_head: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            return (inputs[0] * scale).to(inputs[0].dtype)

        plain = self.head(resized(self.head, (hidden,)))[0].float()
        hook = self.head.register_forward_pre_hook(resized)
        try:
            wanted = model(input_ids=tokens, use_cache=False).logits[0].float()
        finally:
            hook.remove()
        smallest = wanted[0] if self.cap is None else torch.atanh(wanted[0] / self.cap) * self.cap
        factor = float((smallest * plain[0]).sum() / plain[0].square().sum())
        # exactly 1 in float32
        factor = 1.0 if abs(factor - 1) < 1e-3 else factor
        error = (self._scaled(plain, factor) - wanted).abs()
        if not (error <= 2e-2 * (wanted.abs() + wanted.std(-1, keepdim=True))).all():
            raise InputError(
                f"{type(model).__name__} is not supported: it changes its head's logits by more than a factor and a cap"
            )
        return factor


def is_own(spec: str) -> bool:
    """Return whether `spec` is a checkpoint folder of ours."""
    try:
        return {"model", "state"} <= set(json.loads((Path(spec) / "config.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def load(spec: str, place: torch.device, dtype: str, *, trust_remote_code: bool = False) -> Pretrained:
    """Load the model at a path, or of that name on the Hugging Face hub; raise InputError when it cannot be read."""
    if is_own(spec):
        return _own(Path(spec), place)
    if (folder := _released(spec)) is None:
        return _from_hub(spec, place, dtype, trust_remote_code)
    return _read(spec, folder, place, dtype)


def digest(spec: str) -> str:
    """Return a digest of a model's weights and tokenizer: 16 hexadecimal digits for a folder, a commit for the hub.

    Downloads the config of a model on the hub. Raise InputError when there is no such model.
    """
    folder = Path(spec)
    if not os.path.isdir(folder):
        try:
            return Path(_hub().hf_hub_download(spec, "config.json")).parent.name
        except (OSError, ValueError) as error:
            raise InputError(f"no model {spec!r} in a folder or on the hub: {first_line(error)}") from None
    folder = checkpoint.find(folder) or folder
    total = hashlib.sha256()
    tokenizer = (path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    for path in sorted([folder / "config.json", *tokenizer, *folder.glob("*.safetensors")]):
        # the optimizer's state is not part of the model
        if path.is_file() and path.name != "optimizer.safetensors":
            total.update(bytes.fromhex(sha256(path)))
    return total.hexdigest()[:16]


def likely_parameters(spec: str) -> int:
    """Return the most parameters of a model in a folder, by the size of its files; 0 for one of the hub."""
    return sum(path.stat().st_size for path in Path(spec).glob("model*.safetensors")) // (4 if is_own(spec) else 2)


def _own(folder: Path, place: torch.device) -> Pretrained:
    model = checkpoint.load_model(folder, place).eval()
    tokenizer = checkpoint.training_tokenizer(folder)
    return _decoder(model, name(str(folder)), checkpoint.training_length(folder), place, tokenizer)


def _decoder(
    model: Decoder, name: str, train_len: int | None, place: torch.device, tokenizer: str | None = None
) -> Pretrained:
    method, _, options = model.config.attention.partition(":")
    return Pretrained(
        model=model,
        name=name,
        attention=method,
        options=options,
        params=model.n_parameters(),
        vocab_size=model.config.vocab_size,
        train_len=train_len,
        backend=registry.method(method).backend_name(place.type),
        positions=model.config.positions or None,
        tokenizer=tokenizer,
    )


def name(spec: str) -> str:
    """Return the model's name in tables: the name of its folder, or its name on the hub."""
    # os.path returns False for an invalid path, where Path raises
    return Path(spec).resolve().name if os.path.isdir(spec) else spec


def _released(spec: str) -> Path | None:
    """Return the folder of a released stick-breaking model, downloaded if on the hub; None for another model."""
    if os.path.isdir(folder := Path(spec)):
        try:
            config = json.loads((folder / "config.json").read_text())
        # transformers, tried next, reports the error
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
    # raised for an unknown name, and without network
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
    # registers our models, as `sbeval export` writes them
    from sbeval import hf

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            spec, dtype=device.DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code
        )
    # raised for an unknown name, without network, for files that it cannot read, and for custom code
    except released.broken() as error:
        if "custom code" in str(error):
            raise InputError(
                f"model {spec!r} comes with code of its own, which is not run; --trust-remote-code runs it"
            ) from None
        raise InputError(f"no causal language model {spec!r}: {released.explained(spec, error)}") from None
    model = model.to(place).eval()
    if isinstance(model, hf.SbevalForCausalLM):
        return _decoder(model.decoder, name(spec), model.config.train_len, place)
    text, positions = model.config.get_text_config(), _positions(model)
    return Pretrained(
        model=HubModel(model),
        name=name(spec),
        attention="hf",
        options=str(text.model_type),
        params=sum(x.numel() for x in model.parameters()),
        vocab_size=text.vocab_size,
        train_len=getattr(text, "max_position_embeddings", positions),
        backend=str(text._attn_implementation),
        positions=positions,
    )


class _Tables(TorchDispatchMode):
    """Record the lengths of parameter tables that a pass over one row reads at consecutive rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.ends: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            table, rows = args[0], args[1].flatten()
            if isinstance(table, nn.Parameter) and rows.numel() > 1 and bool((rows.diff() == 1).all()):
                # some tables have rows before the first position
                self.ends.append(len(table) - int(rows[0]))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def _positions(model: Any) -> int | None:
    """Return the size of a model's table of positions; None if it has none.

    Configs do not tell: rotary models have the same fields, and read longer texts.
    """
    config = model.config.get_text_config()
    if config.model_type in FIXED:
        return int(getattr(config, FIXED[config.model_type]))
    # tokens in an order that positions never have
    tokens = torch.arange(7, -1, -1, device=model.device)[None]
    with _Tables() as tables:
        model(input_ids=tokens, use_cache=False)
    return min(tables.ends, default=None)
