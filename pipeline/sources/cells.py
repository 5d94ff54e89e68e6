"""Image cells as `datasets` stores them, {bytes, path}: what opens them, and where their paths may lead."""

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.core.errors import ConfigError
from pipeline.core.images import UndecodableError, open_image

CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def image_cells(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The cells of a column of images, of whatever type that `datasets` takes for one."""
    import datasets

    if column.type == CELL:
        return column  # shuffled rows are a chunk each
    # Not combined: a row group may hold more bytes than one array of them can.
    return pa.chunked_array([datasets.Image().cast_storage(chunk) for chunk in column.chunks], CELL)


def open_cell(cell: Mapping[str, Any] | None, allowed: tuple[Path, ...]) -> Image.Image:
    """Open an image as `datasets` stores it, {bytes, path}; a path only below the folders that are allowed.

    Raises:
        UndecodableError: there is none, or its path leads elsewhere.
    """
    if cell and cell["bytes"] is not None:
        return open_image(io.BytesIO(cell["bytes"]))
    return open_image(_path_of(cell, allowed))


# What begins like an address, or is long and of base64's letters alone.
NO_PATH = re.compile(r"\w+://|data:|[\w+/=\s-]{100,}\Z")


def _path_of(cell: Mapping[str, Any] | None, allowed: tuple[Path, ...]) -> Path:
    if not cell or cell["path"] is None:
        raise UndecodableError("the row has no image")
    path = Path(cell["path"])
    candidates = [path] if path.is_absolute() else [folder / path for folder in allowed]
    for candidate in map(Path.resolve, candidates):
        if any(candidate.is_relative_to(folder) for folder in allowed):
            return candidate
    raise UndecodableError("its path leads out of the source's own folder")


def file_digest(cell: Mapping[str, Any] | None, allowed: tuple[Path, ...]) -> bytes:
    path = _path_of(cell, allowed)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        text = str(cell and cell["path"])
        if not NO_PATH.match(text):
            raise
        raise ConfigError(
            f"source.image_column: it holds text that is no path, {text[:20]!r} and so on; base64, or an address? "
            "Store the images' bytes instead."
        ) from None
