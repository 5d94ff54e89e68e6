"""Attack: from a batch of clean images to images at several epsilons.

An attack is a class with a method `perturb`. It lives on the 8-bit lattice: it is given uint8 images and whole grey
levels, and what it returns is stored as it is, so what is predicted of it is predicted of the stored pixels. Whose loss
is changed, by label or by target, is decided before it is called, see `Goal`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.core.lattice import step
from pipeline.models.base import Model


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

    def classes(self, logits: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        """The class for each row, (N,) int64.

        Args:
            logits: (N, classes) of the clean images.
            labels: (N,) int64 model indices; -1, unlabelled, falls back to the prediction.
            draws: (N,) int64, 0 or more: each row's own random number.
        """
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


class AttackedModel:
    """A model as attacks of one goal see it, for one batch.

    The clean images go forward at most once, since their logits may choose the classes: their gradient uses that
    forward pass, costs one backward pass, and is kept for the next attack.

    finite (N,) bool says of each row whether all values of all its gradients so far are numbers. Nothing here waits for
    the device.
    """

    def __init__(self, model: Model, images_u8: Tensor, *, targeted: bool) -> None:
        self._model, self._clean, self._targeted = model, images_u8, targeted
        self._forward: tuple[Tensor, Tensor] | None = None
        self._logits: Tensor | None = None
        self._gradient: tuple[Tensor, Tensor, int] | None = None
        self.finite = torch.ones(len(images_u8), dtype=torch.bool, device=images_u8.device)

    def _differentiable(self, images_u8: Tensor) -> tuple[Tensor, Tensor]:
        images = self._model.unit(images_u8).requires_grad_()
        return images, self._model(images)

    @property
    def went_forward(self) -> bool:
        """Whether the logits of the clean images are there."""
        return self._logits is not None

    @property
    def logits(self) -> Tensor:
        """(N, classes), of the clean images."""
        if self._logits is None:
            self._forward = self._differentiable(self._clean)
            self._logits = self._forward[1].detach()
        return self._logits

    def predict(self, images_u8: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to logits (N, classes), where no gradient is wanted."""
        return self._model.predict(images_u8)

    def gradient(self, images_u8: Tensor, classes: Tensor) -> Tensor:
        """The direction in which the attack gains most, (N, C, H, W) in the model's floating type.

        Of each row it is a positive multiple of the gradient of the cross-entropy of `classes` with respect to the
        pixels, or, in a targeted attack, of its negative: to move along it is always right.

        What is raised is summed over the batch, in float32 or more: a mean over a large batch can push small gradients
        to zero, and an image's gradient would depend on how many others share its batch.

        Args:
            images_u8: (N, C, H, W) uint8.
            classes: (N,) int64, whose loss is changed.
        """
        clean = images_u8 is self._clean
        if clean and self._gradient is not None:
            before, direction, version = self._gradient
            # An attack that changed it in place must not change what the next one sees.
            if before is classes and direction._version == version:
                return direction
        if clean:
            _ = self.logits  # goes forward, if it has not
        forward, self._forward = self._forward, None  # a graph serves one backward pass, and takes memory
        images, logits = forward if clean and forward is not None else self._differentiable(images_u8)
        (gradient,) = torch.autograd.grad(_margin(logits, classes).sum(), images)
        self.finite &= torch.isfinite(gradient).flatten(1).all(1)
        direction = -gradient if self._targeted else gradient
        if clean:
            self._gradient = classes, direction, direction._version
        return direction


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    """What an attack raises in place of the loss, (N,): how far the other classes together are above each row's own.

    With z the logits and y the class, d = log(sum of exp(z_j), j != y) - z_y, and the cross-entropy is log(1 + exp(d)).
    So its gradient is that of d times the probability of the other classes: the sign is the same. Where the model is
    sure of an image that factor is next to 0: float32 rounds y's own part of the gradient away then, and half precision
    all of it.
    """
    own = classes.unsqueeze(1)
    return logits.scatter(1, own, -torch.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)


@dataclass(frozen=True)
class Perturbed:
    """A batch at K epsilons.

    images: K times (N, C, H, W) uint8, in the order of the levels, no value further than its level from the clean one.
    direction: (N, C, H, W), floating: what the images lie along, x_k = clip(x + k * sign(direction), 0, 255) for every
    k. An attack on a ray has one; of others it is None.
    """

    images: tuple[Tensor, ...]
    direction: Tensor | None = None

    @classmethod
    def along(cls, images_u8: Tensor, direction: Tensor, levels: Sequence[int]) -> "Perturbed":
        """Clean images moved along the sign of a direction by each level.

        Args:
            images_u8: (N, C, H, W) uint8.
            direction: of the same shape, floating.
            levels: epsilons in grey levels, 1..255.
        """
        sign = direction_sign(direction)
        return cls(tuple(step(images_u8, sign, level) for level in levels), direction)


def direction_sign(direction: Tensor) -> Tensor:
    """The sign map of a direction: int8 in -1, 0, 1."""
    return direction.sign().to(torch.int8)


class Attack(Protocol):
    """One way to perturb images.

    on_ray: whether the image at every epsilon k follows from the clean one and one direction, clip(x + k * s). If so,
    one sign map is enough to store all of them, and readers can make those of any other epsilon.
    needs_draws: whether `perturb` looks at its random numbers, which are drawn only then.

    Equal arguments give equal images, and those of a row depend on that row alone: a run that is resumed, or verified,
    makes the same batches again, in chunks of one size that may hold other rows.
    """

    on_ray: bool
    needs_draws: bool

    def perturb(
        self, model: AttackedModel, images: Tensor, classes: Tensor, levels: Sequence[int], draws: Tensor
    ) -> Perturbed:
        """Attack a batch at several epsilons.

        Args:
            model: what is attacked; its `gradient` knows whether a loss is raised or lowered.
            images: (N, C, H, W) uint8, the clean images; not to be changed in place.
            classes: (N,) int64 model indices, whose loss is changed.
            levels: K epsilons in grey levels, rising, each in 1..255.
            draws: (N,) int64, 0 or more: a random number for each row, which depends on the run's seed and the source
                row alone.
        """
        ...
