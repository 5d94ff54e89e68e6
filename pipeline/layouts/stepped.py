"""Images that are made on reading: a stored picture moved along a direction, as a feature of `datasets`."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from datasets.features.features import register_feature
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.core.images import open_stored
from pipeline.core.lattice import step_array, stored_sign
from pipeline.core.sign_bits import bits_to_picture

# A view's image, in Arrow: without a direction the picture is the image. No field is called `bytes`, or a cast to
# datasets.Image would silently take the picture for the image.
# Of a sign map in bits, `direction` are the positive ones and `zero` the others; else `zero` is null.
STEPPED_TYPE = pa.struct({"picture": pa.binary(), "direction": pa.binary(), "zero": pa.binary(), "level": pa.uint8()})


def stepped_cells(pictures: pa.ChunkedArray, directions: pa.ChunkedArray | None, level: int) -> pa.ChunkedArray:
    """Columns of pictures as one of STEPPED_TYPE; the bytes stay where they are.

    Args:
        pictures: encoded images.
        directions: encoded images or sign maps in bits, as many; None where the picture is the image.
        level: in grey levels.
    """
    beside = pa.table({"picture": pictures} | ({} if directions is None else {"direction": directions}))
    cells = []
    for batch in beside.to_batches():  # as long as the chunks of both allow
        picture, *direction = (column.field(index) for column in batch.columns for index in _bytes_of(column.type))
        nulls = [pa.nulls(len(batch), pa.binary())] * (2 - len(direction))
        levels = pa.repeat(pa.scalar(level, pa.uint8()), len(batch))
        cells.append(pa.StructArray.from_arrays([picture, *direction, *nulls, levels], fields=list(STEPPED_TYPE)))
    return pa.chunked_array(cells, STEPPED_TYPE)


def _bytes_of(kind: pa.StructType) -> list[int]:
    """Which fields of a column of pictures hold bytes; an encoded image also has a path."""
    return [index for index, field in enumerate(kind) if field.type == pa.binary()]


@dataclass
class SteppedImage:
    """A feature of `datasets` whose cells are images made on reading: `level` grey levels along a direction.

    attacked: directions are attacked images rather than sign maps.
    """

    attacked: bool = False
    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "PIL.Image.Image"
    pa_type: ClassVar[Any] = STEPPED_TYPE
    _type: str = field(default="SteppedImage", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def decode_example(self, value: Any, token_per_repo_id: Mapping[str, Any] | None = None) -> Any:
        """The image of a cell, as PIL's; what is one already stays."""
        if not isinstance(value, dict):
            return value
        if value["direction"] is None:
            # A copy has no format: `datasets` would encode what was a WebP as one again, with loss.
            return datasets.Image().decode_example({"bytes": value["picture"], "path": None}).copy()
        picture, sign = self.sign_of(value)
        return Image.fromarray(step_array(picture, sign, value["level"]))

    def sign_of(self, value: Mapping[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
        """The picture of a cell and the sign along which it moves, int8 in -1, 0, 1, each (H, W) or (H, W, 3); a
        PipelineError where there is none."""
        try:
            picture = _decode(value["picture"])
            if value.get("zero") is None:
                direction = _decode(value["direction"])
            else:
                (direction,) = bits_to_picture([value["direction"]], [value["zero"]], picture.shape)
            return picture, stored_sign(picture, direction, is_map=not self.attacked)
        except ValueError as error:
            raise PipelineError(f"A row cannot be read: {error}; fgsm verify names the damaged file.") from None

    def encode_example(self, value: Any) -> dict[str, Any]:
        """A cell from what `datasets.map` returns: a cell as it was, or a new image."""
        if isinstance(value, dict) and "picture" in value:
            return value
        encoded = datasets.Image().encode_example(value)["bytes"]
        return {"picture": encoded, "direction": None, "zero": None, "level": 0}

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """Cells as they are, or images as `datasets` stores them."""
        if pa.types.is_struct(storage.type) and storage.type.get_field_index("picture") >= 0:
            return storage.cast(self.pa_type)
        return stepped_cells(pa.chunked_array([datasets.Image().cast_storage(storage)]), None, 0).combine_chunks()

    def embed_storage(self, *_: Any, **__: Any) -> pa.Array:
        """Called where `datasets` uploads, for readers that do not have this feature."""
        raise PipelineError(
            "These images are made on reading, so they cannot be uploaded as they are; first make them with "
            'ds.map(lambda row: {"image": row["image"]}, '
            'features=datasets.Features({**ds.features, "image": datasets.Image()}), cache_file_name="images.arrow").'
        )

    def flatten(self) -> "SteppedImage":
        return self


def _decode(data: bytes) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3), of a picture no larger than Pillow admits by itself."""
    with open_stored(data) as image:
        return np.asarray(image)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `register_feature is experimental`
    register_feature(SteppedImage, "SteppedImage")
