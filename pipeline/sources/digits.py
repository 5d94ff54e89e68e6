"""The embedded dataset: scikit-learn's handwritten digits.

1,797 real 8x8 digits (Alpaydin and Kaynak, UCI 1998), enlarged to a size a person can see, in a fixed
stratified split.
"""

from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import SourceConfig
from pipeline.core.origin import Origin
from pipeline.sources.base import IndexedSource, check_splits, checked, digest_of

SIDE = 64
CLASSES = tuple("0123456789")
DIGITS = Origin(
    name="Optical Recognition of Handwritten Digits",
    license="cc-by-4.0",
    credit="E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49; "
    "its test part as scikit-learn carries it, enlarged from 8x8 to 64x64 pixels",
)


class DigitsConfig(SourceConfig):
    """Handwritten digits that come with scikit-learn."""

    kind: Literal["digits"]
    """The 1,797 handwritten digits of scikit-learn, 64x64, splits train and test. They come with the package."""

    @property
    def reads(self) -> tuple[Path, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class ArraySource(IndexedSource[NDArray[np.uint8]]):
    """Images that are already in memory: of each split (N, H, W) or (N, H, W, 3) uint8."""

    def open(self, cell: Any) -> Image.Image:
        return Image.fromarray(self.rows[cell["split"]][cell["row"]])


def open_digits(config: DigitsConfig, *, need_labels: bool) -> ArraySource:
    """The digits, all of which are labelled."""
    names = config.split or ("train", "test")
    check_splits(names, ("train", "test"))
    splits = {name: digits_split(name) for name in names}
    return checked(
        ArraySource(
            labels={name: labels for name, (_, labels) in splits.items()},
            rows={name: images for name, (images, _) in splits.items()},
            classes=CLASSES,
            digest=digest_of(
                part for images, labels in splits.values() for part in (images.tobytes(), labels.tobytes())
            ),
            origin=DIGITS,
            need_labels=need_labels,
        )
    )


def digits_split(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits of one split.

    Args:
        split: `train` (1,352 digits) or `test` (445).

    Returns:
        Images (N, 64, 64) uint8, and their classes (N,) int64 in 0..9.
    """
    # The file of sklearn.datasets.load_digits; scikit-learn takes a second to import.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    digits = np.loadtxt(str(file), np.int64, delimiter=",")
    pixels, classes = digits[:, :-1].reshape(-1, 8, 8), digits[:, -1]
    # Every fourth digit of each class is held out: stratified, and the same under every version.
    rank = np.empty(len(classes), dtype=np.int64)
    for digit in range(len(CLASSES)):
        rank[classes == digit] = np.arange((classes == digit).sum())
    rows = np.flatnonzero((rank % 4 == 3) == (split == "test"))
    # 17 grey levels, 0..16, become 0..255; bicubic enlargement overshoots, and Pillow clips it.
    small = np.rint(pixels[rows] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large]), classes[rows]
