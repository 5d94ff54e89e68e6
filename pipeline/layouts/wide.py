"""Layout wide: a row for each source image holds the clean image and beside it the image at every epsilon."""

from collections.abc import Sequence

from pipeline.layouts.base import IMAGE, Picture, subset_name
from pipeline.layouts.every_image import EveryImage
from pipeline.layouts.per_image import PerImage

EXAMPLE = """A row has the image at every recorded epsilon in a column of its own, here at {level}/255:

```python
row = rows[0]
clean, attacked = row["image"], row["{column}"]
```
"""


class Wide(EveryImage, PerImage):
    """Layout wide; see `base.Layout`."""

    subsets = "wide"

    def picture(self, level: int) -> Picture:
        return Picture(self.subsets, subset_name(level).replace("-", "_") if level else IMAGE)

    def describe(self, picture: Picture) -> str:
        if picture.column == IMAGE:
            return "clean, lossless"
        return f"at epsilon {picture.column.rpartition('_')[2]}/255, lossless"

    def summary(self, subset: str, attack: str) -> str:
        del subset, attack
        return "Clean images, each beside its attacked ones"

    def example(self, levels: Sequence[int]) -> str:
        return EXAMPLE.format(level=levels[-1], column=self.picture(levels[-1]).column)
