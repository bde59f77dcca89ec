"""Tests mirror the folders: a module has a test file of its own name, or a reason here to have none."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"sbeval": "tests/sbeval", "kernels": "tests/kernels", "tasks": "tests/tasks", "plots": "tests/plots"}
# constants and interfaces, which their users test; else the tests of the module in whose work they take part
WITHOUT = {
    "sbeval/bench/rows.py": "written by a benchmark: tests/sbeval/bench/test_models.py",
    "sbeval/cli/results.py": "commands: tests/sbeval/cli/test_main.py",
    "sbeval/cli/sweeps.py": "commands: tests/sbeval/cli/test_main.py",
    "sbeval/sweep/family.py": "an interface: tests/sbeval/test_registry.py",
    "sbeval/sweep/work.py": "part of a sweep: tests/sbeval/sweep/test_scheduler.py",
    "sbeval/tables/power_options.py": "options of a command: tests/sbeval/tables/test_power.py",
    "sbeval/tables/published.py": "constants",
    "sbeval/report/claims.py": "a table of claims: tests/sbeval/report/test_judge.py",
    "sbeval/report/page.py": "part of a report: tests/sbeval/report/test_html.py",
    "sbeval/evaluation/ruler_drafts.py": "what tasks are written with: tests/sbeval/evaluation/test_ruler_tasks.py",
    "sbeval/evaluation/ruler_needles.py": "eight of the tasks: tests/sbeval/evaluation/test_ruler_tasks.py",
    "sbeval/pretrained/foreign.py": "read from models as released: tests/sbeval/pretrained/test_released.py",
    "sbeval/tables/columns.py": "words: tests/sbeval/cli/test_columns.py",
    "sbeval/tables/parquet.py": "stored with values: tests/sbeval/tables/test_values.py",
    "sbeval/tables/store.py": "stored with values: tests/sbeval/tables/test_values.py",
    "sbeval/training/stepper.py": "part of training: tests/sbeval/training/test_trainer.py",
    "sbeval/training/fsdp.py": "needs several processes: tests/sbeval/runtime/test_distributed.py",
    "tasks/length_gen_losses.py": "part of the cell: tests/tasks/test_length_gen.py",
    "tasks/length_gen_rows.py": "part of the cell: tests/tasks/test_length_gen.py",
    "tasks/generated.py": "base of the example package: tests/sbeval/test_example.py",
    "plots/chart.py": "interactive figures: tests/sbeval/report/test_html.py",
    "plots/needle_depth.py": "the same rows by depth: tests/plots/test_needle.py",
    "plots/kernel_error.py": "the same rows by error: tests/plots/test_kernel.py",
    "kernels/hopper.py": "part of the Hopper kernels: tests/kernels/test_stick_breaking_hopper.py",
    "kernels/stick_breaking_hopper_backward.py": "as above: tests/kernels/test_stick_breaking_hopper.py",
    "kernels/stick_breaking_hopper_gradients.py": "as above: tests/kernels/test_stick_breaking_hopper.py",
    "kernels/stick_breaking_hopper_movers.py": "as above: tests/kernels/test_stick_breaking_hopper.py",
    "kernels/stick_breaking_hopper_order.py": "as above: tests/kernels/test_stick_breaking_hopper.py",
    "kernels/stick_breaking_triton.py": "a backend: tests/kernels/test_stick_breaking.py",
    "kernels/fire_triton.py": "a backend: tests/kernels/test_fire.py",
}


def modules() -> dict[str, Path]:
    """Return the test file of each module, by the module's path."""
    # links to the other folders are not followed
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not path.name.startswith("__")]
    paths = [path.relative_to(ROOT) for path in files if path.is_relative_to(path.resolve().parents[0])]
    return {str(path): ROOT / FOLDERS[path.parts[0]] / path.relative_to(path.parts[0]) for path in paths}


def mirror(module: Path) -> Path:
    return module.with_name(f"test_{module.name}")


def test_every_module_has_a_test_file_or_a_reason() -> None:
    found = modules()
    assert len(found) > 100 and not any(name.startswith("sbeval/tasks") for name in found)
    assert {name for name, test in found.items() if not mirror(test).exists()} == set(WITHOUT)


@pytest.mark.parametrize("module", WITHOUT)
def test_what_a_reason_names_is_there(module: str) -> None:
    assert (ROOT / module).exists()
    named = WITHOUT[module].partition(": ")[2]
    assert not named or (ROOT / named).exists()
