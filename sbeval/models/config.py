"""Shapes of models and specs of attention methods; torch is imported only to parse a method's options."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sbeval import registry
from sbeval.config import LATER
from sbeval.errors import InputError, choose, shown, valid

# of a model in any direction: the number of elements of its largest matrix is below 2^63
MAX_SIZE = 1 << 24
NORMS = ("rms", "layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions:
    """Options that the spec of every method takes beside its own, as `rope:qkv_bias=true`: fields of ModelConfig.

    qkv_bias: whether the projections to queries, keys and values have biases. head_norm: whether a GroupNorm normalises
    each head's output. init_std: standard deviation of the initial weights, 1 / sqrt(width) by default. key_shift:
    whether each key is mixed with the one before it (`sbeval.models.decoder.KeyShift`).
    """

    qkv_bias: bool = False
    head_norm: bool = False
    init_std: float | None = None
    key_shift: bool = False

    def __post_init__(self) -> None:
        _check_init_std(self.init_std)


def _check_init_std(std: float | None) -> None:
    if std is not None and not 0 < std < math.inf:
        raise InputError(f"init_std must be above 0 and finite; got {std}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder. `attention` is a method with its options, `name` or `name:key=value,key=value`.

    Those of BlockOptions that it names are set in the fields of the same names too.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    hidden: int  # inner size of the MLP
    kv_heads: int | None = None  # as many as heads by default
    head_dim: int | None = None  # width / heads by default
    attention: str = "stick_breaking"
    mlp: str = "swiglu"  # or "gelu"
    tied: bool = False
    positions: int = 0  # length of a learned table of positions, counted from the start of a row; 0: no table
    norm_eps: float = 1e-5
    init_std: float | None = None  # 1 / sqrt(width) by default
    m_emb: float = 1.0
    m_residual: float = 1.0
    m_width: float = 1.0
    attention_multiplier: float | None = None  # scale of q . k, 1 / sqrt(head_dim) by default
    # of embeddings and of the heads' outputs: fused attention has no dropout of its weights
    dropout: float = field(default=0.0, metadata=LATER)
    # biases, and a GroupNorm of each head's output
    qkv_bias: bool = field(default=False, metadata=LATER)
    out_bias: bool = field(default=False, metadata=LATER)
    mlp_bias: bool = field(default=False, metadata=LATER)
    head_norm: bool = field(default=False, metadata=LATER)
    key_shift: bool = field(default=False, metadata=LATER)
    norm: str = field(default="rms", metadata=LATER)  # or "layer", with gains and biases

    def __post_init__(self) -> None:
        for name, value in block_options(self.attention).items():
            object.__setattr__(self, name, value)
        choose("mlp", self.mlp, ("swiglu", "gelu"))
        choose("norm", self.norm, NORMS)
        for name in ("vocab_size", "width", "layers", "heads", "hidden", "kv_heads", "head_dim"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise InputError(f"{name} must be at least 1; got {size}")
            if size is not None and size > MAX_SIZE:
                raise InputError(f"{name} must be at most {MAX_SIZE}; got {size}")
        _check_init_std(self.init_std)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1; got {self.dropout}")
        if self.positions < 0:
            raise InputError(f"positions must be at least 0; got {self.positions}")
        if self.head_dim is None and self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of {self.heads} heads: give head_dim")
        if self.heads % self.n_kv_heads:
            raise InputError(f"kv_heads {self.n_kv_heads} must divide the {self.heads} heads")

    @property
    def n_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def d_head(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim


# shapes by name; parameters at a vocabulary of 257 (quick), 8,192 (25m, 60m), 50,304 (125m) or the paper's own
SIZES: dict[str, dict[str, Any]] = {
    # 1.3 M, for a laptop: a few minutes of training on two cores
    "quick": {"width": 160, "layers": 4, "heads": 4, "hidden": 432, "tied": True},
    "25m": {"width": 512, "layers": 8, "heads": 8, "hidden": 1024, "tied": True},
    "60m": {"width": 640, "layers": 12, "heads": 10, "hidden": 1536, "tied": True},
    # the size of 60m in nanoGPT's shape (github.com/karpathy/nanoGPT): learned positions, GELU, and --attention nope;
    # its LayerNorm without bias is an RMSNorm here
    "nanogpt-60m": {
        "width": 640, "layers": 12, "heads": 10, "hidden": 2560, "tied": True, "mlp": "gelu", "positions": 2048,
        "init_std": 0.02,
    },
    "125m": {"width": 768, "layers": 12, "heads": 12, "hidden": 2048, "tied": True},
    # the paper's 367.5 M parameters at 32,000 tokens of vocabulary
    "350m": {"width": 1024, "layers": 24, "heads": 32, "hidden": 2730, "tied": False},
    # arXiv 2408.13359, table 4; m_width of the 3b is width / 256, the table rounds it to 8
    "1b": {
        "width": 1536, "layers": 40, "heads": 24, "hidden": 4096, "tied": True,
        "m_emb": 12.0, "m_residual": 0.22, "m_width": 6.0, "init_std": 0.1,
    },
    "3b": {
        "width": 2304, "layers": 40, "heads": 36, "hidden": 9216, "tied": True,
        "m_emb": 12.0, "m_residual": 0.22, "m_width": 9.0, "init_std": 0.1,
    },
}  # fmt: skip


def padded_vocabulary(tokens: int) -> int:
    """Return the embedding's size for a tokenizer of this many tokens.

    A matrix product of odd size leaves the tensor cores' fast path; surplus tokens never occur in the data.
    """
    return tokens if tokens < 1024 else -(-tokens // 64) * 64


def named(size: str, *, vocab_size: int, attention: str) -> ModelConfig:
    """Return the config of a named size; raise InputError, offering the nearest name, for an unknown one."""
    return ModelConfig(vocab_size=vocab_size, attention=attention, **SIZES[choose("model size", size, SIZES)])


def parse_attention(spec: str) -> tuple[str, Any]:
    """Parse `name` or `name:key=value,key=value` into the method's name and Options; raise InputError if invalid.

    BlockOptions are checked and left out.
    """
    name, _, _ = spec.partition(":")
    if {",", "="} & set(name):
        raise InputError(
            f"attention {shown(name)!r} is no method: one is NAME or NAME:option=value,...; several are a repeated "
            "--attention, or in a study a list, in which one with a comma has quotes"
        )
    kinds = registry.method(name).Options
    own, block = _own_types(name, kinds), _types(BlockOptions)
    values: dict[str, Any] = {}
    for key, value in _items(spec):
        choose(f"option of attention {name!r}", key, {**own, **block})
        if key in own:
            values[key] = _convert(f"{name}:{key}", value, own[key])
    BlockOptions(**block_options(spec))
    with valid(f"attention {shown(spec)!r}"):
        return name, kinds(**values)


def _own_types(name: str, kinds: type[Any]) -> dict[str, Any]:
    """Return the types of a method's options by name; raise InputError where `Method` in the registry forbids one."""
    if not dataclasses.is_dataclass(kinds):
        raise InputError(f"attention {name!r}: its Options must be a frozen dataclass")
    hints = _types(kinds)
    for option in dataclasses.fields(kinds):
        what, kind = f"option {option.name!r} of attention {name!r}", hints[option.name]
        if option.name in _types(BlockOptions):
            raise InputError(f"{what} is one of every method: give that of your own another name")
        if option.default is dataclasses.MISSING:
            raise InputError(f"{what} has no default: give it one")
        if get_origin(kind) is not Literal and not _members(kind) <= {bool, int, float, str, type(None)}:
            raise InputError(f"{what} is of type {option.type}; it must be int, float, bool, str or a Literal of texts")
    return {option.name: hints[option.name] for option in dataclasses.fields(kinds)}


def block_options(spec: str) -> dict[str, Any]:
    """Return the BlockOptions that a spec names; needs no torch."""
    name, _, _ = spec.partition(":")
    block = _types(BlockOptions)
    return {key: _convert(f"{name}:{key}", value, block[key]) for key, value in _items(spec) if key in block}


# specs are parsed for every cell, and of a class the hints are evaluated each time
_types = functools.cache(get_type_hints)


def _members(kind: Any) -> set[Any]:
    """Return the types that a union has, or the one that a type is."""
    return set(get_args(kind) or (kind,))


def _items(spec: str) -> Iterator[tuple[str, str]]:
    """Yield the options of a spec with their values, as text; InputError for one without a value or given twice."""
    name, _, text = spec.partition(":")
    seen: set[str] = set()
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key in seen:
            raise InputError(f"option {key!r} of attention {name!r} is given twice in {spec!r}")
        if not equals:
            raise InputError(f"option {key!r} of attention {name!r} needs a value: {name}:{key}=...")
        seen.add(key)
        yield key, value


def _convert(what: str, text: str, kind: Any) -> object:
    """Convert `text` to the type of an option: a number where it may be one and reads as one."""
    if get_origin(kind) is Literal:
        return choose(what, text, get_args(kind))
    kinds = _members(kind)
    if bool in kinds:
        return choose(what, text.lower(), ("true", "false")) == "true"
    if not {int, float} & kinds:
        return text
    try:
        return float(text) if float in kinds else int(text)
    except ValueError:
        # a word that stands for a number, which the method knows
        if str in kinds:
            return text
        raise InputError(f"{what} must be {'a number' if float in kinds else 'an integer'}; got {text!r}") from None


def canonical_attention(spec: str) -> str:
    """Return the shortest equivalent spec: without options at their defaults, the others in the classes' order."""
    name, options = parse_attention(spec)
    return _spec(name, options, BlockOptions(**block_options(spec)))


def trained_attention(spec: str) -> str:
    """Return the canonical spec that the weights of `spec` are trained with: without options of evaluation alone."""
    name, options = parse_attention(spec)
    return _spec(name, registry.trained_as(name, options), BlockOptions(**block_options(spec)))


def _spec(name: str, *parts: Any) -> str:
    text = ",".join(
        f"{field.name}={str(value).lower() if isinstance(value, bool) else value}"
        for options in parts
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != field.default
    )
    return f"{name}:{text}" if text else name


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Return the FLOPs per token of a forward pass at `length` tokens: matrix products, causal attention as half."""
    width, inner = config.width, config.heads * config.d_head
    projections = width * (2 * inner + 2 * config.n_kv_heads * config.d_head)
    mlp = (3 if config.mlp == "swiglu" else 2) * width * config.hidden
    attention = 2 * inner * (length / 2)
    return 2 * (config.layers * (projections + mlp + attention) + width * config.vocab_size)
