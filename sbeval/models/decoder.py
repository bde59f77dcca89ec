"""One decoder for every attention method: RMSNorm or LayerNorm, SwiGLU or GELU, grouped heads, optional biases.

The multipliers m_emb, m_residual, m_width and attention_multiplier are those of the muP-style recipe behind the
paper's 1B and 3B models (Shen et al. 2024, arXiv 2408.13359, table 4):

    x = m_emb E[tokens]        x += m_residual Attention(Norm(x))        x += m_residual MLP(Norm(x))
    logits = Head(Norm(x)) / m_width
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbeval import registry
from sbeval.config import IGNORE as IGNORE
from sbeval.errors import InputError
from sbeval.kernels import check
from sbeval.models.config import ModelConfig, parse_attention
from sbeval.models.kv_cache import Cache, Layer


class KeyShift(nn.Module):
    """Mix each key with the one before it, k_t <- a k_t + (1 - a) k_{t-1}, with one a for each key head.

    It is that of FoX (Pro) (Lin et al. 2025, arXiv 2503.02130), where a depends on the token, with a learned number:
    a = sigmoid(w), w initially 0, so that from the start of training a query can find the token after one like it.
    Before the first token of a sequence k is 0. Methods that rotate keys do so afterwards.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self, k: Tensor, cu_seqlens: Tensor | None, cache: Layer | None) -> Tensor:
        """Return the mixed keys (B, T, G, D), like k; see `registry.Method` for the arguments."""
        before = None if cache is None else cache.last(k)
        if before is None:
            before = F.pad(k, (0, 0, 0, 0, 1, 0))[:, :-1]
            if cu_seqlens is not None:
                # an empty sequence at the end starts past the last token
                first = torch.zeros(k.shape[1] + 1, dtype=torch.bool, device=k.device)
                first = first.scatter(0, cu_seqlens[:-1].long(), True)[:-1]
                before = before.masked_fill(first[:, None, None], 0)
        share, wide = self.weight.sigmoid()[:, None], self.weight.dtype
        return torch.lerp(before.to(wide), k.to(wide), share).to(k.dtype)


class Attention(nn.Module):
    """Project to heads, mix tokens with the configured method, project back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.heads, config.n_kv_heads, config.d_head
        self.dropout, self.spec = config.dropout, config.attention
        check.head_size(self.dim)
        name, options = parse_attention(config.attention)
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.dim, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.dim, config.width, bias=config.out_bias)
        self.norm = nn.GroupNorm(self.heads, self.heads * self.dim) if config.head_norm else None
        self.key_shift = KeyShift(self.kv_heads) if config.key_shift else None
        scale = self.dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.mixer = registry.mixer(
            name, options, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim, width=config.width, scale=scale
        )
        self.takes_longest = "longest" in inspect.signature(self.mixer.forward).parameters

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, cache: Layer | None = None, longest: int | None = None
    ) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.dim))
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
        if self.key_shift is not None:
            k = self.key_shift(k, cu_seqlens, cache)
        known = {"longest": longest} if self.takes_longest else {}
        mixed = check.output(self.mixer(q, k, v, x, cu_seqlens, cache, **known), q, self.spec)
        mixed = F.dropout(mixed, self.dropout, self.training).flatten(2)
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


def _norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.width, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.m_residual = config.m_residual
        self.norm_1 = _norm(config)
        self.attention = Attention(config)
        self.norm_2 = _norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, cache: Layer | None = None, longest: int | None = None
    ) -> Tensor:
        x = x + self.m_residual * self.attention(self.norm_1(x), cu_seqlens, cache, longest)
        out: Tensor = x + self.m_residual * self.mlp(self.norm_2(x))
        return out


class Decoder(nn.Module):
    """The language model. Weights are drawn from torch's generator: seed it first."""

    # prompts of one batch may differ in length: see sbeval.generate
    ragged = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.positions, config.width) if config.positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self._compiled: list[Any] | None = None
        self.norm = _norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialise()
        if config.tied:
            self.head.weight = self.embedding.weight

    @property
    def by_length(self) -> bool:
        """Whether numbers depend on the length of a row, padding included."""
        return any(getattr(module, "by_length", False) for module in self.blocks.modules())

    def _initialise(self) -> None:
        """Draw from N(0, init_std); linear layers / sqrt(m_width), those writing to the residual / sqrt(2 layers)."""
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
        """Return hidden states (B, T, width) after the last norm. tokens: (B, T) int64.

        cu_seqlens: int32 (N + 1,), cumulative lengths of the sequences in the flattened batch; these do not attend to
        each other, and none is in two rows.
        """
        x = self.embedding(tokens) * self.config.m_emb
        if self.positions is not None:
            self.check_positions(tokens.shape[1])
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.config.dropout, self.training)
        if cu_seqlens is not None:
            x = x.flatten(0, 1)[None]
        longest = None if cu_seqlens is None else tokens.shape[1]
        for block in self._compiled if self.training and self._compiled else self.blocks:
            x = block(x, cu_seqlens, None, longest)
        out: Tensor = self.norm(x).view(*tokens.shape, -1)
        return out

    def compile_blocks(self) -> None:
        """Compile the blocks for training; evaluation, whose lengths vary, runs them uncompiled."""
        self._compiled = [torch.compile(block) for block in self.blocks]

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Cache]:
        """Return hidden states (B, width) of the prompts' last tokens, and a cache with `room` for further tokens."""
        device = self.head.weight.device
        lengths = [len(prompt) for prompt in prompts]
        if self.positions is not None and max(lengths) + room > self.config.positions:
            given = f"a prompt of {max(lengths)} tokens and {room} more"
            raise InputError(f"{given} exceed the model's {self.config.positions} positions: give a shorter one")
        cache = Cache(lengths, room=room, layers=self.config.layers, device=device)
        tokens = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        hidden = self.extend(tokens, cache)[0]
        return hidden[cache.rows.cu_seqlens[1:] - 1], cache

    def extend(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Add tokens to the cache, packed prompts (1, N), then (B, 1) at a time; return their hidden states."""
        reading = cache.rows.length == 0
        x = self.embedding(tokens) * self.config.m_emb
        if self.positions is not None:
            x = x + self.positions(cache.rows.positions if reading else cache.rows.next_positions())
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, cache.rows.cu_seqlens if reading else None, layer, cache.rows.longest if reading else None)
        cache.advance()
        out: Tensor = self.norm(x)
        return out

    def check_positions(self, length: int) -> None:
        """Raise InputError when a row of `length` tokens exceeds a learned table of positions."""
        if self.positions is not None and length > self.config.positions:
            raise InputError(f"{length} tokens exceed the model's {self.config.positions} positions")

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocab_size) of hidden states (..., width)."""
        logits: Tensor = self.head(hidden) / self.config.m_width
        return logits

    def loss(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the cross-entropy in nats, float32, summed over the targets (B, T) that are not IGNORE."""
        return self.score(self(tokens, cu_seqlens), targets)

    def score(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the same loss from hidden states (B, T, width); weights: float32 (B, T), of each target's loss."""
        logits = self.logits(hidden).float()
        if weights is not None:
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
            return (losses * weights.flatten()).sum()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    def sparse_loss(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, capacity: int | None = None
    ) -> Tensor:
        """Return the same loss with the head applied at the scored positions alone: much cheaper if they are few.

        capacity: the most scored positions; NaN when there are more. Then no shape depends on the targets, so that
        nothing waits for the device and the whole can be captured in a graph.
        """
        hidden, targets = self(tokens, cu_seqlens).flatten(0, 1), targets.flatten()
        scored = targets != IGNORE
        if capacity is None:
            logits = self.logits(hidden[scored]).float()
            return F.cross_entropy(logits, targets[scored], reduction="sum")
        count = scored.long().cumsum(0)
        # the first `capacity` scored positions; one extra slot collects all others
        slot = (count - 1).where(scored, capacity).clamp(max=capacity)
        positions = count.new_zeros(capacity + 1)
        positions.scatter_(0, slot, torch.arange(len(targets), device=count.device))
        positions = positions[:capacity]
        labels = targets[positions].where(torch.arange(capacity, device=count.device) < count[-1], IGNORE)
        logits = self.logits(hidden[positions]).float()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return loss.where(count[-1] <= capacity, math.nan)

    def evaluated_as(self, attention: str) -> "Decoder":
        """Return a model of the same weights with another attention spec; itself when the spec is the same."""
        if attention == self.config.attention:
            return self
        other = Decoder(dataclasses.replace(self.config, attention=attention)).to(self.head.weight.device)
        other.load_state_dict(self.state_dict())
        return other.train(self.training)

    def n_parameters(self) -> int:
        """Return the number of parameters, those shared by embedding and head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


@functools.cache
def n_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model of this shape, without memory for them."""
    with torch.device("meta"):
        return Decoder(config).n_parameters()
