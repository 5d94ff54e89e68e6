"""Models that a callable of the user's own makes."""

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ConfigError
from pipeline.core.own_code import import_own, own_files
from pipeline.models.loaded import Loaded, build, published_weights


def load(config: ModelConfig) -> Loaded:
    if published_weights(config):
        raise ConfigError(
            f"model.weights: {config.weights} is no checkpoint; kind factory takes a .safetensors, .pt or .pth file."
        )
    factory = import_own(str(config.name), "model.name")
    return Loaded(build(lambda: factory(**config.kwargs), config), code=own_files(str(config.name), factory))
