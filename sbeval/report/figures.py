"""Draw figures from result tables: what `sbeval plot` does. No torch is needed."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from sbeval import registry
from sbeval.errors import InputError, choose
from sbeval.runtime.files import prepare, replacing
from sbeval.tables.results import Results
from sbeval.tables.table import read

# no dates and no versions in the files: drawn again from the same table they have the same bytes
FORMATS: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"Creator": None, "Producer": None, "CreationDate": None}},
    "png": {"metadata": {"Software": None}, "dpi": 200},
}


def draw_figures(
    results_dir: Path,
    names: Sequence[str] | None = None,
    formats: Iterable[str] = ("png", "pdf"),
    out_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Draw the named figures, or all whose table exists, and return the files, `out_dir`/<name>.<format>.

    `out_dir` is `results_dir`/figures unless given. A figure left out for want of a table is said. InputError: an
    unknown name or format, a table that cannot be read or has nothing to draw and, for a named figure, no table.
    """
    chosen = [choose("format", name, (*FORMATS, "html")) for name in formats]
    if "html" in chosen and (flat := set(names or ()) - set(registry.PAGES)):
        raise InputError(
            f"{min(flat)} cannot be drawn as html, only {', '.join(registry.PAGES)}; give --format png or pdf"
        )
    modules = {name: registry.figure(name) for name in names or registry.FIGURES}
    folder = prepare(out_dir or Results(results_dir).figures)
    files = []
    for name, module in modules.items():
        path = Results(results_dir).table(module.TABLE)
        if not names and not path.exists():
            say(f"{name}: left out, there is no {path}")
            continue
        files += _draw(module, path, [folder / f"{name}.{suffix}" for suffix in chosen if suffix in FORMATS])
        if "html" in chosen and name in registry.PAGES:
            files.append(_write_page(registry.page(name), module, path, folder / f"{name}.html"))
    return files


def _write_page(page: registry.Page, module: registry.Figure, path: Path, file: Path) -> Path:
    text = page.page(read(path, required=module.COLUMNS))
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def _draw(module: registry.Figure, path: Path, files: list[Path]) -> list[Path]:
    if not files:
        return []
    table = read(path, required=module.COLUMNS)
    try:
        figure = module.draw(table)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    # fonts go into a pdf as outlines that editors and printers can read
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for file in files:
            with replacing(file) as temporary:
                suffix = file.suffix.removeprefix(".")
                figure.savefig(temporary, format=suffix, **FORMATS[suffix])
    return files
