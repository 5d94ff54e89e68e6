"""Section: what all parts of a config have in common."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.core.addresses import is_address

# Numbers are numbers: pydantic would take true for 1 and "256" for 256.
Count = Annotated[int, Field(gt=0, lt=2**63, strict=True)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, and a key without a value stands for its default.

    The text below each key is its description in docs/config.md, `fgsm config` and the JSON schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        # Where None is the default it may mean something that leaving the key out does not: weights of digits.
        return {
            key: value
            for key, value in values.items()
            if value is not None or key not in fields or fields[key].get_default() is None
        }

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        """Make relative input paths among the values of a section, not yet checked, relative to a folder."""

    def check_paths(self) -> None:
        """See that the files and folders of this machine that it names are there. Nothing is imported for it.

        Raises:
            ConfigError: one is not; the message begins with the kind of the section and the key.
        """

    @property
    def reads(self) -> tuple[Path, ...] | None:
        """The files and folders of this machine that all of it is read from.

        None where they do not say everything, as with what comes from the Hub, and with code of the user's own, which
        may read anything.
        """
        return None


def anchored(path: str, folder: Path) -> str:
    """A path of a config file of that folder."""
    # An address stays as it is: as a path it would lose a slash, and a password in it would not be found.
    return path if is_address(path) else str(folder / home(path))


def home(path: str) -> Path:
    """A path with its ~ written out, if it is that of a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder."""
    try:
        return path.exists()
    except OSError:  # too long for a name
        return False
