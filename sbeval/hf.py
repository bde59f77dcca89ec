"""Our models as models of Hugging Face transformers.

Importing this module registers them: AutoModelForCausalLM.from_pretrained then loads what `export` wrote, without code
from the folder. It registers `attn_implementation="stick_breaking"` for other models too. Generation packs prompts, so
that padding on the left changes nothing, and decodes with the cache of `sbeval.models.kv_cache`. A forward pass makes a
cache only with `use_cache=True`, as generate() passes.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import platformdirs
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from sbeval import hf_attention as hf_attention  # registers attn_implementation="stick_breaking"
from sbeval import hf_card
from sbeval.data import sources
from sbeval.data.tokenizer import Tokenizer, check_same, is_trained, load
from sbeval.errors import InputError, first_line
from sbeval.models.config import ModelConfig, padded_vocabulary
from sbeval.models.decoder import Decoder
from sbeval.models.kv_cache import Cache
from sbeval.runtime.files import new_folder, readable_as_others, storing
from sbeval.training import checkpoint


class SbevalConfig(PreTrainedConfig):
    """shape: the fields of a ModelConfig but for vocab_size and tied, for which transformers has its own names.

    train_len: tokens per sequence that the model was trained on, None if unknown.
    """

    model_type = "sbeval"
    vocab_size: int = 0
    shape: dict[str, Any] | None = None
    train_len: int | None = None

    @classmethod
    def of(cls, shape: ModelConfig, **more: Any) -> "SbevalConfig":
        """Return the config of a decoder."""
        fields = dataclasses.asdict(shape)
        more |= {"vocab_size": fields.pop("vocab_size"), "tie_word_embeddings": fields.pop("tied")}
        return cls(shape=fields, **more)

    @property
    def model_config(self) -> ModelConfig:
        """Return the decoder's own config."""
        return ModelConfig(vocab_size=self.vocab_size, tied=self.tie_word_embeddings, **(self.shape or {}))

    # read by tools from any model

    @property
    def hidden_size(self) -> int:
        return self.model_config.width

    @property
    def num_hidden_layers(self) -> int:
        return self.model_config.layers

    @property
    def num_attention_heads(self) -> int:
        return self.model_config.heads

    @property
    def max_position_embeddings(self) -> int:
        # most of our models have no such limit, and then no such attribute
        if not self.model_config.positions:
            raise AttributeError("max_position_embeddings")
        return self.model_config.positions


class Past(Cache):
    """A cache that grows, with the methods that generate() calls."""

    reorder_cache = Cache.reorder
    # its shape changes
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows.length


class SbevalForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SbevalConfig
    base_model_prefix = "decoder"
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}
    _no_split_modules = ["Block"]
    # a cache can't drop tokens: generate() then refuses speculative decoding
    _is_stateful = True
    _built = False

    def __init__(self, config: SbevalConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.model_config)
        self.post_init()  # type: ignore[no-untyped-call]  # theirs
        self._built = True

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, as a decoder draws its own weights; raise InputError for weights missing from the files."""
        given = all(getattr(x, "_is_hf_initialized", False) for x in module.parameters(recurse=False))
        if self._built and not given:
            raise InputError(f"the model's files lack weights of a {type(module).__name__}")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # the first forward pass makes the cache
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (B, T, vocab_size) of input_ids (B, T), and with `labels` their mean loss, shifted by one.

        attention_mask: (B, T) or, with a cache, (B, past + T); 0 at padding, left or right, with a cache left only.
        Logits at padding are undefined. position_ids: (B, T) or (1, T), must be the default. Raise InputError for the
        arguments after it.
        """
        if inputs_embeds is not None or output_attentions or output_hidden_states:
            raise InputError(
                "inputs_embeds, output_attentions and output_hidden_states are not supported by this model"
            )
        if input_ids is None:
            raise InputError("this model needs input_ids")
        if past_key_values is not None:
            _check_past(input_ids, attention_mask, past_key_values)
        if position_ids is not None:
            _check_positions(position_ids, input_ids, attention_mask, past_key_values)
        if past_key_values is not None:
            hidden = self._extend(input_ids, past_key_values)
        elif use_cache:
            hidden, past_key_values = self._begin(input_ids, attention_mask)
        else:
            hidden = self._whole(input_ids, attention_mask)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.logits(hidden[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]  # ours
        return output.to_tuple() if return_dict is False else output

    def _whole(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or bool(mask.all()):
            hidden: Tensor = self.decoder(tokens)
            return hidden
        real = mask.bool()
        if self.decoder.positions is not None:
            # packed, its rows would be one row to the table of positions
            return self._read(tokens, real, _lengths(real, "right"))[0]
        lengths = torch.tensor(_lengths(real, "right"), device=tokens.device)
        bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return _unpacked(self.decoder(tokens[real][None], bounds)[0], real)

    def _begin(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Past]:
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        return self._read(tokens, real, _lengths(real))

    def _read(self, tokens: Tensor, real: Tensor, lengths: list[int]) -> tuple[Tensor, Past]:
        self.decoder.check_positions(max(lengths))
        past = Past(lengths, room=0, layers=self.decoder.config.layers, device=tokens.device)
        return _unpacked(self.decoder.extend(tokens[real][None], past)[0], real), past

    def _extend(self, tokens: Tensor, past: Past) -> Tensor:
        steps = []
        for token in tokens.split(1, 1):
            self.decoder.check_positions(past.rows.length + 1)
            if past.rows.length == past.rows.capacity:
                past.grow(max(64, past.rows.capacity // 4))
            steps.append(self.decoder.extend(token, past))
        return torch.cat(steps, 1)


def _check_past(tokens: Tensor, mask: Tensor | None, past: Past) -> None:
    """Raise InputError when tokens can't continue a cache."""
    if not isinstance(past, Past):
        raise InputError(f"past_key_values must be what this model returned; got a {type(past).__name__}")
    if len(tokens) != len(past.rows.starts):
        raise InputError(f"past_key_values has {len(past.rows.starts)} rows and input_ids {len(tokens)}")
    if not tokens.shape[1]:
        raise InputError(f"past_key_values has {past.rows.length} tokens of each row: input_ids has none after them")
    if tokens.shape[1] > 1 and mask is not None and not bool(mask[:, -tokens.shape[1] :].all()):
        raise InputError("input_ids that continue a cache can't be padded: give their attention_mask as 1")


def _check_positions(given: Tensor, tokens: Tensor, mask: Tensor | None, past: Past | None) -> None:
    """Raise InputError when position_ids are not the number of tokens before each in its row."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None or past is not None else mask.bool()
    wanted = real.cumsum(1) - 1 + (0 if past is None else past.rows.next_positions())
    if given.shape[-1] != tokens.shape[1] or bool(((given != wanted) & real).any()):
        raise InputError(
            "position_ids must count each row's tokens from 0, a cache's included and padding not: leave them out"
        )


def _lengths(real: Tensor, *also: str) -> list[int]:
    """Return the tokens of each row. Raise InputError for padding that is not on the left, or, if `also`, the right."""
    counts, slots = real.sum(1), torch.arange(real.shape[1], device=real.device)
    left = (real == (slots >= real.shape[1] - counts[:, None])).all()
    right = (real == (slots < counts[:, None])).all()
    on_left, on_right, *lengths = torch.cat([torch.stack([left, right]), counts]).tolist()
    if not min(lengths):
        raise InputError("a row has no tokens: its attention_mask must not be 0 everywhere")
    if not on_left and not (also and on_right):
        raise InputError("padding must be on the left with a cache, and never within a row: use padding_side='left'")
    return lengths


def _unpacked(hidden: Tensor, real: Tensor) -> Tensor:
    """Unpack hidden states of real tokens, (N, width), to (B, T, width), 0 at padding."""
    out = hidden.new_zeros(*real.shape, hidden.shape[-1])
    out[real] = hidden
    return out


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer for transformers; there, text that spells a special token is that token."""
    backend = tokenizer.library()
    eos = backend.id_to_token(tokenizer.eos)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, padding_side="left")


def tokenizer_of(spec: str | None, corpus: str | None, text_field: str) -> Tokenizer | None:
    """Load the tokenizer of `spec`, trained on the corpus (or cached) for bpe:N; None for `none`."""
    if spec is None:
        raise InputError(
            "a checkpoint does not hold its tokenizer: give the --tokenizer of its training, or --tokenizer none"
        )
    if spec == "none":
        return None
    if is_trained(spec) and corpus is None:
        raise InputError(f"tokenizer {spec!r} is trained on a corpus: give that --corpus, or its tokenizer.json")

    def texts() -> Iterator[str]:
        assert corpus is not None
        return (document.text for document in sources.source(corpus, text_field).documents("train"))

    return load(spec, train_texts=texts, cache_dir=Path(platformdirs.user_cache_dir("sbeval")))


def export(folder: Path, out: Path, tokenizer: Tokenizer | None, *, code: bool = False) -> None:
    """Write a checkpoint as a folder of transformers; raise InputError when that would overwrite files.

    tokenizer: that of the training texts; None for a model that was not trained on text. code: add a module by which
    `trust_remote_code=True` loads the folder where sbeval is not installed (`sbeval.hf_portable`).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: give another folder")
    decoder = checkpoint.load_model(folder)
    if code:
        hf_card.check_portable(decoder.config.attention)
    size = decoder.config.vocab_size
    if tokenizer is not None and size not in (tokenizer.vocab_size, padded_vocabulary(tokenizer.vocab_size)):
        raise InputError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens and the model of {folder} {size}: "
            "give the --tokenizer that it was trained with"
        )
    if tokenizer is not None:
        check_same(checkpoint.training_tokenizer(folder), tokenizer, str(folder))
    fast = None if tokenizer is None else fast_tokenizer(tokenizer)
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}
    train_len = checkpoint.training_length(folder)
    model = SbevalForCausalLM(SbevalConfig.of(decoder.config, train_len=train_len, **ends))
    model.decoder.load_state_dict(decoder.state_dict())
    with new_folder(out) as partial, storing(out):
        try:
            model.save_pretrained(partial)
            if fast is not None:
                fast.save_pretrained(partial)
            if code:
                hf_card.write_code(partial)
            name = None if tokenizer is None else tokenizer.name
            hf_card.write_card(partial, decoder.config, train_len=train_len, tokenizer=name, code=code)
        except SafetensorError as error:
            raise OSError(first_line(error)) from None
        for path in partial.glob("*.safetensors"):
            readable_as_others(path)


AutoConfig.register(SbevalConfig.model_type, SbevalConfig)
AutoModelForCausalLM.register(SbevalConfig, SbevalForCausalLM)
