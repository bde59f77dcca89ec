"""Interactive figures in one HTML file that loads nothing, so it opens without a network."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from sbeval.errors import InputError

TEMPLATE = Path(__file__).with_name("page.html")


def document(title: str, body: str) -> str:
    """Return the page; `body` is HTML, `title` text. InputError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("a page needs the plotly package: pip install 'sbeval[html]'") from None
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body=body, library=get_plotlyjs())


def plot(figure: Mapping[str, Any], words: str, css: str = "") -> str:
    """Return the element in which plotly draws `figure` (data and layout), with `words` for screen readers.

    Two further entries: `shaded` gives the first trace the theme's colours, `sparse` thins the labels.
    """
    # in a script `<` could end it
    data = json.dumps(figure, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<div class="plot" style="{html.escape(css)}" role="group" aria-label="{html.escape(words)}"></div>'
        f'<script type="application/json">{data}</script>'
    )
