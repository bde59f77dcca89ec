"""Stick-breaking models as their authors published them: safetensors of dolomite-engine, lm-engine and flame.

The layout is read off the names and shapes of the tensors; `model_type` only says that a folder is meant to be one.

    A      transformer.h.{i}.attn.{c_attn,c_proj}, .mlp.{c_fc,c_proj}       rest of the stick times v (`sb_dolomite`)
    B      A and .attn.head_bias (H, D)                                     rest of the stick times head_bias
    C      B and .attn.norm.{weight,bias}                                   GroupNorm of each head's output
    D      C, but .sequence_mixer. for .attn. and .mlp_block. for .mlp.
    flame  model.layers.{i}.attn.{q,k,v,o}_proj, .mlp.{gate,up,down}_proj   no remainder (`sba`)

c_attn holds, one key-value head after another, the queries that share it, its key and its value: [q, k, v] of each head
where every head has its own, [q ... q, k, v] of each group, and all queries, k, v where there is one. Query head h
reads group h // (H / G), as in the packed path that the engine trains with. c_fc is [up; gate]. The models know no
positions, whatever `position_embedding_type` says.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sbeval.errors import InputError
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder

KINDS = ("sb_dolomite", "stickbreaking", "moe_stickbreaking", "gpt_dolomite", "gpt_base", "sba")
# all that is fetched of a repository on the hub
FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
NONE, VALUE, BIAS = "stick_breaking:remainder=none", "stick_breaking", "stick_breaking:remainder=bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a layout names what it holds. `fused`: q, k and v are one tensor, and up and gate are."""

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
    block="transformer.h.{}.", embedding="transformer.wte.weight", attention="attn.", mlp="mlp.",
    norms=("ln_1.weight", "ln_2.weight", "transformer.ln_f.weight"),
)  # fmt: skip
NEW = dataclasses.replace(OLD, attention="sequence_mixer.", mlp="mlp_block.")
FLAME = Layout(
    block="model.layers.{}.", embedding="model.embeddings.weight", attention="attn.", mlp="mlp.",
    norms=("attn_norm.weight", "mlp_norm.weight", "model.norm.weight"), fused=False,
)  # fmt: skip


class Tensors:
    """The tensors of a checkpoint: each is taken once and must have the shape that follows from the config."""

    def __init__(self, tensors: Mapping[str, Tensor], where: object) -> None:
        self._left, self.where = dict(tensors), where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> list[str]:
        return list(self._left)

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self._left:
            raise InputError(f"{self.where} lacks the tensor {name}, of shape {shape}")
        found = self._left.pop(name)
        if found.shape != shape:
            raise InputError(f"{self.where}: {name} has shape {tuple(found.shape)}; its config gives {shape}")
        return found

    def size(self, name: str, dim: int) -> int:
        """One size of a tensor that is taken later."""
        if name not in self._left or self._left[name].ndim <= dim:
            raise InputError(f"{self.where} lacks the tensor {name}, or it has less than {dim + 1} dimensions")
        return self._left[name].shape[dim]

    def finish(self) -> None:
        """InputError names what was not taken."""
        if self._left:
            raise InputError(f"{self.where} has tensors that its config does not explain: {_patterns(self._left)}")


class Settings:
    """A config.json, or what is said of all blocks of one kind in it."""

    def __init__(self, values: Mapping[str, Any], where: object) -> None:
        self._values, self.where = values, where

    def blocks(self, key: str, layers: int) -> "Settings":
        """These settings with those of the blocks under `key`, if it is there; they must be the same in every layer."""
        if (blocks := self.get(key)) is None:
            return self
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise InputError(f"{self.where}: {key} must be a list of settings; got {blocks!r}")
        if len(blocks) != layers:
            raise InputError(f"{self.where}: config.json has {len(blocks)} {key} for {layers} layers")
        if any(block != blocks[0] for block in blocks):
            raise InputError(f"{self.where}: {key} differ from layer to layer, which is not supported")
        return Settings({**self._values, **blocks[0]}, self.where)

    def get(self, *keys: str) -> Any:
        """The first of these that is there and not null; None otherwise."""
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)

    def number(self, *keys: str, default: float | None = None) -> float:
        found = default if (given := self.get(*keys)) is None else given
        if not isinstance(found, int | float):
            raise InputError(f"{self.where}: config.json must have a number for {' or '.join(keys)}; got {found!r}")
        return found

    def count(self, *keys: str, default: int | None = None) -> int:
        found = self.number(*keys, default=default)
        if not isinstance(found, int) or found < 1:
            raise InputError(f"{self.where}: {keys[0]} must be a whole number of at least 1; got {found!r}")
        return found

    def only(self, key: str, *known: str) -> None:
        """InputError when `key` is something else than what is known here; it need not be there."""
        if (given := self.get(key)) is not None and given not in known:
            raise InputError(f"{self.where}: {key} {given!r} is not supported, only {' or '.join(known)}")

    def agrees(self, key: str, said: bool | None, found: bool, what: str) -> None:
        """InputError when the config says one thing and the tensors another."""
        if said is not None and said != found:
            holds = "there is" if found else "there is no"
            raise InputError(f"{self.where}: config.json has {key}={self.get(key)}, but {holds} {what}")


def is_released(config: object) -> bool:
    """Whether a config.json is that of one of these models."""
    return isinstance(config, dict) and config.get("model_type") in KINDS


def load(folder: Path, dtype: torch.dtype) -> tuple[Decoder, int | None]:
    """The model of a folder, on the CPU, and the length it was trained on where that is said.

    InputError when a tensor is missing, unknown or of another shape than the config gives.
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


def read(folder: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors, or of the files of its index, which must be right about them."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _read(folder / "model.safetensors")
    try:
        place = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is no index of safetensors ({type(error).__name__}: {error})") from None
    found: dict[str, Tensor] = {}
    for file in sorted(set(place.values())):
        if Path(file).name != file:
            raise InputError(f"{index} names a file outside its folder: {file}")
        tensors = _read(folder / file)
        wanted = {name for name, where in place.items() if where == file}
        if wrong := sorted(wanted ^ set(tensors)):
            raise InputError(f"{folder / file} does not hold what {index.name} says: {_patterns(wrong)}")
        found |= tensors
    return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read: {error}; weights are read from safetensors alone") from None


def convert(
    given: Mapping[str, Tensor], config: Mapping[str, Any], where: object
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and weights of our decoder from the tensors and the config.json of a released model."""
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
    """Weights of one block by our names."""
    attention, mlp = prefix + layout.attention, prefix + layout.mlp
    inner, dim = shape.heads * shape.d_head, shape.d_head
    rows, up = [inner, shape.n_kv_heads * dim, shape.n_kv_heads * dim], [shape.hidden] * 2
    if layout.fused:
        rows, up = [sum(rows)], [sum(up)]
    found = {
        "norm_1.weight": tensors.take(prefix + layout.norms[0], shape.width),
        "norm_2.weight": tensors.take(prefix + layout.norms[1], shape.width),
    }

    def linear(name: str, theirs: Sequence[str], rows: Sequence[int], columns: int, biased: bool) -> None:
        for kind, size in (("weight", (columns,)), ("bias", ()))[: 1 + biased]:
            parts = [tensors.take(f"{part}.{kind}", n, *size) for part, n in zip(theirs, rows, strict=True)]
            found[f"{name}.{kind}"] = torch.cat(parts)

    linear("attention.qkv", [attention + name for name in layout.qkv], rows, shape.width, shape.qkv_bias)
    linear("attention.out", [attention + layout.out], [shape.width], inner, shape.out_bias)
    linear("mlp.up", [mlp + name for name in layout.up], up, shape.width, shape.mlp_bias)
    linear("mlp.down", [mlp + layout.down], [shape.width], shape.hidden, shape.mlp_bias)
    if layout.fused:
        for name in ("attention.qkv.weight", "attention.qkv.bias")[: 1 + shape.qkv_bias]:
            groups = found[name].unflatten(0, (shape.n_kv_heads, -1, dim))
            parts = groups.split((shape.heads // shape.n_kv_heads, 1, 1), 1)
            found[name] = torch.cat([part.flatten(0, 2) for part in parts])
    if shape.head_norm:
        for kind in ("weight", "bias"):
            found[f"attention.norm.{kind}"] = tensors.take(f"{attention}norm.{kind}", inner)
    if shape.attention == BIAS:
        found["attention.mixer.bias"] = tensors.take(attention + "head_bias", shape.heads, dim)
    return found


def _layout(names: Iterable[str], where: object) -> Layout:
    """The layout that these tensors have; InputError lists them when it is none that is known."""
    names = list(names)
    if experts := [name for name in names if re.search(r"\.moe\.|\.mlp_block\.(gate|router)\.|\.experts\.", name)]:
        raise InputError(f"{where} has layers of experts, which are not supported: {_patterns(experts)}")
    for layout in (OLD, NEW, FLAME):
        if f"{layout.block.format(0)}{layout.attention}{layout.qkv[0]}.weight" in names:
            return layout
    raise InputError(f"{where} is in no known layout of a stick-breaking model; it has {_patterns(names)}")


def _shape(tensors: Tensors, layout: Layout, settings: Settings) -> ModelConfig:
    """Our config, from theirs and from which tensors there are; InputError where the two contradict each other."""
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
        raise InputError(f"{settings.where}: width {width} is no multiple of {heads} heads")
    tied, said = "lm_head.weight" not in tensors, settings.get("tie_word_embeddings")
    settings.agrees("tie_word_embeddings", None if said is None else not said, not tied, "lm_head.weight")
    multipliers: dict[str, Any] = {
        name: settings.number(name, default=1.0) for name in ("m_emb", "m_residual", "m_width")
    }
    unscaled = mixer.get("scale_attn_weights") is False
    if unscaled or mixer.get("attention_multiplier") is not None:
        multipliers["attention_multiplier"] = mixer.number("attention_multiplier", default=1.0)
    return ModelConfig(
        vocab_size=settings.count("vocab_size"), width=width, heads=heads, tied=tied,
        layers=layers, kv_heads=_kv_heads(tensors, layout, mixer, attention, heads, width // heads),
        hidden=mlp.count("n_inner", "intermediate_size", default=tensors.size(f"{feed}{layout.down}.weight", 1)),
        norm_eps=settings.number("layer_norm_epsilon", "norm_eps", default=1e-5),
        **multipliers,
        **_rest(tensors, layout, mixer, attention),
        **_biases(tensors, layout, mixer, mlp, attention, feed),
    )  # fmt: skip


def _kv_heads(tensors: Tensors, layout: Layout, mixer: Settings, attention: str, heads: int, dim: int) -> int:
    """Key-value heads: as the config says, or else as many as there are rows for."""
    if layout.fused:
        rows = tensors.size(f"{attention}c_attn.weight", 0) - heads * dim
        found = rows // (2 * dim)
    else:
        found = tensors.size(f"{attention}k_proj.weight", 0) // dim
    kind = mixer.get("attention_head_type")
    mixer.only("attention_head_type", "mha", "gqa", "mqa")
    by_kind = {"mha": heads, "mqa": 1}
    said = mixer.count("num_key_value_heads", "num_kv_heads", default=by_kind.get(kind, max(found, 1)))
    if by_kind.get(kind, said) != said:
        raise InputError(f"{mixer.where}: attention_head_type {kind!r} contradicts {said} key-value heads of {heads}")
    return said


def _rest(tensors: Tensors, layout: Layout, mixer: Settings, attention: str) -> dict[str, Any]:
    """Where the rest of the stick goes, and whether a GroupNorm follows."""
    if layout is FLAME:
        return {"attention": NONE}
    said = mixer.get("sb_remainder")
    bias, norm = f"{attention}head_bias" in tensors, f"{attention}norm.weight" in tensors
    if layout is NEW or bias or norm:
        # from layout B on it buys a learned vector, which D always has, and a norm too
        mixer.agrees("sb_remainder", said, bias, f"{attention}head_bias")
        has_bias = bias or layout is NEW or said is None and norm
        return {"attention": BIAS if has_bias else NONE, "head_norm": norm or layout is NEW}
    if said is None and str(mixer.get("model_type")).startswith("gpt_"):
        raise InputError(
            f"{mixer.where}: a {mixer.get('model_type')} of this layout may be a softmax model; if it is not, put "
            "'sb_remainder' into its config.json: true where the rest of the stick takes the token's own value"
        )
    return {"attention": NONE if said is False else VALUE}


def _biases(
    tensors: Tensors, layout: Layout, mixer: Settings, mlp: Settings, attention: str, feed: str
) -> dict[str, Any]:
    """Which linear layers have biases, by the first block."""
    found = {
        "qkv_bias": f"{attention}{layout.qkv[0]}.bias",
        "out_bias": f"{attention}{layout.out}.bias",
        "mlp_bias": f"{feed}{layout.down}.bias",
    }
    both, only_qkv = mixer.get("add_bias"), mixer.get("add_qkv_bias", "qkv_bias")
    if only_qkv:
        mixer.agrees("add_qkv_bias", True, found["qkv_bias"] in tensors, found["qkv_bias"])
    else:
        mixer.agrees("add_bias", both, found["qkv_bias"] in tensors, found["qkv_bias"])
    mixer.agrees("add_bias", both, found["out_bias"] in tensors, found["out_bias"])
    mlp.agrees("add_bias", mlp.get("add_bias"), found["mlp_bias"] in tensors, found["mlp_bias"])
    return {name: tensor in tensors for name, tensor in found.items()}


def _patterns(names: Iterable[str]) -> str:
    """Names of tensors in one line: layers as {i}, a dozen at most."""
    found = sorted({re.sub(r"\.\d+\.", ".{i}.", name) for name in names})
    return ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
