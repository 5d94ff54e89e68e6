"""The contact sheet: which rows are worth looking at, and their images in every variant."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.core.errors import PipelineError, explained
from pipeline.core.images import open_stored
from pipeline.core.lattice import SIGN_UNIT
from pipeline.core.variants import Variant
from pipeline.layouts.stepped import SteppedImage
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest
from pipeline.report.plots import LIGHT, shortened, variant_name
from pipeline.report.sample import Aim, Sample, read_pictures

EXAMPLES_PER_GROUP = 3
# Images up to this side are enlarged pixel by pixel, and carried by the page without loss.
SMALL_SIDE = 96
# Larger ones are there to be recognised: reduced to this side, and WebP of this quality. The dataset has the rest.
LARGE_SIDE, LARGE_QUALITY = 256, 90

# The sheet as one picture, in pixels of a dense screen.
CELL, GAP, MARGIN = 192, 28, 36
HEAD, TITLE, CAPTION = 44, 62, 84
SHEET_EXAMPLES_PER_GROUP = 2

# What a group shows, for each aim of an attack: the smallest step, the surest success, the resistance.
TITLES: dict[Aim, tuple[str, str, str]] = {
    "fooled": ("Fooled by the smallest step", "The most confident mistakes", "Those that resist"),
    "target": ("On target after the smallest step", "The most confident in the target", "Those that resist"),
    "changed": ("Another answer after the smallest step", "The most confident changes", "Those that resist"),
}


@dataclass(frozen=True)
class Cell:
    """One image of an example: `title` says which. The sign map, of which nobody says anything, has no `answer`.

    `sign` and `verdict` say whether the answer is right, the former in a letter; `wrong` is for the colour.
    """

    title: str
    image: Image.Image
    answer: str = ""
    confidence: float = 0.0
    sign: str = ""
    verdict: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Example:
    """A row of the sheet: the clean image, the sign map, and the image at each epsilon. `target` of targeted runs."""

    clean: str
    target: str | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Examples that show the same thing."""

    title: str
    text: str
    examples: tuple[Example, ...]


Names = Callable[[int], str]


def make_groups(
    folder: OutputFolder, manifest: Manifest, sample: Sample, shown: Sequence[Variant], name: Names
) -> list[Group]:
    """The most instructive rows of a sample, with their images.

    Args:
        folder: of the dataset.
        manifest: of it.
        sample: in every variant: what is said of a row holds for all of them.
        shown: the variants to show, as a focus has them.
        name: of a recorded class.

    Returns:
        Groups that have rows: what the smallest epsilon fools, the most confident mistakes, and what resists. Where
        there is nothing of these, the surest answers: a sample that has rows gives at least one group.

    Raises:
        PipelineError: a picture cannot be read or decoded.
    """
    chosen, seen = choose_rows(sample, shown), sample.at(shown)
    pictures = read_pictures(folder, manifest, sample, [row for _, _, rows in chosen for row in rows])
    return [
        Group(title, text, tuple(_example(manifest, seen, row, pictures[row], name) for row in rows))
        for title, text, rows in chosen
    ]


def choose_rows(sample: Sample, shown: Sequence[Variant]) -> list[tuple[str, str, list[int]]]:
    """The rows of each group, with its title and what they have in common; groups without rows are left out.

    Args:
        sample: in every variant.
        shown: the variants with pictures: the most confident are chosen by these, as they must be seen to be.
    """
    variants, first, seen = sample.variants, sample.onset, sample.at(shown)
    never = len(variants)
    doubt = 1 - sample.confidence[0]
    # Who is called the target when clean resists nothing.
    resists = sample.right[0] if sample.target is None else sample.right[0] & (sample.prediction[0] != sample.target)
    beaten, held = np.flatnonzero(first < never), np.flatnonzero((first == never) & resists)
    easiest, surest, resisting = TITLES[sample.aim]
    groups = []
    if len(beaten):
        soonest, latest = int(first[beaten].min()), int(first[beaten].max())
        text = f"{variant_name(variants[soonest])} is enough. The network was surest of these when they were clean."
        groups.append((easiest, text, _ranked(beaten[first[beaten] == soonest], doubt)))
        # In whole percents, so that among equals the smaller epsilon comes first.
        percent = np.where(seen.success, np.round(100 * seen.confidence), -1)
        text = "At any epsilon shown; among equally confident ones the smallest."
        caught = np.flatnonzero(seen.success.any(0))
        groups.append((surest, text, _ranked(caught, -percent.max(0), percent.argmax(0), doubt)))
    if len(held):
        text = f"Up to {variant_name(variants[-1])}, the largest epsilon. The network is then surest of these."
        groups.append((resisting, text, _ranked(held, -sample.confidence[-1])))
    elif len(beaten) and latest > soonest:
        text = f"None resists every epsilon; these give in at {variant_name(variants[latest])} only."
        groups.append((resisting, text, _ranked(beaten[first[beaten] == latest], doubt)))
    if not groups:
        text = "The attack succeeds on none of the images, and of none can it be said that it resists."
        groups.append(("The surest answers", text, _ranked(np.arange(len(sample)), doubt)))
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


def _example(manifest: Manifest, sample: Sample, row: int, pictures: tuple[bytes, bytes], name: Names) -> Example:
    """A row with its images, made as `pipeline.load` makes them: exactly the stored ones."""
    picture = f"A picture in row {sample.place[row]} of {sample.shards[sample.shard[row]]}"
    # A broken file can raise anything from Pillow's parsers.
    broken = (Exception, PipelineError)
    with explained(f"{picture} cannot be decoded", "fgsm verify says what is damaged", errors=broken):
        for stored in pictures:  # before any of it is decoded
            open_stored(stored, manifest.shape).close()
        images, sign_map = _decode(pictures, sample.variants, attacked=not manifest.layout.stores_sign)
    cells = []
    for index, (variant, image) in enumerate(zip(sample.variants, images, strict=True)):
        answer = name(int(sample.prediction[index, row]))
        sign, verdict = _verdict(sample, index, row)
        confidence, wrong = float(sample.confidence[index, row]), not sample.right[index, row]
        cells.append(Cell(variant_name(variant), image, answer, confidence, sign, verdict, bool(wrong)))
    cells.insert(1, Cell("sign map", sign_map))
    target = None if sample.target is None else name(int(sample.target[row]))
    return Example(cells[0].answer, target, tuple(cells))


def _verdict(sample: Sample, index: int, row: int) -> tuple[str, str]:
    """What an answer is, as a letter and as a word."""
    if sample.aim == "target" and sample.success[index, row]:
        return "◎", "the target"
    if sample.labelled:
        return ("✓", "right") if sample.right[index, row] else ("✗", "wrong")
    return ("=", "as when clean") if sample.right[index, row] else ("≠", "not as when clean")


def _decode(
    pictures: tuple[bytes, bytes], variants: Sequence[Variant], *, attacked: bool
) -> tuple[list[Image.Image], Image.Image]:
    """The image of each variant, clean first, and the sign map: -1, 0 and 1 as 0, 127 and 254.

    Where the direction is an attacked image, the sign is 0 also where clipping held it.
    """
    clean, direction = pictures
    stepped = SteppedImage(attacked=attacked)
    images = [
        stepped.decode_example({"picture": clean, "direction": direction if one.level else None, "level": one.level})
        for one in variants
    ]
    with open_stored(direction) as opened:
        picture = np.asarray(opened).astype(np.int16)
    if attacked:
        picture = (np.sign(picture - np.asarray(images[0])) + 1) * SIGN_UNIT
    return images, Image.fromarray(picture.astype(np.uint8))


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
    """The contact sheet as one PNG on light paper, for a card or a README: the first examples of each group."""
    shown = [(group, group.examples[:SHEET_EXAMPLES_PER_GROUP]) for group in groups]
    titles = [cell.title for cell in groups[0].examples[0].cells]
    width = 2 * MARGIN + len(titles) * (CELL + GAP) - GAP
    line = CELL + CAPTION
    height = MARGIN + HEAD + sum(TITLE + line * len(examples) for _, examples in shown) + MARGIN // 2
    canvas = Image.new("RGB", (width, height), LIGHT.paper)
    draw, top = ImageDraw.Draw(canvas), MARGIN
    lefts = [MARGIN + column * (CELL + GAP) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + CELL / 2, top + HEAD / 2), title, LIGHT.soft, _font(24), anchor="mm")
    top += HEAD
    for group, examples in shown:
        draw.line((MARGIN, top + 6, width - MARGIN, top + 6), LIGHT.line, 2)
        draw.text((MARGIN, top + TITLE / 2 + 6), group.title, LIGHT.ink, _font(24, bold=True), anchor="lm")
        top += TITLE
        for example in examples:
            for left, cell in zip(lefts, example.cells, strict=True):
                _draw_cell(canvas, draw, cell, left, top)
            top += line
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw_cell(canvas: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    """One image, enlarged by a whole factor or reduced to fit, and below it what the victim says."""
    side = max(cell.image.size)
    factor = CELL // side if side <= CELL else CELL / side
    size = (max(1, int(cell.image.width * factor)), max(1, int(cell.image.height * factor)))
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    canvas.paste(cell.image.resize(size, resampling), (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
    if cell.answer:
        colour = LIGHT.wrong if cell.wrong else LIGHT.right
        bold, middle = _font(22, bold=True), left + CELL / 2
        draw.text((middle, top + CELL + 22), _fitted(f"{cell.sign} {cell.answer}", bold), colour, bold, anchor="mm")
        draw.text((middle, top + CELL + 50), f"{cell.confidence:.0%}", LIGHT.soft, _font(20), anchor="mm")


def _fitted(text: str, font: ImageFont.FreeTypeFont) -> str:
    """A text that is not much wider than a cell."""
    length = len(text)
    while font.getlength(shortened(text, length)) > CELL + GAP / 2:
        length -= 1
    return shortened(text, length)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of the plots, which comes with matplotlib."""
    file = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / file, size)
