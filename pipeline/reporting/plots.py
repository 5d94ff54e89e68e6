"""The report's plots: shares against epsilon, a line for each model, the transfer matrix, and the defence.

Each is a PNG on white paper, for the page and for the card. Colours follow Okabe and Ito, so that the colour-blind tell
them apart: blue is right, orange is wrong, as everywhere in the report, and a marker says what a colour says. Equal
numbers give equal bytes.
"""

import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pipeline.core.variants import CLEAN, Variant
from pipeline.output.transfer import Transfer
from pipeline.reporting.defence import Spread
from pipeline.reporting.findings import percent

# Inches. On a phone's 360 px a point is then a pixel.
WIDTH, HEIGHT, LEGEND_LINE = 4.8, 3.6, 0.2
DPI = 180
LABEL_LENGTH = 14

INK, SOFT, LINE = "#1b1f24", "#57606a", "#d5dbe1"
RIGHT, WRONG = "#0b62b0", "#c24e00"
# That of the model that the page looks at first.
MODELS = (RIGHT, "#007a5a", "#a8497f", "#7a6a00", "#2f8fc4")
# Two more than there are colours: as the numbers have no common factor, only the 36th model looks as the first.
MARKERS = "osD^vPX"

# Of the transfer matrix: what a share of 0 and of 1 looks like. The text on either is INK.
HEAT = ("#ffffff", "#e8965a")
# Inches of a cell and of the names beside it. Blocks of up to so many columns of cells stand side by side.
CELL_WIDTH, CELL_HEIGHT, NAMES_WIDTH, SIDE_BY_SIDE = 0.62, 0.36, 1.7, 6

# Of the defence: the errors at the smallest and at the largest epsilon, what is behind the control, inches of a row.
STEPS, BAND, ROW_HEIGHT = ("#e8965a", WRONG, "#5c2400"), "#e7f0fa", 0.46


@dataclass(frozen=True)
class Curve:
    """A share in [0, 1] in every variant, clean first; None where there is nothing to count.

    `marker` is one of matplotlib's, drawn hollow where the curve is `dashed`.
    """

    name: str
    values: tuple[float | None, ...]
    colour: str
    marker: str
    dashed: bool = False


def model_curve(name: str, values: tuple[float | None, ...], index: int) -> Curve:
    """The curve of the index-th model."""
    return Curve(name, values, MODELS[index % len(MODELS)], MARKERS[index % len(MARKERS)])


def variant_name(variant: Variant) -> str:
    """A variant as people write it."""
    return "clean" if variant == CLEAN else f"{variant.level}/255"


def shortened(text: str, length: int = LABEL_LENGTH) -> str:
    """A name that fits beside an axis: without what cannot be drawn, its middle left out where it is long."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text).strip() or "(no name)"
    if len(plain) <= length:
        return plain
    head = (length - 1) // 2
    return f"{plain[: length - 1 - head]}…{plain[-head:]}"


def draw_curves(variants: Sequence[Variant], curves: Sequence[Curve], says: str) -> bytes:
    """Shares against epsilon, as a PNG.

    Args:
        variants: clean, and one attack on one model at every epsilon.
        curves: of as many values each.
        says: what the shares are of, for the axis.
    """
    levels = [variant.level for variant in variants]
    names = [shortened(curve.name, 40) for curve in curves]
    longest = max(map(len, names))
    columns = 3 if longest <= 10 else 2 if longest <= 20 else 1
    with paper():
        # Further lines of the legend take nothing from the plot.
        height = HEIGHT + LEGEND_LINE * max(0, math.ceil(len(names) / columns) - 2)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            axes.plot(
                levels,
                [np.nan if value is None else 100 * value for value in curve.values],
                color=curve.colour,
                marker=curve.marker,
                markerfacecolor="white" if curve.dashed else curve.colour,
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                clip_on=False,
                zorder=3,  # over the axes
            )
        axes.set(xlim=(0, max(levels) * 1.03), ylim=(0, 100))
        axes.set(xlabel="epsilon (grey levels, k/255)", ylabel=f"{says} (%)")
        axes.locator_params("x", integer=True)
        axes.grid(axis="y")
        figure.legend(axes.lines, names, loc="outside lower left", ncols=columns)
        return png(figure)


def draw_matrix(rows: Sequence[Sequence[Transfer]], images: str) -> bytes:
    """The transfer matrix of a split as a heat map, a block for each epsilon, as a PNG.

    Args:
        rows: each of the cells of one variant, one for each model that looks; rows of one epsilon together.
        images: what those of the split are called.
    """
    blocks = [list(block) for _, block in itertools.groupby(rows, key=lambda row: row[0].level)]
    models, across = [cell.looking for cell in rows[0]], 2 if len(blocks) > 1 and len(rows[0]) <= SIDE_BY_SIDE else 1
    lines = [blocks[start : start + across] for start in range(0, len(blocks), across)]
    heights = [max(map(len, line)) for line in lines]
    size = (
        max(WIDTH, across * (NAMES_WIDTH + CELL_WIDTH * len(models))),
        CELL_HEIGHT * (sum(heights) + 2.5 * len(lines) + 1),
    )
    heat = LinearSegmentedColormap.from_list("lost", HEAT)
    with paper():
        figure = Figure(figsize=size, layout="constrained")
        says = "share lost of those right when clean\nand accuracy below; bold: the attacked model"
        figure.suptitle(f"{shortened(images, 24)}: {says}", fontsize=9)
        grid = figure.subplots(len(lines), across, squeeze=False, height_ratios=heights)
        for axes in grid.flat:
            axes.set_axis_off()
        for place, (line, height) in enumerate(zip(lines, heights, strict=True)):
            for axes, block in zip(grid[place], line, strict=False):
                axes.set_axis_on()
                shares = [[np.nan if cell.share_lost is None else cell.share_lost for cell in row] for row in block]
                axes.pcolormesh(np.array(shares), cmap=heat, vmin=0, vmax=1, edgecolor="white", linewidth=2)
                # Blocks beside each other have cells of one height.
                axes.set(xlim=(0, len(models)), ylim=(height, 0))
                axes.set_title(f"{block[0][0].level}/255", fontsize=9, weight="bold", loc="left")
                axes.set_xticks(np.arange(len(models)) + 0.5, [shortened(name, 9) for name in models], fontsize=7)
                names = [shortened(row[0].maker, 24) for row in block]
                axes.set_yticks(np.arange(len(block)) + 0.5, names, fontsize=8)
                axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
                axes.spines[:].set_visible(False)
                for (y, x), cell in np.ndenumerate(np.array(block, dtype=object)):
                    own = "bold" if cell.looking == cell.model else "normal"
                    axes.text(
                        x + 0.5, y + 0.36, percent(cell.share_lost, 0), ha="center", va="center", size=8, weight=own
                    )
                    axes.text(x + 0.5, y + 0.74, percent(cell.accuracy, 0), ha="center", va="center", size=6)
        return png(figure)


def draw_defence(
    arms: Sequence[str], control: Sequence[bool], shares: Mapping[int, Sequence[Spread | None]], says: str
) -> bytes:
    """Shares of several arms as dots with their spread, a row for each arm, as a PNG.

    Args:
        arms: names of the rows.
        control: for each row, whether it is what the others are compared with: it is drawn hollow, on a band.
        shares: by epsilon in grey levels, one for each row; None where there is none.
        says: what the shares are of, for the axis.
    """
    names = ["\n".join(textwrap.wrap(shortened(arm, 60), 24)) for arm in arms]
    tints, rows = LinearSegmentedColormap.from_list("steps", STEPS), np.arange(len(arms))
    with paper():
        figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(arms) + 1), layout="constrained")
        axes = figure.add_subplot()
        for row in np.flatnonzero(control):
            axes.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0)
        for index, (level, spreads) in enumerate(shares.items()):
            # Those of one row lie beside each other, so that no spread hides another.
            y = rows + 0.64 * ((index + 0.5) / len(shares) - 0.5)
            x = [100 * spread.mean if spread else np.nan for spread in spreads]
            spread_by = [100 * (spread.deviation or 0) if spread else np.nan for spread in spreads]
            colour, marker = tints(index / max(1, len(shares) - 1)), MARKERS[index % len(MARKERS)]
            fills = ["white" if hollow else colour for hollow in control]
            axes.errorbar(x, y, xerr=spread_by, fmt="none", ecolor=colour, elinewidth=1.5, capsize=2)
            dots = axes.scatter(x, y, s=30, marker=marker, linewidths=1.5, clip_on=False, zorder=3)
            dots.set(facecolors=fills, edgecolors=colour)
            axes.plot([], [], marker, color=colour, label=f"{level}/255")
        axes.set(xlim=(0, 100), ylim=(len(arms) - 0.5, -0.5), xlabel=f"{says} (%)")
        axes.set_yticks(rows, names, fontsize=8, color=INK)
        axes.tick_params("y", length=0)
        axes.grid(axis="x")
        figure.legend(loc="outside lower left", ncols=6, handlelength=1)
        return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as a PNG that does not say what drew it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def paper() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's, with the report's colours."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A class may be called anything; what the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": "DejaVu Sans",
                # A class may be called $5, too.
                "text.parse_math": False,
                "text.color": INK,
                "axes.edgecolor": LINE,
                "axes.labelcolor": SOFT,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "xtick.color": SOFT,
                "ytick.color": SOFT,
                "grid.color": LINE,
                "lines.linewidth": 2,
                "legend.frameon": False,
                "legend.handlelength": 3,
            }
        )
        yield
