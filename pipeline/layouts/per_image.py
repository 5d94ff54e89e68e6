"""A row for each source image: what layouts with such rows share, which differ in the pictures that a row holds.

What is said of the clean image stands in `clean_...`, and what is said of each other variant in a list `attacks`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.variants import CLEAN, Variant, by_attack, group_variants
from pipeline.layouts.base import (
    ATTACK,
    ATTACKS,
    EPSILON,
    IMAGE_FIELDS,
    LABEL,
    LAST,
    MODEL,
    Column,
    ColumnReader,
    Contents,
    Layout,
    Scores,
    columns_of,
    kept_columns,
    picture_columns,
)

if TYPE_CHECKING:
    from pipeline.core.batches import Batch


class PerImage(Layout):
    """A layout with a row for each source image, in the one subset that `subsets` names."""

    per_image = True

    def features(self, contents: Contents) -> dict[str, Any]:
        import datasets

        columns = contents.columns
        end = 1 + [column.name for column in columns].index(LAST)

        def clean(columns: Sequence[Column]) -> dict[str, Any]:
            return {column.clean_name: contents.feature(column) for column in columns if column.clean_name}

        def picture(fields: Sequence[str]) -> Any:
            encoded = fields == IMAGE_FIELDS
            return datasets.Image() if encoded else {name: datasets.Value("binary") for name in fields}

        once = len(by_attack(contents.variants)) == 1
        beside = [c for c in columns if not c.per_variant or (c.of_attack and once)]
        shared = {column.name: contents.feature(column) for column in beside}
        attacks = {c.name: contents.feature(c) for c in columns if c not in beside and not c.of_clean}
        return {
            **{name: picture(self.fields(name)) for name in picture_columns(self, contents.variants)},
            LABEL: shared[LABEL],
            **clean(columns[:end]),
            ATTACKS: datasets.List(attacks),
            **shared,
            **clean(columns[end:]),
        }

    def tables(
        self, batch: "Batch", scores: Scores, pictures: Sequence[pa.ChunkedArray], schema: pa.Schema
    ) -> list[pa.Table]:
        columns = dict(zip(picture_columns(self, scores.variants), pictures, strict=True))
        columns |= {name: batch.kept.column(name) for name in batch.kept.column_names}
        rows, attacked = len(scores.label), scores.variants[1:]
        # Row after row, each with all variants.
        order = pa.array(np.tile(np.arange(len(attacked)), rows))
        entries = {}
        for column in _columns(schema):
            if column.of_clean:
                continue
            if column.of_variant:
                entries[column.name] = pa.array([getattr(v, column.name) for v in attacked], column.type).take(order)
                continue
            values = column.values(scores, batch)
            if column.name in schema.names:
                columns[column.name] = values[1] if column.per_variant else values
                continue
            if column.clean_name:
                columns[column.clean_name] = values[0]
            # (V - 1, M) to (M * (V - 1),)
            entries[column.name] = pa.array(values[1:].T.ravel(), column.type)
        kind = schema.field(ATTACKS).type
        fields = list(kind.value_type)
        lists = pa.StructArray.from_arrays([entries[field.name] for field in fields], fields=fields)
        starts = np.arange(rows + 1, dtype=np.int32) * len(attacked)
        columns[ATTACKS] = pa.ListArray.from_arrays(starts, lists, type=kind)
        return [pa.table([columns[name] for name in schema.names], schema=schema)]

    def rows(self, tables: Mapping[str, pa.Table], variant: Variant, variants: Sequence[Variant]) -> pa.Table:
        rows = tables[self.subsets]
        recorded = variants[1:]
        entries = _entries(rows.column(ATTACKS), len(recorded))
        columns = _columns(rows.schema)
        # What is said of the clean image: by the own model of this variant's rows, where several have columns.
        own = {column.of_clean: f"clean_{column.of_clean}_{variant.model}" for column in columns if column.of_clean}
        clean = {c.name: rows.column(c.clean_name) for c in columns if c.clean_name}
        of_own = {name: rows.column(own[name]) if own.get(name) in rows.column_names else clean[name] for name in own}
        answers: dict[str, Any] = clean if variant == CLEAN else {}
        if variant != CLEAN:
            # At a level that is not recorded, what is the same at each level of the attack is known, and nothing else.
            other = variant if variant in recorded else next(one for one in recorded if variant.at(one.level) == one)
            own_entries = entries[recorded.index(other) :: len(recorded)]
            said = dict(zip([field.name for field in entries.type], own_entries.flatten(), strict=True))
            answers = {c.name: said[c.name] for c in columns if c.name in said and (other == variant or c.of_attack)}

        def value(column: Column) -> Any:
            if column.of_clean:
                return of_own[column.of_clean]
            if column.name in rows.column_names and (variant != CLEAN or not column.per_variant):
                return rows.column(column.name)
            return answers[column.name] if column.name in answers else column.blank(variant, len(rows))

        table = pa.table({column.name: value(column) for column in columns})
        for name in kept_columns(rows.column_names):
            table = table.append_column(name, rows.column(name))
        return table

    def answers(
        self, name: str, variants: Sequence[Variant], recorded: Sequence[Variant], read: ColumnReader
    ) -> list[pa.Array]:
        attacked = recorded[1:]
        entries = _entries(read(self.subsets, f"{ATTACKS}.list.element.{name}"), len(attacked))
        return [entries.field(name)[attacked.index(variant) :: len(attacked)] for variant in variants]

    def recorded(self, subsets: Sequence[str], first: Callable[[str, str], Any]) -> tuple[Variant, ...] | None:
        if self.subsets not in subsets:
            return None
        entries = first(self.subsets, ATTACKS) or ()
        # Rows of another format do not say what made them.
        said = [(round(255 * entry[EPSILON]), entry.get(ATTACK) or "", entry.get(MODEL)) for entry in entries]
        return group_variants(said)


def _entries(lists: pa.ChunkedArray, count: int) -> pa.StructArray:
    """The entries of N lists `attacks`, (N * count,): row after row, each with all variants but clean."""
    # A null list has no length, and `equal` says null of it.
    if lists.null_count or not pc.all(pc.equal(pc.list_value_length(lists), count), min_count=0).as_py():
        raise ValueError(f"the attacks of a row are not the run's {count}")
    return lists.combine_chunks().flatten()


def _columns(schema: pa.Schema) -> list[Column]:
    """The columns that rows of such a schema are read back with: some stand in the list alone."""
    return columns_of([*(field.name for field in schema.field(ATTACKS).type.value_type), *schema.names])
