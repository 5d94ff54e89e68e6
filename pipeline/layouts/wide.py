"""Layout wide: a row for each source image holds the clean image and beside it the image at every epsilon."""

from collections.abc import Sequence

from pipeline.core.variants import CLEAN, Variant
from pipeline.layouts.base import IMAGE, Picture
from pipeline.layouts.per_image import PerImage

EXAMPLE = """A row has the image at every recorded epsilon in a column of its own, here at {level}/255:

```python
row = rows[0]
clean, attacked = row["image"], row["{column}"]
```
"""


class Wide(PerImage):
    """Layout wide; see `base.Layout`."""

    subsets = "wide"

    def picture(self, variant: Variant) -> Picture:
        return Picture(self.subsets, IMAGE if variant == CLEAN else variant.column)

    def describe(self, picture: Picture) -> str:
        if picture.column == IMAGE:
            return "clean, lossless"
        return f"at epsilon {picture.column.rpartition('_')[2]}/255, lossless"

    def summary(self, subset: str, variants: Sequence[Variant]) -> str:
        return "Clean images, each beside its attacked ones"

    def example(self, variants: Sequence[Variant]) -> str:
        return EXAMPLE.format(level=variants[-1].level, column=self.picture(variants[-1]).column)
