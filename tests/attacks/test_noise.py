"""Noise: random signs of every image's own, and nothing of a model."""

from typing import Any

import numpy as np
import torch

from pipeline.attacks.noise import Noise
from tests.conftest import random_pixels

LEVELS = (1, 8, 64, 255)
DRAWS = torch.from_numpy(np.random.RandomState(3).randint(0, 2**31, 12))
IMAGES = torch.from_numpy(random_pixels(12, 16)).permute(0, 3, 1, 2)
NOBODY: Any = None  # it asks no model, and looks at no class


def test_every_value_moves_by_the_level_up_or_down() -> None:
    perturbed = Noise().perturb(NOBODY, IMAGES, NOBODY, LEVELS, DRAWS)
    assert perturbed.direction is not None
    assert {*perturbed.direction.flatten().tolist()} == {-1.0, 1.0}
    signs = perturbed.direction.numpy().astype(np.int64)
    for level, images in zip(LEVELS, perturbed.images, strict=True):
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images, np.clip(IMAGES.numpy().astype(np.int64) + level * signs, 0, 255))


def test_up_is_as_likely_as_down() -> None:
    images = torch.zeros((12, 3, 64, 64), dtype=torch.uint8)
    direction = Noise().perturb(NOBODY, images, NOBODY, (1,), DRAWS).direction
    assert direction is not None
    slack = 7 / direction[0].numel() ** 0.5
    assert float(direction.mean((1, 2, 3)).abs().max()) < slack
    # Signs of two images are unrelated.
    flat = direction.flatten(1)
    assert float((flat @ flat.T / flat.shape[1] - torch.eye(12)).abs().max()) < slack


def test_a_row_follows_from_its_draw_alone() -> None:
    whole = torch.stack(Noise().perturb(NOBODY, IMAGES, NOBODY, LEVELS, DRAWS).images)
    order = torch.randperm(12)
    for rows in (order, order[:5], order[:1]):
        part = Noise().perturb(NOBODY, IMAGES[rows], NOBODY, LEVELS, DRAWS[rows])
        assert torch.equal(torch.stack(part.images), whole[:, rows])
    other = Noise().perturb(NOBODY, IMAGES, NOBODY, LEVELS, DRAWS + 1)
    assert all((a != b).any() for a, b in zip(other.images[0], whole[0], strict=True))
