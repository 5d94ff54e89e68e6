"""The report's plots, each as PNG for light and for dark paper.

Colours follow Okabe and Ito, so that the colour-blind tell them apart: blue is right, orange is wrong, as
everywhere in the report, and no colour says what a mark or a number does not say too. Equal numbers give equal
bytes.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

# Inches. On a phone's 360 px a point is then a pixel.
WIDTH = 4.8
DPI = 180
BINS = 20
LABEL_LENGTH = 14


@dataclass(frozen=True)
class Scheme:
    """The colours of one paper: `models` are those of curves, the victim's first."""

    paper: str
    ink: str
    soft: str
    line: str
    right: str
    wrong: str
    models: tuple[str, ...]


LIGHT = Scheme(
    paper="#ffffff",
    ink="#1b1f24",
    soft="#57606a",
    line="#d5dbe1",
    right="#0b62b0",
    wrong="#c24e00",
    models=("#0b62b0", "#007a5a", "#a8497f", "#7a6a00", "#2f8fc4"),
)
DARK = Scheme(
    paper="#171b21",
    ink="#e8ebef",
    soft="#9fa9b5",
    line="#343c46",
    right="#6bb5ff",
    wrong="#ff9a52",
    models=("#6bb5ff", "#2fc79b", "#e59ac4", "#e3cf57", "#a3dbff"),
)


@dataclass(frozen=True)
class Plot:
    """One plot on both papers, and what it shows in words."""

    light: bytes
    dark: bytes
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Curve:
    """A share at every epsilon, clean first; None where there is nothing to count.

    `colour` is an index of the scheme's models, or the name of a field of it. `dashes` tells splits apart.
    """

    name: str
    values: tuple[float | None, ...]
    colour: int | str
    dashes: int = 0


@dataclass(frozen=True)
class Ridge:
    """How confidence is spread at one epsilon: of right and of wrong predictions, each (M,) in [0, 1]."""

    title: str
    right: NDArray[np.float32]
    wrong: NDArray[np.float32]


# Solid, dashed, dotted, dash-dotted: one for each split.
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
# Two more than there are colours: as the numbers have no common factor, only the 36th model looks as the first.
MARKERS = "osD^vPX"


def level_name(level: int) -> str:
    """An epsilon as people write it."""
    return f"{level}/255" if level else "clean"


def shortened(text: str, length: int = LABEL_LENGTH) -> str:
    """A name that fits beside an axis: without what cannot be drawn, its middle left out where it is long."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text).strip() or "(no name)"
    if len(plain) <= length:
        return plain
    head = (length - 1) // 2
    return f"{plain[: length - 1 - head]}…{plain[-head:]}"


def curves_plot(levels: Sequence[int], curves: Sequence[Curve], says: str, alt: str) -> Plot:
    """Shares against epsilon.

    Args:
        levels: 0 and every epsilon in grey levels.
        curves: of as many values each.
        says: what the shares are of, for the axis.
        alt: what the plot shows.
    """

    def draw(scheme: Scheme) -> Figure:
        figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            colour, marker = _curve_style(curve, scheme)
            values = [np.nan if value is None else 100 * value for value in curve.values]
            axes.plot(
                levels,
                values,
                color=colour,
                marker=marker,
                markerfacecolor=scheme.paper if curve.dashes else colour,
                linestyle=DASHES[curve.dashes % len(DASHES)],
                clip_on=False,
            )
        axes.set_ylim(0, 100)
        axes.set_xlim(0, max(levels) * 1.03)
        axes.set_ylabel(f"{says} (%)")
        axes.set_xlabel("epsilon (grey levels, k/255)")
        axes.set_xticks(_apart(levels))
        axes.grid(axis="y")
        names = [shortened(curve.name, 40) for curve in curves]
        figure.legend(axes.lines, names, loc="outside lower left", ncols=1 if max(map(len, names)) > 20 else 2)
        return figure

    return _on_both_papers(draw, alt)


def ridges_plot(ridges: Sequence[Ridge], words: tuple[str, str], alt: str) -> Plot:
    """How confidence is spread at each epsilon: right predictions upwards, wrong ones downwards.

    Args:
        ridges: clean first.
        words: what right and wrong are called.
        alt: what the plot shows.
    """
    lowest = min(float(values.min()) for ridge in ridges for values in (ridge.right, ridge.wrong) if len(values))
    start = min(10 * int(10 * lowest), 90)
    edges = np.linspace(start, 100, BINS + 1)

    def draw(scheme: Scheme) -> Figure:
        figure = Figure(figsize=(WIDTH, 1.1 + 0.6 * len(ridges)), layout="constrained")
        axes = figure.add_subplot()
        for index, ridge in enumerate(ridges):
            axes.axhline(-index, color=scheme.line, linewidth=0.8, zorder=0)
            total = len(ridge.right) + len(ridge.wrong)
            _half_ridge(axes, ridge.right, total, edges, (-index, 0.46), "✓", scheme.right, scheme.ink)
            _half_ridge(axes, ridge.wrong, total, edges, (-index, -0.46), "✗", scheme.wrong, scheme.ink)
        axes.set_xlim(start, 100)
        axes.set_ylim(-len(ridges) + 0.5, 0.5)
        axes.set_yticks([-index for index in range(len(ridges))], [ridge.title for ridge in ridges])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("confidence (%)")
        axes.set_ylabel("epsilon")
        above: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom"}
        axes.text(0, 1.02, f"▲ {words[0]}", color=scheme.right, fontweight="bold", **above)
        axes.text(0.5, 1.02, f"▼ {words[1]}", color=scheme.wrong, fontweight="bold", **above)
        axes.text(1.02, 1.02, "mean", color=scheme.soft, **above)
        return figure

    return _on_both_papers(draw, alt)


def _half_ridge(
    axes: Axes,
    values: NDArray[np.float32],
    total: int,
    edges: NDArray[np.float64],
    place: tuple[float, float],
    sign: str,
    colour: str,
    ink: str,
) -> None:
    """One half of a ridge: bars from a base line up, or down where the height is negative, and their mean."""
    if not len(values):
        return
    base, height = place
    share = np.histogram(100 * values, edges)[0] / total
    # The root: else the one bar of a sure network would leave nothing to see of all others.
    axes.stairs(base + height * np.sqrt(share), edges, baseline=base, fill=True, color=colour)
    mean = 100 * float(values.mean(dtype=np.float64))
    axes.plot([mean, mean], [base, base + height], color=ink, linewidth=1.5)
    where = axes.get_yaxis_transform()
    axes.text(1.02, base + height / 2, f"{sign} {mean:.0f}%", color=colour, va="center", transform=where)


def matrix_plot(
    shares: NDArray[np.float64],
    names: tuple[Sequence[str], Sequence[str]],
    titles: tuple[str, str],
    alt: str,
    kept: NDArray[np.bool_] | None = None,
) -> Plot:
    """Shares as a table of coloured cells, each with its number in percent.

    Args:
        shares: (R, C) in [0, 1]; NaN where there is nothing to count.
        names: of the R rows and the C columns.
        titles: of both.
        alt: what the plot shows.
        kept: (R, C) cells of answers that stayed, which are blue; none by default.
    """
    stays = np.zeros(shares.shape, dtype=bool) if kept is None else kept
    # The root: a few percent of a thousand classes are a finding too.
    weights = np.sqrt(np.nan_to_num(shares))[..., None]

    def draw(scheme: Scheme) -> Figure:
        figure = Figure(
            figsize=(max(WIDTH, 1.9 + 0.44 * shares.shape[1]), 1.5 + 0.36 * len(shares)), layout="constrained"
        )
        axes = figure.add_subplot()
        paper, right, wrong = (np.array(to_rgb(colour)) for colour in (scheme.paper, scheme.right, scheme.wrong))
        colours = paper + (np.where(stays[..., None], right, wrong) - paper) * weights
        axes.imshow(colours, aspect="auto", interpolation="nearest")
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                ink = _legible(colours[row, column], (scheme.paper, scheme.ink))
                number = axes.text(column, row, f"{100 * share:.0f}", color=ink, ha="center", va="center", fontsize=9)
                number.set_in_layout(False)
        _name_cells(axes, names, titles)
        return figure

    return _on_both_papers(draw, alt)


def _legible(paper: NDArray[np.float64], inks: Sequence[str]) -> str:
    """The ink of the highest contrast, as the WCAG define it."""

    def luminance(colour: Any) -> float:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05

    there = luminance(paper)
    return max(inks, key=lambda ink: max(luminance(ink) / there, there / luminance(ink)))


def _name_cells(axes: Axes, names: tuple[Sequence[str], Sequence[str]], titles: tuple[str, str]) -> None:
    rows, columns = ([shortened(name) for name in side] for side in names)
    upright = max(map(len, columns)) > 3
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=40 if upright else 0,
        ha="left" if upright else "center",
        rotation_mode="anchor",
    )
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(titles[0])
    axes.set_xlabel(titles[1])


def _curve_style(curve: Curve, scheme: Scheme) -> tuple[str, str]:
    if isinstance(curve.colour, str):
        return getattr(scheme, curve.colour), ""
    return scheme.models[curve.colour % len(scheme.models)], MARKERS[curve.colour % len(MARKERS)]


def _apart(levels: Sequence[int]) -> list[int]:
    """Those of the levels whose numbers do not touch on an axis, the largest always."""
    shown = [max(levels)]
    for level in sorted(levels, reverse=True):
        if shown[-1] - level >= 0.06 * max(levels):
            shown.append(level)
    return shown[::-1]


def _on_both_papers(draw: Callable[[Scheme], Figure], alt: str) -> Plot:
    images = []
    for scheme in (LIGHT, DARK):
        with _style(scheme):
            canvas = FigureCanvasAgg(draw(scheme))
            # savefig would draw twice.
            canvas.draw()
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            images.append(buffer.getvalue())
    return Plot(images[0], images[1], alt, image.width, image.height)


@contextmanager
def _style(scheme: Scheme) -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's, with the colours of a scheme."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A class may be called anything; what the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": "DejaVu Sans",
                "font.size": 10,
                # A class may be called $5, too.
                "text.parse_math": False,
                "text.color": scheme.ink,
                "figure.facecolor": scheme.paper,
                "figure.dpi": DPI,
                "axes.facecolor": scheme.paper,
                "axes.edgecolor": scheme.line,
                "axes.labelcolor": scheme.soft,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "xtick.color": scheme.soft,
                "ytick.color": scheme.soft,
                "grid.color": scheme.line,
                "grid.linewidth": 0.7,
                "lines.linewidth": 2,
                "lines.markersize": 6,
                "legend.frameon": False,
                "legend.handlelength": 3,
                "legend.labelspacing": 0.3,
                "legend.labelcolor": scheme.ink,
            }
        )
        yield
