"""One decoder for every attention method: pre-norm RMSNorm, SwiGLU or GELU, grouped heads; biases for loaded models.

The multipliers m_emb, m_residual, m_width and attention_multiplier are those of the muP-style recipe behind the
paper's 1B and 3B models (Shen et al. 2024, arXiv 2408.13359, table 4):

    x = m_emb E[tokens]        x += m_residual Attention(RMSNorm(x))        x += m_residual MLP(RMSNorm(x))
    logits = Head(RMSNorm(x)) / m_width
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbeval import registry
from sbeval.cache import Cache, Layer
from sbeval.config import LATER
from sbeval.errors import InputError, choose

IGNORE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder. `attention` is a method with its options, `name` or `name:key=value,key=value`."""

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
    positions: int = 0  # length of a learned table of positions, counted from the start of a row; 0 is none
    norm_eps: float = 1e-5
    init_std: float | None = None  # 1 / sqrt(width) by default
    m_emb: float = 1.0
    m_residual: float = 1.0
    m_width: float = 1.0
    attention_multiplier: float | None = None  # scale of q . k, 1 / sqrt(head_dim) by default
    # of embeddings, and of what a head mixed: fused attention has none of its weights
    dropout: float = field(default=0.0, metadata=LATER)
    # what some released models have: biases, and a GroupNorm of what each head mixed
    qkv_bias: bool = field(default=False, metadata=LATER)
    out_bias: bool = field(default=False, metadata=LATER)
    mlp_bias: bool = field(default=False, metadata=LATER)
    head_norm: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        choose("mlp", self.mlp, ("swiglu", "gelu"))
        for name in ("vocab_size", "width", "layers", "heads", "hidden", "kv_heads", "head_dim"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise InputError(f"{name} must be at least 1; got {size}")
        if self.init_std is not None and not 0 < self.init_std < math.inf:
            raise InputError(f"init_std must be above 0 and finite; got {self.init_std}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1; got {self.dropout}")
        if self.positions < 0:
            raise InputError(f"positions must be at least 0; got {self.positions}")
        if self.head_dim is None and self.width % self.heads:
            raise InputError(f"width {self.width} is no multiple of {self.heads} heads; give head_dim")
        if self.heads % self.n_kv_heads:
            raise InputError(f"{self.n_kv_heads} key-value heads do not divide {self.heads} heads")

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
    # nanoGPT's shape (github.com/karpathy/nanoGPT) beside 60m: learned positions, GELU, and --attention nope; its
    # LayerNorm without bias is an RMSNorm here
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
    """Size of the embedding that is trained for a tokenizer of so many tokens.

    A product of odd size leaves the tensor cores' fast path; surplus tokens never occur, and are never predicted.
    """
    return tokens if tokens < 1024 else -(-tokens // 64) * 64


def named(size: str, *, vocab_size: int, attention: str) -> ModelConfig:
    """Config of the size called `size`; InputError offers the nearest name."""
    return ModelConfig(vocab_size=vocab_size, attention=attention, **SIZES[choose("model size", size, SIZES)])


def parse_attention(spec: str) -> tuple[str, Any]:
    """Method name and its Options from `name` or `name:key=value,key=value`; InputError names what is unknown."""
    name, _, text = spec.partition(":")
    kinds = registry.method(name).Options
    fields = {field.name: field for field in dataclasses.fields(kinds)}
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        field = fields.get(key) if fields else None
        if field is None:
            if not fields:
                raise InputError(f"attention {name!r} has no options; got {item!r}")
            choose(f"option of attention {name!r}", key, fields)
        if key in values:
            raise InputError(f"option {key!r} of attention {name!r} is given twice in {spec!r}")
        assert field is not None
        if not equals:
            raise InputError(f"option {key!r} of attention {name!r} needs a value: {name}:{key}=...")
        values[key] = _convert(f"{name}:{key}", value, field.default)
    return name, kinds(**values)


def _convert(what: str, text: str, default: object) -> object:
    """Read `text` as the kind of thing that `default` is; an option that is None by default is a number."""
    if isinstance(default, bool):
        return choose(what, text.lower(), ("true", "false")) == "true"
    if isinstance(default, str):
        return text
    try:
        return int(text) if isinstance(default, int) else float(text)
    except ValueError:
        raise InputError(f"{what} must be a number; got {text!r}") from None


def canonical_attention(spec: str) -> str:
    """The shortest spec that means the same: without options at their defaults, the others in the class's order."""
    return _spec(*parse_attention(spec))


def trained_attention(spec: str) -> str:
    """The canonical spec whose training gives the weights for `spec`: without options that only evaluation asks for."""
    name, options = parse_attention(spec)
    return _spec(name, registry.trained_as(name, options))


def _spec(name: str, options: Any) -> str:
    text = ",".join(
        f"{field.name}={str(value).lower() if isinstance(value, bool) else value}"
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != field.default
    )
    return f"{name}:{text}" if text else name


class Attention(nn.Module):
    """Project to heads, mix tokens by the configured method, project back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.heads, config.n_kv_heads, config.d_head
        self.dropout = config.dropout
        name, options = parse_attention(config.attention)
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.dim, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.dim, config.width, bias=config.out_bias)
        self.norm = nn.GroupNorm(self.heads, self.heads * self.dim) if config.head_norm else None
        scale = self.dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.mixer = registry.method(name).Mixer(
            options, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim, width=config.width, scale=scale
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, cache: Layer | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.dim))
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
        mixed = F.dropout(self.mixer(q, k, v, x, cu_seqlens, cache), self.dropout, self.training).flatten(2)
        if self.norm is not None:
            mixed = self.norm(mixed.flatten(0, 1)).view_as(mixed)
        out: Tensor = self.out(mixed)
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), or one GELU layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.width, (2 if self.gated else 1) * config.hidden, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.gated:
            up, gate = up.chunk(2, -1)
            up = up * F.silu(gate)
        else:
            up = F.gelu(up)
        out: Tensor = self.down(up)
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.m_residual = config.m_residual
        self.norm_1 = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm_2 = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, cache: Layer | None = None) -> Tensor:
        x = x + self.m_residual * self.attention(self.norm_1(x), cu_seqlens, cache)
        out: Tensor = x + self.m_residual * self.mlp(self.norm_2(x))
        return out


class Decoder(nn.Module):
    """The model. Weights are drawn from torch's generator: seed it first."""

    # prompts of one batch may differ in length: see sbeval.generate
    ragged = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.positions, config.width) if config.positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self._compiled: list[Any] | None = None
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialise()
        if config.tied:
            self.head.weight = self.embedding.weight

    def _initialise(self) -> None:
        """N(0, init_std); linear layers / sqrt(m_width), and those that write to the residual / sqrt(2 layers)."""
        std = self.config.width**-0.5 if self.config.init_std is None else self.config.init_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.Linear):
                depth = math.sqrt(2 * self.config.layers) if name.endswith((".out", ".down")) else 1.0
                nn.init.normal_(module.weight, std=std / math.sqrt(self.config.m_width) / depth)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, width) after the last norm. tokens: (B, T) int64.

        cu_seqlens: int32 (N + 1,), cumulative lengths of the sequences in the flattened batch, which do not see
        each other.
        """
        x = self.embedding(tokens) * self.config.m_emb
        if self.positions is not None:
            self.check_positions(tokens.shape[1])
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.config.dropout, self.training)
        if cu_seqlens is not None:
            x = x.flatten(0, 1)[None]
        for block in self._compiled if self.training and self._compiled else self.blocks:
            x = block(x, cu_seqlens)
        out: Tensor = self.norm(x).view(*tokens.shape, -1)
        return out

    def compile_blocks(self) -> None:
        """Compile the blocks for training; evaluation, whose lengths vary, runs them as they are."""
        self._compiled = [torch.compile(block) for block in self.blocks]

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Cache]:
        """Hidden states (B, width) of the last token of each prompt, and a cache with `room` for further tokens."""
        device = self.head.weight.device
        lengths = [len(prompt) for prompt in prompts]
        if self.positions is not None and max(lengths) + room > self.config.positions:
            given = f"a prompt of {max(lengths)} tokens and {room} more"
            raise InputError(f"{given} exceed the model's {self.config.positions} positions")
        cache = Cache(lengths, room=room, layers=self.config.layers, device=device)
        tokens = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        hidden = self.extend(tokens, cache)[0]
        return hidden[cache.rows.cu_seqlens[1:] - 1], cache

    def extend(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Hidden states of tokens that the cache takes in: its prompts packed, (1, N), then (B, 1) at a time."""
        reading = cache.rows.length == 0
        x = self.embedding(tokens) * self.config.m_emb
        if self.positions is not None:
            x = x + self.positions(cache.rows.places if reading else cache.rows.next_places())
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, cache.rows.cu_seqlens if reading else None, layer)
        cache.advance()
        out: Tensor = self.norm(x)
        return out

    def check_positions(self, length: int) -> None:
        """InputError when a row of so many tokens goes past a learned table of positions."""
        if self.positions is not None and length > self.config.positions:
            raise InputError(f"{length} tokens exceed the model's {self.config.positions} positions")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., width)."""
        logits: Tensor = self.head(hidden) / self.config.m_width
        return logits

    def loss(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, float32, summed over the targets (B, T) that are not IGNORE."""
        return self.score(self(tokens, cu_seqlens), targets)

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The same of hidden states (B, T, width)."""
        logits = self.logits(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    def sparse_loss(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, capacity: int | None = None
    ) -> Tensor:
        """The same, with the head at the scored positions only: much cheaper where few are.

        capacity: room for so many scored positions, NaN when there are more. Then no shape depends on the targets, so
        that nothing waits for the device and the whole can be captured in a graph.
        """
        hidden, targets = self(tokens, cu_seqlens).flatten(0, 1), targets.flatten()
        scored = targets != IGNORE
        if capacity is None:
            logits = self.logits(hidden[scored]).float()
            return F.cross_entropy(logits, targets[scored], reduction="sum")
        place = scored.long().cumsum(0)
        # the first `capacity` scored positions; one place more takes all that is not wanted
        where = place.new_zeros(capacity + 1)
        where.scatter_(
            0, (place - 1).where(scored, capacity).clamp(max=capacity), torch.arange(len(targets), device=place.device)
        )
        wanted = targets[where[:capacity]].where(torch.arange(capacity, device=place.device) < place[-1], IGNORE)
        logits = self.logits(hidden[where[:capacity]]).float()
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
        return loss.where(place[-1] <= capacity, math.nan)

    def evaluated_as(self, attention: str) -> "Decoder":
        """A model of the same weights that attends as `attention` says; itself when it does so already."""
        if attention == self.config.attention:
            return self
        other = Decoder(dataclasses.replace(self.config, attention=attention)).to(self.head.weight.device)
        other.load_state_dict(self.state_dict())
        return other.train(self.training)

    def n_parameters(self) -> int:
        """Parameters, those shared by embedding and head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


@functools.cache
def n_parameters(config: ModelConfig) -> int:
    """Parameters of a model of this shape, without its weights."""
    with torch.device("meta"):
        return Decoder(config).n_parameters()


def flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of one forward pass per token at sequences of `length`: products, causal attention as half a square."""
    width, inner = config.width, config.heads * config.d_head
    projections = width * (2 * inner + 2 * config.n_kv_heads * config.d_head)
    mlp = (3 if config.mlp == "swiglu" else 2) * width * config.hidden
    attention = 2 * inner * (length / 2)
    return 2 * (config.layers * (projections + mlp + attention) + width * config.vocab_size)
