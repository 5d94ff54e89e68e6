"""The 8-bit lattice: a step of whole grey levels along a sign, and a sign as a picture.

The arithmetic is exact, so what is attacked, predicted, stored and read back is one and the same image.
"""

import torch
from torch import Tensor

# A sign map as an image holds 0, 127 and 254 for -1, 0 and 1.
SIGN_UNIT = 127


def step(images_u8: Tensor, sign: Tensor, level: int) -> Tensor:
    """clip(x + k*s, 0, 255).

    Args:
        images_u8: x, uint8, any shape.
        sign: s, int8 in -1, 0, 1, the same shape.
        level: k, 0..255.

    Returns:
        uint8, no value further than k from x.
    """
    # int16: x + k reaches 510.
    return (images_u8.to(torch.int16) + level * sign.to(torch.int16)).clamp_(0, 255).to(torch.uint8)


def sign_to_picture(sign: Tensor) -> Tensor:
    """A sign map, int8 in -1, 0, 1, as the uint8 picture that is stored, of the same shape."""
    return ((sign + 1).to(torch.uint8)) * SIGN_UNIT


def picture_to_sign(picture_u8: Tensor) -> Tensor:
    """A stored sign map back to int8 in -1, 0, 1.

    Raises:
        ValueError: the picture holds another value than 0, 127 and 254.
    """
    sign = picture_u8 // SIGN_UNIT
    if not torch.equal(sign * SIGN_UNIT, picture_u8) or (picture_u8 > 2 * SIGN_UNIT).any():
        raise ValueError("a sign map holds other values than 0, 127 and 254")
    return sign.to(torch.int8) - 1
