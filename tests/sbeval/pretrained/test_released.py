"""Released checkpoints of every layout, against their mathematics written out in loops over heads and positions."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sbeval.errors import InputError
from sbeval.generate import generate
from sbeval.models.decoder import Decoder
from sbeval.pretrained import load, released
from sbeval.training import checkpoint

CPU = torch.device("cpu")
VOCABULARY, WIDTH, LAYERS, HEADS, SIZE, HIDDEN = 23, 12, 2, 4, 3, 10
Weights = dict[str, Tensor]
Settings = dict[str, Any]


def build(layout: str, *, groups: int = HEADS, tied: bool = True, bias: str = "", **settings: Any) -> Any:
    """Config and random tensors of one layout. bias: `qkv` or `all`."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    both = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    counts = {"num_key_value_heads": groups, "attention_head_type": {HEADS: "mha", 1: "mqa"}.get(groups, "gqa")}
    if layout == "flame":
        config = both | {
            "model_type": "sba",
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_heads": HEADS,
            "num_kv_heads": groups,
            "intermediate_size": HIDDEN,
            "norm_eps": 1e-5,
            "hidden_act": "swish",
            "max_position_embeddings": 64,
        }
        shapes |= {"model.embeddings.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
        for i in range(LAYERS):
            block = f"model.layers.{i}."
            shapes |= {block + "attn_norm.weight": (WIDTH,), block + "mlp_norm.weight": (WIDTH,)}
            shapes |= {block + f"attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"}
            shapes |= {block + f"attn.{name}_proj.weight": (groups * SIZE, WIDTH) for name in "kv"}
            shapes |= {block + f"mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
            shapes[block + "mlp.down_proj.weight"] = (WIDTH, HIDDEN)
    else:
        more = {"add_bias": bias == "all"}
        named = {"normalization_function": "rmsnorm", "layer_norm_epsilon": 1e-5}
        if layout == "D":
            mixer = counts | more | {"sequence_mixer_type": "stickbreaking_attention", "num_attention_heads": HEADS}
            mlp = more | {"mlp_type": "MLP", "intermediate_size": HIDDEN, "activation_function": "swiglu"}
            config = (
                both
                | named
                | {
                    "model_type": "gpt_base",
                    "hidden_size": WIDTH,
                    "num_layers": LAYERS,
                    "max_position_embeddings": 64,
                    "sequence_mixer_blocks": [mixer] * LAYERS,
                    "mlp_blocks": [mlp] * LAYERS,
                }
            )
        else:
            config = (
                both
                | named
                | counts
                | more
                | {
                    "model_type": "sb_dolomite" if layout == "A" else "stickbreaking",
                    "n_embd": WIDTH,
                    "n_layer": LAYERS,
                    "n_head": HEADS,
                    "n_inner": HIDDEN,
                    "n_positions": 64,
                    "activation_function": "swiglu",
                    "add_qkv_bias": bias == "qkv",
                    "position_embedding_type": "rope",
                }
            )
        attn, mlp_name = ("sequence_mixer.", "mlp_block.") if layout == "D" else ("attn.", "mlp.")
        shapes |= {"transformer.wte.weight": (VOCABULARY, WIDTH), "transformer.ln_f.weight": (WIDTH,)}
        for i in range(LAYERS):
            block = f"transformer.h.{i}."
            shapes |= {block + f"ln_{k}.weight": (WIDTH,) for k in (1, 2)}
            linear = {
                attn + "c_attn": (WIDTH + 2 * groups * SIZE, WIDTH),
                attn + "c_proj": (WIDTH, WIDTH),
                mlp_name + "c_fc": (2 * HIDDEN, WIDTH),
                mlp_name + "c_proj": (WIDTH, HIDDEN),
            }
            for name, shape in linear.items():
                shapes[f"{block}{name}.weight"] = shape
                if bias == "all" or bias == "qkv" and name.endswith("c_attn"):
                    shapes[f"{block}{name}.bias"] = shape[:1]
            if layout in "BCD" and settings.get("sb_remainder", True):
                shapes[block + attn + "head_bias"] = (HEADS, SIZE)
            if layout in "CD":
                shapes |= {block + attn + "norm.weight": (WIDTH,), block + attn + "norm.bias": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    tensors = {name: torch.randn(shape, generator=generator).double() * 0.7 for name, shape in shapes.items()}
    return config | settings, tensors


def write(folder: Path, config: Settings, tensors: Weights, files: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    place = {name: f"model-{k % files + 1:05}-of-{files:05}.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({name: x for name, x in tensors.items() if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([row / ((row * row).sum() / len(row) + 1e-5).sqrt() * weight for row in x])


def apply(t: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ t[f"{name}.weight"].T
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def heads_of(t: Weights, attn: str, x: Tensor, groups: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of each head: where each layout keeps the rows of a head, counted out."""
    found = []
    for h in range(HEADS):
        if f"{attn}q_proj.weight" in t:
            g = h * groups // HEADS
            starts = [(f"{attn}q_proj", h), (f"{attn}k_proj", g), (f"{attn}v_proj", g)]
        elif groups == HEADS:
            starts = [(f"{attn}c_attn", 3 * h + k) for k in range(3)]
        elif groups == 1:
            starts = [(f"{attn}c_attn", place) for place in (h, HEADS, HEADS + 1)]
        else:
            share = HEADS // groups
            base = h // share * (share + 2)
            starts = [(f"{attn}c_attn", base + place) for place in (h % share, share, share + 1)]
        q, k, v = (apply(t, name, x)[:, place * SIZE : (place + 1) * SIZE] for name, place in starts)
        found.append((q, k, v))
    return found


def stick(q: Tensor, k: Tensor, v: Tensor, scale: float, rest: str, head_bias: Tensor | None) -> Tensor:
    out = torch.zeros_like(v)
    for i in range(len(q)):
        left = torch.ones((), dtype=q.dtype)
        for j in range(i - 1, -1, -1):
            beta = 1 / (1 + torch.exp(-scale * (q[i] * k[j]).sum()))
            out[i] += left * beta * v[j]
            left = left * (1 - beta)
        if rest == "value":
            out[i] += left * v[i]
        elif rest == "bias":
            assert head_bias is not None
            out[i] += left * head_bias
    return out


def reference(config: Settings, t: Weights, tokens: list[int], rest: str, groups: int) -> Tensor:
    """Logits (T, vocabulary) by the definition."""
    flame = "model.norm.weight" in t
    m_residual = config.get("m_residual") or 1.0
    mixer = config.get("sequence_mixer_blocks", [config])[0]
    scale = mixer.get("attention_multiplier") or 1 / math.sqrt(SIZE)
    embedding = t["model.embeddings.weight" if flame else "transformer.wte.weight"]
    x = embedding[tokens] * (config.get("m_emb") or 1.0)
    for i in range(LAYERS):
        block = f"model.layers.{i}." if flame else f"transformer.h.{i}."
        new = f"{block}sequence_mixer.c_attn.weight" in t
        attn, mlp = (block + name for name in (("sequence_mixer.", "mlp_block.") if new else ("attn.", "mlp.")))
        first, second = ("attn_norm", "mlp_norm") if flame else ("ln_1", "ln_2")
        parts = []
        for h, (q, k, v) in enumerate(heads_of(t, attn, rms(x, t[f"{block}{first}.weight"]), groups)):
            y = stick(q, k, v, scale, rest, t[attn + "head_bias"][h] if rest == "bias" else None)
            if attn + "norm.weight" in t:
                own = slice(h * SIZE, (h + 1) * SIZE)
                centred = y - y.sum(1, keepdim=True) / SIZE
                y = centred / ((centred**2).sum(1, keepdim=True) / SIZE + 1e-5).sqrt()
                y = y * t[attn + "norm.weight"][own] + t[attn + "norm.bias"][own]
            parts.append(y)
        x = x + m_residual * apply(t, attn + ("o_proj" if flame else "c_proj"), torch.cat(parts, 1))
        z = rms(x, t[f"{block}{second}.weight"])
        if flame:
            up, gate = apply(t, mlp + "up_proj", z), apply(t, mlp + "gate_proj", z)
        else:
            both = apply(t, mlp + "c_fc", z)
            up, gate = both[:, :HIDDEN], both[:, HIDDEN:]
        inner = up * gate / (1 + torch.exp(-gate))
        x = x + m_residual * apply(t, mlp + ("down_proj" if flame else "c_proj"), inner)
    x = rms(x, t["model.norm.weight" if flame else "transformer.ln_f.weight"])
    return x @ t.get("lm_head.weight", embedding).T / (config.get("m_width") or 1.0)


MULTIPLIERS = {"m_emb": 12, "m_residual": 0.22, "m_width": 6, "attention_multiplier": 0.4}
# layout, where the rest of the stick goes, and what build() takes
CASES: list[tuple[str, str, Settings]] = [
    ("A", "value", {}),
    ("A", "value", {"sb_remainder": True, "groups": 2, "tied": False}),
    ("A", "none", {"sb_remainder": False, "groups": 1, "bias": "qkv"}),
    ("A", "value", {"bias": "all", **MULTIPLIERS}),
    ("B", "bias", {"sb_remainder": True, "groups": 2, "bias": "all"}),
    ("B", "bias", {"groups": 1, **MULTIPLIERS}),
    ("C", "bias", {"sb_remainder": True, "bias": "all"}),
    ("C", "none", {"sb_remainder": False, "groups": 2, "tied": False}),
    ("D", "bias", {"groups": 2, "bias": "all", "m_emb": 12, "m_residual": 0.22, "m_width": 6}),
    ("D", "bias", {"groups": 1, "tied": False}),
    ("D", "bias", {}),
    ("flame", "none", {"tied": False}),
    ("flame", "none", {"groups": 2}),
]


@pytest.mark.parametrize(("layout", "rest", "changes"), CASES, ids=str)
def test_logits_are_those_of_the_definition(tmp_path: Path, layout: str, rest: str, changes: Settings) -> None:
    config, tensors = build(layout, **changes)
    model, train_len = released.load(write(tmp_path / "a", config, tensors), torch.float64)
    tokens = [3, 1, 4, 1, 5, 9, 2]
    with torch.inference_mode():
        found = model.logits(model(torch.tensor([tokens])))[0]
    wanted = reference(config, tensors, tokens, rest, changes.get("groups", HEADS))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert train_len == 64
    assert model.n_parameters() == sum(x.numel() for x in tensors.values())


def test_a_multiplier_of_the_blocks_scales_the_logits(tmp_path: Path) -> None:
    config, tensors = build("D")
    config["sequence_mixer_blocks"] = [config["sequence_mixer_blocks"][0] | {"attention_multiplier": 0.3}] * LAYERS
    model, _ = released.load(write(tmp_path / "a", config, tensors), torch.float64)
    with torch.inference_mode():
        found = model.logits(model(torch.tensor([[3, 1, 4, 1]])))[0]
    torch.testing.assert_close(found, reference(config, tensors, [3, 1, 4, 1], "bias", HEADS))


def test_key_value_heads_that_are_not_said_are_counted(tmp_path: Path) -> None:
    config, tensors = build("A", groups=2)
    del config["num_key_value_heads"]
    model, _ = released.load(write(tmp_path / "a", config, tensors), torch.float64)
    assert model.config.n_kv_heads == 2


def test_several_files_are_one_model(tmp_path: Path) -> None:
    config, tensors = build("C")
    one, _ = released.load(write(tmp_path / "one", config, tensors), torch.float64)
    many, _ = released.load(write(tmp_path / "many", config, tensors, files=3), torch.float64)
    for name, x in one.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], x, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["A", "D"])
def test_generation_does_not_depend_on_the_batch(tmp_path: Path, layout: str) -> None:
    config, tensors = build(layout, groups=2, bias="all")
    model, _ = released.load(write(tmp_path / "a", config, tensors), torch.float64)
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2], [3], [8, 4, 6], [2, 6, 4, 3, 3]]
    alone, together = (generate(model, prompts, 5, CPU, batch=batch) for batch in (1, 8))
    assert alone == together
    rest = "value" if layout == "A" else "bias"
    tokens = list(prompts[2])
    for token in alone[2]:
        assert token == int(reference(config, tensors, tokens, rest, 2)[-1].argmax())
        tokens.append(token)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_loaded_by_its_path(tmp_path: Path, dtype: str) -> None:
    config, tensors = build("C", groups=2)
    found = load.load(str(write(tmp_path / "sb-3b", config, tensors)), CPU, dtype)
    assert (found.name, found.attention, found.options) == ("sb-3b", "stick_breaking", "remainder=bias")
    assert (found.vocab_size, found.train_len) == (VOCABULARY, 64)
    assert isinstance(found.model, Decoder) and not found.model.training
    wanted = reference(config, tensors, [3, 1, 4, 1], "bias", 2).float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = found.model.logits(found.model(torch.tensor([[3, 1, 4, 1]])))[0].float()
    close = 1e-3 if dtype == "float32" else 0.2
    torch.testing.assert_close(logits, wanted, rtol=close, atol=close * float(wanted.std()))


def test_a_name_of_the_hub_fetches_the_config_and_safetensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = build("A")
    folder = write(tmp_path / "copy", config, tensors, files=2)
    asked: list[Any] = []

    class Hub:
        @staticmethod
        def hf_hub_download(name: str, file: str) -> str:
            asked.append((name, file))
            if file != "config.json":
                raise OSError("no such file")
            return str(folder / file)

        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str]) -> str:
            asked.append((name, *allow_patterns))
            return str(folder)

    monkeypatch.setattr(load, "_hub", lambda: Hub)
    found = load.load("someone/sb-3b", CPU, "float32")
    assert found.name == "someone/sb-3b" and found.options == ""
    assert asked == [
        ("someone/sb-3b", "config.json"),
        ("someone/sb-3b", "config.json", "model*.safetensors", "model.safetensors.index.json"),
        ("someone/sb-3b", "adapter_config.json"),
    ]


def test_a_name_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def hf_hub_download(name: str, file: str) -> str:
            raise OSError(f"no {file} of {name}\nnor a connection")

    monkeypatch.setattr(load, "_hub", lambda: Hub)
    with pytest.raises(InputError, match="^no causal language model 'someone/none': no config.json of someone/none$"):
        load.load("someone/none", CPU, "float32")


def drop(name: str) -> Callable[[Settings, Weights], object]:
    return lambda config, tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Callable[[Settings, Weights], object]:
    return lambda config, tensors: tensors.update({name: torch.zeros(shape)})


def say(**settings: Any) -> Callable[[Settings, Weights], object]:
    return lambda config, tensors: config.update(settings)


def rename(old: str, new: str) -> Callable[[Settings, Weights], object]:
    def change(config: Settings, tensors: Weights) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def mixed(config: Settings, tensors: Weights) -> None:
    config["sequence_mixer_blocks"] = [
        config["sequence_mixer_blocks"][0],
        {"sequence_mixer_type": "softmax_attention"},
    ]


BAD: list[tuple[str, Callable[[Settings, Weights], object], str]] = [
    ("A", drop("transformer.h.1.ln_2.weight"), r"lacks the tensor transformer\.h\.1\.ln_2\.weight, of shape \(12,\)"),
    ("A", drop("transformer.h.0.mlp.c_proj.weight"), r"lacks the tensor transformer\.h\.0\.mlp\.c_proj\.weight"),
    ("B", drop("transformer.h.1.attn.head_bias"), r"lacks the tensor transformer\.h\.1\.attn\.head_bias"),
    ("C", drop("transformer.h.0.attn.norm.bias"), r"lacks the tensor transformer\.h\.0\.attn\.norm\.bias"),
    ("C", drop("transformer.h.0.attn.head_bias"), r"lacks the tensor transformer\.h\.0\.attn\.head_bias"),
    ("D", drop("transformer.h.0.sequence_mixer.norm.weight"), r"sequence_mixer\.norm\.weight, of shape \(12,\)"),
    ("A", put("transformer.h.2.ln_1.weight", 12), r"does not explain: transformer\.h\.\{i\}\.ln_1\.weight$"),
    ("A", put("transformer.wpe.weight", 64, 12), r"does not explain: transformer\.wpe\.weight$"),
    ("A", put("transformer.h.1.attn.head_bias", 4, 3), r"does not explain: transformer\.h\.\{i\}\.attn\.head_bias$"),
    ("A", put("transformer.h.1.attn.c_attn.weight", 35, 12), r"has shape \(35, 12\); its config gives \(36, 12\)"),
    ("B", put("transformer.h.0.attn.head_bias", 3, 4), r"has shape \(3, 4\); its config gives \(4, 3\)"),
    ("flame", put("model.layers.1.mlp.up_proj.weight", 9, 12), r"has shape \(9, 12\); its config gives \(10, 12\)"),
    ("A", rename(".attn.", ".mamba."), r"no known layout.*; its tensors: transformer\.h\.\{i\}\.ln_1\.weight, .*mamba"),
    ("A", rename(".mlp.", ".moe."), r"layers of experts.*not supported: transformer\.h\.\{i\}\.moe\.c_fc\.weight"),
    ("D", put("transformer.h.1.mlp_block.gate.weight", 8, 12), r"layers of experts.*mlp_block\.gate\.weight"),
    ("A", say(tie_word_embeddings=False), "tie_word_embeddings=False, but there is no lm_head.weight"),
    ("A", put("lm_head.weight", 23, 12), "tie_word_embeddings=True, but there is lm_head.weight"),
    ("A", say(add_qkv_bias=True), r"add_qkv_bias=True, but there is no transformer\.h\.0\.attn\.c_attn\.bias"),
    ("A", say(add_bias=True), r"add_bias=True, but there is no transformer\.h\.0\.attn\.c_attn\.bias"),
    ("B", say(sb_remainder=False), r"sb_remainder=False, but there is transformer\.h\.0\.attn\.head_bias"),
    ("A", say(model_type="gpt_dolomite"), "may be a softmax model"),
    ("A", say(attention_head_type="mqa"), "'mqa' contradicts 4 key-value heads of 4"),
    ("A", say(activation_function="gelu"), "activation_function 'gelu' is not supported, only swiglu"),
    ("A", say(normalization_function="layernorm"), "normalization_function 'layernorm' is not supported"),
    ("A", say(n_head=None), "must have a number for n_head or num_attention_heads or num_heads; got None"),
    ("A", say(n_layer=0), "n_layer must be a whole number of at least 1; got 0"),
    ("A", say(n_head=5), "width 12 is not a multiple of 5 heads"),
    ("A", say(n_head=24), "width 12 is not a multiple of 24 heads"),
    ("A", say(attention_multiplier="x"), "must have a number for attention_multiplier; got 'x'"),
    ("D", say(num_layers=3), "config.json has 2 sequence_mixer_blocks for 3 layers"),
    ("D", say(mlp_blocks=3), "mlp_blocks must be a list of settings; got 3"),
    ("D", mixed, "sequence_mixer_blocks differ from layer to layer"),
]


@pytest.mark.parametrize(("layout", "spoil", "message"), BAD, ids=[message for _, _, message in BAD])
def test_what_does_not_fit_is_one_clear_line(
    tmp_path: Path, layout: str, spoil: Callable[[Settings, Weights], object], message: str
) -> None:
    config, tensors = build(layout)
    spoil(config, tensors)
    with pytest.raises(InputError, match=message) as caught:
        load.load(str(write(tmp_path / "a", config, tensors)), CPU, "float32")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_what_the_index_says(tmp_path: Path) -> None:
    config, tensors = build("A")
    folder = write(tmp_path / "a", config, tensors, files=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]

    def refused(weight_map: object, message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            load.load(str(folder), CPU, "float32")

    refused({name: file for name, file in good.items() if "wte" not in name}, r"does not match .*: transformer\.wte")
    refused(good | {"more": "model-00001-of-00002.safetensors"}, "does not match .*: more$")
    refused(good | {"more": "../model.safetensors"}, "outside its folder")
    refused(good | {"more": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors can't be read")
    refused(None, "is not an index of safetensors")
    index.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors can't be read: .*safetensors alone"):
        load.load(str(folder), CPU, "float32")


def test_a_released_model_can_be_kept_as_a_checkpoint_of_ours(tmp_path: Path) -> None:
    config, tensors = build("D", groups=2, bias="all")
    model, _ = released.load(write(tmp_path / "theirs", config, tensors), torch.float32)
    checkpoint.save(tmp_path / "ours", model, checkpoint.State(finished=True))
    again = checkpoint.load_model(tmp_path / "ours")
    assert again.config == model.config
    for name, x in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], x, rtol=0, atol=0)
