"""A small CNN for the embedded digits; `scripts/train_digits.py` made its weights from the train split alone."""

from pathlib import Path

import torch
from torch import nn

WEIGHTS = Path(__file__).with_name("digits.safetensors")
CLASSES = tuple("0123456789")


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
