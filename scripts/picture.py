"""Draw the README's picture from a finished digits run.

    fgsm generate digits && python scripts/picture.py out/digits .github/digits.png

One line per digit: the clean image, the direction of the change, and the image at every epsilon, each with
what the victim calls it. Shown are held-out digits that it reads with confidence when clean, the most confident
mistakes first.
"""

from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LEVELS = (8, 16, 32, 64)
LINES = 4
SIDE, GAP, CAPTION, HEAD = 112, 16, 26, 34
INK, RIGHT, WRONG = "#1f2328", "#0b6bcb", "#c2410c"  # blue and orange: told apart by the colour-blind too


def pixels(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


def sign_image(clean: Image.Image, attacked: Image.Image) -> Image.Image:
    """Darker, unchanged and lighter as black, grey and white; black and white pixels stay where they are."""
    return Image.fromarray(((np.sign(pixels(attacked) - pixels(clean)) + 1) * 127).astype(np.uint8))


def instructive(subsets: dict[int, Any]) -> list[int]:
    """Rows for the picture, one for each digit, the most confident mistakes at 32/255 first."""
    label, fooled, confidence = (subsets[32][name] for name in ("label", "fooled", "confidence"))
    sure = [value > 0.98 for value in subsets[0]["confidence"]]
    order = sorted((row for row in range(len(label)) if fooled[row] and sure[row]), key=lambda row: -confidence[row])
    first_of_digit = {label[row]: row for row in reversed(order)}
    return [row for row in order if first_of_digit[label[row]] == row][:LINES]


def main(dataset: Annotated[Path, typer.Argument()], picture: Annotated[Path, typer.Argument()]) -> None:
    """Draw the picture."""
    names = {0: "clean", **{level: f"eps-{level}" for level in LEVELS}}
    subsets = {level: datasets.load_dataset(str(dataset), name, split="test") for level, name in names.items()}
    columns = ["clean", "change", *(f"{level}/255" for level in LEVELS)]
    canvas = Image.new(
        "RGB", (GAP + len(columns) * (SIDE + GAP), HEAD + LINES * (SIDE + CAPTION + GAP)), color="#ffffff"
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    for column, title in enumerate(columns):
        draw.text((GAP + column * (SIDE + GAP) + SIDE / 2, HEAD / 2), title, INK, font, anchor="mm")
    for line, row in enumerate(instructive(subsets)):
        cells = {level: subset[row] for level, subset in subsets.items()}
        shown = [cells[0], None, *(cells[level] for level in LEVELS)]
        for column, cell in enumerate(shown):
            left, top = GAP + column * (SIDE + GAP), HEAD + line * (SIDE + CAPTION + GAP)
            image = sign_image(cells[0]["image"], cells[LEVELS[-1]]["image"]) if cell is None else cell["image"]
            canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            if cell is not None:
                text = f"{cell['prediction']}  {cell['confidence']:.0%}"
                colour = RIGHT if cell["correct"] else WRONG
                draw.text((left + SIDE / 2, top + SIDE + CAPTION / 2), text, colour, font, anchor="mm")
    canvas.save(picture, optimize=True)


if __name__ == "__main__":
    typer.run(main)
