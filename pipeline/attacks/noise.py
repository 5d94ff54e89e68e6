"""Noise: random signs, the control for every other attack.

x_k = clip(x + k * r, 0, 255) with r = -1 or +1, each with probability 1/2, for every value of the image: the control of
Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR 2015), section 6. It moves every
value as far as FGSM does, but asks no model. So what it does to predictions is what a change of that size does by
itself, the floor under figures of transfer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic.json_schema import SkipJsonSchema

from pipeline.attacks.base import Perturbed
from pipeline.config.schema import AttackConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.attacked import AttackedModel

# Any number that is no other attack's.
SALT = 0x6E6F6973


class NoiseConfig(AttackConfig):
    """Noise, which asks no model: it has no label to lead away from, needs none in the source, and has no target."""

    kind: Literal["noise"] = "noise"
    """Random signs: the control, which uses no model and needs no labels."""
    asks_model: ClassVar[bool] = False
    # They are what runs without labels have. Left out where a config is written down, as it may not say them.
    label: SkipJsonSchema[Literal["prediction"]] = Field("prediction", exclude=True)
    target: SkipJsonSchema[None] = Field(None, exclude=True)
    models: SkipJsonSchema[None] = Field(None, exclude=True)

    @property
    def title(self) -> str:
        return "noise"

    @property
    def how(self) -> str:
        return "moves each value by the whole epsilon, up or down at random: the control for the others"

    @field_validator("label", "target", "models", mode="before")
    @classmethod
    def _asks_no_model(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError(
                f"{value!r} has no meaning with kind noise, which does not use the model; leave the key out"
            )
        return value


class Noise:
    """One random sign map for all epsilons."""

    on_ray = True
    needs_draws = True

    def perturb(
        self, model: "AttackedModel", images: "Tensor", classes: "Tensor", levels: Sequence[int], draws: "Tensor"
    ) -> Perturbed:
        from pipeline.core.draws import draw_words

        signs = 2 * (draw_words(draws, images.shape[1:], SALT) % 2) - 1
        return Perturbed.along(images, signs.float(), levels)
