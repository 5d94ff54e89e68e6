"""Architectures whose attacks nobody trains against: `elu` and `normed` for small images, `grouped` and `average` from
32 pixels a side on, where the former fool others little more than noise does.

    python scripts/train_robust.py out/digits --held-out scripts/held_out.py:elu --held-out scripts/held_out.py:normed

A defence is tested under attacks on models that it has never seen. The less these have in common with the models that
made its training images, the more the test says: so name other designs if your sources are like one of these.
"""

from torch import Tensor, nn


class GlobalMax(nn.Module):
    """(N, C, H, W) to (N, C): the largest value of each channel."""

    def forward(self, features: Tensor) -> Tensor:
        return features.amax((2, 3))


def elu(channels: int, side: int, classes: int) -> nn.Module:
    """Convolutions with wide kernels and strides, ELU, and a linear layer on all positions."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 24, 5, stride=1 if side < 16 else 2, padding=2), nn.ELU()]
    inputs, left = 24, side if side < 16 else (side + 1) // 2
    while left > max(4, side // 8):
        layers += [nn.Conv2d(inputs, 32, 3, stride=2, padding=1), nn.ELU()]
        inputs, left = 32, (left + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * left * left, classes))


def normed(channels: int, side: int, classes: int) -> nn.Module:
    """Three convolutions with batch norm, the largest value of each channel, and a linear layer."""
    width = 16 if side < 32 else 32
    layers: list[nn.Module] = []
    # Of images from 16 pixels on the last stage halves the side too, and from 48 on the first.
    strides = (1 if side < 48 else 2, 2, 1 if side < 16 else 2)
    for inputs, planes, stride in zip(
        (channels, width, 2 * width), (width, 2 * width, 2 * width), strides, strict=True
    ):
        layers += [nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False), nn.BatchNorm2d(planes), nn.ReLU()]
    return nn.Sequential(*layers, GlobalMax(), nn.Linear(2 * width, classes))


def grouped(channels: int, side: int, classes: int) -> nn.Module:
    """Three convolutions with group norm and SiLU, averaged to 4x4 positions, and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, planes, stride in ((channels, 32, 1 if side < 64 else 2), (32, 48, 2), (48, 64, 2)):
        layers += [nn.Conv2d(inputs, planes, 3, stride, padding=1), nn.GroupNorm(4, planes), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, classes))


def average(channels: int, side: int, classes: int) -> nn.Module:
    """Two convolutions with wide kernels, SiLU and average pooling, and a hidden layer on 8x8 positions."""
    layers: list[nn.Module] = []
    for inputs, planes, stride in ((channels, 32, 1 if side < 64 else 2), (32, 64, 1)):
        layers += [nn.Conv2d(inputs, planes, 5, stride, padding=2), nn.SiLU(), nn.AvgPool2d(2)]
    hidden = [nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * 64, 128), nn.SiLU(), nn.Linear(128, classes)]
    return nn.Sequential(*layers, *hidden)
