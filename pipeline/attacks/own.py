"""The section of an attack of the user's own: a class in a file, or in a module, that the config names."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.config.schema import AttackConfig
from pipeline.config.section import anchored, home
from pipeline.core.errors import require_file
from pipeline.core.own_code import names_file


class OwnAttackConfig(AttackConfig):
    """A class of the user's own."""

    kind: Annotated[str, Field(pattern=":")]
    """A class of your own, `path/to/file.py:Attack` or `package.module:Attack`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        if names_file(values["kind"]):
            values["kind"] = anchored(values["kind"], folder)

    def check_paths(self) -> None:
        if names_file(self.kind):
            require_file(home(self.kind.rpartition(":")[0]), "attack.kind")

    @property
    def own_code(self) -> str | None:
        return self.kind

    @property
    def arguments(self) -> dict[str, Any]:
        return self.kwargs

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.title, "kwargs": self.kwargs}

    @property
    def title(self) -> str:
        return self.kind.rpartition(":")[2]
