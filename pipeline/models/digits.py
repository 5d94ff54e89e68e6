"""The small model that comes with the package, for the embedded digits."""

from typing import Any, Literal

from pydantic import model_validator

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ConfigError
from pipeline.models.loaded import Loaded, published_weights


class DigitsConfig(ModelConfig):
    """It ships with trained weights; `weights: null` asks for an untrained one."""

    kind: Literal["digits"]

    @model_validator(mode="before")
    @classmethod
    def _default_weights(cls, values: Any) -> Any:
        return {"weights": "digits", **values} if isinstance(values, dict) else values


def load(config: DigitsConfig) -> Loaded:
    from pipeline.models.checkpoints import load_checkpoint
    from pipeline.models.digits_net import CLASSES, WEIGHTS, DigitsNet

    module = DigitsNet()
    if config.weights == "digits":
        load_checkpoint(module, WEIGHTS)
    elif published_weights(config):
        raise ConfigError(f"model.weights: kind digits has no weights {config.weights}; leave the key out for its own.")
    return Loaded(module, classes=CLASSES)
