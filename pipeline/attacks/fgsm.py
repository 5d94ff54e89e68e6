"""FGSM: one gradient, one sign, every epsilon.

x_k = clip(x + k * sign(grad_x J(theta, x, y)), 0, 255): the fast gradient sign method of Goodfellow,
Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR 2015), section 4, with pixels
and epsilons in whole grey levels. The arithmetic is exact, so what is predicted is what is stored.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pipeline.attacks.base import Perturbed
from pipeline.config.schema import AttackConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.attacked import AttackedModel


class FGSMConfig(AttackConfig):
    """FGSM, which has no settings of its own."""

    kind: Literal["fgsm"] = "fgsm"
    """FGSM: one step along the sign of the gradient."""
    paper = """@inproceedings{goodfellow2015explaining,
  title={Explaining and Harnessing Adversarial Examples},
  author={Goodfellow, Ian J. and Shlens, Jonathon and Szegedy, Christian},
  booktitle={International Conference on Learning Representations},
  year={2015},
  url={https://arxiv.org/abs/1412.6572}
}"""

    @property
    def how(self) -> str:
        return "by one step along the sign of its gradient"


class FGSM:
    """One forward and one backward pass for all epsilons."""

    on_ray = True
    needs_draws = False

    def perturb(
        self, model: "AttackedModel", images: "Tensor", classes: "Tensor", levels: Sequence[int], draws: "Tensor"
    ) -> Perturbed:
        return Perturbed.along(images, model.gradient(images, classes), levels)
