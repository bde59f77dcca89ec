"""Write docs/columns.md, the page of all columns: `python -m sbeval.cli.columns > docs/columns.md`."""

import dataclasses
import importlib
import types
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from sbeval import registry
from sbeval.tables import columns, markup
from sbeval.tables.rows import Identity, Measurement, Provenance

BENCHMARKS = {"kernel": "sbeval.bench.rows", "model": "sbeval.bench.rows", "skipping": "sbeval.bench.skipping"}
HEAD = """# Columns

Every table is long: one number a row. The first columns say which model was measured, those after them what, the
factors of the table's own where, and the last from which run. An empty cell means that the column does not apply. This
page is generated from the classes of the rows; `sbeval.load_results(folder)[family]` reads a table."""


def page() -> str:
    """Return the page: the common columns, then each table's own and its metrics."""
    common = {field: hint for part in (Identity, Measurement, Provenance) for field, hint in _fields(part)}
    parts = [HEAD, "## All tables", markup.table(("column", "type", "meaning"), _common(common))]
    for family, row, options in tables():
        own = [
            (name, _type(hint), describe(family, name, options)) for name, hint in _fields(row) if name not in common
        ]
        metrics = [(f"`{name}`", text) for name, text in columns.METRICS[family].items()]
        parts += [f"## {family}", markup.table(("metric", "meaning"), metrics)]
        factors = [(f"`{name}`", kind, text) for name, kind, text in own]
        parts.append(markup.table(("factor", "type", "meaning"), factors))
    return "\n\n".join(parts) + "\n"


def tables() -> Iterator[tuple[str, type[Measurement], dict[str, str]]]:
    """Yield each table of this package, the class of its rows and the help of its command's options."""
    for name in columns.METRICS:
        if name in BENCHMARKS:
            yield name, importlib.import_module(BENCHMARKS[name]).Row, {}
        else:
            family = registry.task(name)
            row = family.cells(family.presets["quick"])[0].row
            options = {x.name: x.metadata["help"] for x in dataclasses.fields(family.config) if "help" in x.metadata}
            yield name, row, options


def describe(family: str, factor: str, options: dict[str, str]) -> str:
    """Return the meaning of a factor."""
    found = columns.FACTORS[family].get(factor) or options.get(factor)
    assert found, f"describe the column {factor!r} of {family} in sbeval/tables/columns.py"
    return found


def _common(hints: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(f"`{name}`", _type(hint), columns.COMMON[name]) for name, hint in hints.items()]


def _fields(part: type[Any]) -> list[tuple[str, Any]]:
    hints = get_type_hints(part)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(part)]


def _type(hint: Any) -> str:
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (kind,) = (option for option in options if option is not types.NoneType)
    return {int: "integer", float: "number", str: "text"}[kind] + (" or empty" if len(options) > 1 else "")


if __name__ == "__main__":
    print(page(), end="")
