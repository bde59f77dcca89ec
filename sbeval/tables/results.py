"""The layout of a results folder, defined here alone.

<family>.csv                     result tables
parts/<family>/<cell>.csv         rows of finished cells, until the run ends and they go into the table
runs/<cell>.json                 run files, with digests of the cell's rows and other files
values/<cell>.parquet            values of each document, item or prompt behind the rows
curves/<cell>.parquet            losses and scores by training step
checkpoints/<digest>/            models, and locks/<digest>.lock while one is trained
locks/<cell>.lock                held while a cell runs
locks/threads-<digest>           threads on the CPU of a command, until it is complete
answers/<family>-<digest>.sqlite stored responses of models, which a resumed run does not generate again
figures/<figure>.{png,pdf,html}
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Results:
    """Paths in a results folder; they need not exist."""

    folder: Path

    def table(self, family: str) -> Path:
        return self.folder / f"{family}.csv"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def run_file(self, cell: str) -> Path:
        """Return the path of the run file of the cell with this id."""
        return self.runs / f"{cell}.json"

    def values(self, cell: str) -> Path:
        return self.folder / "values" / f"{cell}.parquet"

    def curves(self, cell: str) -> Path:
        return self.folder / "curves" / f"{cell}.parquet"

    @property
    def written(self) -> tuple[Path, ...]:
        """Return the folders into which files are written under temporary names, which killed processes leave."""
        return (self.folder, self.runs, self.values("").parent, self.curves("").parent, self.locks)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def locks(self) -> Path:
        return self.folder / "locks"

    def threads(self, command: str) -> Path:
        """Return the path of the number of threads of the command with this digest."""
        return self.locks / f"threads-{command}"

    def cleared(self, name: str) -> Path:
        """Return the path of the id of the last run with `force` that cleared the folder or file `name`."""
        return self.locks / f"{name}.cleared"

    def answers(self, name: str) -> Path:
        return self.folder / "answers" / f"{name}.sqlite"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"
