"""The 8-bit lattice: a step of whole grey levels along a sign, and a sign as a picture.

The arithmetic is exact, so what is attacked, predicted, stored and read back is one and the same image.

Makers step in torch, on the device; readers in NumPy (`step_array`), since torch would share a small image among
threads, and on a busy machine wait 40 ms for them where the step takes 0.1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A sign map as an image holds 0, 127 and 254 for -1, 0 and 1.
SIGN_UNIT = 127


def step(images_u8: Tensor, sign: Tensor, level: int | Tensor) -> Tensor:
    """clip(x + k*s, 0, 255).

    Args:
        images_u8: x, uint8, any shape.
        sign: s, int8 in -1, 0, 1, the same shape.
        level: k, 0..255, one or an int16 tensor that broadcasts: one for each image.

    Returns:
        uint8, no value further than k from x.
    """
    # int16: x + k reaches 510.
    return (images_u8.to(torch.int16) + level * sign.to(torch.int16)).clamp_(0, 255).to(torch.uint8)


def sign_to_picture(sign: Tensor) -> Tensor:
    """A sign map, int8 in -1, 0, 1, as the uint8 picture that is stored, of the same shape."""
    return ((sign + 1).to(torch.uint8)) * SIGN_UNIT


def step_array(
    images_u8: NDArray[np.uint8], sign: NDArray[np.int8], levels: int | NDArray[np.int16]
) -> NDArray[np.uint8]:
    """`step`, in NumPy.

    Args:
        images_u8: x, uint8, any shape.
        sign: s, int8 in -1, 0, 1, the same shape.
        levels: k, 0..255, one or an int16 array that broadcasts: one for each image.
    """
    moved = sign.astype(np.int16)
    moved *= levels
    moved += images_u8
    return np.clip(moved, 0, 255, out=moved).astype(np.uint8)


def picture_to_sign(picture_u8: NDArray[np.uint8]) -> NDArray[np.int8]:
    """A stored sign map back to int8 in -1, 0, 1.

    Raises:
        ValueError: the picture holds another value than 0, 127 and 254.
    """
    sign = picture_u8 // SIGN_UNIT
    if not np.array_equal(sign * SIGN_UNIT, picture_u8):
        raise ValueError("a sign map holds other values than 0, 127 and 254")
    return sign.astype(np.int8) - np.int8(1)


def stored_sign(images_u8: NDArray[np.uint8], direction_u8: NDArray[np.uint8], *, is_map: bool) -> NDArray[np.int8]:
    """The sign map along which images move, from the pictures that are stored beside them.

    From an attacked image it is s but where clipping kept x_k at x, on 0 or 255; there every other step ends as well.

    Args:
        images_u8: x, uint8, any shape.
        direction_u8: the same shape: the sign map as a picture, or x_k of any k but 0.
        is_map: which of them.

    Returns:
        int8 in -1, 0, 1.

    Raises:
        ValueError: the picture is no sign map.
    """
    if is_map:
        return picture_to_sign(direction_u8)
    return (direction_u8 > images_u8).astype(np.int8) - (direction_u8 < images_u8)


def distance(images_u8: Tensor, others_u8: Tensor) -> Tensor:
    """How far each value is from the other's, in grey levels: uint8, of the same shape."""
    # None of it leaves uint8.
    return torch.maximum(images_u8, others_u8) - torch.minimum(images_u8, others_u8)


def sign_towards(images_u8: Tensor, others_u8: Tensor) -> Tensor:
    """In which direction each value of the others lies, int8 in -1, 0, 1, of the same shape."""
    return (others_u8 > images_u8).to(torch.int8) - (others_u8 < images_u8).to(torch.int8)


def common_sign(images: Sequence[Tensor], levels: Sequence[int]) -> Tensor:
    """The sign map along which images lie; 0 where clipping hides it.

    Args:
        images: x and one or more x_k, uint8, of one shape.
        levels: their k, the first one 0.

    Returns:
        int8 in -1, 0, 1. Where images lie along no one sign, it is what most of those say that are a whole step from x.
    """
    clean, *attacked = images
    signs = [sign_towards(clean, pixels) for pixels in attacked]
    if all(torch.equal(sign, signs[0]) for sign in signs[1:]):
        return signs[0]
    votes = [
        sign * (step(clean, sign, level) == pixels)
        for sign, level, pixels in zip(signs, levels[1:], attacked, strict=True)
    ]
    return torch.stack(votes).sum(0).sign().to(torch.int8)
