"""The report's plots: shares against epsilon, a line for each model.

Each is drawn once and kept twice: as an SVG that follows the reader's choice of light or dark, for the page, and as a
PNG on white, for the card. Colours follow Okabe and Ito, so that the colour-blind tell them apart: blue is right,
orange is wrong, as everywhere in the report, and a marker says what a colour says. Equal numbers give equal bytes.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipeline.core.variants import CLEAN, Variant

# Inches. On a phone's 360 px a point is then a pixel.
WIDTH, HEIGHT = 4.8, 3.6
DPI = 180
LABEL_LENGTH = 14


@dataclass(frozen=True)
class Scheme:
    """The colours of one paper. `first` is the victim's, and the others are those of the models after it."""

    paper: str
    ink: str
    soft: str
    line: str
    right: str
    wrong: str
    second: str
    third: str
    fourth: str
    fifth: str


LIGHT = Scheme(
    paper="#ffffff",
    ink="#1b1f24",
    soft="#57606a",
    line="#d5dbe1",
    right="#0b62b0",
    wrong="#c24e00",
    second="#007a5a",
    third="#a8497f",
    fourth="#7a6a00",
    fifth="#2f8fc4",
)
DARK = Scheme(
    paper="#171b21",
    ink="#e8ebef",
    soft="#9fa9b5",
    line="#343c46",
    right="#6bb5ff",
    wrong="#ff9a52",
    second="#2fc79b",
    third="#e59ac4",
    fourth="#e3cf57",
    fifth="#a3dbff",
)
MODELS = ("right", "second", "third", "fourth", "fifth")
# Two more than there are colours: as the numbers have no common factor, only the 36th model looks as the first.
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Plot:
    """One plot: `svg` follows the reader's colours, `png` is on white. `alt` is what it shows in words."""

    svg: bytes
    png: bytes
    alt: str


@dataclass(frozen=True)
class Curve:
    """A share in [0, 1] in every variant, clean first; None where there is nothing to count.

    `colour` is a field of Scheme; `marker` one of matplotlib's, drawn hollow where the curve is `dashed`.
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


def draw_curves(variants: Sequence[Variant], curves: Sequence[Curve], says: str, alt: str) -> Plot:
    """Shares against epsilon.

    Args:
        variants: clean, and one attack on one model at every epsilon.
        curves: of as many values each.
        says: what the shares are of, for the axis.
        alt: what the plot shows.
    """
    levels = [variant.level for variant in variants]
    with _style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            colour = asdict(LIGHT)[curve.colour]
            axes.plot(
                levels,
                [np.nan if value is None else 100 * value for value in curve.values],
                color=colour,
                marker=curve.marker,
                markerfacecolor=LIGHT.paper if curve.dashed else colour,
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                clip_on=False,
                zorder=3,  # over the axes
            )
        axes.set(xlim=(0, max(levels) * 1.03), ylim=(0, 100), xticks=_apart(levels))
        axes.set(xlabel="epsilon (grey levels, k/255)", ylabel=f"{says} (%)")
        axes.grid(axis="y")
        names = [shortened(curve.name, 40) for curve in curves]
        longest = max(map(len, names))
        columns = 3 if longest <= 10 else 2 if longest <= 20 else 1
        figure.legend(axes.lines, names, loc="outside lower left", ncols=columns)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return Plot(_follow_reader(svg.getvalue().decode()), png.getvalue(), alt)


def _apart(levels: Sequence[int]) -> list[int]:
    """Those of the levels whose numbers do not touch on an axis, the largest always."""
    shown = [max(levels)]
    for level in sorted(levels, reverse=True):
        if shown[-1] - level >= 0.06 * max(levels):
            shown.append(level)
    return shown[::-1]


def _follow_reader(svg: str) -> bytes:
    """Replace the colours of the light scheme by variables, which are those of the dark one where a reader wants it."""
    names = {colour: name for name, colour in asdict(LIGHT).items()}
    svg = re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", svg)
    light, dark = ("; ".join(f"--{name}: {colour}" for name, colour in asdict(it).items()) for it in (LIGHT, DARK))
    rules = f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return svg.replace("<defs>", f"<style>{rules}</style><defs>", 1).encode()


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's, with the colours of the light scheme."""
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
                "text.color": LIGHT.ink,
                # Names of parts of an SVG follow from this and from what they are.
                "svg.hashsalt": "fgsm",
                "figure.facecolor": LIGHT.paper,
                "axes.facecolor": LIGHT.paper,
                "axes.edgecolor": LIGHT.line,
                "axes.labelcolor": LIGHT.soft,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "xtick.color": LIGHT.soft,
                "ytick.color": LIGHT.soft,
                "grid.color": LIGHT.line,
                "grid.linewidth": 0.7,
                "lines.linewidth": 2,
                "lines.markersize": 6,
                "legend.frameon": False,
                "legend.handlelength": 3,
                "legend.labelspacing": 0.3,
                "legend.labelcolor": LIGHT.ink,
            }
        )
        yield
