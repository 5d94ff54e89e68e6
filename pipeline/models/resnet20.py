"""The CIFAR ResNet-20, as a factory for the config.

    model: {kind: factory, name: pipeline.models.resnet20:resnet20, weights: resnet20.safetensors}

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), section 4.2 and table 6: n = 3,
0.27 million parameters, shortcuts of option A, which have none.
"""

from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def conv3x3(channels: int, planes: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes, 1), nn.BatchNorm2d(planes)
        self.stride, self.added = stride, planes - channels

    def forward(self, images: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        # Option A: every stride-th pixel, and the channels that are missing are zeros, half of them on either side.
        shortcut = images[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(residual + shortcut)


class ResNet20(nn.Module):
    """Normalised images (N, 3, 32, 32) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 16, 1), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer1(F.relu(self.bn1(self.conv1(images))))
        features = self.layer3(self.layer2(features))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def resnet20() -> nn.Module:
    """The factory: untrained until a checkpoint is loaded."""
    return ResNet20()
