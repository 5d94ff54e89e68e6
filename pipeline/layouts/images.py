"""Layout images: a row for each image of each variant, and a subset for each variant, all with the same columns.

The plainest layout, and the one that every other is read back as.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.core.variants import CLEAN, SUBSET, Variant
from pipeline.layouts.base import (
    ATTACK,
    IMAGE,
    MODEL,
    Column,
    ColumnReader,
    Contents,
    Layout,
    Picture,
    Scores,
    columns_of,
)

if TYPE_CHECKING:
    from pipeline.core.batches import Batch


class Images(Layout):
    """Layout images; see `base.Layout`."""

    subsets = SUBSET
    per_image = False

    def picture(self, variant: Variant) -> Picture:
        return Picture(variant.subset, IMAGE)

    def features(self, contents: Contents) -> dict[str, Any]:
        import datasets

        return {IMAGE: datasets.Image(), **{column.name: contents.feature(column) for column in contents.columns}}

    def tables(
        self, batch: "Batch", scores: Scores, pictures: Sequence[pa.ChunkedArray], schema: pa.Schema
    ) -> list[pa.Table]:
        kept = {name: batch.kept.column(name) for name in batch.kept.column_names}
        columns = columns_of(schema.names)
        values = {column: column.values(scores, batch) for column in columns if not column.of_variant}

        def at(column: Column, index: int) -> Any:
            if column not in values:
                return column.blank(scores.variants[index], len(scores.label))
            return values[column][index] if column.per_variant else values[column]

        tables = []
        for index, picture in enumerate(pictures):
            cells = {IMAGE: picture, **{column.name: at(column, index) for column in columns}, **kept}
            tables.append(pa.table([cells[name] for name in schema.names], schema=schema))
        return tables

    def rows(self, tables: Mapping[str, pa.Table], variant: Variant, variants: Sequence[Variant]) -> pa.Table:
        rows = tables[self.source(variant, variants)[-1].subset]
        if IMAGE in rows.column_names:
            rows = rows.drop_columns([IMAGE])
        # Rows at another level of the same attack say which it is.
        for column in columns_of(rows.column_names) if variant not in variants else ():
            kept = column.of_clean or column.of_attack or column.name in (ATTACK, MODEL)
            if column.per_variant and not kept:
                index = rows.schema.get_field_index(column.name)
                rows = rows.set_column(index, column.name, column.blank(variant, len(rows)))
        return rows

    def answers(
        self, name: str, variants: Sequence[Variant], recorded: Sequence[Variant], read: ColumnReader
    ) -> list[pa.Array]:
        return [read(self.subset(variant), name).combine_chunks() for variant in variants]

    def recorded(self, subsets: Sequence[str], first: Callable[[str, str], Any]) -> tuple[Variant, ...] | None:
        # Not the first rows: a subset that nobody asks for would be downloaded for them.
        # The card lists them together, too: as `all`, and where there are several attacks or models as `eps-K`.
        own = [name for name in subsets if name != CLEAN.subset and re.fullmatch(self.subsets, name)]
        parted = [name for name in own if name.count("-") > 1]
        attacked = [Variant(int(name.rpartition("-")[2]), None, None, name) for name in parted or own]
        return (CLEAN, *attacked) if CLEAN.subset in subsets and attacked else None

    def summary(self, subset: str, variants: Sequence[Variant]) -> str:
        variant = next(variant for variant in variants if variant.subset == subset)
        if variant == CLEAN:
            return "Clean images"
        return f"{variant.maker} at epsilon {variant.level}/255"
