"""Every image is stored, clean and in each variant: what layouts that do so share, which differ in where it lies."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.core.variants import CLEAN, Variant
from pipeline.layouts.base import Layout, Picture

if TYPE_CHECKING:
    from torch import Tensor


class EveryImage(Layout):
    """A layout that stores the image of every recorded variant as it is."""

    stores_sign = False

    @abstractmethod
    def picture(self, variant: Variant) -> Picture:
        """Where the image of a recorded variant is."""

    def pictures(self, variants: Sequence[Variant]) -> tuple[Picture, ...]:
        return tuple(self.picture(variant) for variant in variants)

    def ray(self, variant: Variant, variants: Sequence[Variant]) -> tuple[Picture, Picture]:
        # Any image of the same attack on the same model says in which direction.
        attacked = next(other for other in variants if variant.at(other.level) == other)
        return self.picture(CLEAN), self.picture(attacked)

    def source(self, variant: Variant, variants: Sequence[Variant]) -> tuple[Picture, ...]:
        return (self.picture(variant),) if variant in variants else self.ray(variant, variants)

    def stored(self, images: "Sequence[Tensor]", directions: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        del directions
        return tuple(images)
