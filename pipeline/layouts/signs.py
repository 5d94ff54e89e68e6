"""Layout signs: a row for each source image holds the clean image, and the sign map that leads to every epsilon."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.core.sign_bits import POSITIVE, ZERO, picture_to_bits
from pipeline.core.variants import CLEAN, Variant
from pipeline.layouts.base import IMAGE, Picture, encode_column
from pipeline.layouts.per_image import PerImage

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.core.images import ImageFormat

SIGN = "sign"

EXAMPLE = """The image at any epsilon k/255 follows exactly from one row, here for k = {level}:

```python
import numpy as np
import PIL.Image

row = rows[0]
x, s = (np.asarray(row[name]).astype(np.int16) for name in ("image", "{sign}"))
x_k = np.clip(x + {level} * (s // 127 - 1), 0, 255).astype(np.uint8)
attacked = PIL.Image.fromarray(x_k)
```
"""

BITS_EXAMPLE = """The image at any epsilon k/255 follows exactly from one row, here for k = {level}:

```python
import numpy as np
import PIL.Image

row = rows[0]
clean = np.asarray(row["image"])
positive, zero = (
    np.unpackbits(np.frombuffer(row["{sign}"][name], np.uint8), count=clean.size).reshape(clean.shape).astype(np.int16)
    for name in ("positive", "zero")
)
x_k = np.clip(clean + {level} * (2 * positive - 1 + zero), 0, 255).astype(np.uint8)
attacked = PIL.Image.fromarray(x_k)
```
"""


class Signs(PerImage):
    """Layout signs; see `base.Layout`."""

    subsets = "signs"
    stores_sign = True

    def picture(self, variant: Variant) -> Picture:
        column = f"{SIGN}_{variant.pair}" if variant.pair else SIGN
        return Picture(self.subsets, IMAGE if variant == CLEAN else column)

    def stored(self, images: "Sequence[Tensor]", directions: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        from pipeline.core.lattice import sign_to_picture

        return images[0], *map(sign_to_picture, directions)

    def encode(self, column: str, pictures_u8: "Tensor", image_format: "ImageFormat") -> pa.StructArray:
        return encode_column(pictures_u8, image_format, smooth=column == IMAGE)

    def describe(self, picture: Picture) -> str:
        return "0, 127 and 254 for the signs -1, 0 and +1, lossless" if picture.column.startswith(SIGN) else "lossless"

    def summary(self, subset: str, variants: Sequence[Variant]) -> str:
        return "Clean images, and the sign that leads to every epsilon"

    def example(self, variants: Sequence[Variant]) -> str:
        return EXAMPLE.format(level=variants[-1].level, sign=self.picture(variants[-1]).column)


class SignBits(Signs):
    """Layout signs where a sign map is not a picture but two planes of bits, which a reader need not decode."""

    def fields(self, column: str) -> tuple[str, ...]:
        return super().fields(column) if column == IMAGE else (POSITIVE, ZERO)

    def encode(self, column: str, pictures_u8: "Tensor", image_format: "ImageFormat") -> pa.StructArray:
        if column == IMAGE:
            return super().encode(column, pictures_u8, image_format)
        return picture_to_bits(pictures_u8.permute(0, 2, 3, 1).numpy())

    def describe(self, picture: Picture) -> str:
        if picture.column == IMAGE:
            return super().describe(picture)
        return (
            "positive and zero: whether the sign is +1, and whether it is 0; one bit for each value, in the order "
            "height, width, channel, packed from a byte's highest bit on"
        )

    def example(self, variants: Sequence[Variant]) -> str:
        return BITS_EXAMPLE.format(level=variants[-1].level, sign=self.picture(variants[-1]).column)
