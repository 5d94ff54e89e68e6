"""The small model that comes with the package, for the embedded digits."""

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ConfigError
from pipeline.models.loaded import Loaded, published_weights


def load(config: ModelConfig) -> Loaded:
    from pipeline.models.checkpoints import load_checkpoint
    from pipeline.models.digits_net import CLASSES, WEIGHTS, DigitsNet

    module = DigitsNet()
    if config.weights == "digits":
        load_checkpoint(module, WEIGHTS)
    elif published_weights(config):
        raise ConfigError(f"model.weights: kind digits has no weights {config.weights}; leave the key out for its own.")
    return Loaded(module, classes=CLASSES)
