"""Every name of the registry is a module that implements the interface."""

import pytest

from sbeval import registry


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
