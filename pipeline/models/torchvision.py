"""Models of torchvision, by name; published weights bring their classes and their preprocessing."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.config.schema import NamedModelConfig, PreprocessConfig
from pipeline.core.errors import ConfigError
from pipeline.models.loaded import Loaded, published_weights


class TorchvisionConfig(NamedModelConfig):
    """A model of torchvision; `weights` is the name of published ones, such as IMAGENET1K_V2, or a checkpoint."""

    kind: Literal["torchvision"]
    """A model of torchvision."""

    @property
    def reads(self) -> tuple[Path, ...] | None:
        if any(isinstance(value, str) for value in self.kwargs.values()):
            return None  # they may name weights of a part
        if self.checkpoint is not None or self.weights is None:
            return () if self.checkpoint is None else (self.checkpoint,)
        # Where torch.hub keeps what it has downloaded.
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return (Path(os.environ.get("TORCH_HOME") or f"{cache}/torch", "hub", "checkpoints").expanduser(),)


def find_weights(name: str, wanted: str) -> Any:
    """Published weights of a model, as torchvision has them; a ConfigError if it has none. Nothing is downloaded."""
    from torchvision import models

    available = models.get_model_weights(name)
    if wanted not in available.__members__:
        raise ConfigError(
            f"model.weights: {name} has no weights {wanted}; torchvision knows {', '.join(available.__members__)}, "
            "and a checkpoint ends in .safetensors, .pt or .pth."
        )
    return available[wanted]


def load(config: TorchvisionConfig) -> Loaded:
    from torchvision import models

    name, wanted = config.name, published_weights(config)
    if wanted is None:
        return Loaded(models.get_model(name, weights=None, **config.kwargs))
    weights = find_weights(name, wanted)
    transform = weights.transforms()
    return Loaded(
        models.get_model(name, weights=weights, **config.kwargs),
        classes=weights.meta.get("categories"),
        mean=transform.mean,
        std=transform.std,
        preprocess=PreprocessConfig(
            resize=_side(transform.resize_size),
            crop=_side(transform.crop_size),
            interpolation=transform.interpolation.value,
        ),
    )


def _side(sizes: Sequence[int]) -> int | tuple[int, ...]:
    return sizes[0] if len(sizes) == 1 else tuple(sizes)
