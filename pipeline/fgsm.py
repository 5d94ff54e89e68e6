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
from torch.nn import functional as F

from pipeline.errors import NonFiniteError
from pipeline.victims import Victim


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

    images: (1 + K, N, C, H, W) uint8; logits: (1 + K, N, classes) of exactly those images; classes: (N,)
    int64, whose loss was changed; zero_signs: how many values of valid rows have gradient exactly 0, a
    scalar int64 tensor.
    """

    images: Tensor
    logits: Tensor
    classes: Tensor
    zero_signs: Tensor


def attack(
    victim: Victim,
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

    Raises:
        NonFiniteError: logits or the loss gradient of a valid row hold NaN or infinity.
    """
    sign, clean_logits, classes = gradient_sign(victim, images_u8, labels, valid, goal=goal, draws=draws)
    stored = torch.stack([images_u8, *(step(images_u8, sign, level) for level in levels)])
    with torch.inference_mode():
        logits = torch.stack([clean_logits, *(victim(victim.unit(images)) for images in stored[1:])])
    _check_finite(logits, valid.expand(logits.shape[:2]), "logits")
    return Attacked(stored, logits, classes, (sign[valid] == 0).sum())


def gradient_sign(
    victim: Victim, images_u8: Tensor, labels: Tensor, valid: Tensor, *, goal: Goal, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The direction of the attack, from one forward and one backward pass to the input only.

    The loss is summed over the batch, in float32 or more: a mean over a large batch can push small
    gradients to zero, and an image's gradient would depend on how many others share its batch.

    Returns:
        sign (N, C, H, W) int8 in -1, 0, 1; logits (N, classes); the classes (N,) whose loss is changed.

    Raises:
        NonFiniteError: as `attack`.
    """
    images = victim.unit(images_u8).requires_grad_()
    logits = victim(images)
    classes = goal.classes(logits.detach(), labels, draws)
    loss = F.cross_entropy(logits, classes, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    _check_finite(logits.detach(), valid, "logits")
    _check_finite(gradient, valid, "loss gradient")
    sign = gradient.sign().to(torch.int8)
    return (sign if goal.target is None else -sign), logits.detach(), classes


def step(images_u8: Tensor, sign: Tensor, level: int) -> Tensor:
    """clip(x + k*s, 0, 255).

    Args:
        images_u8: x, uint8, any shape.
        sign: s, int8 in -1, 0, 1, the same shape.
        level: k, 0..255.

    Returns:
        uint8, no value further than k from x.
    """
    # int16: x + k reaches 510.
    return (images_u8.to(torch.int16) + level * sign.to(torch.int16)).clamp_(0, 255).to(torch.uint8)


def _check_finite(values: Tensor, valid: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values[valid]).all()):
        raise NonFiniteError(f"The victim's {what} hold NaN or infinity")
