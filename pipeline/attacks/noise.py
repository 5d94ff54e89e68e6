"""Noise: random signs, the control for every other attack.

x_k = clip(x + k * r, 0, 255) with r = -1 or +1, each with probability 1/2, for every value of the image: the control of
Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR 2015), section 6. It moves every
value as far as FGSM does, but asks no model. So what it does to predictions is what a change of that size does by
itself, the floor under figures of transfer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.attacks.base import AttackedModel, Perturbed
from pipeline.core.draws import draw_words

# Any number that is no other attack's.
SALT = 0x6E6F6973


class Noise:
    """One random sign map for all epsilons."""

    on_ray = True
    needs_draws = True

    def perturb(
        self, model: AttackedModel, images: Tensor, classes: Tensor, levels: Sequence[int], draws: Tensor
    ) -> Perturbed:
        del model, classes
        signs = 2 * (draw_words(draws, images.shape[1:], SALT) % 2) - 1
        return Perturbed.along(images, signs.to(torch.float32), levels)
