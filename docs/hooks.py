"""Hooks of the documentation's build (mkdocs.yml): pages from outside docs/, and links that leave docs/.

Pages link to files of the repository as GitHub shows them. Here links to other pages are kept, images are copied, and
of links to anything else, of which the site has no page, the text remains.
"""

import base64
import json
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# page of the site: file of the repository
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
NOTEBOOK = "tour"
COPY = tempfile.TemporaryDirectory(prefix="sbeval-docs-")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
IMAGE = re.compile(r'(<img [^>]*?src=")([^"]+)(")')


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let docstrings be read from a copy in which kernels/, tasks/ and plots/ are folders of the package, not links."""
    package = Path(COPY.name) / "sbeval"
    shutil.copytree(ROOT / "sbeval", package, ignore=shutil.ignore_patterns("*.xz", "__pycache__"), dirs_exist_ok=True)
    for name in ("kernels", "plots", "tasks"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        (package / name / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [COPY.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, the notebook's, and the images that pages show."""
    for page, name in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    shown = {
        _target(file.src_uri, found[2])
        for file in files.documentation_pages()
        for found in IMAGE.finditer(file.content_string)
    }
    for name in sorted(name for name in shown if not name.startswith("docs/")):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    notebook = json.loads((ROOT / "docs" / f"{NOTEBOOK}.ipynb").read_text(encoding="utf-8"))
    images: dict[str, bytes] = {}
    files.append(File.generated(config, f"{NOTEBOOK}.md", content="\n".join(_cells(notebook, images))))
    for name, content in images.items():
        files.append(File.generated(config, name, content=content))
    return files


def _cells(notebook: dict[str, Any], images: dict[str, bytes]) -> Iterator[str]:
    """Yield the cells of a notebook as Markdown, and what they print; put what they draw into `images`, by file."""
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        yield text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                yield f"```text\n{''.join(output['text']).rstrip()}\n```"
            elif png := output.get("data", {}).get("image/png"):
                name = f"figures/{NOTEBOOK}-{len(images) + 1}.png"
                images[name] = base64.b64decode("".join(png))
                yield f'<img src="{name}" alt="What the cell above draws">'
        yield ""


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links and images point to where they are on the site."""
    here = page.file.src_uri

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        if re.match(r"#|[a-z]+:", target):
            return found[0]
        place, mark, part = target.partition("#")
        name = _of_site(_target(here, place))
        if files.get_file_from_path(name) is None:
            return words
        return f"[{words}]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{mark}{part})"

    def image(found: re.Match[str]) -> str:
        name = _of_site(_target(here, found[2]))
        return f"{found[1]}{posixpath.relpath(name, page.url or '.')}{found[3]}"

    return IMAGE.sub(image, LINK.sub(link, _blocks(markdown)))


def _blocks(markdown: str) -> str:
    """Leave marks of generated blocks out, and put formulas of a line of their own into blocks."""
    markdown = re.sub(r"^<!-- (?:numbers: \w+|end of numbers) -->\n", "\n", markdown, flags=re.M)
    return re.sub(r"^\$\$(.+)\$\$$", r"\\[\1\\]", markdown, flags=re.M)


def _target(page: str, link: str) -> str:
    """Return the file in the repository that a page links to."""
    own = PAGES.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(own), link))


def _of_site(name: str) -> str:
    """Return the path on the site of a file in the repository."""
    by_name = {name: page for page, name in PAGES.items()} | {f"docs/{NOTEBOOK}.ipynb": f"{NOTEBOOK}.md"}
    return by_name.get(name, name.removeprefix("docs/"))
