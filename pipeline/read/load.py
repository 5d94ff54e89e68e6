"""Read a dataset back: the same rows from either layout, at any epsilon, with nothing of the attack in memory.

Rows of layout images are read as they are. Those of layout signs, and those at an epsilon that was not
recorded, are views: their `image` cell holds a stored picture, the picture that says in which direction its
values move, and how far. Reading the cell makes the image, so that columns can be selected, rows shuffled
and formats set as with stored images, and nothing is copied.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from pipeline.config.schema import is_address, reading_levels
from pipeline.core.errors import ConfigError, first_line
from pipeline.core.redaction import redact_answer
from pipeline.layouts.columns import (
    ANSWER,
    ATTACKS,
    FILE,
    IMAGE,
    LAST,
    SIGN,
    evaluator_columns,
    evaluator_ids,
    image_columns,
    kept_columns,
    one_level,
)
from pipeline.layouts.stepped import STEPPED_TYPE, SteppedImage
from pipeline.output.folder import SIGNS, OutputFolder, local_folder, shard_file, subset_name
from pipeline.output.manifest import Manifest, read_manifest, require_manifest, warn_if_incomplete
from pipeline.output.stores import storage_options

# Rows that a streaming view holds at a time.
STREAMED_ROWS = 64


# One epsilon, or a piece of one: stored rows, side by side where there are several of them, and what makes those of
# the result from as many tables.
Part = tuple[Sequence[Any], Callable[..., pa.Table]]


def load(
    path_or_repo: str | Path,
    epsilons: Sequence[str | float] | None = None,
    split: str | None = None,
    streaming: bool = False,
    *,
    allow_incomplete: bool = False,
) -> Any:
    """Load a dataset of either layout: a row per image and epsilon, with the columns of layout images.

    Args:
        path_or_repo: an output folder, its address in an object store, or a Hub id.
        epsilons: `k/255`, a decimal as in the config (rounded down), or 0 for clean; rows come in this order.
            None: clean and every recorded epsilon, rising. At an epsilon that is not recorded the images are made
            exactly, and what the victim and the evaluators would say of them is null.
        split: one of the dataset's; None loads all.
        streaming: read ahead of use only, in bounded memory.
        allow_incomplete: do not warn where shards of an output folder are missing.

    Returns:
        What `datasets.load_dataset` returns: a `Dataset`, or an `IterableDataset` when streaming; without a split
        a `DatasetDict` or `IterableDatasetDict` of them.

    Raises:
        ConfigError: there is no such dataset or split, it is not of ours, or an epsilon cannot be stored.
    """
    asked = None if epsilons is None else reading_levels(epsilons)
    stored: Manifest | None = None
    if is_address(path_or_repo):
        place = str(path_or_repo)
        folder = OutputFolder(place)
        stored = require_manifest(folder)
        stored.check_recorded(asked or ())
        if not allow_incomplete:
            warn_if_incomplete(folder, stored)
        recorded = None if SIGNS in stored.stored else list(stored.levels)
    else:
        local = local_folder(path_or_repo)
        place = str(local or path_or_repo)
        if local and (manifest := read_manifest(OutputFolder(local))):
            manifest.check_recorded(asked or ())
            if not allow_incomplete:
                warn_if_incomplete(OutputFolder(local), manifest)
        recorded = _recorded_subsets(place)
    if recorded is None:
        opened = _open(place, stored, SIGNS, streaming)
        splits = {name: _from_signs(rows, asked, streaming) for name, rows in _chosen(opened, split, place).items()}
    else:
        wanted = recorded if asked is None else asked
        subsets = {
            level: _chosen(_open(place, stored, subset_name(level), streaming), split, place)
            for level in _needed(wanted, recorded)
        }
        names = list(next(iter(subsets.values())))
        splits = {
            name: _from_images({level: rows[name] for level, rows in subsets.items()}, wanted, streaming)
            for name in names
        }
    if split is not None:
        return splits[split]
    return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(splits)


def _recorded_subsets(place: str) -> list[int] | None:
    """The recorded levels of layout images, 0 first, as its subsets name them; None for layout signs."""
    try:
        names = datasets.get_dataset_config_names(place)
    except Exception as error:  # a dozen exception types of three libraries; all mean the same here
        raise ConfigError(f"{place} cannot be read as a dataset: {first_line(error)}") from error
    if SIGNS in names:
        return None
    numbers = [name.removeprefix("eps-") for name in names if name.startswith("eps-")]
    if "clean" not in names or not numbers or not all(number.isdecimal() for number in numbers):
        raise ConfigError(
            f"{place} is no dataset of fgsm-pipeline: its card lists neither signs nor clean and eps-... "
            f"but {', '.join(names)}."
        )
    return [0, *sorted(map(int, numbers))]


def _needed(wanted: Sequence[int], recorded: Sequence[int]) -> list[int]:
    """The subsets to open: those wanted, and clean and an attacked one if others are to be made from them."""
    there = [level for level in wanted if level in recorded]
    return there if len(there) == len(wanted) else sorted({*there, *recorded[:2]})


def _open(place: str, stored: Manifest | None, subset: str, streaming: bool) -> Mapping[str, Any]:
    """The splits of a subset; from an object store as its manifest lists them."""
    arguments: dict[str, Any] = {"path": place, "name": subset}
    if stored is not None:
        files = _addresses(place, stored, subset)
        arguments = {"path": "parquet", "data_files": files, "storage_options": storage_options(place)}
    try:
        opened: Mapping[str, Any] = datasets.load_dataset(streaming=streaming, **arguments)
    except Exception as error:  # as in _recorded_subsets
        said = redact_answer(first_line(error))
        cause = error if stored is None else None  # that of a store may quote secrets
        raise ConfigError(f"{place}: its subset {subset} cannot be read: {said}") from cause
    expected = {ATTACKS, SIGN} if subset == SIGNS else {"epsilon", *ANSWER}
    for rows in opened.values():
        if not expected <= set(rows.column_names or ()):
            raise ConfigError(f"{place} is no dataset of fgsm-pipeline: its subset {subset} has other columns.")
    return opened


def _addresses(place: str, manifest: Manifest, subset: str) -> dict[str, list[str]]:
    """The files of a subset by split, `subset/split-00000-of-00004-RUN.parquet`.

    Raises:
        ConfigError: none is there yet, or the manifest lists one that is none of its shards.
    """
    files: dict[str, list[str]] = {split: [] for split in manifest.split_rows}
    splits = {shard_file(subset, shard, manifest.edition): shard.split for shard in manifest.plan.shards}
    for entry in manifest.files:
        if not entry.path.startswith(f"{subset}/"):
            continue
        if entry.path not in splits:
            raise ConfigError(f"{place}: its manifest.json lists {entry.path}, which is no shard of this run.")
        files[splits[entry.path]].append(f"{place.rstrip('/')}/{entry.path}")
    if not any(files.values()):
        raise ConfigError(f"{place} holds no shards yet; run fgsm generate to its end.")
    return {split: listed for split, listed in files.items() if listed}


def _chosen(opened: Mapping[str, Any], split: str | None, place: str) -> Mapping[str, Any]:
    if split is None:
        return opened
    if split not in opened:
        raise ConfigError(f"split: {place} has no split {split!r}; it has {', '.join(opened)}.")
    return {split: opened[split]}


def _from_signs(rows: Any, asked: Sequence[int] | None, streaming: bool) -> Any:
    """One split of layout signs at some levels, None for all that are recorded."""
    first: dict[str, Any] = next(iter(rows.select_columns([ATTACKS])), {ATTACKS: []})
    recorded = [round(255 * attack["epsilon"]) for attack in first[ATTACKS]]
    stored = rows.features
    evaluators = {name: stored[f"clean_{evaluator_columns(name)[0]}"] for name in evaluator_ids(list(stored))}
    columns = image_columns(
        stored["label"], stored["clean_prediction"], "target" in stored, evaluators, streamed=FILE in stored
    )
    kept = {name: stored[name] for name in kept_columns(list(stored))}
    features = datasets.Features({**columns, **kept, IMAGE: SteppedImage()})
    levels = [0, *recorded] if asked is None else asked
    parts: list[Part] = [([rows], partial(_step_along_sign, level=level, recorded=recorded)) for level in levels]
    return _view(parts, features, rows.split, streaming)


def _from_images(subsets: Mapping[int, Any], levels: Sequence[int], streaming: bool) -> Any:
    """One split of layout images at some levels, from its subsets by level."""
    if all(level in subsets for level in levels):
        return datasets.concatenate_datasets([subsets[level] for level in levels])
    # Rows of the subsets lie side by side, since a shard's files are committed together. Any attacked one will do.
    aligned = [subsets[max(subsets)], subsets[0]]
    parts: list[Part] = [
        ([subsets[level]], _as_stored) if level in subsets else (aligned, partial(_step_as_attacked, level=level))
        for level in levels
    ]
    features = datasets.Features({**subsets[0].features, IMAGE: SteppedImage(attacked=True)})
    return _view(parts, features, subsets[0].split, streaming)


def _step_along_sign(rows: pa.Table, level: int, recorded: Sequence[int]) -> pa.Table:
    """One level out of rows of layout signs."""
    image = _cells(rows.column(IMAGE), rows.column(SIGN) if level else None, level)
    return pa.table({IMAGE: image, **one_level(rows, level, recorded)})


def _as_stored(rows: pa.Table) -> pa.Table:
    """Rows of layout images, their images as those of a view."""
    return _with_image(rows, _cells(rows.column(IMAGE), None, 0))


def _step_as_attacked(rows: pa.Table, clean: pa.Table, level: int) -> pa.Table:
    """Another level out of attacked rows of layout images and the clean ones of the same images."""
    if not rows.column(LAST).equals(clean.column(LAST)):
        raise ConfigError("Attacked and clean rows are not those of the same images; is the dataset complete?")
    rows = _with_image(rows, _cells(clean.column(IMAGE), rows.column(IMAGE), level))
    evaluated = [column for name in evaluator_ids(rows.column_names) for column in evaluator_columns(name)]
    unknown = dict.fromkeys((*ANSWER, "fooled", *evaluated))
    answers: dict[str, Any] = {"epsilon": np.full(len(rows), level / 255), **unknown}
    for name, values in answers.items():
        index, kind = rows.schema.get_field_index(name), rows.schema.field(name).type
        rows = rows.set_column(index, name, pa.nulls(len(rows), kind) if values is None else pa.array(values))
    return rows


def _with_image(rows: pa.Table, image: pa.ChunkedArray) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(IMAGE), IMAGE, image)


def _cells(pictures: pa.ChunkedArray, directions: pa.ChunkedArray | None, level: int) -> pa.ChunkedArray:
    """Image columns as one of STEPPED_TYPE; the encoded bytes stay where they are."""
    names = ["picture", "direction"]
    beside = pa.table([pictures, pictures if directions is None else directions], names)
    cells = []
    for batch in beside.to_batches():  # as long as the chunks of both allow
        picture, direction = (batch.column(name).field("bytes") for name in names)
        if directions is None:
            direction = pa.nulls(len(batch), pa.binary())
        levels = pa.array(np.full(len(batch), level, dtype=np.uint8))
        cells.append(pa.StructArray.from_arrays([picture, direction, levels], fields=list(STEPPED_TYPE)))
    return pa.chunked_array(cells, STEPPED_TYPE)


def _view(parts: Sequence[Part], features: Any, split: Any, streaming: bool) -> Any:
    """The rows of all parts, one part after the other."""
    if streaming:
        # A list, so that `datasets` can deal its items out to the workers of a DataLoader.
        shards = [
            ([rows.shard(stored[0].num_shards, index) for rows in stored], make)
            for stored, make in parts
            for index in range(stored[0].num_shards)
        ]
        return datasets.IterableDataset.from_generator(_rows, features, {"shards": shards}, split=split)
    table = _ViewTable(
        partial(_join, [([rows.data for rows in stored], make) for stored, make in parts], list(features))
    )
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), split=split)


def _rows(shards: Sequence[Part]) -> Iterator[dict[str, Any]]:
    for stored, make in shards:
        for tables in zip(*(rows.with_format("arrow").iter(STREAMED_ROWS) for rows in stored), strict=True):
            yield from make(*tables).to_pylist()


def _join(parts: Sequence[Part], columns: Sequence[str]) -> pa.Table:
    return pa.concat_tables([make(*(rows.table for rows in stored)).select(columns) for stored, make in parts])


class _ViewTable(datasets.table.InMemoryTable):  # type: ignore[misc]
    """A table over memory-mapped ones that is pickled as the way to make it.

    By value, as its base class does it, every worker process would get a copy of the whole dataset.
    """

    def __init__(self, make: Callable[[], pa.Table], table: pa.Table | None = None) -> None:
        super().__init__(make() if table is None else table)
        self.make = make

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "metadata": self.table.schema.metadata}

    def __setstate__(self, state: dict[str, Any]) -> None:
        make = state["make"]
        _ViewTable.__init__(self, make, make().replace_schema_metadata(state["metadata"]))

    def replace_schema_metadata(self, metadata: Mapping[Any, Any] | None = None) -> "_ViewTable":
        return _ViewTable(self.make, self.table.replace_schema_metadata(metadata))
