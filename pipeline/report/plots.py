"""The report's plots: shares against epsilon, a line for each model.

Each is a PNG on white paper, for the page and for the card. Colours follow Okabe and Ito, so that the colour-blind tell
them apart: blue is right, orange is wrong, as everywhere in the report, and a marker says what a colour says. Equal
numbers give equal bytes.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipeline.core.variants import CLEAN, Variant

# Inches. On a phone's 360 px a point is then a pixel.
WIDTH, HEIGHT = 4.8, 3.6
DPI = 180
LABEL_LENGTH = 14

INK, SOFT, LINE = "#1b1f24", "#57606a", "#d5dbe1"
RIGHT, WRONG = "#0b62b0", "#c24e00"
# The victim's first.
MODELS = (RIGHT, "#007a5a", "#a8497f", "#7a6a00", "#2f8fc4")
# Two more than there are colours: as the numbers have no common factor, only the 36th model looks as the first.
MARKERS = "osD^vPX"


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
    """The curve of the index-th model, the victim's first."""
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
    with paper():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
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
        names = [shortened(curve.name, 40) for curve in curves]
        longest = max(map(len, names))
        columns = 3 if longest <= 10 else 2 if longest <= 20 else 1
        figure.legend(axes.lines, names, loc="outside lower left", ncols=columns)
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
