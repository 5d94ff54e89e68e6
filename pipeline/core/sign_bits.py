"""A sign map as two planes of bits: where a value rises, and where it stays.

They say what the picture of a sign map says, in one bit a value and what little the second plane takes compressed. No
codec is needed: packing and unpacking is all.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# The fields of a column of such maps: the bits of s > 0, and those of s = 0, of values in the order H, W, C.
POSITIVE, ZERO = "positive", "zero"


def picture_to_bits(pictures_u8: NDArray[np.uint8]) -> pa.StructArray:
    """Sign maps as they are stored, from pictures (N, H, W, C) uint8: 0, 127 and 254 for -1, 0 and 1.

    Returns:
        N rows of POSITIVE and ZERO, binary, of H * W * C bits each, the first in the highest bit of the first byte.
        What fills up the last byte is 0.
    """
    values = pictures_u8.reshape(len(pictures_u8), -1)
    planes, plane = [], np.empty(values.shape, dtype=np.bool_)
    for value in (254, 127):
        packed = np.packbits(np.equal(values, value, out=plane), axis=1)
        kind = pa.binary(packed.shape[1])
        rows = pa.FixedSizeBinaryArray.from_buffers(kind, len(packed), [None, pa.py_buffer(packed)])
        planes.append(rows.cast(pa.binary()))
    return pa.StructArray.from_arrays(planes, [POSITIVE, ZERO])


def bits_to_picture(positive: Sequence[bytes], zero: Sequence[bytes], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Stored sign maps back as pictures.

    Args:
        positive: N maps' bits of s > 0.
        zero: their bits of s = 0.
        shape: of each, channels last.

    Returns:
        (N, *shape) uint8: 0, 127 and 254 for -1, 0 and 1.

    Raises:
        ValueError: a plane is not of that shape, or a value is said to rise and to stay.
    """
    count = int(np.prod(shape))
    size = -(-count // 8)
    if any(plane is None or len(plane) != size for plane in (*positive, *zero)):
        raise ValueError(f"the bits of a sign map are not {size} bytes, as those of {count} values are")
    packed = [np.frombuffer(b"".join(planes), np.uint8).reshape(-1, size) for planes in (positive, zero)]
    if (packed[0] & packed[1]).any():
        raise ValueError("a sign map has a value that is both positive and zero")
    if ((packed[0][:, -1] | packed[1][:, -1]) & (255 >> (count - 1) % 8 + 1)).any():
        raise ValueError("a sign map has bits beyond its last value")
    up, still = (np.unpackbits(planes, axis=1, count=count) for planes in packed)
    # 254 where it rises, 127 where it stays.
    up += up
    up += still
    up *= 127
    return up.reshape(-1, *shape)


def decode_cells(
    cells: Sequence[Sequence[bytes]],
    shape: tuple[int, int, int],
    decode: Callable[[Sequence[bytes]], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Stored pictures, however they are stored, as (N, H, W, C) uint8.

    Args:
        cells: N pictures, each an encoded image, or the two planes of a sign map.
        shape: (C, H, W) of each.
        decode: the same from N encoded images.
    """
    channels, height, width = shape
    first, *zero = zip(*cells, strict=True)
    return bits_to_picture(first, zero[0], (height, width, channels)) if zero else decode(first)
