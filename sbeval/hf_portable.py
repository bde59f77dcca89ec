"""A decoder of sbeval in plain PyTorch and transformers: `sbeval export --code` copies this file into the folder.

There `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it, without sbeval. It computes what
sbeval computes, up to rounding, without its kernels: time is quadratic in length, memory linear (ROWS queries at a
time). Stick-breaking attention is Tan et al., ICLR 2025, arXiv 2410.17980; pip install 'sbeval[hf]' has it fast.

    q (B, H, T, D); k, v (B, G, S, D), the queries being the last T of the S tokens; kept (B, S): 0 at padding
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

ROWS = 128
# their rotation has a base, `theta`
ROTARY = ("rope", "sliding_window")


class SbevalConfig(PreTrainedConfig):
    """shape: fields of the decoder; `attention` is a method with its options, `name:key=value,key=value`."""

    model_type = "sbeval"
    vocab_size: int = 0
    shape: dict[str, Any] | None = None
    train_len: int | None = None

    @property
    def hidden_size(self) -> int:
        return int((self.shape or {})["width"])

    @property
    def num_hidden_layers(self) -> int:
        return int((self.shape or {})["layers"])

    @property
    def num_attention_heads(self) -> int:
        return int((self.shape or {})["heads"])

    @property
    def max_position_embeddings(self) -> int:
        # only models with a table of positions have a limit
        if not (self.shape or {}).get("positions"):
            raise AttributeError("max_position_embeddings")
        return int((self.shape or {})["positions"])


def options_of(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a method and its options, `name:key=value,key=value`."""
    name, _, rest = spec.partition(":")
    pairs = (part.split("=", 1) for part in rest.split(",") if part)
    return name, {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


class Mixer(nn.Module):
    """The weights of a method, which are under this name in the decoder's, and what it computes from q, k and v."""

    def __init__(self, name: str, options: dict[str, Any], heads: int, dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.name, self.options, self.heads = name, options, heads
        self.scale = scale * options.get("logit_scale", 1.0)
        self.rotary = bool(options.get("rotary", name in ROTARY))
        self.remainder = options.get("remainder", "value")
        if name == "forgetting":
            self.gate = nn.Linear(width, heads)
        if name == "fire":
            self.c, self.m = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))
            self.w1, self.b1 = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.zeros(32))
            self.w2 = nn.Parameter(torch.zeros(heads, 32))
        if name == "stick_breaking" and self.remainder == "bias":
            self.bias = nn.Parameter(torch.zeros(heads, dim))
        self.logit_bias = nn.Parameter(torch.zeros(heads)) if options.get("logit_bias", "none") != "none" else None

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (B, heads, T, D) by positions (B, T)."""
        half = torch.arange(x.shape[-1] // 2, dtype=torch.float64, device=x.device)
        frequencies = self.options.get("theta", 10000.0) ** (-2 * half / x.shape[-1])
        angles = positions[:, None, :, None] * frequencies
        cos, sin = angles.cos().float(), angles.sin().float()
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, kept: Tensor) -> Tensor:
        """Return (B, H, T, D). log_f: (B, H, S), logarithms of forget gates."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        positions, slots = kept.long().cumsum(1) - 1, torch.arange(k.shape[2], device=q.device)
        total = None if log_f is None else log_f.double().cumsum(-1)
        past, parts = k.shape[2] - q.shape[2], []
        for start in range(0, q.shape[2], ROWS):
            part = q[:, :, start : start + ROWS]
            rows = slots[past + start :][: part.shape[2]]
            seen = (slots <= rows[:, None]) & kept[:, None].bool()
            logits = (part @ k.transpose(2, 3)).float() * self.scale
            if self.name == "stick_breaking":
                parts.append(self._stick(logits, v, rows, seen))
                continue
            distance = positions[:, rows, None] - positions[:, None]
            if self.name == "sliding_window":
                seen = seen & (distance < self.options.get("window", 512))
            bias = self._bias(distance.clamp(min=0), positions[:, rows, None], total, rows)
            logits = (logits if bias is None else logits + bias).masked_fill(~seen[:, None], -3e38)
            parts.append(logits.softmax(-1).to(v.dtype) @ v)
        return torch.cat(parts, 2)

    def _stick(self, z: Tensor, v: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        """Break the stick from the nearest key back: each takes its share of what nearer keys left."""
        if self.logit_bias is not None:
            z = z + self.logit_bias.float()[:, None, None]
        if not self.options.get("attend_current", False):
            seen = seen & (torch.arange(v.shape[2], device=v.device) < rows[:, None])
        seen = seen[:, None]
        log_rest = F.logsigmoid(-z).masked_fill(~seen, 0)
        nearer = F.pad(log_rest.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
        out = (F.logsigmoid(z) + nearer).exp().masked_fill(~seen, 0).to(v.dtype) @ v
        if self.remainder == "none":
            return out
        own = v[:, :, rows] if self.remainder == "value" else self.bias[:, None].to(v.dtype)
        return out + log_rest.sum(-1, keepdim=True).exp().to(v.dtype) * own

    def _bias(self, distance: Tensor, at: Tensor, total: Tensor | None, rows: Tensor) -> Tensor | None:
        """Return what is added to the logits, (B, H, rows, S) or with H = 1. distance, at: (B, rows, S), (B, rows, 1).

        total: (B, H, S), sums of the logarithms of forget gates up to each token.
        """
        if total is not None:
            return (total[:, :, rows, None] - total[:, :, None]).float()
        if self.name == "alibi":
            return -_slopes(self.heads, distance.device)[:, None, None] * distance[:, None]
        if self.name != "fire":
            return None
        c, longest = self.c.float().abs(), (self.m * self.options.get("threshold", 512.0)).abs()
        u = (1 + c * distance).log() / ((1 + c * torch.maximum(at, longest)).log() + 1e-6)
        hidden = (u[..., None] * self.w1 + self.b1).relu()
        return torch.einsum("btsm,hm->bhts", hidden, self.w2.float())


def _slopes(heads: int, device: torch.device) -> Tensor:
    below = 1 << (heads.bit_length() - 1)
    steps = torch.cat((torch.arange(1.0, below + 1), torch.arange(heads - below) + 0.5))
    return (2.0 ** (-8 / below * steps.double())).float().to(device)


class KeyShift(nn.Module):
    """Mix each key with the one before it, which is 0 before the first, by a learned share of each key head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self, k: Tensor, kept: Tensor) -> Tensor:
        before = F.pad(k.masked_fill(~kept[:, None, :, None].bool(), 0), (0, 0, 1, 0))[:, :, :-1]
        share, wide = self.weight.sigmoid()[:, None, None], self.weight.dtype
        return torch.lerp(before.to(wide), k.to(wide), share).to(k.dtype)


class Attention(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, self.heads = shape["width"], shape["heads"]
        self.kv_heads = shape.get("kv_heads") or self.heads
        self.dim = shape.get("head_dim") or width // self.heads
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.dim, bias=shape.get("qkv_bias", False))
        self.out = nn.Linear(self.heads * self.dim, width, bias=shape.get("out_bias", False))
        self.norm = nn.GroupNorm(self.heads, self.heads * self.dim) if shape.get("head_norm") else None
        self.key_shift = KeyShift(self.kv_heads) if shape.get("key_shift") else None
        scale = shape.get("attention_multiplier")
        name, options = options_of(shape["attention"])
        self.mixer = Mixer(name, options, self.heads, self.dim, width, self.dim**-0.5 if scale is None else scale)
        self.dropout = shape.get("dropout", 0.0)

    def forward(self, x: Tensor, kept: Tensor, cache: DynamicCache | None, layer: int) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 1)
        positions = kept.long().cumsum(1) - 1
        new = positions[:, -x.shape[1] :]
        if self.mixer.rotary:
            # keys are mixed before they are rotated, and a cache has them unmixed: each needs the one before it
            q, k = self.mixer.rotated(q, new), k if self.key_shift is not None else self.mixer.rotated(k, new)
        log_f = None
        if self.mixer.name == "forgetting":
            log_f = F.logsigmoid(self.mixer.gate(x).float())
        if cache is not None and log_f is not None:
            # the gates of a group's heads are kept with its values
            gates = log_f.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            k, joined = cache.update(k, torch.cat((v.float(), gates), -1), layer)
            v, gates = joined[..., : self.dim].to(v.dtype), joined[..., self.dim :]
            log_f = gates.transpose(1, 2).flatten(2)
        elif cache is not None:
            k, v = cache.update(k, v, layer)
        if self.key_shift is not None:
            k = self.key_shift(k, kept)
            k = self.mixer.rotated(k, positions) if self.mixer.rotary else k
        mixed = self.mixer(q, k, v, None if log_f is None else log_f.transpose(1, 2), kept)
        mixed = F.dropout(mixed.transpose(1, 2), self.dropout, self.training).flatten(2)
        if self.norm is not None:
            mixed = self.norm(mixed.flatten(0, 1)).view_as(mixed)
        out: Tensor = self.out(mixed)
        return out


class MLP(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, hidden, bias = shape["width"], shape["hidden"], shape.get("mlp_bias", False)
        self.gated = shape.get("mlp", "swiglu") == "swiglu"
        self.up = nn.Linear(width, (2 if self.gated else 1) * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.gated:
            up, gate = up.chunk(2, -1)
            up = up * F.silu(gate)
        else:
            up = F.gelu(up)
        out: Tensor = self.down(up)
        return out


def _norm(shape: dict[str, Any]) -> nn.LayerNorm | nn.RMSNorm:
    kind = nn.LayerNorm if shape.get("norm") == "layer" else nn.RMSNorm
    return kind(shape["width"], eps=shape.get("norm_eps", 1e-5))


class Block(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.m_residual = shape.get("m_residual", 1.0)
        self.norm_1 = _norm(shape)
        self.attention = Attention(shape)
        self.norm_2 = _norm(shape)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, kept: Tensor, cache: DynamicCache | None, layer: int) -> Tensor:
        x = x + self.m_residual * self.attention(self.norm_1(x), kept, cache, layer)
        out: Tensor = x + self.m_residual * self.mlp(self.norm_2(x))
        return out


class Decoder(nn.Module):
    def __init__(self, shape: dict[str, Any], vocab_size: int) -> None:
        super().__init__()
        self.m_emb, self.dropout = shape.get("m_emb", 1.0), shape.get("dropout", 0.0)
        self.embedding = nn.Embedding(vocab_size, shape["width"])
        positions = shape.get("positions", 0)
        self.positions = nn.Embedding(positions, shape["width"]) if positions else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["layers"]))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape["width"], vocab_size, bias=False)

    def forward(self, tokens: Tensor, kept: Tensor, cache: DynamicCache | None) -> Tensor:
        x = self.embedding(tokens) * self.m_emb
        if self.positions is not None:
            place = (kept.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            if kept.shape[1] and int(place.max()) >= self.positions.num_embeddings:
                raise ValueError(f"{int(place.max()) + 1} tokens exceed {self.positions.num_embeddings} positions")
            x = x + self.positions(place)
        x = F.dropout(x, self.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, kept, cache, layer)
        out: Tensor = self.norm(x)
        return out


class SbevalForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SbevalConfig
    base_model_prefix = "decoder"
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}
    _no_split_modules = ["Block"]

    def __init__(self, config: SbevalConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.shape or {}, config.vocab_size)
        self.m_width = (config.shape or {}).get("m_width", 1.0)
        self.post_init()  # type: ignore[no-untyped-call]  # theirs

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as PyTorch draws them: the folder has them all."""

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (B, T, vocab_size) of input_ids (B, T), and with `labels` their mean loss, shifted by one.

        attention_mask: (B, past + T), 0 at padding, of which logits are undefined. position_ids: not read, as they
        follow from the mask.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        hidden = self.decoder(input_ids, attention_mask, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.head(hidden[:, kept]) / self.m_width
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output
