"""Datasets of the Hub, and folders or addresses of files: `datasets` prepares them, or they are streamed."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.schema import SourceConfig
from pipeline.config.section import anchored, home, is_there
from pipeline.core.errors import ConfigError
from pipeline.sources.base import Source, file_names

# What opens files that are streamed, by the endings of their names: called with the config, the files and
# `need_labels`.
FORMATS: Mapping[tuple[str, ...], str] = {
    (".parquet", ".pq"): "pipeline.sources.parquet:open_parquet",
    (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"): "pipeline.sources.tar:open_tars",
}


class HuggingFaceConfig(SourceConfig):
    """A dataset of the Hub, or a folder or addresses of files that `datasets` reads."""

    kind: Literal["huggingface"]
    """A dataset of the Hugging Face Hub, or files that `datasets` reads: Parquet, WebDataset tars, `save_to_disk`."""
    path: str
    """A Hub id such as uoft-cs/cifar10 or a local folder; with `streaming` also the URL of files, with * for
    several."""
    name: str | None = None
    """The dataset's configuration on the Hub, for datasets that have several."""
    revision: str | None = None
    """The commit, branch or tag of a Hub dataset. Left out: the newest."""
    streaming: Annotated[bool, Field(strict=True)] = False
    """Whether to read the files as the run goes, in their own order, and download nothing ahead."""
    image_column: str | None = None
    """The column of the images. Left out: the only column of images."""
    label_column: str | None = None
    """The column of the labels. Left out: the only ClassLabel column."""
    classes: tuple[str, ...] | None = None
    """The class names, in the order of the labels, for data that does not name them."""
    keep_columns: tuple[str, ...] = ()
    """Further columns to copy into the dataset unchanged."""

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
    def folder(self) -> Path:
        return home(self.path)

    def check_paths(self) -> None:
        # Anything else may be the id of a dataset of the Hub, or an address.
        named = self.path.startswith((".", "~", "/")) or (self.path.count("/") > 1 and "://" not in self.path)
        if named and not self.folder.is_dir():
            raise ConfigError(f"source.path: there is no folder {self.folder}.")

    @property
    def reads(self) -> tuple[Path, ...] | None:
        return (self.folder,) if self.folder.is_dir() else None


def open_huggingface(config: HuggingFaceConfig, *, need_labels: bool) -> Source:
    """Open the dataset; nothing of one that is streamed is read but its head and what says how it is laid out. Errors
    are those of `open_source`."""
    from pipeline.sources.arrow import open_arrow
    from pipeline.sources.files import find_files

    if not config.streaming:
        return open_arrow(config, need_labels=need_labels)
    listing = find_files(config)
    listing = replace(listing, files=file_names(listing.files))
    opener = resolve_name(_format_of([name for own in listing.files.values() for name, _ in own]))
    source: Source = opener(config, listing, need_labels=need_labels)
    return source


def _format_of(names: list[str]) -> str:
    for suffixes, opener in FORMATS.items():
        if names[0].lower().endswith(suffixes):
            other = next((name for name in names if not name.lower().endswith(suffixes)), None)
            if other is None:
                return opener
            raise ConfigError(f"source.path: {names[0]} and {other} are of two kinds; a streamed source is of one.")
    raise ConfigError(
        f"source.path: {names[0]} is neither Parquet nor a WebDataset .tar, the kinds that can be streamed; "
        "leave out source.streaming."
    )
