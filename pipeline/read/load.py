"""Read a dataset back: the same rows from any layout, at any epsilon, with nothing of the attack in memory.

Rows that are stored as they are asked for are read as they are. Others are views. Where an image is made on reading,
the `image` cell of a view holds a stored picture, the picture that says in which direction its values move, and how
far. Reading the cell makes the image, so that columns can be selected, rows shuffled and formats set as with stored
images, and nothing is copied.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from pipeline.core.addresses import is_address
from pipeline.core.epsilon import reading_levels
from pipeline.core.errors import ConfigError, explained, first_line
from pipeline.core.redaction import redact_answer
from pipeline.core.variants import Variant
from pipeline.layouts.base import ATTACKS, IMAGE, LAST, Layout, Picture, columns_of, kept_columns
from pipeline.layouts.registry import LAYOUTS
from pipeline.layouts.stepped import SteppedImage, stepped_cells
from pipeline.output.folder import OutputFolder, local_folder, shard_file
from pipeline.output.manifest import Manifest, read_manifest, require_manifest, warn_if_incomplete
from pipeline.output.objects import storage_options
from pipeline.read.choice import Ids, choose_variants, variants_to_read
from pipeline.read.repository import manifest_folder

# Rows that a streaming view holds at a time.
STREAMED_ROWS = 64


# One variant, or a piece of one: stored rows, side by side where there are several of them, and what makes those of
# the result from as many tables.
Part = tuple[Sequence[Any], Callable[..., pa.Table]]


def load(
    path_or_repo: str | Path,
    epsilons: Sequence[str | float] | None = None,
    split: str | None = None,
    streaming: bool = False,
    *,
    models: Ids | None = None,
    attacks: Ids | None = None,
    allow_incomplete: bool = False,
) -> Any:
    """Load a dataset of any layout: a row per image and variant, with the columns of layout images.

        pipeline.load("out/cifar10", ["8/255"], split="test")
        pipeline.load("out/cifar10", [0, "8/255"], split="test", models="resnet20", attacks=["fgsm", "pgd"])

    Args:
        path_or_repo: an output folder, its address in an object store, or a Hub id.
        epsilons: `k/255`, a decimal as in the config (rounded down), or 0 for clean; rows come in this order.
            None: clean and every recorded epsilon, rising. Every attack that is chosen gives rows at each of them.
            Where it has not recorded one the images are made exactly, and what the models would say of them is null.
            That needs an attack whose images lie along one direction (fgsm, noise). Others are left out, with a
            warning, at an epsilon that another attack has recorded; it is an error if `attacks` names them, or if
            nothing at that epsilon is recorded.
        split: one of the dataset's; None loads all.
        streaming: read ahead of use only, in bounded memory.
        models: the id of an attacked model, or a list of them: only rows whose images were made by attacks on these.
            Clean rows are of no model and stay, and so do those of an attack that asks no model (noise), unless
            `attacks` leaves it out. None: all. Within an epsilon rows come in the dataset's own order of attacks and
            models.
        attacks: the id of an attack, or a list of them: only clean rows and theirs. None: all.
        allow_incomplete: do not warn where shards of an output folder are missing.

    Returns:
        What `datasets.load_dataset` returns: a `Dataset`, or an `IterableDataset` when streaming; without a split
        a `DatasetDict` or `IterableDatasetDict` of them.

    Raises:
        ConfigError: there is no such dataset, split, model or attack, it is not of ours, an epsilon cannot be stored,
            or one is neither recorded nor can it be made, as `epsilons` says.
    """
    asked = None if epsilons is None else reading_levels(epsilons)
    stored, local = None, None
    if is_address(path_or_repo):
        place = str(path_or_repo)
        folder = OutputFolder(place)
        stored = require_manifest(folder)
        if not allow_incomplete:
            warn_if_incomplete(folder, stored)
    else:
        local = local_folder(path_or_repo)
        place = str(local or path_or_repo)
        if local and not allow_incomplete and (manifest := read_manifest(OutputFolder(local))):
            warn_if_incomplete(OutputFolder(local), manifest)
    opened = cache(partial(_open, place, stored, streaming))
    layout, recorded = _recorded(place, opened) if stored is None else (stored.layout, stored.variants)
    if stored or not _suffices(recorded, asked, by_id=models is not None or attacks is not None):
        manifest = stored or require_manifest(OutputFolder(local or manifest_folder(place)))
        recorded = manifest.variants
        wanted = variants_to_read(manifest, asked, models=models, attacks=attacks)
    else:
        wanted = choose_variants(recorded, asked, models=models, attacks=attacks)
    pictures = dict.fromkeys(picture for variant in wanted for picture in layout.source(variant, recorded))
    subsets = _subsets(place, opened, layout, pictures, split)
    splits = {
        name: _in_variants(layout, {subset: own[name] for subset, own in subsets.items()}, wanted, recorded, streaming)
        for name in next(iter(subsets.values()))
    }
    if split is not None:
        return splits[split]
    return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(splits)


def _recorded(place: str, opened: Callable[[str], Mapping[str, Any]]) -> tuple[Layout, Sequence[Variant]]:
    """The layout of a dataset, and the recorded variants, clean first, as its subsets and its rows show them."""
    # A dozen exception types of three libraries; all mean the same here.
    with explained(f"{place} cannot be read as a dataset", kind=ConfigError):
        names = datasets.get_dataset_config_names(place)

    def first(subset: str, column: str) -> Any:
        for rows in opened(subset).values():
            if column in (rows.column_names or ()):
                for row in rows.select_columns([column]):
                    return row[column]
        return None

    for layout in LAYOUTS.values():
        recorded = layout.recorded(names, first)
        if recorded is not None:
            return layout, recorded
    raise ConfigError(
        f"{place} is no dataset of fgsm-pipeline: its card lists {', '.join(names)}, and no layout has these subsets."
    )


def _suffices(recorded: Sequence[Variant], levels: Sequence[int] | None, *, by_id: bool) -> bool:
    """Whether what subsets and rows show of the recorded variants is enough to choose some: what made each of them may
    not be among it, and whether other epsilons follow from the images that are stored, only the manifest says."""
    named = recorded[-1].attack is not None or not by_id
    return named and set(choose_variants(recorded, levels)) <= set(recorded)


def _open(place: str, stored: Manifest | None, streaming: bool, subset: str) -> Mapping[str, Any]:
    """The splits of a subset; from an object store as its manifest lists them."""
    arguments: dict[str, Any] = {"path": place, "name": subset}
    if stored is not None:
        files = _addresses(place, stored, subset)
        arguments = {"path": "parquet", "data_files": files, "storage_options": storage_options(place)}
    try:
        opened: Mapping[str, Any] = datasets.load_dataset(streaming=streaming, **arguments)
    except Exception as error:  # as in _recorded
        said = redact_answer(first_line(error))
        cause = error if stored is None else None  # that of a store may quote secrets
        raise ConfigError(f"{place}: its subset {subset} cannot be read: {said}") from cause
    return opened


def _subsets(
    place: str,
    opened: Callable[[str], Mapping[str, Any]],
    layout: Layout,
    pictures: Iterable[Picture],
    split: str | None,
) -> dict[str, Mapping[str, Any]]:
    """The splits of the subsets that hold some pictures, by the names of these; one split alone, if it is named."""
    found: dict[str, Mapping[str, Any]] = {}
    for subset, column in pictures:
        found[subset] = opened(subset) if split is None else {split: opened(subset).get(split)}
        if None in found[subset].values():
            raise ConfigError(f"split: {place} has no split {split!r}; it has {', '.join(opened(subset))}.")
        refused = (
            f"{place} is no dataset of fgsm-pipeline: its subset {subset} lacks columns, or has them in another form"
        )
        with explained(refused, errors=(AttributeError, KeyError, ValueError), kind=ConfigError):
            for rows in found[subset].values():
                stored = rows.features or {}
                _ = stored[column]
                _columns(layout, stored)
    return found


def _columns(layout: Layout, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The features of layout images but the image, from those of any subset.

    Raises:
        AttributeError, KeyError, ValueError: it has others.
    """
    answers = {**stored[ATTACKS].feature, **stored} if layout.per_image else stored
    names = list(answers)
    return {name: answers[name] for name in [*(column.name for column in columns_of(names)), *kept_columns(names)]}


def _addresses(place: str, manifest: Manifest, subset: str) -> dict[str, list[str]]:
    """The files of a subset by split, `subset/split-00000-of-00004-RUN.parquet`."""
    files: dict[str, list[str]] = {split: [] for split in manifest.split_rows}
    splits = {shard_file(subset, shard, manifest.edition): shard.split for shard in manifest.plan.shards}
    for path in (entry.path for entry in manifest.files if entry.path.startswith(f"{subset}/")):
        if path not in splits:
            raise ConfigError(f"{place}: its manifest.json lists {path}, which is no shard of this run.")
        files[splits[path]].append(f"{place.rstrip('/')}/{path}")
    if not any(files.values()):
        raise ConfigError(f"{place} holds no shards yet; run fgsm generate to its end.")
    return {split: listed for split, listed in files.items() if listed}


def _in_variants(
    layout: Layout,
    subsets: Mapping[str, Any],
    variants: Sequence[Variant],
    recorded: Sequence[Variant],
    streaming: bool,
) -> Any:
    """One split in some variants, from its subsets by name."""
    if not layout.per_image and all(variant in recorded for variant in variants):
        return datasets.concatenate_datasets([subsets[layout.subset(variant)] for variant in variants])
    made = any(len(layout.source(variant, recorded)) > 1 for variant in variants)
    any_rows = next(iter(subsets.values()))
    image = SteppedImage(attacked=not layout.stores_sign) if made else datasets.Image()
    columns = {IMAGE: image, **_columns(layout, any_rows.features)}
    parts: list[Part] = []
    for variant in variants:
        names = list(dict.fromkeys(picture.subset for picture in layout.source(variant, recorded)))
        make = partial(_in_variant, layout, names, variant, recorded, made)
        parts.append(([subsets[name] for name in names], make))
    return _view(parts, datasets.Features(columns), any_rows.split, streaming)


def _in_variant(
    layout: Layout, names: Sequence[str], variant: Variant, recorded: Sequence[Variant], made: bool, *tables: pa.Table
) -> pa.Table:
    """Rows of one variant out of those of some subsets, which lie side by side, since a shard's files are committed
    together. `made`: whether some of the view's images are made on reading, and its cells are such as can be."""
    if any(not table.column(LAST).equals(tables[0].column(LAST)) for table in tables[1:]):
        raise ConfigError("Attacked and clean rows are not those of the same images; is the dataset complete?")
    stored = dict(zip(names, tables, strict=True))
    with explained("A row cannot be read", "fgsm verify names the damaged file", errors=(ValueError,)):
        rows = layout.rows(stored, variant, recorded)
    picture, *direction = (stored[subset].column(column) for subset, column in layout.source(variant, recorded))
    image = stepped_cells(picture, direction[0] if direction else None, variant.level) if made else picture
    return pa.table({IMAGE: image, **dict(zip(rows.column_names, rows.columns, strict=True))})


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
