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
3.1, algorithm 1.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.attacks.base import Perturbed, direction_sign
from pipeline.config.schema import AttackConfig
from pipeline.config.section import Count
from pipeline.core.epsilon import epsilon_level

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.attacked import AttackedModel

# Any number that is no other attack's.
PGD_SALT = 0x50474400

# For each level, how many steps are taken and how long each is, in grey levels.
Schedule = Mapping[int, tuple[int, int]]


class IterativeConfig(AttackConfig):
    """Attacks of several steps."""

    steps: Annotated[Count, Field(le=1000)] | None = None
    """How many steps are taken, 1 to 1000. Left out: 10, or for `bim` min(k + 4, 1.25 k), k the epsilon in grey
    levels."""
    step: str | Annotated[float, Field(strict=True)] | None = None
    """How far each step goes, written and rounded like an epsilon. Left out: `bim` 1/255, `pgd` 2.5 k / steps, `mifgsm`
    k / steps, k the epsilon."""

    def _default_steps(self, level: int) -> int:
        """How many steps are taken at an epsilon in grey levels."""
        return 10

    @abstractmethod
    def _default_step(self, level: int, steps: int) -> int:
        """How long, in grey levels, each of some steps is."""

    @model_validator(mode="after")
    def _check_step(self) -> "IterativeConfig":
        if self.step is not None and epsilon_level(self.step, self.rounding, "step") > self.levels[0]:
            raise ValueError(f"step: {self.step} is larger than the epsilon {self.levels[0]}/255, so it would leave it")
        return self

    @property
    def schedule(self) -> Schedule:
        """For each stored epsilon in grey levels, how many steps are taken and how long each is, in grey levels."""
        steps = {level: self.steps or self._default_steps(level) for level in self.levels}
        if self.step is not None:
            return {level: (count, epsilon_level(self.step, self.rounding)) for level, count in steps.items()}
        return {level: (count, self._default_step(level, count)) for level, count in steps.items()}

    @property
    def how(self) -> str:
        steps = sorted({count for count, _ in self.schedule.values()})
        sizes = sorted({size for _, size in self.schedule.values()})
        counts, lengths = (f"{some[0]} to {some[-1]}" if some[1:] else str(some[0]) for some in (steps, sizes))
        return f"in {counts} steps of {lengths} grey levels along the sign of a gradient"

    @property
    def arguments(self) -> dict[str, Any]:
        return {"schedule": self.schedule}

    @property
    def identity(self) -> dict[str, Any]:
        counts, sizes = zip(*self.schedule.values(), strict=True)
        return {"kind": self.kind, "steps": counts, "step": [f"{size}/255" for size in sizes]}


class BIMConfig(IterativeConfig):
    """BIM, with the numbers of Kurakin et al. (2017), section 2.2, who count in grey levels too."""

    kind: Literal["bim"] = "bim"
    """BIM: steps along the sign of the gradient."""
    paper = """@inproceedings{kurakin2017physical,
  title={Adversarial Examples in the Physical World},
  author={Kurakin, Alexey and Goodfellow, Ian J. and Bengio, Samy},
  booktitle={International Conference on Learning Representations, Workshop Track},
  year={2017},
  url={https://arxiv.org/abs/1607.02533}
}"""

    def _default_steps(self, level: int) -> int:
        return min(level + 4, math.ceil(1.25 * level))

    def _default_step(self, level: int, steps: int) -> int:
        return 1


class PGDConfig(IterativeConfig):
    """PGD, with steps of 2.5 k / T, as Madry et al. (2018), section 5: the far side of the ball is within reach."""

    kind: Literal["pgd"] = "pgd"
    """PGD: as `bim`, from a random image of the epsilon ball."""
    paper = """@inproceedings{madry2018towards,
  title={Towards Deep Learning Models Resistant to Adversarial Attacks},
  author={Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle={International Conference on Learning Representations},
  year={2018},
  url={https://arxiv.org/abs/1706.06083}
}"""

    def _default_step(self, level: int, steps: int) -> int:
        return max(1, round(2.5 * level / steps))


class MIFGSMConfig(IterativeConfig):
    """MI-FGSM, with the numbers of Dong et al. (2018), sections 3.1 and 4.1; `decay` is their mu."""

    kind: Literal["mifgsm"] = "mifgsm"
    """MI-FGSM: as `bim`, along a decayed sum of gradients."""
    paper = """@inproceedings{dong2018boosting,
  title={Boosting Adversarial Attacks with Momentum},
  author={Dong, Yinpeng and Liao, Fangzhou and Pang, Tianyu and Su, Hang and Zhu, Jun and Hu, Xiaolin and Li, Jianguo},
  booktitle={Conference on Computer Vision and Pattern Recognition},
  year={2018},
  url={https://arxiv.org/abs/1710.06081}
}"""
    # What float32 cannot hold would make of 0 something that is no number.
    decay: Annotated[float, Field(ge=0, le=1e38, strict=True)] = 1.0
    """How much of the sum of former gradients is kept at each step; 0 forgets them."""

    def _default_step(self, level: int, steps: int) -> int:
        return max(1, round(level / steps))

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "decay": self.decay}

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "decay": self.decay}

    @property
    def title(self) -> str:
        return "MI-FGSM"


@dataclass(frozen=True)
class BIM:
    """Steps from the clean image.

    schedule: of rising levels the number of steps must not fall, and their length must be the same.
    """

    schedule: Schedule
    on_ray = False
    needs_draws = False

    def perturb(
        self, model: "AttackedModel", images: "Tensor", classes: "Tensor", levels: Sequence[int], draws: "Tensor"
    ) -> Perturbed:
        shared, taken, made = images, 0, []
        for level in levels:
            steps, size = self.schedule[level]
            move = _mover(images, level, size)
            # So many steps cannot leave the ball. A larger level takes the same ones, and goes on from there.
            free = min(steps, level // size)
            shared, taken = _follow(model, shared, classes, free - taken, move), free
            made.append(_follow(model, shared, classes, steps - free, move))
        return Perturbed(tuple(made))


@dataclass(frozen=True)
class PGD:
    """Steps from a random image of the ball."""

    schedule: Schedule
    on_ray = False
    needs_draws = True

    def perturb(
        self, model: "AttackedModel", images: "Tensor", classes: "Tensor", levels: Sequence[int], draws: "Tensor"
    ) -> Perturbed:
        made = []
        for level, start in zip(levels, _starts(images, levels, draws), strict=True):
            steps, size = self.schedule[level]
            made.append(_follow(model, start, classes, steps, _mover(images, level, size)))
        return Perturbed(tuple(made))


@dataclass(frozen=True)
class MIFGSM:
    """Steps from the clean image along a decayed sum of gradients; `decay` is mu, 0 or more."""

    schedule: Schedule
    decay: float
    on_ray = False
    needs_draws = False

    def perturb(
        self, model: "AttackedModel", images: "Tensor", classes: "Tensor", levels: Sequence[int], draws: "Tensor"
    ) -> Perturbed:
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


def _mover(images: "Tensor", level: int, size: int) -> "Callable[[Tensor, Tensor], Tensor]":
    """What takes one step from images along a direction, and stays within a level of the clean ones."""
    from pipeline.core.lattice import step

    # None of this leaves uint8: max(x - k, 0) and min(x + k, 255).
    lowest, highest = images - images.clamp(max=level), images + (255 - images).clamp(max=level)

    def move(x: "Tensor", direction: "Tensor") -> "Tensor":
        return step(x, direction_sign(direction), size).clamp(lowest, highest)

    return move


def _follow(
    model: "AttackedModel",
    x: "Tensor",
    classes: "Tensor",
    steps: int,
    move: "Callable[[Tensor, Tensor], Tensor]",
) -> "Tensor":
    """The image after some steps, each along the gradient where it is taken."""
    for _ in range(steps):
        x = move(x, model.gradient(x, classes))
    return x


def _starts(images: "Tensor", levels: Sequence[int], draws: "Tensor") -> "list[Tensor]":
    """clip(x + u, 0, 255) for each level, u a whole number in [-k, k] for each value."""
    import torch

    from pipeline.core.draws import draw_words

    words = draw_words(draws, images.shape[1:], PGD_SALT)
    return [(images.to(torch.int16) + (words % (2 * k + 1) - k)).clamp(0, 255).to(torch.uint8) for k in levels]


def _normalised(gradient: "Tensor") -> "Tensor":
    """A gradient (N, C, H, W) over the sum of its absolute values in each row; 0 stays 0."""
    import torch

    # In half precision the sum would be infinite.
    values = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    norm = values.abs().sum((1, 2, 3), keepdim=True)
    return values / norm.where(norm > 0, 1)
