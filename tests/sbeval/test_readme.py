"""Every command that the README and docs/ show is one that runs: to its end where it reads tables, else to its plan.
Every file that the pages link to is there."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from sbeval.cli import main
from sbeval.models.config import named
from sbeval.models.decoder import Decoder
from sbeval.sweep import study_file
from sbeval.training import checkpoint
from sbeval.training.checkpoint import State
from sbeval.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "NOTES.md"]
# commands that read result tables and are done in seconds
AT_ONCE = ("plot", "report", "table", "compare", "doctor", "export")


def commands() -> list[str]:
    """What follows `sbeval` in every indented line."""
    found = []
    for page in PAGES:
        for line in re.findall(r"^    (.+)$", page.read_text(), re.M):
            found += re.findall(r"(?:^|&& |-m )sbeval (.+?)(?= && | > |$)", line)
    return found


# what the commands name, and what stands for it here
STANDS_FOR = {"shawntan/stickbreaking-3b": "CHECKPOINT", "bpe:8192": "bytes"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: tables of all families, books, items, questions, checkpoints."""
    home = tmp_path_factory.mktemp("home")
    # of families that have no other, those of the study `quick`
    for results in ("results/quick", "results"):
        shutil.copytree(ROOT / results, home / "results", dirs_exist_ok=True)
    (home / "books").mkdir()
    for index in range(4):
        (home / "books" / f"{index}.txt").write_text(f"Chapter {index}. " + "It was a dark night. " * 2000)
    torch.manual_seed(0)
    model = Decoder(named("quick", vocab_size=257, attention="stick_breaking"))
    training = dataclasses.asdict(TrainConfig(steps=1, batch=1, length=64, lr=1e-3))
    for folder in ("results/checkpoints/DIGEST", "NAME_OR_FOLDER", "CHECKPOINT"):
        checkpoint.save(home / folder, model, State(losses=[1.0], finished=True), training=training)
    (home / "items").mkdir()
    (home / "mine.yaml").write_text(study_file.text("h200"))
    shutil.copytree(ROOT / "results" / "quick", home / "other")
    (home / "dev-v2.0.json").write_text(
        json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": "Ada wrote.",
                                "qas": [{"question": "Who?", "answers": [{"text": "Ada"}], "is_impossible": False}],
                            }
                        ]
                    }
                ]
            }
        )
    )
    return home


def links(page: Path) -> list[str]:
    """Targets of links and images that are no addresses, without what stands behind a #."""
    found = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)\"", page.read_text())
    targets = [(one or other).partition("#")[0] for one, other in found]
    return [target for target in targets if target and not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_files_that_are_there(page: Path) -> None:
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_there_are_links() -> None:
    found = {page.name: links(page) for page in LINKING}
    assert "../sbeval/evaluation/ruler_tasks.py" in found["tasks.md"]
    assert "results/typed/figures/length_gen.png" in found["README.md"]


def test_there_are_commands() -> None:
    found = commands()
    assert len(found) > 15 and {"length-gen --preset quick", "report"} <= set(found)


# what a distribution is imported as, where its name is another
MODULES = {"pyyaml": "yaml"}
WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split():
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from sbeval.cli.main import app
for command in sys.argv[2:]:
    app(command.split(), standalone_mode=False)
"""


def test_tables_need_no_more_than_the_readme_installs_for_them(tmp_path: Path) -> None:
    listed = re.search(r"--no-deps -e \. && pip install ([\w ]+)`", (ROOT / "README.md").read_text())
    assert listed is not None
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    # pandas comes with numpy
    rest = {re.split("[>;]", name)[0] for name in needed} - {*listed[1].split(), "numpy"}
    assert "torch" in rest
    (typed, cpu) = (ROOT / "results" / name for name in ("typed", "typed-cpu"))
    commands = (
        f"plot --results-dir {typed} --format png --out {tmp_path}",
        f"compare {typed} {cpu}",
        f"power --results-dir {typed} --seed-sd 0.01",
        f"table tokens --results-dir {ROOT / 'results' / 'tokens'}",
        f"check --results-dir {typed}",
    )
    blocked = " ".join(MODULES.get(name, name) for name in rest)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, blocked, *commands], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_a_command_of_the_readme_runs(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [STANDS_FOR.get(word, word) for word in shlex.split(command)]
    if arguments[0] == "report" or "html" in arguments:
        pytest.importorskip("plotly")
    if arguments[0] not in AT_ONCE and not {"--dry-run", "--show"} & set(arguments):
        arguments.append("--dry-run")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["sbeval", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code in (None, 0)
