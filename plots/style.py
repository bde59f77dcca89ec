"""Shared by all figures: the look of each method, bars and bands, and how rows are split into panels."""

import itertools
import math
import re
import textwrap
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from sbeval.tables import epochs, intervals, mqrar, needle
from sbeval.tables.intervals import FEW
from sbeval.tables.rows import Identity, Provenance, labels
from sbeval.tables.statistics import Method, Scale

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
# positions of the settings of figures in results/, after those; any other has one by its options, see `_position`. The
# last three are in figures without the first
VARIANTS = {
    ("stick_breaking", "remainder=none"): 8,
    ("stick_breaking", "logit_bias=-3.0"): 9,
    ("stick_breaking", "logit_bias=-1.5"): 10,
    ("sliding_window", "window=256"): 11,
    ("sliding_window", "window=1024"): 12,
    ("stick_breaking", "remainder=bias"): 13,
    ("stick_breaking", "logit_bias=-4.5"): 14,
    ("stick_breaking", "logit_bias=-6.0"): 15,
    ("stick_breaking", "remainder=none,logit_bias=-1.5"): 16,
    ("stick_breaking", "remainder=none,logit_bias=-3.0"): 17,
    ("stick_breaking", "remainder=bias,head_norm=true"): 18,
    ("stick_breaking", "remainder=none,qkv_bias=true"): 19,
    ("stick_breaking", "remainder=none,logit_bias=spread"): 20,
    ("stick_breaking", "logit_bias=spread"): 21,
    ("stick_breaking", "remainder=none,init_std=0.02"): 22,
    ("rope", "key_shift=true"): 1,
    ("rope", "qkv_bias=true"): 8,
    ("stick_breaking", "epsilon=0"): 8,
}
# options that legends name otherwise than `_in_words` does
WORDS = {
    "logit_bias=spread": "logit offsets spread",
    "logit_bias": "logit offset {}",
    "remainder=none": "no remainder",
    "remainder=bias": "learned remainder",
    "qkv_bias=true": "q, k, v biases",
    "init_std": "initial σ {}",
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
# titles name what the rows of a panel share; a column without a label appears as "name value"
LABELS = labels(Identity, Provenance, mqrar.Row, needle.Row)
TEXT_PT, SMALL_PT = 8, 7
WIDTH_IN, ROW_IN = 7.2, 2.3
# lines of a legend for which `grid` leaves room, and the height of a further one
LEGEND_LINES, LINE_IN = 4, 0.17
MARK = "0.35"
TRAINED: dict[str, Any] = {"color": MARK, "linewidth": 1.0, "linestyle": (0, (2, 2))}


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
    return looks_of(_methods(table))


def _methods(table: pd.DataFrame) -> set[Method]:
    return {(str(row.attention), str(row.options)) for row in table[["attention", "options"]].itertuples()}


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
            positions[method] = _unlike(_position(method), positions.values())
    candidates = itertools.chain(
        range(len(NAMES), len(COLOURS)),
        (index for name, index in order.items() if name not in forms),
        itertools.count(len(COLOURS)),
    )
    free = (index for index in candidates if index not in set(positions.values()))
    styled: dict[Method, Look] = {}
    for method in sorted(methods, key=lambda pair: (order.get(pair[0], len(NAMES)), pair)):
        index = positions[method] if method in positions else next(free)
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
    return zlib.crc32(":".join(method).encode()) % math.lcm(len(COLOURS), len(MARKERS), len(DASHES))


def _unlike(position: int, taken: Iterable[int]) -> int:
    """Return the first position from this one on whose colour no other has or, if all are had, whose look is none's."""
    others = set(taken)
    colours = {other % len(COLOURS) for other in others}
    candidates = itertools.count(position)
    if len(colours) < len(COLOURS):
        return next(index for index in candidates if index % len(COLOURS) not in colours)
    return next(index for index in candidates if index not in others)


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
    present = _methods(rows)
    return {of: look for of, look in looks.items() if of in present}


def leaving(labels: Collection[str]) -> str:
    """Name in a note the lines that leave their panels, if any."""
    return f" {', '.join(labels)} {'leaves' if len(labels) == 1 else 'leave'} the panels." if labels else ""


def with_caution(note: str, rows: pd.DataFrame, looks: dict[Method, Look]) -> str:
    """Add to a note which models of these rows overfit, or trained for too many epochs."""
    return " ".join(filter(None, [note, epochs.caution(rows, lambda method: looks[method].label)]))


def panels(
    table: pd.DataFrame,
    always: Sequence[str],
    others: Sequence[str],
    within: Sequence[str] = (),
    *,
    named: Sequence[str] = (),
) -> list[tuple[str, pd.DataFrame]]:
    """Split a table into the rows of each panel and its title.

    A column of `always` or `others` splits when it has several values for the same value of `within` or, if it is
    `named`, at all. Titles name the columns of `always`, and of `others` those that split and are `named` or needed to
    tell panels apart.
    """
    counts = anywhere = table[[*always, *others]].nunique()
    if within:
        counts = table.groupby(list(within))[[*always, *others]].nunique().max()
    split = [name for name in (*always, *others) if (anywhere if name in named else counts)[name] > 1]
    groups = [rows for _, rows in table.groupby(split, dropna=False)] if split else [table]
    named_columns = [*always, *(name for name in split if name in named and name not in always)]
    for name in others:
        apart = len(table[named_columns].drop_duplicates())
        if name in split and name not in named_columns and len(table[[*named_columns, name]].drop_duplicates()) > apart:
            named_columns.append(name)
    return [(_title(rows, named_columns), rows) for rows in groups]


def pairs(rows: int, *, share_y: bool = False) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Make a figure as wide as a page, with rows of two panels, and room for a legend above and a note below."""
    figure, axes = grid(rows, 2, share_y=share_y)
    figure.set_size_inches(WIDTH_IN, ROW_IN * rows + 0.7)
    return figure, [(left, right) for left, right in axes]


def grid(rows: int, columns: int, *, share_y: bool = True) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of rows and columns of panels, with room for legends above and a note below."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    # three columns are as wide as a page
    figure = Figure(figsize=(WIDTH_IN * (1 + columns) / 4, ROW_IN * rows + 1.0), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=TEXT_PT)
    return figure, [list(row) for row in axes]


def label(axis: Axes, x: str, y: str) -> None:
    """Name both axes, with units."""
    axis.set_xlabel(x, fontsize=TEXT_PT)
    axis.set_ylabel(y, fontsize=TEXT_PT)


def title(axis: Axes, text: str, above: float = 16) -> None:
    """Write the title of a row of panels above its first, by so many points, wrapped to the width of the figure."""
    # about 15 bold letters fit an inch; the labels of the axes take one inch
    lines = textwrap.wrap(text, round(15 * (axis.figure.bbox.width / axis.figure.dpi - 1)))
    # reserves the height; the layout would move neighbouring panels apart for the text itself
    axis.set_title("\n".join(" " for _ in lines), loc="left", fontsize=TEXT_PT, pad=above)
    axis.annotate(
        "\n".join(lines),
        (0.0, 1.0),
        xycoords="axes fraction",
        xytext=(0, above),
        textcoords="offset points",
        fontsize=TEXT_PT,
        fontweight="bold",
        annotation_clip=False,
    ).set_in_layout(False)


def subtitle(axis: Axes, text: str) -> None:
    """Write the title of one panel of a row above it, in small print."""
    axis.annotate(
        text,
        (0.5, 1.0),
        xycoords="axes fraction",
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL_PT,
    )


def bars(axis: Axes, x: Any, points: pd.DataFrame, look: Look, width: float = 1.0) -> None:
    """Draw the intervals of points (see `intervals.points`) as vertical bars, and their seeds as dots."""
    axis.vlines(x, points["low"], points["high"], color=look.colour, linewidth=width)
    seeds(axis, x, points, look)


def seeds(axis: Axes, x: Any, points: pd.DataFrame, look: Look) -> None:
    """Draw each seed of points that have few as a dot."""
    few = [(at, value) for at, each in zip(x, points["each"], strict=True) if 1 < len(each) <= FEW for value in each]
    if few:
        at, values = zip(*few, strict=True)
        axis.scatter(at, values, s=5, color=look.colour, alpha=0.6, linewidths=0, zorder=2)


def bands(axis: Axes, rows: pd.DataFrame, looks: dict[Method, Look]) -> list[pd.DataFrame]:
    """Draw a line of `value`, a share, by `x` and a band for each method; return their points."""
    points = intervals.points(rows, ["x"], Scale.SHARE)
    drawn = []
    for of, look in looks.items():
        mine = intervals.method(points, of)
        if mine.empty:
            continue
        axis.plot(mine["x"], mine["mean"], label=look.label, **look.line())
        axis.fill_between(mine["x"], mine["low"], mine["high"], color=look.colour, alpha=0.2, linewidth=0)
        seeds(axis, mine["x"], mine, look)
        drawn.append(mine)
    return drawn


def finish(figure: Figure, handles: Sequence[Any], note: str) -> None:
    """Put the legend above the panels, where it covers no data, and the note below them.

    The figure grows by the lines of a legend that it has no room for.
    """
    columns = _columns(handles, 4, figure.get_figwidth())
    longer = max(0, math.ceil(len(handles) / columns) - LEGEND_LINES)
    figure.set_figheight(figure.get_figheight() + LINE_IN * longer)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=columns,
        fontsize=TEXT_PT,
        frameon=False,
        handlelength=3,
    )
    note_below(figure, note)


def _columns(handles: Sequence[Any], most: int, width_in: float) -> int:
    """Return how many columns of a legend, at most `most`, fit a width; entries fill one column after the other."""
    for columns in range(min(most, len(handles)), 1, -1):
        lines = math.ceil(len(handles) / columns)
        # inches of a handle and of a letter, roughly
        widths = [
            0.55 + 0.06 * max(len(handle.get_label()) for handle in handles[start : start + lines])
            for start in range(0, len(handles), lines)
        ]
        if sum(widths) <= width_in - 0.1:
            return len(widths)
    return 1


def note_below(figure: Figure, text: str) -> None:
    """Write a note below the panels."""
    # about 19 letters fit an inch
    lines = textwrap.fill(text, round(19 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALL_PT, color=MARK)


def shares(axis: Axes) -> None:
    """Draw a y axis of shares from 0 to 1, with room for markers at both ends."""
    axis.set_ylim(-0.03, 1.03)


def octaves(axis: Axes, low: float, high: float, through: float, most: int = 8) -> None:
    """Make x logarithmic from `low` to `high`, with at most `most` labels at powers of two, one next to `through`."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first + 1) / most))
    start = first + (round(math.log2(through)) - first) % step
    ticks(axis, [2.0**exponent for exponent in range(start, last + 1, step)])
    axis.set_xlim(low / 1.2, high * 1.2)


def ticks(axis: Axes, values: Sequence[float]) -> None:
    """Make x logarithmic to base 2 with labels at exactly these values."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(values)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def decades(axis: Axes) -> None:
    """Make y logarithmic, with plain numbers as labels."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def counts(axis: Axes) -> None:
    """Make x logarithmic, with large numbers such as 20 M as labels."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.xaxis.set_minor_formatter(NullFormatter())


def training_length(axis: Axes, length: int) -> None:
    """Mark the training length by a vertical line."""
    axis.axvline(length, zorder=1, **TRAINED)


def training_length_handle() -> Line2D:
    """Return the entry of `training_length` for a legend."""
    return Line2D([], [], label="training length", **TRAINED)


def inside(text: str) -> str:
    """Return a title as it goes on within another."""
    return text[:1].lower() + text[1:]


def _title(rows: pd.DataFrame, names: Sequence[str]) -> str:
    single = {name: rows[name].iloc[0] for name in names if rows[name].nunique() == 1 and str(rows[name].iloc[0])}
    words = ", ".join(
        LABELS.get(name, f"{name.replace('_', ' ')} {{}}").format(value) for name, value in single.items()
    )
    words = re.sub(r"\b1 (head|layer)s", r"1 \1", words)
    return words[:1].upper() + words[1:]
