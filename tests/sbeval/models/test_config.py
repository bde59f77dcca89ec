"""Sizes, specs of attention and shapes of models."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sbeval.errors import InputError
from sbeval.kernels import nope
from sbeval.models.config import (
    SIZES,
    ModelConfig,
    canonical_attention,
    flops_per_token,
    named,
    parse_attention,
    trained_attention,
)
from sbeval.models.decoder import Decoder

VOCABULARY = 50


def shape(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "hidden": 40}
    return ModelConfig(**(fields | changes))


def build(seed: int = 0, **changes: Any) -> Decoder:
    """A decoder in double precision, none of whose parameters is at a value that hides it."""
    torch.manual_seed(seed)
    model = Decoder(shape(**changes)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def draw(*size: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "vocabulary", "millions", "digits"),
    [("350m", 32000, 367.5, 1), ("1b", 49152, 1208, 0), ("3b", 49152, 3511, 0), ("quick", 257, 1.3, 1)],
)
def test_parameters_of_the_named_sizes(size: str, vocabulary: int, millions: float, digits: int) -> None:
    with torch.device("meta"):
        model = Decoder(named(size, vocab_size=vocabulary, attention="rope"))
    assert round(model.n_parameters() / 1e6, digits) == millions


@pytest.mark.parametrize(("size", "vocabulary"), [("25m", 8192), ("60m", 8192), ("125m", 50304)])
def test_names_of_sizes_say_their_parameters(size: str, vocabulary: int) -> None:
    with torch.device("meta"):
        model = Decoder(named(size, vocab_size=vocabulary, attention="rope"))
    assert model.n_parameters() / 1e6 == pytest.approx(int(size[:-1]), rel=0.02)


def test_unknown_sizes_are_named() -> None:
    with pytest.raises(InputError, match="unknown model size '350'; did you mean '350m'"):
        named("350", vocab_size=10, attention="rope")
    assert all(named(size, vocab_size=10, attention="nope").d_head % 2 == 0 for size in SIZES)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("rope", "rope"),
        ("rope:", "rope"),
        ("rope:theta=1e4", "rope"),
        ("rope:theta=500000", "rope:theta=500000.0"),
        ("stick_breaking:remainder=value,attend_current=False", "stick_breaking"),
        ("stick_breaking:attend_current=TRUE,remainder=bias", "stick_breaking:remainder=bias,attend_current=true"),
        ("stick_breaking:epsilon=0", "stick_breaking:epsilon=0.0"),
        ("stick_breaking:logit_bias=-3", "stick_breaking:logit_bias=-3.0"),
        ("stick_breaking:logit_bias=spread", "stick_breaking:logit_bias=spread"),
        ("nope:qkv_bias=False,head_norm=false", "nope"),
        ("rope:init_std=2e-2,qkv_bias=true,theta=5", "rope:theta=5.0,qkv_bias=true,init_std=0.02"),
        ("alibi:key_shift=true,qkv_bias=true", "alibi:qkv_bias=true,key_shift=true"),
    ],
)
def test_specs_that_mean_the_same_read_the_same(spec: str, canonical: str) -> None:
    assert canonical_attention(spec) == canonical
    assert canonical_attention(canonical) == canonical


def test_a_spec_sets_the_block_around_its_method() -> None:
    config = shape(attention="rope:init_std=0.02,qkv_bias=true")
    assert (config.qkv_bias, config.head_norm, config.init_std) == (True, False, 0.02)
    # what evaluation alone changes leaves the block as it was trained
    assert trained_attention("rope:scaling=ntk,factor=4,head_norm=true") == "rope:head_norm=true"
    model = build(attention="rope:head_norm=true")
    other = model.evaluated_as("rope:scaling=ntk,factor=4,train_len=16,head_norm=true")
    assert other.config.head_norm and other.state_dict().keys() == model.state_dict().keys()
    # the spec before the size, which has a deviation of its own
    assert named("nanogpt-60m", vocab_size=9, attention="nope:init_std=0.5").init_std == 0.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rope,nope", "attention 'rope,nope' is no method: one is NAME or NAME:option=value,...; several are a "),
        # of a list without quotes: [stick_breaking:remainder=none,logit_bias=-3]
        ("logit_bias=-3", "a repeated --attention, or in a study a list, in which one with a comma has quotes"),
        ("ropee", "unknown attention 'ropee'; did you mean 'rope'? known: alibi, "),
        ("stick-breaking", "did you mean 'stick_breaking'?"),
        ("rope:tetha=1", "unknown option 'tetha' of attention 'rope'; did you mean 'theta'?"),
        ("rope:theta", "option 'theta' of attention 'rope' needs a value: rope:theta=..."),
        ("nope:theta=1", "unknown option 'theta' of attention 'nope'; known: head_norm, init_std, key_shift, qkv_bias"),
        ("nope:qkv_bias=1", "unknown nope:qkv_bias '1'; known: false, true"),
        ("rope:init_std=0", "init_std must be above 0 and finite; got 0.0"),
        ("stick_breaking:logit_bias=spraed", "logit_bias must be a number or 'spread'; got 'spraed'"),
        ("stick_breaking:logit_bias=inf", "logit_bias must be a finite number; got inf"),
        ("rope:theta=big", "rope:theta must be a number; got 'big'"),
        ("rope:theta=", "rope:theta must be a number; got ''"),
        ("rope:theta=-1", "theta must be positive and finite; it is -1"),
        ("rope:theta=inf", "theta must be positive and finite; it is inf"),
        ("rope:theta=1,theta=2", "option 'theta' of attention 'rope' is given twice in 'rope:theta=1,theta=2'"),
        ("stick_breaking:epsilon=1", "epsilon is a share of the stick, at least 0 and less than 1; got 1.0"),
        ("stick_breaking:epsilon=nan", "epsilon is a share of the stick, at least 0 and less than 1; got nan"),
        ("stick_breaking:logit_scale=nan", "logit_scale must be a finite number; got nan"),
        ("stick_breaking:attend_current=1", "unknown stick_breaking:attend_current '1'; known: false, true"),
        ("stick_breaking:epsilon=none", "stick_breaking:epsilon must be a number; got 'none'"),
        ("stick_breaking:remainder=valu", "unknown remainder 'valu'; did you mean 'value'?"),
    ],
)
def test_specs_that_will_not_do(spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        canonical_attention(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": "relu"}, "unknown mlp 'relu'; .*known: gelu, swiglu"),
        *(({name: 0}, f"{name} must be at least 1; got 0") for name in ("vocab_size", "width", "layers", "heads")),
        ({"hidden": -3}, "hidden must be at least 1; got -3"),
        ({"heads": 5}, "width 32 is not a multiple of 5 heads: give head_dim"),
        ({"kv_heads": 3}, "kv_heads 3 must divide the 4 heads"),
        ({"kv_heads": 0}, "kv_heads must be at least 1; got 0"),
        ({"kv_heads": -2}, "kv_heads must be at least 1; got -2"),
        ({"head_dim": 0}, "head_dim must be at least 1; got 0"),
        ({"positions": -1}, "positions must be at least 0; got -1"),
        ({"init_std": -1.0}, "init_std must be above 0 and finite; got -1"),
        ({"init_std": math.inf}, "init_std must be above 0 and finite; got inf"),
    ],
)
def test_shapes_that_will_not_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape(**changes)


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "tied": True}, {"kv_heads": 2, "head_dim": 12}], ids=str)
def test_flops_are_those_of_the_products(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # the dense definition makes all T x T logits. Half a square at twice the length is a whole one, so the counts agree
    # exactly; a causal kernel makes T (T + 1) / 2, of which half a square leaves out the half of the diagonal, 1 / T
    def dense(*tensors: Tensor, longest: None, starts: None, backend: None, **options: Any) -> Tensor:
        return nope.reference(*tensors, **options)

    monkeypatch.setattr(nope, "attention", dense)
    model, tokens = build(attention="nope", **changes), draw(3, 24)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens)
    assert flops_per_token(model.config, 2 * 24) * tokens.numel() == counter.get_total_flops()


OWN = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Literal
Mixer = backend_name = None

@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    {options}

    def __post_init__(self):
        if getattr(self, "hops", 1) < 1:
            raise ValueError("hops must be at least 1")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write the module `own_options.method`, a method with these options."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_options").mkdir()

    def write(options: str) -> None:
        (tmp_path / "own_options" / "method.py").write_text(OWN.format(options=options))
        importlib.invalidate_caches()
        for name in ("own_options", "own_options.method"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    return write


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("x: float = 1", "0.5", 0.5),
        ("x: int = 1", "2", 2),
        ("x: int | None = None", "2", 2),
        ("x: float | None = None", "2", 2.0),
        ("x: bool | None = None", "true", True),
        ("x: str | None = None", "2", "2"),
        ("x: int | str = 'all'", "2", 2),
        ("x: int | str = 'all'", "none", "none"),
        ("x: Literal['a', 'b'] = 'a'", "b", "b"),
    ],
)
def test_options_of_an_own_method_have_the_types_that_it_names(
    option: str, text: str, value: object, own: Callable[[str], None]
) -> None:
    own(option)
    found = parse_attention(f"own_options.method:x={text}")[1].x
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("option", "spec", "message"),
    [
        ("hops: int = 1", "hops=2.5", "hops must be an integer; got '2.5'"),
        ("hops: int = 1", "hops=0", "attention 'own_options.method:hops=0': hops must be at least 1"),
        ("x: Literal['a', 'b'] = 'a'", "x=c", "x 'c'; known: a, b"),
        ("x: int", "", "option 'x' of attention 'own_options.method' has no default"),
        ("x: list = field(default_factory=list)", "", "'x' of .* has no default"),
        ("x: tuple = ()", "", "'x' of .* is of type tuple; it must be int, float, bool, str or a Literal of texts"),
        ("key_shift: int = 1", "", "'key_shift' of .* is one of every method: give that of your own another name"),
    ],
)
def test_options_of_an_own_method_that_will_not_do(
    option: str, spec: str, message: str, own: Callable[[str], None]
) -> None:
    own(option)
    with pytest.raises(InputError, match=message):
        parse_attention(f"own_options.method:{spec}")
