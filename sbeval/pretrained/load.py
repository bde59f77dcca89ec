"""Models that are there already: a checkpoint folder of ours, a released stick-breaking model, or a causal language
model of Hugging Face's.

Weights are read from safetensors alone, and code that comes with a model is not run unless the user says so.
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
from sbeval.training import checkpoint

# what models of transformers call their caches; the `state` of RWKV is not used, which there mixes the rows of a batch
CACHES = ("past_key_values", "cache_params")
# what their configs call c where logits x become c tanh(x / c)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# architectures of transformers with a table of positions that is no parameter, and what their configs call its length
FIXED = {"codegen": "n_positions", "ctrl": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}
# what a tokenizer of theirs is read from
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A model with what a table says of it. `train_len`, and `tokenizer`, a digest, are None where its files do not say
    them. positions: tokens that its table of positions has room for, None where it has no such table."""

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
        """InputError when a tokenizer has more tokens than the model, which `spec` names, or is not its own."""
        if text.vocab_size > self.vocab_size:
            raise InputError(
                f"tokenizer {text.name!r} has {text.vocab_size} tokens and the model of {spec} {self.vocab_size}: "
                "give the --tokenizer it was trained with"
            )
        check_same(self.tokenizer, text, spec)

    def check_length(self, length: int, spec: str) -> None:
        """InputError when so many tokens are more than the model, which `spec` names, has positions for."""
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"the model of {spec} has a table of {self.positions} positions and can't read {length} tokens: "
                f"ask for {self.positions} at most"
            )


class HubModel(nn.Module):
    """A model of transformers in two steps: hidden states, then logits."""

    # not every architecture of theirs is exact with padding
    ragged = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.head = model.base_model, model.get_output_embeddings()
        if self.head is None or self.body is model:
            raise InputError(f"{type(model).__name__} has no body and head of its own: not supported")
        # some keep hidden states in float32
        self.dtype: torch.dtype = model.dtype
        # as their generate() asks
        self.placed = "position_ids" in inspect.signature(model.forward).parameters
        shape = model.config.get_text_config()
        self.cap: float | None = next((cap for name in CAPS if (cap := getattr(shape, name, None))), None)
        self.factor = self._factor(model)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden.to(self.dtype))
        return self._changed(logits, self.factor)

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states (B, width) of the last token of each prompt, which are equally long, and what a pass over the
        next token is given: the model's cache by its name, or all tokens where it has none to use."""
        tokens = torch.tensor(prompts, device=self.head.weight.device)
        found = self.body(input_ids=tokens, use_cache=True)
        past = {name: kept for name in CACHES if (kept := getattr(found, name, None)) is not None}
        if not past:
            return self(tokens)[:, -1], {"input_ids": tokens}
        if self.placed:
            # hybrid models can't tell it from their caches
            past["position_ids"] = torch.full_like(tokens[:, :1], tokens.shape[1])
        return found.last_hidden_state[:, -1], past

    def extend(self, tokens: Tensor, cache: dict[str, Any]) -> Tensor:
        """Hidden states (B, 1, width) of one further token of each row."""
        if "input_ids" in cache:
            cache["input_ids"] = torch.cat([cache["input_ids"], tokens], 1)
            whole: Tensor = self(cache["input_ids"])
            return whole[:, -1:]
        found = self.body(input_ids=tokens, use_cache=True, **cache)
        cache.update((name, found[name]) for name in CACHES if name in cache)
        if self.placed:
            cache["position_ids"] = cache["position_ids"] + 1
        hidden: Tensor = found.last_hidden_state
        return hidden

    def _changed(self, logits: Tensor, factor: float) -> Tensor:
        logits = logits * factor
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    @torch.inference_mode()
    def _factor(self, model: Any) -> float:
        """What the model's logits are to those of its head: some are scaled.

        The head is given hidden states of several sizes: what bends large logits leaves small ones as they are.
        InputError where logits are changed by more than a factor and the cap.
        """
        tokens = torch.arange(8, device=model.device)[None]
        hidden = self(tokens).to(self.dtype)
        # largest logits of a token: 0.1 to 100
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
        # a factor of 1 is exactly that in float32
        factor = 1.0 if abs(factor - 1) < 1e-3 else factor
        off = (self._changed(plain, factor) - wanted).abs()
        if not (off <= 2e-2 * (wanted.abs() + wanted.std(-1, keepdim=True))).all():
            raise InputError(
                f"{type(model).__name__} changes the logits of its head by more than a factor and a cap: not supported"
            )
        return factor


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
    """What stands for a model's weights and its tokenizer: sixteen hexadecimal digits for those in a folder, on the hub
    their commit.

    Of a model on the hub there is a copy of its config afterwards; InputError when there is no such model.
    """
    folder = Path(spec)
    if not os.path.isdir(folder):
        try:
            return Path(_hub().hf_hub_download(spec, "config.json")).parent.name
        except (OSError, ValueError) as error:
            raise InputError(f"no model {spec!r} in a folder or on the hub: {first_line(error)}") from None
    folder = checkpoint.find(folder) or folder
    found = hashlib.sha256()
    tokenizer = (path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    for path in sorted([folder / "config.json", *tokenizer, *folder.glob("*.safetensors")]):
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
    return _decoder(model, name(str(folder)), checkpoint.training_length(folder), place, tokenizer)


def _decoder(
    model: Decoder, name: str, train_len: int | None, place: torch.device, tokenizer: str | None = None
) -> Pretrained:
    method, _, options = model.config.attention.partition(":")
    return Pretrained(
        model=model, name=name, attention=method, options=options, params=model.n_parameters(),
        vocab_size=model.config.vocab_size, train_len=train_len,
        backend=registry.method(method).backend_name(place.type), positions=model.config.positions or None,
        tokenizer=tokenizer,
    )  # fmt: skip


def name(spec: str) -> str:
    """What a table calls it: a folder's own name, or the hub's."""
    # os.path says no of what cannot be a path, where Path raises
    return Path(spec).resolve().name if os.path.isdir(spec) else spec


def _released(spec: str) -> Path | None:
    """The folder of a released stick-breaking model, fetched where it is on the hub; None where it is another model."""
    if os.path.isdir(folder := Path(spec)):
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
    text, positions = model.config.get_text_config(), _positions(model)
    return Pretrained(
        model=HubModel(model), name=name(spec), attention="hf",
        options=str(text.model_type), params=sum(x.numel() for x in model.parameters()),
        vocab_size=text.vocab_size, train_len=getattr(text, "max_position_embeddings", positions),
        backend=str(text._attn_implementation), positions=positions,
    )  # fmt: skip


class _Tables(TorchDispatchMode):
    """Notes where tables of parameters end that a pass over one row reads at one place after another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.ends: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            table, rows = args[0], args[1].flatten()
            if isinstance(table, nn.Parameter) and rows.numel() > 1 and bool((rows.diff() == 1).all()):
                # not all begin at the first
                self.ends.append(len(table) - int(rows[0]))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def _positions(model: Any) -> int | None:
    """Tokens that a model with a table of positions reads at most; None of one without.

    The number in a config does not tell: rotary models have it too, and read on past it.
    """
    shape = model.config.get_text_config()
    if shape.model_type in FIXED:
        return int(getattr(shape, FIXED[shape.model_type]))
    # tokens in an order that no positions have
    tokens = torch.arange(7, -1, -1, device=model.device)[None]
    with _Tables() as tables:
        model(input_ids=tokens, use_cache=False)
    return min(tables.ends, default=None)
