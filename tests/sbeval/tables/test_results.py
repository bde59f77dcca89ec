"""The layout of a results folder: each path has a place of its own in it, and the docstring names all."""

from pathlib import Path

from sbeval.tables import results
from sbeval.tables.results import Results

FOLDER = Path("out")
PATHS = {
    "table": Results(FOLDER).table("mqrar"),
    "runs": Results(FOLDER).runs,
    "run_file": Results(FOLDER).run_file("mqrar-rope-0"),
    "values": Results(FOLDER).values("mqrar-rope-0"),
    "curves": Results(FOLDER).curves("mqrar-rope-0"),
    "checkpoints": Results(FOLDER).checkpoints,
    "locks": Results(FOLDER).locks,
    "threads": Results(FOLDER).threads("digest"),
    "cleared": Results(FOLDER).cleared("digest"),
    "answers": Results(FOLDER).answers("few_shot-digest"),
    "figures": Results(FOLDER).figures,
}


def test_every_path_is_its_own_and_in_the_folder() -> None:
    public = {name for name in vars(Results) if not name.startswith("_")} - {"folder", "written"}
    assert public - {"part", "parts"} == set(PATHS)
    assert all(FOLDER in path.parents for path in PATHS.values()) and len(set(PATHS.values())) == len(PATHS)


def test_the_docstring_has_every_folder() -> None:
    assert results.__doc__ is not None
    folders = {path.relative_to(FOLDER).parts[0] for name, path in PATHS.items() if name != "table"}
    assert all(f"{name}/" in results.__doc__ for name in folders) and "<family>.csv" in results.__doc__


def test_paths_are_those_of_published_results() -> None:
    assert PATHS["table"] == FOLDER / "mqrar.csv" and PATHS["run_file"] == FOLDER / "runs" / "mqrar-rope-0.json"
