"""Models that a callable of the user's own makes."""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from pipeline.config.schema import NamedModelConfig
from pipeline.config.section import anchored, home
from pipeline.core.errors import ConfigError, require_file
from pipeline.core.own_code import import_own, names_file, own_files
from pipeline.models.loaded import Loaded, published_weights


class FactoryConfig(NamedModelConfig):
    """A callable of the user's own; `name` is `package.module:callable` or `path/to/file.py:callable`."""

    kind: Literal["factory"]
    """A callable of your own that returns a torch.nn.Module, from images to logits."""

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        super().anchor(values, folder)
        if isinstance(name := values.get("name"), str) and names_file(name):
            values["name"] = anchored(name, folder)

    def check_paths(self) -> None:
        try:
            super().check_paths()
        except ConfigError as error:
            if not self.name.startswith("pipeline.models."):
                raise
            raise ConfigError(f"{error} scripts/train_sources.py of the repository trains this model.") from None
        if names_file(self.name):
            require_file(home(self.name.rpartition(":")[0]), "model.name")

    @property
    def own_code(self) -> str | None:
        return self.name

    @model_validator(mode="after")
    def _check_name(self) -> "FactoryConfig":
        if ":" not in self.name:
            raise ValueError(
                f"name {self.name!r} is not of the form package.module:callable or path/to/file.py:callable"
            )
        return self


def load(config: FactoryConfig) -> Loaded:
    if published_weights(config):
        raise ConfigError(
            f"model.weights: {config.weights} is no checkpoint; kind factory takes a .safetensors, .pt or .pth file."
        )
    factory = import_own(config.name, "model.name")
    return Loaded(factory(**config.kwargs), code=own_files(config.name, factory))
