"""BIM, PGD and MI-FGSM: FGSM in several steps, each along the sign of a gradient at the image that the last one made.

    x_0 = x, or for PGD clip(x + u, 0, 255)
    x_t = x_t-1 + a * sign(g_t), then kept within k of x and in 0..255, for t = 1 .. T
    x_k = x_T

    BIM, PGD   g_t = grad_x J(theta, x_t-1, y)
    MI-FGSM    g_t = mu * g_t-1 + grad_x J(theta, x_t-1, y) / |grad_x J(theta, x_t-1, y)|_1, with g_0 = 0

k and a are whole grey levels, so every x_t is an 8-bit image, and the gradient is one at pixels that a file can hold.

BIM, the basic iterative method: Kurakin, Goodfellow and Bengio, "Adversarial Examples in the Physical World" (ICLR 2017
workshop), section 2.2; images are in 0..255 there too. PGD, projected gradient descent: Madry et al., "Towards Deep
Learning Models Resistant to Adversarial Attacks" (ICLR 2018), section 2.1; u is uniform in [-k, k] for each value.
MI-FGSM, the momentum iterative method: Dong et al., "Boosting Adversarial Attacks with Momentum" (CVPR 2018), section
3.1, algorithm 1. How T and a follow from k where the config does not say them is in `sections.py`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.attacks.base import AttackedModel, Perturbed, direction_sign
from pipeline.core.draws import draw_words
from pipeline.core.lattice import step

# Any number that is no other attack's.
PGD_SALT = 0x50474400

# For each level, how many steps are taken and how long each is, in grey levels.
Schedule = Mapping[int, tuple[int, int]]


class BIM:
    """Steps from the clean image.

    schedule: of rising levels the number of steps must not fall, and their length must be the same.
    """

    on_ray = False
    needs_draws = False

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def perturb(
        self, model: AttackedModel, images: Tensor, classes: Tensor, levels: Sequence[int], draws: Tensor
    ) -> Perturbed:
        del draws
        shared, taken, made = images, 0, []
        for level in levels:
            steps, size = self.schedule[level]
            move = _mover(images, level, size)
            # So many steps cannot leave the ball. A larger level takes the same ones, and goes on from there.
            free = min(steps, level // size)
            shared, taken = _follow(model, shared, classes, free - taken, move), free
            made.append(_follow(model, shared, classes, steps - free, move))
        return Perturbed(tuple(made))


class PGD:
    """Steps from a random image of the ball."""

    on_ray = False
    needs_draws = True

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def perturb(
        self, model: AttackedModel, images: Tensor, classes: Tensor, levels: Sequence[int], draws: Tensor
    ) -> Perturbed:
        made = []
        for level, start in zip(levels, _starts(images, levels, draws), strict=True):
            steps, size = self.schedule[level]
            made.append(_follow(model, start, classes, steps, _mover(images, level, size)))
        return Perturbed(tuple(made))


class MIFGSM:
    """Steps from the clean image along a decayed sum of gradients; `decay` is mu, 0 or more."""

    on_ray = False
    needs_draws = False

    def __init__(self, schedule: Schedule, decay: float) -> None:
        self.schedule, self.decay = schedule, decay

    def perturb(
        self, model: AttackedModel, images: Tensor, classes: Tensor, levels: Sequence[int], draws: Tensor
    ) -> Perturbed:
        del draws
        first, made = _normalised(model.gradient(images, classes)), []
        for level in levels:
            steps, size = self.schedule[level]
            move = _mover(images, level, size)
            total, x = first, move(images, first)
            for _ in range(steps - 1):
                total = self.decay * total + _normalised(model.gradient(x, classes))
                x = move(x, total)
            made.append(x)
        return Perturbed(tuple(made))


def _mover(images: Tensor, level: int, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What takes one step from images along a direction, and stays within a level of the clean ones."""
    # None of this leaves uint8: max(x - k, 0) and min(x + k, 255).
    lowest, highest = images - images.clamp(max=level), images + (255 - images).clamp(max=level)

    def move(x: Tensor, direction: Tensor) -> Tensor:
        return step(x, direction_sign(direction), size).clamp(lowest, highest)

    return move


def _follow(
    model: AttackedModel, x: Tensor, classes: Tensor, steps: int, move: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The image after some steps, each along the gradient where it is taken."""
    for _ in range(steps):
        x = move(x, model.gradient(x, classes))
    return x


def _starts(images: Tensor, levels: Sequence[int], draws: Tensor) -> list[Tensor]:
    """clip(x + u, 0, 255) for each level, u a whole number in [-k, k] for each value."""
    words = draw_words(draws, images.shape[1:], PGD_SALT)
    return [(images.to(torch.int16) + (words % (2 * k + 1) - k)).clamp(0, 255).to(torch.uint8) for k in levels]


def _normalised(gradient: Tensor) -> Tensor:
    """A gradient (N, C, H, W) over the sum of its absolute values in each row; 0 stays 0."""
    # In half precision the sum would be infinite.
    values = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    norm = values.abs().sum((1, 2, 3), keepdim=True)
    return values / norm.where(norm > 0, 1)
