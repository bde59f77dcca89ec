"""Every name of the registry is a module that implements the interface."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from sbeval import registry
from sbeval.errors import InputError


@pytest.mark.parametrize("name", registry.ATTENTION)
def test_methods_implement_the_interface(name: str) -> None:
    method = registry.method(name)
    mixer = method.Mixer(method.Options(), heads=4, kv_heads=2, head_dim=8, width=32, scale=0.5)
    assert callable(mixer)
    assert {method.backend_name(kind) for kind in ("cpu", "cuda")} >= {"torch"}
    module = __import__(registry.ATTENTION[name], fromlist=["reference"])
    assert module.reference and module.attention and module.__doc__


@pytest.mark.parametrize("name", registry.TASKS)
def test_families_implement_the_interface(name: str) -> None:
    family = registry.task(name)
    assert name == family.name and "quick" in family.presets
    assert family.help == registry.HELP[name] == registry.command_help(name)
    cells = family.cells(family.presets["quick"])
    assert {cell.family for cell in cells} == {name} and all(cell.flops > 0 for cell in cells)


@pytest.mark.parametrize("name", registry.FIGURES)
def test_figures_implement_the_interface(name: str) -> None:
    figure = registry.figure(name)
    assert figure.TABLE and figure.COLUMNS and callable(figure.draw) and callable(figure.chart)


class _Few(nn.Module):
    """A Mixer without a cache."""

    def __init__(self, options: Any, *, heads: int, kv_heads: int, head_dim: int, width: int, scale: float) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return v


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (_Few, "forward of its Mixer takes other arguments than sbeval.registry.Method states: too many positional"),
        (
            lambda options, heads: None,
            "its Mixer takes other arguments .*: got an unexpected keyword argument 'kv_heads'",
        ),
    ],
)
def test_a_mixer_of_other_arguments_is_named(mixer: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbeval.kernels.nope.Mixer", mixer)
    with pytest.raises(InputError, match=f"attention 'nope': {message}"):
        registry.mixer("nope", None, heads=4, kv_heads=2, head_dim=8, width=32, scale=0.5)


def test_broken_modules_of_others_are_named_and_leave_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_module.py").write_text("1 / 0")
    (tmp_path / "bare_module.py").write_text("")
    monkeypatch.setattr(registry, "FIGURES", {"one": "broken_module", "two": "bare_module", **registry.FIGURES})
    monkeypatch.setitem(registry.TASKS, "one", "broken_module")
    ours = list(registry.FIGURES)[2:]
    said: list[str] = []
    for _ in range(2):
        assert list(registry.all_figures(said.append)) == ours
    division, empty = said
    assert division == "sbeval.figures: 'one' cannot be imported, ZeroDivisionError: division by zero: left out"
    assert empty.startswith(
        "sbeval.figures: 'two' cannot be imported, InputError: figure 'two': the module bare_module"
    )
    assert registry.command_help("one") == "sbeval.tasks: 'one' cannot be imported, ZeroDivisionError: division by zero"
    with pytest.raises(ZeroDivisionError):
        registry.task("one")


def test_a_broken_module_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FIGURES, "one", "sbeval.plots.not_there")
    with pytest.raises(InputError, match="no module 'sbeval.plots.not_there'"):
        registry.all_figures(print)
