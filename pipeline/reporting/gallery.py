"""The contact sheet: which rows are worth looking at, and their images in every variant."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import PipelineError, explained
from pipeline.core.images import open_stored
from pipeline.core.lattice import SIGN_UNIT, stored_sign
from pipeline.core.variants import Variant
from pipeline.layouts.stepped import STEPPED_TYPE, SteppedImage
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest
from pipeline.reporting.plots import RIGHT, WRONG, paper, png, shortened, variant_name
from pipeline.reporting.sample import Sample, read_picture

EXAMPLES_PER_GROUP = 3
# Images up to this side are enlarged pixel by pixel, and carried by the page without loss.
SMALL_SIDE = 96
# Larger ones are there to be recognised: reduced to this side, and WebP of this quality. The dataset has the rest.
LARGE_SIDE, LARGE_QUALITY = 256, 90

# The sheet as one picture, in inches: a cell, across and with what is said above and below it, and what it shows.
CELL, LINE_HEIGHT, PICTURE, HEAD, MARGIN = 1.2, 1.85, 1.0, 0.45, 0.1
SHEET_EXAMPLES_PER_GROUP = 2


@dataclass(frozen=True)
class Cell:
    """One image of an example: `title` says which. The sign map, of which nobody says anything, has no `answer`.

    `confidence` in that answer is None where it is not stored.
    `sign` and `verdict` say whether the answer is right, the former in a letter; `wrong` is for the colour;
    `succeeds` is what the attack does; `target` is what the sign map of a targeted run leads to.
    """

    title: str
    image: Image.Image
    answer: str = ""
    confidence: float | None = None
    sign: str = ""
    verdict: str = ""
    wrong: bool = False
    succeeds: bool = False
    target: str | None = None


@dataclass(frozen=True)
class Group:
    """Examples that show the same thing: the clean image, the sign map, and the image at each epsilon."""

    title: str
    text: str
    examples: tuple[tuple[Cell, ...], ...]


Names = Callable[[int], str]


def make_groups(
    folder: OutputFolder, manifest: Manifest, sample: Sample, shown: Sequence[Variant], name: Names
) -> list[Group]:
    """The most instructive rows of a sample, in the groups of `choose_rows`, with their images.

    The sample is in every variant: what is said of a row holds for all of them. `name` is that of a recorded class.

    Raises:
        PipelineError: a picture cannot be read or decoded.
    """
    seen = sample.at(shown)
    return [
        Group(title, text, tuple(_example(folder, manifest, seen, row, name) for row in rows))
        for title, text, rows in choose_rows(sample, shown)
    ]


def choose_rows(sample: Sample, shown: Sequence[Variant]) -> list[tuple[str, str, list[int]]]:
    """The rows of each group that has some, with its title and what they have in common.

    The groups are what the smallest epsilon fools, the most confident mistakes (in the variants that are shown, as they
    must be seen to be), and what resists. Where there is nothing of these, it is the surest answers.
    """
    variants, first, seen = sample.variants, sample.onset, sample.at(shown)
    never = len(variants)
    # Without the confidence in clean images, the order in which the rows are stored is as good as any.
    told = not np.isnan(sample.confidence[0]).any()
    doubt = 1 - sample.confidence[0] if told else np.zeros(len(sample))
    # Who is called the target when clean resists nothing.
    resists = sample.right[0] if sample.target is None else sample.right[0] & (sample.prediction[0] != sample.target)
    beaten, held = np.flatnonzero(first < never), np.flatnonzero((first == never) & resists)
    groups = []
    if len(beaten):
        soonest, latest = int(first[beaten].min()), int(first[beaten].max())
        text = f"{variant_name(variants[soonest])} is enough."
        text += " The network was surest of these when they were clean." if told else ""
        easiest = _ranked(beaten[first[beaten] == soonest], doubt)
        groups.append((f"{sample.aim.capitalize()} by the smallest step", text, easiest))
        # In whole percents, so that among equals the smaller epsilon comes first.
        percent = np.where(seen.success, np.round(100 * seen.confidence), -1)
        text = "At any epsilon shown; among equally confident ones the smallest."
        caught = np.flatnonzero(seen.success.any(0))
        surest = _ranked(caught, -percent.max(0), percent.argmax(0), doubt)
        groups.append((f"The most confident when {sample.aim}", text, surest))
    if len(held):
        text = f"Up to {variant_name(variants[-1])}, the largest epsilon. The network is then surest of these."
        groups.append(("Those that resist", text, _ranked(held, -sample.confidence[-1])))
    elif len(beaten) and latest > soonest:
        text = f"None resists every epsilon; these fail only at {variant_name(variants[latest])}."
        groups.append(("Those that resist", text, _ranked(beaten[first[beaten] == latest], doubt)))
    if not groups:
        text = "The attack succeeds on none of the images, and of none can it be said that it resists."
        groups.append(
            ("The surest answers" if told else "The first images", text, _ranked(np.arange(len(sample)), doubt))
        )
    taken: set[int] = set()
    return [(title, text, rows) for title, text, order in groups if (rows := _varied(order, sample, taken))]


def _ranked(rows: NDArray[np.int64], *keys: NDArray[Any]) -> list[int]:
    """Rows by the keys of all rows, the smallest first; equal ones in their own order."""
    return [int(row) for row in rows[np.lexsort([key[rows] for key in reversed(keys)])]]


def _varied(order: Sequence[int], sample: Sample, taken: set[int]) -> list[int]:
    """The first rows of an order that no other group has taken: one of each class, as far as there are so many."""
    rows = [row for row in order if row not in taken]
    first_of_class: dict[int, int] = {}
    for row in rows:
        first_of_class.setdefault(int(sample.prediction[0, row]), row)
    firsts = list(first_of_class.values())[:EXAMPLES_PER_GROUP]
    chosen = [*firsts, *(row for row in rows if row not in firsts)][:EXAMPLES_PER_GROUP]
    taken.update(chosen)
    return chosen


def _example(folder: OutputFolder, manifest: Manifest, sample: Sample, row: int, name: Names) -> tuple[Cell, ...]:
    """A row with its images, made as `pipeline.load` makes them: exactly the stored ones."""
    shard, place = sample.shards[sample.shard[row]], int(sample.place[row])
    images, sign_map = _read_images(folder, manifest, sample.variants, shard, place)
    cells = []
    for index, (variant, image) in enumerate(zip(sample.variants, images, strict=True)):
        answer = name(int(sample.prediction[index, row]))
        sign, verdict = _verdict(sample, index, row)
        confidence, wrong = float(sample.confidence[index, row]), not sample.right[index, row]
        told = None if np.isnan(confidence) else confidence
        succeeds = bool(sample.success[index, row])
        cells.append(Cell(variant_name(variant), image, answer, told, sign, verdict, bool(wrong), succeeds))
    target = None if sample.target is None else name(int(sample.target[row]))
    return (cells[0], Cell("sign map", sign_map, target=target), *cells[1:])


def _verdict(sample: Sample, index: int, row: int) -> tuple[str, str]:
    """What an answer is, as a letter and as a word."""
    if sample.target is not None and sample.success[index, row]:
        return "◎", "the target"
    right = bool(sample.right[index, row])
    return ("✗✓" if sample.labelled else "≠=")[right], sample.words[not right]


def _read_images(
    folder: OutputFolder, manifest: Manifest, variants: Sequence[Variant], shard: str, row: int
) -> tuple[list[Image.Image], Image.Image]:
    """A row's image in each variant, clean first, and the sign map: -1, 0 and 1 as 0, 127 and 254."""
    layout, recorded = manifest.layout, manifest.variants
    sources = [layout.source(one, recorded) for one in variants]
    pictures = dict.fromkeys(picture for source in sources for picture in source)
    cells = {one: read_picture(folder, shard, one, layout.fields(one.column), row) for one in pictures}
    stepped = SteppedImage(attacked=not layout.stores_sign)
    images = []
    # A broken file can raise anything from Pillow's parsers.
    broken, what = (Exception, PipelineError), f"A picture in row {row} of {shard} cannot be decoded"
    with explained(what, "fgsm verify says what is damaged", errors=broken):
        for cell in cells.values():  # before any of it is decoded
            if len(cell) == 1:
                open_stored(cell[0], manifest.shape).close()
        for variant, (picture, *direction) in zip(variants, sources, strict=True):
            data = [*cells[picture], *(cells[direction[0]] if direction else []), None, None]
            value = {**dict(zip(STEPPED_TYPE.names, data, strict=False)), "level": variant.level}
            images.append(stepped.decode_example(value))
        if layout.stores_sign:
            _, sign = stepped.sign_of(value)
        else:  # how the last image differs from the clean one: 0 also where clipping held it
            sign = stored_sign(np.asarray(images[0]), np.asarray(images[-1]), is_map=False)
    return images, Image.fromarray(((sign + 1) * SIGN_UNIT).astype(np.uint8))


def hero(groups: Sequence[Group]) -> tuple[Cell, Cell, Cell]:
    """One example as three pictures: clean, the sign map, and the attacked image of which most is to be said.

    That is the mistake of which the model is surest, among equally sure ones at the smallest epsilon; where the attack
    succeeds on no example, the first one at the largest.
    """
    examples = [example for group in groups for example in group.examples]
    caught = [
        (cell.confidence or 0.0, index, example, cell)
        for example in examples
        for index, cell in enumerate(example[2:])
        if cell.succeeds
    ]
    if not caught:
        clean, sign_map, *attacked = examples[0]
        return clean, sign_map, attacked[-1]
    # In whole percents, as the gallery ranks them.
    _, _, (clean, sign_map, *_), cell = max(caught, key=lambda one: (round(100 * one[0]), -one[1]))
    return clean, sign_map, cell


def web_image(image: Image.Image) -> tuple[bytes, str]:
    """An image as a page shows it, and its format: a small one as exact PNG, a large one reduced to WebP."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL_SIDE:
        image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), "png"
    image = image.copy()
    image.thumbnail((LARGE_SIDE, LARGE_SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "WEBP", quality=LARGE_QUALITY)
    return buffer.getvalue(), "webp"


def draw_sheet(groups: Sequence[Group]) -> bytes:
    """The contact sheet as one PNG on white, for a card or a README: the first examples of each group."""
    shown = [(group.title, group.examples[:SHEET_EXAMPLES_PER_GROUP]) for group in groups]
    lines = [("" if index else title, one) for title, examples in shown for index, one in enumerate(examples)]
    width, height = CELL * len(lines[0][1]), LINE_HEIGHT * len(lines)
    with paper():
        figure = Figure(figsize=(width, height))
        # In inches from the top left. With axes of its own each of sixty cells takes ten times as long.
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for index, (title, example) in enumerate(lines):
            top = index * LINE_HEIGHT + HEAD
            axes.text(MARGIN, top - HEAD + 0.2, title, va="bottom", weight="bold")
            for column, cell in enumerate(example):
                middle = (column + 0.5) * CELL
                _show_image(axes, cell.image, middle, top + PICTURE / 2)
                sure = "" if cell.confidence is None else f"\n{cell.confidence:.0%}"
                says = f"{cell.sign} {shortened(cell.answer)}{sure}" if cell.answer else ""
                axes.text(middle, top - 0.04, cell.title, fontsize=9, ha="center", va="bottom")
                axes.text(
                    middle, top + PICTURE + 0.06, says, color=WRONG if cell.wrong else RIGHT, ha="center", va="top"
                )
        return png(figure)


def _show_image(axes: Axes, image: Image.Image, x: float, y: float) -> None:
    """Draw an image with its middle at a place, in inches."""
    right, down = (PICTURE / 2 * side / max(image.size) for side in image.size)
    small = max(image.size) <= SMALL_SIDE
    axes.imshow(
        image,
        "gray",
        vmin=0,
        vmax=255,
        aspect="auto",
        extent=(x - right, x + right, y + down, y - down),
        interpolation="nearest" if small else "antialiased",
    )
