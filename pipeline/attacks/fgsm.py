"""FGSM: one gradient, one sign, every epsilon.

x_k = clip(x + k * sign(grad_x J(theta, x, y)), 0, 255): the fast gradient sign method of Goodfellow,
Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR 2015), section 4, with pixels
and epsilons in whole grey levels. The arithmetic is exact, so what is predicted is what is stored.
"""

from collections.abc import Sequence

from torch import Tensor

from pipeline.attacks.base import AttackedModel, Perturbed


class FGSM:
    """One forward and one backward pass for all epsilons."""

    on_ray = True
    needs_draws = False

    def perturb(
        self, model: AttackedModel, images: Tensor, classes: Tensor, levels: Sequence[int], draws: Tensor
    ) -> Perturbed:
        del draws
        return Perturbed.along(images, model.gradient(images, classes), levels)
