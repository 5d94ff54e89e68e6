"""Random words: against versions written in NumPy and Python, and what makes them random enough.

The draws are fixed, and the bounds are seven standard deviations: numbers that are independent do not reach them.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.attacks.iterative import PGD_SALT
from pipeline.attacks.noise import SALT as NOISE_SALT
from pipeline.core.draws import draw_words

SHAPE = (3, 32, 32)
SALTS = (NOISE_SALT, PGD_SALT)
DRAWS = torch.from_numpy(np.random.RandomState(0).randint(0, 2**31, 64))


def hash_in_numpy(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The hash as its author wrote it, in 32-bit arithmetic that wraps around."""
    multiplier = np.uint32(73244475)
    words = ((words >> np.uint32(16)) ^ words) * multiplier
    words = ((words >> np.uint32(16)) ^ words) * multiplier
    return (words >> np.uint32(16)) ^ words


def unhash(word: int) -> int:
    """Its inverse, with the author's other multiplier."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * 0x119DE1F3 % 2**32
    return (word >> 16) ^ word


@pytest.mark.parametrize("salt", SALTS)
def test_words_are_those_of_numpy(salt: int) -> None:
    values = hash_in_numpy(np.arange(np.prod(SHAPE), dtype=np.uint32))
    rows = hash_in_numpy(DRAWS.numpy().astype(np.uint32) ^ np.uint32(salt))
    expected = hash_in_numpy(values[None] ^ rows[:, None]).reshape(-1, *SHAPE)
    words = draw_words(DRAWS, SHAPE, salt)
    assert words.dtype == torch.int64
    np.testing.assert_array_equal(words.numpy(), expected.astype(np.int64))


def test_the_largest_numbers_do_not_overflow() -> None:
    # All bits set: the product of these and the multiplier is the largest that there is.
    draw, salt = 2**32 - 1, 0
    words = draw_words(torch.tensor([draw]), (2,), salt).flatten().tolist()
    # Value 0 has the hash 0, so that its word is the hash of the row's hash.
    assert unhash(unhash(words[0])) == draw
    assert unhash(unhash(words[1]) ^ unhash(words[0])) == 1


def test_a_row_does_not_depend_on_the_others() -> None:
    whole, order = draw_words(DRAWS, SHAPE, NOISE_SALT), torch.randperm(64)
    assert torch.equal(draw_words(DRAWS[order], SHAPE, NOISE_SALT), whole[order])
    assert all(torch.equal(draw_words(DRAWS[i : i + 5], SHAPE, NOISE_SALT), whole[i : i + 5]) for i in range(0, 64, 5))


def test_no_rows() -> None:
    assert draw_words(DRAWS[:0], SHAPE, NOISE_SALT).shape == (0, *SHAPE)


@pytest.mark.parametrize("salt", SALTS)
def test_every_bit_is_set_half_of_the_time(salt: int) -> None:
    words = draw_words(DRAWS, SHAPE, salt)
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0,)):  # of all, of each row, of each value over the rows
        for bit in range(32):
            share = ((words >> bit) & 1).double().mean(axes)
            assert bool(((share - 0.5).abs() < 7 * 0.5 / (words.numel() / share.numel()) ** 0.5).all()), bit
    assert bool(((words >= 0) & (words < 2**32)).all())


@pytest.mark.parametrize("level", [1, 2, 4, 8, 16, 127, 255])
def test_all_values_of_a_ball_are_as_likely(level: int) -> None:
    count = 2 * level + 1
    found = torch.bincount((draw_words(DRAWS, SHAPE, PGD_SALT) % count).flatten(), minlength=count).double()
    expected = DRAWS.numel() * 3 * 32 * 32 / count
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert len(found) == count
    # With so many degrees of freedom it is 2k on average, with a variance of 4k.
    assert abs(float(chi_square) - 2 * level) < 7 * (4 * level) ** 0.5 + 7


def unrelated(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether words say nothing of each other: in size, and bit for bit."""
    slack = 7 / one.numel() ** 0.5
    ranks = [words.double().flatten() / 2**32 - 0.5 for words in (one, other)]
    bits = [2 * ((words.flatten().unsqueeze(1) >> torch.arange(32)) & 1).float() - 1 for words in (one, other)]
    correlation = 12 * (ranks[0] * ranks[1]).mean()
    return abs(float(correlation)) < slack and bool(((bits[0].T @ bits[1]) / one.numel()).abs().max() < slack)


@pytest.mark.parametrize("salt", SALTS)
def test_neighbouring_values_are_unrelated(salt: int) -> None:
    words = draw_words(DRAWS, SHAPE, salt)
    for axis in (1, 2, 3):
        for apart in (1, 2):
            length = words.shape[axis] - apart
            assert unrelated(words.narrow(axis, 0, length), words.narrow(axis, apart, length))


@pytest.mark.parametrize("salt", SALTS)
@pytest.mark.parametrize("other", [1, 2, 2**15, 2**16, 2**30])
def test_rows_with_draws_that_are_nearly_equal_are_unrelated(salt: int, other: int) -> None:
    draws = torch.arange(0, 64) * 7919
    assert unrelated(draw_words(draws, SHAPE, salt), draw_words(draws ^ other, SHAPE, salt))
    assert unrelated(draw_words(draws, SHAPE, salt), draw_words(draws + other, SHAPE, salt))


def test_two_uses_of_a_draw_are_unrelated() -> None:
    assert unrelated(draw_words(DRAWS, SHAPE, NOISE_SALT), draw_words(DRAWS, SHAPE, PGD_SALT))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_as_the_cpu_does() -> None:
    draws = torch.cat([DRAWS, torch.tensor([0, 1, 2**32 - 1])])
    for salt in (*SALTS, 2**32 - 1):
        assert torch.equal(draw_words(draws.cuda(), SHAPE, salt).cpu(), draw_words(draws, SHAPE, salt))
