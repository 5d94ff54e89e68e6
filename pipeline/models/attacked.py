"""What an attack sees of the model that it attacks, for one batch of images."""

import torch
from torch import Tensor

from pipeline.models.base import Model


def finite_rows(values: Tensor) -> Tensor:
    """Of images (N, C, H, W), floating: (N,) bool, whether all values of a row are numbers."""
    # NaN and infinity are what they leave as the largest or the smallest; to ask of each value takes 30 times as long.
    return torch.isfinite(values.amax((1, 2, 3))) & torch.isfinite(values.amin((1, 2, 3)))


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
        """(N, C, H, W) uint8 to logits (N, classes), where no gradient is wanted; a TypeError for other images."""
        if images_u8.dtype != torch.uint8:
            raise TypeError(f"model.predict takes images of type uint8, and was given {_described(images_u8)}")
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

        Raises:
            TypeError: the images are not uint8, or not as many and of the same shape as the clean ones.
        """
        if images_u8.dtype != torch.uint8 or images_u8.shape != self._clean.shape:
            raise TypeError(
                f"model.gradient takes images of type uint8 and shape {tuple(self._clean.shape)}, like the clean ones, "
                f"and was given {_described(images_u8)}"
            )
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
        with self._model.naming_failure():
            (gradient,) = torch.autograd.grad(_margin(logits, classes).sum(), images)
        self.finite &= finite_rows(gradient)
        direction = -gradient if self._targeted else gradient
        if clean:
            self._gradient = classes, direction, direction._version
        return direction


def _described(images: Tensor) -> str:
    return f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    """What an attack raises in place of the loss, (N,): how far the other classes together are above each row's own.

    With z the logits and y the class, d = log(sum of exp(z_j), j != y) - z_y, and the cross-entropy is log(1 + exp(d)).
    So its gradient is that of d times the probability of the other classes: the sign is the same. Where the model is
    sure of an image that factor is next to 0: float32 rounds y's own part of the gradient away then, and half precision
    all of it.
    """
    own = classes.unsqueeze(1)
    return logits.scatter(1, own, -torch.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)
