"""The look of each method, the same in every figure, and its name in legends."""

import itertools
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D

from sbeval.tables import intervals
from sbeval.tables.rows import Method

# the position in this table fixes a method's colour, marker and dashes in every figure
NAMES = {
    "stick_breaking": "stick-breaking",
    "rope": "RoPE",
    "alibi": "ALiBi",
    "nope": "NoPE",
    "fire": "FIRE",
    "sliding_window": "sliding window",
    "forgetting": "forgetting",
    # see `named`
    "learned": "learned positions",
}
# positions of the settings of figures in results/; any other has one by its options, see `_position`. Those that share
# a position are in no figure together
VARIANTS = {
    ("stick_breaking", "remainder=none"): 8,
    ("stick_breaking", "logit_bias=-3.0"): 9,
    ("stick_breaking", "logit_bias=-1.5"): 26,
    ("sliding_window", "window=256"): 11,
    ("sliding_window", "window=1024"): 12,
    ("stick_breaking", "remainder=bias"): 13,
    ("stick_breaking", "logit_bias=-4.5"): 14,
    ("stick_breaking", "logit_bias=-6.0"): 15,
    ("stick_breaking", "remainder=none,logit_bias=-1.5"): 16,
    ("stick_breaking", "remainder=none,logit_bias=-3.0"): 17,
    ("stick_breaking", "remainder=bias,head_norm=true"): 18,
    ("stick_breaking", "remainder=none,qkv_bias=true"): 19,
    ("stick_breaking", "remainder=none,logit_bias=spread"): 24,
    ("stick_breaking", "logit_bias=spread"): 21,
    ("stick_breaking", "remainder=none,init_std=0.02"): 22,
    ("rope", "key_shift=true"): 8,
    ("rope", "qkv_bias=true"): 9,
    ("stick_breaking", "epsilon=0"): 8,
    # kernels of softmax, in all figures of speed
    ("softmax", "cudnn"): 1,
    ("softmax", "flash"): 2,
    ("softmax", "flex"): 3,
    ("rope", "cudnn"): 1,
    ("rope", "flash"): 2,
}
# options that legends name otherwise than `_in_words` does
WORDS = {
    "logit_bias=spread": "logit offsets spread",
    "logit_bias": "logit offset {}",
    "remainder=none": "no remainder",
    "remainder=bias": "learned remainder",
    "qkv_bias=true": "q, k, v biases",
    "init_std": "initial σ {}",
    "epsilon=0": "nothing skipped",
    "epsilon": "epsilon={}",
    # of the figure `kernel`, whose options are kernels
    "triton": "portable kernels",
}
# default of sliding_window, which its options leave out
WINDOW = 512
# the authors' scale in recall, with which stick-breaking is drawn as without
SHARED = "logit_scale=1.5"
# sizes of `sbeval.models.config` with learned positions, whose method is called nope: its attention knows none
LEARNED = ("nanogpt-60m",)
# seaborn's colour-blind palette, its faint yellow and pink last
COLOURS = [sns.color_palette("colorblind").as_hex()[index] for index in (0, 3, 2, 4, 1, 5, 9, 7, 6, 8)]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "<", ">")
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (5, 1.5),
    (1.2, 1.2),
    (5, 1.2, 1.2, 1.2),
    (3, 1.2),
    (7, 1.2, 1.2, 1.2, 1.2, 1.2),
)
LOOKS = math.lcm(len(COLOURS), len(MARKERS), len(DASHES))


@dataclass(frozen=True, slots=True)
class Look:
    """Colour, marker and dashes of one method, and its name in legends."""

    label: str
    colour: str
    marker: str
    dashes: tuple[float, ...]

    def line(self) -> dict[str, Any]:
        """Return the keywords that give a matplotlib line this look."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": 4.5,
            "markeredgewidth": 0.8,
            "linewidth": 1.4,
            "linestyle": (0, self.dashes) if self.dashes else "-",
        }

    def handle(self) -> Line2D:
        """Return the method's entry for a legend."""
        return Line2D([], [], label=self.label, **self.line())


def colour(name: str) -> str:
    """Return the colour of a named method."""
    return COLOURS[list(NAMES).index(name)]


def looks(table: pd.DataFrame) -> dict[Method, Look]:
    """Give each method of a table, a pair (attention, options), its look, in the order of the legend."""
    return looks_of(intervals.methods(table))


def looks_of(methods: Iterable[Method]) -> dict[Method, Look]:
    """Give each method its look, in the order of the legend.

    A named method without options has its own, and so has its only form in a figure; other forms have that of their
    options, with the next colour where another has that here. Methods not in NAMES, and options that are only a word,
    have the next free look. Options shared by all forms of a method are left out of labels.
    """
    methods = set(methods)
    order = {name: index for index, name in enumerate(NAMES)}
    forms = {name: [options for other, options in methods if other == name] for name, _ in methods}
    positions = _fixed(methods, forms)
    for method in sorted(set(methods) - set(positions)):
        if "=" in method[1] and len(forms[method[0]]) > 1:
            positions[method] = _unlike(itertools.count(_position(method)), positions.values())
    unused = (index for name, index in order.items() if name not in forms)
    free = [*range(len(NAMES), len(COLOURS)), *unused, *range(len(COLOURS), LOOKS)]
    styled: dict[Method, Look] = {}
    for method in sorted(methods, key=lambda pair: (order.get(pair[0], len(NAMES)), pair)):
        if method not in positions:
            positions[method] = _unlike(free, positions.values())
        index = positions[method]
        styled[method] = Look(
            label=_label(*method, forms[method[0]]),
            colour=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            dashes=DASHES[index % len(DASHES)],
        )
    return styled


def _fixed(methods: Iterable[Method], forms: dict[str, list[str]]) -> dict[Method, int]:
    """Return the position of each method that is one of VARIANTS, or one of NAMES and has no options or no other form.

    Of equal ones the first has it.
    """
    found: dict[int, Method] = {}
    for name, options in sorted(methods):
        rest = ",".join(option for option in options.split(",") if option != SHARED)
        if (name, rest) in VARIANTS:
            found.setdefault(VARIANTS[name, rest], (name, options))
        elif name in NAMES and (not rest or len(forms[name]) == 1):
            found.setdefault(list(NAMES).index(name), (name, options))
    return {method: index for index, method in found.items()}


def _position(method: Method) -> int:
    """Return a position that depends on the name and the options of a method alone, of as many as there are looks."""
    return zlib.crc32(":".join(method).encode()) % LOOKS


def _unlike(candidates: Iterable[int], taken: Iterable[int]) -> int:
    """Return the first position with a colour that no other has; if all are taken, with a colour and a marker that
    none has together; if these are too, the first."""
    looks = {(other % len(COLOURS), other % len(MARKERS)) for other in taken}
    colours, candidates = {colour for colour, _ in looks}, [*itertools.islice(candidates, LOOKS)]
    if len(colours) < len(COLOURS):
        return next(index for index in candidates if index % len(COLOURS) not in colours)
    free = (index for index in candidates if (index % len(COLOURS), index % len(MARKERS)) not in looks)
    return next(free, candidates[0])


def named(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose column `attention` says `learned` for models that have learned positions and no others."""
    if not {"attention", "model"} <= set(table.columns):
        return table
    learned = (table["attention"] == "nope") & table["model"].isin(LEARNED)
    return table.assign(attention=table["attention"].mask(learned, "learned")) if learned.any() else table


def _label(name: str, options: str, all_options: Sequence[str]) -> str:
    each = [set(other.split(",")) for other in all_options]
    common = set.intersection(*each)
    given = [option for option in options.split(",") if option]
    if len(each) > 1 and common in each:
        given = [option for option in given if option not in common]
    called = NAMES.get(name, name.replace("_", " "))
    if name == "sliding_window":
        width = re.search(r"\bwindow=(\d+)", options)
        called += f" of {width[1] if width else WINDOW}"
        given = [option for option in given if not option.startswith("window=")]
    return called + (f" ({', '.join(map(_in_words, given))})" if given else "")


def _in_words(option: str) -> str:
    """Return an option as legends name it: `key shift` for key_shift=true, `theta 500` for theta=500.0."""
    name, given, value = option.partition("=")
    value = value.removesuffix(".0").replace("-", "−")
    if words := WORDS.get(option) or WORDS.get(name):
        return words.format(value)
    name = name.replace("_", " ")
    if value in ("true", "false"):
        return name if value == "true" else f"no {name}"
    return f"{name} {value}" if given else name


def methods(rows: pd.DataFrame, looks: dict[Method, Look]) -> dict[Method, Look]:
    """Return the looks of the methods that rows have."""
    present = intervals.methods(rows)
    return {of: look for of, look in looks.items() if of in present}
