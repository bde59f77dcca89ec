"""Test the captured inputs of the skipping benchmark, and the reach of heads; times need a GPU."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F

from sbeval.bench import skipping
from sbeval.data import corpus
from sbeval.errors import InputError
from sbeval.kernels import stick_breaking
from sbeval.models.config import named
from sbeval.models.decoder import Decoder


@pytest.mark.parametrize("options", ["", ":logit_bias=-2,logit_scale=1.5", ":attend_current=true"])
def test_what_is_captured_gives_what_the_layer_computes(options: str) -> None:
    torch.manual_seed(0)
    model = Decoder(named("quick", vocab_size=257, attention=f"stick_breaking{options}"))
    mixed: list[torch.Tensor] = []
    mixers = [module for module in model.modules() if isinstance(module, stick_breaking.Mixer)]
    for mixer in mixers:
        mixer.register_forward_hook(lambda *call: mixed.append(call[-1]))
    layers = skipping.capture(model, torch.randint(257, (1, 70)), "float32")
    assert len(layers) == len(mixed) == 4
    for layer, wanted in zip(layers, mixed, strict=True):
        out, rest = stick_breaking.attention(layer.q, layer.k, layer.v, **layer.options)
        assert torch.allclose(out + rest[..., None] * layer.v, wanted, atol=1e-6)
    # nothing is captured once it is done
    assert not any(mixer._forward_pre_hooks for mixer in mixers)


@pytest.mark.parametrize("attend_current", [False, True])
def test_reach_counts_the_keys_read(attend_current: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 50, 4, 8), torch.randn(1, 50, 2, 8)
    layer = skipping.Captured(q, k, k, {"scale": 0.7, "bias": torch.randn(4), "attend_current": attend_current})
    found = skipping.reach(layer, 1e-3, sample=20)
    for head in range(4):
        counts = []
        for i in range(30, 50):
            left, count = 1.0, 0
            for j in range(i if attend_current else i - 1, -1, -1):
                if left < 1e-3:
                    break
                count += 1
                z = float(q[0, i, head] @ k[0, j, head // 2]) * 0.7 + float(layer.options["bias"][head])
                left *= float(torch.exp(F.logsigmoid(torch.tensor(-z))))
            counts.append(count)
        assert float(found[head]) == pytest.approx(sum(counts) / len(counts), abs=0.11)


def test_rows_that_do_not_fit_are_fewer_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(contender: skipping.Contender, step: str, batch: int, *_: object) -> Any:
        # softmax has no grouped heads to spare
        if batch > 8 and contender.attention == "softmax":
            raise torch.OutOfMemoryError
        return [(contender.backend, batch)]

    monkeypatch.setattr(skipping, "_measured", measured)
    k = torch.zeros(1, 50, 2, 8)
    batch, rows = skipping._fitted("decode", 32, [skipping.Captured(k, k, k, {})], k)
    assert batch == 8 and rows == cast(Any, [[(contender.backend, 8)] for contender in skipping.CONTENDERS])
    assert capsys.readouterr().out.splitlines() == [
        f"decode of 50 tokens: out of memory at {n} at a time: continuing with {n // 2}" for n in (32, 16)
    ]


def test_rows_name_the_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.zeros(1, 50, 2, 8)
    layer = skipping.Captured(k, k, k, {})
    dense, _, flash, _ = skipping.CONTENDERS
    monkeypatch.setattr(stick_breaking, "pick_backend", lambda *given: "triton" if given[3] else "triton-hopper")
    assert [skipping._backend(dense, step, layer) for step in ("forward", "decode")] == ["triton-hopper", "triton"]
    assert skipping._backend(flash, "forward", layer) == "flash"


def test_it_needs_a_gpu(tmp_path: Path) -> None:
    text = corpus.Split
    with pytest.raises(InputError, match="benchmarks need a GPU"):
        skipping.measure("nowhere", text, [64], torch.device("cpu"), "float32", tmp_path)  # type: ignore[arg-type]
