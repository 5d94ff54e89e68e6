"""Small models for 32 px, of other architectures than the CIFAR ResNet-20.

    models:
      cnn: {kind: factory, name: pipeline.models.small_models:cnn}
      mlp: {kind: factory, name: pipeline.models.small_models:mlp}

`cnn`, `strided` and `residual` are the models of the config `cifar10-ensemble`.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def cnn(classes: int = 10) -> nn.Module:
    """Three convolutions with pooling, 0.07 million parameters."""
    layers: list[nn.Module] = []
    for channels, planes in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels, planes, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, classes))


def strided(classes: int = 10) -> nn.Module:
    """Four convolutions with strides in place of pooling, 0.1 million parameters."""
    layers: list[nn.Module] = []
    for channels, planes, stride in ((3, 32, 1), (32, 48, 2), (48, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(channels, planes, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, classes))


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, beside a 1x1 convolution."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.norm2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.shortcut = nn.Conv2d(channels, planes, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(images))


def residual(classes: int = 10) -> nn.Module:
    """Three residual blocks and average pooling, 0.15 million parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        Block(16, 32, 2),
        Block(32, 64, 2),
        Block(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def mlp(classes: int = 10) -> nn.Module:
    """Two hidden layers, 0.9 million parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes)
    )


def free(classes: int = 10) -> nn.Module:
    """One linear layer on 16x16 averages of any larger image: next to no work, so that all else can be measured."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(3 * 16 * 16, classes))
