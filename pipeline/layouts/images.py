"""Layout images: a row for each image and epsilon, and a subset for each epsilon, all with the same columns.

The plainest layout, and the one that every other is read back as.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.layouts.base import IMAGE, Column, Contents, Picture, Scores, columns_of, subset_name
from pipeline.layouts.every_image import EveryImage

if TYPE_CHECKING:
    from pipeline.core.batches import Batch


class Images(EveryImage):
    """Layout images; see `base.Layout`."""

    subsets = r"clean|eps-[0-9]{1,3}"
    per_image = False

    def subset(self, level: int) -> str:
        return subset_name(level)

    def picture(self, level: int) -> Picture:
        return Picture(subset_name(level), IMAGE)

    def features(self, contents: Contents) -> dict[str, Any]:
        import datasets

        return {IMAGE: datasets.Image(), **{column.name: contents.feature(column) for column in contents.columns}}

    def tables(
        self, batch: "Batch", scores: Scores, pictures: Sequence[pa.ChunkedArray], schema: pa.Schema
    ) -> list[pa.Table]:
        kept = {name: batch.kept.column(name) for name in batch.kept.column_names}
        values = {column: column.value(scores, batch) for column in columns_of(schema.names)}

        def at(column: Column, index: int) -> Any:
            if column.null_on_clean and index == 0:
                return column.blank(0, len(scores.label))
            return values[column][index] if column.per_variant else values[column]

        tables = []
        for index, picture in enumerate(pictures):
            columns = {IMAGE: picture, **{column.name: at(column, index) for column in values}, **kept}
            tables.append(pa.table([columns[name] for name in schema.names], schema=schema))
        return tables

    def rows(self, tables: Mapping[str, pa.Table], level: int, levels: Sequence[int]) -> pa.Table:
        rows = tables[self.source(level, levels)[-1].subset]
        if IMAGE in rows.column_names:
            rows = rows.drop_columns([IMAGE])
        for column in columns_of(rows.column_names) if level not in levels else ():
            if column.per_variant:
                index = rows.schema.get_field_index(column.name)
                rows = rows.set_column(index, column.name, column.blank(level, len(rows)))
        return rows

    def recorded(self, subsets: Sequence[str], first: Callable[[str, str], Any]) -> tuple[int, ...] | None:
        del first
        # The card lists them together, too, as `all`.
        own = [name for name in subsets if re.fullmatch(self.subsets, name)]
        levels = sorted(int(name.partition("-")[2] or 0) for name in own)
        return tuple(levels) if levels[:1] == [0] and len(levels) > 1 else None

    def describe(self, picture: Picture) -> str:
        del picture
        return "lossless"

    def summary(self, subset: str, attack: str) -> str:
        level = subset.partition("-")[2]
        return f"{attack} at epsilon {level}/255" if level else "Clean images"

    def example(self, levels: Sequence[int]) -> str:
        del levels
        return ""
