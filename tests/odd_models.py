"""Tiny models of transformers with tokenizers, each odd in one way, the same bytes every time; and texts for them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

WORDS = "the a cat dog sat ran on under mat tree and then river stone light dark old new green blue".split()
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.5,
}


def byte_level(begin: bool = False, end: bool = False) -> Any:
    """A byte-level BPE that begins a text with <s>, or ends it with </s>, where asked for special tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if begin:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if end:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>" if begin else None, eos_token="</s>"
    )


def of_letters() -> Any:
    """A BPE in the manner of SentencePiece, of the letters of WORDS; others that stand together are one <unk>."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    inner.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def write(folder: Path, kind: str = "Llama", tokenizer: Any = None, **changes: Any) -> Path:
    """Write a random model of that kind. changes: of SHAPE, where ... leaves an option out."""
    options = {name: value for name, value in {**SHAPE, **changes}.items() if value is not ...}
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    # the class that AutoModelForCausalLM takes, whose random numbers are the same on all machines
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder


def longrope(folder: Path) -> Path:
    """A Phi-3 that reads up to 64 tokens with its short factors, and longer texts with its long ones."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    more: dict[str, Any] = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
    return write(folder, "Phi3", rope_parameters=rope, **more)


def dynamic(folder: Path) -> Path:
    """A Llama whose RoPE is scaled by the length of what it reads past 64 tokens."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return write(folder, rope_parameters=rope, max_position_embeddings=64)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **settings: Any) -> Path:
    """Change the tensors and the config of a model."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def corpus(folder: Path) -> Path:
    """Eight texts of 600 words."""
    folder.mkdir(parents=True)
    for place in range(8):
        (folder / f"{place}.txt").write_text(" ".join(random.Random(place).choices(WORDS, k=600)))
    return folder
