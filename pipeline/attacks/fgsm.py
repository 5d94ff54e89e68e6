"""FGSM on the 8-bit lattice: one gradient, one sign, every epsilon.

x_k = clip(x + k * sign(grad_x J(theta, x, y)), 0, 255): the fast gradient sign method of Goodfellow,
Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR 2015), section 4, with pixels
and epsilons in whole grey levels. The arithmetic is exact, so what is predicted is what is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.core.errors import NonFiniteError
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


@dataclass(frozen=True)
class Attacked:
    """A batch at every epsilon, clean first.

    images: 1 + K times (N, C, H, W) uint8; sign: (N, C, H, W) int8, the direction in which they lie;
    logits: (1 + K, N, classes) of exactly those images; classes: (N,) int64, whose loss was changed;
    zero_signs: how many values of valid rows have gradient exactly 0, and finite_logits and
    finite_gradient: whether those of valid rows are numbers, each a scalar tensor. Nothing here has waited
    for the device.
    """

    images: tuple[Tensor, ...]
    sign: Tensor
    logits: Tensor
    classes: Tensor
    zero_signs: Tensor
    finite_logits: Tensor
    finite_gradient: Tensor

    def check_finite(self) -> None:
        """Wait for the numbers, and look at them.

        Raises:
            NonFiniteError: logits or the loss gradient of a valid row hold NaN or infinity.
        """
        for finite, what in ((self.finite_logits, "logits"), (self.finite_gradient, "loss gradient")):
            if not bool(finite):
                raise NonFiniteError(f"The victim's {what} hold NaN or infinity")


def attack(
    victim: Model,
    images_u8: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    levels: Sequence[int],
    goal: Goal,
    draws: Tensor,
) -> Attacked:
    """Attack one batch at several epsilons: one forward, one backward, and a forward for each epsilon.

    Args:
        victim: the model.
        images_u8: (N, C, H, W) uint8.
        labels: (N,) int64 model indices, -1 for unlabelled.
        valid: (N,) bool: rows that count. Others are computed along and never looked at.
        levels: epsilons in grey levels, 1..255.
        goal: which class's loss is raised or lowered.
        draws: (N,) int64 random numbers for random targets.
    """
    direction = gradient_sign(victim, images_u8, labels, goal=goal, draws=draws)
    stored = (images_u8, *(step(images_u8, direction.sign, level) for level in levels))
    logits = torch.stack([direction.logits, *(victim.predict(images) for images in stored[1:])])
    rows = valid.view(-1, 1, 1, 1)
    return Attacked(
        images=stored,
        sign=direction.sign,
        logits=logits,
        classes=direction.classes,
        zero_signs=((direction.sign == 0) & rows).sum(),
        finite_logits=all_finite(logits, valid.view(1, -1, 1)),
        finite_gradient=all_finite(direction.gradient, rows),
    )


@dataclass(frozen=True)
class Direction:
    """Where the attack leads: sign (N, C, H, W) int8 in -1, 0, 1, of the gradient (N, C, H, W) of the loss of
    `classes` (N,), or against it in a targeted attack; logits (N, classes) of the clean images.

    Each image's gradient is a positive multiple of the loss's, see `_margin`.
    """

    sign: Tensor
    gradient: Tensor
    logits: Tensor
    classes: Tensor


def gradient_sign(victim: Model, images_u8: Tensor, labels: Tensor, *, goal: Goal, draws: Tensor) -> Direction:
    """The direction of the attack, from one forward and one backward pass to the input only.

    What is raised is summed over the batch, in float32 or more: a mean over a large batch can push small
    gradients to zero, and an image's gradient would depend on how many others share its batch.
    """
    images = victim.unit(images_u8).requires_grad_()
    logits = victim(images)
    classes = goal.classes(logits.detach(), labels, draws)
    (gradient,) = torch.autograd.grad(_margin(logits, classes).sum(), images)
    sign = gradient.sign().to(torch.int8)
    return Direction(sign if goal.target is None else -sign, gradient, logits.detach(), classes)


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    """What the attack raises in place of the loss, (N,): how far the other classes together are above each row's own.

    With z the logits and y the class, d = log(sum of exp(z_j), j != y) - z_y, and the cross-entropy is log(1 + exp(d)).
    So its gradient is that of d times the probability of the other classes: the sign is the same. Where the model is
    sure of an image that factor is next to 0: float32 rounds y's own part of the gradient away then, and half precision
    all of it.
    """
    own = classes.unsqueeze(1)
    return logits.scatter(1, own, -torch.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)


def all_finite(values: Tensor, valid: Tensor) -> Tensor:
    """Whether all values of the valid rows are numbers, a scalar bool."""
    return (torch.isfinite(values) | ~valid).all()
