"""The attention weights of a model, read off the mixers that it runs.

Every method is linear in v, so one-hot values give its weights, whatever its kernel and without code per method:
position j has a value of 1 in one dimension, for as many positions at a time as a head has dimensions. The output at
v = 0 (the learned remainder of stick-breaking) is not a weight and is subtracted.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from sbeval.models.decoder import Decoder
from sbeval.runtime import device


@torch.inference_mode()
def attention_weights(model: Decoder, tokens: Tensor) -> Tensor:
    """Return the weights of all layers, (layers, B, H, T, T), query by key, float32; for short sequences.

    Rows of a softmax sum to 1. Those of stick-breaking sum to 1 when the remainder goes to the query's own value
    (`remainder=value`), which is then on the diagonal, and to 1 minus the remainder otherwise. tokens: (B, T) int64.
    """
    return torch.stack([mixed_weights(mixer, *inputs) for mixer, inputs in mixer_inputs(model, tokens)])


@torch.inference_mode()
def mixer_inputs(
    model: Decoder, tokens: Tensor, dtype: str = "float32"
) -> list[tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Return the mixer of each layer, and its q, k, v and x, in the dtype of the model's weights.

    tokens: (B, T) int64. dtype: of matrix products in the forward pass.
    """
    layers: list[nn.Module] = [block.attention.mixer for block in cast("Any", model.blocks)]
    inputs: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(mixer: nn.Module, given: tuple[Any, ...]) -> None:
        inputs[mixer] = given[:4]

    hooks = [mixer.register_forward_pre_hook(keep) for mixer in layers]
    try:
        with device.autocast(tokens.device, dtype):
            # not __call__, which runs no hooks when the model is compiled
            model.forward(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    exact = model.head.weight.dtype
    return [(mixer, cast("Any", tuple(x.to(exact) for x in inputs[mixer]))) for mixer in layers]


@torch.inference_mode()
def mixed_weights(mixer: nn.Module, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return the weights (B, H, T, S) of one mixer; the arguments are those of its forward (see `registry.Method`)."""
    positions, size = k.shape[1], v.shape[-1]
    constant = mixer(q, k, torch.zeros_like(v), x)
    parts = []
    for start in range(0, positions, size):
        hot = torch.eye(positions, device=v.device, dtype=v.dtype)[:, start : start + size]
        hot = nn.functional.pad(hot, (0, size - hot.shape[1]))
        parts.append(mixer(q, k, hot[None, :, None].expand_as(v).contiguous(), x) - constant)
    weights: Tensor = torch.cat(parts, -1)[..., :positions].transpose(1, 2)
    return weights.float()
