"""Draws: a random whole number for each value of an image, out of one random number for the image.

A seeded generator of torch gives other numbers on a GPU than on a CPU, and to a row numbers that depend on the rows
before it. These follow from the row's own number and from where the value is, by whole-number arithmetic that is exact
on every device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD_BITS = 32
_WORD = 2**WORD_BITS - 1
# Thomas Mueller's hash of 32-bit numbers (https://stackoverflow.com/a/12996028): one to one, and each bit that changes
# changes every bit of the result with a chance near a half.
_MULTIPLIER = 0x45D9F3B


def draw_words(draws: Tensor, shape: Sequence[int], salt: int) -> Tensor:
    """Random 32-bit numbers for the values of images.

    That of value i of a row with the number d is hash(hash(i) ^ hash(d ^ salt)).

    Args:
        draws: (N,) int64 in [0, 2**32), a random number for each row.
        shape: of an image, such as (C, H, W); values are counted in that order.
        salt: in [0, 2**32); another for each use, so that equal draws give unrelated numbers.

    Returns:
        (N, *shape) int64 in [0, 2**32), on the device of the draws.
    """
    values = _hash(torch.arange(math.prod(shape), device=draws.device))
    return _hash(values ^ _hash(draws ^ salt).unsqueeze(1)).view(len(draws), *shape)


def _hash(words: Tensor) -> Tensor:
    # The multiplier has 27 bits, so that no product has more than the 63 of an int64.
    for _ in range(2):
        words = ((words ^ (words >> 16)) * _MULTIPLIER) & _WORD
    return words ^ (words >> 16)
