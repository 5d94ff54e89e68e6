"""Two small models for 32 px, of other architectures than the CIFAR ResNet-20: a plain CNN and an MLP.

models: {cnn: {kind: factory, name: scripts/small_models.py:cnn}, mlp: {kind: factory, name:
scripts/small_models.py:mlp}}
"""

from torch import nn


def cnn(classes: int = 10) -> nn.Module:
    """Three convolutions with pooling, 0.07 million parameters."""
    layers: list[nn.Module] = []
    for channels, planes in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels, planes, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, classes))


def mlp(classes: int = 10) -> nn.Module:
    """Two hidden layers, 0.9 million parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes)
    )
