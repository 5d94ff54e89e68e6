"""All rows of a source, of whatever kind it is."""

from functools import partial

import pyarrow as pa

from pipeline.config.schema import PreprocessConfig
from pipeline.core.images import Opener
from pipeline.core.plan import Plan, make_plan, stream_plan
from pipeline.engine.decode import read_image
from pipeline.sources.base import Source


def plan_for(source: Source, *, most: int = 1000, batch_size: int = 100) -> Plan:
    """A plan over its rows in their own order."""
    if files := source.files(most):
        return stream_plan(files, batch_size=batch_size)
    counts = {split: rows or 0 for split, rows in source.splits.items()}
    return make_plan(counts, shuffle=False, seed=0, limit=None, images_per_shard=most, batch_size=batch_size)


def tables_of(source: Source) -> dict[str, pa.Table]:
    """The rows of each split."""
    tables: dict[str, list[pa.Table]] = {split: [] for split in source.splits}
    plan = plan_for(source)
    for shard, table, _ in source.tables(plan, plan.shards):
        tables[shard.split].append(table.rename_columns(["image", "label", *source.kept]))
    return {split: pa.concat_tables(own) for split, own in tables.items()}


def openers_of(source: Source, split: str) -> list[Opener]:
    """What opens the image of each row."""
    return [partial(source.open, cell) for cell in tables_of(source)[split]["image"].to_pylist()]


def first_values(source: Source, split: str) -> list[int]:
    """The first pixel's first value of every row."""
    cells = tables_of(source)[split]["image"].to_pylist()
    return [int(read_image(partial(source.open, cell), PreprocessConfig(), 10**6)[0, 0, 0]) for cell in cells]
