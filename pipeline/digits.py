"""The embedded default: scikit-learn's handwritten digits, and a small CNN that reads them.

1,797 real 8x8 digits (Alpaydin and Kaynak, UCI 1998), enlarged to a size a person can see, in a fixed
stratified split. `scripts/train_digits.py` made `digits.safetensors` from the train split alone.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

WEIGHTS = Path(__file__).with_name("digits.safetensors")
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


class DigitsNet(nn.Module):
    """Three strided convolutions and a linear layer: (N, 1, 64, 64) in [0, 1] to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classify = nn.Linear(32 * 4 * 4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classify(self.features(images).flatten(1))
        return logits
