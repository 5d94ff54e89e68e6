"""Models of timm, by name; published weights bring their preprocessing."""

import math
from pathlib import Path
from typing import Literal

from pipeline.config.schema import NamedModelConfig, PreprocessConfig
from pipeline.models.loaded import Loaded, import_extra, published_weights


class TimmConfig(NamedModelConfig):
    """A model of timm; `weights` is a pretrained tag, or a checkpoint."""

    kind: Literal["timm"]
    """A model of timm. It needs the extra `timm`."""

    @property
    def reads(self) -> tuple[Path, ...] | None:
        # Published weights, names such as hf-hub:a/b, and some arguments are looked up on the Hub or in other files.
        if published_weights(self) or ":" in self.name or self.kwargs:
            return None
        return () if self.checkpoint is None else (self.checkpoint,)


def load(config: TimmConfig) -> Loaded:
    timm = import_extra("timm")
    name, wanted = config.name, published_weights(config)
    if wanted is None:
        return Loaded(timm.create_model(name, pretrained=False, **config.kwargs))
    # `weights` is a pretrained tag (a1_in1k), or a whole id that carries one.
    full = wanted if wanted.startswith(name) or ":" in wanted else f"{name}.{wanted}"
    module = timm.create_model(full, pretrained=True, **config.kwargs)
    data = timm.data.resolve_model_data_config(module)
    _, height, width = data["input_size"]
    crop = height if height == width else (height, width)
    return Loaded(
        module,
        mean=data["mean"],
        std=data["std"],
        preprocess=PreprocessConfig(
            resize=math.floor(min(height, width) / data["crop_pct"]), crop=crop, interpolation=data["interpolation"]
        ),
    )
