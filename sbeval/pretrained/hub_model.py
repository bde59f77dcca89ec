"""Models of transformers in two steps, hidden states and logits, whose numbers depend on no other row or request."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sbeval.errors import InputError

# names of caches in models of transformers; not the `state` of RWKV, which mixes the rows of a batch there
CACHES = ("past_key_values", "cache_params")
# names in their configs of c, where logits x become c tanh(x / c)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# architectures of transformers whose table of positions is not a parameter, and the name of its length in their configs
FIXED = {"codegen": "n_positions", "ctrl": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}


@dataclass(slots=True)
class Past:
    """Tokens read so far (B, T), the model's caches of them by name, none if it has none, and the next positions."""

    tokens: Tensor
    caches: dict[str, Any]
    positions: dict[str, Tensor]


class HubModel(nn.Module):
    """A model of transformers, split into hidden states and logits."""

    # not all their architectures are exact with padding
    ragged = False
    # RoPE scaled by length counts the padding
    by_length = True

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
        self.last_short = _last_short(model)
        self._fresh = [(module, dict(module._buffers), _numbers(module)) for module in self.body.modules()]
        self._fresh = [item for item in self._fresh if item[1]]
        self.factor = self._factor(model)

    def forward(self, tokens: Tensor) -> Tensor:
        self._forget()
        hidden: Tensor = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden.to(self.dtype))
        return self._scaled(logits, self.factor)

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Past]:
        """Return hidden states (B, width) of the last tokens of equally long prompts, and what was read."""
        self._forget()
        past = Past(torch.tensor(prompts, device=self.head.weight.device), {}, {})
        return self._read(past)[:, -1], past

    def extend(self, tokens: Tensor, past: Past) -> Tensor:
        """Return hidden states (B, 1, width) of one further token of each row."""
        read = past.tokens.shape[1]
        past.tokens = torch.cat([past.tokens, tokens], 1)
        if not past.caches:
            states: Tensor = self(past.tokens)
            return states[:, -1:]
        if read == self.last_short:
            return self._read(past)[:, -1:]
        output = self.body(input_ids=tokens, use_cache=True, **past.caches, **past.positions)
        past.caches = {name: output[name] for name in past.caches}
        past.positions = {name: positions + 1 for name, positions in past.positions.items()}
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _read(self, past: Past) -> Tensor:
        """Read all tokens anew, and return their hidden states (B, T, width)."""
        output = self.body(input_ids=past.tokens, use_cache=True)
        past.caches = {name: cache for name in CACHES if (cache := getattr(output, name, None)) is not None}
        if not past.caches:
            states: Tensor = self(past.tokens)
            return states
        if self.takes_positions:
            # hybrid models can't derive these from their caches
            past.positions = {"position_ids": torch.full_like(past.tokens[:, :1], past.tokens.shape[1])}
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _forget(self) -> None:
        """Undo what the model keeps of earlier requests: dynamic RoPE stays at the longest that it has read."""
        for module, buffers, numbers in self._fresh:
            module._buffers.update(buffers)
            vars(module).update(numbers)

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


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if type(value) in (int, float)}


def _last_short(model: Any) -> int | None:
    """Return the most tokens that a model of the Phi family reads with its short factors; None for others.

    Their generate() reads the whole text anew at the next token, where other models keep keys that were rotated before.
    """
    own = type(model).prepare_inputs_for_generation.__module__ != "transformers.generation.utils"
    return getattr(model.config, "original_max_position_embeddings", None) if own else None


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
def positions_of(model: Any) -> int | None:
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
