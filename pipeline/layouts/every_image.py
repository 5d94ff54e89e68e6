"""Every image is stored, clean and at each epsilon: what layouts that do so share, which differ in where it lies."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.layouts.base import Layout, Picture

if TYPE_CHECKING:
    from torch import Tensor


class EveryImage(Layout):
    """A layout that stores the image at every recorded level as it is."""

    stores_sign = False

    def picture(self, level: int) -> Picture:
        """Where the image at a recorded level is."""
        raise NotImplementedError

    def pictures(self, levels: Sequence[int]) -> tuple[Picture, ...]:
        return tuple(self.picture(level) for level in levels)

    def ray(self, levels: Sequence[int]) -> tuple[Picture, Picture]:
        # Any attacked image says in which direction.
        return self.picture(0), self.picture(levels[1])

    def source(self, level: int, levels: Sequence[int]) -> tuple[Picture, ...]:
        return (self.picture(level),) if level in levels else self.ray(levels)

    def stored(self, images: "Sequence[Tensor]", sign: "Tensor") -> "tuple[Tensor, ...]":
        del sign
        return tuple(images)
