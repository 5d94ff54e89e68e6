"""The embedded dataset: scikit-learn's handwritten digits.

1,797 real 8x8 digits (Alpaydin and Kaynak, UCI 1998), enlarged to a size a person can see, in a fixed
stratified split.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
CLASSES = tuple("0123456789")


def digits_split(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits of one split.

    Args:
        split: `train` (1,352 digits) or `test` (445).

    Returns:
        Images (N, 64, 64) uint8, and their classes (N,) int64 in 0..9.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Every fourth digit of each class is held out: stratified, and the same under every version.
    rank = np.empty(len(digits.target), dtype=np.int64)
    for digit in range(len(CLASSES)):
        rank[digits.target == digit] = np.arange((digits.target == digit).sum())
    rows = np.flatnonzero((rank % 4 == 3) == (split == "test"))
    # 17 grey levels, 0..16, become 0..255; bicubic enlargement overshoots, and Pillow clips it.
    small = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large]), digits.target[rows].astype(np.int64)
