"""Attack: from a batch of clean images to images at several epsilons.

An attack is a class with a method `perturb`. It lives on the 8-bit lattice: it is given uint8 images and whole grey
levels, and what it returns is stored as it is, so what is predicted of it is predicted of the stored pixels. Whose loss
is changed, by label or by target, is decided before it is called, see `Goal`.

An attack's section of the config stands in the same file. So PyTorch is imported only where an attack is run: a config
is checked without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.attacked import AttackedModel


@dataclass(frozen=True)
class Goal:
    """Which class's loss the attack changes.

    Without a target the loss of `label` is raised: the dataset's label, or the model's own prediction,
    which avoids label leaking (Kurakin, Goodfellow and Bengio, "Adversarial Machine Learning at Scale",
    ICLR 2017, section 4.2). With a target (a model index, the least likely class or a random one) the
    target's loss is lowered instead (the "one-step target class" methods of the same section).
    """

    label: Literal["dataset", "prediction"] = "dataset"
    target: Literal["least_likely", "random"] | int | None = None

    def classes(self, logits: "Tensor", labels: "Tensor", draws: "Tensor") -> "Tensor":
        """The class for each row, (N,) int64.

        Args:
            logits: (N, classes) of the clean images.
            labels: (N,) int64 model indices; -1, unlabelled, falls back to the prediction.
            draws: (N,) int64, 0 or more: each row's own random number.
        """
        import torch

        predictions = logits.argmax(1)
        own = torch.where(labels >= 0, labels, predictions) if self.label == "dataset" else predictions
        match self.target:
            case None:
                return own
            case "least_likely":
                return logits.argmin(1)
            case "random":
                # Any class but the row's own, each as likely as the others.
                count = logits.shape[1]
                return (own + 1 + draws % (count - 1)) % count
            case index:
                return torch.full_like(own, index)


@dataclass(frozen=True)
class Perturbed:
    """A batch at K epsilons.

    images: K times (N, C, H, W) uint8, in the order of the levels, no value further than its level from the clean one.
    direction: (N, C, H, W), floating: what the images lie along, x_k = clip(x + k * sign(direction), 0, 255) for every
    k. An attack on a ray has one; of others it is None.
    """

    images: "tuple[Tensor, ...]"
    direction: "Tensor | None" = None

    @classmethod
    def along(cls, images_u8: "Tensor", direction: "Tensor", levels: Sequence[int]) -> "Perturbed":
        """Clean images moved along the sign of a direction by each level.

        Args:
            images_u8: (N, C, H, W) uint8.
            direction: of the same shape, floating.
            levels: epsilons in grey levels, 1..255.
        """
        from pipeline.core.lattice import step

        sign = direction_sign(direction)
        return cls(tuple(step(images_u8, sign, level) for level in levels), direction)


def direction_sign(direction: "Tensor") -> "Tensor":
    """The sign map of a direction: int8 in -1, 0, 1."""
    import torch

    return direction.sign().to(torch.int8)


class Attack(Protocol):
    """One way to perturb images.

    on_ray: whether the image at every epsilon k follows from the clean one and one direction, clip(x + k * s). If so,
    one sign map is enough to store all of them, and readers can make those of any other epsilon.
    needs_draws: whether `perturb` looks at its random numbers. They are drawn only then; else `draws` is None.

    Equal arguments give equal images, and those of a row depend on that row alone: a run that is resumed, or verified,
    makes the same batches again, in chunks of one size that may hold other rows.
    """

    on_ray: bool
    needs_draws: bool

    def perturb(
        self, model: "AttackedModel", images: "Tensor", classes: "Tensor", levels: Sequence[int], draws: "Tensor"
    ) -> Perturbed:
        """Attack a batch at several epsilons.

        Args:
            model: what is attacked; its `gradient` knows whether a loss is raised or lowered.
            images: (N, C, H, W) uint8, the clean images; not to be changed in place.
            classes: (N,) int64 model indices, whose loss is changed.
            levels: K epsilons in grey levels, rising, each in 1..255.
            draws: (N,) int64, 0 or more: a random number for each row, which depends on the run's seed and the source
                row alone. None without `needs_draws`.
        """
        ...
