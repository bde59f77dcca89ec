"""The package is complete however it is built: from git, from a zip without links, through an sdist, and editable."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ("kernels", "plots", "tasks")
BUILT = ("MANIFEST.in", "README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "sbeval", "tests", *LINKS)
DATA = ["py.typed", "report/page.html", "studies/h200.yaml", "studies/paper.yaml", "studies/quick.yaml"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the repository: of a clone with links, and of a zip, in which each is a text file with its target."""
    found = {}
    for form in ("git", "zip"):
        folder = found[form] = tmp_path_factory.mktemp(form)
        for name in BUILT:
            if (ROOT / name).is_dir():
                skipped = shutil.ignore_patterns("__pycache__", *(LINKS if name == "sbeval" else ()))
                shutil.copytree(ROOT / name, folder / name, ignore=skipped)
            else:
                shutil.copy(ROOT / name, folder)
        for name in LINKS:
            if form == "git":
                (folder / "sbeval" / name).symlink_to(f"../{name}")
            else:
                (folder / "sbeval" / name).write_text(f"../{name}")
    return found


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel, sdist or editable wheel with the installed setuptools, without a network."""
    out.mkdir()
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True, text=True)
    (built,) = out.iterdir()
    return built


def unpack(built: Path, folder: Path) -> Path:
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(folder)
    return folder


def modules() -> set[str]:
    """The package's files as a wheel has them."""
    here = {f"sbeval/{path.relative_to(ROOT / 'sbeval')}" for path in (ROOT / "sbeval").rglob("*.py")}
    linked = {f"sbeval/{path.relative_to(ROOT)}" for name in LINKS for path in (ROOT / name).glob("*.py")}
    return here | linked | {f"sbeval/{name}" for name in DATA}


def test_packages_are_those_of_the_repository() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "sbeval").rglob("*.py")}
    assert set(config["packages"]) == {".".join(folder.parts) for folder in folders} | {f"sbeval.{x}" for x in LINKS}
    assert config["package-dir"] == {f"sbeval.{name}": name for name in LINKS}


@pytest.mark.parametrize("form", ["git", "zip"])
def test_a_wheel_has_every_file(sources: dict[str, Path], form: str, tmp_path: Path) -> None:
    installed = unpack(build("wheel", sources[form], tmp_path / "dist"), tmp_path / "installed")
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert modules() - files == set()
    # a folder called kernels at the top would replace another project's package
    assert {path.name for path in installed.iterdir() if "." not in path.name} == {"sbeval"}
    check_import(f"sys.path.insert(0, {str(installed)!r})", installed / "sbeval" / "kernels" / "rope.py", tmp_path)


def test_an_sdist_has_the_tests_and_builds_the_same_wheel(sources: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(build("sdist", sources["zip"], tmp_path / "sdist")) as archive:
        # from Python 3.11.4 on
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    (source,) = tmp_path.glob("sbeval-*")
    assert (source / "tests" / "conftest.py").exists() and (source / "tests" / "kernels" / "test_rope.py").exists()
    built = build("wheel", source, tmp_path / "dist")
    assert modules() - set(zipfile.ZipFile(built).namelist()) == set()


@pytest.mark.parametrize("form", ["git", "zip"])
def test_an_editable_install_imports_from_the_folder(sources: dict[str, Path], form: str, tmp_path: Path) -> None:
    installed = unpack(build("editable", sources[form], tmp_path / "dist"), tmp_path / "installed")
    check_import(f"import site; site.addsitedir({str(installed)!r})", sources[form] / "kernels" / "rope.py", tmp_path)


def check_import(prepare: str, expected: Path, elsewhere: Path) -> None:
    """Import the package as installed there, and not from this repository."""
    code = f"""
import sys
{prepare}
sys.path.append({sysconfig.get_path("purelib")!r})
import importlib.util, sbeval.tasks.mqrar, sbeval.plots.style
print(importlib.util.find_spec("sbeval.kernels.rope").origin)
"""
    # without `site`, which would find the editable install of these tests first
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=elsewhere, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert Path(done.stdout.strip()).resolve() == expected.resolve()
