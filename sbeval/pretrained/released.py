"""Stick-breaking models as their authors published them: safetensors of dolomite-engine, lm-engine and flame.

The layout follows from the names and shapes of the tensors; `model_type` only marks a folder as one of these models.

    A      transformer.h.{i}.attn.{c_attn,c_proj}, .mlp.{c_fc,c_proj}       remainder times v (`sb_dolomite`)
    B      A and .attn.head_bias (H, D)                                     remainder times head_bias
    C      B and .attn.norm.{weight,bias}                                   GroupNorm of each head's output
    D      C, but .sequence_mixer. for .attn. and .mlp_block. for .mlp.
    flame  model.layers.{i}.attn.{q,k,v,o}_proj, .mlp.{gate,up,down}_proj   no remainder (`sba`)

c_attn holds, for one key-value head after another, the queries that share it, its key and its value: [q ... q, k, v] of
each group. Query head h reads group h // (H / G), as in the packed path that the engine trains with. c_fc is [up;
gate]. The models have no positional encoding, whatever their `position_embedding_type`.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder
from sbeval.pretrained.foreign import Settings, Tensors, patterns, read

KINDS = ("sb_dolomite", "stickbreaking", "moe_stickbreaking", "gpt_dolomite", "gpt_base", "sba")
# the files of a repository on the hub that are downloaded
FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
NONE, VALUE, BIAS = "stick_breaking:remainder=none", "stick_breaking", "stick_breaking:remainder=bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names of tensors in a layout. `fused`: q, k and v are one tensor, and so are up and gate."""

    block: str
    embedding: str
    attention: str
    mlp: str
    norms: tuple[str, str, str]  # the block's two, and the last
    fused: bool = True

    @property
    def qkv(self) -> tuple[str, ...]:
        return ("c_attn",) if self.fused else ("q_proj", "k_proj", "v_proj")

    @property
    def out(self) -> str:
        return "c_proj" if self.fused else "o_proj"

    @property
    def up(self) -> tuple[str, ...]:
        return ("c_fc",) if self.fused else ("up_proj", "gate_proj")

    @property
    def down(self) -> str:
        return "c_proj" if self.fused else "down_proj"


OLD = Layout(
    block="transformer.h.{}.",
    embedding="transformer.wte.weight",
    attention="attn.",
    mlp="mlp.",
    norms=("ln_1.weight", "ln_2.weight", "transformer.ln_f.weight"),
)
NEW = dataclasses.replace(OLD, attention="sequence_mixer.", mlp="mlp_block.")
FLAME = Layout(
    block="model.layers.{}.",
    embedding="model.embeddings.weight",
    attention="attn.",
    mlp="mlp.",
    norms=("attn_norm.weight", "mlp_norm.weight", "model.norm.weight"),
    fused=False,
)


def is_released(config: object) -> bool:
    """Return whether a config.json is that of one of these models."""
    return isinstance(config, dict) and config.get("model_type") in KINDS


def load(folder: Path, dtype: torch.dtype) -> tuple[Decoder, int | None]:
    """Load the model of a folder, on the CPU, and its training length, None if not recorded.

    Raise InputError when a tensor is missing, unknown or of another shape than the config gives.
    """
    config = json.loads((folder / "config.json").read_text())
    shape, weights = convert(read(folder), config, folder)
    # without memory or random numbers for weights that are replaced
    with torch.device("meta"):
        model = Decoder(shape)
    model.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, assign=True)
    if shape.tied:
        model.head.weight = model.embedding.weight
    return model, Settings(config, folder).get("n_positions", "max_position_embeddings")


def convert(
    given: Mapping[str, Tensor], config: Mapping[str, Any], where: object
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and weights of our decoder from the tensors and config.json of a released model."""
    tensors, settings = Tensors(given, where), Settings(config, where)
    layout = _layout(tensors.names(), where)
    shape = _shape(tensors, layout, settings)
    embedding = tensors.take(layout.embedding, shape.vocab_size, shape.width)
    weights = {
        "embedding.weight": embedding,
        "norm.weight": tensors.take(layout.norms[2], shape.width),
        "head.weight": embedding if shape.tied else tensors.take("lm_head.weight", *embedding.shape),
    }
    for layer in range(shape.layers):
        block = _block(tensors, layout, shape, layout.block.format(layer))
        weights |= {f"blocks.{layer}.{name}": x for name, x in block.items()}
    tensors.finish()
    return shape, weights


def _block(tensors: Tensors, layout: Layout, shape: ModelConfig, prefix: str) -> dict[str, Tensor]:
    """Return the weights of one block by our names."""
    attention, mlp = prefix + layout.attention, prefix + layout.mlp
    inner, dim = shape.heads * shape.d_head, shape.d_head
    rows, up = [inner, shape.n_kv_heads * dim, shape.n_kv_heads * dim], [shape.hidden] * 2
    if layout.fused:
        rows, up = [sum(rows)], [sum(up)]
    weights = {
        "norm_1.weight": tensors.take(prefix + layout.norms[0], shape.width),
        "norm_2.weight": tensors.take(prefix + layout.norms[1], shape.width),
    }

    def linear(name: str, theirs: Sequence[str], rows: Sequence[int], columns: int, biased: bool) -> None:
        for kind, size in (("weight", (columns,)), ("bias", ()))[: 1 + biased]:
            parts = [tensors.take(f"{part}.{kind}", n, *size) for part, n in zip(theirs, rows, strict=True)]
            weights[f"{name}.{kind}"] = torch.cat(parts)

    linear("attention.qkv", [attention + name for name in layout.qkv], rows, shape.width, shape.qkv_bias)
    linear("attention.out", [attention + layout.out], [shape.width], inner, shape.out_bias)
    linear("mlp.up", [mlp + name for name in layout.up], up, shape.width, shape.mlp_bias)
    linear("mlp.down", [mlp + layout.down], [shape.width], shape.hidden, shape.mlp_bias)
    if layout.fused:
        for name in ("attention.qkv.weight", "attention.qkv.bias")[: 1 + shape.qkv_bias]:
            groups = weights[name].unflatten(0, (shape.n_kv_heads, -1, dim))
            parts = groups.split((shape.heads // shape.n_kv_heads, 1, 1), 1)
            weights[name] = torch.cat([part.flatten(0, 2) for part in parts])
    if shape.head_norm:
        for kind in ("weight", "bias"):
            weights[f"attention.norm.{kind}"] = tensors.take(f"{attention}norm.{kind}", inner)
    if shape.attention == BIAS:
        weights["attention.mixer.bias"] = tensors.take(attention + "head_bias", shape.heads, dim)
    return weights


def _layout(names: Iterable[str], where: object) -> Layout:
    """Return the layout of these tensors; raise InputError, listing them, for an unknown one."""
    names = list(names)
    if experts := [name for name in names if re.search(r"\.moe\.|\.mlp_block\.(gate|router)\.|\.experts\.", name)]:
        raise InputError(f"{where} has layers of experts, which are not supported: {patterns(experts)}")
    for layout in (OLD, NEW, FLAME):
        if f"{layout.block.format(0)}{layout.attention}{layout.qkv[0]}.weight" in names:
            return layout
    raise InputError(f"{where} has no known layout of a stick-breaking model; its tensors: {patterns(names)}")


def _shape(tensors: Tensors, layout: Layout, settings: Settings) -> ModelConfig:
    """Return our config from theirs and from the tensors; raise InputError when the two contradict each other."""
    layers = settings.count("n_layer", "num_layers", "num_hidden_layers")
    mixer, mlp = settings.blocks("sequence_mixer_blocks", layers), settings.blocks("mlp_blocks", layers)
    mixer.only("sequence_mixer_type", "stickbreaking_attention")
    mlp.only("mlp_type", "MLP")
    mlp.only("activation_function", "swiglu")
    mlp.only("hidden_act", "swish", "silu")
    settings.only("normalization_function", "rmsnorm")
    first = layout.block.format(0)
    attention, feed = first + layout.attention, first + layout.mlp
    width, heads = settings.count("n_embd", "hidden_size"), mixer.count("n_head", "num_attention_heads", "num_heads")
    if width % heads:
        raise InputError(f"{settings.where}: width {width} is not a multiple of {heads} heads")
    tied, given = "lm_head.weight" not in tensors, settings.get("tie_word_embeddings")
    settings.agrees("tie_word_embeddings", None if given is None else not given, not tied, "lm_head.weight")
    multipliers: dict[str, Any] = {
        name: settings.number(name, default=1.0) for name in ("m_emb", "m_residual", "m_width")
    }
    unscaled = mixer.get("scale_attn_weights") is False
    if unscaled or mixer.get("attention_multiplier") is not None:
        multipliers["attention_multiplier"] = mixer.number("attention_multiplier", default=1.0)
    return ModelConfig(
        vocab_size=settings.count("vocab_size"),
        width=width,
        heads=heads,
        tied=tied,
        layers=layers,
        kv_heads=_kv_heads(tensors, layout, mixer, attention, heads, width // heads),
        hidden=mlp.count("n_inner", "intermediate_size", default=tensors.size(f"{feed}{layout.down}.weight", 1)),
        norm_eps=settings.number("layer_norm_epsilon", "norm_eps", default=1e-5),
        **multipliers,
        **_remainder(tensors, layout, mixer, attention),
        **_biases(tensors, layout, mixer, mlp, attention, feed),
    )


def _kv_heads(tensors: Tensors, layout: Layout, mixer: Settings, attention: str, heads: int, dim: int) -> int:
    """Return the number of key-value heads, from the config or else from the rows of the tensors."""
    if layout.fused:
        rows = tensors.size(f"{attention}c_attn.weight", 0) - heads * dim
        fitting = rows // (2 * dim)
    else:
        fitting = tensors.size(f"{attention}k_proj.weight", 0) // dim
    kind = mixer.get("attention_head_type")
    mixer.only("attention_head_type", "mha", "gqa", "mqa")
    by_kind = {"mha": heads, "mqa": 1}
    kv_heads = mixer.count("num_key_value_heads", "num_kv_heads", default=by_kind.get(kind, max(fitting, 1)))
    if by_kind.get(kind, kv_heads) != kv_heads:
        raise InputError(
            f"{mixer.where}: attention_head_type {kind!r} contradicts {kv_heads} key-value heads of {heads}"
        )
    return kv_heads


def _remainder(tensors: Tensors, layout: Layout, mixer: Settings, attention: str) -> dict[str, Any]:
    """Return what the remainder is multiplied by, and whether a GroupNorm follows."""
    if layout is FLAME:
        return {"attention": NONE}
    given = mixer.get("sb_remainder")
    bias, norm = f"{attention}head_bias" in tensors, f"{attention}norm.weight" in tensors
    if layout is NEW or bias or norm:
        # from layout B on it is multiplied by a learned vector, which D always has, as it has the norm
        mixer.agrees("sb_remainder", given, bias, f"{attention}head_bias")
        has_bias = bias or layout is NEW or given is None and norm
        return {"attention": BIAS if has_bias else NONE, "head_norm": norm or layout is NEW}
    if given is None and str(mixer.get("model_type")).startswith("gpt_"):
        raise InputError(
            f"{mixer.where}: a {mixer.get('model_type')} of this layout may be a softmax model; if it is not, set "
            "'sb_remainder' in its config.json: true if the remainder is multiplied by the token's own value"
        )
    return {"attention": NONE if given is False else VALUE}


def _biases(
    tensors: Tensors, layout: Layout, mixer: Settings, mlp: Settings, attention: str, feed: str
) -> dict[str, Any]:
    """Return which linear layers have biases, from the first block."""
    biases = {
        "qkv_bias": f"{attention}{layout.qkv[0]}.bias",
        "out_bias": f"{attention}{layout.out}.bias",
        "mlp_bias": f"{feed}{layout.down}.bias",
    }
    both, only_qkv = mixer.get("add_bias"), mixer.get("add_qkv_bias", "qkv_bias")
    if only_qkv:
        mixer.agrees("add_qkv_bias", True, biases["qkv_bias"] in tensors, biases["qkv_bias"])
    else:
        mixer.agrees("add_bias", both, biases["qkv_bias"] in tensors, biases["qkv_bias"])
    mixer.agrees("add_bias", both, biases["out_bias"] in tensors, biases["out_bias"])
    mlp.agrees("add_bias", mlp.get("add_bias"), biases["mlp_bias"] in tensors, biases["mlp_bias"])
    return {name: tensor in tensors for name, tensor in biases.items()}
