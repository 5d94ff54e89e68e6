"""The small nets that come with the package, for the embedded digits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ConfigError
from pipeline.models.loaded import Loaded, published_weights


class DigitsConfig(ModelConfig):
    """The net for 64 px, or one of three for 8 px by its name.

    Each ships with trained weights; `weights: null` asks for an untrained one.
    """

    kind: Literal["digits"]
    """A small trained network for the embedded digits."""
    name: Literal["strided", "pooled", "mlp"] | None = None
    """Which network: one of these for images of 8 px. Left out: the one for 64 px."""

    @model_validator(mode="before")
    @classmethod
    def _default_weights(cls, values: Any) -> Any:
        return {"weights": "digits", **values} if isinstance(values, dict) else values

    @property
    def reads(self) -> tuple[Path, ...]:
        return () if self.checkpoint is None else (self.checkpoint,)

    @property
    def call(self) -> tuple[str | None, Mapping[str, Any]]:
        return self.name, {}


def load(config: DigitsConfig) -> Loaded:
    from pipeline.models.checkpoints import load_checkpoint
    from pipeline.models.digits_net import CLASSES, NETS

    net = NETS[config.name]
    module = net.make()
    if config.weights == "digits":
        load_checkpoint(module, net.weights)
    elif published_weights(config):
        raise ConfigError(f"model.weights: kind digits has no weights {config.weights}; leave the key out for its own.")
    return Loaded(module, classes=CLASSES, mean=(0.0,), std=(1.0,))
