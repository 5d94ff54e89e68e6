"""Small nets for the embedded digits; `scripts/train_digits.py` made their weights from the train split alone.

They take images (N, 1, side, side) in [0, 1] and return logits (N, 10).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

CLASSES = tuple("0123456789")


class DigitsNet(nn.Module):
    """For 64 px: three strided convolutions and a linear layer."""

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


def strided() -> nn.Module:
    """For 8 px: three convolutions, the last two with a stride, and a linear layer. 11,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def pooled() -> nn.Module:
    """For 8 px: two convolutions, max pooling and a linear layer. 7,500 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 4 * 4, 10),
    )


def mlp() -> nn.Module:
    """For 8 px: two hidden layers. 9,000 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Net(NamedTuple):
    """make: the untrained net. side: of its images, in pixels. weights: the file of its trained weights."""

    make: Callable[[], nn.Module]
    side: int
    weights: Path


# By `model.name`; None where a config names no net.
NETS: Mapping[str | None, Net] = {
    None: Net(DigitsNet, 64, Path(__file__).with_name("digits.safetensors")),
    **{
        make.__name__: Net(make, 8, Path(__file__).with_name(f"digits-{make.__name__}.safetensors"))
        for make in (strided, pooled, mlp)
    },
}
