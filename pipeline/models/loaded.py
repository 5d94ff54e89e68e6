"""What a kind of model gives, and what kinds have in common.

A kind is a module with a function `load(config) -> Loaded`. It imports large libraries inside that function, PyTorch
too, so that a config is checked without them. What it or its library raises becomes a ConfigError of one sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import ModelConfig, PreprocessConfig
from pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Loaded:
    """A module, and what is known of it without the config.

    classes, mean, std and preprocess are what its published weights say of their classes and their input; code, the
    files of the user's own code that made it.
    """

    module: nn.Module
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    preprocess: PreprocessConfig | None = None
    code: Sequence[Path] = ()


def import_extra(name: str) -> Any:
    """Import a library that an extra of this package brings; a ConfigError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"model.kind: {name} is not installed; it comes with pip install 'fgsm-pipeline[{name}]'."
        ) from None


def published_weights(config: ModelConfig) -> str | None:
    """The id of published weights, None for a checkpoint file or an untrained model."""
    return config.weights if config.checkpoint is None else None
