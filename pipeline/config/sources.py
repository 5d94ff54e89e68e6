"""The `source` section, by kind. A key that a kind does not read is unknown there."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.section import Count, Section, anchored, is_there


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _check_split(name: str) -> str:
    # Split names become file names and Hub split names, so slices such as `train[:10%]` cannot pass.
    if not re.fullmatch(r"\w+([.-]\w+)*", name):
        raise ValueError(f"{name!r} is not a split name; to take a part of a split use source.limit")
    return name


class SourceConfig(Section):
    """Where images come from: what every kind has."""

    kind: str
    split: Annotated[tuple[Annotated[str, AfterValidator(_check_split)], ...] | None, BeforeValidator(_as_tuple)] = None
    shuffle: bool = True
    limit: Count | None = None

    @model_validator(mode="after")
    def _check_splits(self) -> "SourceConfig":
        if self.split is not None and (not self.split or len(set(self.split)) < len(self.split)):
            raise ValueError("split needs at least one name, each once")
        return self

    @property
    def streams(self) -> bool:
        """Whether its rows are read in the source's own order, and nothing is downloaded ahead."""
        return False

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns that are carried through unchanged."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of its classes, where the source has none."""
        return None

    @property
    def folder(self) -> Path | None:
        """Its path, if that may be a folder of this machine."""
        return None


class DigitsConfig(SourceConfig):
    """Handwritten digits that come with scikit-learn."""

    kind: Literal["digits"]


class ImageFolderConfig(SourceConfig):
    """A folder with a folder of images for each class."""

    kind: Literal["imagefolder"]
    path: str

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        if isinstance(path := values.get("path"), str):
            values["path"] = anchored(path, folder)

    @property
    def folder(self) -> Path | None:
        return Path(self.path)


class TorchvisionConfig(SourceConfig):
    """A dataset class of torchvision; `path` is its name."""

    kind: Literal["torchvision"]
    path: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    classes: tuple[str, ...] | None = None

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        kwargs = values.get("kwargs")
        if isinstance(kwargs, dict) and isinstance(kwargs.get("root"), str):
            kwargs["root"] = anchored(kwargs["root"], folder)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.classes


class HuggingFaceConfig(SourceConfig):
    """A dataset of the Hub, or a folder or addresses of files that `datasets` reads."""

    kind: Literal["huggingface"]
    path: str
    name: str | None = None
    revision: str | None = None
    streaming: Annotated[bool, Field(strict=True)] = False
    image_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] | None = None
    keep_columns: tuple[str, ...] = ()

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        path = values.get("path")
        # A Hub id looks like a relative path; it is one only if it says so or is there.
        if isinstance(path, str) and (path.startswith((".", "~")) or is_there(folder / path)):
            values["path"] = anchored(path, folder)

    @model_validator(mode="before")
    @classmethod
    def _stream_in_order(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("streaming") is True:
            return {"shuffle": False, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> "HuggingFaceConfig":
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ValueError("keep_columns names a column twice")
        if self.streaming and self.shuffle:
            raise ValueError("shuffle has no effect with streaming, which reads the source in its own order")
        # Of a chain of fsspec's, such as simplecache::https://, any part.
        if re.search(r"https?://[^?#]*[?#]", self.path, re.IGNORECASE):
            raise ValueError(
                "path has a query in it, which manifest and card would show to everyone; give a URL that needs none"
            )
        return self

    @property
    def streams(self) -> bool:
        return self.streaming

    @property
    def kept(self) -> tuple[str, ...]:
        return self.keep_columns

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.classes

    @property
    def folder(self) -> Path | None:
        return Path(self.path)
